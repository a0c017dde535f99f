"""Explicit attention in every spelling: each is one call, with the same numbers as the slow reference."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name
from torch import Tensor, nn
from traced import assert_measured, entropies, largest_dots, numbers, only

import attncli

B, H, T, S, D = 2, 3, 5, 7, 8
SCALE = 1 / math.sqrt(D)
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, length, D, generator=generator) for length in (T, S, S))
    return q, k, v


def scores_of(q_BHTD: Tensor, k_BHSD: Tensor) -> Tensor:
    return q_BHTD @ k_BHSD.transpose(-1, -2)


def spelled(scores: Callable[[Tensor, Tensor], Tensor]) -> Spelling:
    """Attention whose scores, scale included, are spelled in a certain way."""
    return lambda q, k, v: scores(q, k).softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores /= math.sqrt(D)
    return scores.softmax(-1) @ v


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SCALE).softmax(-1), v).view(B, H, T, D)


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    probs = (torch.einsum("bthd,bshd->bhts", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", probs, v)


def turned_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    probs = (torch.einsum("bthd,bshd->bhst", q, k) * SCALE).softmax(-2)
    return torch.einsum("bhst,bshd->bthd", probs, v)


def by_broadcasting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = ((q[:, :, :, None] * k[:, :, None]).sum(-1) * SCALE).softmax(-1)
    return (probs[..., None] * v[:, :, None]).sum(3)


SPELLINGS: dict[str, Spelling] = {
    "matmul": spelled(lambda q, k: scores_of(q, k) * SCALE),
    "scores divided": spelled(lambda q, k: scores_of(q, k) / math.sqrt(D)),
    "scores divided in place": spelled(lambda q, k: scores_of(q, k).div_(math.sqrt(D))),
    "scores /=": in_place,
    "a scalar tensor": spelled(lambda q, k: scores_of(q, k) / torch.sqrt(torch.tensor(float(D)))),
    "rsqrt": spelled(lambda q, k: scores_of(q, k) * torch.rsqrt(torch.tensor(float(D)))),
    "q scaled": spelled(lambda q, k: scores_of(q * SCALE, k)),
    "k scaled": spelled(lambda q, k: scores_of(q, k * SCALE)),
    "q and k scaled": spelled(lambda q, k: scores_of(q * SCALE**0.5, k * SCALE**0.5)),
    "einsum": lambda q, k, v: torch.einsum(
        "bhts,bhsd->bhtd", (torch.einsum("bhtd,bhsd->bhts", q, k) * SCALE).softmax(-1), v
    ),
    "einsum, tokens first": tokens_first,
    "einsum, scores turned": turned_scores,
    "F.softmax": lambda q, k, v: F.softmax(scores_of(q, k) * SCALE, dim=-1) @ v,
    "F.softmax in float32": lambda q, k, v: F.softmax(scores_of(q, k) * SCALE, -1, dtype=torch.float32) @ v,
    "nn.Softmax": lambda q, k, v: nn.Softmax(-1)(scores_of(q, k) * SCALE) @ v,
    "log_softmax": lambda q, k, v: (scores_of(q, k) * SCALE).log_softmax(-1).exp() @ v,
    "q and k by broadcasting": spelled(lambda q, k: (q[:, :, :, None] * k[:, :, None]).sum(-1) * SCALE),
    "all by broadcasting": by_broadcasting,
}
FACTORS = {
    "q scaled": {"query": SCALE},
    "k scaled": {"key": SCALE},
    "q and k scaled": {"query": SCALE**0.5, "key": SCALE**0.5},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_attention_is_one_call_with_the_same_numbers(name: str) -> None:
    q, k, v = tensors()
    report = attncli.measure(SPELLINGS[name], q, k, v)
    call = only(report)
    assert_measured(report, scores_of(q, k) * SCALE)
    assert numbers(report, "dot_absmax") == pytest.approx(largest_dots(q, k), rel=1e-5)
    assert call.scale == pytest.approx(SCALE)
    assert call.factors == pytest.approx(FACTORS.get(name, {"scores": SCALE}))
    assert call.stored == ("scaled" if name in FACTORS else "raw")
    assert (call.normaliser, call.mask_kind, call.softmax_axis) == ("softmax", "none", "keys")
    assert (call.kind, call.head_dim, call.dtype, call.scores_dtype) == ("cross", D, "float32", "float32")
    assert call.difference is not None
    assert call.difference < 1e-5
    assert report.findings == ()
    assert report.exit_code() == 0


def test_the_result_of_every_spelling_is_what_it_was() -> None:
    q, k, v = tensors()
    expected = F.scaled_dot_product_attention(q, k, v)
    for name, spelling in SPELLINGS.items():
        seen: list[Tensor] = []
        attncli.measure(lambda q, k, v, s=spelling, out=seen: out.append(s(q, k, v)), q, k, v)
        got = seen[0] if seen[0].shape == expected.shape else seen[0].transpose(1, 2)
        assert torch.allclose(got, expected, atol=1e-6), name


# --- heads ------------------------------------------------------------------------------------------


def test_heads_folded_into_the_batch_are_that_batch_when_no_projection_tells_them_apart() -> None:
    q, k, v = tensors()
    call = only(attncli.measure(folded, q, k, v))
    assert (call.batch * call.heads, call.queries, call.keys) == (B * H, T, S)


def test_heads_in_a_python_loop_are_one_call_each() -> None:
    q, k, v = tensors()

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack(
            [(scores_of(q[:, h], k[:, h]) * SCALE).softmax(-1) @ v[:, h] for h in range(H)], dim=1
        )

    report = attncli.measure(loop, q, k, v)
    assert len(report.calls) == H
    for head in range(H):
        assert_measured(report, (scores_of(q, k) * SCALE)[:, head : head + 1], call=head)
        expected = largest_dots(q[:, head : head + 1], k[:, head : head + 1])
        assert numbers(report, "dot_absmax", head) == pytest.approx(expected)


def test_a_sequence_without_batch_and_heads_is_one_of_each() -> None:
    q, k, v = (x[0, 0] for x in tensors())
    report = attncli.measure(lambda q, k, v: (q @ k.T * SCALE).softmax(-1) @ v, q, k, v)
    assert_measured(report, (q @ k.T * SCALE)[None, None])


def test_a_single_query_is_measured_whichever_product_it_takes() -> None:
    q, k, v = tensors()
    one = (scores_of(q, k) * SCALE)[:, :, :1]
    matrix = attncli.measure(SPELLINGS["matmul"], q[:, :, :1], k, v)
    assert_measured(matrix, one)
    assert numbers(matrix, "dot_absmax") == pytest.approx(largest_dots(q[:, :, :1], k))
    vector = attncli.measure(
        lambda q, k, v: torch.mv(v.T, (torch.mv(k, q) * SCALE).softmax(-1)), q[0, 0, 0], k[0, 0], v[0, 0]
    )
    assert_measured(vector, one[:1, :1])
    assert numbers(vector, "dot_absmax") == pytest.approx(largest_dots(q[:1, :1, :1], k[:1, :1]))
    assert only(vector).query_sources == ("input q",)
    assert only(vector).key_sources == ("input k",)
    step = attncli.measure(
        lambda q, k, v: torch.bmm(
            (torch.bmm(k, q.unsqueeze(2)).squeeze(2) * SCALE).softmax(-1).unsqueeze(1), v
        ),
        *(q[:, 0, 0], k[:, 0], v[:, 0]),
    )
    assert_measured(step, one[:, :1])
    pooled = attncli.measure(
        lambda q, k, v: (((q[:, None] * k).sum(-1) * SCALE).softmax(-1)[..., None] * v).sum(1),
        *(q[:, 0, 0], k[:, 0], v[:, 0]),
    )
    assert_measured(pooled, one[:, :1])


class Projected(nn.Module):
    """Two heads of four features from eight; what is done with q, k and v is the test's."""

    def __init__(self, attend: Spelling, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.attend, self.heads = attend, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.q, self.k, self.v))
        return self.attend(q, k, v).flatten(-2)

    def scores(self, x: Tensor) -> Tensor:
        q, k = (part(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in (self.q, self.k))
        return scores_of(q, k) / math.sqrt(q.shape[-1])


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = (torch.einsum("bthd,bshd->btsh", q, k) / 2).softmax(2)
    return torch.einsum("btsh,bshd->bthd", probs, v)


def heads_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = (torch.einsum("bthd,bshd->bths", q, k) / 2).softmax(-1)
    return torch.einsum("bths,bshd->bthd", probs, v)


def heads_in_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    out = torch.bmm(torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=0.5).softmax(-1), v)
    return out.view(b, h, t, d).transpose(1, 2)


def heads_before_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, t, h, d = q.shape
    q, k, v = (x.permute(2, 0, 1, 3).reshape(h * b, t, d) for x in (q, k, v))
    out = ((q @ k.mT) / 2).softmax(-1) @ v
    return out.view(h, b, t, d).permute(1, 2, 0, 3)


@pytest.mark.parametrize("attend", [heads_last, heads_between, heads_in_the_batch, heads_before_the_batch])
def test_projections_tell_where_the_heads_are(attend: Spelling) -> None:
    model = Projected(attend).eval()
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    report = attncli.measure(model, x)
    assert_measured(report, model.scores(x).detach())
    q, k = (part(x).unflatten(-1, (2, 4)).transpose(1, 2).detach() for part in (model.q, model.k))
    assert numbers(report, "dot_absmax") == pytest.approx(largest_dots(q, k), rel=1e-5)
    call = only(report)
    assert (call.kind, call.scale) == ("self", 0.5)
    assert call.parameters == {"q": "q.weight", "k": "k.weight", "v": "v.weight"}


# --- masks ------------------------------------------------------------------------------------------


def filled_by_index(scores: Tensor, visible: Tensor) -> Tensor:
    scores = scores.clone()
    scores[:, :, ~visible] = -math.inf
    return scores


def added_in_place(scores: Tensor, visible: Tensor) -> Tensor:
    scores += torch.zeros(visible.shape).masked_fill(~visible, -math.inf)
    return scores


def lowest(dtype: torch.dtype = torch.float32) -> float:
    return torch.finfo(dtype).min


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": lambda s, m: s.masked_fill(~m, -math.inf),
    "masked_fill_": lambda s, m: s.masked_fill_(~m, -math.inf),
    "masked_fill with −1e9": lambda s, m: s.masked_fill(~m, -1e9),
    "where": lambda s, m: torch.where(m, s, torch.tensor(-math.inf)),
    "where with the smallest number": lambda s, m: torch.where(m, s, lowest()),
    "added": lambda s, m: s + torch.zeros(m.shape).masked_fill(~m, -math.inf),
    "added in place": added_in_place,
    "added, −1e4": lambda s, m: s + (1.0 - m.float()) * -10000.0,
    "triu": lambda s, m: s + torch.triu(torch.full(m.shape, -math.inf), S - T + 1),
    "by index": filled_by_index,
}


@pytest.mark.parametrize("name", MASKS)
def test_a_causal_mask_is_read_whichever_way_it_is_applied(name: str) -> None:
    q, k, v = tensors()
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    report = attncli.measure(
        lambda q, k, v: MASKS[name](scores_of(q, k) * SCALE, visible).softmax(-1) @ v, q, k, v
    )
    call = only(report)
    assert (call.mask_kind, call.causal_offset, call.window) == ("causal", 0, None)
    assert call.scale == pytest.approx(SCALE)
    assert_measured(report, (scores_of(q, k) * SCALE).masked_fill(~visible, -math.inf))
    assert numbers(report, "dot_absmax") == pytest.approx(largest_dots(q, k), rel=1e-5)


def test_a_mask_set_before_the_scale_is_a_mask() -> None:
    q, k, v = tensors()
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    report = attncli.measure(
        lambda q, k, v: (scores_of(q, k).masked_fill(~visible, -1e9) * SCALE).softmax(-1) @ v, q, k, v
    )
    assert only(report).mask_kind == "causal"
    assert_measured(report, (scores_of(q, k) * SCALE).masked_fill(~visible, -math.inf))


@pytest.mark.parametrize("offset", [-1, 1])
def test_a_causal_mask_that_is_off_by_one_says_by_how_much(offset: int) -> None:
    q, k, v = tensors()
    q = torch.cat((q, q[:, :, :2]), 2)
    visible = torch.ones(S, S, dtype=torch.bool).tril(offset)
    report = attncli.measure(
        lambda q, k, v: (scores_of(q, k) * SCALE).masked_fill(~visible, -1e9).softmax(-1) @ v, q, k, v
    )
    assert report.calls[0].causal_offset == offset


def test_a_sliding_window_and_padding_are_told_apart() -> None:
    x = tensors()[1]
    window = torch.ones(S, S, dtype=torch.bool).tril().triu(-2)
    run = lambda m: attncli.measure(  # noqa: E731
        lambda x: (scores_of(x, x) * SCALE).masked_fill(~m, -math.inf).softmax(-1) @ x, x
    )
    sliding = only(run(window))
    assert (sliding.mask_kind, sliding.window) == ("causal + sliding window", 3)
    padded = run(torch.arange(S) < 5)
    assert only(padded).mask_kind == "padding"
    assert numbers(padded, "rows_padded") == [2.0 * B] * H
    assert numbers(padded, "rows") == [5.0 * B] * H


# --- what stands between q·k and the softmax ---------------------------------------------------------


def test_a_soft_cap_is_read_and_is_no_scale() -> None:
    q, k, v = tensors()
    report = attncli.measure(
        lambda q, k, v: (torch.tanh(scores_of(q, k) * SCALE / 2.0) * 2.0).softmax(-1) @ v, q, k, v
    )
    call = only(report)
    assert (call.soft_cap, call.scale) == (2.0, pytest.approx(SCALE))
    assert_measured(report, torch.tanh(scores_of(q, k) * SCALE / 2) * 2)


def test_a_learned_temperature_counts_as_scale() -> None:
    class Tempered(Projected):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: q)
            self.temperature = nn.Parameter(torch.tensor(2.5))
            self.register_buffer("size", torch.tensor(4.0))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
            return (scores_of(q, k) * self.temperature / self.size).softmax(-1) @ v

    call = only(attncli.measure(Tempered(), torch.randn(3, 5, 8)))
    assert call.scale == pytest.approx(2.5 / 4)


# --- normalisers ------------------------------------------------------------------------------------


def divided(exps: Tensor, plus: float = 0.0) -> Tensor:
    return exps / (plus + exps.sum(-1, keepdim=True))


BY_HAND: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "exp / sum": (lambda s: divided(s.exp()), False),
    "F.normalize": (lambda s: F.normalize(s.exp(), p=1, dim=-1), False),
    "max": (lambda s: divided((s - s.max(-1, keepdim=True).values).exp()), True),
    "amax": (lambda s: divided((s - s.amax(-1, keepdim=True)).exp()), True),
    "logsumexp": (lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(), True),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_softmax_by_hand_is_a_softmax(name: str) -> None:
    q, k, v = tensors()
    normalise, subtracts = BY_HAND[name]
    report = attncli.measure(lambda q, k, v: normalise(scores_of(q, k) * SCALE) @ v, q, k, v)
    call = only(report)
    assert (call.normaliser, call.subtracts_maximum) == ("softmax by hand", subtracts)
    assert call.scale == pytest.approx(SCALE)
    assert_measured(report, scores_of(q, k) * SCALE)
    assert [finding.code for finding in report.findings] == ([] if subtracts else ["ATT405"])


def test_weights_that_are_divided_after_the_values_need_not_sum_to_one() -> None:
    q, k, v = tensors()

    def late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scores_of(q, k) * SCALE
        exps = (scores - scores.amax(-1, keepdim=True)).exp()
        return (exps @ v) / exps.sum(-1, keepdim=True)

    report = attncli.measure(late, q, k, v)
    assert only(report).normaliser == "softmax by hand"
    assert_measured(report, scores_of(q, k) * SCALE)
    assert report.findings == ()
    assert not [m for m in report.measurements if m.metric == "row_sum_max"]


def sparsemax(scores: Tensor) -> Tensor:
    """Martins and Astudillo 2016."""
    ordered = scores.sort(-1, descending=True).values
    sums = ordered.cumsum(-1) - 1
    places = torch.arange(1, scores.shape[-1] + 1)
    support = (places * ordered > sums).sum(-1, keepdim=True)
    return (scores - sums.gather(-1, support - 1) / support).clamp(min=0)


def test_another_normaliser_is_named_and_has_an_entropy_only_where_rows_sum_to_one() -> None:
    q, k, v = tensors()

    def measured(normalise: Callable[[Tensor], Tensor]) -> attncli.Report:
        return attncli.measure(lambda q, k, v: normalise(scores_of(q, k) * SCALE) @ v, q, k, v)

    for name, normalise in (
        ("sigmoid", lambda s: torch.sigmoid(s - math.log(S))),
        ("relu", torch.relu),
        ("relu", lambda s: torch.relu(s) / S),
        ("softmax plus one", lambda s: divided(s.exp(), 1.0)),
    ):
        report = measured(normalise)
        assert only(report).normaliser == name
        assert numbers(report, "entropy") == []
        assert numbers(report, "dot_absmax") == pytest.approx(largest_dots(q, k), rel=1e-5)
    report = measured(sparsemax)
    call = only(report)
    assert (call.normaliser, call.scale, call.mask_kind) == ("other", pytest.approx(SCALE), None)
    probs = sparsemax((scores_of(q, k) * SCALE).double())
    expected = float(torch.special.entr(probs).sum(-1).mean())
    got = numbers(report, "entropy")
    assert sum(got) / len(got) == pytest.approx(expected, abs=1e-5)
    assert numbers(report, "score_max") == []


# --- what is no attention ----------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.einsum("btd,edf->btef", x, self.weight)
        return torch.einsum("bte,btef->btf", self.gate(x).softmax(-1), parts)


class TokenHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.table.weight.T).softmax(-1)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.vector).softmax(-1)[..., None] * x).sum(1)


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.codes = nn.Linear(8, 8), nn.Parameter(torch.randn(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.project(x) @ self.codes.T).softmax(-1) @ self.codes


def contrastive(x: Tensor) -> Tensor:
    first, second = F.normalize(x[0], dim=-1), F.normalize(x[1], dim=-1)
    return (first @ second.T * 20).softmax(-1)


@pytest.mark.parametrize("model", [Experts(), TokenHead(), Pooling(), Codebook(), contrastive], ids=str)
def test_routers_heads_pooling_and_codebooks_are_no_attention(model: nn.Module) -> None:
    report = attncli.measure(model, torch.randn(2, 5, 8))
    assert report.calls == ()
    assert report.exit_code() == 3


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v),
        lambda q, k, v: (scores_of(q, k) * SCALE) @ v,
        lambda q, k, v: (scores_of(q, k) * torch.ones(T, S).tril()) @ v,
    ],
)
def test_linear_attention_is_a_note_and_no_entropy(attend: Spelling) -> None:
    report = attncli.measure(attend, *tensors())
    assert report.calls == ()
    assert any("linear attention" in note for note in report.notes)


# --- the wrong axis ---------------------------------------------------------------------------------


def test_a_softmax_over_the_queries_is_seen_and_found() -> None:
    model = Projected(
        lambda q, k, v: (
            (scores_of(q.transpose(1, 2), k.transpose(1, 2)) / 2).softmax(-2) @ v.transpose(1, 2)
        ).transpose(1, 2)
    )
    report = attncli.measure(model, torch.randn(3, 5, 8))
    assert only(report).softmax_axis == "queries"
    assert [finding.code for finding in report.findings] == ["ATT401"]


def test_attention_between_channels_has_channels_for_queries_and_keys() -> None:
    def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return ((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2)

    model = Projected(channels)
    x = torch.randn(3, 6, 8)
    report = attncli.measure(model, x)
    call = only(report)
    assert call.softmax_axis == "channels"
    assert (call.batch, call.heads, call.queries, call.keys) == (3, 2, 4, 4)
    q, k = (p(x).unflatten(-1, (2, 4)).permute(0, 2, 3, 1).detach() for p in (model.q, model.k))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    assert numbers(report, "entropy") == pytest.approx(entropies(scores), abs=1e-5)


def test_tensors_given_as_tokens_by_heads_to_a_fused_kernel_are_seen() -> None:
    report = attncli.measure(Projected(F.scaled_dot_product_attention), torch.randn(3, 5, 8))
    assert only(report).softmax_axis == "heads"
    assert [finding.code for finding in report.findings] == ["ATT401"]


def zeroed_before_as_well(scores: Tensor, mask: Tensor) -> Tensor:
    """As AllenNLP's masked_softmax has it."""
    probs = (scores * mask).softmax(-1) * mask
    return probs / (probs.sum(-1, keepdim=True) + 1e-13)


def masked_afterwards(scores: Tensor, mask: Tensor) -> Tensor:
    probs = scores.softmax(-1) * mask
    return probs / probs.sum(-1, keepdim=True)


@pytest.mark.parametrize("weights", [zeroed_before_as_well, masked_afterwards])
def test_weights_that_are_masked_and_normalised_again_are_those_of_a_mask_on_the_scores(
    weights: Callable[[Tensor, Tensor], Tensor],
) -> None:
    q, k, v = tensors()
    mask = torch.ones(T, S).tril(S - T)
    report = attncli.measure(lambda q, k, v: weights(scores_of(q, k) * SCALE, mask) @ v, 3 * q, k, v)
    call = only(report)
    assert (call.mask_kind, call.causal_offset, report.findings) == ("causal", 0, ())
    assert_measured(report, (scores_of(3 * q, k) * SCALE).masked_fill(mask == 0, -math.inf))


def test_unit_queries_and_keys_with_a_temperature_are_not_unscaled() -> None:
    q, k, v = tensors()

    def cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (20 * scores_of(F.normalize(q, dim=-1), F.normalize(k, dim=-1))).softmax(-1) @ v

    def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores_of(8 * q, k).softmax(-1) @ v

    assert "ATT410" not in [finding.code for finding in attncli.measure(cosine, q, k, v).findings]
    assert "ATT410" in [finding.code for finding in attncli.measure(unscaled, q, k, v).findings]
