"""Softmax over the queries: dim=-2 (or 2 of four axes) instead of the last one.

Each key shares one unit of attention among the queries, so the rows that weigh the values sum to anything. No shape
tells, since there are as many queries as keys. attncli says: the softmax runs over the queries.
Mend it with dim=-1.

Slot attention takes the softmax over its queries on purpose and divides each row by its sum: `slots`.
"""

import math

from multi_head import SelfAttention, features
from torch import Tensor, nn


class Broken(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.softmax(dim=-2) @ v


class Healthy(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.softmax(dim=-1) @ v


class Slots(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        shares = scores.softmax(dim=-2)
        return shares / shares.sum(dim=-1, keepdim=True) @ v


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Healthy()


def slots() -> nn.Module:
    return Slots()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
