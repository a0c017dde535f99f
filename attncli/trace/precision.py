"""Keeps what the user set up for the model (grad, autocast, short-cut products, threads) out of measurements.

On CPU with "medium" float32 products err in the second digit; a measurement must not. Torch's own threads wait
busily for each other after every operation: on tiles that fit a cache this costs more than it gains, and on a shared
core ten to a hundred times more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch

CORES: ContextVar[int] = ContextVar("CORES", default=1)
P = ParamSpec("P")
R = TypeVar("R")


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`function` without grad, autocast and threads of torch's own, with float32 products in float32.

    Everything is put back behind it. `CORES` says how many threads `function` may start itself.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_float32_products())
            stack.enter_context(_one_thread())
            for device in AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    token = CORES.set(max(before, CORES.get()))
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        CORES.reset(token)


@contextmanager
def _float32_products() -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Torch refuses the old setting where the new ones (torch ≥ 2.9) were set one by one.
        backends: list[Any] = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
        kept = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, kept, strict=True):
                backend.fp32_precision = precision
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
