"""What the watch over a training tells, and to whom."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from attncli.records import Step
from attncli.training.copies import Copies
from attncli.training.loaders import Batch


@dataclass
class Sighting:
    """A step that went wrong, at the moment when it was seen. The program of the step is the monitor's.

    `parameters`: whose gradients or values are bad; `optimizer`: whose update it was. `copies`: the weights from before
    the update, where they were kept; they have been put back already. `batch`: what was in use, where the step used
    others since. `is_updated`: whether the update was made before it was seen. `place`: the line
    of the script at which it was seen, where that is not the one that runs now.
    """

    step: int
    seen: Literal["loss", "gradient", "parameter", "loss scale"]
    value: str
    parameters: Sequence[Tensor] = ()
    optimizer: Any = None
    copies: Copies | None = None
    batch: Batch | None = None
    is_updated: bool = False
    place: str | None = None


class Listener(Protocol):
    """Who is told. What `went_wrong` returns is raised in the script; None lets it go on.

    `was_called`: a step went wrong in another process, and did not here.
    """

    def went_wrong(self, sighting: Sighting) -> BaseException | None: ...

    def was_called(self, step: int) -> BaseException | None: ...

    def place(self) -> str | None: ...

    def sampling(self, module: nn.Module, step: int) -> AbstractContextManager[None] | None: ...

    def sample_again(self, module: nn.Module, args: Any, kwargs: Any, step: int) -> None: ...

    def output_is_bad(self, module: nn.Module, step: int) -> None: ...

    def stepped(self, step: Step) -> None: ...

    def broken(self, error: Exception) -> None: ...
