# ruff: noqa: N815  (fields carry shape suffixes)
"""Fused attention kernels: what each calls its arguments, read through its schema.

A row of `KERNELS` says how one operator lays out its tensors. Arguments are bound by the schema's names, so
kernels of devices that are not here are read the same way, and can be tested anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attncli.trace.statistics import FusedCall
from attncli.trace.tape import Ran


class Kernel(NamedTuple):
    """`order`: how q, k and v and the output are laid out. `corner`: where a causal mask is aligned if T ≠ S."""

    label: str
    order: Literal["BHTD", "BTHD"] = "BHTD"
    corner: Literal["top left", "bottom right"] = "top left"


class Fused(NamedTuple):
    """One fused call as its arguments say. `call` None: it cannot be taken apart; `reason` says why."""

    kernel: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    call: FusedCall | None
    output_BHTV: Tensor | None
    dropout: float
    reason: str = ""


def fused(name: str, ran: Ran) -> Fused:
    """Reads one call of the operator `name`, which must be a key of `KERNELS`."""
    kernel = KERNELS[name]
    given = _flex_arguments(ran) if name == "flex_attention" else _bound(ran)
    query, key, value = (_first(given, names) for names in (_QUERY, _KEY, _VALUE))
    output = ran.outputs[0]
    dropout = float(given.get("dropout_p") or 0.0)

    def unread(reason: str) -> Fused:
        return Fused(kernel.label, query, key, value, output, None, None, dropout, reason)

    if any(given.get(argument) is not None for argument in _RAGGED):
        return unread("sequences of several lengths are packed into one row")
    if kernel.order == "BTHD":
        q, k, v, out = (tensor.transpose(1, 2) for tensor in (query, key, value, output))
    else:
        q, k, v, out = query, key, value, output
    if q.dim() == 3:
        q, k, v, out = (tensor.unsqueeze(0) for tensor in (q, k, v, out))
    if q.dim() != 4 or k.dim() != 4 or q.shape[1] % max(1, k.shape[1]):
        return unread(f"q has the shape {tuple(query.shape)}, k {tuple(key.shape)}")
    queries, keys = q.shape[2], k.shape[2]
    offset = 0 if kernel.corner == "top left" else keys - queries
    kind = given.get("custom_mask_type")
    causal = bool(given.get("is_causal") or given.get("causal") or kind in (1, 2))
    if kind == 2:
        offset = keys - queries
    scale = given.get("scale", given.get("softmax_scale"))
    mask = _first(given, _MASK)
    slopes = given.get("alibi_slopes")
    if slopes is not None:
        mask = _slopes(slopes, q, keys)
    call = FusedCall(
        q,
        k,
        v,
        scale=float(scale) if scale is not None else 1 / math.sqrt(q.shape[-1]),
        mask=mask,
        causal_offset=offset if causal else None,
        window=_window(given),
        soft_cap=float(given["softcap"]) if given.get("softcap") else None,
        bias=given.get("score_mod"),
        visible=given.get("mask_mod"),
    )
    return Fused(kernel.label, query, key, value, output, call, out, dropout)


def _bound(ran: Ran) -> dict[str, Any]:
    """Arguments by the names of the schema, with its defaults."""
    given: dict[str, Any] = {}
    for position, argument in enumerate(ran.func._schema.arguments):
        if argument.name in ran.kwargs:
            given[argument.name] = ran.kwargs[argument.name]
        elif not argument.kwarg_only and position < len(ran.args):
            given[argument.name] = ran.args[position]
        else:
            given[argument.name] = argument.default_value
    return given


def _flex_arguments(ran: Ran) -> dict[str, Any]:
    """A higher-order operator has no schema: query, key, value, score_mod, block_mask, scale, options, buffers."""
    names = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_buffers")
    given = {**dict(zip((*names, "mask_buffers"), ran.args, strict=False)), **ran.kwargs}
    score_mod, block_mask = given.get("score_mod"), given.get("block_mask")
    score_buffers = tuple(given.get("score_buffers") or given.get("score_mod_other_buffers") or ())
    mask_buffers = tuple(given.get("mask_buffers") or given.get("mask_mod_other_buffers") or ())
    mask_mod = block_mask[-1] if isinstance(block_mask, tuple) and callable(block_mask[-1]) else None
    if score_mod is not None and score_buffers:
        given["score_mod"] = lambda s, b, h, i, j: score_mod(s, b, h, i, j, *score_buffers)
    if mask_mod is not None:
        given["mask_mod"] = lambda b, h, i, j: mask_mod(b, h, i, j, *mask_buffers)
    return given


def _first(given: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)


def _window(given: Mapping[str, Any]) -> tuple[int | None, int | None] | None:
    """(left, right) reach around the diagonal; −1 and None are no limit."""
    sides = [given.get("window_size_left"), given.get("window_size_right")]
    if given.get("window_size"):  # one number: how many keys back a query sees, itself included
        return int(given["window_size"]) - 1, None
    limits = [int(side) if isinstance(side, int) and side >= 0 else None for side in sides]
    return (limits[0], limits[1]) if limits != [None, None] else None


def _slopes(slopes: Tensor, query: Tensor, keys: int) -> Tensor:
    """ALiBi as an additive mask (B or 1, H, T, S): −slope·|i + S − T − j|."""
    queries = query.shape[2]
    rows = torch.arange(queries, device=query.device)[:, None] + keys - queries
    distance = (rows - torch.arange(keys, device=query.device)).abs()
    per_head = slopes.float().reshape(-1, slopes.shape[-1])
    return -per_head[:, :, None, None] * distance


# --- tables -------------------------------------------------------------------------------------------

KERNELS: dict[str, Kernel] = {
    "_scaled_dot_product_flash_attention_for_cpu": Kernel("flash (CPU)"),
    "_scaled_dot_product_flash_attention": Kernel("flash (CUDA)"),
    "_scaled_dot_product_efficient_attention": Kernel("efficient (CUDA)"),
    "_scaled_dot_product_cudnn_attention": Kernel("cuDNN"),
    "_scaled_dot_product_fused_attention_overrideable": Kernel("fused (accelerator)"),
    "_scaled_dot_product_attention_math_for_mps": Kernel("fused (MPS)"),
    "_flash_attention_forward": Kernel("flash (CUDA)", "BTHD", "bottom right"),
    "_efficient_attention_forward": Kernel("efficient (CUDA)", "BTHD"),
    "_flash_attn_forward": Kernel("flash_attn", "BTHD", "bottom right"),
    "flex_attention": Kernel("flex_attention"),
}

_QUERY, _KEY, _VALUE = ("query", "q"), ("key", "k"), ("value", "v")
_MASK = ("attn_mask", "attn_bias", "bias")
_RAGGED = ("cum_seq_q", "cum_seq_k", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "seqlen_k")
