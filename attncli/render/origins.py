"""What a search for NaN and Inf found: per origin its place, what shows it, the way there, and the proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attncli.records import Origin, Report
from attncli.render.steps import training_verdict
from attncli.render.words import clean


def origin_parts(report: Report) -> list[RenderableType]:
    """A block per origin: a title, and lines of facts."""
    total = len(report.origins)
    parts: list[RenderableType] = []
    for number, origin in enumerate(report.origins[:_MOST], 1):
        lines = Table.grid(padding=(0, 2, 0, 0))
        lines.add_column(style="dim", no_wrap=True, min_width=7)
        lines.add_column(overflow="fold")
        for name, words in origin_facts(origin):
            lines.add_row(name, Text(words, style=_style(origin) if name == "proof" else ""))
        parts.append(Group(_title(origin, number, total), Padding(lines, (0, 0, 1, 2))))
    if total > _MOST:
        parts.append(Text(f"{total - _MOST} more origins are in --format json", style="dim"))
    return parts


def origin_title(origin: Origin) -> tuple[str, str]:
    """What was born where, and what made it: "NaN born in decoder.0.attn", "bmm · forward · float16"."""
    name = {"nan": "NaN", "+inf": "+Inf", "-inf": "−Inf"}[origin.value]
    born = "was there before" if origin.op == "leaf" else "born"
    what = origin.tensor if origin.op == "leaf" and origin.tensor else origin.op
    place = f" in {clean(origin.module)}" if origin.module and origin.op != "leaf" else ""
    return f"{name} {born}{place}", f"{clean(what)} · {origin.phase} · {clean(origin.dtype)}"


def origin_facts(origin: Origin) -> list[tuple[str, str]]:
    """(name, words) of everything that is known of an origin, none of them empty."""
    evidence = origin.evidence
    at = ", ".join(f"{name} {_plain(value)}" for name, value in (origin.at or {}).items())
    if at and evidence.get("count") and evidence.get("of"):
        at += f" ({_grouped(evidence['count'])} of {_grouped(evidence['of'])} elements)"
    echo = evidence.get("echo") or {}
    known = {
        "cause": origin.cause,
        "line": clean(origin.source or ""),
        "in": f"the gradient of {evidence['forward_op']}" if evidence.get("forward_op") else "",
        "at": at,
        "echo": clean(f"{echo['op']} in {echo['module']}" if echo.get("module") else str(echo.get("op", ""))),
        "way": _way(origin.path),
        "seen in": _seen(evidence.get("seen") or ()),
        "proof": _proof(origin),
    }
    return [(name, words) for name, words in known.items() if words]


def nan_verdict(report: Report, tally: str) -> Text:
    """ "1 origin of NaN or Inf, proved; 1 error." or "No NaN or Inf in 412 operators; …"."""
    run = report.run or {}
    if "training" in run:
        return training_verdict(report, tally)
    operators = int(run.get("operators") or 0)
    if not report.looked:
        return Text("Not observed: no operator ran.", style="bold yellow")
    ran = f"{_grouped(operators)} operator{'s' if operators != 1 else ''}{_phases(run)}"
    if not report.origins:
        sentence = f"No NaN or Inf in {ran}; {headroom_words(run)}"
        return Text(f"{sentence}.", style="bold green")
    proved = sum(origin.confirmed is True for origin in report.origins)
    total = len(report.origins)
    how = "proved" if proved == total else f"{proved} of {total} proved" if proved else "not proved"
    silent = all(not origin.evidence.get("seen") for origin in report.origins)
    what = "silent overflow" if silent else "origin of NaN or Inf"
    sentence = f"{total} {what}{'s' if total != 1 and silent else ''}, {how}, in {ran}"
    if total != 1 and not silent:
        sentence = sentence.replace("origin of", "origins of", 1)
    style = "bold red" if any(finding.severity == "error" for finding in report.findings) else "bold yellow"
    return Text(f"{sentence}; {tally}.", style=style)


def headroom_words(run: Mapping[str, Any]) -> str:
    """The operator that came nearest to the end of its dtype, and how near."""
    found = run.get("headroom_bits") or {}
    if not found:
        return "no floating numbers were made"
    dtype, facts = min(found.items(), key=lambda item: item[1]["bits"])
    where = f"{facts['op']} in {facts['module']}" if facts.get("module") else facts["op"]
    return f"smallest headroom {facts['bits']:.1f} bits of {dtype} ({clean(where)})"


def _title(origin: Origin, number: int, total: int) -> Text:
    title, details = origin_title(origin)
    return Text.assemble(f"{number} of {total}: " if total > 1 else "", (title, "bold"), f" · {details}")


def _way(path: Sequence[Mapping[str, str]]) -> str:
    """The operators from the origin on, with the module where it changes."""
    words: list[str] = []
    module = path[0]["module"] if path else ""
    for step in path:
        if step["module"] != module and step["module"]:
            module = step["module"]
            words.append(f"{clean(module)}: {step['op']}")
        elif not words or words[-1] != step["op"]:
            words.append(step["op"])
    return " → ".join(words if len(words) <= _LONGEST else [*words[: _LONGEST - 3], "…", *words[-2:]])


def _seen(names: Sequence[str]) -> str:
    shown = ", ".join(clean(name) for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown


def _proof(origin: Origin) -> str:
    words = clean(str(origin.evidence.get("proof") or "not tried"))
    return words if origin.confirmed else f"not confirmed: {words}"


def _style(origin: Origin) -> str:
    return "green" if origin.confirmed else "yellow"


def _phases(run: Mapping[str, Any]) -> str:
    phases = {name: n for name, n in (run.get("operators_by_phase") or {}).items() if n}
    if len(phases) < 2:
        return ""
    return f" ({', '.join(f'{_grouped(n)} {name}' for name, n in phases.items())})"


def _grouped(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, (list, tuple)) else str(value)


# --- settings -----------------------------------------------------------------------------------------

_MOST = 10
_LONGEST = 10
_NAMED = 3
