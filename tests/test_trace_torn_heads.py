"""Heads that a view cut across tokens are found; every way to split and fold heads that keeps tokens whole is not."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name
from torch import Tensor, nn
from traced import only

import attncli

B, WIDTH = 2, 32
SIZES = [(16, 4), (10, 4), (6, 8), (7, 2), (12, 8)]
Cut = Callable[[Tensor, int], Tensor]


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Model(nn.Module):
    """Self-attention whose q, k and v are cut into heads by `cut`."""

    def __init__(self, heads: int, cut: Cut, attend: Callable[..., Tensor] = by_hand) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.heads, self.cut, self.attend = heads, cut, attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.cut(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return self.attend(q, k, v)


def viewed(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], heads, x.shape[1], -1)


def split(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


def torn(report: attncli.Report) -> list[float | int | str | None]:
    return [row.value for row in report.measurements if row.metric == "tokens_per_head"]


@pytest.mark.parametrize(("tokens", "heads"), SIZES)
@pytest.mark.parametrize("attend", [by_hand, F.scaled_dot_product_attention])
def test_a_view_without_a_transpose_is_found(tokens: int, heads: int, attend: Callable[..., Tensor]) -> None:
    report = attncli.measure(Model(heads, viewed, attend), torch.randn(B, tokens, WIDTH))
    assert [finding.name for finding in report.findings] == ["heads-cut-across-tokens"]
    call = only(report)
    assert (call.batch, call.heads, call.queries, call.keys) == (B, heads, tokens, tokens)
    assert torn(report) == [tokens / heads]


def test_a_batch_of_one_and_a_projection_of_flat_tokens_are_found_too() -> None:
    def flat(x: Tensor, heads: int) -> Tensor:
        return x.reshape(-1, x.shape[-1]).reshape(x.shape[0], heads, x.shape[1], -1)

    def both(x: Tensor, heads: int) -> Tensor:
        """q and k in one view, as for a qkv projection."""
        return x.reshape(x.shape[0], 1, heads, x.shape[1], -1)[:, 0]

    x = torch.randn(1, 12, WIDTH)
    for cut in (viewed, flat, both):
        assert torn(attncli.measure(Model(4, cut), x)) == [3.0]


def test_queries_and_keys_that_are_rotated_afterwards_are_found() -> None:
    def rotated(x: Tensor, heads: int) -> Tensor:
        x = viewed(x, heads)
        first, second = x.chunk(2, -1)
        return x * 0.8 + torch.cat((-second, first), -1) * 0.6

    assert torn(attncli.measure(Model(4, rotated), torch.randn(B, 12, WIDTH))) == [3.0]


@pytest.mark.parametrize(("tokens", "heads"), [*SIZES, (4, 4), (16, 16)])
@pytest.mark.parametrize("attend", [by_hand, F.scaled_dot_product_attention])
def test_heads_split_off_the_features_are_not(tokens: int, heads: int, attend: Callable[..., Tensor]) -> None:
    report = attncli.measure(Model(heads, split, attend), torch.randn(B, tokens, WIDTH))
    only(report)
    assert torn(report) == []


def folded(x: Tensor, heads: int) -> Tensor:
    return split(x, heads).flatten(0, 1)


def sequence_first(x: Tensor, heads: int) -> Tensor:
    """(T, B, E), heads beside the batch, as nn.MultiheadAttention has them."""
    turned = x.transpose(0, 1).contiguous()
    return turned.view(turned.shape[0], turned.shape[1] * heads, -1).transpose(0, 1)


def windows(x: Tensor, heads: int) -> Tensor:
    """Windows of four tokens in the batch."""
    return split(x.reshape(-1, 4, x.shape[-1]), heads)


def windows_behind_heads(x: Tensor, heads: int) -> Tensor:
    return split(x, heads).reshape(x.shape[0], heads, -1, 4, x.shape[-1] // heads)


def tokens_of_heads(x: Tensor, heads: int) -> Tensor:
    """Every head of every token a token of its own: one long sequence."""
    return x.reshape(x.shape[0], x.shape[1] * heads, -1)


@pytest.mark.parametrize("cut", [folded, sequence_first, windows, windows_behind_heads, tokens_of_heads])
def test_other_ways_to_lay_heads_keep_tokens_whole(cut: Cut) -> None:
    for tokens, heads in ((16, 4), (8, 4), (12, 8)):
        report = attncli.measure(Model(heads, cut), torch.randn(B, tokens, WIDTH))
        only(report)
        assert torn(report) == []


def test_as_many_tokens_as_heads_without_a_transpose_is_attention_over_heads() -> None:
    report = attncli.measure(Model(8, viewed), torch.randn(B, 8, WIDTH))
    assert [finding.name for finding in report.findings] == ["softmax-over-wrong-axis"]
