"""`python -m attncli` and the command `attncli`."""

import sys


def main() -> None:
    """Runs the command line. A broken pipe (`attncli … | head`) ends quietly; a bug keeps its traceback."""
    from attncli.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
