"""The weights from before an update that looks dangerous, so that they survive it.

A copy of every parameter and state before every step would cost time, and the memory of a model or more. What
ruins parameters shows before: the first steps of an optimiser, settings that its dtype cannot hold, a gradient or a
learning rate out of line with the steps before. Those updates are copied, the others are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """An update that is about to be made. `norms`, `rates`: gradient norms and learning rates of the steps before."""

    optimizer: Any
    taken: int
    norm: float | None
    rate: float | None
    norms: Sequence[float]
    rates: Sequence[float]


class Copies:
    """Values of one optimiser's parameters and states from before its update."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        self._values = [p.detach().clone() for p in self.parameters]
        self._states = {p: _copied(optimizer.state[p]) for p in self.parameters if p in optimizer.state}
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def exchange(self) -> None:
        """Puts the copies in the place of what is there now, and keeps that in turn."""
        now = Copies.__new__(Copies)
        now.optimizer, now.parameters = self.optimizer, self.parameters
        now._values = [p.detach().clone() for p in self.parameters]
        state = self.optimizer.state
        now._states = {p: dict(state[p]) for p in self.parameters if p in state}
        now._groups = [
            {k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups
        ]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self._values, strict=True):
                parameter.copy_(value)
        for parameter in self.parameters:
            state.pop(parameter, None)
            if parameter in self._states:
                state[parameter] = self._states[parameter]
        for group, values in zip(self.optimizer.param_groups, self._groups, strict=False):
            group.update(values)
        self._values, self._states, self._groups = now._values, now._states, now._groups

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The weights and states as they are now, whatever is done to them inside."""
        now = Copies(self.optimizer)
        try:
            yield
        finally:
            now.exchange()


def danger(update: Update) -> str:
    """Why the weights are to be kept before this update, or ""."""
    found = next((words for words, applies in DANGERS if applies(update)), "")
    return found if found and fits(update.optimizer) else ""


def fits(optimizer: Any) -> bool:
    """Whether there is room for a copy of its parameters and states."""
    needed: dict[torch.device, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {}).values()
            for tensor in (parameter, *(one for one in state if isinstance(one, Tensor))):
                needed[tensor.device] = needed.get(tensor.device, 0) + tensor.numel() * tensor.element_size()
    return all(
        size <= (torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else _MOST_BYTES)
        for device, size in needed.items()
    )


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: one.detach().clone() if isinstance(one, Tensor) else one for name, one in state.items()}


def _is_young(update: Update) -> bool:
    return update.taken < _YOUNG


def _has_bad_setting(update: Update) -> bool:
    return bool(bad_settings(update.optimizer))


def bad_settings(optimizer: Any) -> list[str]:
    """Settings that are NaN or infinite, such as a learning rate: "lr = nan"."""
    return [
        f"{name} = {value}"
        for group in optimizer.param_groups
        for name, value in group.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]


def _loses_epsilon(update: Update) -> bool:
    """An epsilon that is 0 in the dtype of the parameters divides by 0 where a gradient is 0."""
    for group in update.optimizer.param_groups:
        eps = group.get("eps")
        if isinstance(eps, float) and eps > 0:
            for dtype in {p.dtype for p in group["params"]}:
                if dtype in (torch.float16, torch.bfloat16) and float(torch.tensor(eps, dtype=dtype)) == 0:
                    return True
    return False


def _stands_out(now: float | None, before: Sequence[float]) -> bool:
    return now is not None and len(before) >= _YOUNG and now > _OUT_OF_LINE * median(before)


# --- tables -------------------------------------------------------------------------------------------

DANGERS: tuple[tuple[str, Callable[[Update], bool]], ...] = (
    ("one of its first steps", _is_young),
    ("a setting that is no number", _has_bad_setting),
    ("its epsilon is 0 in the dtype of the parameters", _loses_epsilon),
    ("a gradient far larger than before", lambda update: _stands_out(update.norm, update.norms)),
    ("a learning rate far larger than before", lambda update: _stands_out(update.rate, update.rates)),
)
_YOUNG = 3
_OUT_OF_LINE = 8.0
_MOST_BYTES = 2 << 30
