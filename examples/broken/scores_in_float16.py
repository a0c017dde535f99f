"""Scores in float16, cast to float32 only for the softmax: by then the product has overflowed.

One channel of q and k holds a large bias, as in some trained models: a constant in all scores, which no softmax minds,
but float16 ends at 65 504. attncli says: q·k reaches 70 000 and overflows float16. Mend it by casting q and k, or by
scaling q before the product.
"""

import math

import torch
from multi_head import SelfAttention, features, joined, split
from torch import Tensor, nn


class Biased(SelfAttention):
    """The last channel of each head is nothing but bias: −265 in q, 265 in k."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        bias = torch.zeros(q.shape[-1])
        bias[-1] = 265.0
        return joined(self.o_proj, self.attend(q * (bias == 0) - bias, k * (bias == 0) + bias, v))


class Broken(Biased):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.half() @ k.half().transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.float().softmax(dim=-1) @ v


class Healthy(Biased):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.half(), k.half()
        scores = (q.float() / math.sqrt(q.shape[-1])) @ k.float().transpose(-2, -1)
        return scores.softmax(dim=-1) @ v


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Healthy()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
