"""A small attention model that reads a written date, character by character, and writes it as ISO 8601.

    >>> translate("Sunday, the 3rd of May, 1998")
    '1998-05-03'

Self-attention is fused (`scaled_dot_product_attention`). The decoder's attention to the encoder is written
out in its classical form, softmax(q·kᵀ / √D)·v, so that both kinds can be looked at in one model.

Shapes: B batch, S source characters, T target characters, E model width, H heads, D head size (E = H·D),
N = B·H (heads folded into the batch), V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

WEIGHTS = Path(__file__).with_name("dates.safetensors")
ALPHABET = " ',-./0123456789abcdefghijklmnopqrstuvwxyz"
PAD, START, FIRST_CHARACTER = 0, 1, 2
MAX_LENGTH = 40
ISO_LENGTH = len("1998-05-03")


@dataclass(frozen=True)
class Config:
    """The settings that the weights are saved with, under the names the field gives them."""

    d_model: int = 64
    num_attention_heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    ffn_dim: int = 96
    vocab_size: int = FIRST_CHARACTER + len(ALPHABET)
    max_position_embeddings: int = MAX_LENGTH


def build() -> nn.Module:
    """The model with the weights shipped beside this file, in evaluation mode."""
    with safe_open(WEIGHTS, framework="pt") as file:
        config = Config(**json.loads(file.metadata()["config"]))
    model = DateTranslator(config)
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Arguments for `forward`: dates of 8 to 33 characters, so that padding is real."""
    texts = ("3.5.1998", "May 3, 1998", "Sunday 3 May 98", "Wednesday, the 1st of April, 1998")
    answers = ("1998-05-03", "1998-05-03", "1998-05-03", "1998-04-01")
    return {"input_ids": encode(texts), "decoder_input_ids": shifted_right(encode(answers))}


def translate(text: str) -> str:
    """The date that `text` names, in ISO form. ValueError for a character outside the alphabet."""
    return translations(_shipped(), [text])[0]


@torch.inference_mode()
def translations(model: nn.Module, texts: Sequence[str]) -> list[str]:
    """The ISO form of each text, one most probable character after the other."""
    source_BS = encode(texts)
    target_BT = torch.full((len(texts), 1), START)
    for _ in range(ISO_LENGTH):
        logits_BTV = model(source_BS, target_BT)
        target_BT = torch.cat([target_BT, logits_BTV[:, -1:].argmax(dim=2)], dim=1)
    return [decode(ids_T) for ids_T in target_BT[:, 1:]]


class DateTranslator(nn.Module):
    """Ids of the text (B, S) and of the answer so far (B, T) → logits of its next characters (B, T, V)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        source_BSE, target_BTE = self.embed_tokens(input_ids), self.embed_tokens(decoder_input_ids)
        visible_BS = input_ids != PAD
        encoder_outputs_BSE = self.encoder(source_BSE, visible_BS)
        logits_BTV: Tensor = self.lm_head(self.decoder(target_BTE, encoder_outputs_BSE, visible_BS))
        return logits_BTV


class Encoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, hidden_BSE: Tensor, visible_BS: Tensor) -> Tensor:
        hidden_BSE = hidden_BSE + self.embed_positions.weight[: hidden_BSE.shape[1]]
        for layer in self.layers:
            hidden_BSE = layer(hidden_BSE, visible_BS)
        normed_BSE: Tensor = self.layer_norm(hidden_BSE)
        return normed_BSE


class EncoderLayer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.d_model)

    def forward(self, hidden_BSE: Tensor, visible_BS: Tensor) -> Tensor:
        hidden_BSE = hidden_BSE + self.self_attn(self.self_attn_layer_norm(hidden_BSE), visible_BS)
        updated_BSE: Tensor = hidden_BSE + self.fc2(self.fc1(self.final_layer_norm(hidden_BSE)).relu())
        return updated_BSE


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(ISO_LENGTH, config.d_model)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, hidden_BTE: Tensor, encoder_outputs_BSE: Tensor, visible_BS: Tensor) -> Tensor:
        hidden_BTE = hidden_BTE + self.embed_positions.weight[: hidden_BTE.shape[1]]
        for layer in self.layers:
            hidden_BTE = layer(hidden_BTE, encoder_outputs_BSE, visible_BS)
        normed_BTE: Tensor = self.layer_norm(hidden_BTE)
        return normed_BTE


class DecoderLayer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn = SelfAttention(config)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = EncoderAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.d_model)

    def forward(self, hidden_BTE: Tensor, encoder_outputs_BSE: Tensor, visible_BS: Tensor) -> Tensor:
        hidden_BTE = hidden_BTE + self.self_attn(self.self_attn_layer_norm(hidden_BTE))
        normed_BTE = self.encoder_attn_layer_norm(hidden_BTE)
        hidden_BTE = hidden_BTE + self.encoder_attn(normed_BTE, encoder_outputs_BSE, visible_BS)
        updated_BTE: Tensor = hidden_BTE + self.fc2(self.fc1(self.final_layer_norm(hidden_BTE)).relu())
        return updated_BTE


class Attention(nn.Module):
    """The four projections, which both kinds of attention have."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.d_model // config.num_attention_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def heads(self, projected_BTE: Tensor) -> Tensor:
        """(B, T, E) → (B, H, T, D)."""
        batch_size, length, _ = projected_BTE.shape
        return projected_BTE.view(batch_size, length, self.num_heads, self.head_dim).transpose(1, 2)

    def output(self, context_BHTD: Tensor) -> Tensor:
        """(B, H, T, D) → (B, T, E)."""
        output_BTE: Tensor = self.out_proj(context_BHTD.transpose(1, 2).flatten(2))
        return output_BTE


class SelfAttention(Attention):
    """Fused attention of a sequence to itself: to its visible positions, or causal where none are named."""

    def forward(self, hidden_BTE: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        q_BHTD = self.heads(self.q_proj(hidden_BTE))
        k_BHTD = self.heads(self.k_proj(hidden_BTE))
        v_BHTD = self.heads(self.v_proj(hidden_BTE))
        causal = visible_BT is None
        mask_B11T = None if visible_BT is None else visible_BT[:, None, None, :]
        return self.output(
            scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask_B11T, is_causal=causal)
        )


class EncoderAttention(Attention):
    """Attention of the decoder to the encoder's outputs, written out. Heads are folded into the batch."""

    def forward(self, decoder_hidden_BTE: Tensor, encoder_outputs_BSE: Tensor, visible_BS: Tensor) -> Tensor:
        q_NTD = self.heads(self.q_proj(decoder_hidden_BTE)).flatten(0, 1)
        k_NSD = self.heads(self.k_proj(encoder_outputs_BSE)).flatten(0, 1)
        v_NSD = self.heads(self.v_proj(encoder_outputs_BSE)).flatten(0, 1)
        padding_N1S = ~visible_BS.repeat_interleave(self.num_heads, dim=0)[:, None, :]

        scores_NTS = torch.bmm(q_NTD, k_NSD.transpose(1, 2)) / self.head_dim**0.5
        scores_NTS = scores_NTS.masked_fill(padding_N1S, float("-inf"))
        probs_NTS = torch.softmax(scores_NTS, dim=2)
        context_NTD = torch.bmm(probs_NTS, v_NSD)

        return self.output(context_NTD.view(-1, self.num_heads, *context_NTD.shape[1:]))


def encode(texts: Sequence[str]) -> Tensor:
    """Ids of the characters in lower case, padded on the right to the longest text: (B, S) int64."""
    for text in texts:
        if not 0 < len(text) <= MAX_LENGTH or not set(text.lower()) <= set(ALPHABET):
            raise ValueError(f"{text!r}: expected 1 to {MAX_LENGTH} characters out of {ALPHABET!r}")
    rows = [torch.tensor([FIRST_CHARACTER + ALPHABET.index(c) for c in text.lower()]) for text in texts]
    return pad_sequence(rows, batch_first=True, padding_value=PAD)


def decode(ids_T: Tensor) -> str:
    """The characters of one row of ids; "?" for an id that is no character."""
    return "".join(ALPHABET[i - FIRST_CHARACTER] if i >= FIRST_CHARACTER else "?" for i in ids_T.tolist())


def shifted_right(target_BT: Tensor) -> Tensor:
    """What the decoder reads when it is to write `target_BT`: the start sign, then all but the last."""
    return torch.cat([torch.full_like(target_BT[:, :1], START), target_BT[:, :-1]], dim=1)


@cache
def _shipped() -> nn.Module:
    return build()
