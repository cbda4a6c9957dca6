"""The `imatch` command."""
