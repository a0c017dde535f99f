"""A fingerprint of each tensor's elements in their order: what statistics cannot tell apart, such as −w from w."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable

import torch

from attncli.records import Measurement, Tensor
from attncli.weights.values import TensorValues


def digest_measurements(
    tensors: Iterable[Tensor], values: TensorValues, progress: Callable[[int], None] | None = None
) -> tuple[Measurement, ...]:
    """`contents` of each plain tensor that is available: 16 hex digits; the unit is the dtype they were read in.

    Equal tensors of one dtype have equal digits, whatever file they lie in. `progress` gets the bytes read.
    """
    rows = []
    for tensor in tensors:
        if tensor.scheme != "plain" or not values.available(tensor):
            continue
        digest = hashlib.blake2b(digest_size=8)
        for part in values.parts(tensor):
            for piece in part:
                held = piece.contiguous()
                digest.update(_bytes(held))
                if progress is not None:
                    progress(piece.numel() * piece.element_size())
        rows.append(Measurement("contents", tensor.name, digest.hexdigest(), tensor.dtype))
    return tuple(rows)


def _bytes(piece: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """The memory of a contiguous piece, which must outlive it. torch would need numpy for the same."""
    size = piece.numel() * piece.element_size()
    return (ctypes.c_char * size).from_address(piece.data_ptr())
