"""--expect: how it is read, and what of it is not met, by hand-made layers and calls."""

import dataclasses
from typing import Any

import pytest
from rule_cases import ran

from attncli.api.expectations import expectations
from attncli.errors import UsageError
from attncli.layout import LAYOUTS
from attncli.records import Expectation, Finding, Layer, LayerTensor, structure
from attncli.rules import EXPECTABLE, Observed, judge

Q = LayerTensor("q", "layers.0.attn.q_proj.weight", (512, 512), "bfloat16", "model.safetensors")
LAYER = Layer(
    id="layers.0.attn",
    path="layers.0.attn",
    kind="self",
    layout="separate",
    heads=8,
    kv_heads=2,
    head_dim=64,
    scale=0.125,
    evidence={},
    tensors=(Q,),
)
CROSS = dataclasses.replace(LAYER, id="decoder.0.cross", path="decoder.0.cross", kind="cross", heads=4)
STATE_SPACE = dataclasses.replace(
    LAYER, id="layers.1.ssm", path="layers.1.ssm", kind=None, heads=None, layout="ssm"
)
CALL = dataclasses.replace(ran().call, layer=LAYER.id, mask_kind="causal + padding", window=None)


def unmet(text: str, *, layers: Any = (LAYER, CROSS, STATE_SPACE), calls: Any = (CALL,)) -> list[Finding]:
    found = judge(Observed(layers, calls=calls, expected=expectations([text])))
    return [finding for finding in found if finding.code == "ATT801"]


# --- reading ------------------------------------------------------------------------------------------


def test_a_text_is_read_into_one_expectation_per_key() -> None:
    assert expectations(["heads=32, kv-heads=8,head_dim=128,layout=separate", "layers=24"]) == (
        Expectation("", "heads", 32),
        Expectation("", "kv_heads", 8),
        Expectation("", "head_dim", 128),
        Expectation("", "layout", "separate"),
        Expectation("", "layers", 24),
    )


def test_a_glob_in_front_holds_for_the_rest_of_its_text_alone() -> None:
    assert expectations(["decoder.*: kind=cross,scale=0.125", "dtype=float16"]) == (
        Expectation("decoder.*", "kind", "cross"),
        Expectation("decoder.*", "scale", 0.125),
        Expectation("", "dtype", "float16"),
    )


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("", "'' names nothing to expect.", "Write --expect"),
        ("decoder.*:", "'decoder.*:' names nothing to expect.", "Write --expect"),
        ("heads", "'heads' is no key=value.", "Write --expect"),
        ("heads=", "'heads=' is no key=value.", "Write --expect"),
        ("heds=3", "nothing is called 'heds'.", "Did you mean 'heads'? Known: layers, heads"),
        ("xyzzy=3", "nothing is called 'xyzzy'.", "Known: layers, heads"),
        ("layout=seperate", "no layout is called 'seperate'.", "Did you mean 'separate'? Known: separate"),
        ("kind=selfish", "no kind is called 'selfish'.", "Did you mean 'self'? Known: self, cross."),
        ("heads=four", "heads is a whole number, which 'four' is not.", "Write --expect"),
        ("heads=4.5", "heads is a whole number, which '4.5' is not.", "Write --expect"),
        ("scale=big", "scale is a number, which 'big' is not.", "Write --expect"),
    ],
)
def test_what_cannot_be_expected_is_an_error_with_a_suggestion(text: str, problem: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        expectations([text])
    assert (caught.value.subject, caught.value.problem) == ("--expect", problem)
    assert caught.value.remedy.startswith(remedy)


# --- what is met --------------------------------------------------------------------------------------

MET = {
    "layers": "2",
    "heads": "8",
    "kv_heads": "2",
    "head_dim": "64",
    "layout": "separate",
    "kind": "self",
    "scale": "0.125",
    "dtype": "bfloat16",
    "mask": "causal",
    "window": "4096",
    "structure": structure([LAYER]),
}
OTHER = {**dict.fromkeys(MET, "7"), "layout": "mla", "kind": "cross", "dtype": "float16", "mask": "none"}


@pytest.mark.parametrize("key", EXPECTABLE)
def test_each_key_is_met_by_its_value_and_not_by_another(key: str) -> None:
    calls = (dataclasses.replace(CALL, window=4096),)
    layers = (LAYER, STATE_SPACE) if key != "layers" else (LAYER, CROSS, STATE_SPACE)
    assert unmet(f"{key}={MET[key]}", layers=layers, calls=calls) == []
    (finding,) = unmet(f"{key}={OTHER[key]}", layers=layers, calls=calls)
    assert (finding.severity, finding.evidence["key"]) == ("error", key)
    assert f": {key}: expected {OTHER[key]}, found " in finding.message


def test_each_layer_that_differs_is_told_with_what_it_has() -> None:
    assert [(f.layer, f.message) for f in unmet("heads=8")] == [
        ("decoder.0.cross", "decoder.0.cross: heads: expected 8, found 4.")
    ]
    assert len(unmet("heads=16")) == 2
    assert unmet("decoder.*:heads=4") == []
    assert unmet("layers.*:heads=8,layers=1") == []


def test_layers_without_softmax_have_no_heads_to_expect() -> None:
    assert unmet("heads=8", layers=(LAYER, STATE_SPACE)) == []


def test_what_is_not_known_is_not_met() -> None:
    unknown = dataclasses.replace(LAYER, heads=None)
    assert (
        unmet("heads=8", layers=(unknown,))[0].message
        == "layers.0.attn: heads: expected 8, found nothing that is known."
    )
    assert unmet("mask=causal", layers=(LAYER,), calls=())[0].message.endswith("found nothing that is known.")


def test_a_glob_that_no_layer_has_is_not_met() -> None:
    (finding,) = unmet("encoder.*:heads=8")
    assert finding.message == ("layers encoder.*: heads: expected 8, found no such attention layer.")


def test_a_mask_is_any_part_of_what_was_seen_in_all_calls() -> None:
    bare = dataclasses.replace(CALL, index=1, mask_kind="causal")
    assert unmet("mask=causal", layers=(LAYER,), calls=(CALL, bare)) == []
    (finding,) = unmet("mask=padding", layers=(LAYER,), calls=(CALL, bare))
    assert finding.message == "layers.0.attn: mask: expected padding, found causal."


def test_no_window_can_be_expected_where_something_ran() -> None:
    assert unmet("window=none", layers=(LAYER,)) == []
    (finding,) = unmet("window=none", layers=(LAYER,), calls=(dataclasses.replace(CALL, window=64),))
    assert finding.message == "layers.0.attn: window: expected none, found 64."
    assert len(unmet("window=none", layers=(LAYER,), calls=())) == 1


def test_a_number_in_front_means_the_layers_of_that_number() -> None:
    first, second = (
        dataclasses.replace(LAYER, id=f"h.{i}", path=f"h.{i}", index=i, heads=8 * (i + 1)) for i in (0, 1)
    )
    assert unmet("0:heads=8", layers=(first, second)) == []
    assert unmet("1:heads=16", layers=(first, second)) == []
    assert len(unmet("1:heads=8", layers=(first, second))) == 1


def test_a_scale_is_compared_to_three_digits() -> None:
    scaled = dataclasses.replace(LAYER, scale=96**-0.5)
    assert unmet("scale=0.10206", layers=(scaled,)) == []
    assert len(unmet("scale=0.103", layers=(scaled,))) == 1


def test_every_layout_can_be_expected() -> None:
    assert len(expectations([f"layout={name}" for name in LAYOUTS])) == len(LAYOUTS)
