"""Texts → a batch, through the tokenizer that lies with the model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from attncli.errors import ModelError
from attncli.model.contracts import BatchOptions, Made, Runnable
from attncli.model.faults import user_code
from attncli.model.pretrained import longest, pretrained_inputs
from attncli.model.settings import decoder_start
from attncli.model.signature import Forward


@dataclass
class Texts(Made):
    tokens: tuple[tuple[str, ...], ...] | None = field(default=None)
    decoder_tokens: tuple[tuple[str, ...], ...] | None = field(default=None)


def text_batch(model: Runnable, forward: Forward, options: BatchOptions) -> Texts:
    """The texts as one batch, padded to the longest of them. Errors: ModelError."""
    if model.tokenizer is None:
        problem = "--text needs a tokenizer, and only Hugging Face folders and GGUF files come with one."
        raise ModelError(model.path, problem, "Give token ids with --input FILE or file.py:batch.")
    if "input_ids" not in forward.names:
        problem = f"the model takes no text: forward takes {forward.described()}."
        raise ModelError(model.path, problem, "Give what it takes with --input, or leave --text out.")
    if options.batch_size not in (None, len(options.text)):
        problem = f"--batch-size is {options.batch_size}, and --text is given {len(options.text)} times."
        raise ModelError(model.path, problem, "Repeat --text for more rows, or leave --batch-size out.")
    tokenizer = model.tokenizer()
    notes: list[str] = []
    padded = len(options.text) > 1
    if padded and tokenizer.pad_token is None:
        name = next(
            (name for name in ("eos_token", "unk_token", "bos_token") if getattr(tokenizer, name)), None
        )
        if name is None:
            problem = "its tokenizer has no token to pad texts of different length with."
            raise ModelError(model.path, problem, "Give one --text only.")
        tokenizer.pad_token = getattr(tokenizer, name)
        notes.append(f"padded with {tokenizer.pad_token}: the tokenizer has no padding token")
    limit = options.seq_len or longest(model.module)
    arguments: dict[str, Any] = {"truncation": True, "max_length": limit} if limit else {}
    remedy = "Give token ids with --input FILE instead of --text."
    with warnings.catch_warnings(), user_code(model.path, "tokenizing the text", remedy):
        warnings.simplefilter("ignore")
        encoded = tokenizer(list(options.text), padding=padded, return_tensors="pt", **arguments)
        full = [len(tokenizer(text)["input_ids"]) for text in options.text] if limit else []
    if limit and any(length > limit for length in full):
        notes.append(f"text cut to {limit} tokens")
    ids = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise ModelError(model.path, "the text has no token.", "Give a text that is not empty.")
    kwargs = {name: value for name, value in encoded.items() if name in forward.names or forward.any_keyword}
    if not padded:
        # A mask of ones says nothing, and would be another mask to report.
        kwargs.pop("attention_mask", None)
    module: Any = model.module
    if getattr(module.config, "is_encoder_decoder", False) and "decoder_input_ids" in forward.names:
        kwargs["decoder_input_ids"] = _shifted(ids, decoder_start(module.config))
        notes.append("the decoder was given the same text, one token later")
    others = pretrained_inputs(model.module, forward, options, given=kwargs)
    decoder_ids = kwargs.get("decoder_input_ids")
    decoder_tokens = None if decoder_ids is None else _readable(tokenizer, decoder_ids)
    return Texts((), others.kwargs, (*notes, *others.notes), _readable(tokenizer, ids), decoder_tokens)


def _readable(tokenizer: Any, ids: torch.Tensor) -> tuple[tuple[str, ...], ...]:
    """The tokens of ids (B, N), special ones included; a space is ▁ and a control character an escape.

    Byte-level tokenizers (GPT-2) write each byte of UTF-8 as a letter of their own, a space as Ġ; bytes that are no
    whole character stay escapes. An id without a token is None there and "?" here.
    """
    rows = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    bytewise = tokenizer.convert_tokens_to_string(["Ġ"]) == " "
    letters = _byte_letters() if bytewise else {}
    return tuple(tuple(_shown(token, letters) for token in row) for row in rows)


def _shown(token: Any, letters: dict[str, int]) -> str:
    if token is None:
        return "?"
    text = str(token)
    if letters and all(letter in letters for letter in text):
        text = bytes(letters[letter] for letter in text).decode("utf-8", "backslashreplace")
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def _byte_letters() -> dict[str, int]:
    """The letter of each byte. Source: `bytes_to_unicode` of GPT-2."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {
        **{chr(byte): byte for byte in printed},
        **{chr(256 + place): byte for place, byte in enumerate(others)},
    }


def _shifted(ids: torch.Tensor, start: int) -> torch.Tensor:
    """The decoder's inputs where the text itself is to be predicted. Shapes: (B, N) → (B, N)."""
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


# --- tables -------------------------------------------------------------------------------------------

_ESCAPES = {" ": "▁", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
