"""The settings under which something ran, to run it under them again: gradients, autocast, random states, the line."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Around(NamedTuple):
    """The settings under which an entry ran. `autocast`: kinds of device and dtypes; `random`: of calls of modules."""

    gradients: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    random: tuple[Any, ...] | None


def around_module() -> Around:
    """The settings now, with the random states."""
    return Around(torch.is_grad_enabled(), autocast(), random_states())


def autocast() -> tuple[tuple[str, torch.dtype], ...]:
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind))


def random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return (
        torch.get_rng_state(),
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
        on_gpu,
    )


def is_written_down() -> bool:
    """Whether torch traces what runs now, or captures it as a CUDA graph: nothing may be read or computed beside it."""
    if torch._C._get_tracing_state() is not None:
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextmanager
def as_then(around: Around) -> Iterator[None]:
    if around.random is not None:
        on_cpu, python, numpy, on_gpu = around.random
        torch.set_rng_state(on_cpu)
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(around.gradients))
        for kind, dtype in around.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        yield


def place() -> tuple[str, int] | None:
    """The innermost line of code that is neither torch's nor ours."""
    return next(_lines(_TORCH_AND_US), None)


def is_functional_call() -> bool:
    """Whether the module that is about to be called was given other weights, by torch.func.functional_call."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        home = frame.f_globals.get("__name__", "")
        if home == "torch._functorch.functional_call" or home == "torch.nn.utils.stateless":
            return True
        if home.partition(".")[0] not in ("torch", "attncli"):
            return False
        frame = frame.f_back
    return False


def script_place() -> tuple[str, int] | None:
    """The innermost line of the script itself: not of torch, attncli or another installed library."""
    found = next((line for line in _lines((*_TORCH_AND_US, "runpy")) if not _is_installed(line[0])), None)
    return found if found is not None and not found[0].startswith("<") else None


def _lines(without: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The lines that run now, the innermost first, but for those of some packages."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        # The code of a compiled function is generated: its lines are nobody's.
        if frame.f_globals.get("__name__", "").partition(".")[0] not in without and file[:6] != "<eval_":
            yield file, frame.f_lineno
        frame = frame.f_back


def _is_installed(file: str) -> bool:
    return bool({"site-packages", "dist-packages"} & set(Path(file).parts))


# --- tables -------------------------------------------------------------------------------------------

_TORCH_AND_US = ("torch", "attncli")
_KINDS = ("cpu", "cuda", *(("mps",) if torch.backends.mps.is_available() else ()))
