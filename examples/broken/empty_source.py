"""Rows without a key: one sample of the batch has a source that is all padding.

Its softmax is 0/0, so the sample is NaN, and after the next mean the whole batch. attncli says: rows may attend to no
key. Mend it by leaving such samples out, or by showing them one key.
"""

import math

import torch
from multi_head import MultiHead, features, joined, split
from torch import Tensor, nn


class CrossAttention(MultiHead):
    def forward(self, tgt: Tensor, memory: Tensor, memory_key_padding_mask: Tensor) -> Tensor:
        """(B, T, E), (B, S, E), (B, S) with True on padding → (B, T, E)."""
        q, k, v = split(self.q_proj(tgt)), split(self.k_proj(memory)), split(self.v_proj(memory))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        hidden = self.hidden(memory_key_padding_mask)[:, None, None, :]
        return joined(self.o_proj, scores.masked_fill(hidden, -float("inf")).softmax(dim=-1) @ v)

    def hidden(self, padding: Tensor) -> Tensor:
        raise NotImplementedError


class Broken(CrossAttention):
    def hidden(self, padding: Tensor) -> Tensor:
        return padding


class Healthy(CrossAttention):
    def hidden(self, padding: Tensor) -> Tensor:
        return padding & ~padding.all(dim=-1, keepdim=True)


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Healthy()


def batch() -> tuple[Tensor, ...]:
    lengths = torch.tensor([20, 0, 9])
    padding = torch.arange(20) >= lengths[:, None]
    return features(3, 12), features(3, 20, seed=2), padding
