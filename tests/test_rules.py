"""Every rule finds its defect on the far side of its threshold, by name, and nothing on the near side."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from attncli.records import SEVERITIES, Anomaly, Finding, Layer, LayerTensor, Measurement
from attncli.rules import RULES, Observed, judge, overflow_measurements
from attncli.rules.bounds import ROUNDING

BY_CODE = {rule.code: rule for rule in RULES}


class Case(NamedTuple):
    """`expected`: (code, severity, message) of every finding. `healthy`: what must give nothing."""

    what: str
    observed: Observed
    expected: tuple[tuple[str, str, str], ...]
    healthy: Observed


def layer(path: str = "model.layers.0.self_attn", *anomalies: Anomaly, **changes: Any) -> Layer:
    index = next((int(part) for part in path.split(".") if part.isdigit()), None)
    roles = changes.pop("roles", ("q", "k", "v", "o"))
    shape, dtype = changes.pop("shape", (64, 64)), changes.pop("dtype", "float16")
    found = Layer(
        id=path,
        path=path,
        kind="self",
        layout="separate",
        heads=4,
        kv_heads=4,
        head_dim=16,
        scale=0.25,
        evidence={"heads": "config"},
        tensors=tuple(
            LayerTensor(r, f"{path}.{r}_proj.weight", shape, dtype, "w.safetensors") for r in roles
        ),
        anomalies=anomalies,
        stack=path.replace(f".{index}.", ".#."),
        index=index,
    )
    return dataclasses.replace(found, **changes)


def stack(count: int, **odd: Any) -> tuple[Layer, ...]:
    """`count` layers alike but for the last but one, which differs in `odd`."""
    paths = [f"h.{index}.attn" for index in range(count)]
    return tuple(layer(path, **(odd if path == paths[-2] else {})) for path in paths)


def with_layer(*anomalies: Anomaly, **changes: Any) -> Observed:
    return Observed(layers=(layer("model.layers.0.self_attn", *anomalies, **changes),))


def with_anomalies(*anomalies: Anomaly) -> Observed:
    return Observed(layers=(layer(),), anomalies=anomalies)


def measured(*rows: tuple[str, str, float | int | str | None, int | None], **changes: Any) -> Observed:
    return Observed(
        layers=(layer(**changes),),
        measurements=tuple(Measurement(metric, name, value, head=head) for metric, name, value, head in rows),
    )


def bounds(bound: float, typical: float | None = 1.0, dtype: str = "float16") -> Observed:
    path = "model.layers.0.self_attn"
    return measured(
        ("score_bound", path, 1.0, 0),
        ("score_bound", path, bound, 1),
        ("score_typical", path, 0.5, 0),
        ("score_typical", path, typical, 1),
        dtype=dtype,
    )


HEALTHY = with_anomalies()
PATH = "model.layers.0.self_attn"
Q = f"{PATH}.q_proj.weight"
FLOAT16_MAX, BFLOAT16_MAX, FLOAT32_MAX = 65504.0, 255 / 128 * 2.0**127, (2 - 2**-23) * 2.0**127


def above(value: float) -> float:
    return math.nextafter(value, math.inf)


def below(value: float) -> float:
    return math.nextafter(value, 0.0)


# --- cases --------------------------------------------------------------------------------------------

CASES = [
    # ATT001
    Case(
        "one tensor of the index in no shard",
        with_anomalies(Anomaly("missing-tensor", "lm_head.weight", {"file": "b.safetensors"})),
        (("ATT001", "error", "1 tensor of the index is in no shard: lm_head.weight."),),
        HEALTHY,
    ),
    Case(
        "three names are listed whole",
        with_anomalies(*(Anomaly("missing-tensor", name) for name in "abc")),
        (("ATT001", "error", "3 tensors of the index are in no shard: a, b, c."),),
        HEALTHY,
    ),
    Case(
        "of four names the first three",
        with_anomalies(*(Anomaly("missing-tensor", name) for name in "abcd")),
        (("ATT001", "error", "4 tensors of the index are in no shard: a, b, c and 1 more."),),
        HEALTHY,
    ),
    Case(
        "of more names the first three",
        with_anomalies(*(Anomaly("missing-tensor", name) for name in "abcde")),
        (("ATT001", "error", "5 tensors of the index are in no shard: a, b, c and 2 more."),),
        HEALTHY,
    ),
    Case(
        "every way in which an index and its shards disagree",
        with_anomalies(
            Anomaly("wrong-shard", "a", {"index": "1.safetensors", "file": "2.safetensors"}),
            Anomaly("duplicate-tensor", "b", {"files": ["1.safetensors", "2.safetensors"]}),
            Anomaly("stray-tensor", "c", {"file": "1.safetensors"}),
            Anomaly("stray-tensor", "d", {"file": "1.safetensors"}),
            Anomaly("stray-file", "model-9.safetensors", {"shards": 2}),
        ),
        (
            ("ATT001", "error", "1 tensor lies in another shard than the index says: a."),
            ("ATT001", "error", "1 tensor lies in more than one file: b."),
            (
                "ATT001",
                "warning",
                "2 tensors lie in a shard but not in the index, so loaders skip them: c, d.",
            ),
            (
                "ATT001",
                "warning",
                "1 file is named like shards but the index does not know it: model-9.safetensors.",
            ),
        ),
        HEALTHY,
    ),
    Case(
        "a split GGUF whose files contradict their names",
        with_anomalies(
            Anomaly("missing-tensor", "m-1.gguf", {"split.tensors.count": 9, "found": 7}),
            Anomaly("wrong-shard", "m-2.gguf", {"split.count": 3, "expected": 2}),
            Anomaly("wrong-shard", "m-2.gguf", {"split.no": 0, "expected": 1}),
        ),
        (
            ("ATT001", "error", "m-1.gguf: split.tensors.count is 9, but the split holds 7 tensors."),
            ("ATT001", "error", "m-2.gguf: split.count is 3, but its name says 2 files."),
            ("ATT001", "error", "m-2.gguf: split.no is 0, but its name says number 1, counted from 0."),
        ),
        HEALTHY,
    ),
    # ATT002
    Case(
        "a global that can run code",
        with_anomalies(Anomaly("pickle-global", "os.system", {"file": "m.pt", "dangerous": True})),
        (
            (
                "ATT002",
                "error",
                "m.pt: the pickle names os.system, which can run code when the file is loaded. "
                "Nothing was run.",
            ),
        ),
        HEALTHY,
    ),
    Case(
        "a global that is merely unknown",
        with_anomalies(Anomaly("pickle-global", "my.Config", {"file": "m.pt", "dangerous": False})),
        (
            (
                "ATT002",
                "warning",
                "m.pt: the pickle names my.Config, which is no part of a plain state dict. It "
                "was not imported.",
            ),
        ),
        HEALTHY,
    ),
    # ATT003, ATT004, ATT005
    Case(
        "an array of objects",
        with_anomalies(Anomaly("pickle-object", "config", {"file": "w.npz"})),
        (
            (
                "ATT003",
                "warning",
                "config is an array of Python objects, stored as a pickle. It was not read.",
            ),
        ),
        HEALTHY,
    ),
    Case(
        "a config that cannot be read",
        with_anomalies(Anomaly("unreadable-config", "config.json", {"problem": "line 3 ends too early."})),
        (("ATT004", "warning", "config.json: line 3 ends too early."),),
        HEALTHY,
    ),
    Case(
        "storage of unknown form",
        with_anomalies(
            Anomaly("unknown-quantisation", "a.qweight"), Anomaly("unknown-type", "b", {"ggml_type": 99})
        ),
        (
            (
                "ATT005",
                "note",
                "2 tensors are stored in a form attncli does not know, so shape and values were not checked: "
                "a.qweight, b.",
            ),
        ),
        HEALTHY,
    ),
    Case(
        "one tensor of unknown form",
        with_anomalies(Anomaly("unknown-type", "b", {"ggml_type": 99})),
        (
            (
                "ATT005",
                "note",
                "1 tensor is stored in a form attncli does not know, so shape and values were "
                "not checked: b.",
            ),
        ),
        HEALTHY,
    ),
    # ATT006
    Case(
        "headers that say two things at once",
        with_anomalies(
            Anomaly("duplicate-tensor", "a", {"file": "m.pt"}),
            Anomaly("duplicate-tensor", "b", {"files": ["m.gguf", "m.gguf"]}),
            Anomaly("duplicate-tensor", "c", {"with": "c.qweight"}),
            Anomaly("overlapping-tensors", "d", {"with": "e"}),
            Anomaly("overlapping-tensors", "f", {"with": "e"}),
            Anomaly("duplicate-key", "general.name", {"file": "m.gguf"}),
        ),
        (
            ("ATT006", "error", "1 tensor stands twice in m.pt: a."),
            ("ATT006", "error", "1 tensor stands twice in m.gguf: b."),
            ("ATT006", "error", "1 tensor stands both plain and quantised: c."),
            ("ATT006", "error", "2 tensors share bytes with another one: d, f."),
            (
                "ATT006",
                "warning",
                "1 metadata key stands twice in m.gguf, and the first value was used: general.name.",
            ),
        ),
        HEALTHY,
    ),
    # ATT101
    Case(
        "a query projection that the heads do not make up",
        with_layer(
            Anomaly(
                "heads-mismatch",
                "config.json",
                {"key": "num_attention_heads", "claim": "30 heads", "heads": 30, "rows": 4096},
            )
        ),
        (
            (
                "ATT101",
                "error",
                f"{PATH}: the query projection has 4096 rows, which do not fit 30 heads "
                "(num_attention_heads of config.json).",
            ),
        ),
        HEALTHY,
    ),
    Case(
        "a norm that gives another head size than the config",
        with_layer(
            Anomaly(
                "heads-mismatch",
                "config.json",
                {
                    "claim": "4 heads of size 16",
                    "tensor": "q_norm",
                    "hint": "head size",
                    "value": 32,
                    "rows": 64,
                },
            )
        ),
        (
            (
                "ATT101",
                "error",
                f"{PATH}: config.json says 4 heads of size 16, but q_norm gives head size 32.",
            ),
        ),
        HEALTHY,
    ),
    Case(
        "keys with other heads than the config says",
        with_layer(
            Anomaly(
                "kv-mismatch",
                "config.json",
                {"key": "num_key_value_heads", "kv_heads": 2, "found": 4, "rows": 64, "head_dim": 16},
            )
        ),
        (
            (
                "ATT101",
                "error",
                f"{PATH}: the key projection has 64 rows, 4 heads of 16, but config.json says 2 KV heads "
                "(num_key_value_heads).",
            ),
        ),
        HEALTHY,
    ),
    Case(
        "keys whose rows no head size divides",
        with_layer(Anomaly("kv-mismatch", "k", {"rows": 50, "head_dim": 16, "kv_heads": None})),
        (("ATT101", "error", f"{PATH}: the key projection has 50 rows, not divisible by the head size 16."),),
        HEALTHY,
    ),
    # ATT102, ATT105
    Case(
        "KV heads that do not divide the heads",
        with_layer(Anomaly("kv-not-dividing", PATH, {"heads": 32, "kv_heads": 5})),
        (("ATT102", "error", f"{PATH}: 5 KV heads do not divide 32 query heads."),),
        HEALTHY,
    ),
    Case(
        "an option that does not fit",
        with_layer(Anomaly("option-mismatch", "--heads", {"claim": "7 heads", "heads": 7, "rows": 64})),
        (
            (
                "ATT105",
                "warning",
                f"{PATH}: --heads says 7 heads, which does not fit 64 rows; it was not used here.",
            ),
        ),
        HEALTHY,
    ),
    # ATT103
    Case(
        "a layer without keys among whole layers",
        Observed(
            (
                layer("h.0.attn"),
                layer("h.1.attn"),
                layer(
                    "h.2.attn",
                    Anomaly("missing-projection", "h.2.attn", {"missing": ["k", "v"]}),
                    layout="incomplete",
                ),
            )
        ),
        (
            (
                "ATT103",
                "error",
                "h.2.attn: no k and no v projection, although 2 other layers of its stack have one.",
            ),
        ),
        Observed((layer("h.0.attn"), layer("h.1.attn"), layer("h.2.attn"))),
    ),
    Case(
        "a layer without keys beside one whole layer",
        Observed(
            (
                layer("h.0.attn"),
                layer(
                    "h.1.attn",
                    Anomaly("missing-projection", "h.1.attn", {"missing": ["k"]}),
                    layout="incomplete",
                ),
            )
        ),
        (("ATT103", "error", "h.1.attn: no k projection, although 1 other layer of its stack has one."),),
        Observed((layer("h.0.attn"), layer("h.1.attn"))),
    ),
    Case(
        "a layer without keys alone",
        with_layer(Anomaly("missing-projection", PATH, {"missing": ["k"]}), layout="incomplete"),
        (("ATT103", "error", f"{PATH}: no k projection."),),
        HEALTHY,
    ),
    Case(
        "one of four layers without its output projection",
        Observed(stack(4, roles=("q", "k", "v"))),
        (("ATT103", "error", "h.2.attn: no o, although all 3 other layers of its stack have one."),),
        Observed(stack(3, roles=("q", "k", "v"))),
    ),
    Case(
        "one of four layers without its biases",
        Observed(
            (
                *(layer(f"h.{i}.attn", roles=("q", "q_bias", "k", "k_bias", "v", "o")) for i in range(3)),
                layer("h.3.attn"),
            )
        ),
        (
            (
                "ATT103",
                "error",
                "h.3.attn: no q_bias and no k_bias, although all 3 other layers of its stack have one.",
            ),
        ),
        Observed(
            (
                *(layer(f"h.{i}.attn", roles=("q", "q_bias", "k", "k_bias", "v", "o")) for i in range(2)),
                layer("h.2.attn"),
                layer("h.3.attn"),
            )
        ),
    ),
    # ATT104
    Case(
        "one of four layers of another shape",
        Observed(stack(4, shape=(32, 64))),
        (
            (
                "ATT104",
                "warning",
                "h.2.attn: q has shape [32, 64] instead of [64, 64], unlike all 3 other layers of its stack.",
            ),
        ),
        Observed(stack(3, shape=(32, 64))),
    ),
    Case(
        "one of four layers of another dtype",
        Observed(stack(4, dtype="float32")),
        (
            (
                "ATT104",
                "warning",
                "h.2.attn: q has dtype float32 instead of float16, unlike all 3 other layers of its stack.",
            ),
        ),
        Observed((*stack(4, dtype="float32"), layer("h.9.attn", dtype="float32"))),
    ),
    # ATT106
    Case(
        "a bias that is shorter than its weight",
        with_layer(Anomaly("bias-mismatch", f"{Q}_bias", {"role": "q", "bias": 32, "rows": [64, 64]})),
        (("ATT106", "error", f"{Q}_bias: 32 elements do not fit a weight of 64×64."),),
        HEALTHY,
    ),
    Case(
        "values that do not divide into KV heads",
        with_layer(Anomaly("width-mismatch", Q, {"role": "v", "rows": 25, "kv_heads": 2})),
        (("ATT106", "error", f"{Q}: 25 rows do not divide into 2 KV heads."),),
        HEALTHY,
    ),
    Case(
        "an output projection that reads more than the values",
        with_layer(Anomaly("width-mismatch", Q, {"role": "o", "columns": 96, "heads": 4, "expected": 64})),
        (("ATT106", "error", f"{Q}: it reads 96 elements, but 4 heads of values have 64."),),
        HEALTHY,
    ),
    # ATT107
    Case(
        "one layer without attention among its neighbours",
        Observed(tuple(layer(f"h.{index}.attn") for index in (0, 2, 3))),
        (("ATT107", "warning", "h.1.attn: no attention layer, although its neighbours have one."),),
        Observed(tuple(layer(f"h.{index}.attn") for index in (0, 2, 4, 6))),
    ),
    Case(
        "one of two layers says nothing of what stood between them",
        HEALTHY,
        (),
        Observed(tuple(layer(f"h.{index}.attn") for index in (0, 2))),
    ),
    # ATT201
    Case(
        "a NaN",
        measured(("nan_count", Q, 1, None), ("inf_count", Q, 0, None)),
        (("ATT201", "error", f"{Q}: 1 NaN."),),
        measured(("nan_count", Q, 0, None), ("inf_count", Q, 0, None)),
    ),
    Case(
        "NaN and Inf of two heads",
        replace(
            measured(("nan_count", Q, 3, None), ("inf_count", Q, 2, None)),
            anomalies=(
                Anomaly("nonfinite-head", Q, {"head": 3, "heads": (3,), "role": "q"}),
                Anomaly("nonfinite-head", Q, {"head": 1, "heads": (1,), "role": "q"}),
                Anomaly("nonfinite-head", "another tensor", {"head": 0, "heads": (0,), "role": "q"}),
            ),
        ),
        (("ATT201", "error", f"{Q}: 3 NaN and 2 Inf in heads 1, 3."),),
        HEALTHY,
    ),
    Case(
        "an Inf in a weight whose name only begins like a mask",
        measured(
            ("inf_count", "mask_decoder.layers.0.self_attn.q_proj.weight", 1, None),
            ("inf_count", "mask_token", 1, None),
        ),
        (
            ("ATT201", "error", "mask_decoder.layers.0.self_attn.q_proj.weight: 1 Inf."),
            ("ATT201", "error", "mask_token: 1 Inf."),
        ),
        measured(
            *(
                ("inf_count", name, 64, None)
                for name in (
                    "mask",
                    "h.0.attn.bias",
                    "h.0.attn.masked_bias",
                    "visual.attn_mask",
                    "decoder.mask",
                    "h.1.causal_mask",
                )
            )
        ),
    ),
    Case(
        "a NaN in a mask",
        measured(("nan_count", "decoder.mask", 1, None), ("inf_count", "decoder.mask", 6, None)),
        (("ATT201", "error", "decoder.mask: 1 NaN and 6 Inf."),),
        measured(("nan_count", "decoder.mask", 0, None), ("inf_count", "decoder.mask", 6, None)),
    ),
    # ATT202
    Case(
        "a projection of zeros",
        with_anomalies(Anomaly("zero-projection", Q, {"layer": PATH, "role": "q"})),
        (("ATT202", "warning", f"{Q}: the whole q projection is zero."),),
        HEALTHY,
    ),
    Case(
        "heads of zeros, by role",
        with_anomalies(
            Anomaly("zero-head", "qkv", {"role": "qkv (q rows)", "head": 1, "heads": (1,)}),
            Anomaly("zero-head", "qkv", {"role": "qkv (q rows)", "head": 0, "heads": (0,)}),
            Anomaly("zero-head", "qkv", {"role": "qkv (k rows)", "head": 2, "heads": (2,)}),
        ),
        (
            ("ATT202", "warning", "qkv: all qkv (q rows) weights of heads 0, 1 are zero."),
            ("ATT202", "warning", "qkv: all qkv (k rows) weights of head 2 are zero."),
        ),
        HEALTHY,
    ),
    Case(
        "a KV head of zeros that two query heads share",
        with_anomalies(Anomaly("zero-head", "k", {"role": "k", "head": 2, "heads": (2, 3)})),
        (("ATT202", "warning", "k: all k weights of heads 2, 3 are zero."),),
        HEALTHY,
    ),
    Case(
        "eight heads of zeros",
        with_anomalies(*(Anomaly("zero-head", "q", {"role": "q", "head": h}) for h in range(8))),
        (("ATT202", "warning", "q: all q weights of heads 0, 1, 2, 3, 4, 5, 6, 7 are zero."),),
        HEALTHY,
    ),
    Case(
        "many heads of zeros",
        with_anomalies(*(Anomaly("zero-head", "q", {"role": "q", "head": h}) for h in range(9))),
        (("ATT202", "warning", "q: all q weights of heads 0, 1, 2, 3, 4, 5, 6, 7, … are zero."),),
        HEALTHY,
    ),
    # ATT301
    Case(
        "a bound at the largest float16",
        bounds(FLOAT16_MAX),
        (
            (
                "ATT301",
                "note",
                f"{PATH}: q·k may reach 6.55e+04 for the worst input, beyond 65504, the largest float16; "
                "typically it is 1.",
            ),
        ),
        bounds(below(FLOAT16_MAX)),
    ),
    Case(
        "a bound beyond bfloat16",
        bounds(BFLOAT16_MAX, dtype="bfloat16"),
        (
            (
                "ATT301",
                "note",
                f"{PATH}: q·k may reach 3.39e+38 for the worst input, beyond 3.3895e+38, the "
                "largest bfloat16; "
                "typically it is 1.",
            ),
        ),
        bounds(below(BFLOAT16_MAX), dtype="bfloat16"),
    ),
    Case(
        "a bound beyond float32",
        bounds(FLOAT32_MAX, dtype="float32"),
        (
            (
                "ATT301",
                "note",
                f"{PATH}: q·k may reach 3.4e+38 for the worst input, beyond 3.4028e+38, the largest float32; "
                "typically it is 1.",
            ),
        ),
        bounds(below(FLOAT32_MAX), dtype="float32"),
    ),
    Case(
        "typical scores beyond float16",
        bounds(1e6, above(FLOAT16_MAX)),
        (
            (
                "ATT301",
                "warning",
                f"{PATH}: q·k is 6.55e+04 for typical inputs, beyond 65504, the largest float16.",
            ),
        ),
        bounds(1e4, 9e3),
    ),
    Case(
        "typical scores beyond float16 in a float32 checkpoint",
        bounds(1e6, above(FLOAT16_MAX), dtype="float32"),
        (
            (
                "ATT301",
                "note",
                f"{PATH}: q·k is 6.55e+04 for typical inputs, beyond 65504, the largest float16.",
            ),
        ),
        bounds(1e6, FLOAT16_MAX, dtype="float32"),
    ),
    Case(
        "typical scores beyond the dtype of the checkpoint are a warning in any dtype",
        bounds(1e39, above(BFLOAT16_MAX), dtype="bfloat16"),
        (
            (
                "ATT301",
                "warning",
                f"{PATH}: q·k is 3.39e+38 for typical inputs, beyond 3.3895e+38, the largest bfloat16.",
            ),
        ),
        bounds(1e4, 9e3, dtype="bfloat16"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_the_defect_is_found_by_name_and_its_healthy_twin_gives_nothing(case: Case) -> None:
    found = judge(case.observed)
    assert {(f.code, f.severity, f.message) for f in found} == set(case.expected)
    assert len(found) == len(case.expected)
    assert judge(case.healthy) == ()
    for finding in found:
        rule = BY_CODE[finding.code]
        assert finding.name == rule.name
        assert finding.advice
        assert finding.layer in {None, *(known.id for known in case.observed.layers)}


def test_the_cases_cover_every_rule_about_checkpoints() -> None:
    about_checkpoints = {code for code in BY_CODE if code < "ATT4"}
    assert {code for case in CASES for code, _, _ in case.expected} == about_checkpoints


# --- what is no finding -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(stack(4, roles=("q", "o"), layout="kv-shared"), id="keys shared by design"),
        pytest.param(
            (
                *(layer(f"h.{i}.attn", roles=("q", "k", "v")) for i in range(2)),
                layer("h.2.attn"),
                layer("h.3.attn"),
            ),
            id="two of four layers without an output projection",
        ),
        pytest.param(stack(4, roles=("q", "k", "v"), kind=None), id="a layer without softmax"),
        pytest.param(stack(4, roles=("qkv", "o")), id="a fused layer, whose shapes cannot be compared"),
        pytest.param(
            stack(4, shape=(32, 64), facts={"per_layer_heads": True}),
            id="heads that the config lists per layer",
        ),
        pytest.param(stack(4, dtype="int4"), id="one quantised layer"),
        pytest.param(
            tuple(layer(f"h.{i}.attn", dtype="float16" if i == 1 else "q4_k") for i in range(4)),
            id="one layer that was left unquantised",
        ),
        pytest.param(
            tuple(layer(f"h.{i}.attn", dtype="q6_k" if i == 1 else "q4_k") for i in range(4)),
            id="one layer of finer quantisation",
        ),
        pytest.param(
            tuple(
                layer(
                    f"h.{i}.attn",
                    facts={"layer_type": "full" if i == 1 else "sliding"},
                    shape=(64, 64 if i == 1 else 32),
                )
                for i in range(5)
            ),
            id="another type of layer by config",
        ),
        pytest.param(
            (*(layer(f"encoder.{i}.attn") for i in range(3)), layer("decoder.0.attn", shape=(8, 8))),
            id="another stack",
        ),
        pytest.param(
            tuple(layer(f"stage{'x' * i}.attn", shape=(8 * i + 8, 8)) for i in range(4)), id="no numbers"
        ),
    ],
)
def test_layers_that_differ_by_design_are_no_finding(layers: tuple[Layer, ...]) -> None:
    assert judge(Observed(layers)) == ()


def test_a_layer_that_lacks_a_projection_is_not_called_odd_as_well() -> None:
    lost = Anomaly("missing-projection", "h.2.attn", {"missing": ["k", "v"]})
    for left in (("q", "o"), ("q",)):
        layers = list(stack(4))
        layers[2] = layer("h.2.attn", lost, roles=left, layout="incomplete")
        assert [finding.code for finding in judge(Observed(tuple(layers)))] == ["ATT103"]


def test_the_dtype_of_scores_is_that_of_the_query_projection() -> None:
    tensors = tuple(
        LayerTensor(role, f"{PATH}.{role}.weight", (64, 64), dtype, "w.safetensors")
        for role, dtype in (("q_norm", "float32"), ("qkv", "float16"), ("o", "bfloat16"))
    )
    (finding,) = judge(replace(bounds(1e5), layers=(layer(PATH, tensors=tensors),)))
    assert finding.evidence["dtype"] == "float16"
    assert judge(replace(bounds(1e5), layers=(layer(PATH, tensors=tensors[:1]),))) == ()


def test_a_bound_without_a_typical_value_says_nothing_of_it() -> None:
    (finding,) = judge(measured(("score_bound", PATH, 1e5, 0), ("score_typical", PATH, None, 0)))
    assert finding.message == (
        f"{PATH}: q·k may reach 1e+05 for the worst input, beyond 65504, the largest float16."
    )
    assert finding.evidence["score_typical"] is None


def test_a_bound_that_does_not_exist_is_no_finding() -> None:
    assert judge(bounds(math.inf)) == ()
    assert judge(bounds(1.0, None)) == ()
    assert judge(bounds(1e6, dtype="float8_e4m3fn")) == ()


def test_an_anomaly_that_no_rule_knows_is_no_finding() -> None:
    assert judge(with_anomalies(Anomaly("unread-values", "w", {"reason": "compressed"}))) == ()


# --- findings as records ------------------------------------------------------------------------------


def test_findings_say_which_layer_and_head_and_carry_their_numbers() -> None:
    observed = replace(
        measured(("nan_count", Q, 3, None)),
        anomalies=(Anomaly("nonfinite-head", Q, {"head": 3, "heads": (3,), "role": "q"}),),
    )
    (finding,) = judge(observed)
    assert (finding.layer, finding.head) == (PATH, 3)
    assert finding.evidence == {"nan_count": 3, "heads": [3]}

    (finding,) = judge(with_anomalies(Anomaly("zero-head", Q, {"role": "q", "head": 2, "heads": (2, 3)})))
    assert (finding.layer, finding.head, finding.evidence) == (PATH, None, {"heads": [2, 3], "role": "q"})
    (finding,) = judge(with_anomalies(Anomaly("zero-head", Q, {"role": "q", "head": 2})))
    assert finding.head == 2

    (finding,) = judge(measured(("nan_count", Q, 3, None)))
    assert (finding.head, finding.evidence) == (None, {"nan_count": 3})

    (finding,) = judge(bounds(1e5, 2.0))
    assert (finding.layer, finding.head) == (PATH, None)
    assert finding.evidence == {
        "score_bound": 1e5,
        "score_typical": 2.0,
        "dtype": "float16",
        "maximum": FLOAT16_MAX,
    }

    (finding,) = judge(with_anomalies(*(Anomaly("missing-tensor", str(n), {"file": "a"}) for n in range(60))))
    assert finding.evidence["count"] == 60
    assert finding.evidence["names"] == [str(n) for n in range(50)]
    assert finding.layer is None


def test_a_finding_outside_all_layers_has_no_layer() -> None:
    (finding,) = judge(measured(("nan_count", "embed.weight", 1, None)))
    assert finding.layer is None


def test_code_in_a_pickle_gets_its_own_advice() -> None:
    (finding,) = judge(with_anomalies(Anomaly("pickle-global", "os.system", {"dangerous": True})))
    assert finding.advice == ("Do not load this file with torch.load or pickle. Find out where it came from.")
    (finding,) = judge(with_anomalies(Anomaly("pickle-global", "my.Config", {"dangerous": False})))
    assert finding.advice == BY_CODE["ATT002"].remedy


def test_the_gravest_findings_come_first_and_equals_in_the_order_of_the_rules() -> None:
    everything = Observed(
        layers=tuple(known for case in CASES for known in case.observed.layers if known.anomalies),
        measurements=tuple(row for case in CASES for row in case.observed.measurements),
        anomalies=tuple(anomaly for case in CASES for anomaly in case.observed.anomalies),
    )
    found = judge(everything)
    place = {rule.code: number for number, rule in enumerate(RULES)}
    keys = [(-SEVERITIES.index(finding.severity), place[finding.code]) for finding in found]
    assert keys == sorted(keys)
    assert {finding.severity for finding in found} == set(SEVERITIES)


# --- overflow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "float16", "bfloat16", "float32"),
    [
        (0.0, True, True, True),
        (below(FLOAT16_MAX / ROUNDING), True, True, True),
        (above(FLOAT16_MAX / ROUNDING), False, True, True),
        (below(BFLOAT16_MAX / ROUNDING), False, True, True),
        (above(BFLOAT16_MAX / ROUNDING), False, False, True),
        (below(FLOAT32_MAX / ROUNDING), False, False, True),
        (above(FLOAT32_MAX / ROUNDING), False, False, False),
        (math.inf, False, False, False),
        (math.nan, False, False, False),
    ],
)
def test_a_layer_is_proven_safe_only_where_its_largest_bound_is_below_the_maximum(
    bound: float, float16: bool, bfloat16: bool, float32: bool
) -> None:
    for order in ((0.5, bound), (bound, 0.5)):
        rows = [Measurement("score_bound", "h", value, head=head) for head, value in enumerate(order)]
        verdicts = {row.metric: row.value for row in overflow_measurements(rows)}
        assert verdicts == {
            f"overflow_{dtype}": "proven safe" if safe else "not excluded"
            for dtype, safe in (("float16", float16), ("bfloat16", bfloat16), ("float32", float32))
        }


def test_a_layer_without_a_bound_is_not_called_safe() -> None:
    rows = [Measurement("score_bound", "h", None, head=0), Measurement("score_typical", "h", 1.0, head=0)]
    assert overflow_measurements(rows) == ()


# --- the rules as a table -----------------------------------------------------------------------------


def test_codes_and_names_are_unique_and_of_one_form() -> None:
    codes = [rule.code for rule in RULES]
    names = [rule.name for rule in RULES]
    assert len(set(codes)) == len(codes)
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert len(rule.code) == 6
        assert rule.code.startswith("ATT")
        assert rule.code[3:].isdigit()
        assert rule.name == rule.name.lower()
        assert " " not in rule.name
        # --select takes prefixes of codes and whole names: neither may be read as the other.
        assert not rule.name.upper().startswith("ATT")


@pytest.mark.parametrize("rule", RULES, ids=[rule.code for rule in RULES])
def test_every_rule_has_its_whole_text(rule) -> None:
    assert rule.severity in SEVERITIES
    assert rule.provenance in ("published", "derived", "heuristic")
    for text in (rule.what, rule.why, rule.example, rule.remedy):
        assert text.endswith(".")
        assert text[0].isupper() or not text[0].isalpha() or "." in text.split()[0] or "_" in text.split()[0]
    for text in (rule.formula, rule.threshold, rule.source):
        assert text.strip()
    for text in (rule.what, rule.why, rule.example, rule.remedy, rule.formula, rule.threshold, rule.source):
        assert "  " not in text
        assert "\n" not in text


def test_a_rule_fills_in_its_own_severity_and_remedy() -> None:
    rule = BY_CODE["ATT104"]
    assert rule.finding("It differs.") == Finding(
        "ATT104", "unlike-siblings", "warning", "It differs.", rule.remedy
    )
    special = rule.finding(
        "It differs.", layer="h", head=0, severity="note", advice="Look.", evidence={"n": 1}
    )
    assert special == Finding("ATT104", "unlike-siblings", "note", "It differs.", "Look.", "h", 0, {"n": 1})
