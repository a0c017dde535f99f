"""`attncli check` as a process among others: Ctrl-C at any moment, pipes that close, a disk that is full, no colour."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_check import CODE

SLOW = """
import pathlib, time

def here(name):
    pathlib.Path(name).touch()
    time.sleep(60)

class Slow(Model):
    def forward(self, x):
        x = super().forward(x)
        here("inside")
        return x

class Tripped(Model):
    '''Sleeps in the run that proves a cause.'''
    def forward(self, x):
        x = super().forward(x)
        if len(runs) > 1:
            here("inside")
        return x

def slow_to_run():
    return Slow(Attention(), Attention())

def slow_to_load():
    here("inside")

def slow_to_prove():
    return Tripped(Attention(hide=True))

def many():
    '''More than a pipe holds, and a finding.'''
    return Model(*[Attention() for _ in range(39)], Attention(hide=True))
"""
# Python starts with this: a disk that takes its time over the second half of a report.
SLOW_DISK = """
import pathlib, time

whole = pathlib.Path.write_bytes

def write_bytes(self, data):
    if b"attncli-report" not in data[:200]:
        return whole(self, data)
    with self.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        pathlib.Path("inside").touch()
        time.sleep(60)

pathlib.Path.write_bytes = write_bytes
"""
RUN = ("--input", "code.py:batch", "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(CODE + SLOW, encoding="utf-8")
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    root = str(Path(__file__).parent.parent)
    return {**kept, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", **more}


@contextlib.contextmanager
def started(folder: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-m", "attncli", "check", *arguments],
        cwd=folder,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def interrupted(folder: Path, *arguments: str, **more: str) -> tuple[int, bytes, bytes, float]:
    """Exit code, stdout, stderr, and the seconds between Ctrl-C and the end."""
    with started(folder, *arguments, **more) as running:
        until = time.monotonic() + 90
        while not (folder / "inside").exists():
            assert time.monotonic() < until, "it never came there"
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        before = time.monotonic()
        running.send_signal(signal.SIGINT)
        out, errors = running.communicate(timeout=30)
        return running.returncode, out, errors, time.monotonic() - before


# --- Ctrl-C -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ["slow_to_load", "slow_to_run", "slow_to_prove"])
def test_ctrl_c_ends_a_check_at_once_with_130_and_writes_nothing(build: str, folder: Path) -> None:
    before = {*(path.name for path in folder.iterdir()), "inside"}
    code, out, errors, seconds = interrupted(folder, f"code.py:{build}", *RUN, "-o", "report.json")
    assert (code, out) == (130, b"")
    assert b"Traceback" not in errors
    assert seconds < 15
    assert {path.name for path in folder.iterdir()} == before


def test_ctrl_c_while_a_report_is_written_leaves_the_old_one(folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "disk" / "sitecustomize.py").write_text(SLOW_DISK, encoding="utf-8")
    (folder / "report.json").write_text("the old report", encoding="utf-8")
    before = {*(path.name for path in folder.iterdir()), "inside"}
    path = os.pathsep.join((str(folder / "disk"), environment()["PYTHONPATH"]))
    code, out, errors, _ = interrupted(folder, "code.py:healthy", *RUN, "-o", "report.json", PYTHONPATH=path)
    assert (code, out) == (130, b"")
    assert b"Traceback" not in errors
    assert (folder / "report.json").read_text(encoding="utf-8") == "the old report"
    assert {path.name for path in folder.iterdir()} == before


# --- where the report goes ----------------------------------------------------------------------------


def test_a_reader_that_leaves_early_changes_nothing_of_the_exit_code(folder: Path) -> None:
    with started(folder, "code.py:many", *RUN, "-f", "json") as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline() == b"{\n"  # as `head -1` does
        running.stdout.close()
        errors = running.stderr.read()
        assert (running.wait(timeout=60), errors) == (1, b"")


def test_what_is_piped_is_strict_json_alone(folder: Path) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    with started(folder, "code.py:hidden", *RUN, "-f", "json") as running:
        out, errors = running.communicate(timeout=60)
    report = json.loads(out.decode("utf-8"), parse_constant=refuse)
    assert (running.returncode, report["command"], errors) == (1, "check", b"")
    assert "nan" in {row["value"] for row in report["measurements"] if isinstance(row["value"], str)}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_in_a_sentence(folder: Path) -> None:
    words = [sys.executable, "-m", "attncli", "check", "code.py:healthy", *RUN]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            words, cwd=folder, env=environment(), stdout=full, stderr=subprocess.PIPE, check=False
        )
    first = "error: stdout: the report cannot be written (No space left on device)."
    assert (done.returncode, done.stderr.decode().splitlines()[0]) == (2, first)


# --- a terminal ---------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_of_40_columns_without_colour_is_readable(folder: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "attncli", "check", "code.py:unscaled", *RUN],
        cwd=folder,
        env=environment(TERM="xterm-256color", COLUMNS="40", NO_COLOR="1"),
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    out = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 65536):
            out += part
    os.close(ours)
    assert running.wait(timeout=60) == 0
    text = out.decode("utf-8")
    assert "ATT410" in text
    codes = {code for codes in re.findall(r"\x1b\[([\d;]*)m", text) for code in codes.split(";")}
    assert codes <= {"", "0", "1", "2", "3"}  # bold, dim and italic are no colours
    plain = re.sub(r"\x1b\[[\d;]*m", "", text).replace("\r", "")
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 40
    words = " ".join(plain.split())
    assert "attention 1 warning" in words
    assert "2 attention layers, 2 calls, all explained; 1 warning" in words
