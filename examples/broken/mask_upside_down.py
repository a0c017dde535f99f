"""A mask of the wrong sign: True means "hide" to masked_fill and nn.MultiheadAttention, "show" to the fused kernel.

Each token then sees its future alone, and the last one nothing at all. Or an additive mask adds where it should
take away (`broken_added`): the softmax lies on what is to be hidden. attncli says so. Mend it by inverting the mask.
"""

import math

from multi_head import SelfAttention, features, later
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Broken(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = later(q.shape[-2])
        return scaled_dot_product_attention(q, k, v, attn_mask=hidden)


class Healthy(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = later(q.shape[-2])
        return scaled_dot_product_attention(q, k, v, attn_mask=~hidden)


class Added(SelfAttention):
    large = -1e9

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return (scores + self.large * later(q.shape[-2])).softmax(dim=-1) @ v


class BrokenAdded(Added):
    large = 1e9


def broken() -> nn.Module:
    return Broken()


def broken_added() -> nn.Module:
    return BrokenAdded()


def healthy() -> nn.Module:
    return Healthy()


def healthy_added() -> nn.Module:
    return Added()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
