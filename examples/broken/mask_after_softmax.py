"""The mask after the softmax: hidden keys get no weight, but have already taken their share.

Row 0 of 24 keeps a 24th of its weight on average. attncli says: a mask is applied after the softmax, and what the
rows sum to. Mend it by setting hidden scores to -inf before the softmax. Dividing each row by its sum again
(`renormalised`) is right as well.
"""

import math

from multi_head import SelfAttention, features, later
from torch import Tensor, nn


class Broken(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = scores.softmax(dim=-1).masked_fill(later(q.shape[-2]), 0.0)
        return weights @ v


class Healthy(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(later(q.shape[-2]), -float("inf")).softmax(dim=-1)
        return weights @ v


class Renormalised(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = scores.softmax(dim=-1).masked_fill(later(q.shape[-2]), 0.0)
        return weights / weights.sum(dim=-1, keepdim=True) @ v


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Healthy()


def renormalised() -> nn.Module:
    return Renormalised()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
