"""The report for a person: tables by rich, on a terminal at its width, elsewhere with no name cut short."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attncli.records import Layer, Measurement, Report
from attncli.render.folds import Fold, folds, relative

# Wide enough that no row of any checkpoint wraps where the output is not a terminal.
UNBOUNDED = 100_000


def text(report: Report, *, unfolded: bool = False) -> str:
    """The table as plain text without colour and without wrapping: for files, pipes and `print`."""
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=UNBOUNDED, color_system=None, force_terminal=False, legacy_windows=False
    )
    draw(report, console, unfolded=unfolded)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def draw(report: Report, console: Console, *, unfolded: bool = False) -> None:
    """Draws the whole report on `console`. `unfolded`: one row per layer."""
    for part in _parts(report, unfolded, console.width < NARROW):
        console.print(part, highlight=False)


def _parts(report: Report, unfolded: bool, narrow: bool) -> list[RenderableType]:
    rows = [Fold((layer,)) for layer in report.layers] if unfolded else folds(report.layers)
    parts: list[RenderableType] = [_heading(report)]
    if rows:
        parts.append(_layer_list(rows) if narrow else _layer_table(rows))
        parts.append(_tensor_table(rows))
    bounds = _bound_table(report, unfolded)
    if bounds is not None:
        parts.append(bounds)
    values = _value_part(report, unfolded)
    if values is not None:
        parts.append(values)
    if report.notes:
        parts.append(Group(*(Text(f"note: {clean(note)}", style="dim") for note in report.notes)))
    parts.extend(_findings(report))
    parts.append(_verdict(report))
    return parts


def clean(name: object) -> str:
    """`name` with control characters made visible: a checkpoint must not steer the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(name))


# --- heading and verdict ------------------------------------------------------------------------------


def _heading(report: Report) -> Text:
    source = report.source
    files = source.get("files", 1)
    line = Text()
    line.append(clean(source.get("path", "")), style="bold")
    facts = [
        clean(source.get("format", "")),
        f"{files} file{'s' if files != 1 else ''}",
        size(int(source.get("bytes", 0))),
        f"{count(int(source.get('parameters', 0)))} parameters",
    ]
    line.append("  " + " · ".join(facts))
    return line


def _verdict(report: Report) -> Text:
    attention = [layer for layer in report.layers if layer.kind is not None]
    others = len(report.layers) - len(attention)
    listed = f", {others} other sequence layer{'s' if others != 1 else ''}" if others else ""
    seen = f"{len(attention)} attention layer{'s' if len(attention) != 1 else ''}{listed}"
    if not report.looked:
        if report.findings:
            return Text(f"No attention layer was found{listed}; {_tally(report)}.", style="bold red")
        return Text(f"Not observed: no attention layer was found{listed}.", style="bold yellow")
    if not report.findings:
        return Text(f"{seen}; no findings.", style="bold green")
    style = {"error": "bold red", "warning": "bold yellow", "note": "bold"}[report.findings[0].severity]
    return Text(f"{seen}; {_tally(report)}.", style=style)


def _tally(report: Report) -> str:
    counts = {s: sum(f.severity == s for f in report.findings) for s in ("error", "warning", "note")}
    return ", ".join(f"{n} {s}{'s' if n != 1 else ''}" for s, n in counts.items() if n)


def _findings(report: Report) -> list[RenderableType]:
    out: list[RenderableType] = []
    grouped: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for finding in report.findings:
        grouped[(finding.severity, finding.code, _shape_of(finding.message))].append(finding.message)
    shown: set[tuple[str, str, str]] = set()
    for finding in report.findings:
        key = (finding.severity, finding.code, _shape_of(finding.message))
        if key in shown:
            continue
        shown.add(key)
        style = {"error": "bold red", "warning": "yellow", "note": "cyan"}[finding.severity]
        line = Text.assemble(
            (f"{finding.severity} ", style), (f"{finding.code} {finding.name}", "bold"), "  "
        )
        line.append(clean(finding.message))
        alike = len(grouped[key]) - 1
        if alike:
            line.append(f" (and {alike} more like it)", style="dim")
        out.append(Group(line, Padding(Text(f"→ {clean(finding.advice)}", style="dim"), (0, 0, 0, 2))))
    return out


def _shape_of(message: str) -> str:
    """The message without its numbers: findings that say the same of several layers are shown once."""
    return "".join(c for c in message if not c.isdigit())


# --- layers -------------------------------------------------------------------------------------------


def _layer_table(rows: Sequence[Fold]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("layers", overflow="fold")
    for name, justify in (
        ("kind", "left"),
        ("layout", "left"),
        ("heads", "right"),
        ("KV heads", "right"),
        ("head size", "right"),
        ("scale", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=name != "layout")  # type: ignore[arg-type]
    table.add_column("known from", overflow="fold", style="dim")
    table.add_column("by design", overflow="fold")
    for fold in rows:
        layer = fold.first
        table.add_row(
            Text(clean(fold.label)),
            Text(layer.kind or "—"),
            Text(layer.layout),
            _fact(layer, layer.heads),
            _fact(layer, layer.kv_heads),
            _fact(layer, layer.head_dim),
            _scale(layer),
            Text(_known_from(layer)),
            Text(_by_design(layer)),
        )
    return table


def _layer_list(rows: Sequence[Fold]) -> Group:
    """The same facts one below the other, for a terminal too narrow for a table."""
    lines: list[RenderableType] = []
    for fold in rows:
        layer = fold.first
        lines.append(Text(clean(fold.label), style="bold"))
        facts = [("kind", layer.kind or "—"), ("layout", layer.layout)]
        if layer.kind is not None:
            facts += [
                ("heads", _plain(layer.heads)),
                ("KV heads", _plain(layer.kv_heads)),
                ("head size", _plain(layer.head_dim)),
                ("scale", str(_scale(layer))),
                ("known from", _known_from(layer)),
                ("by design", _by_design(layer)),
            ]
        lines += [Text(f"  {name}: {value}") for name, value in facts if value]
    return Group(*lines)


def _fact(layer: Layer, value: int | None) -> Text:
    if layer.kind is None:
        return Text("—", style="dim")
    return Text("unknown", style="yellow") if value is None else Text(str(value))


def _plain(value: int | None) -> str:
    return "unknown" if value is None else str(value)


def _scale(layer: Layer) -> Text:
    if layer.kind is None:
        return Text("—", style="dim")
    if layer.scale is None:
        learned = layer.facts.get("cosine")
        return Text("learned") if learned else Text("unknown", style="yellow")
    value = number(layer.scale)
    if layer.head_dim and math.isclose(layer.scale, layer.head_dim**-0.5, rel_tol=1e-6):
        return Text(f"1/√{layer.head_dim}")
    return Text(value)


def _known_from(layer: Layer) -> str:
    """ "config" alone where everything comes from there, otherwise what comes from where."""
    labels = {"heads": "heads", "kv_heads": "KV heads", "head_dim": "head size", "scale": "scale"}
    values = {
        "heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "scale": layer.scale,
    }
    by_source: dict[str, list[str]] = defaultdict(list)
    for key, label in labels.items():
        source = layer.evidence.get(key)
        if source is not None and values[key] is not None:
            by_source[source].append(label)
    if len(by_source) == 1:
        return next(iter(by_source))
    return "; ".join(f"{', '.join(names)}: {source}" for source, names in by_source.items())


def _by_design(layer: Layer) -> str:
    parts = []
    for key, value in layer.facts.items():
        label = _FACTS.get(key)
        if label is not None:
            parts.append(label.format(value))
    return ", ".join(parts)


def _tensor_table(rows: Sequence[Fold]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("tensors of", overflow="fold", style="dim")
    table.add_column("role", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    ordered = any("order" in fold.first.facts for fold in rows)
    if ordered:
        table.add_column("rows of a fused tensor", overflow="fold")
    for fold in rows:
        biases = {t.role.removesuffix("_bias"): t for t in fold.first.tensors if t.role.endswith("_bias")}
        label = fold.label
        for tensor in fold.first.tensors:
            if tensor.role.endswith("_bias") and _merges(tensor.role, fold.first):
                continue
            bias = biases.get(tensor.role)
            shape = "×".join(map(str, tensor.shape)) or "scalar"
            name = relative(tensor, fold.first)
            if bias is not None:
                name += " + bias"
            cells: list[RenderableType] = [
                Text(clean(label)),
                tensor.role,
                Text(clean(name)),
                shape,
                clean(tensor.dtype),
            ]
            if ordered:
                cells.append(Text(str(fold.first.facts.get("order", "")) if tensor.role in _FUSED else ""))
            table.add_row(*cells)
            label = ""
    return table


def _merges(role: str, layer: Layer) -> bool:
    """A bias beside its own weight is shown in the weight's row."""
    return any(tensor.role == role.removesuffix("_bias") for tensor in layer.tensors)


# --- bounds and values --------------------------------------------------------------------------------


def _bound_table(report: Report, unfolded: bool) -> RenderableType | None:
    by_layer: dict[str, dict[str, list[Measurement]]] = defaultdict(lambda: defaultdict(list))
    for row in report.measurements:
        if row.metric.startswith(("score_", "overflow_")):
            by_layer[row.layer][row.metric].append(row)
    if not by_layer:
        return None
    table = Table(
        title="What q·k can become, from the weights alone (before scaling)",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("layer", overflow="fold")
    for name in ("head", "largest |q·k|", "typical", "float16", "bfloat16", "float32"):
        table.add_column(name, justify="right" if name in ("head", "largest |q·k|", "typical") else "left")
    for layer, metrics in by_layer.items():
        bounds = [r for r in metrics["score_bound"] if isinstance(r.value, (int, float))]
        if not bounds:
            continue
        typical = {r.head: r.value for r in metrics["score_typical"]}
        chosen = bounds if unfolded else [max(bounds, key=lambda r: float(r.value))]  # type: ignore[arg-type]
        for row in chosen:
            table.add_row(
                Text(clean(layer)),
                str(row.head),
                number(float(row.value)) if math.isfinite(float(row.value)) else "no bound",  # type: ignore[arg-type]
                number(float(typical.get(row.head) or 0.0)),
                *(_safety(metrics, dtype) for dtype in ("float16", "bfloat16", "float32")),
            )
    return table


def _safety(metrics: dict[str, list[Measurement]], dtype: str) -> Text:
    rows = metrics.get(f"overflow_{dtype}")
    verdict = str(rows[0].value) if rows else "unknown"
    return Text(verdict, style={"proven safe": "green"}.get(verdict, "yellow"))


def _value_part(report: Report, unfolded: bool) -> RenderableType | None:
    per_tensor: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in report.measurements:
        if row.metric in ("nan_count", "inf_count", "absmax", "rms", "zero_fraction"):
            per_tensor[row.layer][row.metric] = row.value
    if not per_tensor:
        return None
    nan = sum(int(v.get("nan_count") or 0) for v in per_tensor.values())
    inf = sum(int(v.get("inf_count") or 0) for v in per_tensor.values())
    broken = [n for n, v in per_tensor.items() if v.get("nan_count") or v.get("inf_count")]
    largest = sorted(per_tensor, key=lambda n: -float(per_tensor[n].get("absmax") or 0.0))
    shown = list(per_tensor) if unfolded else [*broken[:10], *[n for n in largest if n not in broken][:5]]
    table = Table(
        title=f"Values of {len(per_tensor)} tensors: {nan} NaN, {inf} Inf"
        + ("" if unfolded else " (those with NaN or Inf, then the largest)"),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("tensor", overflow="fold")
    for name in ("NaN", "Inf", "largest |w|", "RMS", "zeros"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in shown:
        v = per_tensor[name]
        table.add_row(
            Text(clean(name)),
            str(v.get("nan_count", "")),
            str(v.get("inf_count", "")),
            number(v.get("absmax")),
            number(v.get("rms")),
            percent(v.get("zero_fraction")),
        )
    return table


# --- numbers ------------------------------------------------------------------------------------------


def number(value: object) -> str:
    """Four significant digits; "0" only for zero."""
    if not isinstance(value, (int, float)):
        return "—" if value is None else str(value)
    if value == 0 or not math.isfinite(value):
        return str(int(value)) if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}".replace(",", " ")
    return f"{value:.2e}"


def percent(fraction: object) -> str:
    """A share in percent that shows 0 % or 100 % only where it is exactly that."""
    if not isinstance(fraction, (int, float)):
        return "—"
    if fraction in (0, 1):
        return f"{int(fraction * 100)} %"
    shown = f"{100 * fraction:.2g}"
    if float(shown) >= 100:
        return ">99.9 %"
    return f"{shown} %" if fraction >= 1e-4 else "<0.01 %"


def size(size_bytes: int) -> str:
    """Decimal units, as disks and downloads count."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes} bytes"


def count(amount: int) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= scale:
            return f"{amount / scale:.3g} {unit}"
    return str(amount)


# --- tables -------------------------------------------------------------------------------------------

NARROW = 90
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
