"""Synthetic inputs for a model of transformers: by the names in its forward, with sizes from its config.

One row of the table at the foot per argument name; nothing here knows a model by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attncli.errors import ModelError
from attncli.model.contracts import BatchOptions, Draw, Made
from attncli.model.layers import by_name, positions, read_by, refuse_longer, vocabulary
from attncli.model.multimodal import modality_of, with_tower
from attncli.model.signature import Forward

SEQ_LEN = 128
BATCH_SIZE = 2


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


def is_pretrained(module: Any) -> bool:
    """Whether a module speaks the conventions of transformers."""
    return hasattr(module, "main_input_name") and hasattr(getattr(module, "config", None), "to_dict")


def pretrained_inputs(
    module: Any, forward: Forward, options: BatchOptions, given: Mapping[str, Any] | None = None
) -> Made:
    """Keyword arguments for a model of transformers, `given` ones as they are. Errors: ModelError."""
    most = longest(module)
    rows = positions(module)
    if most is not None and rows is not None and most <= rows <= most + 4:
        # Learned positions, a few of which may be set aside. Rotary ones can go beyond what the config says.
        refuse_longer(options.seq_len, most)
    ids = (given or {}).get("input_ids")
    ask = Ask(
        module,
        module.config,
        Draw(options.seed),
        ids.shape[0] if isinstance(ids, Tensor) else options.batch_size or BATCH_SIZE,
        ids.shape[1] if isinstance(ids, Tensor) else options.seq_len or min(SEQ_LEN, most or SEQ_LEN),
        options.seq_len,
        forward.names,
        dict(given or {}),
    )
    _place_tower(ask)
    main = module.main_input_name
    mains = [main] if isinstance(main, str) else list(main or ())
    insisted = [name for name in mains if name in forward.names]
    insisted += [item.name for item in forward.required]
    unknown = [name for name in dict.fromkeys(insisted) if not _make(ask, forward, name)]
    for name, row in RECIPES.items():
        if name in forward.names and name not in insisted and row.also(ask):
            _make(ask, forward, name)
    if unknown:
        problem = f"what forward wants as {', '.join(unknown)} cannot be told from the config."
        remedy = f"Give it with --input FILE or file.py:batch: forward takes {forward.described()}."
        raise ModelError(type(module).__name__, problem, remedy)
    return Made((), ask.made, tuple(ask.notes))


def _make(ask: Ask, forward: Forward, name: str) -> bool:
    """Adds the argument to what is made; False where it cannot be told."""
    if name in ask.made:
        return True
    value = RECIPES[name].make(ask) if name in RECIPES else None
    if value is None:
        parameter = next(item for item in forward.parameters if item.name == name)
        found = read_by(ask.module, parameter, ask.draw, ask.batch, ask.length)
        found = found or by_name(ask.module, parameter, ask.draw, ask.batch, ask.length)
        if found is None:
            return False
        value = found.value
    ask.made[name] = value
    return True


def longest(module: Any) -> int | None:
    """The number of positions the text side has room for; None where the config sets no limit."""
    config = text_config(module.config)
    limits = [
        value for name in _LENGTHS if isinstance(value := getattr(config, name, None), int) and value > 0
    ]
    for name, child in module.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        if (
            isinstance(child, nn.Embedding)
            and "position_embeddings" in name
            and child.padding_idx is not None
        ):
            limits.append(child.num_embeddings - child.padding_idx - 1)
    return min(limits) if limits else None


def text_config(config: Any) -> Any:
    """The part of a config that describes the text side."""
    return next((part for name, part in configs(config) if _side(name) == "text" and _size(part)), config)


def decoder_start(config: Any) -> int:
    """The id that a decoder begins with."""
    for part in (config, getattr(config, "decoder", None), text_config(config)):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(part, name, None)
            if isinstance(value, int):
                return value
    return 0


def configs(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """A config and every config in it, each with its name, from the outside in."""
    yield name, config
    for key, value in vars(config).items():
        if hasattr(value, "to_dict") and value is not config:
            yield from configs(value, key)


def _place_tower(ask: Ask) -> None:
    """An image or a sound with its tokens in the text, for a model that has a token for it."""
    if "input_ids" not in ask.names or "input_ids" in ask.made:
        return
    modality = modality_of(ask.module, ask.names, lambda names: _find(ask.config, names))
    if modality is None:
        return

    def make(name: str) -> Any:
        return RECIPES[name].make(ask) if name in RECIPES else None

    token = _find(ask.config, modality.tokens)
    if token >= _vocabulary(ask):
        return
    found = with_tower(ask.module, modality, token, _ids(ask), make, longest(ask.module))
    if isinstance(found, str):
        ask.notes.append(f"text alone was run, without an {modality.name}: {found}")
        return
    ask.length = found.ids.shape[1]
    ask.made.update(
        input_ids=found.ids, **{key: item for key, item in found.inputs.items() if key in ask.names}
    )


# --- values by name -----------------------------------------------------------------------------------


def _find(config: Any, names: tuple[str, ...], side: str = "") -> Any:
    """The first of the settings that is there, in the configs of that side first."""
    ordered = sorted(configs(config), key=lambda item: _side(item[0]) != side) if side else configs(config)
    for _, part in ordered:
        for name in names:
            value = getattr(part, name, None)
            if value is not None and value != [] and not callable(value):
                return value
    return None


def _side(name: str) -> str:
    for side, words in _SIDES.items():
        if any(word in name for word in words):
            return side
    return ""


def _size(config: Any) -> int | None:
    for name in ("vocab_size", "n_vocab", "num_embeddings", "encoder_vocab_size", "src_vocab_size"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _special(config: Any) -> frozenset[int]:
    """Every id that a config gives a meaning of its own."""
    found: set[int] = set()
    for _, part in configs(config):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_ids", "token_index", "_pad_id", "pad_idx")):
                values = value if isinstance(value, (list, tuple)) else (value,)
                found.update(item for item in values if isinstance(item, int))
    return frozenset(found)


def _vocabulary(ask: Ask) -> int:
    size = _size(text_config(ask.config)) or 0
    try:
        rows = getattr(ask.module.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError, TypeError):
        rows = None
    rows = rows if isinstance(rows, int) else vocabulary(ask.module)
    return min(size or rows, rows) if rows else size or 2


def _ids(ask: Ask) -> Tensor:
    return ask.draw.ids((ask.batch, ask.length), _vocabulary(ask), _special(ask.config))


def _decoder_ids(ask: Ask) -> Tensor:
    decoder = getattr(ask.config, "decoder", None)
    part = decoder if hasattr(decoder, "to_dict") else text_config(ask.config)
    size = getattr(part, "tgt_vocab_size", None) or getattr(part, "decoder_vocab_size", None) or _size(part)
    limit = getattr(part, "max_target_positions", None) or getattr(part, "max_position_embeddings", None)
    length = min(ask.length, limit) if isinstance(limit, int) else ask.length
    ids = ask.draw.ids((ask.batch, length), size or _vocabulary(ask), _special(ask.config))
    ids[:, 0] = decoder_start(ask.config)
    return ids


def _image_size(ask: Ask) -> tuple[int, int]:
    size = _find(ask.config, ("image_size", "img_size", "input_size", "pretrained_image_size"), "image")
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")] if "height" in size else next(iter(size.values()), 224)
    if isinstance(size, (list, tuple)) and len(size) >= 2:
        return int(size[-2]), int(size[-1])
    size = size[0] if isinstance(size, (list, tuple)) and size else size
    return (int(size), int(size)) if isinstance(size, (int, float)) and size else (224, 224)


def _channels(ask: Ask) -> int:
    found = _find(ask.config, ("num_channels", "in_channels", "in_chans"), "image")
    return found if isinstance(found, int) else 3


def _pixels(ask: Ask) -> Tensor:
    height, width = _image_size(ask)
    frames = _find(ask.config, ("num_frames",), "image")
    middle = (int(frames),) if isinstance(frames, int) else ()
    return ask.draw.floats(ask.batch, *middle, _channels(ask), height, width)


def _video(ask: Ask) -> Tensor:
    height, width = _image_size(ask)
    frames = _find(ask.config, ("num_frames", "frames_per_clip"), "image") or 8
    return ask.draw.floats(ask.batch, int(frames), _channels(ask), height, width)


def _waveform(ask: Ask) -> Tensor:
    """Samples for as many frames as asked, or a spectrogram where the config gives its size."""
    bands, most = _find(ask.config, ("num_mel_bins",)), _find(ask.config, ("max_length",))
    strides = _find(ask.config, ("conv_stride",), "audio")
    if isinstance(bands, int) and isinstance(most, int) and not strides:
        return ask.draw.floats(ask.batch, most, bands)
    if isinstance(strides, (list, tuple)):
        samples = (ask.length + 1) * math.prod(strides)
        return ask.draw.floats(ask.batch, samples)
    rate = _find(ask.config, ("sampling_rate", "sample_rate"), "audio") or 16000
    first = _first_convolution(ask.module)
    if first is not None and first.in_channels == 1:
        return ask.draw.floats(ask.batch, 1, int(rate))
    return ask.draw.floats(ask.batch, int(rate))


def _first_convolution(module: Any) -> Any:
    return next((child for child in module.modules() if isinstance(child, nn.Conv1d)), None)


def _spectrogram(ask: Ask) -> Tensor:
    """Mel features. Shapes: (B, bands, N) where a convolution over time reads them, else (B, N, bands)."""
    bands = _find(ask.config, _BANDS, "audio") or 80
    first = _first_convolution(ask.module)
    most = _find(ask.config, ("max_source_positions",), "audio")
    if _find(ask.config, ("spec_size",), "audio"):
        # Read as an image with one channel.
        return ask.draw.floats(ask.batch, 1, 1024, int(bands))
    if first is not None and first.in_channels == bands:
        frames = 2 * most if isinstance(most, int) else 2 * ask.length
        return ask.draw.floats(ask.batch, int(bands), frames)
    return ask.draw.floats(ask.batch, ask.seq_len or 512, int(bands))


def _frames_mask(ask: Ask) -> Tensor:
    """Every frame counts. The frames are the longer of the two axes behind the batch, or the one that is not mel."""
    features: Tensor = ask.made["input_features"]
    bands = _find(ask.config, _BANDS, "audio")
    frames = features.shape[2] if features.shape[1] == bands else features.shape[1]
    return torch.ones(features.shape[0], frames, dtype=torch.long)


def _number(ask: Ask, name: str) -> int:
    return int(_find(ask.config, (name,)) or 1)


def _boxes(ask: Ask) -> Tensor:
    """Boxes (left, top, right, bottom) in 0 … 1000, each with an area."""
    corners = ask.draw.ids((ask.batch, ask.length, 4), 500)
    corners[..., 2:] += 500
    return corners


def _grid_patches(ask: Ask) -> tuple[int, int]:
    """(patches on a side, numbers in a patch) of a vision tower that reads flat patches."""
    side = _find(ask.config, ("patch_size",), "image")
    merge = _find(ask.config, ("spatial_merge_size", "merge_size"), "image") or 2
    frames = _find(ask.config, ("temporal_patch_size",), "image") or 1
    return 4 * int(merge), _channels(ask) * int(frames) * int(side or 14) ** 2


def _flat_patches(ask: Ask) -> Tensor:
    side, numbers = _grid_patches(ask)
    return ask.draw.floats(ask.batch * side * side, numbers)


def _grid(ask: Ask) -> Tensor:
    side, _ = _grid_patches(ask)
    return torch.tensor([[1, side, side]] * ask.batch)


def _pixel_values(ask: Ask) -> Tensor:
    flat = {"grid_thw", "image_grid_thw"} & ask.names
    return _flat_patches(ask) if flat else _pixels(ask)


def _history(ask: Ask) -> Tensor:
    length = int(_find(ask.config, ("context_length", "seq_length")) or ask.length)
    lags = _find(ask.config, ("lags_sequence",)) if "past_time_features" in ask.names else None
    length += max(lags) if isinstance(lags, (list, tuple)) else 0
    series = _find(ask.config, ("num_input_channels", "input_size"))
    single = not isinstance(series, int) or (series == 1 and "past_time_features" in ask.names)
    return ask.draw.floats(ask.batch, length, *(() if single else (series,)))


def _time_features(ask: Ask) -> Tensor:
    past: Tensor = ask.made["past_values"]
    return ask.draw.floats(ask.batch, past.shape[1], _number_of_time_features(ask))


def _number_of_time_features(ask: Ask) -> int:
    return int(_find(ask.config, ("num_time_features",)) or 0)


def _future_values(ask: Ask) -> Tensor:
    past: Tensor = ask.made["past_values"]
    return ask.draw.floats(ask.batch, int(_find(ask.config, ("prediction_length",)) or 1), *past.shape[2:])


def _future_features(ask: Ask) -> Tensor:
    return ask.draw.floats(
        ask.batch, int(_find(ask.config, ("prediction_length",)) or 1), _number_of_time_features(ask)
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
        or _find(ask.config, (f"{side}_token_id", f"{side}_token_index")) is not None
    ):
        return False
    return {"text", side} <= {_side(name) for name, _ in configs(ask.config)}


def _episode(ask: Ask) -> bool:
    """States, actions and rewards in turn, as in the decision transformer."""
    return {"states", "actions", "rewards", "returns_to_go"} <= ask.names


class Recipe(NamedTuple):
    """How to make an argument, and whether to make it although forward does not insist."""

    make: Callable[[Ask], Any]
    also: Callable[[Ask], bool] = _never


_SIDES = {
    "text": ("text", "language", "llm", "lm_", "thinker", "talker", "decoder"),
    "image": ("vision", "visual", "image", "backbone", "vit", "encoder", "qformer"),
    "audio": ("audio", "speech", "encoder"),
}
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
_BANDS = (
    "num_mel_bins",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "feature_size",
    "mel_bins",
)

# The order matters: later rows look at what earlier ones made.
RECIPES: dict[str, Recipe] = {
    "input_ids": Recipe(_ids, lambda ask: _two_towers(ask) or _heard(ask)),
    "pixel_values": Recipe(_pixel_values, _two_towers),
    "pixel_values_videos": Recipe(_video),
    "input_values": Recipe(_waveform),
    "input_features": Recipe(_spectrogram, _heard),
    "input_features_mask": Recipe(_frames_mask, lambda ask: "input_features" in ask.made),
    "hidden_states": Recipe(lambda ask: _flat_patches(ask) if "grid_thw" in ask.names else None),
    "grid_thw": Recipe(_grid),
    "image_grid_thw": Recipe(_grid),
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
