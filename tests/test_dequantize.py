"""Dequantised values: block types against the reference package, the others against slow loops."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from typing import Any

import gguf as reference
import numpy as np
import pytest
import torch

from attncli.checkpoint import dequantize as module
from attncli.checkpoint.dequantize import dequantize, supported
from attncli.checkpoint.quantized import logical_tensors
from attncli.errors import CheckpointError
from attncli.records import Array, Config, Tensor

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def tensor_of(
    state: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any] | None = None,
    key: str = "quantization_config",
) -> tuple[Tensor, dict[str, torch.Tensor]]:
    """The one logical tensor of a state dict, with its parts, as attncli itself joins them."""
    arrays = [
        Array(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), "f", 0, t.numel() * t.element_size())
        for name, t in state.items()
    ]
    configs = [Config("config.json", {key: settings})] if settings else []
    tensors, anomalies = logical_tensors(
        arrays, configs, lambda a: bytes(state[a.name].view(torch.uint8).tolist())
    )
    assert anomalies == ()
    (tensor,) = tensors
    return tensor, {role: state[part.name] for role, part in tensor.parts.items()}


def values_of(
    state: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any] | None = None,
    key: str = "quantization_config",
) -> torch.Tensor:
    tensor, parts = tensor_of(state, settings, key)
    assert supported(tensor)
    values = dequantize(tensor, parts)
    assert values.dtype == torch.float32
    assert tuple(values.shape) == tensor.shape
    return values


def stream(numbers: list[int], bits: int) -> list[int]:
    """`numbers` as one stream of bits, lowest first, in words of 32 bits (signed)."""
    whole = sum(number << (i * bits) for i, number in enumerate(numbers))
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(math.ceil(len(numbers) * bits / 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def numbers(rows: int, cols: int, bits: int) -> list[list[int]]:
    return [[random.randrange(1 << bits) for _ in range(cols)] for _ in range(rows)]


def pairs(rows: list[list[int]], first: str = "low") -> torch.Tensor:
    low, high = (0, 1) if first == "low" else (1, 0)
    packed = [[row[i + low] | row[i + high] << 4 for i in range(0, len(row), 2)] for row in rows]
    return torch.tensor(packed, dtype=torch.uint8)


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(*shape) + 0.5).to(dtype)


def words(table: list[list[int]], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.int32).view(dtype)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, params=[1 << 20, 100], ids=["one piece", "many pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", request.param)


# --- GGUF block types -----------------------------------------------------------------------------------


def block_tensor(kind: str, raw: torch.Tensor) -> Tensor:
    elements, size = reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[kind.upper()]]
    shape = (raw.shape[0], raw.shape[1] // size * elements)
    array = Array("w", shape, kind, "m.gguf", 0, raw.numel())
    return Tensor("w", shape, kind, "m.gguf", {"weight": array}, "gguf")


REFERENCED = sorted(set(module._BLOCKS) - {"q8_k"})


@pytest.mark.parametrize("kind", REFERENCED)
def test_random_blocks_agree_with_the_reference_to_the_bit(kind: str) -> None:
    """Every byte is random, but for the float16 scales: those are kept finite."""
    qtype = reference.GGMLQuantizationType[kind.upper()]
    _, size = reference.GGML_QUANT_SIZES[qtype]
    raw = np.random.default_rng(0).integers(0, 256, (8, 3, size), dtype=np.uint8)
    half_at = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "tq1_0": (52,), "tq2_0": (64,)}
    half_at |= {"q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "mxfp4": (), "nvfp4": ()}
    for at in half_at.get(kind, (0,)):
        raw[..., at + 1] &= 0xBF  # clears the highest bit of the exponent
    raw = raw.reshape(8, 3 * size)
    expected = reference.quants.dequantize(raw, qtype)
    got = dequantize(block_tensor(kind, torch.from_numpy(raw)), {"weight": torch.from_numpy(raw).reshape(-1)})
    assert np.isfinite(expected).all()
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_quantised_values_come_back_close_to_themselves(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((4, 512), dtype=np.float32)
    raw = torch.from_numpy(reference.quants.quantize(values, reference.GGMLQuantizationType[kind.upper()]))
    got = dequantize(block_tensor(kind, raw), {"weight": raw})
    assert np.corrcoef(got.numpy().ravel(), values.ravel())[0, 1] > 0.98


def test_q8_k_is_a_float32_scale_times_int8() -> None:
    raw = torch.randint(0, 256, (2, 292), dtype=torch.uint8)
    raw[:, :4] = torch.tensor([[0.5], [-2.0]]).view(torch.uint8)
    expected = [
        [scale * (byte - 256 if byte > 127 else byte) for byte in raw[row, 4:260].tolist()]
        for row, scale in enumerate([0.5, -2.0])
    ]
    assert torch.equal(dequantize(block_tensor("q8_k", raw), {"weight": raw}), torch.tensor(expected))


@pytest.mark.parametrize(
    "kind", ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "q8_1", "q1_0"]
)
def test_grid_types_are_refused_by_name(kind: str) -> None:
    _, size = reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[kind.upper()]]
    raw = torch.zeros(2, size, dtype=torch.uint8)
    tensor = block_tensor(kind, raw)
    assert not supported(tensor)
    with pytest.raises(CheckpointError, match=f"stored as {kind}, which attncli cannot decode"):
        dequantize(tensor, {"weight": raw})


def test_too_few_bytes_are_refused() -> None:
    tensor = block_tensor("q4_0", torch.zeros(4, 18, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="71 bytes were read for 4 blocks of 18"):
        dequantize(tensor, {"weight": torch.zeros(71, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="its parts weight were not read"):
        dequantize(tensor, {})


# --- GPTQ and AWQ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["none", "sorted", "shuffled"])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_agrees_with_its_definition(bits: int, order: str, version: int) -> None:
    ins, outs, groups = 64, 32, 2
    q, z, s = numbers(ins, outs, bits), numbers(groups, outs, bits), scales(groups, outs)
    g = [i // 32 for i in range(ins)]
    if order == "shuffled":
        random.shuffle(g)
    stored = [[(zero - (version == 1)) % (1 << bits) for zero in row] for row in z]
    state = {
        "x.qweight": words([stream([q[i][o] for i in range(ins)], bits) for o in range(outs)]).T.contiguous(),
        "x.qzeros": words([stream(row, bits) for row in stored]),
        "x.scales": s,
    }
    if order != "none":
        state["x.g_idx"] = torch.tensor(g, dtype=torch.int32)
    expected = [[float(s[g[i], o]) * (q[i][o] - z[g[i]][o]) for i in range(ins)] for o in range(outs)]
    settings = {"bits": bits, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
    assert torch.equal(values_of(state, settings), torch.tensor(expected))


def test_gptq_without_zeros_is_centred() -> None:
    q = numbers(32, 8, 4)
    state = {
        "x.qweight": words([stream([q[i][o] for i in range(32)], 4) for o in range(8)]).T.contiguous(),
        "x.scales": torch.ones(1, 8),
    }
    expected = torch.tensor(q, dtype=torch.float32).T - 8
    assert torch.equal(values_of(state, {"bits": 4}), expected)


@pytest.mark.parametrize("index", [-1, 2])
def test_gptq_groups_outside_the_scales_are_refused(index: int) -> None:
    state = {
        "x.qweight": torch.zeros(8, 8, dtype=torch.int32),
        "x.qzeros": torch.zeros(2, 1, dtype=torch.int32),
        "x.scales": torch.ones(2, 8),
        "x.g_idx": torch.full((64,), index, dtype=torch.int32),
    }
    with pytest.raises(CheckpointError, match=r"its scales \(8, 2\) do not serve all 64 inputs"):
        values_of(state)


def test_awq_agrees_with_its_definition() -> None:
    ins, outs, size = 64, 24, 32
    q, z, s = numbers(ins, outs, 4), numbers(ins // size, outs, 4), scales(ins // size, outs)

    def packed(table: list[list[int]]) -> torch.Tensor:
        """Nibble i of a word holds output [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight."""
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return words(
            [
                [stream([row[eight + i] for i in order], 4)[0] for eight in range(0, len(row), 8)]
                for row in table
            ]
        )

    state = {"x.qweight": packed(q), "x.qzeros": packed(z), "x.scales": s}
    expected = [
        [float(s[i // size, o]) * (q[i][o] - z[i // size][o]) for i in range(ins)] for o in range(outs)
    ]
    assert torch.equal(values_of(state), torch.tensor(expected))


# --- bitsandbytes ---------------------------------------------------------------------------------------

NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]


def bnb_state(shape: list[int], q: list[int], absmax: torch.Tensor, **more: Any) -> dict[str, torch.Tensor]:
    numbers_of = {k: v for k, v in more.items() if not isinstance(v, torch.Tensor)}
    text = json.dumps({"shape": shape, "blocksize": 64, **numbers_of}).encode()
    padded = q + [0] * (len(q) % 2)
    return {
        "x.weight": pairs([padded], "high").reshape(-1, 1),
        "x.weight.absmax": absmax,
        "x.weight.quant_map": torch.tensor(NF4),
        **{f"x.weight.{k}": v for k, v in more.items() if isinstance(v, torch.Tensor)},
        "x.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }


@pytest.mark.parametrize("shape", [[4, 64], [2, 5], [3, 7], [1, 130]])
def test_nf4_agrees_with_its_definition(shape: list[int]) -> None:
    count = math.prod(shape)
    q, absmax = (
        [random.randrange(16) for _ in range(count)],
        scales(math.ceil(count / 64), dtype=torch.float32),
    )
    expected = torch.tensor([float(torch.tensor(NF4[n]) * absmax[i // 64]) for i, n in enumerate(q)])
    assert torch.equal(values_of(bnb_state(shape, q, absmax)), expected.reshape(shape))


def test_nested_absmax_agrees_with_its_definition() -> None:
    count, nested = 64 * 600, 256
    q = [random.randrange(16) for _ in range(count)]
    codes = torch.randint(0, 256, (600,), dtype=torch.uint8)
    table, outer = torch.rand(256), torch.rand(3)
    state = bnb_state(
        [600, 64],
        q,
        codes,
        nested_blocksize=nested,
        nested_offset=0.25,
        nested_absmax=outer,
        nested_quant_map=table,
    )
    absmax = [table[int(code)] * outer[i // nested] + 0.25 for i, code in enumerate(codes)]
    expected = torch.stack(
        [torch.tensor([NF4[n] for n in q[i * 64 : i * 64 + 64]]) * a for i, a in enumerate(absmax)]
    )
    assert torch.allclose(values_of(state), expected, rtol=1e-6, atol=0)


def test_a_nested_block_larger_than_memory_costs_nothing() -> None:
    state = bnb_state(
        [2, 64],
        [7] * 128,
        torch.zeros(2, dtype=torch.uint8),
        nested_blocksize=1 << 39,
        nested_absmax=torch.ones(1),
        nested_quant_map=torch.ones(256),
    )
    assert values_of(state).eq(0).all()


def test_bytes_of_nf4_may_lie_in_another_dtype() -> None:
    """FSDP keeps the pairs as bfloat16, so that they are sharded like the other weights."""
    q = [random.randrange(16) for _ in range(128)]
    state = bnb_state([2, 64], q, torch.ones(2))
    as_bytes = values_of(state)
    state["x.weight"] = state["x.weight"].view(-1).view(torch.bfloat16).reshape(-1, 1)
    assert torch.equal(values_of(state), as_bytes)


def test_too_few_scales_of_nf4_are_refused() -> None:
    with pytest.raises(CheckpointError, match="1 scales for 128 elements in blocks of 64"):
        values_of(bnb_state([2, 64], [0] * 128, torch.ones(1)))


def test_llm_int8_rows_are_scaled_by_their_largest_magnitude() -> None:
    weight, largest = torch.randint(-127, 128, (4, 8), dtype=torch.int8), scales(4, dtype=torch.float32)
    state = {"x.weight": weight, "x.SCB": largest, "x.weight_format": torch.tensor(0, dtype=torch.uint8)}
    expected = [[int(weight[o, i]) * float(largest[o]) / 127 for i in range(8)] for o in range(4)]
    assert torch.allclose(values_of(state), torch.tensor(expected), rtol=1e-6)
    state["x.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="tiled for one kind of GPU"):
        values_of(state)


# --- fp8, int8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_blocks_agree_with_their_definition(dtype: torch.dtype) -> None:
    weight, scale = torch.randn(2, 40, 36).to(dtype), scales(2, 3, 3, dtype=torch.float32)
    state = {"x.weight": weight, "x.weight_scale_inv": scale}
    expected = [
        [[float(weight[e, o, i].float() * scale[e, o // 16, i // 16]) for i in range(36)] for o in range(40)]
        for e in range(2)
    ]
    assert torch.equal(values_of(state, {"weight_block_size": [16, 16]}), torch.tensor(expected))


def test_a_block_larger_than_memory_costs_nothing() -> None:
    weight, scale = torch.ones(4, 64).to(torch.float8_e4m3fn), torch.tensor([[2.0, 3.0]])
    got = values_of({"x.weight": weight, "x.weight_scale": scale}, {"weight_block_size": [1 << 39, 32]})
    assert got[:, :32].eq(2).all()
    assert got[:, 32:].eq(3).all()


def test_fp8_scales_of_bytes_are_exponents() -> None:
    weight, exponents = (
        torch.randn(4, 64).to(torch.float8_e4m3fn),
        torch.randint(120, 130, (4, 2), dtype=torch.uint8),
    )
    state = {"x.weight": weight, "x.weight_scale": exponents}
    expected = [
        [float(weight[o, i].float()) * 2.0 ** (int(exponents[o, i // 32]) - 127) for i in range(64)]
        for o in range(4)
    ]
    assert torch.equal(values_of(state), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (4, 1), (1, 8)])
def test_fp8_scales_of_rows_and_tensors_broadcast(shape: tuple[int, ...]) -> None:
    weight, scale = torch.randn(4, 8).to(torch.float8_e4m3fn), torch.rand(shape)
    rows = scale.reshape(4, 1) if scale.numel() == 4 else scale
    assert torch.equal(values_of({"x.weight": weight, "x.weight_scale": scale}), weight.float() * rows)


def test_padded_fp8_scales_are_refused() -> None:
    state = {
        "x.weight": torch.zeros(300, 256).to(torch.float8_e4m3fn),
        "x.weight_scale_inv": torch.ones(5, 2),
    }
    tensor, parts = tensor_of(state, {"weight_block_size": [128, 128]})
    assert not supported(tensor)
    with pytest.raises(CheckpointError, match="fp8-block float8_e4m3fn, which attncli cannot decode"):
        dequantize(tensor, parts)


@pytest.mark.parametrize("with_zeros", [False, True])
def test_int8_rows_and_groups_agree_with_their_definition(with_zeros: bool) -> None:
    weight = torch.randint(-128, 128, (4, 64), dtype=torch.int8)
    for groups in (1, 2):
        scale, zero = scales(4, groups), torch.randint(-9, 9, (4, groups), dtype=torch.int8)
        state = {"x.weight": weight, "x.weight_scale": scale}
        if with_zeros:
            state["x.weight_zero_point"] = zero
        expected = [
            [
                float(scale[o, i * groups // 64])
                * (int(weight[o, i]) - with_zeros * int(zero[o, i * groups // 64]))
                for i in range(64)
            ]
            for o in range(4)
        ]
        assert torch.equal(values_of(state), torch.tensor(expected))


# --- compressed-tensors, NVFP4, MXFP4 -------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_compressed_tensors_agree_with_their_definition(
    bits: int, groups: int, with_zeros: bool, order: bool
) -> None:
    outs, ins = 12, 64
    q, z, s = numbers(outs, ins, bits), numbers(outs, groups, bits), scales(outs, groups)
    g = [i * groups // ins for i in range(ins)]
    if order:
        random.shuffle(g)
    state = {
        "x.weight_packed": words([stream(row, bits) for row in q]),
        "x.weight_scale": s,
        "x.weight_shape": torch.tensor([outs, ins]),
    }
    if with_zeros:
        packed = [stream([z[o][k] for o in range(outs)], bits) for k in range(groups)]
        state["x.weight_zero_point"] = words(packed).T.contiguous()
    if order:
        state["x.weight_g_idx"] = torch.tensor(g, dtype=torch.int32)
    middle = 1 << (bits - 1)  # stored numbers and zeros are both shifted by it
    expected = [
        [float(s[o, g[i]]) * (q[o][i] - (z[o][g[i]] if with_zeros else middle)) for i in range(ins)]
        for o in range(outs)
    ]
    assert torch.equal(values_of(state), torch.tensor(expected))


def test_an_unused_order_of_compressed_tensors_is_ignored() -> None:
    state = {
        "x.weight_packed": words([stream(row, 4) for row in numbers(4, 64, 4)]),
        "x.weight_scale": scales(4, 2),
        "x.weight_shape": torch.tensor([4, 64]),
    }
    expected = values_of(state)
    state["x.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    assert torch.equal(values_of(state), expected)


@pytest.mark.parametrize("maker", ["compressed-tensors", "modelopt"])
def test_nvfp4_agrees_with_its_definition(maker: str) -> None:
    q, scale, whole = numbers(4, 32, 4), scales(4, 2, dtype=torch.float8_e4m3fn), torch.tensor([0.25])
    if maker == "modelopt":
        state = {"x.weight": pairs(q), "x.weight_scale": scale, "x.weight_scale_2": whole.reshape(())}
        factor = 0.25
    else:
        state = {"x.weight_packed": pairs(q), "x.weight_scale": scale, "x.weight_global_scale": whole}
        factor = 1 / 0.25
    expected = [
        [E2M1[q[o][i]] * float(scale[o, i // 16].float()) * factor for i in range(32)] for o in range(4)
    ]
    assert torch.equal(values_of(state), torch.tensor(expected))


@pytest.mark.parametrize("names", [("x_blocks", "x_scales"), ("x.weight_packed", "x.weight_scale")])
def test_mxfp4_agrees_with_its_definition(names: tuple[str, str]) -> None:
    q, exponents = numbers(2 * 3, 64, 4), torch.randint(100, 150, (2, 3, 2), dtype=torch.uint8)
    packed = pairs(q).reshape(2, 3, 2, 16)
    state = {names[0]: packed if names[0] == "x_blocks" else packed.flatten(2), names[1]: exponents}
    expected = [
        [
            [E2M1[q[e * 3 + o][i]] * 2.0 ** (int(exponents[e, o, i // 32]) - 127) for i in range(64)]
            for o in range(3)
        ]
        for e in range(2)
    ]
    assert torch.equal(values_of(state), torch.tensor(expected))


def test_the_largest_exponent_of_mxfp4_is_nan() -> None:
    state = {
        "x_blocks": torch.full((1, 1, 1, 16), 0x22, dtype=torch.uint8),
        "x_scales": torch.full((1, 1, 1), 255, dtype=torch.uint8),
    }
    assert values_of(state).isnan().all()


# --- MLX, quanto, plain ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("experts", [None, 2])
def test_mlx_agrees_with_its_definition(bits: int, experts: int | None) -> None:
    outs, ins, size = 6, 128, 64
    q, s, b = numbers(outs, ins, bits), scales(outs, 2), torch.randn(outs, 2)
    packed = words([stream(row, bits) for row in q], torch.uint32)
    state = {"x.weight": packed, "x.scales": s, "x.biases": b}
    expected = torch.tensor(
        [[float(s[o, i // size]) * q[o][i] + float(b[o, i // size]) for i in range(ins)] for o in range(outs)]
    )
    if experts:
        state = {k: v.reshape(experts, outs // experts, -1) for k, v in state.items()}
        expected = expected.reshape(experts, outs // experts, ins)
    got = values_of(state, {"bits": bits, "group_size": size}, "quantization")
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "size"), [("mxfp4", 32), ("nvfp4", 16), ("mxfp8", 32)])
def test_microscaling_kinds_of_mlx_agree_with_their_definition(kind: str, size: int) -> None:
    if kind == "mxfp8":
        codes = torch.randn(4, 64).to(torch.float8_e4m3fn)
        element, packed = codes.float(), codes.view(torch.uint32)
    else:
        q = numbers(4, 64, 4)
        element = torch.tensor([[E2M1[n] for n in row] for row in q])
        packed = words([stream(row, 4) for row in q], torch.uint32)
    if kind == "nvfp4":
        scale = scales(4, 64 // size, dtype=torch.float8_e4m3fn)
        factors, stored = scale.float(), scale.view(torch.uint8)
    else:
        stored = torch.randint(120, 130, (4, 64 // size), dtype=torch.uint8)
        factors = torch.tensor([[2.0 ** (e - 127) for e in row] for row in stored.tolist()])
    expected = element * factors.repeat_interleave(size, 1)
    assert torch.equal(values_of({"x.weight": packed, "x.scales": stored}), expected)


def test_quanto_and_plain_tensors_are_scaled_and_converted() -> None:
    data, scale = torch.randint(-128, 128, (4, 8), dtype=torch.int8), torch.rand(4, 1)
    assert torch.equal(values_of({"x.weight._data": data, "x.weight._scale": scale}), data.float() * scale)
    plain = torch.randn(3, 5, dtype=torch.bfloat16)
    assert torch.equal(values_of({"x.weight": plain}), plain.float())


def test_hqq_is_not_supported() -> None:
    state = {"x.W_q": torch.zeros(512, 1, dtype=torch.uint8), "x.shape": torch.tensor([16, 64])}
    tensor, parts = tensor_of(state)
    assert not supported(tensor)
    with pytest.raises(CheckpointError, match="hqq int4, which attncli cannot decode"):
        dequantize(tensor, parts)


# --- parts that do not fit each other -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {
                "x.weight_packed": torch.zeros(4, 8, dtype=torch.int32),
                "x.weight_scale": torch.ones(3, 2),
                "x.weight_shape": torch.tensor([4, 64]),
            },
            "3 rows of scales for 4 rows of weights",
        ),
        (
            {
                "x.weight_packed": torch.zeros(4, 8, dtype=torch.int32),
                "x.weight_scale": torch.ones(4, 2),
                "x.weight_shape": torch.tensor([4, 64]),
                "x.weight_zero_point": torch.zeros(3, 2, dtype=torch.int8),
            },
            "zero points (3, 2) for scales (4, 2)",
        ),
        (
            {
                "x.weight": torch.zeros(4, 32, dtype=torch.uint8),
                "x.weight_scale": torch.ones(4, 4).to(torch.float8_e4m3fn),
                "x.weight_scale_2": torch.ones(3),
            },
            "3 scales of the whole for 4 experts",
        ),
        (
            {
                "x.weight": torch.zeros(4, 20, dtype=torch.uint32),
                "x.scales": torch.ones(4, 2),
                "x.biases": torch.ones(4, 1),
            },
            "biases (4, 1) for scales (4, 2)",
        ),
        (
            bnb_state([2, 64], [0] * 128, torch.zeros(2, dtype=torch.uint8)),
            "the scales of the scales are missing",
        ),
        (
            bnb_state(
                [2, 64],
                [0] * 128,
                torch.zeros(2, dtype=torch.uint8),
                nested_quant_map=torch.zeros(256),
                nested_absmax=torch.zeros(0),
            ),
            "its nested scales are too few",
        ),
        (
            {"x.weight": torch.zeros(4, 8, dtype=torch.int8), "x.SCB": torch.ones(3)},
            "3 scales for 4 rows",
        ),
        (
            {"x.weight": torch.zeros(4, 8, dtype=torch.int8), "x.weight_scale": torch.ones(3, 1)},
            "scales (3, 1) for values (4, 8)",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(state: dict[str, torch.Tensor], message: str) -> None:
    tensor, parts = tensor_of(state)
    with pytest.raises(CheckpointError) as caught:
        dequantize(tensor, parts)
    assert message in caught.value.problem
    assert caught.value.subject == tensor.name
    assert caught.value.problem.endswith(".")
