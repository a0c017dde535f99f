"""The plain attention of an encoder-decoder, as free functions: no heads, no projections, no parameters.

Three decoder steps read five encoder outputs, so the weights are (2, 3, 5). `swapped` asks with the encoder instead:
its context has the encoder's five steps. attncli says: the queries come from the encoder.
"""

import torch
from torch import Tensor, nn

BATCH, TARGET, SOURCE, HIDDEN = 2, 3, 5, 16


def attention(decoder_hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
    """(2, 3, D), (2, 5, D) → (2, 3, D)."""
    hidden_dim = decoder_hidden.shape[-1]
    scores = torch.bmm(decoder_hidden, encoder_outputs.transpose(1, 2)) / hidden_dim**0.5
    weights = torch.softmax(scores, dim=2)
    return weights @ encoder_outputs


def swapped(decoder_hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
    """(2, 3, D), (2, 5, D) → (2, 5, D)."""
    hidden_dim = decoder_hidden.shape[-1]
    scores = torch.bmm(encoder_outputs, decoder_hidden.transpose(1, 2)) / hidden_dim**0.5
    weights = torch.softmax(scores, dim=2)
    return weights @ decoder_hidden


class Plain(nn.Module):
    def forward(self, decoder_hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
        return attention(decoder_hidden, encoder_outputs)


class Swapped(nn.Module):
    def forward(self, decoder_hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
        return swapped(decoder_hidden, encoder_outputs)


def broken() -> nn.Module:
    return Swapped()


def healthy() -> nn.Module:
    return Plain()


def batch() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(BATCH, TARGET, HIDDEN, generator=generator),
        torch.randn(BATCH, SOURCE, HIDDEN, generator=generator),
    )
