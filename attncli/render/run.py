"""What the report of a forward pass says around its numbers: what ran on what, and whether it was observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from attncli.records import Report
from attncli.render.calls import Row, call_rows, full_label, titled
from attncli.render.heads import picture
from attncli.render.maps import map_parts
from attncli.render.metrics import every_head
from attncli.render.overflow import headroom_part
from attncli.render.traits import heads_that_stand_out
from attncli.render.words import clean, count


def run_heading(report: Report, width: int) -> RenderableType:
    """The model, where it ran, and on which batch; that a batch is random stands out."""
    source, run = report.source, report.run or {}
    facts = [clean(source.get(key) or "") for key in ("kind", "format")]
    facts = list(dict.fromkeys(fact for fact in facts if fact not in ("", "file", "folder")))
    if source.get("parameters"):
        facts.append(f"{count(int(source['parameters']))} parameters")
    environment = [report.environment.get(key) for key in ("device", "dtype")]
    facts += [clean(value) for value in environment if value]
    batch = str(run.get("batch") or "unknown")
    inputs = [f"{clean(name)} {_shape(value)}" for name, value in (run.get("inputs") or {}).items()]
    lines = [
        *titled(clean(source.get("path", "")), facts, width),
        *titled(f"{clean(batch)} batch", inputs, width),
    ]
    if batch == "synthetic":
        lines.append(Text(_SYNTHETIC, style="yellow"))
    return Group(*lines, Text())


def run_parts(report: Report, console: Console, *, unfolded: bool) -> list[RenderableType]:
    """The numbers of each call, as the command shows them."""
    rows = call_rows(report)
    if not rows:
        return []
    parts: list[RenderableType] = []
    if report.command != "overflow":
        parts += [*picture(rows, console), *heads_that_stand_out(rows, console)]
    if report.command != "entropy":
        parts += headroom_part(rows, report.findings, console)
    parts += every_head(rows, console) if unfolded else []
    return [*parts, *map_parts(report.maps, rows, console)]


def run_notes(report: Report) -> list[str]:
    """The report's notes and those of the run, each once."""
    return list(dict.fromkeys([*report.notes, *map(str, (report.run or {}).get("notes") or ())]))


def unobserved(report: Report) -> list[RenderableType]:
    """A yellow line for every reason why a call was not explained, with the calls it is true of."""
    rows = call_rows(report)
    reasons: dict[str, list[Row]] = {}
    for row in rows:
        if not row.call.explained:
            reasons.setdefault(row.call.reason or "its output could not be recomputed", []).append(row)
    lines: list[RenderableType] = []
    for reason, where in reasons.items():
        named = ", ".join(full_label([row], rows) for row in where[:_NAMED])
        more = f" and {len(where) - _NAMED} more" if len(where) > _NAMED else ""
        lines.append(Text(f"not observed: {named}{more}: {clean(reason).rstrip('.')}.", style="yellow"))
    return lines


def run_verdict(report: Report, tally: str) -> Text:
    """ "12 calls, 12 explained (largest difference 3e-06); no findings." `tally`: the findings, counted."""
    calls, explained = len(report.calls), sum(call.explained for call in report.calls)
    if not calls:
        others = sum(layer.kind is None for layer in report.layers)
        beside = f"; {others} layer{'s' if others > 1 else ''} without softmax attention" if others else ""
        sentence = f"Not observed: no attention ran{beside}"
    elif explained == calls:
        sentence = f"{calls} call{'' if calls == 1 else 's'}, {explained} explained"
        sentence += f" ({_difference(report)})" if _difference(report) else ""
    else:
        details = ", ".join(filter(None, (f"{explained} explained", _difference(report))))
        sentence = f"Not observed: {calls - explained} of {calls} calls ({details})"
    if report.findings:
        severity = report.findings[0].severity
        style = {"error": "bold red", "warning": "bold yellow", "note": "bold"}[severity]
        return Text(f"{sentence}; {tally}.", style=style)
    if not report.looked:
        return Text(f"{sentence}.", style="bold yellow")
    return Text(f"{sentence}; {tally}.", style="bold green")


# --- building blocks ----------------------------------------------------------------------------------


def _shape(facts: Any) -> str:
    shape: Sequence[Any] = facts.get("shape") or () if isinstance(facts, Mapping) else ()
    dtype = clean(facts.get("dtype") or "") if isinstance(facts, Mapping) else ""
    return f"{'×'.join(map(clean, shape)) or 'scalar'} {dtype}".strip()


def _difference(report: Report) -> str:
    value = (report.run or {}).get("difference")
    if not isinstance(value, (int, float)):
        return ""
    return f"largest difference {f'{value:.0e}' if value else '0'}"


# --- words --------------------------------------------------------------------------------------------

_SYNTHETIC = "Random inputs: the numbers of real ones differ. Give --text or --input."
_NAMED = 3  # calls named for one reason
