"""Attention written as a list of heads, each a module with q, k and v of its own: one layer, H heads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from attncli.records import Layer

_HEAD = re.compile(r"(?P<path>.*?)\.?(?P<list>[A-Za-z_]*heads?)\.(?P<number>\d+)(?P<tail>\..*)?$")


def joined_heads(layers: Iterable[Layer]) -> list[Layer]:
    """`layers` with `….heads.0`, `….heads.1`, … of equal shapes joined into one layer "module-per-head"."""
    kept: list[Layer] = []
    lists: dict[tuple[str, str, str | None], list[Layer]] = {}
    for layer in layers:
        match = _HEAD.match(layer.path)
        if match and layer.layout == "separate" and layer.kind is not None and layer.heads in (None, 1):
            lists.setdefault((match["path"], match["list"], match["tail"]), []).append(layer)
        else:
            kept.append(layer)
    for (path, _, _), heads in lists.items():
        shapes = {tuple((t.role, t.shape) for t in head.tensors) for head in heads}
        kept.extend(heads if len(heads) < 2 or len(shapes) > 1 else [_joined(path, heads)])
    return kept


def _joined(path: str, heads: list[Layer]) -> Layer:
    first = heads[0]
    head_dim = next(t.shape[0] for t in first.tensors if t.role == "q")
    index = re.search(r"\d+(?!.*\d)", path)
    return replace(
        first,
        id=path or "(root)",
        path=path,
        layout="module-per-head",
        heads=len(heads),
        kv_heads=len(heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        evidence={
            **first.evidence,
            "heads": "shape",
            "kv_heads": "shape",
            "head_dim": "shape",
            "scale": "assumed",
        },
        tensors=tuple(tensor for head in heads for tensor in head.tensors),
        rows={},
        score_terms=(),
        stack=re.sub(r"\d+(?!.*\d)", "#", path),
        index=int(index.group()) if index else None,
    )
