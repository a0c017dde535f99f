"""Dropout on the scores, before the softmax, instead of on the weights.

A dropped score becomes 0, an ordinary score that hides nothing, and the others grow: training sees another softmax
than evaluation. attncli says so in either mode, since a dropout module stands there. Mend it by dropping weights.
"""

import math

from multi_head import SelfAttention, features
from torch import Tensor, nn


class Broken(SelfAttention):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.eval()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        dropped: Tensor = self.dropout(scores)
        return dropped.softmax(dim=-1) @ v


class Healthy(SelfAttention):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.eval()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights: Tensor = self.dropout(scores.softmax(dim=-1))
        return weights @ v


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Healthy()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
