"""Quantised tensors → float32 values: the definitions of the storage formats as vectorised torch.

Shape legend: n blocks, G groups of inputs that share a scale. Weights are [out, in]. Everything is computed
in pieces of about a million elements, so the memory above the float32 result stays small whatever the
tensor's size. Sources: ggml-quants.c of llama.cpp (GGUF block types), AutoGPTQ, AutoAWQ, bitsandbytes,
compressed-tensors, modelopt, the OCP Microscaling (MX) specification 1.0, MLX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor as Values

from attncli.checkpoint.ggml import GGML_TYPES
from attncli.errors import CheckpointError
from attncli.records import Tensor

PIECE_ELEMENTS = 1 << 20


def dequantize(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    """The values of `tensor` in float32, in its logical shape.

    `parts`: the raw arrays by role, as in `tensor.parts`, in their own dtype and shape; GGUF block types as
    uint8 bytes in any shape. Plain tensors are only converted. Raises CheckpointError for schemes that are
    not `supported` and for parts that do not fit each other.
    """
    if not supported(tensor):
        stored = tensor.dtype if tensor.scheme == "gguf" else f"{tensor.scheme} {tensor.dtype}"
        raise CheckpointError(
            tensor.name,
            f"its values are stored as {stored}, which attncli cannot decode.",
            "Inspect the unquantised checkpoint, or run without --values and --bounds.",
        )
    absent = sorted(set(tensor.parts) - set(parts))
    if absent:
        _misfit(tensor, f"its parts {', '.join(absent)} were not read")
    return _SCHEMES[tensor.scheme](tensor, parts).reshape(tensor.shape)


def supported(tensor: Tensor) -> bool:
    """Whether `dequantize` can decode it. False for grid types (IQ1, IQ2, IQ3), HQQ and irregular blocks."""
    if tensor.scheme == "gguf":
        return tensor.dtype in _BLOCKS
    if tensor.scheme == "awq":
        return tensor.quantisation.get("bits") == 4
    if tensor.scheme == "fp8-block":
        return "block_size" in tensor.quantisation
    if tensor.scheme in ("bnb-nf4", "bnb-fp4"):
        return "quant_map" in tensor.parts
    return tensor.scheme in _SCHEMES


# --- one function per scheme --------------------------------------------------------------------------


def _plain(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    return parts["weight"].to(torch.float32)


def _gguf(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    block = _BLOCKS[tensor.dtype]
    raw = _bytes(parts["weight"])
    n_blocks = tensor.numel // block.elements
    if raw.numel() != n_blocks * block.size_bytes:
        _misfit(tensor, f"{raw.numel()} bytes were read for {n_blocks} blocks of {block.size_bytes}")
    blocks = raw.view(n_blocks, block.size_bytes)
    return _piecewise(n_blocks, block.elements, raw.device, lambda rows: block.decode(blocks[rows]))


def _gptq(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    """w = s[g] · (q − z[g]), with g the group of each input: g_idx after activation reordering."""
    bits, (outs, ins) = int(tensor.quantisation["bits"]), tensor.shape
    words, scales = parts["qweight"], parts["scales"].to(torch.float32).T
    mask, offset = (1 << bits) - 1, int(tensor.quantisation.get("zero_offset", 1))
    zeros = torch.full_like(scales, 1 << (bits - 1))
    if "qzeros" in parts:
        # AutoGPTQ stores zero − 1, and −1 as all ones: the sum has to wrap within its bits.
        zeros = ((_unpacked(parts["qzeros"], bits, outs).T.int() + offset) & mask).to(torch.float32)
    group = _group_of_inputs(tensor, parts.get("g_idx"), scales)

    def rows_of_outputs(rows: slice) -> Values:
        q = _unpacked(words[:, rows].T.contiguous(), bits, ins)
        return (q.to(torch.float32) - zeros[rows][:, group]) * scales[rows][:, group]

    return _piecewise(outs, ins, words.device, rows_of_outputs)


def _awq(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    """As GPTQ, but packed along the outputs with nibbles in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    (outs, ins), words = tensor.shape, parts["qweight"]
    scales = parts["scales"].to(torch.float32).T
    zeros = _awq_unpacked(parts["qzeros"]).T.to(torch.float32)
    group = _group_of_inputs(tensor, None, scales)

    def words_of_outputs(rows: slice) -> Values:
        outputs = slice(rows.start * 8, rows.stop * 8)
        q = _awq_unpacked(words[:, rows]).T.to(torch.float32)
        return ((q - zeros[outputs][:, group]) * scales[outputs][:, group]).reshape(-1, 8 * ins)

    return _piecewise(outs // 8, 8 * ins, words.device, words_of_outputs)


def _awq_unpacked(words: Values) -> Values:
    nibbles = _unpacked(words, 4, words.shape[-1] * 8).reshape(words.shape[0], -1, 8)
    return nibbles[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2)


def _compressed(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    """w = s · (q − z); q and z are stored with 2^(bits−1) added, which cancels where both are packed."""
    if "weight_packed" not in parts:
        return _scaled(tensor, parts)
    bits, (outs, ins) = int(tensor.quantisation["bits"]), tensor.shape
    words = parts["weight_packed"]
    scales = parts["weight_scale"].to(torch.float32).reshape(-1, parts["weight_scale"].shape[-1])
    if parts["weight_scale"].numel() in (1, outs):
        scales = scales.reshape(-1, 1)
    if scales.shape[0] not in (1, outs):
        _misfit(tensor, f"{scales.shape[0]} rows of scales for {outs} rows of weights")
    scales = scales.expand(outs, -1)
    zeros = torch.full_like(scales, 1 << (bits - 1))
    if "weight_zero_point" in parts:
        stored = parts["weight_zero_point"]
        if stored.dtype == torch.int32 and stored.shape[0] != outs:
            zeros = _unpacked(stored.T.contiguous(), bits, outs).T.to(torch.float32)
        elif stored.numel() == zeros.numel():
            zeros = zeros + stored.to(torch.float32).reshape(zeros.shape)
        else:
            zeros = stored
    if zeros.shape != scales.shape:
        _misfit(tensor, f"zero points {tuple(zeros.shape)} for scales {tuple(scales.shape)}")
    order = parts.get("weight_g_idx")
    group = _group_of_inputs(
        tensor, None if order is None or bool((order.long() < 0).any()) else order, scales
    )

    def rows_of_outputs(rows: slice) -> Values:
        q = _unpacked(words[rows], bits, ins)
        return (q.to(torch.float32) - zeros[rows][:, group]) * scales[rows][:, group]

    return _piecewise(outs, ins, words.device, rows_of_outputs)


def _bnb4(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    """Two values a byte, the first in the high nibble: quant_map[q] · absmax of a run of the flat tensor."""
    size = int(tensor.quantisation["group_size"])
    raw = _bytes(parts["weight"])
    absmax = parts["absmax"].reshape(-1)
    if absmax.dtype == torch.uint8:
        if "nested_quant_map" not in parts or "nested_absmax" not in parts:
            _misfit(tensor, "its scales are quantised, but the scales of the scales are missing")
        nested = int(tensor.quantisation.get("nested_group_size", 256))
        table = parts["nested_quant_map"].to(torch.float32).reshape(-1)
        outer = parts["nested_absmax"].to(torch.float32).reshape(-1)
        if table.numel() != 256 or outer.numel() * nested < absmax.numel():
            _misfit(tensor, "its nested scales are too few")
        outer = outer[torch.arange(absmax.numel(), device=outer.device) // nested]
        absmax = table[absmax.int()] * outer + float(tensor.quantisation.get("nested_offset", 0.0))
    absmax = absmax.to(torch.float32)
    if parts["quant_map"].numel() != 16 or absmax.numel() * size < tensor.numel:
        _misfit(tensor, f"{absmax.numel()} scales for {tensor.numel} elements in blocks of {size}")
    pairs = _pairs(parts["quant_map"].to(torch.float32).reshape(-1)).flip(-1)

    def blocks(rows: slice) -> Values:
        piece = pairs[raw[rows.start * size // 2 : rows.stop * size // 2].int()].reshape(-1)
        return torch.nn.functional.pad(piece, (0, -piece.numel() % size)).view(-1, size) * absmax[rows, None]

    n_blocks = math.ceil(tensor.numel / size)
    return _piecewise(n_blocks, size, raw.device, blocks).reshape(-1)[: tensor.numel]


def _bnb8(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    """w = q · SCB / 127, SCB the largest magnitude of each row. Source: LLM.int8(), Dettmers et al. 2022."""
    if "weight_format" in parts and bool((parts["weight_format"] != 0).any()):
        _misfit(tensor, "its rows are tiled for one kind of GPU")
    if parts["SCB"].numel() != tensor.shape[0]:
        _misfit(tensor, f"{parts['SCB'].numel()} scales for {tensor.shape[0]} rows")
    return parts["weight"].to(torch.float32).mul_(parts["SCB"].to(torch.float32).reshape(-1, 1) / 127)


def _scaled(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    """w = s · (q − z), one s per tensor, row or block of rows and columns."""
    values = parts["weight"].to(torch.float32)
    block = tensor.quantisation.get("block_size")
    zero = parts.get("weight_zero_point")
    if zero is not None:
        values -= _spread(tensor, zero.to(torch.float32), values, block)
    return values.mul_(_spread(tensor, _as_scale(parts["weight_scale"]), values, block))


def _spread(tensor: Tensor, scale: Values, values: Values, block: tuple[int, int] | None) -> Values:
    """`scale` in a shape that broadcasts over `values`."""
    if scale.numel() == 1:
        return scale.reshape(())
    if block is not None and scale.ndim == values.ndim:
        rows, cols = values.shape[-2:]
        if scale.shape[-2] * block[0] < rows or scale.shape[-1] * block[1] < cols:
            _misfit(tensor, f"scales {tuple(scale.shape)} for values {tuple(values.shape)}")
        scale = scale[..., torch.arange(rows, device=scale.device) // block[0], :]
        scale = scale[..., torch.arange(cols, device=scale.device) // block[1]]
    elif scale.ndim < values.ndim:
        scale = scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))
    if scale.ndim != values.ndim or any(
        s not in (1, v) for s, v in zip(scale.shape, values.shape, strict=True)
    ):
        _misfit(tensor, f"scales {tuple(scale.shape)} for values {tuple(values.shape)}")
    return scale


def _fp4(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    """NVFP4 and MXFP4: e2m1 pairs, the first in the low nibble, times the group's scale and the tensor's."""
    packed = next(parts[role] for role in ("weight_packed", "blocks", "weight") if role in parts)
    scales = parts["weight_scale"] if "weight_scale" in parts else parts["scales"]
    size = int(tensor.quantisation["group_size"])
    if tensor.dtype == "nvfp4":
        scale = (scales.view(torch.float8_e4m3fn) if scales.dtype == torch.uint8 else scales).to(
            torch.float32
        )
    else:
        scale = _as_scale(scales)
    whole = parts.get("weight_scale_2", parts.get("weight_global_scale"))
    if whole is not None:
        if whole.numel() not in (1, scale.shape[0]):
            _misfit(tensor, f"{whole.numel()} scales of the whole for {scale.shape[0]} experts")
        whole = whole.to(torch.float32).reshape(-1, *[1] * (scale.ndim - 1))
        # compressed-tensors stores the inverse of modelopt's
        scale = scale * whole if "weight_scale_2" in parts else scale / whole
    return _fp4_groups(tensor, _bytes(packed), scale, size)


def _fp4_groups(tensor: Tensor, packed: Values, scale: Values, size: int) -> Values:
    packed, scale = packed.reshape(-1, size // 2), scale.reshape(-1, 1)
    if packed.shape[0] != scale.shape[0]:
        _misfit(tensor, f"{scale.shape[0]} scales for {packed.shape[0]} groups")
    pairs = _pairs(torch.tensor(_E2M1)).to(packed.device)
    return _piecewise(
        packed.shape[0],
        size,
        packed.device,
        lambda rows: pairs[packed[rows].int()].flatten(-2) * scale[rows],
    )


def _mlx(tensor: Tensor, parts: Mapping[str, Values]) -> Values:
    """w = s · q + b, q a stream of bits along the inputs; MX kinds as elsewhere, viewed as words."""
    bits, size = int(tensor.quantisation["bits"]), int(tensor.quantisation["group_size"])
    words, scales = parts["weight"].contiguous().view(torch.int32), parts["scales"]
    if tensor.dtype in ("mxfp4", "nvfp4"):
        scale = scales.view(torch.float8_e4m3fn).to(torch.float32) if size == 16 else _as_scale(scales)
        return _fp4_groups(tensor, words.view(torch.uint8), scale, size)
    ins = tensor.shape[-1]
    if tensor.dtype == "mxfp8":
        values = words.view(torch.float8_e4m3fn).to(torch.float32).view(-1, size)
        return values.mul_(_as_scale(scales).reshape(-1, 1))
    words = words.reshape(-1, words.shape[-1])
    if parts["biases"].shape != scales.shape:
        _misfit(tensor, f"biases {tuple(parts['biases'].shape)} for scales {tuple(scales.shape)}")
    scale = scales.to(torch.float32).reshape(words.shape[0], -1, 1)
    bias = parts["biases"].to(torch.float32).reshape(scale.shape)

    def rows_of_outputs(rows: slice) -> Values:
        q = _unpacked(words[rows], bits, ins).to(torch.float32).reshape(-1, ins // size, size)
        return q.mul_(scale[rows]).add_(bias[rows]).flatten(-2)

    return _piecewise(words.shape[0], ins, words.device, rows_of_outputs)


# --- helpers ------------------------------------------------------------------------------------------


def _misfit(tensor: Tensor, problem: str) -> NoReturn:
    raise CheckpointError(
        tensor.name, f"{problem}.", "Download the checkpoint again, or convert it again from its source."
    )


def _piecewise(rows: int, cols: int, device: torch.device, piece: Callable[[slice], Values]) -> Values:
    """[rows, cols] float32, filled a few rows at a time."""
    values = torch.empty(rows, cols, dtype=torch.float32, device=device)
    step = max(PIECE_ELEMENTS // max(cols, 1), 1)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values[part] = piece(part)
    return values


def _unpacked(words: Values, bits: int, count: int) -> Values:
    """The first `count` numbers of `bits` bits in each row of int32 words, as uint8.

    The words are one stream of bits, lowest first; a number may lie across two words.
    """
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits))
    words = words.reshape(*words.shape[:-1], -1, bits)
    numbers = torch.empty(*words.shape[:-1], 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        here = min(bits, 32 - shift)
        number = (words[..., word] >> shift) & ((1 << here) - 1)
        if here < bits:
            number = number | ((words[..., word + 1] & ((1 << (bits - here)) - 1)) << here)
        numbers[..., i] = number
    return numbers.flatten(-2)[..., :count]


def _group_of_inputs(tensor: Tensor, order: Values | None, scales: Values) -> Values:
    """(in,) the group of each input, for scales [out, G]."""
    ins, groups = tensor.shape[1], scales.shape[1]
    if order is None:
        order = torch.arange(ins, device=scales.device) // int(tensor.quantisation["group_size"])
    group = order.reshape(-1).long()
    if (
        group.numel() != ins
        or scales.shape[0] != tensor.shape[0]
        or not 0 <= int(group.min()) <= int(group.max()) < groups
    ):
        _misfit(tensor, f"its scales {tuple(scales.shape)} do not serve all {ins} inputs")
    return group


def _bytes(stored: Values) -> Values:
    """The bytes of an array of any dtype, flat."""
    return stored.contiguous().reshape(-1).view(torch.uint8)


def _as_scale(scale: Values) -> Values:
    """float32; bytes are exponents (e8m0): 2^(e − 127), 255 is NaN."""
    if scale.dtype == torch.uint8:
        return torch.tensor(_E8M0).to(scale.device)[scale.int()]
    return scale.to(torch.float32)


def _pairs(table: Values) -> Values:
    """(256, 2): the two entries of a table of 16 that one byte stands for, low nibble first."""
    byte = torch.arange(256, device=table.device)
    return torch.stack((table[byte & 15], table[byte >> 4]), -1)


# --- GGUF block types: bytes (n, block bytes) → (n, elements) float32 ----------------------------------


def _half(b: Values, at: int) -> Values:
    """(n, 1) the float16 at byte `at`."""
    return b[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _fields(b: Values, shifts: range, mask: int) -> Values:
    """(…, k) bytes → (…, shifts, k): the same bits of all k bytes first, then the next bits."""
    return (b.unsqueeze(-2) >> torch.tensor(shifts, dtype=torch.uint8, device=b.device).unsqueeze(-1)) & mask


def _nibbles(b: Values) -> Values:
    """(n, k) bytes → (n, 2k) float32: all low nibbles, then all high ones."""
    return _fields(b, range(0, 8, 4), 15).flatten(1).to(torch.float32)


def _bits(b: Values) -> Values:
    """(n, 4) bytes → (n, 32), lowest bit of the first byte first."""
    return _fields(b.unsqueeze(-1), range(8), 1).flatten(1).to(torch.float32)


def _q4_0(b: Values) -> Values:
    return _half(b, 0) * (_nibbles(b[:, 2:]) - 8)


def _q4_1(b: Values) -> Values:
    return _half(b, 0) * _nibbles(b[:, 4:]) + _half(b, 2)


def _q5_0(b: Values) -> Values:
    return _half(b, 0) * (_nibbles(b[:, 6:]) + 16 * _bits(b[:, 2:6]) - 16)


def _q5_1(b: Values) -> Values:
    return _half(b, 0) * (_nibbles(b[:, 8:]) + 16 * _bits(b[:, 4:8])) + _half(b, 2)


def _q8_0(b: Values) -> Values:
    return _half(b, 0) * b[:, 2:].view(torch.int8).to(torch.float32)


def _q2_k(b: Values) -> Values:
    scales = b[:, :16, None]
    q = _fields(b[:, 16:80].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)
    d, least = _half(b, 80)[..., None] * (scales & 15), _half(b, 82)[..., None] * (scales >> 4)
    return (d * q - least).flatten(1)


def _q3_k(b: Values) -> Values:
    high = _fields(b[:, :32], range(8), 1).flatten(1)
    low = _fields(b[:, 32:96].reshape(-1, 2, 32), range(0, 8, 2), 3).flatten(1)
    q = low.to(torch.float32) + 4 * high - 4
    scales = _fields(b[:, 96:104], range(0, 8, 4), 15) | (
        _fields(b[:, 104:108], range(0, 8, 2), 3).reshape(-1, 2, 8) << 4
    )
    d = _half(b, 108) * (scales.flatten(1).to(torch.float32) - 32)
    return (d[..., None] * q.reshape(-1, 16, 16)).flatten(1)


def _scale_and_least(b: Values) -> tuple[Values, Values]:
    """(n, 8, 1) twice: d · 6-bit scales and dmin · 6-bit minima of Q4_K and Q5_K, in bytes 4 to 16."""
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 6) << 4)), 1)
    least = torch.cat((second & 63, (rest >> 4) | ((second >> 6) << 4)), 1)
    return (_half(b, 0) * scales)[..., None], (_half(b, 2) * least)[..., None]


def _q4_k(b: Values) -> Values:
    d, least = _scale_and_least(b)
    q = _fields(b[:, 16:].reshape(-1, 4, 32), range(0, 8, 4), 15).reshape(-1, 8, 32)
    return (d * q - least).flatten(1)


def _q5_k(b: Values) -> Values:
    d, least = _scale_and_least(b)
    low = _fields(b[:, 48:].reshape(-1, 4, 32), range(0, 8, 4), 15).reshape(-1, 8, 32)
    return (d * (low | (_fields(b[:, 16:48], range(8), 1) << 4)) - least).flatten(1)


def _q6_k(b: Values) -> Values:
    low = _fields(b[:, :128].reshape(-1, 2, 64), range(0, 8, 4), 15).flatten(1)
    high = _fields(b[:, 128:192].reshape(-1, 2, 32), range(0, 8, 2), 3).flatten(1)
    q = (low | (high << 4)).to(torch.float32) - 32
    d = _half(b, 208) * b[:, 192:208].view(torch.int8)
    return (d[..., None] * q.reshape(-1, 16, 16)).flatten(1)


def _q8_k(b: Values) -> Values:
    return b[:, :4].contiguous().view(torch.float32) * b[:, 4:260].view(torch.int8)


def _iq4_nl(b: Values) -> Values:
    return _half(b, 0) * _looked_up(_IQ4_VALUES, b[:, 2:].unsqueeze(1)).flatten(1)


def _iq4_xs(b: Values) -> Values:
    high = _fields(b[:, 2:4, None], range(0, 8, 2), 3).flatten(1)
    low = _fields(b[:, 4:8, None], range(0, 8, 4), 15).flatten(1)
    d = _half(b, 0) * ((low | (high << 4)).to(torch.float32) - 32)
    return (d[..., None] * _looked_up(_IQ4_VALUES, b[:, 8:].reshape(-1, 8, 16))).flatten(1)


def _tq1_0(b: Values) -> Values:
    """Five trits a byte, as a base-3 fraction of 256: multiply by 3 and the next trit is what overflows."""
    powers = torch.tensor([[1], [3], [9], [27], [81]], dtype=torch.uint8, device=b.device)
    runs = [b[:, None, :32] * powers, b[:, None, 32:48] * powers, b[:, None, 48:52] * powers[:4]]
    fractions = torch.cat([run.flatten(1) for run in runs], 1)
    return _half(b, 52) * (((fractions.int() * 3) >> 8) - 1)


def _tq2_0(b: Values) -> Values:
    q = _fields(b[:, :64].reshape(-1, 2, 32), range(0, 8, 2), 3).flatten(1)
    return _half(b, 64) * (q.to(torch.float32) - 1)


def _mxfp4_block(b: Values) -> Values:
    # ggml keeps 2·e2m1 and half the scale: the largest exponent (255) stays finite.
    d = torch.tensor(_E8M0_HALF).to(b.device)[b[:, :1].int()]
    return d * (2 * _looked_up(_E2M1, b[:, 1:].unsqueeze(1))).flatten(1)


def _nvfp4_block(b: Values) -> Values:
    d = torch.tensor(_UE4M3_HALF).to(b.device)[b[:, :4].int()]
    return (d[..., None] * (2 * _looked_up(_E2M1, b[:, 4:].reshape(-1, 4, 8)))).flatten(1)


def _looked_up(table: tuple[float, ...], b: Values) -> Values:
    """(n, runs, k) bytes → (n, runs, 2k): a run's low nibbles, then its high ones, looked up."""
    return torch.tensor(table).to(b.device)[_fields(b, range(0, 8, 4), 15).flatten(-2).int()]


# --- tables -------------------------------------------------------------------------------------------

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_IQ4_VALUES = (
    *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
    *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
)
_E8M0 = (*(2.0 ** (e - 127) for e in range(255)), math.nan)
_E8M0_HALF = tuple(2.0 ** (e - 128) for e in range(256))
# Unsigned e4m3 of NVFP4 in ggml, halved: 4 bits of exponent with bias 7, 3 of mantissa; 0x7F counts as 0.
_UE4M3_HALF = tuple(
    0.0
    if byte in (0, 127)
    else (byte & 7) * 2.0**-10
    if byte >> 3 & 15 == 0
    else (1 + (byte & 7) / 8) * 2.0 ** ((byte >> 3 & 15) - 8)
    for byte in range(256)
)


@dataclass(frozen=True, slots=True)
class _Block:
    elements: int
    size_bytes: int
    decode: Callable[[Values], Values]


# The grid types (IQ1, IQ2, IQ3) need codebooks of up to 2,048 rows each and are left out; so is Q1_0.
_DECODERS: dict[str, Callable[[Values], Values]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "q8_k": _q8_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "tq1_0": _tq1_0,
    "tq2_0": _tq2_0,
    "mxfp4": _mxfp4_block,
    "nvfp4": _nvfp4_block,
}
_BLOCKS = {
    block.dtype: _Block(block.elements, block.size_bytes, _DECODERS[block.dtype])
    for block in GGML_TYPES.values()
    if block.dtype in _DECODERS
}
_SCHEMES: dict[str, Callable[[Tensor, Mapping[str, Values]], Values]] = {
    "plain": _plain,
    "gguf": _gguf,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "bnb-nf4": _bnb4,
    "bnb-fp4": _bnb4,
    "bnb-int8": _bnb8,
    "fp8": _scaled,
    "fp8-block": _scaled,
    "quanto": _scaled,
    "nvfp4": _fp4,
    "mxfp4": _fp4,
    "mlx": _mlx,
}
