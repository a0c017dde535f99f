"""Callbacks for loops that are not one's own: `TrainerWatch` for transformers, `LightningWatch` for Lightning.

Each is `attncli.watch` from the beginning of the training to its end; the arguments are those of `attncli.watch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["LightningWatch", "TrainerWatch"]

if TYPE_CHECKING:
    from attncli.callbacks.lightning import LightningWatch
    from attncli.callbacks.trainer import TrainerWatch

_HOMES = {"LightningWatch": "lightning", "TrainerWatch": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attncli.callbacks' has no attribute {name!r}")
    return getattr(import_module(f"attncli.callbacks.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
