"""How heads lie in the scores: folded, grouped over shared keys, in windows. Counts and entropies are the same."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from traced import assert_measured, only

import attncli

B, H, T, D = 2, 4, 16, 8
WIDTH = H * D
SCALE = 1 / math.sqrt(D)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Self-attention with `kv_heads`; `attend` gets q (B, T, H·D), k and v (B, T, K·D)."""

    def __init__(self, attend: Attend, kv_heads: int = H) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * D) for heads in (H, kv_heads, kv_heads))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.q(x), self.k(x), self.v(x))


def features() -> Tensor:
    return torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def scores_of(model: Model, x: Tensor) -> Tensor:
    """(B, H, T, T) of plain attention with as many heads."""
    q = model.q(x).view(B, T, H, D).transpose(1, 2)
    k = model.k(x).view(B, T, -1, D).transpose(1, 2)
    return torch.matmul(q, k.repeat_interleave(H // k.shape[1], 1).transpose(-1, -2)) * SCALE


# --- shared keys --------------------------------------------------------------------------------------


def softmax_of(scores: Tensor) -> Tensor:
    return (scores * SCALE).softmax(-1)


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.view(B, T, 2, 2, D), k.view(B, T, 2, D), v.view(B, T, 2, D)
    probs = softmax_of(torch.einsum("btkgd,bskd->bkgts", q, k))
    return torch.einsum("bkgts,bskd->btkgd", probs, v)


def grouped_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(B, T, 2, 2, D).permute(0, 2, 3, 1, 4)
    k, v = (x.view(B, T, 2, 1, D).permute(0, 2, 3, 1, 4) for x in (k, v))
    return softmax_of(q @ k.transpose(-1, -2)) @ v


def grouped_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(B, T, H, D).transpose(1, 2)
    k, v = (x.view(B, T, 2, D).transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))
    return softmax_of(q @ k.transpose(-1, -2)) @ v


def folded_heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(B, T, H, D).transpose(1, 2).reshape(B, H * T, D)
    return softmax_of(q @ k.transpose(-1, -2)) @ v


def folded_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_of(q.view(B, T * H, D) @ k.transpose(-1, -2)) @ v


def broadcast_over_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(B, T, H, D).transpose(1, 2)
    return softmax_of(q @ k[:, None].transpose(-1, -2)) @ v[:, None]


def each_its_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(B, T, H, D) for x in (q, k, v))
    return torch.einsum("bhts,bshd->bthd", softmax_of(torch.einsum("bthd,bshd->bhts", q, k)), v)


@pytest.mark.parametrize(
    ("attend", "kv_heads"),
    [
        (grouped_einsum, 2),
        (grouped_broadcast, 2),
        (grouped_repeated, 2),
        (folded_heads_first, 1),
        (folded_tokens_first, 1),
        (broadcast_over_all, 1),
        (each_its_own, H),
    ],
)
def test_heads_that_ask_the_same_keys_are_counted_once_as_kv_heads(attend: Attend, kv_heads: int) -> None:
    model, x = Model(attend, kv_heads), features()
    report = attncli.measure(model, x)
    assert_measured(report, scores_of(model, x))
    assert only(report).kv_heads == kv_heads


def test_kv_heads_of_tensors_without_a_projection_follow_from_the_product() -> None:
    q, k, v = torch.randn(B, 2, 2, T, D), torch.randn(B, 2, T, D), torch.randn(B, 2, T, D)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probs = softmax_of(torch.einsum("bhgtd,bhsd->bhgts", q, k))
        return torch.einsum("bhgts,bhsd->bhgtd", probs, v)

    call = only(attncli.measure(attend, q, k, v))
    assert (call.batch, call.heads, call.kv_heads, call.queries) == (B, H, 2, T)


# --- heads elsewhere ----------------------------------------------------------------------------------


def test_windows_that_slide_over_the_keys_are_keys_and_each_token_a_query() -> None:
    def windows(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 0, 2, 2)).unfold(2, 5, 1)

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(B, T, H, D).transpose(1, 2) for x in (q, k, v))
        probs = softmax_of(torch.einsum("bhtd,bhtdw->bhtw", q, windows(k)))
        return torch.einsum("bhtw,bhtdw->bhtd", probs, windows(v))

    model, x = Model(local), features()
    report = attncli.measure(model, x)
    call = only(report)
    assert (call.batch, call.heads, call.queries, call.keys) == (B, H, T, 5)
    assert call.softmax_axis == "keys"
    assert report.findings == ()


@pytest.mark.parametrize("split", [lambda x: x.split(D, -1), lambda x: x.chunk(H, -1)])
def test_heads_that_are_split_off_and_joined_along_the_batch_are_heads(
    split: Callable[[Tensor], tuple[Tensor, ...]],
) -> None:
    def stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.cat(split(x), 0) for x in (q, k, v))
        return torch.cat((softmax_of(q @ k.transpose(-1, -2)) @ v).split(B, 0), -1)

    model, x = Model(stacked), features()
    assert_measured(attncli.measure(model, x), scores_of(model, x))


def test_a_cache_and_batches_that_are_joined_make_no_heads() -> None:
    def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.cat(x.view(B, T, H, D).transpose(1, 2).split(T // 2, 2), 2) for x in (q, k, v))
        q, k, v = (torch.cat((x[:1], x[1:]), 0) for x in (q, k, v))
        return softmax_of(q @ k.transpose(-1, -2)) @ v

    model, x = Model(joined), features()
    assert_measured(attncli.measure(model, x), scores_of(model, x))
