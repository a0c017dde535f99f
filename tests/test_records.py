"""Records: derived numbers, the verdict and its exit code, and the report as strict JSON."""

import dataclasses
import json
import math
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncli.records import (
    SCHEMA,
    SEVERITIES,
    Array,
    Checkpoint,
    Finding,
    Layer,
    LayerTensor,
    Measurement,
    Origin,
    Report,
    Tensor,
    strict_json,
    structure,
)

LAYER = Layer(
    id="h.0.attn",
    path="h.0.attn",
    kind="self",
    layout="fused-block",
    heads=12,
    kv_heads=12,
    head_dim=64,
    scale=0.125,
    evidence={"heads": "config", "kind": "name"},
    tensors=(LayerTensor("qkv", "h.0.attn.c_attn.weight", (768, 2304), "float16", "model.safetensors"),),
    facts={"orientation": "in, out"},
    stack="h.#.attn",
    index=0,
)
STATE_SPACE = dataclasses.replace(LAYER, kind=None, layout="ssm", heads=None, kv_heads=None, head_dim=None)


def finding(severity="error"):
    return Finding("ATT101", "heads-mismatch", severity, "They do not fit.", "Check them.")


def report(*, layers=(LAYER,), findings=(), **other):
    return Report(
        "inspect", "0.1.0", {"kind": "file"}, {"python": "3.11"}, layers, findings=findings, **other
    )


# --- derived numbers ----------------------------------------------------------------------------------


def test_numbers_of_elements_and_bytes_are_sums_over_parts():
    qweight = Array("q.qweight", (8, 4), "int32", "w.safetensors", 0, 128)
    scales = Array("q.scales", (2, 4), "float16", "w.safetensors", 128, 16)
    tensor = Tensor(
        "q.weight", (4, 64), "int4", "w.safetensors", {"qweight": qweight, "scales": scales}, "gptq"
    )
    scalar = Array("step", (), "int64", "w.safetensors", 144, 8)
    assert (qweight.numel, scalar.numel, Array("e", (0, 3), "float32", "f", 0, 0).numel) == (32, 1, 0)
    assert (tensor.numel, tensor.size_bytes) == (256, 144)
    plain = Tensor("step", (), "int64", "w.safetensors", {"weight": scalar})
    checkpoint = Checkpoint("w", ".", "file", "safetensors", ("w",), 152, (tensor, plain))
    assert checkpoint.parameters == 257


def test_records_cannot_be_changed():
    for record, name in ((LAYER, "heads"), (finding(), "code"), (report(), "command")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)


# --- verdict and exit code ----------------------------------------------------------------------------

ORDER = {"note": 0, "warning": 1, "error": 2, "never": 3}


@pytest.mark.parametrize("looked", [True, False])
@pytest.mark.parametrize("fail_on", [*SEVERITIES, "never"])
@pytest.mark.parametrize("found", [(), *((s,) for s in SEVERITIES), ("note", "warning"), ("error", "note")])
def test_the_exit_code_is_1_from_fail_on_upwards_and_3_where_nothing_was_seen(found, fail_on, looked):
    given_report = report(layers=(LAYER,) if looked else (), findings=tuple(finding(s) for s in found))
    failed = any(ORDER[severity] >= ORDER[fail_on] for severity in found)
    assert given_report.exit_code(fail_on) == (1 if failed else 0 if looked else 3)


def test_the_exit_code_fails_on_errors_unless_told_otherwise():
    assert report(findings=(finding("error"),)).exit_code() == 1
    assert report(findings=(finding("warning"),)).exit_code() == 0


@pytest.mark.parametrize(
    ("layers", "findings", "verdict"),
    [
        ((LAYER,), (), "clean"),
        ((LAYER,), (finding("note"),), "findings"),
        ((), (), "unobserved"),
        ((), (finding("note"),), "findings"),
        ((STATE_SPACE,), (), "unobserved"),
        ((STATE_SPACE, LAYER), (), "clean"),
    ],
)
def test_the_verdict_is_clean_only_where_attention_was_looked_at(layers, findings, verdict):
    assert report(layers=layers, findings=findings).verdict == verdict
    assert report(layers=layers, findings=findings).to_dict()["verdict"] == verdict


def test_layers_without_softmax_are_no_attention_to_look_at():
    assert not report(layers=(STATE_SPACE,)).looked
    assert report(layers=(STATE_SPACE,)).exit_code("never") == 3
    assert report(layers=(STATE_SPACE, LAYER)).exit_code("note") == 0


# --- identity -----------------------------------------------------------------------------------------


def about(message, **other):
    return dataclasses.replace(finding(), message=message, **other).fingerprint


def test_a_finding_is_the_same_one_whatever_it_counts_and_whichever_head_is_the_worst():
    first = about("h.3.attn: head 1: the largest score is 120.5.", layer="h.3.attn", head=1)
    assert first == about("h.3.attn: head 7: the largest score is 99.", layer="h.3.attn", head=7)
    assert about("enc (bmm, model.py:41): 0/0.") == about("enc (bmm, model.py:57): 0/0.")
    assert about("12 tensors: odd.") == about("13 tensors: odd.")


def test_a_finding_is_another_one_at_another_layer_tensor_or_rule():
    first = about("h.3.attn: large.", layer="h.3.attn")
    others = [
        about("h.4.attn: large.", layer="h.4.attn"),
        about("h.3.attn: large.", layer="h.3.attn", code="ATT102"),
        about("h.3.attn.q.weight: large.", layer="h.3.attn"),
        about("h.3.attn: large."),
        about("h.3.attn: large.", layer="h.3.attn", evidence={"key": "heads"}),
    ]
    assert len({first, *others}) == 6


def test_the_structure_is_that_of_shapes_and_not_of_dtypes_files_or_order():
    other = dataclasses.replace(LAYER, path="h.1.attn", id="h.1.attn")
    stored = dataclasses.replace(LAYER.tensors[0], dtype="bfloat16", file="other.bin")
    assert structure((LAYER, other)) == structure((other, dataclasses.replace(LAYER, tensors=(stored,))))
    reshaped = dataclasses.replace(LAYER.tensors[0], shape=(2304, 768))
    changed = [
        dataclasses.replace(LAYER, heads=6),
        dataclasses.replace(LAYER, tensors=(reshaped,)),
        dataclasses.replace(LAYER, path="g.0.attn"),
        dataclasses.replace(LAYER, layout="separate"),
    ]
    assert len({structure((layer,)) for layer in (LAYER, *changed)}) == 5


# --- the schema ---------------------------------------------------------------------------------------


def test_the_keys_of_the_report_are_those_of_the_schema_in_its_order():
    full = report(
        findings=(finding(),), measurements=(Measurement("rms", "w", 1.0),), origins=(origin(),)
    ).to_dict()
    keys = {
        "report": full,
        "layer": full["layers"][0],
        "tensor": full["layers"][0]["tensors"][0],
        "measurement": full["measurements"][0],
        "finding": full["findings"][0],
        "origin": full["origins"][0],
    }
    assert {what: " ".join(row) for what, row in keys.items()} == {
        "report": "schema command attncli_version verdict source structure environment run layers measurements"
        " origins findings known maps changes notes",
        "layer": "id path kind layout heads kv_heads head_dim scale evidence tensors facts",
        "tensor": "role name shape dtype file",
        "measurement": "metric layer call head value unit precision low high",
        "finding": "code name severity layer head message advice evidence fingerprint",
        "origin": "value phase cause confirmed module op source tensor layer at dtype evidence path message advice",
    }
    assert (full["schema"], full["attncli_version"], full["run"]) == (SCHEMA, "0.1.0", None)
    assert SCHEMA == "attncli-report/1"


def test_a_search_for_nan_has_looked_where_operators_ran():
    assert report(layers=(), run={"operators": 3, "operators_by_phase": {"forward": 3}}).looked
    assert not report(layers=(), run={"operators": 0, "operators_by_phase": {}}).looked


def origin() -> Origin:
    return Origin(
        value="nan",
        phase="forward",
        cause="masked-row",
        confirmed=True,
        module="attn",
        op="_softmax",
        source="model.py:3",
        tensor=None,
        layer=None,
        at={"batch": 0},
        dtype="float32",
        evidence={"keys": 6},
        path=({"module": "attn", "op": "_softmax"},),
        message="every score is −inf",
        advice="let it see a key",
    )


def test_the_report_reads_back_as_what_went_in():
    text = report(
        findings=(finding(),),
        measurements=(Measurement("score_bound", "h.0.attn", math.inf, head=3, low=0.5, high=math.inf),),
        run={"calls_seen": 2},
        notes=("größe: 402 optimizer tensors left out",),
    ).to_json()
    back = json.loads(text)
    assert "größe" in text
    assert back["layers"][0]["tensors"][0] == {
        "role": "qkv",
        "name": "h.0.attn.c_attn.weight",
        "shape": [768, 2304],
        "dtype": "float16",
        "file": "model.safetensors",
    }
    assert back["measurements"][0] == {
        "metric": "score_bound",
        "layer": "h.0.attn",
        "value": "inf",
        "unit": "",
        "head": 3,
        "call": None,
        "precision": "exact",
        "low": 0.5,
        "high": "inf",
    }
    assert back["layers"][0]["facts"] == {"orientation": "in, out"}
    assert back["run"] == {"calls_seen": 2, "calls": []}
    assert back["notes"] == ["größe: 402 optimizer tensors left out"]


# --- strict JSON --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, "nan"),
        (-math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (0.1, 0.1),
        (-0.0, -0.0),
        (True, True),
        (None, None),
        (2**70, 2**70),
        ((1, (2.5, math.nan)), [1, [2.5, "nan"]]),
        ([], []),
        (MappingProxyType({"a": (math.inf,)}), {"a": ["inf"]}),
        ({1: "x", None: "y", ("a", 0): "z"}, {"1": "x", "None": "y", "('a', 0)": "z"}),
        ("größe", "größe"),
        ("half \ud800 a pair", "half \\ud800 a pair"),
        ({"key \udfff": "\ud83d"}, {"key \\udfff": "\\ud83d"}),
    ],
)
def test_values_become_what_strict_json_can_say(value, expected):
    assert strict_json(value) == expected
    text = json.dumps(strict_json(value), ensure_ascii=False, allow_nan=False)
    assert json.loads(text.encode("utf-8")) == expected


def test_true_stays_true_and_minus_zero_keeps_its_sign():
    assert strict_json(True) is True
    assert math.copysign(1, strict_json(-0.0)) == -1


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", 1j, object(), [{"deep": {3}}]])
def test_what_has_no_place_in_json_is_refused_by_its_type(value):
    with pytest.raises(TypeError, match=r"(set|bytes|complex|object) has no place in a report"):
        strict_json(value)


names = st.text(st.characters(codec=None), max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | names,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(names, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(anything, names)
def test_any_report_is_utf8_that_a_strict_parser_reads(value, name):
    def refuse(constant):
        raise AssertionError(constant)

    layer = dataclasses.replace(LAYER, path=name, facts={name: value})
    text = report(layers=(layer,), notes=(name,)).to_json()
    back = json.loads(text.encode("utf-8"), parse_constant=refuse)
    assert back["layers"][0]["facts"] == {strict_json(name): strict_json(value)}
    assert json.loads(report(layers=(layer,), notes=(name,)).to_json(indent=None)) == back
