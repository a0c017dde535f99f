"""`attncli.diff`: which layers belong together, what counts as changed, which findings are new, what is worse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compared import RUN, checkpoint, finding, layer, measured, stack
from rule_cases import above, below
from tiny_checkpoints import floats, llama_folder, llama_shapes, write_safetensors

import attncli
from attncli.api import read_report
from attncli.errors import CheckpointError, UsageError
from attncli.records import Change, Finding, Layer, LayerTensor, Measurement, Origin, Report
from attncli.rules import RULES, Compared, Observed, judge, judge_changes


def rows(report: Report, kind: str) -> list[tuple[Any, ...]]:
    """The changes of one kind: layer, head, what, before, after."""
    return [(c.layer, c.head, c.what, c.before, c.after) for c in report.changes if c.kind == kind]


def codes(report: Report) -> list[tuple[str, str]]:
    return [(found.code, found.severity) for found in report.findings]


# --- nothing changed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "report",
    [
        checkpoint(),
        measured(),
        measured({"entropy": math.nan, "score_max": math.inf}),
        checkpoint(findings=(finding("layers.0.attn: large.", "layers.0.attn"),)),
        checkpoint(layer(facts={"order": "q, k", "window": (1, 2)}), layer("\ud800.1.attn")),
    ],
)
def test_a_report_does_not_differ_from_itself(report: Report) -> None:
    found = attncli.diff(report, report)
    assert (found.changes, found.findings, found.exit_code("note")) == ((), (), 0)
    assert [known.message for known in found.known] == [known.message for known in report.findings]
    assert (found.command, found.layers, found.verdict) == ("diff", found.layers, "clean")


def test_a_checkpoint_does_not_differ_from_its_own_report(tmp_path: Path) -> None:
    model = llama_folder(tmp_path / "m", layers=2)
    file = tmp_path / "report.json"
    file.write_text(attncli.inspect(model).to_json(), encoding="utf-8")
    for a, b in ((model, file), (file, model), (file, file), (model, model)):
        found = attncli.diff(a, b)
        assert (found.changes, found.findings, found.notes) == ((), (), ())


def test_the_report_says_what_was_compared(tmp_path: Path) -> None:
    a, b = llama_folder(tmp_path / "a", layers=2), llama_folder(tmp_path / "b", layers=3)
    found = attncli.diff(a, b)
    assert found.source["path"] == str(b)
    assert found.source["compared_with"]["path"] == str(a)
    assert found.source["compared_with"]["command"] == "inspect"
    assert [one.path for one in found.layers] == [one.path for one in attncli.inspect(b).layers]
    assert json.loads(found.to_json())["changes"]
    assert str(found).splitlines()[0].startswith(f"A  {a}")


# --- layers -------------------------------------------------------------------------------------------


def test_layers_are_added_and_removed_by_path() -> None:
    first, second = checkpoint(*stack(3)), checkpoint(*stack(2), layer("cross.0.attn", kind="cross"))
    found = attncli.diff(first, second)
    assert [(row[0], row[3]["heads"]) for row in rows(found, "removed")] == [("layers.2.attn", 4)]
    assert [(row[0], row[4]["kind"]) for row in rows(found, "added")] == [("cross.0.attn", "cross")]
    assert rows(found, "structure") == []
    assert codes(found) == [("ATT901", "warning"), ("ATT901", "warning")]


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        (
            "layers",
            "model.layers",
            "* was compared with model.* (3 layers): the same names behind another prefix",
        ),
        (
            "model.layers",
            "layers",
            "model.* was compared with * (3 layers): the same names behind another prefix",
        ),
        (
            "model.layers",
            "model.text.layers",
            "model.* was compared with model.text.* (3 layers): the same names behind another prefix",
        ),
        (
            "model.layers",
            "transformer.h",
            "model.layers.#.attn was compared with transformer.h.#.attn (3 layers): the same numbers under "
            "another name",
        ),
    ],
)
def test_layers_under_another_name_are_joined_and_the_note_says_so(
    before: str, after: str, note: str
) -> None:
    first = checkpoint(*stack(3, before))
    second = checkpoint(*stack(3, after, shape=(32, 64)))
    found = attncli.diff(first, second)
    assert found.notes == (note,)
    assert rows(found, "added") == rows(found, "removed") == []
    assert {row[0] for row in rows(found, "structure")} == {f"{after}.{index}.attn" for index in range(3)}
    (structure,) = rows(found, "source")
    assert structure[2] == "structure"


def test_two_stacks_behind_two_prefixes_are_joined_each() -> None:
    first = checkpoint(*stack(2, "encoder.layers"), *stack(3, "decoder.layers"))
    second = checkpoint(*stack(2, "net.encoder.layers"), *stack(3, "net.decoder.layers"))
    found = attncli.diff(first, second)
    assert rows(found, "added") == rows(found, "removed") == []
    assert found.notes == ("* was compared with net.* (5 layers): the same names behind another prefix",)


def test_a_renamed_stack_of_other_length_is_not_taken_for_the_old_one() -> None:
    found = attncli.diff(checkpoint(*stack(2, "model.layers")), checkpoint(*stack(3, "transformer.h")))
    assert (len(rows(found, "removed")), len(rows(found, "added"))) == (2, 3)


def test_attention_of_a_function_is_the_same_where_its_line_moved() -> None:
    first = measured(
        {"entropy": 2.0}, layers=[layer("model.py:41", tensors=()), layer("model.py:60", tensors=())]
    )
    second = measured(
        {"entropy": 1.9}, layers=[layer("model.py:44", tensors=()), layer("model.py:63", tensors=())]
    )
    found = attncli.diff(first, second)
    assert {(row[0], row[2]) for row in rows(found, "metric")} == {
        ("model.py:44", "entropy"),
        ("model.py:63", "entropy"),
    }
    assert rows(found, "added") == []


# --- structure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected", "code"),
    [
        ({}, {"heads": 8}, [("heads", 4, 8)], "ATT901"),
        ({}, {"kv_heads": 2}, [("KV heads", 4, 2)], "ATT901"),
        ({}, {"head_dim": 32}, [("head size", 16, 32)], "ATT901"),
        ({}, {"layout": "fused-block"}, [("layout", "separate", "fused-block")], "ATT901"),
        ({}, {"kind": None}, [("kind", "self", None)], "ATT901"),
        ({}, {"scale": 0.5}, [("scale", 0.25, 0.5)], "ATT902"),
        ({"facts": {"window": 64}}, {"facts": {}}, [("window", 64, None)], "ATT902"),
        ({}, {"facts": {"soft_cap": 30.0}}, [("soft cap", None, 30.0)], "ATT902"),
        ({}, {"facts": {"rope_order": "interleaved"}}, [("rope order", None, "interleaved")], None),
        (
            {},
            {"dtype": "int4"},
            [(f"{role} dtype", "float32", "int4") for role in "qkvo"],
            None,
        ),
        (
            {},
            {"shape": (64, 32)},
            [(f"{role} shape", [64, 64], [64, 32]) for role in "qkvo"],
            "ATT901",
        ),
    ],
)
def test_a_fact_that_differs_is_a_change(
    before: dict[str, Any], after: dict[str, Any], expected: list[Any], code: str | None
) -> None:
    found = attncli.diff(checkpoint(layer(**before)), checkpoint(layer(**after)))
    assert [row[2:] for row in rows(found, "structure")] == expected
    assert {found_code for found_code, _ in codes(found)} == ({code} if code else set())


def test_a_tensor_that_one_of_the_two_lacks_has_no_shape_there() -> None:
    biased = LayerTensor("q_bias", "layers.0.attn.q_proj.bias", (64,), "float32", "m.safetensors")
    plain = layer()
    found = attncli.diff(checkpoint(plain), checkpoint(replace(plain, tensors=(*plain.tensors, biased))))
    assert [row[2:] for row in rows(found, "structure")] == [("q_bias shape", None, [64])]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"heads": None, "kv_heads": None}, {}),
        ({"layout": "fused-unknown"}, {"layout": "fused-block"}),
        ({"layout": "functional", "tensors": ()}, {}),
        ({"scale": 0.5, "evidence": {"scale": "assumed"}}, {}),
        ({"scale": None}, {}),
        ({"evidence": {"heads": "shape"}}, {"facts": {"window": 64, "layer_type": "sliding"}}),
        ({"scale": 0.25}, {"scale": 0.2500001}),
        ({}, {"facts": {"module": "m.layers.0.attn"}}),
    ],
)
def test_what_one_of_the_two_does_not_know_is_no_change(before: Any, after: Any) -> None:
    for a, b in ((before, after), (after, before)):
        found = attncli.diff(checkpoint(layer(**a)), checkpoint(layer(**b)))
        assert rows(found, "structure") == []


def test_a_count_that_only_one_knows_is_a_note() -> None:
    found = attncli.diff(checkpoint(layer(heads=None)), checkpoint(layer()))
    assert found.notes == ("heads of 1 layer are known in only one of the two",)


def test_a_run_may_have_cast_the_weights() -> None:
    loaded = layer(dtype="bfloat16")
    loaded = replace(loaded, tensors=tuple(replace(tensor, file="") for tensor in loaded.tensors))
    assert rows(attncli.diff(checkpoint(layer()), checkpoint(loaded)), "structure") == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"mask_kind": "none", "causal_offset": None},
            [("mask", "causal", "none"), ("causal offset", 0, None)],
        ),
        ({"scale": 0.5}, [("scale of the run", 0.125, 0.5)]),
        ({"scale": 0.125 + 1e-9}, []),
        ({"soft_cap": 30.0}, [("soft cap of the run", None, 30.0)]),
        ({"kernel": "flash (CPU)"}, [("kernel", "softmax", "flash (CPU)")]),
    ],
)
def test_how_a_layer_was_called_is_compared(changed: dict[str, Any], expected: list[Any]) -> None:
    one = [layer()]
    found = attncli.diff(measured(layers=one), measured(layers=one, call=changed))
    assert [row[2:] for row in rows(found, "structure")] == expected
    named = {"kernel"} >= {row[0] for row in expected}
    assert codes(found) == ([] if named else [("ATT902", "warning")] * len(expected))


def test_facts_of_the_files_are_compared_between_files_only() -> None:
    other = {**checkpoint().source, "format": "GGUF", "parameters": 190, "bytes": 1, "path": "n.gguf"}
    found = attncli.diff(checkpoint(), checkpoint(source=other))
    assert rows(found, "source") == [
        (None, None, "format", "safetensors", "GGUF"),
        (None, None, "parameters", 200, 190),
    ]
    assert (
        rows(attncli.diff(checkpoint(), measured(source={"kind": "code", "parameters": 3})), "source") == []
    )


# --- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "before", "after", "changed"),
    [
        ("entropy", 2.0, 2.0 * (1 + 1.1e-4), True),
        ("entropy", 2.0, 2.0 * (1 + 0.9e-4), False),
        ("entropy", 0.0, 0.9e-4, False),
        ("entropy", 0.0, 1.1e-4, True),
        ("entropy", 1.0, math.nan, True),
        ("entropy", math.nan, math.nan, False),
        ("entropy", None, 1.0, True),
        ("entropy", None, None, False),
        ("score_max", -math.inf, -math.inf, False),
        ("score_max", 3.0, math.inf, True),
        ("rows", 64, 65, True),
        ("entropy_ratio", 0.5, 0.4, True),
        ("headroom_bits_float16", 6.0, 4.0, True),
    ],
)
def test_a_number_changes_beyond_rounding_only(metric: str, before: Any, after: Any, changed: bool) -> None:
    one = [layer()]
    found = attncli.diff(measured({metric: before}, layers=one), measured({metric: after}, layers=one))
    assert (len(rows(found, "metric")) == 4) is changed
    if changed:
        path, head, what, old, new = rows(found, "metric")[1]
        assert (path, head, what, old) == ("layers.0.attn", 1, metric, before)
        assert new == after or math.isnan(new)


def values(name: str, **metrics: Any) -> tuple[Measurement, ...]:
    return tuple(Measurement(metric, name, value) for metric, value in metrics.items())


@pytest.mark.parametrize(
    ("metric", "before", "after", "changed"),
    [
        ("rms", 1e-6, 1.00005e-6, False),
        ("rms", 1e-6, 1.0002e-6, True),
        ("absmax", 3.0, 3.1, True),
        ("nan_count", 0, 1, True),
        ("nan_count", 1_000_000, 1_000_001, True),
        ("zero_fraction", 0.0, 1e-6, True),
    ],
)
def test_a_tensors_numbers_have_no_floor(metric: str, before: Any, after: Any, changed: bool) -> None:
    name = "layers.0.attn.q_proj.weight"
    first = checkpoint(layer(), measurements=values(name, **{metric: before}))
    second = checkpoint(layer(), measurements=values(name, **{metric: after}))
    expected = [(name, None, metric, before, after)] if changed else []
    assert rows(attncli.diff(first, second), "metric") == expected


def test_numbers_known_between_limits_have_changed_only_where_the_limits_part() -> None:
    def report(low: float, high: float) -> Report:
        row = Measurement(
            "score_max", "layers.0.attn", high, head=0, call=0, precision="bracket", low=low, high=high
        )
        return measured(layers=[layer()], measurements=(row,))

    assert rows(attncli.diff(report(1.0, 2.0), report(1.5, 3.0)), "metric") == []
    assert rows(attncli.diff(report(1.0, 2.0), report(2.5, 3.0)), "metric") == [
        ("layers.0.attn", 0, "score_max", 2.0, 3.0)
    ]


def test_calls_of_one_layer_are_compared_in_their_order() -> None:
    def report(*entropies: float) -> Report:
        shown = [layer()] * len(entropies)
        return measured([{"entropy": entropy} for entropy in entropies], layers=shown)

    found = attncli.diff(report(1.0, 2.0), report(1.0, 3.0))
    assert [row[1:] for row in rows(found, "metric")] == [
        (head, "entropy, call 2", 2.0, 3.0) for head in range(4)
    ]
    found = attncli.diff(report(1.0), report(1.0, 3.0))
    assert [row[2:] for row in rows(found, "structure")] == [("calls", 1, 2)]
    assert rows(found, "metric") == []


def test_heads_are_not_compared_one_by_one_where_there_are_more_of_them() -> None:
    first = measured({"entropy": 1.0}, layers=[layer()])
    second = measured({"entropy": 2.0}, layers=[layer(heads=8)])
    found = attncli.diff(first, second)
    assert rows(found, "metric") == []
    assert found.notes == ("heads of 1 layer were not compared one by one: there are more or fewer of them",)


def test_which_key_is_the_sink_matters_only_where_there_is_one() -> None:
    one = [layer()]

    def report(mass: float, key: int) -> Report:
        return measured({"sink_mass": mass, "sink_key": key}, layers=one)

    assert rows(attncli.diff(report(0.3, 0), report(0.3, 5)), "metric") == []
    assert len(rows(attncli.diff(report(0.6, 0), report(0.6, 5)), "metric")) == 4


def test_tensors_of_a_renamed_layer_are_joined_by_their_role() -> None:
    first = checkpoint(layer("layers.0.attn"), measurements=values("layers.0.attn.q_proj.weight", rms=1.0))
    second = checkpoint(layer("h.0.mixer"), measurements=values("h.0.mixer.q_proj.weight", rms=2.0))
    assert rows(attncli.diff(first, second), "metric") == [("h.0.mixer.q_proj.weight", None, "rms", 1.0, 2.0)]


@pytest.mark.parametrize(("before", "after"), [("", "net."), ("net.", "")])
def test_tensors_of_no_layer_are_joined_behind_the_same_prefix(before: str, after: str) -> None:
    def report(prefix: str, rms: float) -> Report:
        rows = values(f"{prefix}embed.weight", rms=rms, nan_count=0)
        return checkpoint(*stack(2, f"{prefix}layers"), measurements=rows)

    found = attncli.diff(report(before, 1.0), report(after, 2.0))
    assert rows(found, "metric") == [(f"{after}embed.weight", None, "rms", 1.0, 2.0)]
    assert len(found.notes) == 1


def test_tensors_and_numbers_that_only_one_has_are_told() -> None:
    first = checkpoint(measurements=(*values("embed", nan_count=0), *values("a", nan_count=0)))
    second = checkpoint(
        measurements=(*values("embed", nan_count=0), *values("b", nan_count=0, score_bound=1.0))
    )
    assert attncli.diff(first, second).notes == (
        "1 tensor only in the first: a",
        "1 tensor only in the second: b",
        "only the second has numbers of: bounds of scores (--bounds)",
    )
    assert attncli.diff(checkpoint(), measured()).notes == ("only the second has numbers of: forward pass",)


# --- findings -----------------------------------------------------------------------------------------

LARGE = finding("layers.0.attn: head 1: the largest score is 120.", "layers.0.attn")


def test_findings_are_new_known_and_gone_by_their_fingerprint() -> None:
    same = finding("layers.0.attn: head 3: the largest score is 140.", "layers.0.attn")
    other = finding("layers.1.attn: head 0: the largest score is 200.", "layers.1.attn")
    found = attncli.diff(measured(findings=(LARGE,)), measured(findings=(same, other)))
    assert ([f.message for f in found.findings], [f.message for f in found.known]) == (
        [other.message],
        [same.message],
    )
    assert rows(found, "finding") == [("layers.1.attn", None, "ATT501", None, other.message)]
    back = attncli.diff(measured(findings=(same, other)), measured(findings=(LARGE,)))
    assert rows(back, "finding") == [("layers.1.attn", None, "ATT501", other.message, None)]
    assert (back.findings, back.exit_code("note")) == ((), 0)


def test_a_finding_that_became_graver_is_worse() -> None:
    graver = finding("layers.0.attn: head 1: the largest score is 12000.", "layers.0.attn", severity="error")
    found = attncli.diff(measured(findings=(LARGE,)), measured(findings=(graver,)))
    assert codes(found) == [("ATT501", "error")]
    assert rows(found, "finding") == [("layers.0.attn", None, "ATT501", LARGE.message, graver.message)]
    assert found.exit_code() == 1
    back = attncli.diff(measured(findings=(graver,)), measured(findings=(LARGE,)))
    assert (back.findings, [known.severity for known in back.known]) == ((), ["warning"])


def test_findings_that_a_baseline_knew_are_known_in_both() -> None:
    found = attncli.diff(measured(known=(LARGE,)), measured(findings=(LARGE,)))
    assert (found.findings, len(found.known)) == ((), 1)
    found = attncli.diff(measured(findings=(LARGE,)), measured(known=(LARGE,)))
    assert (rows(found, "finding"), len(found.known)) == ([], 1)


def test_a_finding_of_a_renamed_layer_is_the_same_one() -> None:
    moved = finding("h.0.mixer: head 1: the largest score is 120.", "h.0.mixer")
    found = attncli.diff(
        measured(layers=[layer("layers.0.attn")], findings=(LARGE,)),
        measured(layers=[layer("h.0.mixer")], findings=(moved,)),
    )
    assert (found.findings, len(found.known), rows(found, "finding")) == ((), 1, [])


def born(phase: Any) -> Origin:
    return Origin(
        "nan",
        phase,
        "overflow",
        None,
        "m",
        "bmm",
        None,
        None,
        None,
        None,
        "float32",
        {"seen": 1},
        (),
        "too large",
        "-",
    )


def nan_search(*phases: str, found: str = "") -> Report:
    message = finding("m (bmm): too large.", None, "ATT701", "error")
    return replace(
        checkpoint(),
        command="nan-check",
        source={"kind": "code", "path": "m"},
        run={**RUN, "operators": 3, "operators_by_phase": dict.fromkeys(phases, 1)},
        findings=(message,) if found else (),
        origins=(born(found),) if found else (),
    )


@pytest.mark.parametrize(
    ("teller", "other", "codes_told"),
    [
        (measured(findings=(LARGE,)), checkpoint(), "ATT501"),
        (
            checkpoint(findings=(finding("x: 3 NaN.", None, "ATT201", nan_count=3),)),
            checkpoint(),
            "ATT201",
        ),
        (
            checkpoint(findings=(finding("x: heads.", None, "ATT301"),)),
            checkpoint(measurements=values("x", nan_count=0)),
            "ATT301",
        ),
        (
            checkpoint(findings=(finding("x: pickled.", None, "ATT002"),)),
            measured(),
            "ATT002",
        ),
        (
            checkpoint(findings=(finding("m: unlike.", None, "ATT801"),), command="check"),
            checkpoint(),
            "ATT801",
        ),
        (nan_search("forward", "backward", found="backward"), nan_search("forward"), "ATT701"),
        (
            measured(findings=(LARGE,)),
            measured(call={"explained": False}),
            "ATT501",
        ),
    ],
)
def test_a_finding_of_a_rule_that_did_not_run_in_the_other_is_neither_new_nor_gone(
    teller: Report, other: Report, codes_told: str
) -> None:
    forth = attncli.diff(teller, other)
    assert rows(forth, "finding") == []
    assert f"rules that ran for the first alone say nothing about the second: {codes_told}" in forth.notes
    back = attncli.diff(other, teller)
    assert (rows(back, "finding"), back.known) == ([], ())
    assert codes_told not in {code for code, _ in codes(back)}
    assert f"rules that ran for the second alone say nothing about the first: {codes_told}" in back.notes


def counted(*findings: Finding) -> Report:
    return checkpoint(
        findings=findings, measurements=values("x", nan_count=0, score_bound=1.0, score_typical=1.0)
    )


@pytest.mark.parametrize(
    ("teller", "other"),
    [
        (measured(findings=(LARGE,)), measured()),
        (counted(finding("x: 3 NaN.", None, "ATT201", nan_count=3)), counted()),
        (counted(finding("x: heads.", None, "ATT301")), counted()),
        (counted(finding("x: pickled.", None, "ATT002")), counted()),
        (counted(finding("x: unlike.", None, "ATT104")), measured()),
        (
            measured(findings=(finding("x: pickled.", None, "ATT002"),), command="check"),
            measured(command="check"),
        ),
        (nan_search("forward", "backward", found="forward"), nan_search("forward")),
        (nan_search("forward", "backward", found="backward"), nan_search("forward", "backward")),
    ],
)
def test_a_finding_of_a_rule_that_ran_in_both_is_new_or_gone(teller: Report, other: Report) -> None:
    code = teller.findings[0].code
    assert [row[2] for row in rows(attncli.diff(teller, other), "finding")] == [code]
    assert [found.code for found in attncli.diff(other, teller).findings] == [code]


def test_two_searches_for_nan_in_a_model_without_attention_looked_at_something() -> None:
    bare = replace(nan_search("forward"), layers=())
    assert attncli.diff(bare, bare).exit_code() == 0
    assert attncli.diff(checkpoint(layers=()), checkpoint(layers=())).exit_code() == 3


# --- batches ------------------------------------------------------------------------------------------


def test_on_different_batches_the_numbers_are_told_and_not_judged() -> None:
    other = {"batch": "synthetic", "inputs": {"input_ids": {"shape": [2, 8], "dtype": "int64"}}}
    first, second = {"entropy": 2.0, "score_max": 5.0}, {"entropy": 0.5, "score_max": 50.0}
    fair = attncli.diff(measured(first), measured(second))
    assert {code for code, _ in codes(fair)} == {"ATT903", "ATT904"}
    unfair = attncli.diff(measured(first), measured(second, run=other))
    assert (codes(unfair), len(rows(unfair, "metric"))) == ([], 16)
    assert unfair.notes == (
        "the two ran on different batches (text: input_ids 1×32, synthetic: input_ids 2×8): entropies and scores "
        "may differ for that alone, and no rule judges how they changed",
    )


def test_runs_in_different_dtypes_are_told_apart() -> None:
    half = {**measured().environment, "dtype": "bfloat16", "device": "cuda:0"}
    assert attncli.diff(measured(), measured(environment=half)).notes == (
        "the two did not run alike: dtype float32 and bfloat16, device cpu and cuda:0",
    )


# --- chosen layers ------------------------------------------------------------------------------------


def test_layer_chooses_layers_by_their_path_in_either_report() -> None:
    first, second = checkpoint(*stack(3, heads=8)), checkpoint(*stack(2))
    assert [row[0] for row in rows(attncli.diff(first, second, layers=["2"]), "removed")] == ["layers.2.attn"]
    one = attncli.diff(first, second, layers=["layers.1.*", "nothing"])
    assert [row[0] for row in rows(one, "structure")] == ["layers.1.attn"]
    assert one.notes == ("no layer matches --layer nothing",)
    assert [found.path for found in one.layers] == ["layers.1.attn"]
    with pytest.raises(UsageError, match=r"no layer matches --layer x\. Paths look like layers\.0\.attn\."):
        attncli.diff(first, second, layers=["x"])


def test_numbers_and_findings_of_other_layers_are_left_out() -> None:
    other = finding("layers.1.attn: head 1: large.", "layers.1.attn")
    found = attncli.diff(
        measured({"entropy": 1.0}),
        measured({"entropy": 0.9}, findings=(LARGE, other)),
        layers=["0"],
    )
    assert {row[0] for row in rows(found, "metric")} == {"layers.0.attn"}
    assert [worse.layer for worse in found.findings] == ["layers.0.attn"]


# --- checkpoints --------------------------------------------------------------------------------------


def test_values_and_bounds_of_two_checkpoints_are_compared(tmp_path: Path) -> None:
    shapes = llama_shapes(1)
    name = "model.layers.0.self_attn.q_proj.weight"

    def model(folder: str, **planted: float) -> Path:
        made = llama_folder(tmp_path / folder, layers=1)
        data = {key: floats(rows * columns) for key, (rows, columns) in shapes.items()}
        data[name] = floats(64 * 64, **planted)
        write_safetensors(made / "model.safetensors", shapes, values=data)
        return made

    a, b = model("a"), model("b", _3=math.nan, _5=4.0)
    assert attncli.diff(a, b).changes == ()
    found = attncli.diff(a, b, values=True)
    assert {(row[0], row[2], row[3], row[4]) for row in rows(found, "metric")} >= {
        (name, "nan_count", 0, 1),
        (name, "absmax", 0.5, 4.0),
    }
    assert codes(found) == [("ATT201", "error")]
    assert found.exit_code() == 1
    assert attncli.diff(b, a, values=True).exit_code("note") == 0


def test_heads_that_nothing_tells_can_be_given(tmp_path: Path) -> None:
    shapes = llama_shapes(1)
    a, b = (write_safetensors(tmp_path / f"{name}.safetensors", shapes) for name in "ab")
    assert attncli.diff(a, b).layers[0].heads is None
    assert attncli.diff(a, b, heads=4).layers[0].heads == 4


# --- what cannot be compared --------------------------------------------------------------------------


def written(folder: Path, text: str | bytes, name: str = "r.json") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "the file is empty."),
        (b" \n", "the file is empty."),
        (
            b'{"schema": "attncli-report/1", "comm',
            "the JSON ends in the middle, at line 1: the file was cut short.",
        ),
        (b'{"schema"', "the JSON ends in the middle, at line 1: the file was cut short."),
        (b'{"a": 1,}', "this is not valid JSON (line 1, column "),
        (b'{"a": 1} x', "this is not valid JSON (line 1, column 10: Extra data)."),
        (b"[1, 2]", "this is JSON, but no report of attncli."),
        (b'{"version": "2.1.0", "runs": []}', "this cannot be compared: it is no report of attncli."),
        (
            b'{"schema": "attncli-report/2"}',
            "this cannot be compared: its schema is attncli-report/2, not attncli-report/1.",
        ),
        (b'{"schema": "attncli-report/1"}', "this cannot be compared: the report lacks the key 'command'."),
        (b'{"a": ' + b"1" * 400 + b"}", "this cannot be compared: it holds a number of 400 digits."),
        (b'{"a": "\xff\xfe"}', "this is no text in UTF-8, so no JSON."),
        (b'{"a":' * 200_000, "this is JSON nested too deep to be a report."),
    ],
)
def test_a_file_that_is_no_report_is_refused_in_three_parts(
    text: bytes, problem: str, tmp_path: Path
) -> None:
    file = written(tmp_path, text)
    for a, b in ((file, checkpoint()), (checkpoint(), file)):
        with pytest.raises(UsageError) as caught:
            attncli.diff(a, b)
        assert caught.value.subject == str(file)
        assert caught.value.problem.startswith(problem)
        assert caught.value.problem.endswith(".")
        assert "--format json" in caught.value.remedy


def test_a_report_of_a_comparison_is_not_compared_again(tmp_path: Path) -> None:
    report = attncli.diff(checkpoint(), checkpoint())
    file = written(tmp_path, report.to_json())
    for side in (report, file):
        with pytest.raises(UsageError, match="this report tells what changed, not what is"):
            attncli.diff(side, checkpoint())


def test_options_about_weights_need_a_checkpoint() -> None:
    with pytest.raises(UsageError, match="--values: it is about checkpoints, and both sides are reports"):
        attncli.diff(checkpoint(), checkpoint(), values=True)
    with pytest.raises(UsageError, match="--kv-heads: "):
        attncli.diff(checkpoint(), checkpoint(), kv_heads=2)


def test_what_is_neither_there_nor_a_checkpoint_is_told_as_by_inspect(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        attncli.diff(tmp_path / "a.json", checkpoint())
    with pytest.raises(CheckpointError, match="no known checkpoint format"):
        attncli.diff(written(tmp_path, b"\x07\x08" * 9, "m.bin"), checkpoint())


def utf8(text: str) -> bytes:
    return b"\xef\xbb\xbf" + text.encode()


@pytest.mark.parametrize("encoded", [str.encode, utf8, lambda text: text.encode("utf-16")])
@pytest.mark.parametrize("name", ["report.json", "report"])
def test_a_report_is_known_by_its_bytes_in_any_encoding_that_shells_write(
    encoded: Callable[[str], bytes], name: str, tmp_path: Path
) -> None:
    file = written(tmp_path, encoded(checkpoint().to_json()), name)
    assert attncli.diff(file, checkpoint()).changes == ()
    assert read_report(file).to_dict() == checkpoint().to_dict()


def test_a_checkpoint_whose_first_byte_is_a_brace_is_no_report(tmp_path: Path) -> None:
    shapes = {f"w{index}": (1,) for index in range(200)} | llama_shapes(1)
    file = write_safetensors(tmp_path / "m", shapes)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padding = (0x7B - length) % 256
    header = data[8 : 8 + length] + b" " * padding
    file.write_bytes((length + padding).to_bytes(8, "little") + header + data[8 + length :])
    assert file.read_bytes()[:1] == b"{"
    assert len(attncli.diff(file, file).layers) == 1


def test_a_huge_difference_is_told_in_strict_json() -> None:
    found = attncli.diff(measured({"entropy": 1.0}), measured({"entropy": math.nan, "score_max": math.inf}))
    text = json.loads(found.to_json())
    assert {row["after"] for row in text["changes"] if row["kind"] == "metric"} == {"nan", "inf"}


# --- rules about changes ------------------------------------------------------------------------------


def compared(*changes: Change, **other: Any) -> Compared:
    return Compared(layers=other.pop("layers", stack(2)), changes=changes, **other)


def metric(what: str, before: Any, after: Any, head: int | None = 0, path: str = "layers.0.attn") -> Change:
    return Change("metric", path, head, what, before, after)


def fact(what: str, before: Any, after: Any, path: str = "layers.0.attn") -> Change:
    return Change("structure", path, None, what, before, after)


CASES = [
    (
        "ATT901",
        "warning",
        [Change("removed", f"layers.{index}.attn", None, "layer", {}, None) for index in range(3)],
        "3 attention layers are gone: layers.0.attn and 2 more.",
    ),
    (
        "ATT901",
        "warning",
        [Change("added", "layers.2.attn", None, "layer", None, {})],
        "1 attention layer is new: layers.2.attn.",
    ),
    (
        "ATT901",
        "warning",
        [fact("KV heads", 4, 2), fact("KV heads", 4, 2, "layers.1.attn")],
        "KV heads changed in 2 layers: 4 → 2 in layers.0.attn and 1 more.",
    ),
    (
        "ATT901",
        "warning",
        [fact("q shape", [64, 64], None), fact("k shape", [64, 64], [32, 64])],
        "tensor shapes changed in 1 layer: q 64×64 → none in layers.0.attn.",
    ),
    (
        "ATT902",
        "warning",
        [fact("mask", "causal", "none")],
        "mask changed in 1 layer: causal → none in layers.0.attn.",
    ),
    (
        "ATT902",
        "warning",
        [fact("scale of the run, call 2", 0.125, 1.0), fact("scale of the run", 0.125, 1.0)],
        "scale of the run changed in 1 layer: 0.125 → 1 in layers.0.attn.",
    ),
    (
        "ATT903",
        "warning",
        [metric("entropy", 1.0, 0.5), metric("entropy", 2.0, 0.25, 3)],
        "layers.0.attn: head 3: the mean entropy fell from 2 to 0.25 nats (2 of 4 heads).",
    ),
    (
        "ATT904",
        "warning",
        [metric("score_max", 6.0, 24.0, 2), metric("dot_absmax", 30.0, 3000.0)],
        "layers.0.attn: head 2: the largest score grew from 6 to 24, 2 bits of headroom less.",
    ),
    (
        "ATT904",
        "warning",
        [metric("dot_absmax", 300.0, 2400.0)],
        "layers.0.attn: head 0: the largest |q·k| grew from 300 to 2 400, 3 bits of headroom less.",
    ),
    (
        "ATT904",
        "note",
        [metric("score_bound", 300.0, 1200.0)],
        "layers.0.attn: head 0: the bound of |q·k| grew from 300 to 1 200, 2 bits of headroom less.",
    ),
    (
        "ATT905",
        "note",
        [metric("rms", 0.02, 0.08, None, "layers.1.attn.q_proj.weight")],
        "layers.1.attn.q_proj.weight: the root mean square of its weights grew from 0.02 to 0.08.",
    ),
    (
        "ATT906",
        "error",
        [metric("entropy", 1.5, math.nan), metric("score_max", 4.0, math.nan, 1)],
        "layers.0.attn: head 0: the mean entropy was 1.5 and is NaN now.",
    ),
    (
        "ATT906",
        "error",
        [metric("score_min", -3.0, -math.inf, 2)],
        "layers.0.attn: head 2: the smallest score was -3 and is −Inf now.",
    ),
]


@pytest.mark.parametrize(("code", "severity", "changes", "message"), CASES)
def test_a_change_for_the_worse_is_found_by_name(
    code: str, severity: str, changes: list[Change], message: str
) -> None:
    (found,) = judge_changes(compared(*changes))
    assert (found.code, found.severity, found.message) == (code, severity, message)
    assert found.evidence
    assert found.advice == next(rule.remedy for rule in RULES if rule.code == code)


@pytest.mark.parametrize(
    "change",
    [
        fact("q dtype", "float32", "bfloat16"),
        fact("kernel", "softmax", "flash (CPU)"),
        fact("calls", 1, 2),
        fact("rope order", None, "interleaved"),
        metric("entropy", 1.0, above(0.5)),
        metric("entropy", 0.4, 0.0),
        metric("entropy", below(1.0), below(1.0) - below(0.5)),
        metric("entropy", 0.5, 2.0),
        metric("entropy, call 2", 2.0, 1.5),
        metric("score_max", 6.0, below(24.0)),
        metric("score_max", 1.0, 20.0),
        metric("score_max", -1.0, 30.0),
        metric("score_max", 40.0, 5.0),
        metric("dot_absmax", 100.0, 65504 / 64),
        metric("score_bound", 300.0, math.inf),
        metric("rms", 0.02, below(0.08), None, "layers.1.attn.q_proj.weight"),
        metric("rms", 0.0, 1.0, None, "layers.1.attn.q_proj.weight"),
        metric("rms", 0.02, 1.0, None, "mlp.weight"),
        metric("entropy", math.nan, math.inf),
        metric("entropy", 1.5, None),
        metric("headroom_bits_float16", 3.0, -math.inf),
    ],
)
def test_a_change_that_is_none_for_the_worse_gives_nothing(change: Change) -> None:
    assert judge_changes(compared(change)) == ()


def test_grown_biases_and_gains_are_no_finding() -> None:
    biased = replace(layer(), tensors=(LayerTensor("q_bias", "b", (64,), "float32", "m"),))
    assert judge_changes(compared(metric("rms", 1e-4, 1e-2, None, "b"), layers=(biased,))) == ()


def test_where_the_batches_differ_a_run_is_not_judged_and_weights_are() -> None:
    changes = [metric("entropy", 2.0, 0.1), metric("score_max", 5.0, 50.0), metric("score_bound", 1e3, 1e4)]
    assert [found.evidence["metric"] for found in judge_changes(compared(*changes, fair=False))] == [
        "score_bound"
    ]


def test_a_layer_that_another_finding_calls_not_finite_is_not_told_twice() -> None:
    lost = metric("entropy", 1.5, math.nan)
    assert judge_changes(compared(lost, told=frozenset({"layers.0.attn"}))) == ()
    broken = finding("layers.0.attn: scores are NaN.", "layers.0.attn", "ATT506", "error")
    report = measured([{"entropy": math.nan, "score_max": math.nan}], findings=(broken,))
    assert codes(attncli.diff(measured(), report)) == [("ATT506", "error")]


def test_the_gravest_come_first_and_a_single_report_has_no_changes_to_judge() -> None:
    found = judge_changes(compared(*(change for case in CASES for change in case[2])))
    assert [one.severity for one in found] == sorted(
        (one.severity for one in found), key=["error", "warning", "note"].index
    )
    assert {one.code for one in found} == {f"ATT90{number}" for number in range(1, 7)}
    assert judge(Observed(layers=stack(2))) == ()


def test_a_layer_shows_its_stack_in_either_order() -> None:
    layers: tuple[Layer, ...] = stack(3)
    found = attncli.diff(checkpoint(*layers), checkpoint(*reversed(layers)))
    assert (found.changes, [one.index for one in found.layers]) == ((), [2, 1, 0])
