"""The watch as a callback of transformers' Trainer."""

from __future__ import annotations

import weakref
from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("TrainerWatch is for transformers' Trainer: pip install 'attncli[hf]'") from error

from attncli.api import Watch, watch


class TrainerWatch(TrainerCallback):
    """`Trainer(…, callbacks=[TrainerWatch(log="run.jsonl")])`: watches from the first step to the last.

    `settings`: those of `attncli.watch`. `run`: the watch, once training began. A Trainer tells its callbacks nothing
    of an error that ends it; the watch is then taken off when the callback goes, or when training begins anew.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.run: Watch | None = None
        self._off: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._end()
        self.run = watch(given.get("model"), given.get("optimizer"), **self.settings)
        self.run.__enter__()
        self._off = weakref.finalize(self, self.run.__exit__, None, None, None)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._off is not None:
            self._off()
