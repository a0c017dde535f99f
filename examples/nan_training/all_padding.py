"""An encoder whose second sample is all padding: its rows may attend to nothing, and their softmax is NaN.

attncli nan-check all_padding.py:build --input all_padding.py:batch
attncli nan-check all_padding.py:build --input all_padding.py:healthy_batch
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HEADS, TOKENS = 32, 4, 6


class Encoder(nn.Module):
    """Features (B, T, D) and which tokens are padding (B, T) → features (B, T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, features: Tensor, padding: Tensor) -> Tensor:
        normed = self.norm(features)
        context, _ = self.attention(normed, normed, normed, key_padding_mask=padding)
        result: Tensor = features + self.output(context)
        return result


def build() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


def batch() -> dict[str, Tensor]:
    return {"features": _features(), "padding": torch.tensor([[False] * TOKENS, [True] * TOKENS])}


def healthy_batch() -> dict[str, Tensor]:
    """The same with one real token in the second sample."""
    return {
        "features": _features(),
        "padding": torch.tensor([[False] * TOKENS, [False] + [True] * (TOKENS - 1)]),
    }


def _features() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
