"""Heads cut with view(B, H, T, D) alone: a view keeps the order in memory, so a head holds neighbouring tokens.

What stands where a head's tokens should be are pieces of tokens, and a token of one slice never sees another slice.
attncli says so. Mend it by splitting the features and moving the heads: view(B, T, H, D).transpose(1, 2).
"""

from multi_head import HEADS, MultiHead, SelfAttention, features
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Broken(MultiHead):
    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (p(x).view(batch, HEADS, tokens, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed: Tensor = self.o_proj(scaled_dot_product_attention(q, k, v).reshape(x.shape))
        return mixed


class Healthy(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Healthy()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
