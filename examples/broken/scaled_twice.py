"""Scaled twice: q is multiplied by 1/√D, and then the kernel (or the next line) does it again.

scaled_dot_product_attention scales by itself. Scores are 8 times too small, and every head is nearly even. attncli
says: q·k is scaled twice, and where. Mend it by scaling once.
"""

import math

from multi_head import SelfAttention, features
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Broken(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q / math.sqrt(q.shape[-1])
        return scaled_dot_product_attention(q, k, v)


class BrokenByHand(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1])
        scores = (q * scale) @ k.transpose(-2, -1) * scale
        return scores.softmax(dim=-1) @ v


class Healthy(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q / math.sqrt(q.shape[-1])
        return scaled_dot_product_attention(q, k, v, scale=1.0)


class HealthyByHand(SelfAttention):
    """The fourth root on each side makes one square root, as Whisper has it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = 1 / math.sqrt(math.sqrt(q.shape[-1]))
        scores = (q * scale) @ (k * scale).transpose(-2, -1)
        return scores.softmax(dim=-1) @ v


def broken() -> nn.Module:
    return Broken()


def broken_by_hand() -> nn.Module:
    return BrokenByHand()


def healthy() -> nn.Module:
    return Healthy()


def healthy_by_hand() -> nn.Module:
    return HealthyByHand()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
