"""Damaged and hostile input through the real command: a message of three parts, exit code 2, little time and
memory, nothing executed. Each command runs in a process of its own under limits that the kernel enforces.
"""

import io
import json
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import attncli
from attncli.checkpoint import open_checkpoint
from attncli.errors import CheckpointError

# The budget is "well under 5 s"; a shared machine may take several times as long as a quiet one.
SECONDS = 20
# Address space, of which a Python with its libraries maps much more than it touches.
ADDRESS_BYTES = 1 << 30
RESIDENT_BYTES = 300 << 20


def run(*arguments: str | Path, limited: bool = True) -> subprocess.CompletedProcess[str]:
    """`attncli ARGUMENTS`; one that takes too long or too much memory fails the test."""

    def limit() -> None:
        # macOS refuses to limit the address space.
        if limited and sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    return subprocess.run(
        [sys.executable, "-m", "attncli", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        timeout=3 * SECONDS,
        check=False,
        preexec_fn=limit,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "NO_COLOR": "1"},
    )


def refused(path: Path, *options: str) -> tuple[str, str, str]:
    """Subject, problem and remedy of the error that `attncli inspect PATH` ends with."""
    done = run("inspect", path, *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stderr)
    match = re.fullmatch(r"error: ([^\n]*?): ([^\n]*\.)\n  try: ([^\n]*[.?])\n", done.stderr)
    assert match, done.stderr
    assert len(done.stderr) < 2000
    subject, problem, remedy = match.groups()
    assert subject.startswith(str(path)) or str(path).startswith(subject)
    return subject, problem, remedy


def write(
    path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def sparse(path: Path, start: bytes, size: int) -> Path:
    """A file of `size` bytes that begins like this; the rest takes no space."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
    return path


def gguf(tensors: int, keys: int, rest: bytes = bytes(1000)) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


# --- files --------------------------------------------------------------------------------------------

SAFETENSORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty."),
    "truncated length": (lambda path: path.write_bytes(b"\x10\0\0"), "which is no known checkpoint format"),
    "truncated header": (
        lambda path: write(path, b'{"a": {"dtype": "F32", "sha', length=500),
        "the header claims 500 bytes, more than the 27 bytes that follow.",
    ),
    "truncated data": (lambda path: write(path, {"a": entry(0, 8)}, bytes(4)), "but the file holds 4 bytes"),
    "length 2^63": (lambda path: write(path, b"{}", length=1 << 63), "claims 9223372036854775808 bytes"),
    "length 100 MB": (lambda path: write(path, b"{}", length=100_000_000), "claims 100000000 bytes"),
    "100 MB of zeros": (
        lambda path: sparse(path, struct.pack("<Q", 100_000_000) + b"{", 100_000_008),
        "not valid JSON",
    ),
    "overlap": (
        lambda path: write(path, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "tensors 'a' and 'b' overlap in the file.",
    ),
    "duplicate": (
        lambda path: write(path, b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
        "names 'a' twice",
    ),
    "NaN": (
        lambda path: write(path, {"a": entry(0, 4) | {"shape": [float("nan")]}}, bytes(4)),
        "no counts: [nan], [0, 4].",
    ),
    "deeply nested": (lambda path: write(path, b'{"a":' + b"[" * 1_000_000), "not valid JSON"),
    "long name": (
        lambda path: write(path, {"module." * 100_000 + "q": entry(0, 4)}, bytes(4)),
        "characters; at most 4096 are expected.",
    ),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_damaged_safetensors_file_is_refused_with_its_reason(tmp_path: Path, case: str) -> None:
    make, expected = SAFETENSORS[case]
    path = tmp_path / "model.safetensors"
    make(path)
    subject, problem, _ = refused(path)
    assert subject == str(path)
    assert expected in problem


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text file": (lambda path: path.write_text("just some notes\n"), "this is a text file"),
    "GGUF, 10 million tensors": (lambda path: path.write_bytes(gguf(10_000_000, 0)), "10000000 tensors"),
    "GGUF, 10 million keys": (lambda path: path.write_bytes(gguf(0, 10_000_000)), "10000000 metadata keys"),
    "GGUF, 10 million strings": (
        lambda path: sparse(
            path,
            gguf(0, 1, string(b"tokens") + struct.pack("<IIQ", 9, 8, 10_000_000)),
            600_000_000,
        ),
        "10000000 strings",
    ),
    "a pickle without end": (lambda path: archive(path, b"\x80\x02" + b"N0" * 100), "the pickle"),
    "a zip without its end": (
        lambda path: path.write_bytes(archive(path, b"x" * 500).read_bytes()[:-60]),
        "its directory of members is missing or damaged.",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_damaged_files_are_refused_with_their_reason(tmp_path: Path, case: str) -> None:
    make, expected = OTHERS[case]
    path = tmp_path / "weights"
    make(path)
    subject, problem, _ = refused(path)
    assert subject == str(path)
    assert expected in problem


@pytest.mark.parametrize(
    ("megabytes", "expected"), [(1024, "1073741824 bytes; at most"), (200, "a zip bomb")]
)
def test_a_pickle_that_unpacks_to_a_gigabyte_is_not_unpacked(
    tmp_path: Path, megabytes: int, expected: str
) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("archive/data.pkl", "w", force_zip64=True) as member:
            for _ in range(megabytes):
                member.write(bytes(1 << 20))
        file.writestr("archive/version", "3\n")
    assert path.stat().st_size < 10 << 20
    assert expected in refused(path)[1]


@pytest.mark.parametrize("case", ["100 MB of zeros", "deeply nested", "length 100 MB"])
def test_the_worst_headers_take_little_memory(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    SAFETENSORS[case][0](path)
    program = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'attncli', 'inspect', sys.argv[1]], capture_output=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert 1 << 20 < int(done.stdout) * unit < RESIDENT_BYTES


# --- code in a pickle ---------------------------------------------------------------------------------


class Boom:
    """Calls `os.system` when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize(
    ("container", "options"), [("zip", ()), ("legacy", ()), ("zip", ("--values", "--bounds"))]
)
def test_a_pickle_that_runs_a_command_is_reported_and_never_run(
    tmp_path: Path, container: str, options: tuple[str, ...]
) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "pytorch_model.bin"
    state = {f"layers.0.self_attn.{side}_proj.weight": torch.ones(8, 8) for side in "qkvo"}
    payload = {"state_dict": state, "hook": Boom(f"touch {marker}")}
    torch.save(payload, path, _use_new_zipfile_serialization=container == "zip")
    done = run("inspect", path, "--format", "json", *options, limited=False)
    assert not marker.exists()
    assert done.returncode == 1, done.stderr
    found = next(row for row in json.loads(done.stdout)["findings"] if row["code"] == "ATT002")
    assert (found["name"], found["severity"]) == ("unknown-pickle-global", "error")
    assert f"{os.system.__module__}.system" in found["message"]
    assert found["message"].endswith("Nothing was run.")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the pickle of this test does nothing"


def test_a_bare_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Boom(f"touch {marker}")))
    assert "a bare pickle" in refused(tmp_path / "model.bin")[1]
    assert not marker.exists()


def test_an_object_array_in_an_npz_file_is_reported_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "model.npz"
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3), b=np.array([Boom(f"touch {marker}")], dtype=object))
    done = run("inspect", path, "--format", "json")
    assert [row["code"] for row in json.loads(done.stdout)["findings"]] == ["ATT003"]
    assert not marker.exists()


# --- folders ------------------------------------------------------------------------------------------


def model(folder: Path, shards: int = 2) -> dict[str, str]:
    """A sharded model; returns its weight_map."""
    folder.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for n in range(shards):
        shard = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"layers.{n}.self_attn.{side}_proj.weight" for side in "qkvo"]
        save_file({name: np.ones((8, 8), np.float32) for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index(folder, weight_map)
    return weight_map


def index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model(tmp_path / "m")
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    subject, problem, remedy = refused(tmp_path / "m")
    assert subject.endswith("model.safetensors.index.json")
    assert problem == "1 of 2 files it names are missing: model-00002-of-00002.safetensors."
    assert remedy == "Download the missing files into the same folder."


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    model(tmp_path / "m")
    shard = tmp_path / "m" / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    subject, problem, _ = refused(tmp_path / "m")
    assert subject == str(shard)
    assert "but the file holds 1023 bytes of data." in problem


@pytest.mark.parametrize("target", ["../secret.safetensors", "{outside}", "a/../../secret.safetensors"])
def test_an_index_that_points_outside_its_folder_reads_nothing_there(tmp_path: Path, target: str) -> None:
    secret = tmp_path / "secret.safetensors"
    save_file({"secret": np.ones(3, np.float32)}, secret)
    weight_map = model(tmp_path / "m")
    index(tmp_path / "m", weight_map | {"secret": target.format(outside=secret)})
    _, problem, remedy = refused(tmp_path / "m")
    assert "outside its own folder" in problem
    assert "Do not use this index" in remedy


def test_a_shard_that_links_to_some_other_file_shows_nothing_of_it(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password: swordfish\n")
    model(tmp_path / "m")
    shard = tmp_path / "m" / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(secret)
    subject, problem, remedy = refused(tmp_path / "m")
    assert subject == str(shard)
    assert "this is a text file" in problem
    assert "swordfish" not in problem + remedy


def test_folders_that_link_to_themselves_end(tmp_path: Path) -> None:
    folder = tmp_path / "loop"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "up").symlink_to("..")
    (folder / "me").symlink_to("me")
    (folder / "model.safetensors").symlink_to("model.safetensors")
    assert "link to a file that is not there" in refused(folder)[1]
    assert "this is a link to me, which is not there." in refused(folder / "me")[1]
    (folder / "model.safetensors").unlink()
    assert refused(folder)[1] == "the folder holds no files."


def test_a_folder_without_weights_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    subject, problem, remedy = refused(tmp_path)
    assert subject == str(tmp_path)
    assert problem == "the folder holds 1 files (README.md), and none of them are weights."
    assert "*.safetensors" in remedy


def test_pipes_and_sockets_keep_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pipe.safetensors", "pipe.index.json"):
        os.mkfifo(name)
        assert refused(tmp_path / name)[1] == "this is neither a file nor a folder."
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.gguf")  # relative: the path of a socket has room for some 100 characters
        assert refused(tmp_path / "socket.gguf")[1] == "this is neither a file nor a folder."
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json", ".metadata"):
        os.mkfifo(folder / name)
    assert refused(folder)[1] == "the folder holds no files."
    save_file({"a": np.ones(3, np.float32)}, folder / "other.safetensors")
    assert run("inspect", folder).returncode == 3


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero on this system")
def test_devices_without_end_are_not_read() -> None:
    assert refused(Path("/dev/zero"))[1] == "this is neither a file nor a folder."


def test_without_permission_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(3, np.float32)}, path)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: pretend
        opened = Path.open

        def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
            if self == path:
                raise PermissionError(13, "Permission denied", str(self))
            return opened(self, *arguments, **options)

        monkeypatch.setattr(Path, "open", refuse)
        for given in (path, tmp_path):
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint(given)
            assert caught.value.subject == str(path)
            assert caught.value.problem == "no permission to read it."
        return
    assert refused(path)[1] == "no permission to read it."
    assert refused(tmp_path)[0] == str(path)


def test_a_disk_that_fails_is_our_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "m")

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("attncli.checkpoint.safetensors.read", fail)
    monkeypatch.setattr("attncli.checkpoint.folder.read_file", fail)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m")
    assert caught.value.problem == "it cannot be read (Input/output error)."


def test_a_folder_that_vanishes_while_it_is_read_is_our_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path / "m")

    def vanish(names: list[str]) -> list[str]:
        shutil.rmtree(tmp_path / "m")
        return names

    monkeypatch.setattr("attncli.checkpoint.strip_wrappers", vanish)
    with pytest.raises(CheckpointError, match="it cannot be read"):
        open_checkpoint(tmp_path / "m")


# --- between header and values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("truncated", "needs bytes up to 1,136, but the file has 1,000."),
        ("removed", "cannot be read: no such file or directory."),
        ("replaced by a folder", "cannot be read: is a directory."),
    ],
)
def test_a_checkpoint_that_changes_before_its_values_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, expected: str
) -> None:
    model(tmp_path / "m")
    shard = tmp_path / "m" / "model-00002-of-00002.safetensors"
    headers = open_checkpoint(tmp_path / "m")
    if change == "truncated":
        os.truncate(shard, 1000)
    else:
        shard.unlink()
        if change != "removed":
            shard.mkdir()
    monkeypatch.setattr("attncli.api.weights.open_checkpoint", lambda _: headers)
    for values, bounds in ((True, False), (False, True)):
        with pytest.raises(CheckpointError) as caught:
            attncli.inspect(tmp_path / "m", values=values, bounds=bounds, heads=2)
        assert caught.value.subject == str(shard)
        assert expected in caught.value.problem


# --- what reaches the terminal ------------------------------------------------------------------------


def test_names_in_a_checkpoint_cannot_steer_the_terminal(tmp_path: Path) -> None:
    evil = "layers.0.\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202eattn"
    header = {f"{evil}.{side}_proj.weight": entry(256 * n, 256 * n + 256) for n, side in enumerate("qkvo")}
    for row in header.values():
        row["shape"] = [8, 8]
    path = write(tmp_path / "model.safetensors", header, bytes(1024))
    done = run("inspect", path)
    assert done.returncode == 0, done.stderr
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", done.stdout + done.stderr)
    assert r"\x1b" in done.stdout
    done = run("inspect", path, "--format", "json")
    assert json.loads(done.stdout)["layers"][0]["path"] == evil
    write(path, {evil: None})
    assert r"\x1b" in refused(path)[1]


def test_file_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[2J\x9bb"
    folder.mkdir()
    done = run("inspect", folder)
    assert done.returncode == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="file names elsewhere are text")
def test_file_names_that_are_no_text_are_shown_anyhow(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path / "model-") + b"\xff\xfe.safetensors"))
    buffer = io.BytesIO()
    torch.save({f"layers.0.attn.{side}_proj.weight": torch.ones(8, 8) for side in "qkvo"}, buffer)
    path.write_bytes(buffer.getvalue())
    for options in ((), ("--format", "json")):
        done = run("inspect", path, *options, limited=False)
        assert done.returncode in (0, 1), done.stderr
        assert "Traceback" not in done.stderr
