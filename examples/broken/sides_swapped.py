"""Cross-attention the wrong way round: the encoder asks, and the decoder answers.

The output has the encoder's length, and no token of the decoder reads the source. Or only the values come from the
wrong side (`broken_values`), which no shape tells where both are of one length. attncli says which side q, k and v come
from. Mend it: q of the decoder's states, k and v of the encoder's outputs.
"""

import math

from multi_head import MultiHead, features, joined, split
from torch import Tensor, nn


class CrossAttention(MultiHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return joined(self.o_proj, scores.softmax(dim=-1) @ v)


class Broken(CrossAttention):
    def forward(self, decoder_hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
        q, k, v = self.q_proj(encoder_outputs), self.k_proj(decoder_hidden), self.v_proj(decoder_hidden)
        return self.attend(split(q), split(k), split(v))


class BrokenValues(CrossAttention):
    def forward(self, decoder_hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
        q, k, v = self.q_proj(decoder_hidden), self.k_proj(encoder_outputs), self.v_proj(decoder_hidden)
        return self.attend(split(q), split(k), split(v))


class Healthy(CrossAttention):
    def forward(self, decoder_hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
        q, k, v = self.q_proj(decoder_hidden), self.k_proj(encoder_outputs), self.v_proj(encoder_outputs)
        return self.attend(split(q), split(k), split(v))


def broken() -> nn.Module:
    return Broken()


def broken_values() -> nn.Module:
    return BrokenValues()


def healthy() -> nn.Module:
    return Healthy()


def batch() -> tuple[Tensor, ...]:
    return features(tokens=16), features(tokens=16, seed=2)
