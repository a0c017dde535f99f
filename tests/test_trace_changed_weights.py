"""Weights that are changed after the softmax, softmaxes in parts, and axes that are no keys: as the model uses them."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import attncli

B, H, T, D = 2, 4, 16, 8
SCALE = D**-0.5
CAUSAL_TT = torch.ones(T, T).tril().bool()


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, generator=generator) * 1.5 for _ in range(3))
    return q, k, v


def entropies(report: attncli.Report) -> list[float]:
    return [float(row.value) for row in report.measurements if row.metric == "entropy"]  # type: ignore[arg-type]


def expected(probs_BHTS: Tensor) -> list[float]:
    probs_BHTS = probs_BHTS.double()
    return torch.special.xlogy(probs_BHTS, probs_BHTS).sum(-1).neg().mean((0, 2)).tolist()


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * SCALE


def test_steps_in_place_of_a_softmax_by_hand_are_read_before_they_are_overwritten(qkv):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = scores_of(q, k).masked_fill(~CAUSAL_TT, -1e9)
        s = s - s.amax(-1, keepdim=True)
        s.exp_()
        s /= s.sum(-1, keepdim=True)
        return s @ v

    report = attncli.measure(attention, *qkv)
    probs = scores_of(*qkv[:2]).masked_fill(~CAUSAL_TT, -math.inf).softmax(-1)
    assert entropies(report) == pytest.approx(expected(probs), abs=1e-5)
    assert (report.calls[0].mask_kind, report.findings) == ("causal", ())


def test_powers_of_two_are_turned_into_nats(qkv):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT * (SCALE * math.log2(math.e))
        p = torch.exp2(s - s.amax(-1, keepdim=True))
        return (p / p.sum(-1, keepdim=True)) @ v

    report = attncli.measure(attention, *qkv)
    scores = scores_of(*qkv[:2])
    assert entropies(report) == pytest.approx(expected(scores.softmax(-1)), abs=1e-5)
    assert report.calls[0].scale == pytest.approx(SCALE, rel=1e-5)
    largest = max(row.value for row in report.measurements if row.metric == "score_max")
    assert largest == pytest.approx(float(scores.max()), rel=1e-5)


def masked_and_renormalised(s: Tensor) -> Tensor:
    p = s.softmax(-1) * CAUSAL_TT
    return p / p.sum(-1, keepdim=True)


def twice(s: Tensor) -> Tensor:
    return s.softmax(-1).softmax(-1)


@pytest.mark.parametrize(("weights", "mask_kind"), [(masked_and_renormalised, "causal"), (twice, "none")])
def test_the_numbers_are_those_of_the_weights_that_were_used(qkv, weights, mask_kind):
    report = attncli.measure(lambda q, k, v: weights(scores_of(q, k)) @ v, *qkv)
    assert entropies(report) == pytest.approx(expected(weights(scores_of(*qkv[:2]))), abs=1e-5)
    assert report.calls[0].mask_kind == mask_kind


def test_a_softmax_in_chunks_of_keys_is_not_observed(qkv):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        peak = torch.full((B, H, T, 1), -math.inf)
        total, out = torch.zeros(B, H, T, 1), torch.zeros(B, H, T, D)
        for keys, values in zip(k.split(8, dim=2), v.split(8, dim=2), strict=True):
            s = scores_of(q, keys)
            new = torch.maximum(peak, s.amax(-1, keepdim=True))
            p, shrink = (s - new).exp(), (peak - new).exp()
            total, out, peak = total * shrink + p.sum(-1, keepdim=True), out * shrink + p @ values, new
        return out / total

    report = attncli.measure(attention, *qkv)
    assert (report.verdict, report.exit_code()) == ("unobserved", 3)
    assert {call.reason for call in report.calls} == {
        "its softmax runs over the keys in chunks, of which each is a part of a row"
    }


def test_a_row_that_is_divided_after_the_values_is_whole(qkv):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (scores_of(q, k) - 5).exp()
        return v + (p @ v) / p.sum(-1, keepdim=True)

    report = attncli.measure(attention, *qkv)
    assert entropies(report) == pytest.approx(expected(scores_of(*qkv[:2]).softmax(-1)), abs=1e-5)
    assert report.calls[0].explained


def test_a_softmax_with_a_one_in_its_sum_is_named_and_right(qkv):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = scores_of(q, k)
        peak = s.amax(-1, keepdim=True)
        e = (s - peak).exp()
        return (e / (e.sum(-1, keepdim=True) + (-peak).exp())) @ v

    report = attncli.measure(attention, *qkv)
    assert (report.calls[0].normaliser, report.calls[0].keys) == ("softmax plus one", T)
    assert [finding.code for finding in report.findings if finding.severity != "note"] == []


def test_a_difference_of_two_softmaxes_is_two_calls_without_a_finding(qkv):
    q, k, v = qkv
    generator = torch.Generator().manual_seed(1)
    q2, k2 = (torch.randn(B, H, T, D, generator=generator) for _ in range(2))

    def attention(q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, v: Tensor) -> Tensor:
        return (scores_of(q, k).softmax(-1) - 0.3 * scores_of(q2, k2).softmax(-1)) @ v

    report = attncli.measure(attention, q, k, q2, k2, v)
    first, second = (scores_of(a, b).softmax(-1) for a, b in ((q, k), (q2, k2)))
    assert sorted(entropies(report)) == pytest.approx(sorted(expected(first) + expected(second)), abs=1e-5)
    assert report.findings == ()


def test_functional_dropout_on_the_scores_is_seen_in_training(qkv):
    report = attncli.measure(lambda q, k, v: functional.dropout(scores_of(q, k), 0.1).softmax(-1) @ v, *qkv)
    assert [finding.code for finding in report.findings] == ["ATT403"]


class Heads(nn.Module):
    """Four heads; `how` computes attention from q, k, v of (B, T, H, D)."""

    def __init__(self, how) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(H * D, 3 * H * D)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(B, T, H, D) for part in self.qkv(x).chunk(3, -1))
        return self.how(q, k, v).reshape(B, T, H * D)


def by_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_heads(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


def by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1) @ v


def over_the_first_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return (scores_of(q, k).softmax(1) @ v).transpose(1, 2)


@pytest.mark.parametrize("how", [by_heads, over_the_first_axis])
def test_attention_over_heads_instead_of_tokens_is_found(how):
    x = torch.randn(B, T, H * D, generator=torch.Generator().manual_seed(0))
    report = attncli.measure(Heads(how), x)
    assert report.calls[0].softmax_axis == "heads"
    assert [finding.code for finding in report.findings] == ["ATT401"]
    healthy = attncli.measure(Heads(by_tokens), x)
    assert [finding.code for finding in healthy.findings if finding.severity != "note"] == []


def test_nan_in_the_queries_is_no_clean_report(qkv):
    q, k, v = qkv
    q = q.clone()
    q[1, 2, 3, 4] = math.nan
    for attention in (
        lambda q, k, v: scores_of(q, k).softmax(-1) @ v,
        functional.scaled_dot_product_attention,
    ):
        report = attncli.measure(attention, q, k, v)
        assert [(f.code, f.head) for f in report.findings if f.severity == "error"] == [("ATT506", 2)]
        assert report.exit_code() == 1


def test_learned_queries_make_it_cross_attention():
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seeds = nn.Parameter(torch.randn(1, 5, 16))
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.seeds.expand(x.shape[0], -1, -1), x, x)[0]

    assert attncli.measure(Pool().eval(), torch.randn(2, 7, 16)).calls[0].kind == "cross"
