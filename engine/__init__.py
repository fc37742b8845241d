"""What makes the method fast, exact and safe; knows nothing of recipes, command lines or names of data sets."""
