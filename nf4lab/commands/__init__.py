"""The command line, one module per command: each has `add_to`, which declares its arguments, and `run`."""
