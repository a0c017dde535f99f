"""A softmax written out without subtracting the maximum: exp overflows from 88.7 on, and Inf/Inf is NaN.

It works until the scores have grown. attncli says so before that. Mend it with torch.softmax, or by subtracting the
maximum of each row, which changes nothing else.
"""

import math

from multi_head import SelfAttention, features
from torch import Tensor, nn


class Broken(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        grown = scores.exp()
        return grown / grown.sum(dim=-1, keepdim=True) @ v


class Healthy(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        grown = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        return grown / grown.sum(dim=-1, keepdim=True) @ v


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Healthy()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
