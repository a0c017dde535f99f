"""A JSON report reads back as the report that wrote it, and anything else is refused by its place."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncli.records import (
    SCHEMA,
    AttentionMap,
    Call,
    Change,
    Finding,
    Layer,
    LayerTensor,
    Measurement,
    Origin,
    Report,
)
from attncli.records.reading import report_from

LAYER = Layer(
    id="h.0.attn",
    path="h.0.attn",
    kind="self",
    layout="fused-block",
    heads=12,
    kv_heads=None,
    head_dim=64,
    scale=0.125,
    evidence={"heads": "config", "kind": "name"},
    tensors=(LayerTensor("qkv", "h.0.attn.c_attn.weight", (768, 2304), "float16", "model.safetensors"),),
    facts={"orientation": "in, out", "window": 64, "odd": [1, {"a": None}]},
)
CALL = Call(
    index=0,
    layer="h.0.attn",
    module="h.0.attn",
    kernel="softmax",
    kind="self",
    normaliser="softmax",
    batch=1,
    heads=12,
    kv_heads=12,
    queries=8,
    keys=8,
    head_dim=64,
    dtype="float32",
    scores_dtype="float32",
    stored="raw",
    scale=math.inf,
    factors={"scores": 0.125, "query": math.nan},
    mask_kind="causal",
    causal_offset=0,
    query_sources=("input x", "call 3"),
    parameters={"q": "h.0.attn.c_attn.weight"},
    explained=True,
    difference=2e-7,
)
ORIGIN = Origin(
    value="nan",
    phase="forward",
    cause="masked-row",
    confirmed=None,
    module="attn",
    op="_softmax",
    source="model.py:3",
    tensor=None,
    layer="h.0.attn",
    at={"index": [1, 2]},
    dtype="float32",
    evidence={"keys": 6, "largest": math.inf},
    path=({"module": "attn", "op": "_softmax"},),
    message="every score is −inf",
    advice="let it see a key",
)
FINDING = Finding(
    "ATT501", "large-scores", "warning", "h.0.attn: head 1: large.", "Clip.", "h.0.attn", 1, {"x": 1}
)
MAP = AttentionMap(
    "h.0.attn", 0, 3, 0, 8, 8, (0, 4), (0, 4), ((0.25, 0.75), None), ("the", "cat"), ("the", "cat")
)
CHANGES = (
    Change("metric", "h.0.attn", 3, "entropy", 1.5, math.nan),
    Change("metric", "h.0.attn", 3, "score_bound", math.inf, -math.inf),
    Change("structure", "h.0.attn", None, "q shape", [64, 64], None),
    Change("structure", "h.0.attn", None, "layer type", "nan", "inf"),
    Change("added", "h.1.attn", None, "layer", None, {"heads": 12}),
)
FULL = Report(
    command="check",
    version="0.1.0",
    source={"kind": "file", "path": "m.safetensors", "parameters": 12},
    environment={"python": "3.11", "torch": None},
    layers=(LAYER,),
    measurements=(
        Measurement("score_bound", "h.0.attn", math.inf, head=3, low=0.5, high=math.inf),
        Measurement("entropy", "h.0.attn", math.nan, "nats", 0, 0, "bracket", -math.inf, 2.0),
        Measurement("overflow_float16", "h.0.attn", "proven safe"),
        Measurement("nan_count", "h.0.attn.c_attn.weight", 3),
        Measurement("rms", "h.0.attn.c_attn.weight", None),
    ),
    origins=(ORIGIN,),
    findings=(FINDING,),
    run={"batch": "text", "inputs": {"ids": {"shape": [1, 8], "dtype": "int64"}}, "calls_seen": 1},
    calls=(CALL,),
    notes=("größe",),
    known=(dataclasses.replace(FINDING, layer=None, head=None),),
    maps=(MAP,),
    changes=CHANGES,
)


def as_json(report: Report) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(report.to_json())
    return values


def changed(place: str, value: Any) -> dict[str, Any]:
    """The full report with one value replaced: "layers.0.heads"."""
    values = as_json(FULL)
    *way, last = place.split(".")
    inner: Any = values
    for part in way:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    inner[int(last) if isinstance(inner, list) else last] = value
    return values


# --- there and back -----------------------------------------------------------------------------------


def test_every_part_of_the_schema_reads_back_as_it_was_written() -> None:
    assert report_from(as_json(FULL)).to_dict() == FULL.to_dict()


def test_the_records_are_those_that_were_written() -> None:
    back = report_from(as_json(FULL))
    assert (back.layers, back.findings, back.known, back.maps) == (
        FULL.layers,
        FULL.findings,
        FULL.known,
        FULL.maps,
    )
    assert (back.run, back.notes, back.command, back.version) == (
        FULL.run,
        FULL.notes,
        "check",
        "0.1.0",
    )
    assert back.findings[0].fingerprint == FINDING.fingerprint
    assert (back.verdict, back.looked, back.exit_code("warning")) == (
        FULL.verdict,
        FULL.looked,
        FULL.exit_code("warning"),
    )


def test_numbers_that_are_not_finite_come_back_where_the_field_is_a_number() -> None:
    back = report_from(as_json(FULL))
    assert [row.value for row in back.measurements[2:]] == ["proven safe", 3, None]
    assert (back.measurements[0].value, back.measurements[0].high) == (math.inf, math.inf)
    assert math.isnan(back.measurements[1].value)  # type: ignore[arg-type]
    assert back.measurements[1].low == -math.inf
    assert back.calls[0].scale == math.inf
    assert math.isnan(back.calls[0].factors["query"])
    assert math.isnan(back.changes[0].after)
    assert (back.changes[1].before, back.changes[1].after) == (math.inf, -math.inf)


def test_words_that_look_like_numbers_stay_words() -> None:
    back = report_from(as_json(FULL))
    assert (back.changes[3].before, back.changes[3].after) == ("nan", "inf")
    assert back.origins[0].value == "nan"
    assert back.origins[0].evidence["largest"] == "inf"


names = st.text(st.characters(codec="utf-8"), max_size=6)
numbers = st.none() | st.floats() | st.integers(-(2**60), 2**60)


@given(names, numbers, st.dictionaries(names, numbers | names, max_size=3))
def test_any_report_reads_back(name: str, number: Any, facts: dict[str, Any]) -> None:
    report = dataclasses.replace(
        FULL,
        source=facts,
        layers=(dataclasses.replace(LAYER, path=name, facts=facts),),
        measurements=(Measurement(name, name, number, low=number),),
        findings=(dataclasses.replace(FINDING, message=name, evidence=facts),),
        changes=(Change("metric", name, None, name, number, None),),
    )
    assert report_from(as_json(report)).to_dict() == report.to_dict()


# --- older and newer ----------------------------------------------------------------------------------


def test_a_report_without_the_newer_keys_is_read() -> None:
    values = as_json(FULL)
    for key in ("known", "maps", "changes", "origins", "structure", "notes"):
        del values[key]
    del values["run"]["calls"]
    for finding in values["findings"]:
        del finding["fingerprint"]
    back = report_from(values)
    assert (back.known, back.maps, back.changes, back.calls) == ((), (), (), ())
    assert back.findings == FULL.findings


def test_keys_that_no_record_knows_are_left_out() -> None:
    values = as_json(FULL)
    values["later"] = values["layers"][0]["later"] = values["findings"][0]["later"] = {"a": 1}
    assert report_from(values).to_dict() == FULL.to_dict()


# --- what is no report --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "it is no report of attncli"),
        ({"schema": 3}, "it is no report of attncli"),
        ({"schema": "https://json.schemastore.org/sarif-2.1.0.json"}, "it is no report of attncli"),
        ({"schema": "attncli-report/2"}, "its schema is attncli-report/2, not attncli-report/1"),
        ({"schema": "attncli-baseline/1"}, "its schema is attncli-baseline/1, not attncli-report/1"),
        ({"schema": SCHEMA}, "the report lacks the key 'command'"),
        (changed("command", None), "command is null, not text"),
        (changed("layers", {}), "layers is an object, not a list"),
        (changed("layers.0", 1), "layers[0] is 1, not an object"),
        (changed("layers.0", {}), "layers[0] lacks the key 'id'"),
        (changed("layers.0.heads", "12"), "layers[0].heads is '12', not a whole number or null"),
        (changed("layers.0.heads", True), "layers[0].heads is True, not a whole number or null"),
        (changed("layers.0.heads", 1.5), "layers[0].heads is 1.5, not a whole number or null"),
        (changed("layers.0.scale", True), "layers[0].scale is True, not a number or null"),
        (changed("layers.0.scale", "a"), "layers[0].scale is 'a', not a number or null"),
        (changed("layers.0.kind", "x"), "layers[0].kind is 'x', not one of self, cross or null"),
        (
            changed("layers.0.tensors.0.shape.1", "x"),
            "layers[0].tensors[0].shape[1] is 'x', not a whole number",
        ),
        (changed("layers.0.evidence.heads", []), "layers[0].evidence.heads is a list, not one of config, "),
        (changed("measurements.4.value", []), "measurements[4].value is a list, not a number, "),
        (changed("findings.0.severity", "fatal"), "findings[0].severity is 'fatal', not one of note, "),
        (changed("known.0.message", 1), "known[0].message is 1, not text"),
        (changed("run", 3), "run is 3, not an object or null"),
        (changed("run.calls", None), "run.calls is null, not a list"),
        (changed("run.calls.0.explained", 1), "run.calls[0].explained is 1, not true or false"),
        (changed("maps.0.probs.0.1", "x"), "maps[0].probs[0][1] is 'x', not a number"),
        (changed("origins.0.path.0", "x"), "origins[0].path[0] is 'x', not an object"),
        (changed("notes.0", {}), "notes[0] is an object, not text"),
        (changed("source", []), "source is a list, not an object"),
        (changed("layers.0.id", "x" * 99 + "\n") | {"notes": ["a", 2]}, "notes[1] is 2, not text"),
        (changed("layers.0.heads", "y" * 99), f"layers[0].heads is '{'y' * 38}…, not a whole number or null"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        report_from(values)
    assert str(caught.value).startswith(problem)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda values: values.pop("layers"), "the report has no layers"),
        (lambda values: values["layers"][0].update(heads=-4), "layers[0].heads is -4"),
        (
            lambda values: values["measurements"][0].update(metric="entropy", value="abc"),
            "measurements[0].value is 'abc', which is no number",
        ),
    ],
)
def test_what_no_report_holds_is_an_error_although_its_types_fit(change, problem):
    values = json.loads(json.dumps(as_json(FULL)))
    change(values)
    with pytest.raises(ValueError, match=re.escape(problem)):
        report_from(values)
