"""Fused kernels read through their schemas: no call is made, so those of devices that are not here are read too."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from traced import assert_measured, entropies, largest_dots, numbers, only

import attncli
from attncli.trace.attention import Attention
from attncli.trace.check import tolerance
from attncli.trace.fused_calls import fused_call, logsumexp_difference
from attncli.trace.kernels import KERNELS, Fused, fused
from attncli.trace.ops import op_of
from attncli.trace.pending import Seen
from attncli.trace.statistics import fused_difference, fused_statistics
from attncli.trace.tape import Ran, Ref, Tape

B, H, K, T, S, D = 2, 4, 2, 6, 9, 8


def tensors(heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, D), (B, heads, S, D), (B, heads, S, D))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def read(name: str, out: Tensor, *args: Any, **kwargs: Any) -> Fused:
    """What is read of a call with these arguments, as if the kernel had returned `out`."""
    return fused(name, Ran(getattr(torch.ops.aten, name).default, args, kwargs, (out,)))


def assert_read(taken: Fused, scores: Tensor) -> None:
    """The call's entropies are those of the scores, and its output follows from what was read."""
    assert taken.call is not None, taken.reason
    assert taken.output_BHTV is not None
    found = fused_statistics(taken.call)
    assert list(found.per_head["entropy"]) == pytest.approx(entropies(scores), abs=1e-5)
    assert fused_difference(taken.call, taken.output_BHTV) < tolerance(torch.float32)


def test_every_kernel_in_the_table_exists_or_belongs_to_another_device() -> None:
    named = [name for name in KERNELS if name not in ("flex_attention", "_flash_attn_forward")]
    assert all(hasattr(torch.ops.aten, name) for name in named)


CAUSAL = torch.ones(T, S, dtype=torch.bool).tril()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_scaled_dot_product_kernels_of_cuda_are_read(causal: bool, scale: float | None) -> None:
    q, k, v = tensors()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    scores = q @ k.mT * (scale or D**-0.5)
    if causal:
        scores = scores.masked_fill(~CAUSAL, -math.inf)
    taken = [
        read("_scaled_dot_product_flash_attention", out, q, k, v, 0.0, causal, scale=scale),
        read("_scaled_dot_product_efficient_attention", out, q, k, v, None, True, 0.0, causal, scale=scale),
        read("_scaled_dot_product_cudnn_attention", out, q, k, v, None, True, 0.0, causal, scale=scale),
        read("_scaled_dot_product_fused_attention_overrideable", out, q, k, v, is_causal=causal, scale=scale),
    ]
    for one in taken:
        assert_read(one, scores)
    assert [one.kernel for one in taken] == [
        "flash (CUDA)", "efficient (CUDA)", "cuDNN", "fused (accelerator)",
    ]  # fmt: skip


def test_an_additive_mask_of_the_efficient_kernel_is_read() -> None:
    q, k, v = tensors()
    bias = torch.randn(B, H, T, S, generator=torch.Generator().manual_seed(5))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    taken = read("_scaled_dot_product_efficient_attention", out, q, k, v, bias, False)
    assert_read(taken, q @ k.mT * D**-0.5 + bias)
    assert taken.call is not None
    assert fused_statistics(taken.call).bias


def test_flash_forward_has_tokens_before_heads_and_its_causal_corner_at_the_end() -> None:
    q, k, v = tensors()
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    args = [x.transpose(1, 2) for x in (q, k, v)]
    taken = read("_flash_attention_forward", out.transpose(1, 2), *args, None, None, T, S, 0.0, True, False)
    assert_read(taken, (q @ k.mT * D**-0.5).masked_fill(~visible, -math.inf))


def test_a_window_and_alibi_slopes_of_flash_forward_are_read() -> None:
    q, k, v = tensors()
    q = k + 0.1
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    i, j = torch.arange(S)[:, None], torch.arange(S)
    visible = (j <= i) & (j >= i - 3)
    bias = -slopes[:, None, None] * (i - j).abs()
    mask = bias.masked_fill(~visible, -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
    args = [x.transpose(1, 2) for x in (q, k, v)]
    taken = read(
        "_flash_attention_forward", out.transpose(1, 2), *args, None, None, S, S, 0.0, True, False,
        window_size_left=3, window_size_right=0, alibi_slopes=slopes,
    )  # fmt: skip
    assert_read(taken, q @ k.mT * D**-0.5 + mask)
    assert taken.call is not None
    assert fused_statistics(taken.call).window == 4


def test_packed_sequences_are_not_read_and_say_so() -> None:
    q, k, v = (x.transpose(1, 2) for x in tensors())
    ends = torch.tensor([0, 3, 6])
    taken = read("_flash_attention_forward", q, q, k, v, ends, ends, T, S, 0.0, False, False)
    assert taken.call is None
    assert "packed" in taken.reason


def test_grouped_queries_read_their_own_keys() -> None:
    q, k, v = tensors(K)
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    wide = k.repeat_interleave(H // K, 1)
    assert_read(read("_scaled_dot_product_flash_attention", out, q, k, v), q @ wide.mT * D**-0.5)


# --- what runs here -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_both_backends_of_the_cpu_give_the_same_numbers(backend: SDPBackend, mask: str) -> None:
    q, k, v = tensors()
    visible = torch.rand(T, S, generator=torch.Generator().manual_seed(3)) > 0.4
    visible[:, 0] = True
    scores = q @ k.mT * D**-0.5
    given: dict[str, Any] = {}
    if mask == "causal":
        given["is_causal"] = True
        scores = scores.masked_fill(~CAUSAL, -math.inf)
    elif mask != "none":
        hidden = torch.zeros(T, S).masked_fill(~visible, -math.inf)
        given["attn_mask"] = visible if mask == "bool" else hidden
        scores = scores + hidden
    with sdpa_kernel(backend):
        report = attncli.measure(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **given), q, k, v)
    assert_measured(report, scores)
    call = only(report)
    assert call.kernel == ("softmax" if backend == SDPBackend.MATH else "flash (CPU)")
    assert call.scale == pytest.approx(D**-0.5)
    assert numbers(report, "dot_absmax") == pytest.approx(largest_dots(q, k), rel=1e-5)
    if mask == "causal":
        # is_causal puts the corner at the top left: S − T keys fewer than the last query could see.
        assert (call.mask_kind, call.causal_offset) == ("causal", T - S)


def test_values_of_another_size_grouped_queries_and_dropout_are_no_obstacle() -> None:
    q, k, v = tensors()
    report = attncli.measure(F.scaled_dot_product_attention, q, k, v[..., :3])
    assert_measured(report, q @ k.mT * D**-0.5)
    q, k, v = tensors(K)
    report = attncli.measure(lambda *x: F.scaled_dot_product_attention(*x, enable_gqa=True), q, k, v)
    wide = k.repeat_interleave(H // K, 1)
    assert_measured(report, q @ wide.mT * D**-0.5)
    assert only(report).kv_heads == K
    q, k, v = tensors()
    report = attncli.measure(lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.5), q, k, v)
    assert_measured(report, q @ k.mT * D**-0.5)
    assert only(report).dropout == 0.5
    assert report.findings == ()


def with_dropout(query: Tensor, key: Tensor, value: Tensor, *lse: Tensor, dropout: float = 0.1) -> Seen:
    """What is said of a CUDA call with dropout that returned a useless output and this logsumexp."""
    func = torch.ops.aten._scaled_dot_product_flash_attention.default
    tape = Tape(Attention())
    refs = tuple(Ref(tape.node(tensor), tuple(tensor.shape), None) for tensor in (query, key, value))
    outputs = (torch.zeros(query.shape), *lse)
    node = tape._record(op_of(func), (refs, {}, refs), outputs)[0]
    return fused_call(tape, node, Ran(func, (query, key, value, dropout, True), {}, outputs))


def test_a_fused_call_with_dropout_is_compared_by_its_logsumexp() -> None:
    q, k, v = tensors()
    ones = torch.ones(T, S, dtype=torch.bool)
    scores = (q @ k.mT * D**-0.5).masked_fill(~ones.tril(), -math.inf)
    lse = scores.logsumexp(-1)
    for given in (lse, lse[..., None], F.pad(lse, (0, 26), value=math.nan)):
        seen = with_dropout(q, k, v, given)
        assert (seen.facts["explained"], seen.facts["reason"]) == (True, "")
        assert seen.facts["difference"] < 1e-5
        assert seen.facts["dropout"] == 0.1


def test_a_logsumexp_that_does_not_follow_from_the_scores_is_not_explained() -> None:
    q, k, v = tensors()
    seen = with_dropout(q, k, v, (q @ k.mT).logsumexp(-1))
    assert not seen.facts["explained"]
    assert str(seen.facts["reason"]).startswith(
        "the logsumexp of recomputed rows differs from the kernel's by "
    )
    assert not with_dropout(q, k, v, torch.full((B, H, T), math.nan)).facts["explained"]


def test_a_fused_call_with_dropout_and_no_logsumexp_says_that_nothing_was_compared() -> None:
    for given in ((), (torch.zeros(B, H, 0),), (torch.zeros(B, H, T, dtype=torch.int64),)):
        seen = with_dropout(*tensors(), *given)
        assert (seen.facts["explained"], seen.facts["difference"]) == (True, None)
        assert seen.facts["reason"] == (
            "dropout changes its output and no logsumexp was given: no row was compared"
        )


def test_the_logsumexp_of_the_kernel_that_is_here_is_the_same() -> None:
    q, k, v = tensors()
    given = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, True)
    taken = read("_scaled_dot_product_flash_attention_for_cpu", given[0], q, k, v, 0.0, True)
    assert taken.call is not None
    difference = logsumexp_difference(taken.call, given)
    assert difference is not None
    assert difference < 1e-5


def test_flex_attention_with_score_mod_mask_and_groups_is_measured() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = tensors()
    q = k + 0.1
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device="cpu")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        biased = lambda s, b, h, i, j: s - slopes[h] * (i - j)  # noqa: E731
        out: Tensor = flex_attention(q, k, v, score_mod=biased, block_mask=mask)
        return out

    i, j = torch.arange(S)[:, None], torch.arange(S)
    scores = q @ k.mT * D**-0.5 - slopes[:, None, None] * (i - j)
    report = attncli.measure(attend, q, k, v)
    assert_measured(report, scores.masked_fill(j > i, -math.inf))
    assert only(report).kernel == "flex_attention"
    assert str(only(report).mask_kind).startswith("causal")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
)
def test_the_kernels_of_a_gpu_agree_with_the_reference(backend: SDPBackend) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    q, k, v = (x.cuda().half() for x in tensors())
    with sdpa_kernel(backend):
        report = attncli.measure(F.scaled_dot_product_attention, q, k, v)
    scores = q.double() @ k.double().mT * D**-0.5
    assert_measured(report, scores.cpu(), tolerance=1e-3)
