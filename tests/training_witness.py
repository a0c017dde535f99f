"""A plain run of a training script, and where something of it is first no number; without attncli.

It looks at every loss at `backward()`, at every gradient before clipping and before the optimiser's step, and at every
parameter after it. Slow, short and obvious: it says what is true of a script before any tool does.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data.dataloader import _BaseDataLoaderIter


@dataclass
class Witness:
    """`step`, `seen`, `value`: the first that was no number; None and "" if nothing was.

    `epoch`, `index`, `items`: of the loader's batch in use then. `steps`: all that ran, `skipped`: those of them that
    a loss scaler left out. `moved`: the largest magnitude of a parameter after each step. `code`, `raised`: how the
    script ended. `batch`: the last that was fetched, `sampled`: the items of each.
    """

    steps: int = 0
    skipped: list[int] = field(default_factory=list)
    step: int | None = None
    seen: str = ""
    value: str = ""
    epoch: int | None = None
    index: int | None = None
    items: tuple[int, ...] = ()
    moved: dict[int, float] = field(default_factory=dict)
    batch: tuple[int, int, tuple[int, ...]] | None = None
    sampled: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    code: int | None = None
    raised: BaseException | None = None

    def look(self, seen: str, tensors: Iterable[Tensor]) -> None:
        if self.step is not None:
            return
        for tensor in tensors:
            if not torch.isfinite(tensor).all():
                self.step, self.seen, self.value = self.steps + 1, seen, _kind(tensor)
                if self.batch is not None:
                    self.epoch, self.index, self.items = self.batch
                return


def witnessed(script: Path, arguments: Iterable[str] = ()) -> Witness:
    """Runs the script in this process as `python script arguments` would."""
    witness = Witness()
    with _listening(witness), _as_main(script, arguments):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as error:
            witness.code = error.code if isinstance(error.code, int) else 1
        except Exception as error:  # noqa: BLE001 - what the script raises is part of what it does
            witness.raised = error
    return witness


@contextlib.contextmanager
def _listening(witness: Witness) -> Iterator[None]:
    finite: set[int] = set()
    epochs: dict[int, int] = {}
    real_backward, real_scaler_step = Tensor.backward, torch.amp.GradScaler.step
    real_clip, real_opened = clip_grad_norm_, _BaseDataLoaderIter.__init__
    real_index, real_next = _BaseDataLoaderIter._next_index, _BaseDataLoaderIter.__next__

    def begins(optimizer: Any, args: Any, kwargs: Any) -> None:
        witness.look("gradient", _gradients(_parameters(optimizer)))
        finite.clear()
        finite.update(id(one) for one in _parameters(optimizer) if torch.isfinite(one).all())

    def ends(optimizer: Any, args: Any, kwargs: Any) -> None:
        parameters = _parameters(optimizer)
        witness.look("parameter", [one.detach() for one in parameters if id(one) in finite])
        witness.steps += 1
        witness.moved[witness.steps] = max(float(one.detach().abs().max()) for one in parameters)

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        witness.look("loss", [self.detach()])
        return real_backward(self, *args, **kwargs)

    def scaler_step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        steps = witness.steps
        result = real_scaler_step(self, optimizer, *args, **kwargs)
        if witness.steps == steps:
            witness.steps += 1
            witness.skipped.append(witness.steps)
        return result

    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = list(parameters)
        witness.look("gradient", _gradients(parameters))
        return real_clip(parameters, *args, **kwargs)

    def opened(self: Any, loader: Any) -> None:
        self.witnessed = epochs.get(id(loader), 0), []
        epochs[id(loader)] = self.witnessed[0] + 1
        real_opened(self, loader)

    def index(self: Any) -> Any:
        found = real_index(self)
        self.witnessed[1].append(tuple(item for item in found if item is not None))
        return found

    def following(self: Any) -> Any:
        # Workers run ahead of the loop: what counts is what the loop was given.
        batch = real_next(self)
        epoch, order = self.witnessed
        given = self._num_yielded - 1
        witness.batch = epoch, given, order[given]
        witness.sampled[epoch, given] = order[given]
        return batch

    handles = (register_optimizer_step_pre_hook(begins), register_optimizer_step_post_hook(ends))
    try:
        with (
            mock.patch.object(Tensor, "backward", backward),
            mock.patch.object(torch.amp.GradScaler, "step", scaler_step),
            mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip),
            mock.patch.object(_BaseDataLoaderIter, "__init__", opened),
            mock.patch.object(_BaseDataLoaderIter, "_next_index", index),
            mock.patch.object(_BaseDataLoaderIter, "__next__", following),
        ):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _as_main(script: Path, arguments: Iterable[str]) -> Iterator[None]:
    argv, path, main = sys.argv, list(sys.path), sys.modules["__main__"]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    random = torch.get_rng_state()
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = argv, path, main
        torch.set_rng_state(random)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [one for group in optimizer.param_groups for one in group["params"]]


def _gradients(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [one.grad.detach() for one in tensors if one.grad is not None]


def _kind(tensor: Tensor) -> str:
    if torch.isnan(tensor).any():
        return "nan"
    return "+inf" if torch.isposinf(tensor).any() else "-inf"
