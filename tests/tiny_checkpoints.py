"""Small safetensors checkpoints written by hand, byte by byte, for all tests above the readers."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    *,
    dtype: str = "F32",
    values: Mapping[str, bytes] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """A file of these tensors, all of them zeros but for the bytes in `values`."""
    header: dict[str, object] = {}
    data = bytearray()
    for name, shape in shapes.items():
        stored = (dtypes or {}).get(name, dtype)
        size = SIZES[stored] * math.prod(shape)
        piece = (values or {}).get(name, bytes(size))
        assert len(piece) == size
        header[name] = {
            "dtype": stored,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + size],
        }
        data += piece
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def llama_shapes(layers: int = 2, *, prefix: str = "model.layers") -> dict[str, tuple[int, ...]]:
    """Grouped-query attention as in `CONFIG`: 4 heads and 2 KV heads of size 16, hidden size 64."""
    rows = {"q": 64, "k": 32, "v": 32, "o": 64}
    return {
        f"{prefix}.{layer}.self_attn.{role}_proj.weight": (rows[role], 64)
        for layer in range(layers)
        for role in rows
    }


def llama_folder(folder: Path, layers: int = 2, **config: object) -> Path:
    """A model folder; `config` changes single settings of `CONFIG`, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", llama_shapes(layers))
    settings = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def floats(count: int, value: float = 0.5, **planted: float) -> bytes:
    """`count` float32, all `value` but for planted ones: `floats(4, _2=math.nan)` has a NaN at place 2."""
    numbers = [value] * count
    for place, number in planted.items():
        numbers[int(place[1:])] = number
    return struct.pack(f"<{count}f", *numbers)
