"""Two listeners on one tape hear what each hears alone: calls, numbers, origins, findings, whatever the architecture.

`check` is compared with `measure` and with `nan_check` on the same model and inputs; the model, the random numbers
and the outputs stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attncli
from attncli.api import Report

pytest.importorskip("transformers")

from family_cases import ROWS, Row, tiny
from test_families import quiet as quiet
from test_families import switched_to_sdpa, synthetic

# transformers warns of its own code.
pytestmark = pytest.mark.filterwarnings("ignore")
# One of each design: masks, biases, caches, latents, experts, windows, convolutions, state spaces.
CHOSEN = (
    *("bert", "llama", "gpt2", "t5", "bloom", "gemma2", "mixtral", "deepseek_v3", "deberta-v2", "longformer"),
    *("big_bird", "swin", "pixtral", "whisper", "perceiver", "rwkv", "mamba", "xlnet", "detr"),
)


def reports(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Report, Report, Report]:
    def step(model: Any) -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    found = []
    for command in (
        attncli.measure,
        attncli.check,
    ):  # on one line, for calls of torch's own modules stand there
        torch.manual_seed(0)
        random = torch.get_rng_state()
        found.append(command(model, *args, **kwargs))
        assert torch.equal(random, torch.get_rng_state())
    torch.manual_seed(0)
    return found[1], found[0], attncli.nan_check(model, step, backward=False)


def assert_each_hears_what_it_hears_alone(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checked, measured, searched = reports(model, args, kwargs)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert repr(checked.calls) == repr(measured.calls)
    of_calls = [row for row in checked.measurements if row.call is not None]
    assert repr(of_calls) == repr(list(measured.measurements))
    assert repr(checked.layers) == repr(measured.layers)
    assert checked.origins == searched.origins
    for key in ("operators", "operators_by_phase", "headroom_bits"):
        assert (checked.run or {})[key] == (searched.run or {})[key]
    assert set(checked.notes) <= {*measured.notes, *searched.notes}
    assert {f.message for f in checked.findings} == {
        f.message for report in (measured, searched) for f in report.findings
    }
    assert checked.verdict == (measured.verdict if not searched.origins else "findings")
    return checked


# --- transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if row.type in CHOSEN], ids=lambda row: row.type)
def test_a_model_type_is_checked_as_it_is_measured_and_searched(row: Row) -> None:
    model = tiny(row)
    batch = row.batch() if row.batch else synthetic(model)
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not switched_to_sdpa(model):
            continue
        report = assert_each_hears_what_it_hears_alone(model, **batch)
        assert report.origins == ()
        assert all(call.explained for call in report.calls)
        assert (report.run or {})["headroom_bits"]["float32"]["bits"] > 90


def test_the_chosen_model_types_are_all_there() -> None:
    assert {row.type for row in ROWS} >= set(CHOSEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_bits_change_nothing_of_that(dtype: torch.dtype) -> None:
    (row,) = (row for row in ROWS if row.type == "llama")
    model = tiny(row).to(dtype)
    assert_each_hears_what_it_hears_alone(model, **synthetic(model))


@pytest.mark.parametrize("name", ["bert", "gpt2", "deberta-v2"])
def test_dropout_draws_the_same_numbers_in_each(name: str) -> None:
    (row,) = (row for row in ROWS if row.type == name)
    model = tiny(row).train()
    report = assert_each_hears_what_it_hears_alone(model, **synthetic(model))
    assert report.findings == ()


def test_a_dropout_of_the_models_own_is_no_mask_behind_the_softmax() -> None:
    """sew-d fills what a Bernoulli draw says with zeros, and divides the rest."""
    (row,) = (row for row in ROWS if row.type == "sew-d")
    model = tiny(row).train()
    model.config.apply_spec_augment = False
    report = attncli.check(model, **(row.batch() if row.batch else synthetic(model)))
    assert [finding.message for finding in report.findings] == []
    assert any(call.dropout > 0 for call in report.calls)


# --- torch and other libraries ------------------------------------------------------------------------


def embedded() -> Tensor:
    return torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))


PADDING = torch.arange(16)[None] >= torch.tensor([[16], [11]])


@pytest.mark.parametrize("train", [False, True])
def test_an_encoder_of_torch_is_one_of_them(train: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(train)
    report = assert_each_hears_what_it_hears_alone(model, embedded(), src_key_padding_mask=PADDING)
    assert [call.mask_kind for call in report.calls] == ["padding"] * 2


def test_an_encoder_and_decoder_of_torch_are_two_of_them() -> None:
    model = nn.Transformer(64, 4, 2, 2, 128, batch_first=True).eval()
    future = nn.Transformer.generate_square_subsequent_mask(9)
    report = assert_each_hears_what_it_hears_alone(model, embedded(), embedded()[:, :9], tgt_mask=future)
    assert [call.kind for call in report.calls].count("cross") == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_of_torch_has_the_names_of_its_weights_compiled_or_not(compiled: bool) -> None:
    model: Any = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    model = torch.compile(model) if compiled else model
    report = assert_each_hears_what_it_hears_alone(model, *[embedded()] * 3)
    (call,) = report.calls
    assert set(call.parameters.values()) == {"in_proj_weight"}


def test_a_unet_of_diffusers_is_one_of_them() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    report = assert_each_hears_what_it_hears_alone(
        model, torch.randn(1, 4, 16, 16), torch.tensor(3), torch.randn(1, 7, 32)
    )
    assert [call.kind for call in report.calls].count("cross") == 4


@pytest.mark.parametrize(
    "settings", [{}, {"attn_flash": True}, {"attn_pre_talking_heads": True}, {"attn_num_mem_kv": 4}]
)
def test_attention_of_x_transformers_is_one_of_them(settings: dict[str, Any]) -> None:
    library = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    layers = library.Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **settings)
    model = library.TransformerWrapper(num_tokens=50, max_seq_len=64, attn_layers=layers).eval()
    report = assert_each_hears_what_it_hears_alone(model, torch.randint(0, 50, (2, 20)))
    assert len(report.calls) == 2


# --- memory that the search fills ---------------------------------------------------------------------


class Reserved(nn.Module):
    """Scores written into memory that was only reserved, head by head."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = self.join(q, k) * 8**-0.5
        mask = torch.empty(tokens, tokens).fill_(-math.inf).triu_(1)
        out: Tensor = (scores + mask).softmax(-1) @ v
        return out


def by_heads(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.empty(*q.shape[:-1], k.shape[-2])
    for head in range(q.shape[1]):
        scores[:, head] = q[:, head] @ k[:, head].mT
    return scores


def by_baddbmm(q: Tensor, k: Tensor) -> Tensor:
    batch, heads, tokens, _ = q.shape
    reserved = torch.empty(batch * heads, tokens, tokens)
    return torch.baddbmm(reserved, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0).unflatten(0, (batch, heads))


@pytest.mark.parametrize("join", [by_heads, by_baddbmm])
def test_nan_in_reserved_memory_reaches_no_number(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Reserved(join).eval()
    report = assert_each_hears_what_it_hears_alone(model, torch.randn(2, 12, 32))
    assert report.origins == ()
    assert len(report.calls) >= 1
    numbers = [row.value for row in report.measurements if row.metric in ("entropy", "dot_absmax")]
    assert len(numbers) >= 8
    assert all(isinstance(value, float) and math.isfinite(value) for value in numbers)
