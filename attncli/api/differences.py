"""Two checkpoints or reports → one report of what changed, and of what is worse in the second."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from attncli import __version__, records
from attncli.api.comparing import layer_changes, number_changes, source_changes, unknown_in_one
from attncli.api.pairing import Pairs, paired
from attncli.api.recurring import recurring, unheard
from attncli.api.report import Progress, Report, environment, fits, without_match
from attncli.errors import UsageError
from attncli.layout.names import layer_index, template
from attncli.records import SEVERITIES, Layer, structure
from attncli.records.reading import report_from
from attncli.rules import Compared, judge_changes


def diff(
    a: str | Path | records.Report,
    b: str | Path | records.Report,
    *,
    values: bool = False,
    bounds: bool = False,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    layers: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """What changed from `a` to `b`, in `changes`; `findings`: what is worse in `b`; `known`: findings of both.

    `a`, `b`: checkpoints, JSON reports, or reports. Of checkpoints the headers are compared, with `values` also
    largest magnitude, RMS, NaN and contents of every tensor, with `bounds` the bound of |q·k| of each head; `heads`,
    `kv_heads` and `head_dim` serve as in `inspect`. `layers`: glob patterns or numbers. A number that changed by
    less than 1e-4 of itself has not changed. `source["compared_with"]` is the source of `a`. Errors: AttncliError.
    """
    wanted = {
        "values": values,
        "bounds": bounds,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
    }
    sides = [_opened(side) for side in (a, b)]
    given = [name for name, value in wanted.items() if value]
    if given and not any(isinstance(side, str) for side in sides):
        raise UsageError(
            f"--{given[0].replace('_', '-')}",
            "it is about checkpoints, and both sides are reports.",
            "Give it to the commands that write the reports.",
        )
    first, second = (_read(side, wanted, progress) for side in sides)
    return _compared(first, second, layers)


def read_report(path: str | Path) -> Report:
    """The report in a JSON file that attncli wrote. Errors: `UsageError` with what is wrong with it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(str(path), f"it cannot be read ({error.strerror}).", "Check the path.") from error
    if not data.strip():
        raise UsageError(str(path), "the file is empty.", _WRITE)
    try:
        values = json.loads(data, parse_int=_whole_number)
        if not isinstance(values, dict):
            raise UsageError(str(path), "this is JSON, but no report of attncli.", _WRITE)
        return _own(report_from(values))
    except json.JSONDecodeError as error:
        cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        problem = (
            f"the JSON ends in the middle, at line {error.lineno}: the file was cut short."
            if cut
            else f"this is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})."
        )
        raise UsageError(str(path), problem, "Write the report anew with --format json -o FILE.") from error
    except RecursionError as error:
        raise UsageError(str(path), "this is JSON nested too deep to be a report.", _WRITE) from error
    except UnicodeDecodeError as error:
        raise UsageError(str(path), "this is no text in UTF-8, so no JSON.", _WRITE) from error
    except ValueError as error:
        raise UsageError(str(path), f"this cannot be compared: {error}.", _WRITE) from error


# --- the two sides ------------------------------------------------------------------------------------


def _opened(side: str | Path | records.Report) -> str | records.Report:
    """A report as its JSON tells it, or the path of a checkpoint."""
    report: records.Report
    if isinstance(side, records.Report):
        report = report_from(side.to_dict())
    elif _is_report(Path(side)):
        report = read_report(side)
        # Two reports of one model tell each other apart by their files.
        report = replace(report, source={**report.source, "report": str(side)})
    else:
        return str(side)
    if report.command == "diff":
        raise UsageError(
            str(report.source.get("path")) if isinstance(side, records.Report) else str(side),
            "this report tells what changed, not what is.",
            "Compare the two checkpoints or reports that it was made of.",
        )
    return report


def _is_report(path: Path) -> bool:
    """Whether a path leads to JSON, or to a pipe, as `<(attncli … --format json)` is."""
    if path.is_fifo():
        return True
    if not path.is_file() or path.name.endswith(".index.json"):
        return False
    if path.suffix.lower() == ".json":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return False  # the reader of checkpoints says what is wrong
    # A safetensors file may begin with "{" too: the low byte of a length whose high bytes are 0.
    utf16 = start.startswith((b"\xff\xfe{", b"\xfe\xff\x00{"))
    return utf16 or (start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") and b"\0" not in start)


def _read(
    side: str | records.Report, options: Mapping[str, Any], progress: Progress | None
) -> records.Report:
    """Either side alike: what the JSON of a checkpoint's report would not hold is left out of it too."""
    if isinstance(side, str):
        from attncli import api

        side = report_from(api.inspect(side, **options, contents=True, progress=progress).to_dict())
    layers = tuple(
        replace(layer, stack=template(layer.path), index=layer_index(layer.path)) for layer in side.layers
    )
    return replace(side, layers=layers)


def _whole_number(digits: str) -> int:
    """Errors: `ValueError` for what no float holds, which no arithmetic here expects."""
    if len(digits) > _DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _own(report: records.Report) -> Report:
    return Report(**{item.name: getattr(report, item.name) for item in fields(records.Report)})


# --- comparing ----------------------------------------------------------------------------------------


def _compared(first: records.Report, second: records.Report, patterns: Sequence[str]) -> Report:
    pairs = paired(first.layers, second.layers)
    sources = source_changes(first, second)
    everything = (*first.layers, *second.layers)
    if patterns:
        pairs = _matching(pairs, patterns, everything, str(second.source.get("path", "")))
        first = _only(first, [*(a for a, _ in pairs.both), *pairs.removed])
        second = _only(second, [*(b for _, b in pairs.both), *pairs.added])
    numbers = number_changes(pairs, first, second)
    findings = recurring(pairs, first, second)
    changes = (*layer_changes(pairs, first.calls, second.calls), *numbers.changes)
    unlike = _unlike_batches(first, second)
    worse = judge_changes(
        Compared(
            layers=second.layers,
            measurements=second.measurements,
            calls=second.calls,
            changes=changes,
            fair=not unlike,
            told=frozenset(
                finding.layer
                for finding in second.findings
                if finding.layer is not None and finding.code.startswith(_NOT_FINITE)
            ),
        )
    )
    return Report(
        command="diff",
        version=__version__,
        source={
            **second.source,
            "compared_with": _identity(first),
            "compared_numbers": bool(first.measurements and second.measurements),
        },
        environment=environment(),
        layers=second.layers,
        findings=tuple(
            sorted((*findings.new, *worse), key=lambda finding: -SEVERITIES.index(finding.severity))
        ),
        run=_operators(first, second),
        notes=(
            *without_match("layer", patterns, lambda pattern: any(fits(one, pattern) for one in everything)),
            *pairs.notes,
            *unlike,
            *_other_surroundings(first, second),
            *unknown_in_one(pairs),
            *numbers.notes,
            *_only_in_one(numbers.only),
            *unheard(findings.untold[0], "first", "second"),
            *unheard(findings.untold[1], "second", "first"),
        ),
        known=findings.known,
        changes=(
            *sources,
            *changes[: len(changes) - len(numbers.changes)],
            *findings.changes,
            *numbers.changes,
        ),
    )


def _matching(pairs: Pairs, patterns: Sequence[str], everything: Sequence[Layer], subject: str) -> Pairs:
    """The layers that were asked for, by their path in either report; an error where none was."""

    def asked(*layers: Layer) -> bool:
        return any(fits(layer, pattern) for layer in layers for pattern in patterns)

    kept = Pairs(
        tuple(pair for pair in pairs.both if asked(*pair)),
        tuple(layer for layer in pairs.removed if asked(layer)),
        tuple(layer for layer in pairs.added if asked(layer)),
        pairs.notes,
    )
    if not (kept.both or kept.removed or kept.added):
        example = f"Paths look like {everything[0].path}." if everything else "There is no attention layer."
        raise UsageError(subject, f"no layer matches --layer {', '.join(patterns)}.", example)
    return kept


def _only(report: records.Report, layers: Sequence[Layer]) -> records.Report:
    """The report of these layers alone."""
    kept = {layer.id for layer in layers}
    names = kept | {tensor.name for layer in layers for tensor in layer.tensors}
    return replace(
        report,
        layers=tuple(layer for layer in report.layers if layer.id in kept),
        calls=tuple(call for call in report.calls if call.layer in kept),
        measurements=tuple(row for row in report.measurements if row.layer in names),
        findings=tuple(item for item in report.findings if item.layer is None or item.layer in kept),
        known=tuple(item for item in report.known if item.layer is None or item.layer in kept),
    )


def _identity(report: records.Report) -> dict[str, Any]:
    return {**report.source, "command": report.command, "structure": structure(report.layers)}


def _operators(first: records.Report, second: records.Report) -> dict[str, Any] | None:
    """What makes two searches for NaN in a model without attention a comparison that looked at something."""
    if any(layer.kind is not None for layer in second.layers) or not (first.looked and second.looked):
        return None
    run = second.run or {}
    return {name: run[name] for name in ("operators", "operators_by_phase") if name in run} or None


# --- notes --------------------------------------------------------------------------------------------


def _unlike_batches(first: records.Report, second: records.Report) -> tuple[str, ...]:
    if first.run is None or second.run is None:
        return ()
    batches = [{key: run.get(key) for key in ("batch", "inputs")} for run in (first.run, second.run)]
    if batches[0] == batches[1]:
        return ()
    words = [_batch(batch) for batch in batches]
    what = f"{words[0]}, {words[1]}" if words[0] != words[1] else "other inputs"
    return (
        f"the two ran on different batches ({what}): entropies and scores may differ for that alone, "
        "and no rule judges how they changed",
    )


def _batch(batch: Mapping[str, Any]) -> str:
    inputs = batch["inputs"] if isinstance(batch["inputs"], dict) else {}
    shapes = [
        f"{name} {'×'.join(map(str, facts['shape']))}"
        for name, facts in inputs.items()
        if isinstance(facts, dict) and isinstance(facts.get("shape"), list)
    ]
    return f"{batch['batch']}: {', '.join(shapes)}" if shapes else str(batch["batch"])


def _other_surroundings(first: records.Report, second: records.Report) -> tuple[str, ...]:
    if first.run is None or second.run is None:
        return ()
    apart = [
        f"{name} {first.environment.get(name)} and {second.environment.get(name)}"
        for name in ("dtype", "device", "torch")
        if first.environment.get(name) != second.environment.get(name)
    ]
    return (f"the two did not run alike: {', '.join(apart)}",) if apart else ()


def _only_in_one(only: tuple[tuple[str, ...], tuple[str, ...]]) -> tuple[str, ...]:
    """Numbers that one report has and the other lacks, said by what they are about."""
    notes = []
    for which, metrics in zip(("first", "second"), only, strict=True):
        if metrics:
            about = dict.fromkeys(_ABOUT.get(metric, "forward pass") for metric in metrics)
            notes.append(f"only the {which} has numbers of: {', '.join(about)}")
    return tuple(notes)


# --- tables -------------------------------------------------------------------------------------------

_DIGITS = 300
_WRITE = "Give a checkpoint, or a report that this version of attncli wrote with --format json -o FILE."
# Rules that say of a layer that its numbers are not finite.
_NOT_FINITE = ("ATT201", "ATT502", "ATT506", "ATT7")
_ABOUT = {
    **dict.fromkeys(
        ("absmax", "rms", "zero_fraction", "nan_count", "inf_count", "contents"),
        "values of tensors (--values)",
    ),
    **dict.fromkeys(
        ("score_bound", "score_typical", "overflow_float16", "overflow_bfloat16", "overflow_float32"),
        "bounds of scores (--bounds)",
    ),
}
