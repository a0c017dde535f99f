"""Attention maps: the model's own probabilities, summed over blocks of keys and averaged over blocks of queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone uses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attncli.trace import Maps, Trace, trace
from attncli.trace import maps as maps_module
from attncli.trace.maps import MOST_BLOCKS, Drawn, eager_maps, fused_maps
from attncli.trace.statistics import FusedCall


def all_heads(rows: int = 1) -> Maps:
    return Maps(lambda module, parameters, heads: range(heads), rows)


def drawn(model: Callable[..., Any], *args: Tensor, rows: int = 1, **kwargs: Tensor) -> Trace:
    with torch.no_grad():
        return trace(model, lambda: model(*args, **kwargs), args, kwargs, maps=all_heads(rows))


def matrix(one: Drawn) -> Tensor:
    """A map whose rows all see a key."""
    return torch.tensor([row for row in one.probs if row is not None], dtype=torch.float64)


def slowly(probs_TS: Tensor, allowed_T: Tensor | None = None) -> list[list[float] | None]:
    """Blocks by an obvious loop: sums over keys, means over the queries that see any."""
    queries, keys = probs_TS.shape
    down, across = (math.ceil(length / MOST_BLOCKS) for length in (queries, keys))
    out: list[list[float] | None] = []
    for first in range(0, queries, down):
        rows = [
            t for t in range(first, min(first + down, queries)) if allowed_T is None or bool(allowed_T[t])
        ]
        out.append(
            [
                sum(float(probs_TS[t, k : k + across].double().sum()) for t in rows) / len(rows)
                for k in range(0, keys, across)
            ]
            if rows
            else None
        )
    return out


def assert_same(one: Drawn, expected: list[list[float] | None], tolerance: float = 1e-6) -> None:
    assert len(one.probs) == len(expected)
    for got, wanted in zip(one.probs, expected, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            assert got == pytest.approx(wanted, abs=tolerance)


def heads_of(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


# --- closed forms -------------------------------------------------------------------------------------


def test_queries_of_zero_spread_evenly_over_the_keys_they_see():
    zero, keys = torch.zeros(1, 2, 5, 4), heads_of(1, 2, 5, 4)
    found = drawn(lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), zero, keys)
    (first, second) = found.maps[0]
    assert [(one.head, one.batch, one.queries, one.keys) for one in (first, second)] == [
        (0, 0, 5, 5),
        (1, 0, 5, 5),
    ]
    assert first.query_starts == first.key_starts == (0, 1, 2, 3, 4)
    for query, row in enumerate(first.probs):
        assert row == pytest.approx([1 / (query + 1)] * (query + 1) + [0] * (4 - query))


def test_even_attention_has_even_cells_whatever_the_length():
    # 130 tokens: blocks of 3, of which the last holds one.
    zero, keys = torch.zeros(1, 1, 130, 4), heads_of(1, 1, 130, 4)
    (one,) = drawn(lambda q, k: F.scaled_dot_product_attention(q, k, k), zero, keys).maps[0]
    assert one.key_starts == tuple(range(0, 130, 3))
    assert len(one.probs) == 44 <= MOST_BLOCKS
    assert matrix(one)[:, :-1] == pytest.approx(3 / 130)
    assert matrix(one)[:, -1] == pytest.approx(1 / 130)


def test_a_query_on_one_key_is_one_cell():
    q = torch.eye(4)[None, None] * 1000
    (one,) = drawn(lambda q, k: (q @ k.transpose(-1, -2)).softmax(-1) @ k, q, q.clone()).maps[0]
    assert matrix(one).tolist() == torch.eye(4).tolist()


def test_a_row_without_an_allowed_key_is_none_and_counts_in_no_mean():
    mask = torch.ones(100, 100, dtype=torch.bool)
    mask[3], mask[10:12] = False, False
    q, k = heads_of(1, 1, 100, 8), heads_of(1, 1, 100, 8, seed=1)
    expected = slowly(
        (q[0, 0] @ k[0, 0].T / math.sqrt(8)).masked_fill(~mask, -math.inf).softmax(-1), mask.any(-1)
    )
    assert expected[5] is None
    for model in (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, attn_mask=mask),
        lambda q, k: (
            (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1)
            @ k
        ),
    ):
        (one,) = drawn(model, q, k).maps[0]
        assert_same(one, expected)


def test_a_head_with_nan_shows_nan_and_only_in_the_rows_that_have_it():
    q, k = heads_of(1, 1, 6, 4), heads_of(1, 1, 6, 4, seed=1)
    q[0, 0, 2] = math.nan
    (one,) = fused_maps(FusedCall(q, k, None, 0.5), [(0, 0)])
    assert [any(map(math.isnan, row)) for row in one.probs if row is not None] == [
        query == 2 for query in range(6)
    ]


# --- against a slow loop ------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    queries=st.integers(1, 150),
    keys=st.integers(1, 150),
    group=st.sampled_from((1, 2)),
    offset=st.sampled_from((None, 0, "bottom right")),
    window=st.sampled_from((None, (5, 0), (7, 3))),
    cap=st.sampled_from((None, 2.0)),
    sinks=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_fused_call_is_drawn_as_a_slow_loop_would(
    queries, keys, group, offset, window, cap, sinks, bias, seed
):
    q, k = (
        heads_of(2, 2 * group, queries, 8, seed=seed, size=2),
        heads_of(2, 2, keys, 8, seed=seed + 1, size=2),
    )
    causal = keys - queries if offset == "bottom right" else offset
    mask = heads_of(1, 2 * group, queries, keys, seed=seed + 2) if bias else None
    sink_logits = heads_of(2 * group, seed=seed + 3) if sinks else None
    call = FusedCall(
        q, k, None, 0.3, mask=mask, causal_offset=causal, window=window, soft_cap=cap, sinks_H=sink_logits
    )
    scores = 0.3 * q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2)
    scores = cap * (scores / cap).tanh() if cap else scores
    scores = scores + mask if mask is not None else scores
    i, j = torch.arange(queries)[:, None] + (causal or 0), torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool) if causal is None else j <= i
    if window is not None:
        seen &= (j >= i - window[0]) & (j <= i + window[1])
    scores = scores.masked_fill(~seen, -math.inf)
    if sink_logits is not None:
        extra = sink_logits.double()[None, :, None, None].expand(2, -1, queries, 1)
        probs = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    for one in fused_maps(call, [(0, 0), (1, 2 * group - 1)]):
        # Keys at the ends that no query sees count as padding.
        rows = slice(one.first_query, one.first_query + one.queries)
        columns = slice(one.first_key, one.first_key + one.keys)
        of_head = probs[one.batch, one.head].nan_to_num()
        assert of_head.sum() == pytest.approx(float(of_head[:, columns].sum()))
        assert one.keys == keys or not seen.any(0).all()
        assert_same(one, slowly(of_head[rows, columns], seen.any(-1)[rows]))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (64, 64), (65, 3), (100, 200), (129, 128)])
def test_probabilities_in_memory_are_summed_as_they_are(queries, keys):
    scores = heads_of(2, 3, queries, keys, size=3)
    probs = scores.softmax(-1)
    for one in eager_maps(scores, probs, [(1, 2), (0, 0)], visible_above=-math.inf):
        assert_same(one, slowly(probs[one.batch, one.head]))
        assert matrix(one).sum(-1) == pytest.approx(1)


# --- models -------------------------------------------------------------------------------------------


def tiny(name: str) -> Any:
    """A small random model whose heads differ from an even spread."""
    transformers = pytest.importorskip("transformers")
    of_all = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    sizes = {**of_all, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["intermediate_size"] = 16
    windows = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    settings = {
        "Bert": sizes,
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, **of_all},
        "Llama": {**sizes, "num_key_value_heads": 2},
        "Gemma2": {**sizes, **windows, "attn_logit_softcapping": 2.0},
        "GptOss": {**sizes, **windows, "num_local_experts": 2, "num_experts_per_tok": 1},
        "T5": {**of_all, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 4},
    }[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def own_matrices(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What transformers itself gives out, (B, H, T, S) in the order of the calls."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    if "decoder_attentions" not in out:
        return list(out.attentions)
    pairs = zip(out.decoder_attentions, out.cross_attentions, strict=True)
    return [*out.encoder_attentions, *(one for pair in pairs for one in pair)]


@pytest.mark.parametrize("padded", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *((name, kernel) for name in ("Bert", "GPT2", "Llama", "T5") for kernel in ("eager", "sdpa")),
        ("Gemma2", "eager"),  # a soft cap and a sliding window
        ("GptOss", "eager"),  # learned sinks
    ],
)
def test_a_map_is_the_matrix_that_transformers_gives_out_without_the_padding(name, kernel, padded):
    model = tiny(name)
    model.set_attn_implementation(kernel)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": torch.randint(1, 40, (2, 9), generator=generator),
        "attention_mask": torch.tensor(
            [[1] * 9, [0] * 4 + [1] * 5 if padded == "left" else [1] * 5 + [0] * 4]
        ),
    }
    real = range(4, 9) if padded == "left" else range(5)
    if name == "T5":
        inputs["decoder_input_ids"] = torch.randint(1, 40, (2, 7), generator=generator)
    found = drawn(model, rows=2, **inputs)
    matrices = own_matrices(model, inputs)
    assert len(found.calls) == len(matrices) == len(found.maps) > 1
    for call, own in zip(found.calls, matrices, strict=True):
        assert call.explained
        maps = found.maps[call.index]
        assert [(one.batch, one.head) for one in maps] == [(b, h) for b in range(2) for h in range(4)]
        for one in maps:
            keys = range(own.shape[-1]) if one.batch == 0 or own.shape[-1] == 7 else real
            queries = range(own.shape[-2]) if one.batch == 0 or own.shape[-2] == 7 else real
            assert (one.first_query, one.queries) == (queries.start, len(queries))
            assert (one.first_key, one.keys) == (keys.start, len(keys))
            expected = own[one.batch, one.head][queries.start : queries.stop, keys.start : keys.stop]
            assert (matrix(one) - expected).abs().max() < 1e-5


def test_multihead_attention_is_drawn_as_its_own_weights_say():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x, memory = heads_of(2, 7, 16, size=3), heads_of(2, 5, 16, seed=1, size=3)
    with torch.no_grad():
        own = model(x, memory, memory, average_attn_weights=False)[1]
    for need_weights in (True, False):
        found = drawn(lambda x, m, n=need_weights: model(x, m, m, need_weights=n), x, memory, rows=2)
        for one in found.maps[0]:
            assert (one.queries, one.keys) == (7, 5)
            assert (matrix(one) - own[one.batch, one.head]).abs().max() < 1e-6


def test_a_module_in_half_precision_is_drawn_in_full():
    q, k = (heads_of(1, 1, 6, 8, seed=seed, size=2).bfloat16() for seed in (0, 1))
    (one,) = drawn(lambda q, k: F.scaled_dot_product_attention(q, k, k), q, k).maps[0]
    expected = (q[0, 0].double() @ k[0, 0].double().T / math.sqrt(8)).softmax(-1)
    assert (matrix(one) - expected).abs().max() < 1e-6


# --- weights that change after the softmax ------------------------------------------------------------


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def test_weights_that_are_masked_after_the_softmax_are_drawn_as_they_meet_the_values():
    mask = torch.tril(torch.ones(5, 5))

    mask[2] = 0
    q, k = heads_of(1, 2, 5, 8), heads_of(1, 2, 5, 8, seed=1)
    found = drawn(lambda q, k: (scores_of(q, k).softmax(-1) * mask) @ k, q, k)
    assert found.calls[0].masked_after_softmax
    for one in found.maps[0]:
        assert_same(one, slowly(scores_of(q, k)[0, one.head].softmax(-1) * mask, mask.any(-1)))


def test_a_key_that_is_zeroed_after_the_softmax_is_no_padding():
    mask = torch.ones(5, 5)
    mask[:, 0] = 0
    q, k = heads_of(1, 1, 5, 8), heads_of(1, 1, 5, 8, seed=1)
    (one,) = drawn(lambda q, k: (scores_of(q, k).softmax(-1) * mask) @ k, q, k).maps[0]
    assert_same(one, slowly(scores_of(q, k)[0, 0].softmax(-1) * mask))


def test_a_softmax_plus_one_leaves_rows_below_one():
    def model(q: Tensor, k: Tensor) -> Tensor:
        e = scores_of(q, k).exp()
        return e / (1 + e.sum(-1, keepdim=True)) @ k

    q, k = heads_of(1, 1, 5, 8), heads_of(1, 1, 5, 8, seed=1)
    found = drawn(model, q, k)
    assert found.calls[0].normaliser == "softmax plus one"
    e = scores_of(q, k)[0, 0].exp()
    assert (matrix(found.maps[0][0]) - e / (1 + e.sum(-1, keepdim=True))).abs().max() < 1e-6


def test_a_sigmoid_has_weights_and_no_map():
    q, k = heads_of(1, 1, 5, 8), heads_of(1, 1, 5, 8, seed=1)
    found = drawn(lambda q, k: scores_of(q, k).sigmoid() @ k, q, k)
    assert found.calls[0].normaliser == "sigmoid"
    assert found.maps == {}


def test_dropout_is_not_drawn():
    q, k = heads_of(1, 1, 5, 8), heads_of(1, 1, 5, 8, seed=1)
    torch.manual_seed(0)
    found = drawn(lambda q, k: F.dropout(scores_of(q, k).softmax(-1), 0.5) @ k, q, k)
    assert found.calls[0].dropout == 0.5
    assert (matrix(found.maps[0][0]) - scores_of(q, k)[0, 0].softmax(-1)).abs().max() < 1e-6


# --- what is drawn, and at which cost -----------------------------------------------------------------


def test_without_maps_nothing_is_drawn_or_computed(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a map was drawn that nobody asked for")

    for name in ("eager_maps", "fused_maps"):
        monkeypatch.setattr(maps_module, name, refuse)
    monkeypatch.setattr("attncli.trace.attention.eager_maps", refuse)
    monkeypatch.setattr("attncli.trace.fused_calls.fused_maps", refuse)
    q, k = heads_of(1, 2, 5, 8), heads_of(1, 2, 5, 8, seed=1)

    def model(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, scores_of(q, k).softmax(-1) @ k)

    with torch.no_grad():
        found = trace(model, lambda: model(q, k), (q, k))
    assert len(found.calls) == 2
    assert found.maps == {}
    with pytest.raises(AssertionError, match="nobody asked"):
        drawn(model, q, k)


def test_only_the_heads_that_are_wanted_are_drawn_by_module_and_up_to_a_number():
    asked: list[tuple[str, int]] = []

    def heads(module: str, parameters: Any, count: int) -> list[int]:
        asked.append((module, count))
        return [3, 1, 7] if module == "second" else []

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x, x, x)[0]
            return self.second(x, x, x)[0]

    model, x = Two().eval(), heads_of(3, 5, 16)
    maps = Maps(heads, rows=3, most=4)
    with torch.no_grad():
        found = trace(model, lambda: model(x), (x,), maps=maps)
    assert asked == [("first", 4), ("second", 4)]
    assert [(one.batch, one.head) for one in found.maps[1]] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert (list(found.maps), maps.left_out) == ([1], 2)


def test_of_a_call_with_another_batch_size_the_first_row_is_drawn():
    q = heads_of(6, 1, 5, 8)
    found = drawn(lambda q: F.scaled_dot_product_attention(q, q, q), q, rows=2)
    assert [one.batch for one in found.maps[0]] == [0]


class Largest(TorchDispatchMode):
    """The most elements that any operator's result holds in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_a_long_sequence_is_drawn_without_a_matrix_of_its_size():
    queries = keys = 4096
    q, k = heads_of(1, 2, queries, 8), heads_of(1, 2, keys, 8, seed=1)
    with Largest() as most:
        (one,) = fused_maps(FusedCall(q, k, None, 0.3, causal_offset=0), [(0, 1)])
    assert most.elements <= 2 * MOST_BLOCKS * keys < queries * keys // 30
    assert len(one.probs) == len(one.key_starts) == MOST_BLOCKS
    assert matrix(one).sum(-1) == pytest.approx(1, abs=1e-5)
    assert matrix(one)[0, 1:].sum() == 0


# --- padding ------------------------------------------------------------------------------------------


def test_padding_in_the_middle_stays_as_keys_that_get_nothing():
    seen = torch.tensor([[True] * 6, [False, True, False, True, True, False]])
    q = heads_of(2, 1, 6, 8)
    mask = seen[:, None, None]
    found = drawn(lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=mask), q, rows=2)
    whole, cut = found.maps[0]
    assert (whole.queries, whole.keys, cut.queries, cut.keys) == (6, 6, 4, 4)
    assert (cut.first_query, cut.first_key) == (1, 1)
    expected = scores_of(q, q)[1, 0].masked_fill(~seen[1], -math.inf).softmax(-1)[1:5, 1:5]
    assert (matrix(cut) - expected).abs().max() < 1e-6
    assert matrix(cut)[:, 1].tolist() == [0] * 4


def test_queries_at_padded_places_in_the_middle_are_drawn_as_the_kernel_computes_them():
    # The hole begins a tile of 64 rows, and its queries look further back than all real ones of that tile.
    place = torch.arange(130)
    seen = (place < 64) | (place > 70)
    mask = seen & (place <= place[:, None]) & (place >= place[:, None] - 9)
    q = heads_of(1, 1, 130, 8)
    (one,) = fused_maps(FusedCall(q, q, None, 0.5, mask=mask), [(0, 0)])
    expected = (0.5 * q[0, 0] @ q[0, 0].T).masked_fill(~mask, -math.inf).softmax(-1)
    assert_same(one, slowly(expected, mask.any(-1)))


def test_a_row_of_the_batch_that_is_all_padding_has_no_probabilities():
    seen = torch.tensor([[True] * 4, [False] * 4])
    q, k = heads_of(2, 1, 4, 8), heads_of(2, 1, 4, 8, seed=1)
    mask = seen[:, None, None]
    found = drawn(lambda q, k: F.scaled_dot_product_attention(q, k, k, attn_mask=mask), q, k, rows=2)
    assert found.maps[0][1].probs == (None,) * 4


def test_a_causal_mask_that_hides_the_diagonal_is_no_padding():
    mask = torch.tril(torch.ones(5, 5, dtype=torch.bool), -1)
    q, k = heads_of(1, 1, 5, 8), heads_of(1, 1, 5, 8, seed=1)
    (one,) = drawn(lambda q, k: F.scaled_dot_product_attention(q, k, k, attn_mask=mask), q, k).maps[0]
    assert (one.queries, one.keys, one.probs[0]) == (5, 5, None)
    assert one.probs[1] == (1, 0, 0, 0, 0)
