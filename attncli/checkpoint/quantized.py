"""Raw arrays → logical tensors: the packed parts of a quantised weight become one tensor of shape [out, in].

Nothing here reads tensor values, with two exceptions where a format keeps the true shape in a tiny array:
the JSON of bitsandbytes' quant_state and the int64 pair `weight_shape` of compressed-tensors and HQQ. What
the shapes say goes before what a configuration says; where neither settles the logical shape the arrays
stay as they are and an anomaly says why. Knows names and shapes, never values (see dequantize.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from attncli.checkpoint.ggml import GGML_TYPES
from attncli.errors import CheckpointError
from attncli.records import Anomaly, Array, Config, Tensor

MAX_BNB_BLOCK = 1 << 16  # bitsandbytes offers up to 4096
MAX_STATE_BYTES = 1 << 16  # quant_state is a few hundred bytes of JSON


def logical_tensors(
    arrays: Sequence[Array], configs: Sequence[Config], read_bytes: Callable[[Array], bytes]
) -> tuple[tuple[Tensor, ...], tuple[Anomaly, ...]]:
    """One tensor per weight, in the order of `arrays`; helper arrays (scales, zeros, …) are parts of it.

    `read_bytes` is asked only for the arrays that hold a shape, at most 64 KiB each. A group that cannot be
    understood stays as plain tensors, with an "unknown-quantisation" anomaly. Never raises.
    """
    anchors = [array for array in arrays if array.name.endswith(_ANCHORS)]
    if not anchors:
        return tuple([_as_stored(array) for array in arrays]), ()
    group = _Arrays({array.name: array for array in arrays}, _settings(configs), read_bytes)
    joined: dict[str, Tensor] = {}  # by the name of the first part, whose place the tensor takes
    claimed: set[str] = set()
    anomalies: dict[str, Anomaly] = {}
    for anchor in anchors:
        if anchor.name in claimed:
            continue
        try:
            tensor = _join(group, anchor)
        except _UnknownError as reason:
            evidence = {"reason": str(reason), "shape": list(anchor.shape), "dtype": anchor.dtype}
            anomalies.setdefault(reason.subject, Anomaly("unknown-quantisation", reason.subject, evidence))
            continue
        if tensor is None:
            continue
        parts = [part.name for part in tensor.parts.values()]
        if tensor.name in group.by_name and tensor.name not in parts:
            anomalies[tensor.name] = Anomaly("duplicate-tensor", tensor.name, {"with": parts[0]})
        joined[parts[0]] = tensor
        claimed.update(parts)
    tensors = [
        joined[array.name] if array.name in joined else _as_stored(array)
        for array in arrays
        if array.name in joined or array.name not in claimed
    ]
    return tuple(tensors), tuple(anomalies.values())


# --- what the joins work with -------------------------------------------------------------------------


class _Settings(NamedTuple):
    """The numbers of a quantization_config that shapes alone may not settle."""

    bits: int | None = None
    group_size: int | None = None
    gptq_zero_offset: int = 1
    block_size: tuple[int, int] | None = None
    layers: Mapping[str, Any] = {}  # MLX: module path → its own settings


class _Arrays(NamedTuple):
    by_name: Mapping[str, Array]
    settings: _Settings
    read_bytes: Callable[[Array], bytes]

    def parts(self, stem: str, roles: Iterable[str]) -> dict[str, Array]:
        """Those of `stem + role` that exist, by role."""
        found = ((role, self.by_name.get(stem + role)) for role in roles)
        return {role: array for role, array in found if array is not None}

    def content(self, array: Array, subject: str, most: int) -> bytes:
        if array.size_bytes > most:
            raise _UnknownError(
                subject, f"{array.name} has {array.size_bytes} bytes; expected at most {most}."
            )
        try:
            return self.read_bytes(array)
        except CheckpointError as error:
            raise _UnknownError(subject, f"{array.name} cannot be read: {error.problem}") from error


class _UnknownError(Exception):
    """Why the logical shape of `subject` cannot be known."""

    def __init__(self, subject: str, reason: str) -> None:
        self.subject = subject
        super().__init__(reason)


def _as_stored(array: Array) -> Tensor:
    if array.dtype in _BLOCK_DTYPES or array.dtype.startswith("ggml_type_"):
        return Tensor(array.name, array.shape, array.dtype, array.file, {"weight": array}, "gguf")
    return Tensor(array.name, array.shape, array.dtype, array.file, {"weight": array})


def _joined(
    name: str, shape: Iterable[int], dtype: str, scheme: str, parts: Mapping[str, Array], **numbers: Any
) -> Tensor:
    file = next(iter(parts.values())).file
    kept = {key: value for key, value in numbers.items() if value is not None}
    return Tensor(name, tuple(shape), dtype, file, parts, scheme, kept)


def _join(group: _Arrays, anchor: Array) -> Tensor | None:
    for scheme in SCHEMES:
        for suffix in scheme.anchors:
            if anchor.name.endswith(suffix):
                tensor = scheme.join(group, anchor.name[: -len(suffix)])
                if tensor is not None:
                    return tensor
    return None


# --- one join per scheme ------------------------------------------------------------------------------
# Each takes the anchor's name without its suffix, and returns None where the arrays are not of its scheme.


def _join_gptq_or_awq(group: _Arrays, stem: str) -> Tensor | None:
    """GPTQ packs along in: qweight [in·bits/32, out]; AWQ along out: qweight [in, out·bits/32]."""
    name = f"{stem}.weight"
    parts = group.parts(f"{stem}.", ("qweight", "scales", "qzeros", "g_idx"))
    qweight, scales, qzeros = parts["qweight"], parts.get("scales"), parts.get("qzeros")
    if scales is None or len(scales.shape) != 2 or len(qweight.shape) != 2 or qweight.dtype != "int32":
        raise _UnknownError(
            name, "qweight has no scales [groups, out] beside it, or is not a table of int32."
        )
    (rows, cols), (groups, outs) = qweight.shape, scales.shape
    if "g_idx" in parts and parts["g_idx"].numel == 0:
        del parts["g_idx"]
    if cols == outs:
        indices = parts["g_idx"].numel if "g_idx" in parts else None
        fitting = [
            bits
            for bits in _BIT_WIDTHS
            if rows * 32 % bits == 0
            and indices in (None, rows * 32 // bits)
            and (qzeros is None or qzeros.shape == (groups, math.ceil(outs * bits / 32)))
        ]
        bits = _choice(name, fitting, group.settings.bits)
        ins, scheme, offset = rows * 32 // bits, "gptq", group.settings.gptq_zero_offset
    else:
        bits = cols * 32 // outs if outs else 0
        if bits not in (4, 8) or bits * outs != cols * 32 or qzeros is None or qzeros.shape != (groups, cols):
            raise _UnknownError(
                name, f"qweight {qweight.shape} and scales {scales.shape} are neither GPTQ nor AWQ."
            )
        ins, scheme, offset = rows, "awq", None
    group_size = _group_size(name, ins, groups, group.settings.group_size)
    return _joined(
        name,
        (outs, ins),
        f"int{bits}",
        scheme,
        parts,
        bits=bits,
        group_size=group_size,
        zero_offset=offset,
    )


def _join_compressed(group: _Arrays, stem: str) -> Tensor | None:
    """compressed-tensors: int32 words of intN with the shape beside them, or uint8 pairs of fp4."""
    name = f"{stem}.weight"
    parts = group.parts(f"{stem}.", _COMPRESSED_ROLES)
    packed, scale = parts["weight_packed"], parts.get("weight_scale")
    if scale is None or not scale.shape or len(packed.shape) < 2:
        raise _UnknownError(name, "weight_packed has no weight_scale beside it.")
    if packed.dtype == "uint8":
        return _fp4_pairs(name, packed, scale, parts)
    if packed.dtype != "int32" or len(packed.shape) != 2:
        raise _UnknownError(
            name, f"weight_packed is {packed.dtype} {packed.shape}; expected int32 [out, words]."
        )
    rows, cols = packed.shape
    if "weight_shape" in parts:
        outs, ins = _stored_shape(group, name, parts["weight_shape"])
        fitting = [bits for bits in _BIT_WIDTHS if math.ceil(ins * bits / 32) == cols]
        bits = _choice(name, fitting, group.settings.bits)
    else:
        bits = _choice(name, [b for b in _BIT_WIDTHS if b == group.settings.bits], group.settings.bits)
        outs, ins = rows, cols * 32 // bits
    if outs != rows:
        raise _UnknownError(name, f"weight_shape says {outs} rows, weight_packed has {rows}.")
    groups = scale.shape[-1] if len(scale.shape) == 2 else 1
    group_size = _group_size(name, ins, groups, group.settings.group_size)
    return _joined(
        name, (outs, ins), f"int{bits}", "compressed-tensors", parts, bits=bits, group_size=group_size
    )


def _join_modelopt_fp4(group: _Arrays, stem: str) -> Tensor | None:
    """modelopt NVFP4: weight uint8 [out, in/2], weight_scale fp8 [out, in/16], weight_scale_2 a scalar."""
    parts = group.parts(stem, ("", "_scale", "_scale_2"))
    parts = {f"weight{role}": array for role, array in parts.items()}
    weight, scale = parts.get("weight"), parts.get("weight_scale")
    if weight is None or weight.dtype != "uint8":
        return None
    if scale is None or not scale.shape or len(weight.shape) < 2:
        raise _UnknownError(stem, "it has a weight_scale_2, but no weight_scale.")
    return _fp4_pairs(stem, weight, scale, {**parts, **_activation_parts(group, stem)})


def _fp4_pairs(name: str, packed: Array, scale: Array, parts: Mapping[str, Array]) -> Tensor:
    """Two fp4 (e2m1) values a byte, the first in the low nibble; one scale for 16 (NVFP4) or 32 (MXFP4)."""
    ins, groups = packed.shape[-1] * 2, scale.shape[-1]
    if scale.shape[:-1] != packed.shape[:-1] or ins not in (groups * 16, groups * 32) or not groups:
        raise _UnknownError(name, f"scales {scale.shape} do not fit packed {packed.shape}.")
    kind = "nvfp4" if scale.dtype.startswith("float8_e4m3") or ins // groups == 16 else "mxfp4"
    return _joined(name, (*packed.shape[:-1], ins), kind, kind, parts, bits=4, group_size=ins // groups)


def _join_mxfp4_blocks(group: _Arrays, stem: str) -> Tensor | None:
    """gpt-oss: blocks uint8 [E, out, groups, 16] and scales uint8 [E, out, groups] → [E, out, groups·32]."""
    for separator in ("_", "."):
        parts = group.parts(stem + separator, ("blocks", "scales"))
        if len(parts) == 2:
            break
    else:
        return None
    blocks, scales = parts["blocks"], parts["scales"]
    if blocks.dtype != "uint8" or len(blocks.shape) < 2 or scales.shape != blocks.shape[:-1]:
        return None
    if blocks.shape[-1] != 16:
        raise _UnknownError(stem, f"its blocks have {blocks.shape[-1]} bytes; expected 16, for 32 values.")
    shape = (*blocks.shape[:-2], blocks.shape[-2] * 32)
    return _joined(stem, shape, "mxfp4", "mxfp4", parts, bits=4, group_size=32)


def _join_bnb4(group: _Arrays, stem: str) -> Tensor | None:
    """bitsandbytes 4-bit: bytes in any dtype and shape; the logical shape is JSON in quant_state."""
    parts = group.parts(stem, ("", *_BNB_ROLES))
    parts = {role.removeprefix(".") or "weight": array for role, array in parts.items()}
    state = next((parts.pop(role) for role in _BNB_STATES if role in parts), None)
    if "weight" not in parts or "absmax" not in parts:
        return None
    if state is None:
        raise _UnknownError(stem, "it has an absmax, but no quant_state to say its shape.")
    parts["quant_state"] = state
    kind = state.name[-3:]
    try:
        values = json.loads(group.content(state, stem, MAX_STATE_BYTES))
    except (ValueError, RecursionError) as error:
        raise _UnknownError(stem, f"{state.name} is not JSON: {error}.") from error
    shape = values.get("shape") if isinstance(values, dict) else None
    if not isinstance(shape, list) or not 0 < len(shape) <= 8 or any(_positive(n) is None for n in shape):
        raise _UnknownError(stem, f"{state.name} has no shape in it.")
    if (math.prod(shape) + 1) // 2 != parts["weight"].size_bytes:
        raise _UnknownError(
            stem,
            f"{state.name} says {shape}, but there are {parts['weight'].size_bytes} bytes of 4-bit pairs.",
        )
    size = _positive(values.get("blocksize")) or 64
    if size % 2 or size > MAX_BNB_BLOCK:
        raise _UnknownError(stem, f"{state.name} says blocks of {size} values; expected 64 to 4096.")
    offset = values.get("nested_offset")
    return _joined(
        stem,
        shape,
        kind,
        f"bnb-{kind}",
        parts,
        bits=4,
        group_size=size,
        nested_group_size=_positive(values.get("nested_blocksize")),
        nested_offset=float(offset) if isinstance(offset, (int, float)) else None,
    )


def _join_bnb8(group: _Arrays, stem: str) -> Tensor | None:
    """LLM.int8(): weight int8 [out, in] and SCB float32 [out], the largest magnitude of each row."""
    parts = group.parts(f"{stem}.", ("weight", "SCB", "weight_format"))
    weight = parts.get("weight")
    if weight is None or weight.dtype != "int8" or len(weight.shape) != 2:
        return None
    return _joined(weight.name, weight.shape, "int8", "bnb-int8", parts, bits=8)


def _join_scaled(group: _Arrays, stem: str) -> Tensor | None:
    """fp8 or int8 weights of full shape with a scale per tensor, row, group or block."""
    weight = group.by_name.get(stem) or group.by_name.get(f"{stem}.weight")
    if weight is None or not (weight.dtype.startswith("float8_e") or weight.dtype == "int8"):
        return None
    base = weight.name.removesuffix(".weight")
    names = [weight.name + "_scale_inv", weight.name + "_scale", f"{base}.scale", f"{base}.scale_weight"]
    scale = next((group.by_name[name] for name in names if name in group.by_name), None)
    if scale is None or not scale.dtype.startswith(("float", "bfloat", "uint8")):
        return None
    zero = group.by_name.get(f"{weight.name}_zero_point")
    parts = {"weight": weight, "weight_scale": scale} | ({"weight_zero_point": zero} if zero else {})
    block = _block_size(weight.shape, scale.shape, group.settings.block_size)
    scheme = "compressed-tensors" if weight.dtype == "int8" else "fp8"
    if scheme == "fp8" and not _broadcasts(scale.shape, weight.shape):
        scheme = "fp8-block"
    parts |= _activation_parts(group, weight.name)
    return _joined(weight.name, weight.shape, weight.dtype, scheme, parts, bits=8, block_size=block)


def _join_mlx(group: _Arrays, stem: str) -> Tensor | None:
    """MLX: weight uint32 [.., in·bits/32], scales and biases [.., in/group]; w = scale · q + bias."""
    parts = group.parts(f"{stem}.", ("weight", "scales", "biases", "qbiases"))
    weight, scales = parts.get("weight"), parts["scales"]
    if weight is None or weight.dtype != "uint32" or not weight.shape or not scales.shape:
        return None
    name, cols = weight.name, weight.shape[-1]
    if scales.shape[:-1] != weight.shape[:-1] or not scales.shape[-1] or cols * 32 % scales.shape[-1]:
        raise _UnknownError(name, f"scales {scales.shape} do not fit weight {weight.shape}.")
    if "qbiases" in parts:
        parts["biases"] = parts.pop("qbiases")
    bits_a_group = cols * 32 // scales.shape[-1]  # bits · group_size
    if "biases" not in parts:
        kind = {128: "mxfp4", 64: "nvfp4", 256: "mxfp8"}.get(bits_a_group)
        if kind is None or scales.dtype != "uint8":
            raise _UnknownError(name, "it has scales, but neither biases nor the groups of an MX format.")
        bits = 8 if kind == "mxfp8" else 4
        ins, dtype = cols * 32 // bits, kind
    else:
        settings = _layer_settings(group.settings, stem)
        sizes = [n for n in (32, 64, 128) if bits_a_group % n == 0 and bits_a_group // n in _BIT_WIDTHS]
        told = _positive(settings.get("group_size")) or group.settings.group_size
        group_size = _choice(name, sizes, told)
        bits = bits_a_group // group_size
        ins, dtype = cols * 32 // bits, f"int{bits}"
    return _joined(
        name, (*weight.shape[:-1], ins), dtype, "mlx", parts, bits=bits, group_size=bits_a_group // bits
    )


def _join_hqq(group: _Arrays, stem: str) -> Tensor | None:
    """HQQ: W_q packed in one of several ways; its logical shape lies beside it as int64[2]."""
    name = f"{stem}.weight"
    parts = group.parts(f"{stem}.", _HQQ_ROLES)
    if "shape" not in parts:
        raise _UnknownError(name, "HQQ's W_q has no shape beside it.")
    shape = _stored_shape(group, name, parts["shape"])
    bits = parts["W_q"].size_bytes * 8 // max(math.prod(shape), 1)
    return _joined(name, shape, f"int{bits}", "hqq", parts, bits=bits)


def _join_quanto(group: _Arrays, stem: str) -> Tensor | None:
    """quanto with 8 bits: weight._data of full shape and weight._scale. Fewer bits are packed: unknown."""
    parts = group.parts(stem, ("._data", "._scale", "._shift"))
    if "._scale" not in parts:
        return None
    data = parts["._data"]
    if data.dtype != "int8" and not data.dtype.startswith("float8"):
        raise _UnknownError(stem, f"quanto packed it as {data.dtype}; its shape is in no header.")
    renamed = {"weight": data, "weight_scale": parts["._scale"]}
    return _joined(stem, data.shape, data.dtype, "quanto", renamed, bits=8)


# --- helpers ------------------------------------------------------------------------------------------


def _activation_parts(group: _Arrays, weight: str) -> dict[str, Array]:
    """Scales of the layer's input, which ride along with its weight."""
    stem = weight.removesuffix("weight")
    return group.parts(stem, _ACTIVATION_ROLES) if stem.endswith(".") else {}


def _stored_shape(group: _Arrays, name: str, array: Array) -> tuple[int, int]:
    content = group.content(array, name, 64)
    size = {"int64": 8, "int32": 4}.get(array.dtype, 0)
    if array.numel != 2 or len(content) != 2 * size or not size:
        raise _UnknownError(name, f"{array.name} is {array.dtype} {array.shape}; expected two integers.")
    first, second = (int.from_bytes(content[i : i + size], "little", signed=True) for i in (0, size))
    if not (0 < first < 1 << 40 and 0 < second < 1 << 40):
        raise _UnknownError(name, f"{array.name} says [{first}, {second}], which is no shape.")
    return first, second


def _choice(name: str, fitting: Sequence[int], told: int | None) -> int:
    """The one number the shapes allow; the configuration's where they allow several."""
    if told is not None and told in fitting:
        return told
    if len(fitting) == 1:
        return fitting[0]
    allowed = ", ".join(map(str, fitting)) or "none"
    raise _UnknownError(
        name, f"the shapes fit several settings or none ({allowed}) and the config says {told}."
    )


def _group_size(name: str, ins: int, groups: int, told: int | None) -> int:
    """Inputs that share a scale; the last group may be shorter."""
    if not 0 < groups <= ins:
        raise _UnknownError(name, f"{groups} groups for {ins} inputs.")
    if told is not None and math.ceil(ins / told) == groups:
        return told
    return math.ceil(ins / groups)


def _broadcasts(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """One scale, or one per row [out], [out, 1] or [E, 1, out]."""
    if math.prod(scale) == 1 or scale == weight[: len(scale)]:
        return True
    return len(scale) == len(weight) and all(s in (1, w) for s, w in zip(scale, weight, strict=True))


def _block_size(
    weight: tuple[int, ...], scale: tuple[int, ...], told: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of the block that shares a scale.

    None where a scale serves a row or the whole tensor, and where the scales do not fit the block the config
    names: merged projections that were quantised in parallel have padded scales.
    """
    if _broadcasts(scale, weight) or len(scale) != len(weight) or len(weight) < 2:
        return None
    square = ((size, size) for size in (128, 64, 32, 16, 256, 512))
    by_row = ((1, size) for size in (32, 128, 64, 16, 256, 512))
    for block in [told] if told else [*square, *by_row]:
        counts = tuple(math.ceil(n / size) for n, size in zip(weight[-2:], block, strict=True))
        if counts == scale[-2:]:
            return block
    return None


def _settings(configs: Sequence[Config]) -> _Settings:
    for config in configs:
        values = config.values
        text = values.get("text_config")
        candidates = [
            values.get("quantization_config"),
            values.get("quantization"),
            values.get("compression_config"),
            text.get("quantization_config") if isinstance(text, Mapping) else None,
            values if config.source in ("quantize_config.json", "quant_config.json") else None,
        ]
        for found in candidates:
            if isinstance(found, Mapping):
                return _settings_from(found)
    return _Settings()


def _settings_from(values: Mapping[str, Any]) -> _Settings:
    bits = _positive(values.get("bits")) or _positive(values.get("w_bit"))
    groups = values.get("config_groups")
    if bits is None and isinstance(groups, Mapping):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        widths = {_positive(w.get("num_bits")) for w in weights if isinstance(w, Mapping)}
        bits = widths.pop() if len(widths) == 1 else None
    block = values.get("weight_block_size")
    sizes = [_positive(n) for n in block] if isinstance(block, (list, tuple)) else []
    return _Settings(
        bits=bits,
        group_size=_positive(values.get("group_size")) or _positive(values.get("q_group_size")),
        gptq_zero_offset=0 if values.get("checkpoint_format") == "gptq_v2" else 1,
        block_size=(sizes[0], sizes[1]) if len(sizes) == 2 and sizes[0] and sizes[1] else None,
        layers=values,
    )


def _layer_settings(settings: _Settings, module: str) -> Mapping[str, Any]:
    """MLX's own entry for a module, whose path may have lost a wrapper's prefix since."""
    path = module
    while path:
        if isinstance(entry := settings.layers.get(path), Mapping):
            return entry
        _, _, path = path.partition(".")
    return {}


def _positive(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 1 << 40 else None


# --- tables -------------------------------------------------------------------------------------------


class Scheme(NamedTuple):
    """`anchors`: how the array's name ends that gives the scheme away; `join` gets the name without it."""

    name: str
    anchors: tuple[str, ...]
    join: Callable[[_Arrays, str], Tensor | None]


_BIT_WIDTHS = (2, 3, 4, 5, 6, 8)
_BLOCK_DTYPES = frozenset(block.dtype for block in GGML_TYPES.values() if block.elements > 1)
_ACTIVATION_ROLES = (
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "activation_scale",
)
_COMPRESSED_ROLES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    *_ACTIVATION_ROLES,
)
_BNB_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_BNB_ROLES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *(f".{s}" for s in _BNB_STATES))
_HQQ_ROLES = (
    "W_q",
    "scale",
    "zero",
    "shape",
    "nbits",
    "group_size",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "compute_dtype",
    "channel_wise",
    "quant_scale",
    "quant_zero",
    "round_zero",
    "optimize",
    "offload_meta",
    "stores_quant_config",
)

SCHEMES: tuple[Scheme, ...] = (
    Scheme("gptq, awq", (".qweight",), _join_gptq_or_awq),
    Scheme("compressed-tensors", (".weight_packed",), _join_compressed),
    Scheme("nvfp4 (modelopt)", ("_scale_2",), _join_modelopt_fp4),
    Scheme("mxfp4", ("_blocks", ".blocks"), _join_mxfp4_blocks),
    Scheme("bnb-nf4, bnb-fp4", (*(f".{state}" for state in _BNB_STATES), ".absmax"), _join_bnb4),
    Scheme("bnb-int8", (".SCB",), _join_bnb8),
    Scheme("mlx", (".scales",), _join_mlx),
    Scheme("hqq", (".W_q",), _join_hqq),
    Scheme("quanto", ("._data",), _join_quanto),
    Scheme("fp8, fp8-block, int8", ("_scale_inv", "_scale", ".scale", ".scale_weight"), _join_scaled),
)
_ANCHORS = tuple(anchor for scheme in SCHEMES for anchor in scheme.anchors)
