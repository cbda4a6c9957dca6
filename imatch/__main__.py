"""`python -m imatch`: the same as the command `imatch`."""

from imatch.cli.main import main

if __name__ == "__main__":
    main(prog_name="imatch")
