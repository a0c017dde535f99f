"""One forward pass, as the user's own program would run it."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch

from attncli.model.contracts import Batch, Runnable
from attncli.model.factory import on_path
from attncli.model.faults import user_code


def run(model: Runnable, batch: Batch, *, gradients: bool = False) -> Any:
    """What the model returns for the batch, under autocast if it was asked for; `gradients`: ready for a backward pass.

    The random state of the process is as before afterwards; during the pass it follows from the batch's seed.
    Errors: ModelError that says which module raised, and where.
    """
    cuda = [model.device] if model.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_path(model.import_path))
        if model.kind in ("huggingface", "gguf"):
            # Advice of a library to its own users: nothing that belongs into this report.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.default_generator.manual_seed(batch.seed)
        if cuda:
            torch.cuda.manual_seed(batch.seed)
        # Not inference_mode: models that keep or change their inputs fail under it.
        stack.enter_context(torch.set_grad_enabled(gradients))
        if model.autocast is not None:
            stack.enter_context(torch.autocast(model.device.type, dtype=model.autocast))
        stack.enter_context(user_code(model.path, "the forward pass", _remedy(batch), model.module))
        return model.module(*batch.args, **batch.kwargs)


def _remedy(batch: Batch) -> str:
    shapes = ", ".join(f"{name} {entry['dtype']} {entry['shape']}" for name, entry in batch.inputs.items())
    given = f"It was given {shapes}" if shapes else "It was given nothing"
    if batch.kind == "synthetic":
        return f"{given}, made up from what forward asks for: give a real batch with --input FILE or file.py:batch."
    return f"{given}: check that against what forward expects."
