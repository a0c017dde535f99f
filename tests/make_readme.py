"""Fills the README with real output: `python tests/make_readme.py`. The test checks that it is up to date.

A block stands behind a comment that names its command; the table of rules stands between two comments.
"""

import re
import subprocess
import sys
from pathlib import Path

from attncli.rules import RULES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def filled(text: str) -> str:
    """The README with every output block and the table of rules made anew."""
    text = re.sub(
        r"(<!-- output: attncli (?P<command>.*?) -->\n```text\n).*?```\n",
        lambda match: f"{match[1]}{_output(match['command'])}```\n",
        text,
        flags=re.DOTALL,
    )
    return re.sub(
        r"(<!-- rules -->\n).*?(<!-- end of rules -->)",
        lambda match: f"{match[1]}{_rules()}{match[2]}",
        text,
        flags=re.DOTALL,
    )


def _output(command: str) -> str:
    arguments = [sys.executable, "-m", "attncli", *command.split()]
    done = subprocess.run(arguments, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: it found something, as some examples are there to show
        raise RuntimeError(done.stderr)
    return done.stdout


def _rules() -> str:
    rows = [f"| {r.code} {r.name} | {r.severity} | {r.what} | {r.threshold} |" for r in RULES]
    return "\n".join(["| rule | severity | what it finds | when |", "|---|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
