"""What each operator is to the dataflow of attention: a product, a normaliser, a view, a factor …

One row per operator, by its name without overload. An operator that is not listed is "other": values flow
through it, but no factor and no axis can be followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Op:
    """`name` without namespace, overload and trailing underscore ("add" for aten.add_.Tensor).

    `writes`: positions of the arguments that it writes to. `heard`: whether the listener wants to know.
    """

    name: str
    kind: str = "other"
    writes: tuple[int, ...] = ()
    full_name: str = ""

    @property
    def product(self) -> bool:
        return self.kind in ("product", "convolution")

    @property
    def random(self) -> bool:
        return self.kind == "random"

    @property
    def heard(self) -> bool:
        return self.kind in _HEARD


@cache
def op_of(func: Any) -> Op:
    """The row of an operator. Higher-order operators have no schema: they are known by name alone."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        name = func.name() if callable(getattr(func, "name", None)) else str(func)
        return Op(name, KINDS.get(name, "other"), (), name)
    full = schema.name
    writes = tuple(
        position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    bare = full.partition("::")[2]
    name = bare[:-1] if bare.endswith("_") and not bare.endswith("__") else bare
    kind = KINDS.get(full, KINDS.get(name, "other"))
    return Op(name, kind, writes or WRITES_UNSAID.get(name, ()), full)


def _rows(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


# --- tables -------------------------------------------------------------------------------------------

KINDS: dict[str, str] = {
    **_rows("product", "mm bmm addmm baddbmm mv addmv dot matmul linear _linear addbmm inner outer einsum"),
    **_rows("product", "_addmm_activation _scaled_mm _int_mm _grouped_mm _weight_int8pack_mm"),
    **_rows("product", "_weight_int4pack_mm linear_unary linear_binary mkldnn_linear"),
    **_rows("convolution", "convolution _convolution convolution_overrideable mkldnn_convolution"),
    **_rows("convolution", "thnn_conv2d slow_conv3d _slow_conv2d_forward conv2d conv1d conv3d"),
    **_rows("softmax", "_softmax _safe_softmax softmax _masked_softmax _sparse_softmax"),
    **_rows("log softmax", "_log_softmax log_softmax"),
    **_rows("factor", "mul div true_divide multiply divide"),
    **_rows("sum", "add sub rsub subtract"),
    **_rows("negative", "neg negative"),
    **_rows("cap", "tanh"),
    **_rows("fill", "masked_fill where triu tril masked_scatter index_put"),
    **_rows("clamp", "clamp clamp_min clamp_max maximum minimum nan_to_num hardtanh"),
    **_rows("dropout", "dropout native_dropout bernoulli _fused_dropout feature_dropout"),
    **_rows("same", "clone contiguous _to_copy to detach alias lift_fresh lift_fresh_copy copy positive"),
    **_rows("same", "view_as_real view_as_complex _conj conj resolve_conj dequantize"),
    **_rows("reshape", "view reshape _unsafe_view _reshape_alias flatten unflatten"),
    **_rows("reshape", "unsqueeze squeeze unsafe_view view_copy reshape_copy"),
    **_rows("permute", "permute transpose t swapaxes movedim numpy_T permute_copy transpose_copy"),
    **_rows("expand", "expand expand_as broadcast_to expand_copy"),
    **_rows("slice", "slice select narrow split split_with_sizes chunk unbind unsafe_split tensor_split"),
    **_rows("slice", "unsafe_chunk unsafe_split_with_sizes index_select gather index roll flip"),
    **_rows("slice", "slice_copy select_copy split_copy split_with_sizes_copy unbind_copy slice_scatter"),
    **_rows("repeat", "repeat repeat_interleave tile"),
    **_rows("join", "cat stack concat concatenate hstack vstack"),
    **_rows("pad", "constant_pad_nd pad"),
    **_rows("norm", "native_layer_norm layer_norm rms_norm _fused_rms_norm native_group_norm group_norm"),
    **_rows("norm", "native_batch_norm batch_norm linalg_vector_norm norm cudnn_batch_norm"),
    **_rows("exponential", "exp exp2"),
    **_rows("total", "sum logsumexp cumsum"),
    **_rows("sigmoid", "sigmoid"),
    **_rows("relu", "relu"),
    **_rows("lookup", "embedding embedding_bag"),
    **_rows("like", "empty_like zeros_like ones_like full_like new_zeros new_ones new_empty new_full"),
    **_rows("like", "new_empty_strided empty_permuted scalar_tensor"),
    **_rows("random", "randn rand randint normal uniform randn_like rand_like random normal_functional"),
    **_rows("fused", "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
    **_rows("fused", "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    **_rows("fused", "_scaled_dot_product_fused_attention_overrideable _flash_attention_forward"),
    **_rows("fused", "_efficient_attention_forward _scaled_dot_product_attention_math_for_mps"),
    **_rows("fused", "_cudnn_attention_forward flex_attention _flash_attn_forward"),
    **_rows("opaque", "_native_multi_head_attention _transformer_encoder_layer_fwd"),
    **_rows("opaque", "_triton_multi_head_attention _triton_scaled_dot_attention"),
}

# Running statistics, which these update although their schema does not say so.
WRITES_UNSAID = dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), (3, 4))

_HEARD = frozenset(
    (
        "product",
        "convolution",
        "softmax",
        "log softmax",
        "fused",
        "opaque",
        "factor",
        "sum",
        "exponential",
        "total",
        "sigmoid",
        "relu",
        "dropout",
    )
)
