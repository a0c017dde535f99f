"""Layers that are alike, folded into one row: "encoder.layer.{0–5}.attention"."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import NamedTuple

from attncli.records import Layer, LayerTensor


class Fold(NamedTuple):
    """One or more layers that differ in nothing but their number."""

    layers: tuple[Layer, ...]

    @property
    def first(self) -> Layer:
        return self.layers[0]

    @property
    def label(self) -> str:
        """The path, its number replaced by the numbers it stands for."""
        if len(self.layers) == 1 or "#" not in self.first.stack:
            return self.first.path or self.first.id
        numbers = "{" + ranges([layer.index for layer in self.layers if layer.index is not None]) + "}"
        stack, path, index = self.first.stack, self.first.path, self.first.index
        for at, letter in enumerate(stack):
            # A name may hold a "#" of its own; the one that stands for the number gives the path back.
            if letter == "#" and f"{stack[:at]}{index}{stack[at + 1 :]}" == path:
                return f"{stack[:at]}{numbers}{stack[at + 1 :]}"
        return stack.replace("#", numbers, 1)


def folds(layers: Sequence[Layer]) -> list[Fold]:
    """`layers` grouped by stack and everything a row shows, in the order of their first layer."""
    groups: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        key = (
            layer.stack,
            layer.kind,
            layer.layout,
            layer.heads,
            layer.kv_heads,
            layer.head_dim,
            None if layer.scale is None else round(layer.scale, 9),
            tuple(sorted(layer.evidence.items())),
            tuple((t.role, relative(t, layer), t.shape, t.dtype) for t in layer.tensors),
            tuple(sorted((name, str(value)) for name, value in layer.facts.items())),
        )
        groups.setdefault(key, []).append(layer)
    return [Fold(tuple(group)) for group in groups.values()]


def relative(tensor: LayerTensor, layer: Layer) -> str:
    """The tensor's name inside its layer's module; whole where it lies elsewhere."""
    prefix = f"{layer.path}."
    if tensor.name.startswith(prefix):
        return tensor.name[len(prefix) :]
    outer = layer.path.rpartition(".")[0]
    if outer and tensor.name.startswith(f"{outer}."):
        return tensor.name[len(outer) + 1 :]
    return tensor.name


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "0–2,5"; an even step of three or more is "0–30 step 2"."""
    ordered = sorted(set(numbers))
    if len(ordered) > 2:
        step = ordered[1] - ordered[0]
        if step > 1 and all(b - a == step for a, b in pairwise(ordered)):
            return f"{ordered[0]}–{ordered[-1]} step {step}"
    parts: list[str] = []
    start = previous = ordered[0]
    for number in [*ordered[1:], None]:
        if number is not None and number == previous + 1:
            previous = number
            continue
        parts.append(str(start) if start == previous else f"{start}–{previous}")
        if number is not None:
            start = previous = number
    return ",".join(parts)
