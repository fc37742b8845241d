"""From raw data sets and folders of photographs to batches of images."""
