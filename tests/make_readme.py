"""Fills the README with real output: `python tests/make_readme.py`. The test checks that it is up to date.

A block stands behind a comment that names its command, and before it, each ended by ";", those that prepare it. The
table of rules stands between two comments. The terminal picture is drawn by rich from the reports of its commands.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from attncli.rules import RULES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "examples" / "terminal.svg"
SHOWN = (
    "attncli check examples/broken/no_scale.py:broken --input examples/broken/no_scale.py:batch",
    "attncli entropy examples/dates/model.py:build --input examples/dates/model.py:batch",
)


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


def picture() -> str:
    """What a terminal of 100 columns shows for `SHOWN`, as SVG."""
    from rich.console import Console

    screen = Console(
        width=100,
        record=True,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    for command in SHOWN:
        screen.print(f"[bold]$ {command}[/bold]", highlight=False, soft_wrap=False)
        _draw(command.split()[1:], screen)
        screen.print()
    drawn = screen.export_svg(title="attncli", unique_id="attncli")
    # A picture that fetches fonts from elsewhere is shown without them, or not at all.
    return re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", drawn, flags=re.DOTALL)


def _draw(arguments: Sequence[str], screen: object) -> None:
    """Runs a command whose table goes to `screen`, as on a terminal."""
    from attncli.cli import run

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with (
        _working_in(ROOT),
        mock.patch.object(sys, "argv", ["attncli", *arguments]),
        mock.patch.object(sys, "stdout", Terminal()),
        mock.patch("rich.console.Console", return_value=screen),
    ):
        run()


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _output(commands: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    printed = ""
    with tempfile.TemporaryDirectory() as scratch:
        # What the commands write stays out of the repository.
        shutil.copytree(ROOT / "examples", Path(scratch) / "examples")
        for command in commands.split("; attncli "):
            done = subprocess.run(
                [sys.executable, "-m", "attncli", *command.split()],
                cwd=scratch,
                env=environment,
                check=False,
                capture_output=True,
                text=True,
            )
            if done.returncode not in (0, 1):  # 1: it found something, as some examples are there to show
                raise RuntimeError(done.stderr)
            printed = done.stdout
    return printed


def _rules() -> str:
    rows = [f"| {r.code} {r.name} | {r.severity} | {r.what} | {r.threshold} |" for r in RULES]
    return "\n".join(["| rule | severity | what it finds | when |", "|---|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
