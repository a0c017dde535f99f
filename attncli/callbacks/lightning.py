"""The watch as a callback of Lightning's Trainer."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from attncli.api import Watch, watch

# Two packages hold the same class under different names, and each knows its own alone.
_PACKAGE = (
    "pytorch_lightning"
    if "pytorch_lightning" in sys.modules or not find_spec("lightning")
    else "lightning.pytorch"
)
Callback: Any = import_module(_PACKAGE).Callback


class LightningWatch(Callback):  # type: ignore[misc]
    """`Trainer(callbacks=[LightningWatch(log="run.jsonl")])`: watches while `fit` runs.

    `settings`: those of `attncli.watch`. `run`: the watch, once training began.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.run: Watch | None = None
        self._is_on = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.run = watch(pl_module, **self.settings)
        self.run.__enter__()
        self._is_on = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        if self._is_on and self.run is not None:
            self._is_on = False
            self.run.__exit__(None, None, None)
