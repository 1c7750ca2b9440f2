"""The two drivers, their hooks and the command line."""
