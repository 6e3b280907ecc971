"""The command line: run a suite, use it, look into it."""
