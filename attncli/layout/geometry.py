"""Shapes of one site → widths of q, k, v and o, and what shapes alone say about heads.

Weights are read as [out, in] (`nn.Linear`), [in, out] (`Conv1D`, a flax kernel), [out, in, 1, 1] (1×1
convolution), [in, heads, d] (XLNet, flax DenseGeneral) or [heads, in, d] (TransformerLens).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from attncli.layout.names import Site
from attncli.records import Tensor


class Matrix(NamedTuple):
    """One projection as a matrix: `rows` outputs, `columns` inputs. `heads` where the shape has its own axis."""

    rows: int
    columns: int
    out_axis: Literal[0, 1]
    heads: int | None = None
    # [heads, in, d] and stacked layers cannot be sliced as a flat matrix.
    sliceable: bool = True
    stacked: int | None = None


class Geometry(NamedTuple):
    """Output widths per projection (elements). None: not there, or not separable without more facts."""

    q: int | None
    k: int | None
    v: int | None
    q_in: int | None
    k_in: int | None
    o_in: int | None
    fused: int | None
    out_axis: Literal[0, 1]
    sliceable: bool
    heads_hint: int | None
    head_dim_hint: int | None
    hint_source: str
    stacked: int | None = None


def geometry(site: Site) -> Geometry:
    """Widths and hints of `site`; the split of a fused tensor is filled in as far as shapes go."""
    roles = site.roles
    matrices = {role: matrix(role, tensor, roles) for role, tensor in roles.items() if role in _MATRICES}
    q, k, v = matrices.get("q_b") or matrices.get("q"), matrices.get("k"), matrices.get("v")
    fused = matrices.get("qkv") or matrices.get("kv") or matrices.get("qk")
    lead = matrices.get("q_a") or q or fused or k or v
    output = matrices.get("o")
    heads_hint, head_dim_hint, source = _hints(site, matrices)
    key_side = k or matrices.get("kv") or matrices.get("qk") or matrices.get("qkv") or v
    return Geometry(
        q=q.rows if q else None,
        k=k.rows if k else None,
        v=v.rows if v else None,
        q_in=lead.columns if lead and "q_learned" not in roles else None,
        k_in=key_side.columns if key_side else None,
        o_in=output.columns if output else None,
        fused=fused.rows if fused else None,
        out_axis=next((m.out_axis for m in (fused, lead) if m is not None), 0),
        sliceable=all(m.sliceable for role, m in matrices.items() if role != "o"),
        heads_hint=heads_hint,
        head_dim_hint=head_dim_hint,
        hint_source=source,
        stacked=next((m.stacked for m in matrices.values() if m.stacked), None),
    )


def matrix(role: str, tensor: Tensor, roles: Mapping[str, Tensor]) -> Matrix:
    """`tensor` as a matrix with rows = outputs."""
    shape = tensor.shape
    if len(shape) < 2:
        return Matrix(rows=math.prod(shape), columns=1, out_axis=0, sliceable=False)
    if len(shape) == 3 and shape[2] > 1 and role in ("q", "k", "v", "o", "added_q", "added_k", "added_v"):
        return _three_axes(role, tensor)
    if len(shape) == 3 and shape[2] > 1:
        # One tensor for a whole stack of layers: [layers, out, in].
        return Matrix(rows=shape[1], columns=shape[2], out_axis=0, sliceable=False, stacked=shape[0])
    if tensor.name.endswith(".kernel") and len(shape) == 2:
        return Matrix(rows=shape[1], columns=shape[0], out_axis=1)
    rows, columns = shape[0], math.prod(shape[1:])
    if len(shape) > 2 and columns != shape[1]:
        # A real convolution (3×3, depthwise): outputs are rows, but it is no plain projection.
        return Matrix(rows=rows, columns=shape[1], out_axis=0, sliceable=False)
    if _is_in_out(role, tensor, roles, rows, columns):
        return Matrix(rows=columns, columns=rows, out_axis=1)
    return Matrix(rows=rows, columns=columns, out_axis=0)


def _three_axes(role: str, tensor: Tensor) -> Matrix:
    a, b, c = tensor.shape
    leaf = (
        tensor.name.rsplit(".", 1)[-1]
        if not tensor.name.endswith((".weight", ".kernel"))
        else tensor.name.split(".")[-2]
    )
    if tensor.name.endswith(".weight") and not leaf.startswith("W_"):
        # Expert-parallel projections (JetMoE): [experts, out, in].
        return Matrix(rows=b, columns=c, out_axis=0, sliceable=False)
    if leaf.startswith("W_"):
        if role == "o":
            return Matrix(rows=c, columns=a * b, out_axis=1, heads=a, sliceable=False)
        return Matrix(rows=a * c, columns=b, out_axis=1, heads=a, sliceable=False)
    if role == "o" and not tensor.name.endswith(".kernel"):
        return Matrix(rows=a, columns=b * c, out_axis=0, heads=b, sliceable=False)
    if role == "o":
        return Matrix(rows=c, columns=a * b, out_axis=1, heads=a, sliceable=False)
    return Matrix(rows=b * c, columns=a, out_axis=1, heads=b)


def _is_in_out(role: str, tensor: Tensor, roles: Mapping[str, Tensor], rows: int, columns: int) -> bool:
    """Whether a 2-D weight is stored [in, out]: its bias is as long as its second axis, or its ratio says so."""
    bias = roles.get(f"{role}_bias")
    if bias is not None and len(bias.shape) == 1 and rows != columns:
        return bias.shape[0] == columns and bias.shape[0] != rows
    leaf = tensor.name.rsplit(".", 2)[-2] if "." in tensor.name else tensor.name
    if leaf == "c_attn" and rows != columns:
        return columns in (3 * rows, 2 * rows)
    if leaf in ("c_proj", "q_attn"):
        sibling = roles.get("qkv") or roles.get("kv")
        if sibling is not None and sibling is not tensor:
            name = "qkv" if "qkv" in roles else "kv"
            return matrix(name, sibling, roles).out_axis == 1
    return False


def _hints(site: Site, matrices: Mapping[str, Matrix]) -> tuple[int | None, int | None, str]:
    """(heads, head size, tensor that says so) from shapes that can mean nothing else, the strongest first."""
    roles = site.roles
    heads: int | None = None
    head_dim: int | None = None
    source = ""
    own_axis = next(((role, m.heads) for role, m in matrices.items() if m.heads and role in ("q", "o")), None)
    if own_axis:
        heads, source = own_axis[1], roles[own_axis[0]].name
    for role in ("pos_bias", "q_norm", "k_norm", "lambda", "rel_pos"):
        tensor = roles.get(role)
        if tensor is None or tensor.name.endswith(".bias"):
            continue
        shape = tensor.shape
        if role in ("pos_bias", "q_norm") and len(shape) == 2 and shape[1] > 1:
            heads, head_dim, source = heads or shape[0], head_dim or shape[1], source or tensor.name
        elif role in ("q_norm", "k_norm") and len(shape) == 1 and head_dim is None:
            wide = matrices.get("q" if role == "q_norm" else "k")
            full = wide.rows if wide else None
            if (
                shape[0] > 1
                and "kv_a" not in roles
                and not (full is not None and shape[0] == full)
                and not ("qkv" in roles and matrices.get("o") and shape[0] == matrices["o"].columns)
            ):
                head_dim, source = shape[0], source or tensor.name
        elif role == "lambda" and len(shape) == 1 and shape[0] > 1 and head_dim is None:
            head_dim, source = shape[0], source or tensor.name
        elif role == "rel_pos" and len(shape) == 2 and head_dim is None:
            head_dim, source = shape[1], source or tensor.name
    for role in ("relative_bias", "logit_scale", "sinks", "attention_biases"):
        tensor = roles.get(role)
        if heads is not None or tensor is None:
            continue
        shape = tensor.shape
        count = None
        if role == "relative_bias" and len(shape) == 2 and shape[0] != shape[1]:
            # [buckets, H]; GGUF keeps the same order once its axes are reversed.
            count = shape[1] if shape[1] < shape[0] else (shape[0] if "rel_b" in tensor.name else None)
        elif (
            (role == "logit_scale" and len(shape) == 3 and shape[1:] == (1, 1))
            or (role == "sinks" and len(shape) == 1)
            or (role == "attention_biases" and len(shape) == 2)
        ):
            count = shape[0]
        if count and count > 1:
            heads, source = count, tensor.name
    return heads, head_dim, source


_MATRICES = frozenset(
    {
        "q",
        "k",
        "v",
        "o",
        "qkv",
        "kv",
        "qk",
        "q_a",
        "q_b",
        "kv_a",
        "kv_b",
        "k_b",
        "v_b",
        "added_q",
        "added_k",
        "added_v",
        "added_o",
    }
)
