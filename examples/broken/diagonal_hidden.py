"""A causal mask that is one too early: it hides each token from itself.

The first row is left without any key, so its softmax is even over keys it must not see (here), or NaN (with -inf).
attncli says: no token sees itself. Mend it with triu(diagonal=1) as what is hidden.
"""

import math

import torch
from multi_head import SelfAttention, features, later
from torch import Tensor, nn


class Causal(SelfAttention):
    hidden_from = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        hidden = later(q.shape[-2], self.hidden_from)
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1) @ v


class Broken(Causal):
    hidden_from = 0


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Causal()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
