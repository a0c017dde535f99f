"""What the hooks of `.pre-commit-hooks.yaml` run: one command of attncli on each of several files.

pre-commit passes all changed files at once, and each shard by itself; a command reads one checkpoint, and shards make
sense together alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Runs `attncli COMMAND OPTIONS FILE` for each file, a folder for all of its shards; the largest exit code.

    `arguments`: the command, options of one word each (--fail-on=warning), and files.
    """
    from attncli.cli import run

    command, *words = arguments
    options = [word for word in words if word.startswith("-")]
    checkpoints = dict.fromkeys(_checkpoint(word) for word in words if not word.startswith("-"))
    worst = 0
    for checkpoint in checkpoints:
        sys.argv = ["attncli", command, *options, checkpoint]
        worst = max(worst, run())
        if worst == _INTERRUPTED:
            break
    return worst


def _checkpoint(file: str) -> str:
    return str(Path(file).parent) if _SHARD.search(file) else file


_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
_INTERRUPTED = 130

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
