"""Runs a training script as `python SCRIPT.py args` would, with the watch on."""

from __future__ import annotations

import atexit
import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from attncli.errors import AttncliError, UsageError

if TYPE_CHECKING:
    from attncli.api import Report, Watch


class Script(NamedTuple):
    """What is run: a file or, with `is_module`, a module; `args` are its own. `strayed`: options of attncli in them."""

    target: str
    args: tuple[str, ...]
    is_module: bool = False
    strayed: tuple[str, ...] = ()


class Halted(SystemExit):
    """Ends the script at the step that went wrong: no Exception, which scripts catch, and quiet in threads."""


@dataclass
class Ran:
    """How a script ended. `watch`: None where it never imported torch. `error`: what it raised, a SystemExit too."""

    watch: Watch | None = None
    error: BaseException | None = None
    # Why there can be no watch.
    refused: AttncliError | None = None

    @property
    def halted(self) -> bool:
        return isinstance(self.error, Halted)


def run_script(script: Script, start: Callable[[], Watch], *, to_stderr: bool) -> Ran:
    """Runs it to its end, whatever that is. `start`: makes the watch, once torch is imported.

    `to_stderr`: what the script prints goes to stderr, since stdout is to carry the report alone.
    """
    if not script.is_module and not Path(script.target).is_file():
        problem = "there is no such script." if not Path(script.target).exists() else "this is no file."
        raise UsageError(script.target, problem, "Give a Python file, or -m MODULE.")
    ran = Ran()

    def begin() -> None:
        try:
            ran.watch = start()
        except AttncliError as error:
            ran.refused = error
            raise Halted from None
        ran.watch.__enter__()

    sys.argv = [script.target, *script.args]
    sys.path[0] = str(Path.cwd()) if script.is_module else str(Path(script.target).resolve().parent)
    if script.is_module:
        _must_exist(script.target)
    try:
        with (
            _as_python_starts(),
            _when_imported("torch", begin),
            redirect_stdout(sys.stderr) if to_stderr else nullcontext(),
        ):
            _execute(script)
    except BaseException as error:  # noqa: BLE001 - how a script ends is told by the caller
        ran.error = error
        if ran.refused is not None:
            raise ran.refused from None
    finally:
        if ran.watch is not None:
            ran.watch.__exit__(None, None, None)
    return ran


def exit_code(ran: Ran) -> int:
    """The exit code that `python SCRIPT.py` would give, after it has shown what Python shows of an error."""
    error = ran.error
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        sys.stderr.write(f"{error.code}\n")
        return 1
    shown = error.with_traceback(_of_the_script(error.__traceback__))
    sys.excepthook(type(shown), shown, shown.__traceback__)
    sys.stderr.flush()
    return 1


def die_of_interrupt() -> None:
    """Ends the process as Python ends on Ctrl-C, so that a shell sees that it was interrupted."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _must_exist(module: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise UsageError(f"-m {module}", f"there is no such module ({error}).", _WITH_M) from error
    if found is None:
        raise UsageError(f"-m {module}", "there is no such module.", _WITH_M)


# --- running ------------------------------------------------------------------------------------------


def _execute(script: Script) -> None:
    if script.is_module:
        runpy.run_module(script.target, run_name="__main__", alter_sys=True)
        return
    main = ModuleType("__main__")
    file = str(Path(script.target).absolute())
    loader = importlib.machinery.SourceFileLoader("__main__", file)
    main.__dict__.update(
        __annotations__={},
        __file__=file,
        __builtins__=builtins,
        __loader__=loader,
        __cached__=None,
        __spec__=None,
    )
    # Processes that the script starts find it by this module, and so does what runs at exit.
    sys.modules["__main__"] = main
    source = Path(file).read_bytes()
    try:
        importlib.util.decode_source(source)
    except UnicodeDecodeError as error:  # compile() overlooks it in comments
        line = source[: error.start].count(b"\n") + 1
        problem = f"Non-UTF-8 code starting with '\\x{source[error.start]:02x}' in file {file} on line {line}"
        raise SyntaxError(
            f"{problem}, but no encoding declared; see https://peps.python.org/pep-0263/ for details"
        ) from None
    exec(compile(source, file, "exec", dont_inherit=True), main.__dict__)


@contextmanager
def _as_python_starts() -> Iterator[None]:
    """The hooks, signals and streams that a script finds where nothing else runs in its process."""
    hook = sys.excepthook
    sys.excepthook = sys.__excepthook__
    errors = {name: getattr(getattr(sys, name), "errors", None) for name in USUAL_ERRORS}
    for name, usual in USUAL_ERRORS.items():
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors=usual)
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    ours = in_main and getattr(handler, "__module__", "").startswith("attncli")
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = hook
        for name, before in errors.items():
            stream = getattr(sys, name)
            if not getattr(stream, "closed", True) and hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=before)


@contextmanager
def _when_imported(name: str, then: Callable[[], None]) -> Iterator[None]:
    """Calls `then` once the module is imported: what a script sets before it imports torch must count."""
    if name in sys.modules:
        then()
        yield
        return
    finder = _Finder(name, then)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        load, then = spec.loader.exec_module, self.then

        def load_then_begin(module: ModuleType) -> None:
            load(module)
            # The loader is the module's own: nothing of this stays on it.
            del module.__spec__.loader.exec_module  # type: ignore[union-attr]
            then()

        spec.loader.exec_module = load_then_begin  # type: ignore[method-assign]
        return spec


def _of_the_script(found: TracebackType | None) -> TracebackType | None:
    """The traceback without our own frames and what torch puts around them, as it would be without us."""
    frames: list[TracebackType] = []
    ours = False
    while found is not None:
        name = found.tb_frame.f_globals.get("__name__", "")
        if name.partition(".")[0] == "attncli" or found.tb_frame.f_code.co_name == "attncli_calls":
            ours = True
            if frames and frames[-1].tb_frame.f_code.co_name == "handle_torch_function":
                frames.pop()
        elif not (name == "runpy" and not frames):
            # A function of torch hands itself to the mode that writes it down, and is called by it once more.
            if ours and frames and frames[-1].tb_frame.f_code is found.tb_frame.f_code:
                frames.pop()
            ours = False
            frames.append(found)
        found = found.tb_next
    for one, following in zip(frames, [*frames[1:], None], strict=False):
        one.tb_next = following
    return frames[0] if frames else None


def place_of(error: BaseException) -> str:
    """The last line that an error passed that is not torch's: "train.py:41"."""
    found = _of_the_script(error.__traceback__)
    place = ""
    while found is not None:
        if found.tb_frame.f_globals.get("__name__", "").partition(".")[0] != "torch":
            place = f"{Path(found.tb_frame.f_code.co_filename).name}:{found.tb_lineno}"
        found = found.tb_next
    return place


def summary(ran: Ran, report: Report) -> str:
    """One line for stderr about a run that no fault ended."""
    if ran.watch is None:
        return "torch was not imported, so nothing was watched"
    training: dict[str, Any] = (report.run or {})["training"]
    seen = training["seen"]
    if ran.watch.monitor.failed:
        return f"{seen} step{'s' if seen != 1 else ''} watched before the watch failed"
    if not seen:
        return "no optimiser step was seen, so nothing was watched"
    steps = f"{seen:,} step{'s' if seen != 1 else ''} watched".replace(",", " ")
    faults = training["faults"]
    found = sum(finding.severity == "warning" for finding in report.findings)
    warnings = max(found, len(ran.watch.warnings))
    told = f"{faults} went wrong" if faults else "nothing non-finite" if warnings else "nothing went wrong"
    others = len(ran.watch.monitor.elsewhere)
    told += (
        f"; what ran in {others} other thread{'s' if others != 1 else ''} was not watched" if others else ""
    )
    return f"{steps}, {told}" + (f", {warnings} warning{'s' if warnings != 1 else ''}" if warnings else "")


# --- tables -------------------------------------------------------------------------------------------

# What the command line changed of the streams, and how it was: the name of a stream → its error handler.
USUAL_ERRORS: dict[str, str] = {}

_WITH_M = "Give a module as python -m takes it, from the folder that holds its package."
