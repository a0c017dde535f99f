"""The layers of a report as tables that fit: all columns, or the facts in lines below, or no table at all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attncli.records import Layer, LayerTensor
from attncli.render.fitting import fits
from attncli.render.folds import Fold, relative
from attncli.render.words import clean, number


def layer_parts(rows: Sequence[Fold], console: Console) -> list[RenderableType]:
    """What each layer is, and which tensors make it, in the widest form that the console holds."""
    whole, core = _layer_table(rows, explained=True), _layer_table(rows, explained=False)
    parts: list[RenderableType]
    if fits(whole, console):
        parts = [whole]
    elif fits(core, console):
        parts = [core, _explanations(rows)]
    else:
        parts = [_layer_list(rows)]
    tensors = _tensor_table(rows, labelled=True)
    if fits(tensors, console):
        return [*parts, tensors]
    for fold in rows:
        parts.append(Text(clean(fold.label), style="bold"))
        parts.append(_tensor_table([fold], labelled=False))
    return parts


# --- what a layer is ----------------------------------------------------------------------------------


def _layer_table(rows: Sequence[Fold], *, explained: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("layers", "kind", "layout"):
        table.add_column(name, overflow="fold")
    for name in ("heads", "KV heads", "head size", "scale"):
        table.add_column(name, justify="right", no_wrap=True)
    known = explained and any(_known_from(fold.first) for fold in rows)
    special = explained and any(_by_design(fold.first) for fold in rows)
    if known:
        table.add_column("known from", overflow="fold", style="dim")
    if special:
        table.add_column("details", overflow="fold")
    for fold in rows:
        layer = fold.first
        cells = [
            Text(clean(fold.label)),
            Text(layer.kind or "—"),
            Text(layer.layout),
            _fact(layer, layer.heads),
            _fact(layer, layer.kv_heads),
            _fact(layer, layer.head_dim),
            _scale(layer),
        ]
        cells += [Text(_known_from(layer))] if known else []
        cells += [Text(_by_design(layer))] if special else []
        table.add_row(*cells)
    return table


def _explanations(rows: Sequence[Fold]) -> Group:
    """Where facts are known from and what differs by design, one line a fold."""
    lines: list[RenderableType] = []
    for fold in rows:
        said = [f"known from {_known_from(fold.first)}"] if _known_from(fold.first) else []
        said += [_by_design(fold.first)] if _by_design(fold.first) else []
        if said:
            lines.append(Text(f" {clean(fold.label)}: {' · '.join(said)}", style="dim"))
    return Group(*lines)


def _layer_list(rows: Sequence[Fold]) -> Group:
    """The same facts in running lines, for a terminal too narrow for a table."""
    lines: list[RenderableType] = []
    for fold in rows:
        layer = fold.first
        facts = [layer.kind or "", layer.layout]
        if layer.kind is not None:
            facts += [f"{label} {_fact(layer, getattr(layer, key)).plain}" for key, label in _COUNTS.items()]
            facts += [f"scale {_scale(layer).plain}"]
            facts += [f"known from {_known_from(layer)}"] if _known_from(layer) else []
            facts += [_by_design(layer)]
        lines.append(Text(clean(fold.label), style="bold"))
        lines.append(Padding(Text(" · ".join(fact for fact in facts if fact)), (0, 0, 0, 2), expand=False))
    return Group(*lines)


def _fact(layer: Layer, value: int | None) -> Text:
    if layer.kind is None:
        return Text("—", style="dim")
    return Text("unknown", style="yellow") if value is None else Text(str(value))


def _scale(layer: Layer) -> Text:
    if layer.kind is None:
        return Text("—", style="dim")
    if layer.scale is None:
        return Text("learned") if layer.facts.get("cosine") else Text("unknown", style="yellow")
    if layer.head_dim and math.isclose(layer.scale, layer.head_dim**-0.5, rel_tol=1e-6):
        return Text(f"1/√{layer.head_dim}")
    return Text(number(layer.scale))


def _known_from(layer: Layer) -> str:
    """ "config" alone where everything comes from there, otherwise what comes from where."""
    by_source: dict[str, list[str]] = defaultdict(list)
    for key, label in _LABELS.items():
        source = layer.evidence.get(key)
        if source is not None and getattr(layer, key) is not None:
            by_source[source].append(label)
    if len(by_source) == 1:
        return next(iter(by_source))
    return "; ".join(f"{', '.join(names)}: {source}" for source, names in by_source.items())


def _by_design(layer: Layer) -> str:
    return ", ".join(
        label.format(clean(value))
        for key, value in layer.facts.items()
        if (label := _FACTS.get(key)) is not None
    )


# --- what makes it ------------------------------------------------------------------------------------


def _tensor_table(rows: Sequence[Fold], *, labelled: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    if labelled:
        table.add_column("tensors of", overflow="fold", style="dim")
    table.add_column("role", no_wrap=True)
    table.add_column("name", overflow="fold")
    for name in ("shape", "dtype"):
        table.add_column(name, overflow="fold")
    ordered = any("order" in fold.first.facts for fold in rows)
    if ordered:
        table.add_column("rows of a fused tensor", overflow="fold")
    for fold in rows:
        label = clean(fold.label)
        for tensor in fold.first.tensors:
            if _shown_with_its_weight(tensor, fold.first):
                continue
            cells: list[RenderableType] = [Text(label)] if labelled else []
            cells += _tensor_cells(tensor, fold.first)
            if ordered:
                cells.append(Text(clean(fold.first.facts.get("order", "")) if tensor.role in _FUSED else ""))
            table.add_row(*cells)
            label = ""
    return table


def _tensor_cells(tensor: LayerTensor, layer: Layer) -> list[RenderableType]:
    name = relative(tensor, layer)
    if any(other.role == f"{tensor.role}_bias" for other in layer.tensors):
        name += " + bias"
    shape = "×".join(map(str, tensor.shape)) or "scalar"
    return [Text(tensor.role), Text(clean(name)), Text(shape), Text(clean(tensor.dtype))]


def _shown_with_its_weight(tensor: LayerTensor, layer: Layer) -> bool:
    if not tensor.role.endswith("_bias"):
        return False
    return any(other.role == tensor.role.removesuffix("_bias") for other in layer.tensors)


# --- tables -------------------------------------------------------------------------------------------

_COUNTS = {"heads": "heads", "kv_heads": "KV heads", "head_dim": "head size"}
_LABELS = {**_COUNTS, "scale": "scale"}
_FUSED = frozenset({"qkv", "kv", "qk"})
_FACTS = {
    "gate": "{} output gate",
    "v_head_dim": "value head size {}",
    "queries_per_kv_head": "{} query heads per KV head",
    "soft_cap": "soft cap {}",
    "sinks": "learned sinks",
    "q_norm": "q/k norm",
    "relative_bias": "relative bias",
    "relative_position": "relative positions",
    "differential": "differential heads",
    "cosine": "cosine scores",
    "orientation": "stored [in, out]",
    "stacked_layers": "{} layers in one tensor",
    "layer_type": "{}",
    "window": "window {}",
    "rope_order": "RoPE rows {}",
    "kv_head_of_query_head": "KV head = {}",
    "quantisation": "stored as {}",
    "per_layer_heads": "heads listed per layer",
    "adapter": "{}",
}
