"""Training steps of a model, and the same model in another dtype."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncli.errors import ModelError
from attncli.model.contracts import Batch, Runnable
from attncli.model.running import run


def train(
    model: Runnable,
    batch: Batch,
    steps: int,
    optimizer: str,
    learning_rate: float,
    loss_of: Callable[[Any], Tensor | None],
) -> Any:
    """Takes `steps` optimiser steps on one batch; what the last forward pass returned.

    `optimizer`: a key of `OPTIMIZERS`, with torch's defaults beside the learning rate. Errors: ModelError where nothing
    that the model returns has a gradient.
    """
    module: Any = model.module
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError(model.path, "it has no parameter that could be trained.", "Leave --steps out.")
    stepper = getattr(torch.optim, OPTIMIZERS[optimizer])(trained, lr=learning_rate)
    result = None
    for _ in range(steps):
        stepper.zero_grad()
        result = run(model, batch, gradients=True)
        loss = loss_of(result)
        if loss is None:
            problem = "nothing that its forward pass returns has a gradient."
            raise ModelError(
                model.path, problem, "Leave --steps and --backward out, or give a model that trains."
            )
        loss.backward()
        stepper.step()
    return result


def with_labels(model: Runnable, batch: Batch) -> Batch:
    """The batch with its tokens as labels, for a language model that has a loss of its own and was given none."""
    forward = getattr(model.module, "forward", None)
    head = getattr(model.module, "get_output_embeddings", None)
    tokens = batch.kwargs.get("input_ids")
    try:
        takes = forward is not None and "labels" in inspect.signature(forward).parameters
    except (TypeError, ValueError):
        takes = False
    if not takes or tokens is None or "labels" in batch.kwargs or not callable(head) or head() is None:
        return batch
    return replace(batch, kwargs={**batch.kwargs, "labels": tokens})


def in_dtype(model: Runnable, batch: Batch, dtype: str) -> Batch:
    """Converts the model, in place, and returns the batch in the same dtype."""
    kind = getattr(torch, dtype)
    module: Any = model.module
    module.to(kind)

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(kind) if value.is_floating_point() else value
        if isinstance(value, Mapping):
            return {name: cast(item) for name, item in value.items()}
        return type(value)(map(cast, value)) if isinstance(value, (list, tuple)) else value

    return replace(batch, args=cast(tuple(batch.args)), kwargs=cast(dict(batch.kwargs)))


# --- tables -------------------------------------------------------------------------------------------

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "adagrad": "Adagrad"}
