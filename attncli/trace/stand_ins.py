"""Attention kernels that only one kind of device has, computed by plain products on another.

A record of a run on a GPU calls kernels that a CPU has not, and the other way round. For the length of a replay they
get an implementation there: the same operator with the same operands, so that whoever watches sees the same run.
Dropout inside a kernel is left out, as its random numbers are another device's anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attncli.errors import AttncliError
from attncli.trace.program import Program

# q_BHTD, k_BHSD, v_BHSE: batch, heads, queries, keys, channels. H of k and v may be a divisor of that of q.


@contextmanager
def stand_ins(program: Program, device: torch.device, subject: str) -> Iterator[tuple[str, ...]]:
    """The names of the operators that `device` has not and that are replaced. Errors: AttncliError for others."""
    kind = device.type
    library = None
    replaced: list[str] = []
    if kind != program.device.partition(":")[0]:
        names = dict.fromkeys(one.name for one in program.operators if one.name.startswith("aten."))
        for name in names:
            namespace, operator, overload = name.split(".") if name.count(".") == 2 else ("", "", "")
            full = f"{namespace}::{operator}" + (f".{overload}" if overload != "default" else "")
            if not operator or not torch._C._dispatch_has_kernel(full) or _runs_on(full, kind):
                continue
            make = _MADE_OF_PRODUCTS.get(operator)
            if make is None:
                problem = f"it was recorded on {program.device}, and {name} does not run on {kind}."
                remedy = f"Replay it with --device {program.device.partition(':')[0]}."
                raise AttncliError(subject, problem, remedy)
            library = library or torch.library.Library("aten", "IMPL")
            library.impl(operator, make, kind.upper())
            replaced.append(operator)
    try:
        yield tuple(replaced)
    finally:
        if library is not None:
            library._destroy()


def _runs_on(name: str, kind: str) -> bool:
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in (kind.upper(), *_ANYWHERE)
    )


# --- attention ----------------------------------------------------------------------------------------


def _probs(
    q_BHTD: Tensor, k_BHSD: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, float]:
    """Probabilities and their logarithmic normaliser in float32, rows without a key 0, and the scale."""
    factor = scale if scale is not None else 1 / math.sqrt(q_BHTD.shape[-1])
    keys = _repeated(k_BHSD, q_BHTD.shape[-3]).float()
    scores_BHTS = (q_BHTD.float() @ keys.mT) * factor
    if bias is not None:
        if bias.dtype == torch.bool:
            scores_BHTS = scores_BHTS.masked_fill(~bias, -math.inf)
        else:
            scores_BHTS = scores_BHTS + bias.float()
    if is_causal:
        rows, columns = scores_BHTS.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=q_BHTD.device).tril()
        scores_BHTS = scores_BHTS.masked_fill(~seen, -math.inf)
    lse_BHT = torch.logsumexp(scores_BHTS, -1)
    empty = torch.isneginf(lse_BHT)
    probs_BHTS = torch.exp(scores_BHTS - lse_BHT.masked_fill(empty, 0.0)[..., None])
    return probs_BHTS, lse_BHT, factor


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    probs_BHTS, lse_BHT, _ = _probs(q, k, bias, is_causal, scale)
    return (probs_BHTS @ _repeated(v, q.shape[-3]).float()).to(q.dtype), lse_BHT


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of queries, keys, values and scores: dV = PᵀdO, dS = P∘(dOVᵀ − rows of P∘dOVᵀ summed)."""
    probs_BHTS, _, factor = _probs(q, k, bias, is_causal, scale)
    heads = q.shape[-3]
    dprobs_BHTS = grad.float() @ _repeated(v, heads).float().mT
    dscores_BHTS = probs_BHTS * (dprobs_BHTS - (probs_BHTS * dprobs_BHTS).sum(-1, keepdim=True))
    dq = dscores_BHTS @ _repeated(k, heads).float() * factor
    dk = _gathered(dscores_BHTS.mT @ q.float() * factor, k.shape[-3])
    dv = _gathered(probs_BHTS.mT @ grad.float(), v.shape[-3])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dscores_BHTS


def _repeated(x_BKSD: Tensor, heads: int) -> Tensor:
    own = x_BKSD.shape[-3]
    return x_BKSD if own == heads or not own else x_BKSD.repeat_interleave(heads // own, -3)


def _gathered(x_BHSD: Tensor, kv_heads: int) -> Tensor:
    """The gradient of keys or values that several query heads share."""
    heads = x_BHSD.shape[-3]
    return x_BHSD if heads == kv_heads else x_BHSD.unflatten(-3, (kv_heads, heads // kv_heads)).sum(-3)


def _fitted(dscores: Tensor, bias: Tensor | None) -> Tensor | None:
    """The gradient of a bias that was broadcast."""
    return (
        None if bias is None or bias.dtype == torch.bool else dscores.sum_to_size(bias.shape).to(bias.dtype)
    )


def _none() -> Tensor:
    return torch.empty(0)


def _flash(q: Any, k: Any, v: Any, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):  # type: ignore[no-untyped-def]
    out, lse = _attention(q, k, v, None, is_causal, scale)
    seed = torch.zeros(2, dtype=torch.int64)
    return out, lse, _none(), _none(), q.shape[-2], k.shape[-2], seed, _none(), _none()


def _flash_backward(  # type: ignore[no-untyped-def]
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    return _gradients(grad_out, query, key, value, None, is_causal, scale)[:3]


def _efficient(  # type: ignore[no-untyped-def]
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    out, lse = _attention(query, key, value, attn_bias, is_causal, scale)
    seed = torch.zeros((), dtype=torch.int64)
    return out, lse, seed, seed.clone()


def _efficient_backward(  # type: ignore[no-untyped-def]
    grad_out, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p,
    grad_input_mask, is_causal=False, *, scale=None,
):  # fmt: skip
    dq, dk, dv, ds = _gradients(grad_out, query, key, value, attn_bias, is_causal, scale)
    return dq, dk, dv, _fitted(ds, attn_bias) if grad_input_mask[3] else None


def _cudnn(  # type: ignore[no-untyped-def]
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False,
    *, scale=None,
):  # fmt: skip
    out, lse = _attention(query, key, value, attn_bias, is_causal, scale)
    seed = torch.zeros((), dtype=torch.int64)
    return out, lse, _none(), _none(), query.shape[-2], key.shape[-2], seed, seed.clone(), _none()


def _cudnn_backward(  # type: ignore[no-untyped-def]
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k,
    max_q, max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    return _gradients(grad_out, query, key, value, attn_bias, is_causal, scale)[:3]


def _on_cpu(  # type: ignore[no-untyped-def]
    query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None
):
    return _attention(query, key, value, attn_mask, is_causal, scale)


def _on_cpu_backward(  # type: ignore[no-untyped-def]
    grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    return _gradients(grad_out, query, key, value, attn_mask, is_causal, scale)[:3]


# --- tables -------------------------------------------------------------------------------------------

# Kernels for every device, and operators that only choose a device.
_ANYWHERE = (
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
    "BackendSelect",
)

_MADE_OF_PRODUCTS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _on_cpu,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _on_cpu_backward,
}
