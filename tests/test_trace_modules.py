"""Attention of torch's own modules, of programs, and of libraries: found and measured as it runs."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name
from torch import Tensor, nn
from traced import assert_measured, entropies, largest_dots, numbers, only

import attncli
from attncli.api import Report

WIDTH, HEADS, B, T, S = 16, 4, 2, 6, 9


def seeded(module: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return module()


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- nn.MultiheadAttention ------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_multihead_attention_is_one_call_with_the_weights_it_returns(
    need_weights: bool, batch_first: bool, train: bool
) -> None:
    model = seeded(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)).train(train)
    x, y = randn(B, T, WIDTH), randn(B, S, WIDTH, seed=4)
    given = (x, y, y) if batch_first else tuple(z.transpose(0, 1) for z in (x, y, y))
    with torch.no_grad():
        probs = model(*given, average_attn_weights=False)[1]
    report = attncli.measure(model, *given, need_weights=need_weights)
    call = only(report)
    assert_measured(report, probs.log())
    assert (call.kind, call.scale, call.kv_heads) == ("cross", 0.5, HEADS)
    assert call.kernel == ("softmax" if need_weights else "flash (CPU)")
    assert call.factors == ({"query": 0.5} if need_weights else {"kernel": 0.5})
    assert call.parameters == {"q": "in_proj_weight", "k": "in_proj_weight", "v": "in_proj_weight"}
    assert any("fast path" in note for note in report.to_dict()["run"]["notes"])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("floats", [True, False])
def test_multihead_attention_reads_causal_and_padding_masks(need_weights: bool, floats: bool) -> None:
    model = seeded(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).eval()
    x = randn(B, T, WIDTH)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    mask = torch.zeros(T, T).masked_fill(hidden, -math.inf) if floats else hidden
    with torch.no_grad():
        probs = model(x, x, x, attn_mask=mask, average_attn_weights=False)[1]
    report = attncli.measure(model, x, x, x, attn_mask=mask, need_weights=need_weights)
    assert_measured(report, probs.log())
    assert (only(report).mask_kind, only(report).causal_offset, only(report).kind) == ("causal", 0, "self")
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, 4:] = True
    report = attncli.measure(model, x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert only(report).mask_kind == "padding"
    assert numbers(report, "rows_padded") == [2.0] * HEADS


@pytest.mark.parametrize("need_weights", [True, False])
def test_keys_that_multihead_attention_adds_are_keys(need_weights: bool) -> None:
    model = seeded(
        lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    ).eval()
    x = randn(B, T, WIDTH)
    with torch.no_grad():
        probs = model(x, x, x, average_attn_weights=False)[1]
    report = attncli.measure(model, x, x, x, need_weights=need_weights)
    assert only(report).keys == T + 2
    assert_measured(report, probs.log())


# --- nn.Transformer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_every_attention_of_nn_transformer_is_seen(train: bool) -> None:
    model = seeded(lambda: nn.Transformer(WIDTH, HEADS, 2, 2, 32, batch_first=True)).train(train)
    x, y = randn(B, S, WIDTH), randn(B, T, WIDTH, seed=4)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    report = attncli.measure(model, x, y, tgt_mask=mask, tgt_is_causal=True)
    assert [call.kind for call in report.calls] == ["self", "self", "self", "cross", "self", "cross"]
    assert [(call.queries, call.keys) for call in report.calls] == [(S, S)] * 2 + [(T, T), (T, S)] * 2
    assert [call.mask_kind for call in report.calls[2:]] == ["causal", "none"] * 2
    assert all(
        call.explained and call.heads == HEADS and call.scale == pytest.approx(0.5) for call in report.calls
    )
    assert all((call.dropout > 0) == train for call in report.calls)
    assert report.calls[3].module == "decoder.layers.0.multihead_attn"
    assert report.findings == ()


def test_an_encoder_with_its_fast_path_and_padding_is_measured() -> None:
    layer = seeded(lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True))
    model = nn.TransformerEncoder(layer, 3).eval()
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 3:] = True
    report = attncli.measure(model, randn(B, T, WIDTH), src_key_padding_mask=padding)
    assert len(report.calls) == 3
    assert all(call.explained for call in report.calls)
    assert {call.mask_kind for call in report.calls} == {"padding"}


# --- programs -------------------------------------------------------------------------------------------


class Small(nn.Module):
    """One self-attention, explicit or fused."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q = self.q(x).view(b, t, 4, 4).transpose(1, 2)
        k = self.k(x).view(b, t, 4, 4).transpose(1, 2)
        v = self.v(x).view(b, t, 4, 4).transpose(1, 2)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / 2.0, dim=-1), v)
        return out.transpose(1, 2).reshape(b, t, w)

    def scores(self, x: Tensor) -> Tensor:
        q, k = (part(x).unflatten(-1, (4, 4)).transpose(1, 2).detach() for part in (self.q, self.k))
        return q @ k.mT / 2


def traced(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return torch.jit.trace(model, x)


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,)).module()


def exported_and_saved(model: nn.Module, x: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


PROGRAMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "traced": traced,
    "scripted": lambda model, x: torch.jit.script(model),
    "exported": exported,
    "exported and saved": exported_and_saved,
    "compiled": lambda model, x: torch.compile(model),
    "compiled forward": lambda model, x: torch.compile(lambda x: model(x)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.*TorchScript", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("form", PROGRAMS)
def test_a_program_is_measured_like_the_module_it_was_made_of(form: str, fused: bool) -> None:
    model = seeded(lambda: Small(fused)).eval()
    x = randn(B, T, WIDTH)
    report = attncli.measure(PROGRAMS[form](model, x), x)
    assert_measured(report, model.scores(x))
    call = only(report)
    assert (call.kind, call.scale, call.mask_kind) == ("self", 0.5, "none")
    q, k = (part(x).unflatten(-1, (4, 4)).transpose(1, 2).detach() for part in (model.q, model.k))
    assert numbers(report, "dot_absmax") == pytest.approx(largest_dots(q, k), rel=1e-5)


def test_a_compiled_module_says_that_it_ran_uncompiled() -> None:
    report = attncli.measure(torch.compile(seeded(Small)), randn(B, T, WIDTH))
    assert "compiled code ran uncompiled while tracing" in report.to_dict()["run"]["notes"]
    assert report.layers[0].path == ""


def test_an_exported_program_runs_from_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from attncli.cli import app

    path = tmp_path / "model.pt2"
    x = randn(B, T, WIDTH)
    torch.export.save(torch.export.export(seeded(lambda: Small(True)).eval(), (x,)), path)
    torch.save((x,), tmp_path / "batch.pt")
    result = CliRunner().invoke(app, ["entropy", str(path), "--input", str(tmp_path / "batch.pt")])
    assert result.exit_code == 0, result.output
    assert "1" in result.output


# --- what may surround a model ----------------------------------------------------------------------------


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 2).softmax(-1) @ v


def test_vmap_inside_a_model_is_no_obstacle() -> None:
    q, k, v = (randn(B, HEADS, T, 4, seed=seed) for seed in (1, 2, 3))
    report = attncli.measure(lambda q, k, v: torch.vmap(torch.vmap(explicit))(q, k, v), q, k, v)
    assert len(report.calls) == 1
    call = report.calls[0]
    assert call.batch * call.heads * call.queries == B * HEADS * T
    mean = sum(entropies(q @ k.mT / 2)) / HEADS
    got = numbers(report, "entropy")
    assert sum(got) / len(got) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_no_obstacle(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = seeded(Small)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                out: Tensor = checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)
                out.sum().backward()
            return out

    x = randn(B, T, WIDTH)
    report = attncli.measure(Checkpointed(), x)
    assert_measured(report, model.scores(x.detach()))
    for parameter in model.parameters():
        parameter.grad = None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("fused", [True, False])
def test_grad_modes_change_nothing(mode: Callable[[], Any], fused: bool) -> None:
    model = seeded(lambda: Small(fused))
    x = randn(B, T, WIDTH)
    with mode():
        outside = attncli.measure(model, x)
    assert_measured(outside, model.scores(x))

    def inside(x: Tensor) -> Tensor:
        with mode():
            out: Tensor = model(x)
        return out

    assert_measured(attncli.measure(inside, x), model.scores(x))


@pytest.mark.parametrize("fused", [True, False])
def test_autocast_tells_the_dtype_that_the_scores_really_had(fused: bool) -> None:
    model = seeded(lambda: Small(fused))
    x = randn(B, T, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call = only(attncli.measure(model, x))
    assert (call.dtype, call.scores_dtype) == ("bfloat16", "float32" if fused else "bfloat16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_half_precision_agrees_with_a_float64_reference(dtype: torch.dtype, fused: bool) -> None:
    q, k, v = (3 * randn(B, HEADS, 64, 16, seed=seed).to(dtype) for seed in (1, 2, 3))
    attend = F.scaled_dot_product_attention if fused else lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v
    report = attncli.measure(attend, q, k, v)
    # Explicit scores are rounded to the dtype by the model itself: the reference takes the same ones.
    scores = q.double() @ k.double().mT * 0.25 if fused else (q @ k.mT * 0.25)
    assert_measured(report, scores, tolerance=1e-3)
    assert numbers(report, "dot_absmax") == pytest.approx(largest_dots(q, k), rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_dynamically_quantised_linear_is_a_projection() -> None:
    model = seeded(Small).eval()
    try:
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    except RuntimeError:
        pytest.skip("no quantised engine here")
    call = only(attncli.measure(quantised, randn(B, T, WIDTH)))
    assert (call.heads, call.queries, call.kind) == (HEADS, T, "self")


class Wrapped(Tensor):
    """A tensor subclass with nothing of its own."""


def test_tensor_subclasses_pass() -> None:
    q, k, v = (randn(B, HEADS, T, 4, seed=seed).as_subclass(Wrapped) for seed in (1, 2, 3))
    for attend in (explicit, F.scaled_dot_product_attention):
        assert_measured(attncli.measure(attend, q, k, v), (q @ k.mT / 2).as_subclass(Tensor))


def test_complex_sparse_integer_and_meta_tensors_pass_by() -> None:
    def run(x: Tensor) -> Tensor:
        torch.polar(x.abs(), x).exp().real.softmax(-1)
        sparse = (x[0] > 0.5).float().to_sparse()
        torch.sparse.mm(sparse, x[0].mT)
        torch.sparse.softmax(sparse, -1)
        torch.empty(3, 3, device="meta").softmax(-1) @ torch.empty(3, 3, device="meta")
        (x * 4).long() @ (x * 4).long().mT
        torch.ones(()).softmax(0)
        return explicit(x[:, None], x[:, None], x[:, None])

    only(attncli.measure(run, randn(B, T, 4)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_crash_nothing_and_do_not_hide(fused: bool, which: int, value: float) -> None:
    given = [randn(B, HEADS, T, 4, seed=seed) for seed in (1, 2, 3)]
    for tensor in given[:2]:
        tensor[..., 3].abs_()
    given[which][0, 1, 2, 3] = value
    report = attncli.measure(F.scaled_dot_product_attention if fused else explicit, *given)
    assert len(report.calls) == 1
    found = numbers(report, "entropy")
    if which < 2 and (fused or value != -math.inf):  # a row of −Inf alone is one that may attend to nothing
        assert not math.isfinite(found[1])
    assert all(math.isfinite(number) for head, number in enumerate(found) if head != 1 or which == 2)
    report.to_json()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [(0, HEADS, T, 4), (B, HEADS, 0, 4), (B, 0, T, 4)])
def test_empty_tensors_crash_nothing(fused: bool, shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)
    report = attncli.measure(F.scaled_dot_product_attention if fused else explicit, empty, empty, empty)
    report.to_json()
    str(report)


def test_a_thousand_heads_are_a_thousand_rows() -> None:
    q, k, v = (randn(1, 1000, 3, 4, seed=seed) for seed in (1, 2, 3))
    report = attncli.measure(explicit, q, k, v)
    assert_measured(report, q @ k.mT / 2)


def test_an_input_that_is_the_model_s_own_output_is_read_in_order() -> None:
    """Two steps with the same model: calls keep their order and their sources."""
    model = seeded(Small)
    report = attncli.measure(lambda x: model(model(x)), randn(B, T, WIDTH))
    assert [call.query_sources for call in report.calls] == [("input x",), ("input x", "call 0")]


# --- libraries --------------------------------------------------------------------------------------------


def all_explained(report: Report) -> bool:
    return bool(report.calls) and all(call.explained for call in report.calls)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "q and k normed": {"attn_qk_norm": True},
    "alibi": {"alibi_pos_bias": True},
    "rotary": {"rotary_pos_emb": True},
    "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "soft cap": {"attn_softclamp_logits": True},
    "memory": {"attn_num_mem_kv": 3},
    "flash": {"attn_flash": True},
    "flash, rotary": {"attn_flash": True, "rotary_pos_emb": True},
    "gqa": {"attn_kv_heads": 2},
    "sigmoid": {"attn_sigmoid": True},
    "relative": {"rel_pos_bias": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_x_transformers_are_measured(name: str) -> None:
    x_transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    options = OPTIONS[name]
    layers = x_transformers.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    model = x_transformers.TransformerWrapper(num_tokens=30, max_seq_len=16, attn_layers=layers).eval()
    report = attncli.measure(model, torch.randint(0, 30, (2, 10)))
    assert len(report.calls) == 2
    assert all_explained(report), [call.reason for call in report.calls]
    for call in report.calls:
        assert (call.heads, call.queries, call.batch) == (4, 10, 2)
        assert call.keys == 10 + options.get("attn_num_mem_kv", 0)
        assert call.normaliser == ("sigmoid" if name == "sigmoid" else "softmax")
        if name == "gqa":
            assert call.kv_heads == 2
        if name == "soft cap":
            assert call.soft_cap == 50.0
        if name not in ("q and k normed", "talking heads"):
            assert call.scale == pytest.approx(8**-0.5)
        if "memory" not in name and name != "sigmoid":
            assert call.mask_kind is not None
            assert call.mask_kind.startswith("causal")


def test_x_transformers_cross_attention_is_cross() -> None:
    x_transformers = pytest.importorskip("x_transformers")
    model = x_transformers.XTransformer(
        dim=32, enc_num_tokens=20, enc_depth=1, enc_heads=4, enc_max_seq_len=12, dec_num_tokens=20,
        dec_depth=1, dec_heads=4, dec_max_seq_len=8,
    )  # fmt: skip
    report = attncli.measure(model.eval(), torch.randint(1, 20, (2, 12)), torch.randint(1, 20, (2, 8)))
    assert [(c.kind, c.queries, c.keys) for c in report.calls] == [
        ("self", 12, 12), ("self", 8, 8), ("cross", 8, 12),
    ]  # fmt: skip
    assert all_explained(report)


@pytest.mark.parametrize("fused", [True, False])
def test_diffusers_attention_blocks_are_measured(fused: bool) -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    processor = AttnProcessor2_0() if fused else AttnProcessor()
    torch.manual_seed(0)
    model = Attention(32, cross_attention_dim=24, heads=4, dim_head=8, processor=processor).eval()
    x, y = randn(2, 10, 32), randn(2, 7, 24)
    report = attncli.measure(model, x, encoder_hidden_states=y)
    call = only(report)
    q = model.to_q(x).unflatten(-1, (4, 8)).transpose(1, 2).detach()
    k = model.to_k(y).unflatten(-1, (4, 8)).transpose(1, 2).detach()
    assert_measured(report, q @ k.mT * 8**-0.5)
    assert (call.kind, call.scale) == ("cross", pytest.approx(8**-0.5))
    assert numbers(report, "dot_absmax") == pytest.approx(largest_dots(q, k), rel=1e-5)


def test_a_diffusers_unet_and_a_transformer_are_measured() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    report = attncli.measure(unet.eval(), randn(1, 4, 8, 8), 1, randn(1, 5, 16))
    blocks = sum(type(m).__name__ == "Attention" for m in unet.modules())
    assert len(report.calls) == blocks == 8
    assert all_explained(report)
    assert [call.kind for call in report.calls] == ["self", "cross"] * 4
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    report = attncli.measure(
        dit.eval(), randn(1, 4, 8, 8), timestep=torch.tensor([3]), class_labels=torch.tensor([1])
    )
    assert len(report.calls) == 2
    assert all_explained(report)
    assert {(call.heads, call.queries, call.kind) for call in report.calls} == {(2, 16, "self")}
