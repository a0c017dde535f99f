"""What lies in the files of a checkpoint, as their headers say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Array:
    """One array as it lies in a file, before wrappers are stripped and quantised parts are joined.

    `dtype` in torch's spelling without the prefix ("float32", "bfloat16", "float8_e4m3fn", "uint8"), or
    the format's own name in lower case for block types ("q4_1", "mxfp4"). `offset`: first byte in `file`
    (a path relative to the checkpoint's root); None where the bytes cannot be addressed (compressed, or
    absent). `strides` in elements; None means C-contiguous.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int | None
    size_bytes: int
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One logical tensor of the model, as the model's own code would name and shape it.

    `scheme`: "plain", or how it is stored: "gptq", "awq", "bnb-nf4", "bnb-fp4", "bnb-int8", "fp8-block",
    "fp8", "compressed-tensors", "nvfp4", "mxfp4", "mlx", "hqq", "quanto", "gguf", "lora". `dtype`: the
    array's dtype for a plain tensor, otherwise the storage ("int4", "nf4", "float8_e4m3fn", "q4_1").
    `parts`: the arrays that hold it, by their role ("weight" for a plain tensor; "qweight", "scales",
    "qzeros", "g_idx" for GPTQ).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    parts: Mapping[str, Array]
    scheme: str = "plain"
    # Numbers that dequantisation needs and that no part holds, e.g. {"bits": 4, "group_size": 128}.
    quantisation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts.values())


@dataclass(frozen=True, slots=True)
class Config:
    """Settings that lie beside or inside the weights. `source`: "config.json", "GGUF metadata",
    "model_args in checkpoint" …: the words a message uses to say where a number came from."""

    source: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Something a reader saw that a rule may judge. Readers state, they never judge.

    `kind`: "pickle-global", "missing-tensor", "missing-shard", "stray-tensor", "duplicate-tensor",
    "wrong-shard" … `subject`: the tensor, file or global it is about.
    """

    kind: str
    subject: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything the headers of one checkpoint say. `root` is the folder that `file` paths are relative to.

    `excluded` counts what was left out, by what it is: {"optimizer": 402, "ema copy": 120}.
    `configs`: the most trusted first.
    """

    path: str
    root: str
    kind: Literal["file", "folder"]
    format: str
    files: tuple[str, ...]
    size_bytes: int
    tensors: tuple[Tensor, ...]
    configs: tuple[Config, ...] = ()
    excluded: Mapping[str, int] = field(default_factory=dict)
    anomalies: tuple[Anomaly, ...] = ()

    @property
    def parameters(self) -> int:
        """Elements of all logical tensors; of an adapter's pairs, what is stored."""
        return sum(
            sum(part.numel for part in tensor.parts.values()) if tensor.scheme == "lora" else tensor.numel
            for tensor in self.tensors
        )
