"""The command line, one module a command: each has `add_to`, which declares its arguments, and `run`."""
