"""`python -m attncli` and the command `attncli`."""

import gc
import sys


def main() -> None:
    """Runs the command line. A broken pipe (`attncli … | head`) ends quietly; a bug keeps its traceback."""
    # A command makes many small objects and few cycles: the default threshold costs a fifth of its time.
    # A script that is watched has Python's own.
    if sys.argv[1:2] != ["nan-check"]:
        gc.set_threshold(100_000, 50, 100)
    from attncli.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
