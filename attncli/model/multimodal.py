"""Tokens that stand for an image or a sound: as many in the text as the model's own tower makes features.

How many features a tower makes follows from its config in a different way for every model. The tower is asked:
one pass of it alone, before the run that is looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attncli.errors import ModelError
from attncli.model.contracts import placed
from attncli.model.faults import user_code


class Modality(NamedTuple):
    """One kind of input beside the text: its token in the config, the tower's method, what the tower reads."""

    name: str
    tokens: tuple[str, ...]
    method: str
    inputs: tuple[str, ...]


class Placed(NamedTuple):
    """The tower's inputs, and the ids with the token in its places. Shapes: `ids` (B, N)."""

    inputs: dict[str, Any]
    ids: Tensor


def modality_of(
    module: Any, names: frozenset[str], setting: Callable[[tuple[str, ...]], Any]
) -> Modality | None:
    """The first kind of input that forward takes, that has a token, and whose tower can be asked."""
    for modality in MODALITIES:
        takes = names.intersection(modality.inputs)
        if takes and isinstance(setting(modality.tokens), int) and _method(module, modality.method):
            return modality
    return None


def with_tower(
    module: Any,
    modality: Modality,
    token: int,
    ids: Tensor,
    make: Callable[[str], Any],
    limit: int | None,
) -> Placed | str:
    """The tower's inputs and the ids with its tokens, or a sentence that says why that did not work."""
    method = _method(module, modality.method)
    inputs: dict[str, Any] = {}
    for name, parameter in inspect.signature(method).parameters.items():
        # Most options of a tower are better left alone; a grid is needed wherever there is one.
        needed = parameter.default is parameter.empty or name in modality.inputs or name.endswith("grid_thw")
        value = make(name) if needed else None
        if value is not None:
            inputs[name] = value
    try:
        with torch.no_grad(), user_code(modality.method, f"the {modality.name} tower", "", module):
            rows = _rows(method(**placed(inputs, module.device, module.dtype)))
    except ModelError as error:
        return error.problem
    batch = ids.shape[0]
    if rows == 0 or rows % batch:
        return f"the {modality.name} tower makes {rows} features for {batch} rows"
    length = max(ids.shape[1], rows // batch + 8)
    if limit is not None and length > limit:
        return f"the {modality.name} takes {rows // batch} tokens, more than there is room for"
    ids = ids.repeat(1, -(-length // ids.shape[1]))[:, :length].clone()
    # Behind the first text tokens, as a processor would put them.
    ids[:, 4 : 4 + rows // batch] = token
    return Placed(inputs, ids)


def _method(module: Any, name: str) -> Any:
    return getattr(module, name, None) or getattr(getattr(module, "model", None), name, None)


def _rows(features: Any) -> int:
    """Feature vectors in whatever a tower returns: a tensor, several, or an output that holds them."""
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    pooled = getattr(features, "pooler_output", None)
    if pooled is not None:
        return _rows(pooled)
    if isinstance(features, Mapping):
        features = next(iter(features.values()))
        return _rows(features)
    return sum(_rows(item) for item in features)


MODALITIES = (
    Modality("image", ("image_token_id", "image_token_index"), "get_image_features", ("pixel_values",)),
    Modality("audio", ("audio_token_id", "audio_token_index"), "get_audio_features", ("input_features",)),
)
