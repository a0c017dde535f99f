"""What was seen of a training run: its last steps, samples of its attention, and the fault that ended it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step (counted from 1 over all optimisers), or one that a loss scaler skipped. None: not observed.

    `loss`: what `backward()` was called on, without loss scaling, the mean over micro-batches. `gradient_norm`: the
    2-norm of all gradients before clipping, without loss scaling. `parameter_absmax`: the largest magnitude of any
    parameter after the step, and `parameter` its name.
    """

    number: int
    loss: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    parameter: str | None = None
    parameter_absmax: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of one attention head at one step. `layer`: the module path of the call.

    `metric`: "entropy" (nats), "entropy_ratio", "entropy_rest" (nats), "score_max", "dot_absmax", "headroom_bits".
    Headroom is that of `dtype`, the dtype in which the products of the call are stored; None where they are not.
    """

    step: int
    layer: str
    call: int
    head: int
    metric: str
    value: float
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """A parameter that one optimiser step moved: its largest magnitude before and after."""

    step: int
    parameter: str
    before: float
    after: float
    learning_rate: float | None = None
    gradient_absmax: float | None = None


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An optimiser as it was at its first step. `dtype`: of most of its parameters."""

    name: str
    dtype: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """The first step that went wrong.

    `seen`: where it was first visible. `value`: "nan", "+inf" or "-inf" of it ("" for a loss scale). `tensors`: names
    of bad gradients or parameters. `batch`: {"loader", "epoch", "index", "items"} of the batch in use, as far as
    known; epoch and index count from 0 within the loader. Where the origin tells, also the "element" of the batch
    that it lies in, and the "item" that this is. `reproduced`: whether the replay of the step showed the
    same; None where it was not replayed, `why` says why. `withheld`: whether the weights are still those from before
    the step. `rank`: of the process in which the fault began. `spoiled`: parameters that were not finite already,
    before the update that was withheld.
    """

    step: int
    seen: Literal["loss", "gradient", "parameter", "loss scale"]
    value: str
    tensors: tuple[str, ...] = ()
    batch: Mapping[str, Any] | None = None
    reproduced: bool | None = None
    why: str = ""
    withheld: bool | None = None
    source: str | None = None
    rank: int | None = None
    spoiled: int = 0


@dataclass(frozen=True, slots=True)
class Training:
    """`seen`: steps that were watched. `steps`: the last of them. `samples`: in the order of their steps."""

    seen: int
    steps: tuple[Step, ...] = ()
    samples: tuple[Sample, ...] = ()
    moved: tuple[Moved, ...] = ()
    optimizers: tuple[Optimizer, ...] = ()
    fault: Fault | None = None
