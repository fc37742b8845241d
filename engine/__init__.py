"""What makes the method fast, exact and safe; knows no recipe, loss or data set, and of flags their names."""
