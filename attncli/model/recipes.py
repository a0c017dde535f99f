"""How each argument of a model of transformers is made: one row of the table at the foot per argument name.

Sizes come from the config and from the layers; nothing here knows a model by name. Shapes: B batch, N positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attncli.model.contracts import Draw
from attncli.model.layers import layer_input, vocabulary
from attncli.model.settings import (
    configs,
    decoder_start,
    find,
    side_of,
    special_ids,
    text_config,
    vocabulary_size,
)
from attncli.model.signature import rank, readers


@dataclass
class Ask:
    """What is known while the arguments of one forward are made, one after the other."""

    module: Any
    config: Any
    draw: Draw
    batch: int
    length: int
    # The user's own choice; None where `length` is a default.
    seq_len: int | None
    names: frozenset[str]
    made: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# --- values by name -----------------------------------------------------------------------------------


def token_count(ask: Ask) -> int:
    size = vocabulary_size(text_config(ask.config)) or 0
    try:
        rows = getattr(ask.module.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError, TypeError):
        rows = None
    rows = rows if isinstance(rows, int) else vocabulary(ask.module)
    return min(size or rows, rows) if rows else size or 2


def token_ids(ask: Ask) -> Tensor:
    return ask.draw.ids((ask.batch, ask.length), token_count(ask), special_ids(ask.config))


def _decoder_ids(ask: Ask) -> Tensor:
    decoder = getattr(ask.config, "decoder", None)
    part = decoder if hasattr(decoder, "to_dict") else text_config(ask.config)
    size = (
        getattr(part, "tgt_vocab_size", None)
        or getattr(part, "decoder_vocab_size", None)
        or vocabulary_size(part)
    )
    limit = getattr(part, "max_target_positions", None) or getattr(part, "max_position_embeddings", None)
    length = min(ask.length, limit) if isinstance(limit, int) else ask.length
    ids = ask.draw.ids((ask.batch, length), size or token_count(ask), special_ids(ask.config))
    ids[:, 0] = decoder_start(ask.config)
    return ids


def _image_size(ask: Ask) -> tuple[int, int]:
    size = find(ask.config, ("image_size", "img_size", "input_size", "pretrained_image_size"), "image")
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")] if "height" in size else next(iter(size.values()), 224)
    if isinstance(size, (list, tuple)) and len(size) >= 2:
        return int(size[-2]), int(size[-1])
    size = size[0] if isinstance(size, (list, tuple)) and size else size
    return (int(size), int(size)) if isinstance(size, (int, float)) and size else (224, 224)


def _channels(ask: Ask) -> int:
    found = find(ask.config, ("num_channels", "in_channels", "in_chans"), "image")
    return found if isinstance(found, int) else 3


def _pixels(ask: Ask) -> Tensor:
    height, width = _image_size(ask)
    frames = find(ask.config, ("num_frames",), "image")
    middle = (int(frames),) if isinstance(frames, int) else ()
    if not middle and rank(ask.module, "pixel_values") == 5:
        middle = (4,)
    return ask.draw.floats(ask.batch, *middle, _channels(ask), height, width)


def _video(ask: Ask) -> Tensor:
    height, width = _image_size(ask)
    frames = find(ask.config, ("num_frames", "frames_per_clip"), "image") or 8
    return ask.draw.floats(ask.batch, int(frames), _channels(ask), height, width)


def _waveform(ask: Ask) -> Tensor:
    """Samples for as many frames as asked, or a spectrogram where the config gives its size."""
    bands, most = find(ask.config, ("num_mel_bins",)), find(ask.config, ("max_length",))
    strides = find(ask.config, ("conv_stride",), "audio")
    if isinstance(bands, int) and isinstance(most, int) and not strides:
        return ask.draw.floats(ask.batch, most, bands)
    if isinstance(strides, (list, tuple)):
        samples = (ask.length + 1) * math.prod(strides)
        return ask.draw.floats(ask.batch, samples)
    rate = find(ask.config, ("sampling_rate", "sample_rate"), "audio") or 16000
    first = _first_convolution(ask.module)
    if first is not None and first.in_channels == 1:
        return ask.draw.floats(ask.batch, 1, int(rate))
    return ask.draw.floats(ask.batch, int(rate))


def _first_convolution(module: Any) -> Any:
    return next((child for child in module.modules() if isinstance(child, nn.Conv1d)), None)


def _spectrogram(ask: Ask) -> Tensor:
    """Mel features. Shapes: (B, bands, N) where a convolution over time reads them, else (B, N, bands)."""
    if find(ask.config, ("spec_size",), "audio"):
        # Read as an image with one channel.
        return ask.draw.floats(ask.batch, 1, 1024, int(find(ask.config, _BANDS, "audio") or 64))
    for reader in readers(ask.module, "input_features"):
        value = layer_input(ask.module, reader, ask.draw, ask.batch, ask.seq_len or 512)
        if value is not None and value.dim() == 3 and not hasattr(reader.module, "kernel_size"):
            return value
    bands = find(ask.config, _BANDS, "audio") or 80
    first = _first_convolution(ask.module)
    most = find(ask.config, ("max_source_positions",), "audio")
    # Under its older name the width comes last, and the model turns it round itself.
    last = find(ask.config, ("input_feat_per_channel",)) is not None
    if first is not None and first.in_channels == bands and not last:
        frames = 2 * most if isinstance(most, int) else 2 * ask.length
        return ask.draw.floats(ask.batch, int(bands), frames)
    return ask.draw.floats(ask.batch, ask.seq_len or 512, int(bands))


def _frames_mask(ask: Ask) -> Tensor:
    """Every frame counts. The frames are the longer of the two axes behind the batch, or the one that is not mel."""
    features: Tensor = ask.made["input_features"]
    bands = find(ask.config, _BANDS, "audio")
    frames = features.shape[2] if features.shape[1] == bands else features.shape[1]
    return torch.ones(features.shape[0], frames, dtype=torch.long)


def _number(ask: Ask, name: str) -> int:
    return int(find(ask.config, (name,)) or 1)


def _boxes(ask: Ask) -> Tensor:
    """Boxes (left, top, right, bottom) in 0 … 1000, each with an area."""
    corners = ask.draw.ids((ask.batch, ask.length, 4), 500)
    corners[..., 2:] += 500
    return corners


def _grid_patches(ask: Ask) -> tuple[int, int]:
    """(patches on a side, numbers in a patch) of a vision tower that reads flat patches."""
    side = find(ask.config, ("patch_size",), "image")
    merge = find(ask.config, ("spatial_merge_size", "merge_size"), "image") or 2
    frames = find(ask.config, ("temporal_patch_size",), "image") or 1
    return 4 * int(merge), _channels(ask) * int(frames) * int(side or 14) ** 2


def _flat_patches(ask: Ask) -> Tensor:
    side, numbers = _grid_patches(ask)
    return ask.draw.floats(ask.batch * side * side, numbers)


def _grid(ask: Ask) -> Tensor:
    side, _ = _grid_patches(ask)
    return torch.tensor([[1, side, side]] * ask.batch)


def _pixel_values(ask: Ask) -> Tensor:
    if {"grid_thw", "image_grid_thw"} & ask.names:
        return _flat_patches(ask)
    if "spatial_shapes" in ask.names:
        side, numbers = _grid_patches(ask)
        return ask.draw.floats(ask.batch, side * side, numbers)
    return _pixels(ask)


def _image_sizes(ask: Ask) -> Tensor:
    return torch.tensor([_image_size(ask)] * ask.batch)


def _spatial_shapes(ask: Ask) -> Tensor:
    side, _ = _grid_patches(ask)
    return torch.tensor([[side, side]] * ask.batch)


def _patches_mask(ask: Ask) -> Tensor | None:
    """Every patch, or every pixel, counts."""
    if "spatial_shapes" not in ask.names:
        return None
    side, _ = _grid_patches(ask)
    return torch.ones(ask.batch, side * side, dtype=torch.long)


def _history(ask: Ask) -> Tensor:
    length = int(find(ask.config, ("context_length", "seq_length")) or ask.length)
    lags = find(ask.config, ("lags_sequence",)) if "past_time_features" in ask.names else None
    length += max(lags) if isinstance(lags, (list, tuple)) else 0
    series = find(ask.config, ("num_input_channels", "input_size"))
    single = not isinstance(series, int) or (series == 1 and "past_time_features" in ask.names)
    return ask.draw.floats(ask.batch, length, *(() if single else (series,)))


def _time_features(ask: Ask) -> Tensor:
    past: Tensor = ask.made["past_values"]
    return ask.draw.floats(ask.batch, past.shape[1], _number_of_time_features(ask))


def _number_of_time_features(ask: Ask) -> int:
    return int(find(ask.config, ("num_time_features",)) or 0)


def _future_values(ask: Ask) -> Tensor:
    past: Tensor = ask.made["past_values"]
    return ask.draw.floats(ask.batch, int(find(ask.config, ("prediction_length",)) or 1), *past.shape[2:])


def _future_features(ask: Ask) -> Tensor:
    return ask.draw.floats(
        ask.batch, int(find(ask.config, ("prediction_length",)) or 1), _number_of_time_features(ask)
    )


def _never(ask: Ask) -> bool:
    return False


def _always(ask: Ask) -> bool:
    return True


def _encoder_decoder(ask: Ask) -> bool:
    return bool(getattr(ask.config, "is_encoder_decoder", False)) or hasattr(ask.config, "decoder_layers")


def _two_towers(ask: Ask) -> bool:
    """Text and image beside each other, as in CLIP: without tokens that stand for the image."""
    return _beside_text(ask, "image")


def _heard(ask: Ask) -> bool:
    """Text and sound beside each other, as in CLAP."""
    return _beside_text(ask, "audio")


def _beside_text(ask: Ask, side: str) -> bool:
    if (
        "input_ids" not in ask.names
        or find(ask.config, (f"{side}_token_id", f"{side}_token_index")) is not None
    ):
        return False
    return {"text", side} <= {side_of(name) for name, _ in configs(ask.config)}


def _episode(ask: Ask) -> bool:
    """States, actions and rewards in turn, as in the decision transformer."""
    return {"states", "actions", "rewards", "returns_to_go"} <= ask.names


class Recipe(NamedTuple):
    """How to make an argument, and whether to make it although forward does not insist."""

    make: Callable[[Ask], Any]
    also: Callable[[Ask], bool] = _never


_BANDS = (
    "num_mel_bins",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "feature_size",
    "mel_bins",
)

# The order matters: later rows look at what earlier ones made.
RECIPES: dict[str, Recipe] = {
    "input_ids": Recipe(token_ids, lambda ask: _two_towers(ask) or _heard(ask)),
    "pixel_values": Recipe(_pixel_values, _two_towers),
    "pixel_values_videos": Recipe(_video),
    "input_values": Recipe(_waveform),
    "input_features": Recipe(_spectrogram, _heard),
    "input_features_mask": Recipe(_frames_mask, lambda ask: "input_features" in ask.made),
    "hidden_states": Recipe(lambda ask: _flat_patches(ask) if "grid_thw" in ask.names else None),
    "grid_thw": Recipe(_grid),
    "image_grid_thw": Recipe(_grid),
    "image_sizes": Recipe(_image_sizes),
    "spatial_shapes": Recipe(_spatial_shapes, lambda ask: "pixel_values" in ask.made),
    "pixel_attention_mask": Recipe(_patches_mask, lambda ask: "spatial_shapes" in ask.made),
    "decoder_input_ids": Recipe(_decoder_ids, _encoder_decoder),
    "bbox": Recipe(_boxes, _always),
    "states": Recipe(lambda ask: ask.draw.floats(ask.batch, ask.length, _number(ask, "state_dim"))),
    "actions": Recipe(lambda ask: ask.draw.floats(ask.batch, ask.length, _number(ask, "act_dim")), _episode),
    "rewards": Recipe(lambda ask: ask.draw.floats(ask.batch, ask.length, 1), _episode),
    "returns_to_go": Recipe(lambda ask: ask.draw.floats(ask.batch, ask.length, 1), _episode),
    "timesteps": Recipe(lambda ask: torch.arange(ask.length).expand(ask.batch, -1), _episode),
    "visual_feats": Recipe(
        lambda ask: ask.draw.floats(ask.batch, 36, _number(ask, "visual_feat_dim")), _always
    ),
    "visual_pos": Recipe(lambda ask: ask.draw.floats(ask.batch, 36, _number(ask, "visual_pos_dim")), _always),
    "past_values": Recipe(_history),
    "past_time_features": Recipe(_time_features),
    "past_observed_mask": Recipe(lambda ask: torch.ones_like(ask.made["past_values"])),
    "future_values": Recipe(_future_values, lambda ask: "future_time_features" in ask.names),
    "future_time_features": Recipe(_future_features, _always),
}
