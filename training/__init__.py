"""The command line of a training run, what it writes, and how it continues."""
