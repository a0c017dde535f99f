"""What goes into this room and what comes out of it: options, a runnable model, a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

# Called with (what is being done, done so far, total).
Progress = Callable[[str, int, int], None]
ModelKind = Literal["huggingface", "gguf", "torchscript", "export", "code"]
BatchKind = Literal["text", "file", "callable", "synthetic"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How to load MODEL. None is "as the model has it".

    `weights` reads the checkpoint of `--weights` into {parameter name: tensor}; `weights_path` is its name for
    messages. `strict`: missing and unexpected keys are an error, not a note. `device_map` and `offload_folder` go
    to accelerate.
    """

    device: str = "auto"
    dtype: str | None = None
    autocast: str | None = None
    weights: Callable[[], Mapping[str, Tensor]] | None = None
    weights_path: str | None = None
    strict: bool = True
    trust_remote_code: bool = False
    device_map: str | None = None
    offload_folder: str | None = None
    train_mode: bool = False


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What to feed the model. `input` is a file, or `file.py:callable`; without it and `text`: synthetic."""

    text: tuple[str, ...] = ()
    input: str | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Runnable:
    """A model that is ready to be called.

    `dtype` is that of most floating parameters, None where there are none. `configs`: (source, values) as
    `attncli.records.Config` takes them. `tokenizer` loads the tokenizer on its first call; None where the
    kind of model has none. `import_path`: the folder that stands on sys.path while the user's code runs.
    """

    module: Callable[..., Any]
    kind: ModelKind
    path: str
    device: torch.device
    dtype: str | None
    configs: tuple[tuple[str, Mapping[str, Any]], ...]
    parameters: int
    notes: tuple[str, ...] = ()
    autocast: torch.dtype | None = None
    tokenizer: Callable[[], Any] | None = None
    import_path: str | None = None
    # A program's own example inputs as (args, kwargs), whose shapes and dtypes it was made for.
    example: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Batch:
    """What the model is called with. `inputs`: name → shape and dtype of every tensor, nested ones dotted.

    `tokens`: the tokens of each text, padding included, as a person reads them; `decoder_tokens`: those that the
    decoder is given. None where the batch is not text. `seed` also seeds whatever the forward pass itself draws
    (dropout, noise).
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    kind: BatchKind
    inputs: Mapping[str, Mapping[str, Any]]
    tokens: tuple[tuple[str, ...], ...] | None = None
    notes: tuple[str, ...] = ()
    seed: int = field(default=0)
    decoder_tokens: tuple[tuple[str, ...], ...] | None = None


@dataclass
class Made:
    """Arguments that were made up, and what has to be said about them."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Draw:
    """Random values that follow from a seed alone; the random state of the process stays as it is."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape: int) -> Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self._generator)

    def ids(self, shape: tuple[int, ...], size: int, avoid: frozenset[int] = frozenset()) -> Tensor:
        """Integers below `size`, none of `avoid` unless that leaves none."""
        allowed = torch.tensor(
            [index for index in range(size) if index not in avoid] or list(range(max(size, 1)))
        )
        return allowed[torch.randint(len(allowed), shape, generator=self._generator)]


def placed(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """`value` with every tensor in it on the device, floating ones in the dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: placed(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(placed(item, device, dtype) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(placed(item, device, dtype) for item in value)
    return value
