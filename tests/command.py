"""The command `imatch` in the process of a test."""

from imatch.cli.main import main


def command(*arguments):
    """Run it and give back its exit code."""
    return main([*map(str, arguments)], standalone_mode=False) or 0
