"""What a training run showed, in words and rows for every format: the step that went wrong and those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attncli.records import Report
from attncli.render.words import clean, number

# --- sentences ----------------------------------------------------------------------------------------


def notice(fault: Mapping[str, Any]) -> str:
    """ "step 412 (epoch 2, batch 37 of DataLoader): the loss was NaN at train.py:88", one line without a full stop."""
    place = ", ".join(_batch(fault))
    return f"step {fault.get('step')}{f' ({place})' if place else ''}: {symptom(fault)}"


def symptom(fault: Mapping[str, Any]) -> str:
    """ "the loss was NaN at train.py:88", "12 gradients were NaN, first blk.3.wq.weight"."""
    value = _VALUES.get(str(fault.get("value")), "not finite")
    seen, tensors = clean(fault.get("seen") or "step"), list(fault.get("tensors") or ())
    at = f" at {clean(fault['source'])}" if fault.get("source") else ""
    if seen == "loss scale":
        return f"the loss scale collapsed{at}"
    if not tensors:
        return f"the {seen} was {value}{at}"
    if len(tensors) == 1:
        return f"the {seen} {'of ' if seen == 'gradient' else ''}{clean(tensors[0])} was {value}{at}"
    return f"{len(tensors)} {seen}s were {value}, first {clean(tensors[0])}{at}"


def seen_words(report: Report) -> str:
    """What a run showed, the verdict without its findings: "step 412 of 412: 1 origin of NaN, proved"."""
    training = training_of(report)
    steps, fault, faults = int(training.get("seen") or 0), training.get("fault"), training.get("faults")
    if not fault:
        last = training.get("steps") or ()
        skipped = sum(bool(step.get("skipped")) for step in last)
        beside = f", {skipped} of the last {len(last)} skipped by the loss scaler" if skipped else ""
        return f"{counted(steps, 'step')} watched, nothing non-finite{beside}"
    more = (
        f", the first of {_grouped(faults)} that went wrong" if isinstance(faults, int) and faults > 1 else ""
    )
    return f"step {_grouped(fault['step'])} of {_grouped(max(steps, fault['step']))}{more}: {_found(report, fault)}"


def training_of(report: Report) -> Mapping[str, Any]:
    """`run["training"]` of the report; empty where nothing was trained."""
    return (report.run or {}).get("training") or {}


def headline(training: Mapping[str, Any]) -> str:
    """ "Training stopped in step 412 (epoch 2, batch 37 of DataLoader over TensorDataset)"; "" without a fault."""
    fault = training.get("fault")
    if not fault:
        return ""
    place = ", ".join(_batch(fault))
    place += ", counted from 0" if (fault.get("batch") or {}).get("index") is not None else ""
    what = "Training stopped in step" if training.get("stopped") else "Training went on after step"
    return f"{what} {_grouped(fault['step'])}{f' ({place})' if place else ''}"


def fault_facts(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, words) of everything that is known of the fault, none of them empty."""
    fault = training.get("fault")
    if not fault:
        return []
    items = list((fault.get("batch") or {}).get("items") or ())
    shown = ", ".join(_grouped(item) for item in items[:_NAMED])
    tensors = [clean(name) for name in fault.get("tensors") or ()]
    capsule = clean(training.get("capsule") or "")
    known = {
        "seen": symptom(fault),
        "tensors": _listed(tensors) if len(tensors) > 1 else "",
        "items": f"{shown} and {len(items) - _NAMED} more" if len(items) > _NAMED else shown,
        "item": _item(fault.get("batch") or {}),
        "rank": _rank(training, fault),
        "update": _update(training, fault),
        "replay": _replay(fault),
        "capsule": capsule,
        "again": f"attncli nan-check --replay {_quoted(capsule)}" if capsule else "",
    }
    return [(name, words) for name, words in known.items() if words]


def history(training: Mapping[str, Any], most: int) -> tuple[list[str], list[list[str]]]:
    """The columns that hold anything, and a row for each of the last `most` steps."""
    steps = list(training.get("steps") or ())[-most:]
    fault = training.get("fault") or {}
    shown = [(key, title) for key, title in _COLUMNS if any(step.get(key) is not None for step in steps)]
    rows = [[str(step.get("number")), *(_value(step.get(key)) for key, _ in shown)] for step in steps]
    notes = [_note(step, fault) for step in steps]
    columns = ["step", *(title for _, title in shown)]
    if any(notes):
        columns.append("")
        rows = [[*row, note] for row, note in zip(rows, notes, strict=True)]
    return columns, rows


def curve(training: Mapping[str, Any], key: str) -> list[tuple[int, float]]:
    """(step, value) where the steps have one, NaN and Inf as they are."""
    found = [(step.get("number"), number_of(step.get(key))) for step in training.get("steps") or ()]
    return [(int(at), value) for at, value in found if at is not None and value is not None]


def number_of(value: object) -> float | None:
    """A number of a report, whether fresh or read back from its JSON; None for what is none."""
    if isinstance(value, str):
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def counted(amount: int, noun: str) -> str:
    """ "1 step", "1 200 steps"."""
    return f"{_grouped(amount)} {noun}{'s' if amount != 1 else ''}"


# --- building blocks ----------------------------------------------------------------------------------


def _found(report: Report, fault: Mapping[str, Any]) -> str:
    total = len(report.origins)
    if not total:
        return f"{symptom(fault)}, its origin is not known"
    values = {"NaN" if origin.value == "nan" else "Inf" for origin in report.origins}
    proved = sum(origin.confirmed is True for origin in report.origins)
    how = "proved" if proved == total else f"{proved} of {total} proved" if proved else "not proved"
    return f"{total} origin{'s' if total != 1 else ''} of {' and '.join(sorted(values, reverse=True))}, {how}"


def _batch(fault: Mapping[str, Any]) -> list[str]:
    batch = fault.get("batch") or {}
    loader = f" of {clean(batch['loader'])}" if batch.get("loader") else ""
    parts = [f"epoch {batch['epoch']}"] if batch.get("epoch") is not None else []
    if batch.get("index") is not None:
        parts.append(f"batch {_grouped(batch['index'])}{loader}")
    elif loader:
        parts.append(f"a batch{loader}")
    return [clean(part) for part in parts]


def _rank(training: Mapping[str, Any], fault: Mapping[str, Any]) -> str:
    world, rank = training.get("world"), fault.get("rank")
    if rank is None or not isinstance(world, int) or world < 2:
        return ""
    return f"{rank} of {world} processes, counted from 0; it began there"


def _update(training: Mapping[str, Any], fault: Mapping[str, Any]) -> str:
    """Whether the update was made, and whether an earlier one has ruined the weights already."""
    words = _UPDATES[fault.get("withheld")]
    spoiled = fault.get("spoiled")
    if fault.get("withheld") and isinstance(spoiled, int) and spoiled:
        return f"withheld, but {counted(spoiled, 'parameter')} {'were' if spoiled > 1 else 'was'} not finite already"
    thrown = [one for one in training.get("moved") or () if 0 < fault["step"] - one["step"] <= _ECHOES]
    if not fault.get("withheld") or not thrown:
        return words
    at = thrown[-1]["step"]
    count = sum(one["step"] == at for one in thrown)
    return f"withheld, but step {_grouped(at)} had thrown {counted(count, 'parameter')} far out already"


def _item(batch: Mapping[str, Any]) -> str:
    if batch.get("item") is None:
        return ""
    return f"{_grouped(batch['item'])}, element {batch['element']} of the batch"


def _replay(fault: Mapping[str, Any]) -> str:
    said = {True: "showed it again", False: "did not show it again", None: "was not done"}
    why = clean(fault.get("why") or "").strip().rstrip(".")
    return said[fault.get("reproduced")] + (f": {why}" if why else "")


def _note(step: Mapping[str, Any], fault: Mapping[str, Any]) -> str:
    said = ["skipped"] if step.get("skipped") else []
    return ", ".join([*said, *(["went wrong"] if fault and step.get("number") == fault.get("step") else [])])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _quoted(path: str) -> str:
    """A path as a shell takes it."""
    import shlex

    return shlex.quote(path)


def _value(value: object) -> str:
    if isinstance(value, str) and (of := number_of(value)) is not None:
        value = of
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf" if value > 0 else "−Inf"
    return clean(number(value))


def _grouped(value: object) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else clean(value)


# --- words --------------------------------------------------------------------------------------------

_VALUES = {"nan": "NaN", "+inf": "+Inf", "-inf": "−Inf"}
# A parameter that an update threw out makes the next steps go wrong.
_ECHOES = 4
_UPDATES = {
    True: "withheld: the weights are those from before the step",
    False: "made: the weights are no longer those from before the step",
    None: "",
}
_COLUMNS = (
    ("loss", "loss"),
    ("gradient_norm", "gradient norm"),
    ("learning_rate", "learning rate"),
    ("loss_scale", "loss scale"),
    ("parameter_absmax", "largest parameter"),
    ("parameter", "its name"),
)
_NAMED = 8
