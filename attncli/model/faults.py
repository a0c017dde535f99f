"""What the user's own code raises, told in three parts: where, what, and what to try.

Ctrl-C is nobody's fault and passes through; so does an error that has its three parts already.
"""

from __future__ import annotations

import contextlib
import linecache
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from attncli.errors import AttncliError, ModelError


@contextlib.contextmanager
def user_code(subject: str, doing: str, remedy: str, module: Any = None) -> Iterator[None]:
    """Runs foreign code: its prints go to stderr, whatever it raises becomes a ModelError.

    `doing` begins the message: "the forward pass". `module`: where to look up the path of the module that raised.
    """
    try:
        # stdout carries the report alone.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except AttncliError:
        raise
    except SystemExit as error:
        problem = f"{doing} ended the program with sys.exit({error.code!r}){_where(error.__traceback__)}."
        raise ModelError(subject, problem, "Keep what parses arguments under `if __name__`.") from error
    except Exception as error:
        if is_out_of_memory(error):
            problem = f"{doing} ran out of memory{_inside(error, module)}: {told(error)}"
            raise ModelError(subject, _sentence(problem), OUT_OF_MEMORY) from error
        problem = f"{doing} failed{_inside(error, module)}{_where(error.__traceback__)}: {told(error)}"
        raise ModelError(subject, _sentence(problem), remedy) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on whichever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def told(error: BaseException, limit: int = 600) -> str:
    """Class and message of an error on one line: of a long message, its beginning and its end."""
    text = " ".join(str(error).split())
    if len(text) > limit:
        text = f"{text[: limit // 3]} … {text[-limit * 2 // 3 :]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _inside(error: BaseException, module: Any) -> str:
    """ " in module layers.0.attention": the innermost module whose method was running."""
    if not isinstance(module, torch.nn.Module):
        return ""
    paths = {id(child): path for path, child in module.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = paths.get(id(frame.f_locals.get("self")))
        found = path if path is not None else found
    return f" in module {found}" if found else ""


def _where(trace: TracebackType | None) -> str:
    """ " (model.py:12 in forward: scores = q @ k)": the last lines that are neither torch's nor ours."""
    steps = [
        (frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in traceback.walk_tb(trace)
    ]
    own = [step for step in steps if not step[0].startswith(("<frozen", *_NOT_THE_USERS))]
    lines = []
    for file, line, name in own[-2:]:
        source = linecache.getline(file, line).strip()
        lines.append(f"{Path(file).name}:{line} in {name}" + (f": {source}" if source else ""))
    return f" ({' → '.join(lines)})" if lines else ""


OUT_OF_MEMORY = "Try a smaller --seq-len or --batch-size, --dtype bfloat16, or --device-map auto."
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|failed to allocate", re.I)
_NOT_THE_USERS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),
    contextlib.__file__,
)
