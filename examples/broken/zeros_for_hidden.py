"""Zeros for what is to be hidden: 0 is a score like any other, so the softmax gives it its share.

A float mask of zeros and ones is added to the scores by the fused kernel (`broken`); by hand, hidden scores are
filled with 0 (`broken_by_hand`). attncli says so. Mend it with a bool mask, or by filling with -inf.
"""

import math

from multi_head import SelfAttention, features, later
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Broken(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shown = ~later(q.shape[-2])
        return scaled_dot_product_attention(q, k, v, attn_mask=shown.float())


class Healthy(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shown = ~later(q.shape[-2])
        return scaled_dot_product_attention(q, k, v, attn_mask=shown)


class ByHand(SelfAttention):
    fill = -math.inf

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.masked_fill(later(q.shape[-2]), self.fill).softmax(dim=-1) @ v


class BrokenByHand(ByHand):
    fill = 0.0


def broken() -> nn.Module:
    return Broken()


def broken_by_hand() -> nn.Module:
    return BrokenByHand()


def healthy() -> nn.Module:
    return Healthy()


def healthy_by_hand() -> nn.Module:
    return ByHand()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
