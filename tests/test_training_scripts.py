"""Training scripts that were not written for attncli do, byte for byte, what they do without it."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "training_scripts"
ATTNCLI = [sys.executable, "-m", "attncli"]
SAMPLED = ["nan-check", "--every", "5"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes as POSIX has them")


@dataclass(frozen=True)
class Ended:
    """What one process left: `files` by their name in its folder, but for the script's own source."""

    code: int
    out: str
    err: str
    files: dict[str, bytes] = field(repr=False, default_factory=dict)


Run = Callable[..., Ended]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The scripts in a folder of their own: the same path for every run of a test, so that printed paths agree."""
    return tmp_path / "run"


@pytest.fixture
def in_folder(folder: Path, tmp_path: Path) -> Callable[[Callable[[], tuple[int, str, str]]], Ended]:
    """Runs something in a fresh copy of the scripts, and gives what it left there."""

    def fresh(run: Callable[[], tuple[int, str, str]]) -> Ended:
        extra = {path.name: path.read_bytes() for path in folder.glob("*.py")} if folder.exists() else {}
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(FOLDER / "real", folder, ignore=shutil.ignore_patterns("__pycache__"))
        for name, content in extra.items():
            (folder / name).write_bytes(content)
        before = set(folder.rglob("*"))
        code, out, err = run()
        new = [path for path in folder.rglob("*") if path not in before and path.is_file()]
        left = {str(path.relative_to(folder)): path.read_bytes() for path in new if path.suffix != ".pyc"}
        return Ended(code, out, err, left)

    return fresh


@pytest.fixture
def process(folder: Path, in_folder: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`process([…command…])`: a real process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": "utf-8"}
    environment.pop("OMP_NUM_THREADS", None)

    def start(*command: str, stdin: str = "", **variables: str) -> Ended:
        def run() -> tuple[int, str, str]:
            done = subprocess.run(
                command,
                cwd=folder,
                input=stdin,
                capture_output=True,
                encoding="utf-8",
                timeout=300,
                check=False,
                env={**environment, **variables},
            )
            return done.returncode, done.stdout, done.stderr

        return in_folder(run)

    return start


@pytest.fixture(scope="module")
def server() -> Iterator["subprocess.Popen[str]"]:
    libraries = (
        "torch torch._dynamo numpy transformers pytorch_lightning x_transformers accelerate attncli".split()
    )
    installed = [name for name in libraries if _is_installed(name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["PYTHONIOENCODING"] = "utf-8"
    command = [sys.executable, str(FOLDER / "forked.py"), *installed]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment
    ) as started:
        yield started


@pytest.fixture
def forked(
    server: "subprocess.Popen[str]", folder: Path, in_folder: Callable[..., Ended], tmp_path: Path
) -> Run:
    """`forked("script.py", …)` or `forked("attncli", …)`: in a fork of a process that has imported torch."""

    def start(*command: str) -> Ended:
        out, err = tmp_path / "stdout", tmp_path / "stderr"

        def run() -> tuple[int, str, str]:
            assert server.stdin is not None
            assert server.stdout is not None
            request = {"folder": str(folder), "command": command, "out": str(out), "err": str(err)}
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            return code, out.read_text("utf-8"), err.read_text("utf-8")

        return in_folder(run)

    return start


# --- whole training runs -------------------------------------------------------------------------------

# The script, its optimiser steps, and the library that it needs.
SCRIPTS = (
    ("plain_loop.py", 40, ""),
    ("lightning_fit.py", 16, "pytorch_lightning"),
    ("enwik8_style.py", 12, "x_transformers"),
    ("accelerate_loop.py", 16, "accelerate"),
    ("workers_argparse.py", 22, ""),
    ("nanogpt_style.py", 13, ""),
    ("compiled.py", 20, ""),
    ("gan.py", 30, ""),
    ("lbfgs.py", 10, ""),
    ("mixed_precision.py", 20, ""),
    ("hf_trainer.py", 12, "transformers"),
    ("odd_updates.py", 23, ""),
)


@pytest.mark.parametrize(("script", "steps", "library"), SCRIPTS, ids=[row[0][:-3] for row in SCRIPTS])
def test_a_script_trains_to_the_same_bits_when_it_is_watched(
    forked: Run, script: str, steps: int, library: str
) -> None:
    if library:
        pytest.importorskip(library)
    plain = forked(script, "weights.pt")
    assert plain.code == 0, plain.err
    watched = forked("attncli", *SAMPLED, script, "weights.pt")
    _agree(plain, watched, steps)
    logged = forked("attncli", *SAMPLED, "--log", "log.jsonl", script, "weights.pt")
    lines = _records(logged.files.pop("log.jsonl").decode())
    _agree(plain, logged, steps)
    assert lines
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert all(line["step"] <= steps for line in lines)


def test_data_loaders_that_spawn_their_workers_find_the_classes_of_the_script(process: Run) -> None:
    """Their processes import the script anew, and look for its classes in `__main__`."""
    command = ["workers_argparse.py", "weights.pt", "--start-method", "spawn", "--every", "3"]
    plain = process(sys.executable, *command, OMP_NUM_THREADS="1")
    assert plain.code == 0, plain.err
    _agree(plain, process(*ATTNCLI, *SAMPLED, *command, OMP_NUM_THREADS="1"), 22)


def test_a_module_runs_as_python_dash_m_runs_it(process: Run) -> None:
    command = ["-m", "tiny_project.train", "weights.pt", "--lr", "-m", "x"]
    plain = process(sys.executable, *command, OMP_NUM_THREADS="1")
    assert plain.code == 0, plain.err
    _agree(plain, process(*ATTNCLI, *SAMPLED, *command, OMP_NUM_THREADS="1"), 20)


def test_a_script_finds_the_surroundings_that_python_gives_it(process: Run) -> None:
    """argv, `__main__`, paths, stdin, filters, signals, threads, environment before torch is imported, atexit."""
    command = ["surroundings.py", "weights.pt", "--every", "7", "--help", "ä"]
    plain = process(sys.executable, *command, stdin="words from a pipe")
    assert plain.code == 0, plain.err
    assert "words" in plain.out
    _agree(plain, process(*ATTNCLI, *SAMPLED, *command, stdin="words from a pipe"), 12)


def test_the_trainer_of_transformers_in_a_process_of_its_own(process: Run) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    plain = process(sys.executable, "hf_trainer.py", "weights.pt", OMP_NUM_THREADS="1")
    assert plain.code == 0, plain.err
    _agree(plain, process(*ATTNCLI, *SAMPLED, "hf_trainer.py", "weights.pt", OMP_NUM_THREADS="1"), 12)


# --- how a script may end ------------------------------------------------------------------------------

TRAINED = """\
import atexit, os, signal, sys, threading
import torch

torch.manual_seed(0)
net = torch.nn.Linear(3, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
atexit.register(lambda: print("atexit: weights", net.weight.tolist()))


def train(steps=3):
    for _ in range(steps):
        opt.zero_grad()
        net(torch.randn(4, 3)).square().mean().backward()
        opt.step()


train()
print("trained")
"""
ENDS = {
    "at its last line": "",
    "sys.exit(3)": "sys.exit(3)",
    "sys.exit(0)": "sys.exit(0)",
    "sys.exit()": "sys.exit()",
    "sys.exit(256)": "sys.exit(256)",
    "sys.exit(True)": "sys.exit(True)",
    "sys.exit(-1)": "sys.exit(-1)",
    "sys.exit(text)": "sys.exit('no more data in ∂')",
    "sys.exit(tuple)": "sys.exit((1, 2))",
    "exit of the site module": "exit(5)",
    "SystemExit in a function": "def f():\n    raise SystemExit(4)\nf()",
    "SystemExit while an exception is handled": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    sys.exit(6)",
    "os._exit": "sys.stdout.flush()\nos._exit(7)",
    "os.abort": "sys.stdout.flush()\nos.abort()",
    "SIGTERM": "sys.stdout.flush()\nos.kill(os.getpid(), signal.SIGTERM)",
    "a signal handler that exits": (
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))\nos.kill(os.getpid(), signal.SIGUSR1)\ntrain()"
    ),
    "sys.exit in a thread": "t = threading.Thread(target=sys.exit, args=(8,)); t.start(); t.join()",
    "an exit in atexit": "atexit.register(os._exit, 11)",
    "standard output closed": "sys.stdout.flush()\nsys.stdout.close()",
    "KeyboardInterrupt is handled": (
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    train(10**6)\n"
        "except KeyboardInterrupt:\n    print('stopped early')\n    sys.exit(0)"
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_script_ends_as_it_would_have_ended(forked: Run, folder: Path, end: str) -> None:
    folder.mkdir()
    (folder / "script.py").write_text(TRAINED + ENDS[end] + "\n", "utf-8")
    plain = forked("script.py")
    watched = forked("attncli", *SAMPLED, "script.py")
    assert plain.out.startswith("trained\n")
    assert (watched.code, watched.out, watched.files) == (plain.code, plain.out, plain.files)
    assert _without_addresses(_without_notes(watched.err)) == _without_addresses(plain.err)


def _without_addresses(text: str) -> str:
    return re.sub("0x[0-9a-f]+", "0x…", text)


FAULTS = {
    "an exception": (
        "def inner(x):\n    raise ValueError(f'bad {x}')\n\n\ndef outer():\n    inner(3)\n\n\nouter()"
    ),
    "an exception with a cause": (
        "try:\n    {}['a']\nexcept KeyError as error:\n    raise RuntimeError('no a') from error"
    ),
    "an exception within torch": "net(torch.randn(4, 5))",
    "an exception within a module's forward": (
        "class Net(torch.nn.Module):\n    def forward(self, x):\n        return x.no_such_method()\n\n\n"
        "Net()(torch.ones(1))"
    ),
    "an exception within backward": "net.weight.sum().backward(torch.ones(3))",
    "an exception within a closure": ("def closure():\n    raise OSError(5, 'disk')\n\n\nopt.step(closure)"),
    "an exception group": "raise ExceptionGroup('two', [ValueError(1), TypeError(2)])",
    "an exception whose text fails": (
        "class Odd(Exception):\n    def __str__(self):\n        raise ValueError\n\n\nraise Odd"
    ),
    "an excepthook": (
        "sys.excepthook = lambda kind, error, trace: print('my hook:', kind.__name__, error)\nraise ValueError('x')"
    ),
    "a recursion": "def f():\n    return f()\n\n\nf()",
    "a syntax error": "def f(:\n    pass",
    "a tab": "if True:\n\tx = 1\n        y = 2",
    "a wrong encoding": "# \udce4",
    "a module that is not there": "import no_such_module",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_exception_is_shown_as_python_shows_it(forked: Run, folder: Path, fault: str) -> None:
    if fault == "an exception group" and sys.version_info < (3, 11):
        pytest.skip("no exception groups")
    folder.mkdir()
    (folder / "script.py").write_bytes((TRAINED + FAULTS[fault] + "\n").encode("utf-8", "surrogateescape"))
    plain = forked("script.py")
    watched = forked("attncli", *SAMPLED, "script.py")
    assert plain.code == 1
    assert plain.out.startswith("trained\n") or "Error: " in plain.err.splitlines()[-1]
    assert (watched.code, watched.out) == (plain.code, plain.out)
    assert _of_the_script(_without_notes(watched.err)) == _of_the_script(plain.err)
    assert "attncli" not in _of_the_script(_without_notes(watched.err))


def test_an_exception_ends_a_real_process_alike(process: Run, folder: Path) -> None:
    folder.mkdir()
    (folder / "script.py").write_text(TRAINED + FAULTS["an exception"] + "\n", "utf-8")
    plain = process(sys.executable, "script.py")
    assert plain.code == 1
    assert "in outer" in plain.err
    watched = process(*ATTNCLI, *SAMPLED, "script.py")
    assert (watched.code, watched.out) == (plain.code, plain.out)
    assert _without_notes(watched.err) == plain.err


LASTING = """\
import sys, time
import torch

torch.manual_seed(0)
net = torch.nn.Linear(3, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)


def train():
    step = 0
    while True:
        opt.zero_grad()
        net(torch.randn(4, 3)).square().mean().backward()
        opt.step()
        step += 1
        if step == 7:
            print("seven steps", flush=True)
            time.sleep(60)


try:
    train()
except KeyboardInterrupt:
    print("weights saved", net.weight.tolist())
    if "quietly" not in sys.argv:
        raise
"""


@pytest.mark.parametrize("way", [[], ["quietly"]], ids=["ends the script", "is handled by the script"])
def test_ctrl_c_reaches_the_script_and_nothing_else(folder: Path, tmp_path: Path, way: list[str]) -> None:
    """The interrupt goes to the whole group of processes, as a terminal sends it."""
    folder.mkdir()
    (folder / "script.py").write_text(LASTING, "utf-8")
    plain = _interrupted([sys.executable, "script.py", *way], folder)
    watched = _interrupted([*ATTNCLI, *SAMPLED, "script.py", *way], folder)
    assert plain.out.startswith("seven steps\nweights saved")
    assert plain.code == (0 if way else -signal.SIGINT)
    assert watched.out == plain.out
    assert _without_notes(watched.err) == plain.err
    # A shell shows 130 for both: 128 + SIGINT.
    assert watched.code % 256 in ({0} if way else {-signal.SIGINT % 256, 130})


# --- scripts that are not what they should be ---------------------------------------------------------


def test_a_script_that_does_not_exist_is_a_wrong_usage(forked: Run, folder: Path) -> None:
    folder.mkdir()
    ended = forked("attncli", "nan-check", "missing.py", "--lr", "1")
    assert ended.code == 2
    assert ended.out == ""
    assert "missing.py" in ended.err
    assert "Traceback" not in ended.err


def test_a_module_that_does_not_exist_is_a_wrong_usage(forked: Run, folder: Path) -> None:
    ended = forked("attncli", "nan-check", "-m", "no_such_package.train")
    assert ended.code == 2
    assert "no_such_package" in ended.err
    assert "Traceback" not in ended.err


NEVER = {
    "never trains": "import torch\nprint(torch.nn.Linear(2, 2)(torch.ones(1, 2)).shape)",
    "never imports torch": "print('hello')",
    "is empty": "",
}


@pytest.mark.parametrize("script", NEVER)
def test_a_script_that_takes_no_step_was_not_observed(forked: Run, folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "script.py").write_text(NEVER[script], "utf-8")
    plain = forked("script.py")
    watched = forked("attncli", "nan-check", "script.py")
    assert plain.code == 0
    assert watched.code == 3
    assert watched.out == plain.out
    assert "step" in watched.err
    # With a code of its own the script has the last word.
    (folder / "script.py").write_text(NEVER[script] + "\nimport sys; sys.exit(4)", "utf-8")
    assert forked("attncli", "nan-check", "script.py").code == 4


def test_quiet_leaves_stderr_to_the_script(forked: Run, folder: Path) -> None:
    folder.mkdir()
    (folder / "script.py").write_text(TRAINED + "print('mine', file=sys.stderr)", "utf-8")
    assert forked("attncli", "nan-check", "-q", "script.py").err == "mine\n"


def test_a_script_may_be_named_like_a_module(forked: Run, folder: Path) -> None:
    """`random.py`, `attncli.py`: sys.path[0] makes them shadow what the monitor itself might import late."""
    for name in ("tokenize.py", "attncli.py", "typing_extensions.py"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(TRAINED, "utf-8")
        plain = forked(name)
        watched = forked("attncli", *SAMPLED, name)
        (folder / name).unlink()
        assert (watched.code, watched.out) == (plain.code, plain.out)
        assert _without_notes(watched.err) == plain.err


def test_a_script_elsewhere_reads_its_data_from_the_working_folder(process: Run, folder: Path) -> None:
    text = "import sys, pathlib\nprint(pathlib.Path('data/x.txt').read_text(), sys.argv, __file__, sys.path[0])\n"
    (folder / "code").mkdir(parents=True)
    # The scripts folder is made anew for each run: the script is written where the run cannot remove it.
    outside = folder.parent / "code"
    outside.mkdir()
    (outside / "train.py").write_text(
        "import os; os.makedirs('data', exist_ok=True)\n"
        "open('data/x.txt', 'w').write('found')\n" + text + TRAINED,
        "utf-8",
    )
    plain = process(sys.executable, "../code/train.py", "a")
    watched = process(*ATTNCLI, *SAMPLED, "../code/train.py", "a")
    assert plain.out.startswith("found ['../code/train.py', 'a']")
    assert (watched.code, watched.out, watched.files) == (plain.code, plain.out, plain.files)


# --- a monitor that fails -------------------------------------------------------------------------------

CRASHING = """\
import importlib, sys

place, method, nth = sys.argv[1:4]
module, _, name = place.partition(":")
owner = getattr(importlib.import_module(module), name)
original, calls = getattr(owner, method), 0


def crashes(*args, **kwargs):
    global calls
    calls += 1
    if calls >= int(nth):
        raise RuntimeError("planted in the monitor")
    return original(*args, **kwargs)


setattr(owner, method, crashes)
sys.argv = ["attncli", "nan-check", "--every", "5", *sys.argv[4:]]
from attncli.__main__ import main

main()
"""
PLACES = (
    ("attncli.training.monitor:Monitor", "enters"),
    ("attncli.training.monitor:Monitor", "leaves"),
    ("attncli.training.monitor:Monitor", "backward_begins"),
    ("attncli.training.monitor:Monitor", "clips"),
    ("attncli.training.monitor:Monitor", "update_begins"),
    ("attncli.training.monitor:Monitor", "update_ends"),
    ("attncli.training.monitor:Monitor", "_ended"),
    ("attncli.training.loaders:Loaders", "_begins"),
    ("attncli.training.loaders:Loaders", "_asked"),
    ("attncli.training.loaders:Loaders", "_taken"),
    ("attncli.training.loaders:Loaders", "_told"),
    ("attncli.training.program:Program", "function_called"),
    ("attncli.training.buffers:Buffers", "before"),
    ("attncli.api.watching:Watch", "sampling"),
    ("attncli.api.watching:Watch", "stepped"),
)


@pytest.mark.parametrize(("place", "method"), PLACES, ids=[row[1] for row in PLACES])
def test_a_monitor_that_fails_is_told_once_and_changes_nothing(
    forked: Run, folder: Path, place: str, method: str
) -> None:
    folder.mkdir()
    (folder / "crashing.py").write_text(CRASHING, "utf-8")
    plain = forked("plain_loop.py", "weights.pt")
    watched = forked("crashing.py", place, method, "3", "plain_loop.py", "weights.pt")
    assert (watched.code, watched.out) == (plain.code, plain.out), watched.err
    assert watched.files == plain.files
    assert watched.err.count("planted in the monitor") == 1
    assert "Traceback" not in watched.err
    assert _without_notes(watched.err) == plain.err


# --- helpers -----------------------------------------------------------------------------------------------


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:
        return False


def _agree(plain: Ended, watched: Ended, steps: int) -> None:
    """The same code, output, files and weights; on stderr one line more, with the number of steps."""
    assert watched.code == plain.code, watched.err
    assert watched.out == plain.out
    notes = [line for line in watched.err.splitlines() if line.startswith("attncli: ")]
    assert len(notes) == 1, watched.err
    assert notes[0].startswith(f"attncli: {steps} steps watched")
    assert _timeless(_without_notes(watched.err)) == _timeless(plain.err)
    assert set(watched.files) == set(plain.files)
    differ = [name for name in plain.files if watched.files[name] != plain.files[name]]
    # The Trainer of transformers writes how long it took.
    assert [name for name in differ if not name.endswith("trainer_state.json")] == []
    assert "weights.pt" in plain.files


def _without_notes(err: str) -> str:
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("attncli: "))


def _of_the_script(err: str) -> str:
    """Without the frames that lie in torch, which calls modules in another way where there are hooks."""
    kept, skipping = [], False
    for line in err.splitlines():
        if line.startswith('  File "'):
            skipping = "site-packages" in line
        elif not line.startswith("    "):
            skipping = False
        if not skipping:
            kept.append(re.sub(r"repeated \d+ more times", "repeated", line))
    return "\n".join(kept)


def _timeless(err: str) -> str:
    """Without the numbers of progress bars and of measured times, which no two runs have in common."""
    return re.sub(r" *\d+(\.\d+)?", "#", err)


def _records(text: str) -> list[dict[str, Any]]:
    """Lines of strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _interrupted(command: list[str], folder: Path) -> Ended:
    """SIGINT to the process and its children, once it has printed a line."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
        start_new_session=True,
    ) as started:
        assert started.stdout is not None
        first = started.stdout.readline()
        # It sleeps in the line after.
        time.sleep(0.5)
        os.killpg(started.pid, signal.SIGINT)
        out, err = started.communicate(timeout=120)
    return Ended(started.returncode, first + out, err)
