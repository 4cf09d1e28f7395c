"""The command `memflow`."""
