"""No scale: scores are q·k as it is.

With 64 numbers a head, q·k spreads 8 times wider than a softmax can use: nearly every row lies on one key, and the
gradient vanishes. attncli says: q·k is not scaled. Mend it by dividing by the root of the head size.

A factor of 1 alone is no fault: T5 folds 1/√D into the weights of q (`folded`), and attncli is silent there.
"""

import math

import torch
from multi_head import SelfAttention, features
from torch import Tensor, nn


class Broken(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        return scores.softmax(dim=-1) @ v


class Healthy(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.softmax(dim=-1) @ v


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Healthy()


def folded() -> nn.Module:
    """No factor either, but weights of q that are 1/√D as large: as T5 is initialised."""
    model = Broken()
    with torch.no_grad():
        model.q_proj.weight *= 64**-0.5
    return model


def batch() -> tuple[Tensor, ...]:
    return (features(),)
