"""Scaled by the width of the model, √256, instead of the size of one head, √64.

Scores are √heads times too small, so heads can hardly tell keys apart. attncli says: q·k is scaled by 1/√256, the
width of all 4 heads, instead of 1/√64. Mend it by dividing by the root of the head size.
"""

import math

from multi_head import WIDTH, SelfAttention, features
from torch import Tensor, nn


class Broken(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH)
        return scores.softmax(dim=-1) @ v


class Healthy(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.softmax(dim=-1) @ v


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Healthy()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
