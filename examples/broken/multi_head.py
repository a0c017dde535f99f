"""Multi-head attention up to the point where it goes wrong: a subclass says how q, k and v become the output.

Shapes: B batch, T queries, S keys, E model width, H heads, D head size (E = H·D).
"""

import torch
from torch import Tensor, nn

WIDTH, HEADS = 256, 4
# Scores / √D then have a standard deviation of about 1.2, as in trained models.
GAIN = 1.1


class MultiHead(nn.Module):
    """Projections in, projection out; `attend` is what the examples differ in. Weights are the same each time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        for projection, gain in (
            (self.q_proj, GAIN),
            (self.k_proj, GAIN),
            (self.v_proj, 1.0),
            (self.o_proj, 1.0),
        ):
            nn.init.normal_(projection.weight, std=gain / WIDTH**0.5, generator=generator)
        self.eval()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, D), k and v (B, H, S, D) → (B, H, T, D)."""
        raise NotImplementedError


class SelfAttention(MultiHead):
    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        q, k, v = (split(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return joined(self.o_proj, self.attend(q, k, v))


def split(x: Tensor) -> Tensor:
    """(B, T, E) → (B, H, T, D)."""
    return x.view(*x.shape[:-1], HEADS, -1).transpose(1, 2)


def joined(projection: nn.Module, x: Tensor) -> Tensor:
    """(B, H, T, D) → (B, T, E), projected."""
    projected: Tensor = projection(x.transpose(1, 2).flatten(-2))
    return projected


def later(tokens: int, diagonal: int = 1) -> Tensor:
    """(T, T), True where a key lies `diagonal` or more behind the query."""
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(diagonal)


def features(batch: int = 2, tokens: int = 24, seed: int = 1) -> Tensor:
    """(B, T, E), each element with a standard deviation of 1, as behind a norm."""
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
