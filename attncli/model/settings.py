"""Lookups in a config of transformers, which may hold one config per part of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def configs(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """A config and every config in it, each with its name, from the outside in."""
    yield name, config
    for key, value in vars(config).items():
        if hasattr(value, "to_dict") and value is not config:
            yield from configs(value, key)


def text_config(config: Any) -> Any:
    """The part of a config that describes the text side."""
    return next(
        (part for name, part in configs(config) if side_of(name) == "text" and vocabulary_size(part)), config
    )


def decoder_start(config: Any) -> int:
    """The id that a decoder begins with."""
    for part in (config, getattr(config, "decoder", None), text_config(config)):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(part, name, None)
            if isinstance(value, int):
                return value
    return 0


def find(config: Any, names: tuple[str, ...], side: str = "") -> Any:
    """The first of the settings that is there, in the configs of that side first."""
    ordered = sorted(configs(config), key=lambda item: side_of(item[0]) != side) if side else configs(config)
    for _, part in ordered:
        for name in names:
            value = getattr(part, name, None)
            if value is not None and value != [] and not callable(value):
                return value
    return None


def side_of(name: str) -> str:
    for side, words in _SIDES.items():
        if any(word in name for word in words):
            return side
    return ""


def vocabulary_size(config: Any) -> int | None:
    for name in ("vocab_size", "n_vocab", "num_embeddings", "encoder_vocab_size", "src_vocab_size"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def special_ids(config: Any) -> frozenset[int]:
    """Every id that a config gives a meaning of its own."""
    found: set[int] = set()
    for _, part in configs(config):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_ids", "token_index", "_pad_id", "pad_idx")):
                values = value if isinstance(value, (list, tuple)) else (value,)
                found.update(item for item in values if isinstance(item, int))
    return frozenset(found)


_SIDES = {
    "text": ("text", "language", "llm", "lm_", "thinker", "talker", "decoder"),
    "image": ("vision", "visual", "image", "backbone", "vit", "encoder", "qformer"),
    "audio": ("audio", "speech", "encoder"),
}
