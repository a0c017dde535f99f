"""An encoder-decoder with attention, written out by hand, whose scores are not scaled.

It learns to reverse a sequence. `Reverser(scaled=False)` is the classical form without 1/√D and with a softmax
that does not subtract the row's maximum: as training sharpens the attention the scores grow past 88, exp overflows
in float32 and the loss becomes NaN. `Reverser(scaled=True)` trains on.

Shapes: B batch, S source tokens, T target tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

VOCABULARY, START, WIDTH = 12, 1, 192


class Attention(nn.Module):
    """Decoder states (B, T, D) and encoder states (B, S, D) → contexts (B, T, D)."""

    def __init__(self, width: int, scaled: bool) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.scale = 1 / math.sqrt(width) if scaled else 1.0

    def forward(self, decoder_BTD: Tensor, encoder_BSD: Tensor) -> Tensor:
        scores_BTS = torch.bmm(self.query(decoder_BTD), encoder_BSD.transpose(1, 2)) * self.scale
        exponentials_BTS = scores_BTS.exp()
        weights_BTS = exponentials_BTS / exponentials_BTS.sum(-1, keepdim=True)
        return torch.bmm(weights_BTS, encoder_BSD)


class Reverser(nn.Module):
    """Ids of a sequence (B, S) and of the answer so far (B, T) → logits (B, T, V)."""

    def __init__(self, scaled: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.attention = Attention(width, scaled)
        self.output = nn.Linear(2 * width, VOCABULARY)

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        encoder_BSD, state = self.encoder(self.embedding(source_BS))
        decoder_BTD, _ = self.decoder(self.embedding(target_BT), state)
        context_BTD = self.attention(decoder_BTD, encoder_BSD)
        logits_BTV: Tensor = self.output(torch.cat([context_BTD, decoder_BTD], dim=-1))
        return logits_BTV


def build() -> nn.Module:
    """The healthy model, with fresh weights."""
    torch.manual_seed(0)
    return Reverser(scaled=True)


def batch(size: int = 64, length: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Source (B, S), decoder input (B, T) and answer (B, T), by torch's own random numbers."""
    source_BS = torch.randint(2, VOCABULARY, (size, length))
    answer_BT = source_BS.flip(1)
    start_B1 = torch.full((size, 1), START)
    return source_BS, torch.cat([start_B1, answer_BT[:, :-1]], dim=1), answer_BT


def inputs() -> tuple[Tensor, Tensor]:
    """A batch for the command line: `--input reverser.py:inputs`."""
    torch.manual_seed(1)
    return batch()[:2]
