"""Keeps what the user set up for the model (grad, autocast, short-cut matrix products) out of measurements.

On CPU with "medium" float32 products err in the second digit; a measurement must not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`function` without grad and autocast, and with float32 products in float32. Restores all three."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_float32_products())
            for device in AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped


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
