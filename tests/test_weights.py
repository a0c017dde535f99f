"""What is measured on weights: closed forms first, then a slow obvious oracle, then hostile values."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from attncli.errors import CheckpointError
from attncli.records import (
    Array,
    HeadRows,
    Layer,
    LayerTensor,
    Measurement,
    Norm,
    ScoreSide,
    ScoreTerm,
    Tensor,
)
from attncli.weights import head_anomalies, score_bounds, statistics, value_measurements

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BLOCK = statistics.BLOCK


class Held:
    """Tensors in memory as a source of values, handed out in pieces; counts what is loaded."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], missing: tuple[str, ...] = (), piece: int = 1 << 19
    ):
        self.held = dict(tensors)
        self.missing = missing
        self.piece = piece
        self.loaded: list[str] = []

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(record(name, tensor) for name, tensor in self.held.items())

    def find(self, name: str) -> Tensor | None:
        return record(name, self.held[name]) if name in self.held else None

    def available(self, tensor: Tensor) -> bool:
        return tensor.name not in self.missing

    def load(self, tensor: Tensor) -> torch.Tensor:
        self.loaded.append(tensor.name)
        return self.held[tensor.name]

    def parts(self, tensor: Tensor) -> Iterator[Iterator[torch.Tensor]]:
        flat = self.held[tensor.name].reshape(-1)
        pieces = [flat[first : first + self.piece] for first in range(0, flat.numel(), self.piece)]
        for first in range(0, len(pieces), 3):
            yield iter(pieces[first : first + 3])


def record(name: str, tensor: torch.Tensor, scheme: str = "plain") -> Tensor:
    dtype, shape = str(tensor.dtype)[6:], tuple(tensor.shape)
    array = Array(name, shape, dtype, "data.bin", 0, tensor.numel() * tensor.element_size())
    return Tensor(name, shape, dtype, "data.bin", {"weight": array}, scheme)


def measured(tensor: torch.Tensor) -> dict[str, float | int | str | None]:
    held = Held({"w": tensor})
    rows = value_measurements(held.tensors, held).measurements
    assert {row.layer for row in rows} == {"w"}
    return {row.metric: row.value for row in rows}


def oracle(tensor: torch.Tensor) -> dict[str, float | int | None]:
    """One element at a time, as the words say it."""
    elements = [abs(value) for value in tensor.reshape(-1).tolist()]
    finite = [float(value) for value in elements if math.isfinite(value)]
    largest = max(finite, default=None)
    scale = largest or 1.0
    return {
        "nan_count": sum(math.isnan(value) for value in elements),
        "inf_count": sum(math.isinf(value) for value in elements),
        "absmax": largest,
        "rms": scale * math.sqrt(math.fsum((v / scale) ** 2 for v in finite) / len(finite))
        if finite
        else None,
        "zero_fraction": sum(value == 0 for value in elements) / len(elements) if elements else None,
    }


def agrees(tensor: torch.Tensor) -> bool:
    found, expected = measured(tensor), oracle(tensor)
    rms, expected_rms = found.pop("rms"), expected.pop("rms")
    assert found == expected
    if expected_rms is None:
        return rms is None
    return rms == pytest.approx(expected_rms, rel=1e-5, abs=0)


# --- values: closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_alternating_ones_have_absmax_and_rms_one(dtype: torch.dtype) -> None:
    weight = torch.ones(64, 64, dtype=dtype)
    weight[::2] = -1
    assert measured(weight) == {
        "nan_count": 0, "inf_count": 0, "absmax": 1.0, "rms": 1.0, "zero_fraction": 0.0,
    }  # fmt: skip


def test_a_quarter_of_zeros_of_either_sign_is_a_zero_fraction_of_a_quarter() -> None:
    assert measured(torch.tensor([0.0, 3.0, -4.0, 5.0] * 1000))["zero_fraction"] == 0.25
    assert measured(torch.tensor([-0.0, 3.0, -4.0, 5.0] * 1000))["zero_fraction"] == 0.25


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_zeros_are_measured_and_nothing_is_divided_by_them(dtype: torch.dtype) -> None:
    found = measured(torch.zeros(BLOCK + 3, dtype=dtype))
    assert (found["absmax"], found["rms"], found["zero_fraction"]) == (0.0, 0.0, 1.0)


def test_an_empty_tensor_has_no_absmax_rms_or_zero_fraction() -> None:
    assert measured(torch.empty(0, 7)) == {
        "nan_count": 0, "inf_count": 0, "absmax": None, "rms": None, "zero_fraction": None,
    }  # fmt: skip


def test_a_scalar_is_measured() -> None:
    assert measured(torch.tensor(-2.5)) == {
        "nan_count": 0, "inf_count": 0, "absmax": 2.5, "rms": 2.5, "zero_fraction": 0.0,
    }  # fmt: skip


def test_where_nothing_is_finite_there_is_no_absmax() -> None:
    found = measured(torch.tensor([math.nan, math.inf, -math.inf] * 5))
    assert found == {"nan_count": 5, "inf_count": 10, "absmax": None, "rms": None, "zero_fraction": 0.0}


# --- values: the oracle -------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [1, 7, 1023, 1025, BLOCK - 1, BLOCK + 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sizes_around_every_internal_border_agree_with_the_oracle(dtype: torch.dtype, numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    assert agrees((torch.randn(numel, generator=generator) * 0.02).to(dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -0.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_odd_value_is_found_wherever_it_stands(dtype: torch.dtype, value: float) -> None:
    numel = 3 * BLOCK + 1025
    places = [0, 1, 1023, BLOCK - 1, BLOCK, 2 * BLOCK + 17, numel - 2, numel - 1]
    weight = torch.full((numel,), 0.5, dtype=dtype)
    for place in places:
        weight[place] = value
        found = measured(weight)
        counts = (found["nan_count"], found["inf_count"], found["zero_fraction"])
        expected = (int(math.isnan(value)), int(math.isinf(value)), 1 / numel if value == 0 else 0)
        assert counts == expected
        assert found["absmax"] == 0.5
        weight[place] = 0.5


def test_a_nan_is_counted_whatever_its_bits() -> None:
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    assert measured(bits.view(torch.float32))["nan_count"] == 5


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, 1e30),  # its square overflows float32
        (torch.float32, torch.finfo(torch.float32).max),
        (torch.float32, 1e-30),  # its square underflows
        (torch.float32, 1e-42),  # subnormal
        (torch.float32, 2.0**60),  # one square fits float32, the sum of a row does not
        (torch.float32, 1.2345 * 2.0**-69),  # the square is subnormal: few digits
        (torch.float32, 2.0**58),
        (torch.float32, 2.0**-44),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, torch.finfo(torch.bfloat16).max),
        (torch.bfloat16, 1e-39),
        (torch.float16, 65504.0),
        (torch.float16, 6e-8),
        (torch.float64, 1e200),
        (torch.float64, torch.finfo(torch.float64).max),
        (torch.float64, 1e-200),
        (torch.float64, 5e-324),
    ],
)
def test_extreme_magnitudes_are_measured_to_the_same_accuracy(dtype: torch.dtype, value: float) -> None:
    weight = torch.full((5000,), value, dtype=dtype)
    exact = weight[0].double().item()
    found = measured(weight)
    assert found["absmax"] == exact
    assert found["rms"] == pytest.approx(exact, rel=1e-5, abs=0)
    weight[1::2] = 0
    assert measured(weight)["rms"] == pytest.approx(exact / math.sqrt(2), rel=1e-5, abs=0)


@pytest.mark.parametrize("value", [0.1, 1.0 / 3.0, 1.7, 12345.678])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_constant_does_not_let_rounding_pile_up(dtype: torch.dtype, value: float) -> None:
    weight = torch.full((9 * BLOCK + 1000,), value, dtype=dtype)
    assert measured(weight)["rms"] == pytest.approx(weight[0].double().item(), rel=1e-5, abs=0)


def test_many_tiny_values_beside_a_small_one_are_not_lost_to_underflow() -> None:
    weight = torch.full((BLOCK,), 2.0**-62)
    weight[5] = 2.0**-44
    exact = math.sqrt(weight.double().square().mean().item())
    assert measured(weight)["rms"] == pytest.approx(exact, rel=1e-5, abs=0)


@pytest.mark.parametrize("scales", [(1e30, 1e-30), (1e-30, 1e30), (1.0, 1e25)])
def test_blocks_of_very_different_magnitude_add_up(scales: tuple[float, float]) -> None:
    weight = torch.cat([torch.full((BLOCK,), scale) for scale in scales])
    exact = math.sqrt(weight.double().square().mean().item())
    assert measured(weight)["rms"] == pytest.approx(exact, rel=1e-5, abs=0)


def test_finite_values_around_nan_and_inf_still_count() -> None:
    weight = torch.arange(-2000.0, 2000.0).half()
    weight[7], weight[-1], weight[2000] = math.nan, -math.inf, math.nan
    assert agrees(weight)


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.bool],
)
def test_integers_and_booleans_agree_with_the_oracle(dtype: torch.dtype) -> None:
    weight = torch.arange(-600, 700)
    assert agrees((weight % 3 == 0).to(dtype) if dtype == torch.bool else (weight % 120).to(dtype))


def test_the_smallest_integers_do_not_overflow_when_their_sign_goes() -> None:
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        smallest = torch.iinfo(dtype).min
        assert measured(torch.tensor([smallest, 1], dtype=dtype))["absmax"] == -float(smallest)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    ],
)
def test_every_pattern_of_eight_bit_floats_agrees_with_the_oracle(dtype: torch.dtype) -> None:
    weight = torch.arange(256, dtype=torch.uint8).repeat(3).view(dtype)
    found, expected = measured(weight), oracle(weight.float())
    assert found.pop("rms") == pytest.approx(expected.pop("rms"), rel=1e-5)
    assert found == expected


def test_complex_elements_count_by_their_modulus() -> None:
    weight = torch.tensor([3 + 4j, 0j, complex(math.nan, 0), complex(0, math.inf)])
    found = measured(weight)
    assert found["rms"] == pytest.approx(5 / math.sqrt(2))
    assert (found["nan_count"], found["inf_count"], found["absmax"], found["zero_fraction"]) == (
        1,
        1,
        5.0,
        0.25,
    )


def test_a_tensor_that_is_not_contiguous_is_measured_like_its_copy() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    assert agrees(weight.mT)
    assert agrees(weight[::3, ::5])


# --- values: the run ----------------------------------------------------------------------------------


def test_rows_come_in_the_order_of_the_tensors_whatever_thread_read_them() -> None:
    tensors = {
        f"w{i}": torch.full((1 + (i * 7919) % 40_000,), float(i), dtype=FLOATS[i % 4]) for i in range(60)
    }
    held = Held(tensors, piece=1000)
    rows = value_measurements(held.tensors, held).measurements
    assert [row.layer for row in rows[::5]] == list(tensors)
    absmax = {row.layer: row.value for row in rows if row.metric == "absmax"}
    assert absmax == {f"w{i}": float(i) for i in range(60)}
    rms = {row.layer: row.value for row in rows if row.metric == "rms"}
    assert rms == pytest.approx({f"w{i}": float(i) for i in range(60)}, rel=1e-5)
    assert held.loaded == []


def test_quantised_tensors_are_measured_after_dequantisation() -> None:
    held = Held({"w": torch.tensor([1.0, -3.0, 0.0, 0.0])})
    tensor = record("w", held.held["w"], scheme="gguf")
    values = {row.metric: row.value for row in value_measurements([tensor], held).measurements}
    assert values["absmax"] == 3.0
    assert values["zero_fraction"] == 0.5
    assert held.loaded == ["w"]


def test_a_tensor_without_values_is_named_and_the_rest_is_measured() -> None:
    held = Held({"a": torch.ones(3), "b": torch.ones(3)}, missing=("a",))
    result = value_measurements(held.tensors, held)
    assert {row.layer for row in result.measurements} == {"b"}
    assert [(anomaly.kind, anomaly.subject) for anomaly in result.skipped] == [("unread-values", "a")]


def test_the_number_of_threads_is_as_before_even_after_an_error() -> None:
    class Broken(Held):
        def parts(self, tensor: Tensor) -> Iterator[Iterator[torch.Tensor]]:
            yield iter([torch.ones(5)])
            raise CheckpointError("shard", "it ends early.", "Download it again.")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        held = Held({"w": torch.ones(10)})
        value_measurements(held.tensors, held)
        assert torch.get_num_threads() == 2
        broken = Broken({"w": torch.ones(10)})
        with pytest.raises(CheckpointError, match="it ends early"):
            value_measurements(broken.tensors, broken)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_progress_adds_up_to_every_byte() -> None:
    seen: list[int] = []
    held = Held({"a": torch.ones(70 << 18), "b": torch.ones(3)})
    value_measurements(held.tensors, held, seen.append)
    assert sum(seen) == (70 << 20) + 12
    assert len(seen) > 1


@pytest.mark.parametrize("cores", [1, 3])
def test_any_number_of_threads_gives_the_same_numbers(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(5 * BLOCK + 3, generator=torch.Generator().manual_seed(1))
    weight[4] = math.inf
    expected = measured(weight)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    found = measured(weight)
    assert found.pop("rms") == pytest.approx(expected.pop("rms"), rel=1e-12)
    assert found == expected


# --- heads that are zero or not finite ----------------------------------------------------------------


def layer_of(
    terms: tuple[ScoreTerm, ...] = (),
    tensors: Mapping[str, tuple[str, torch.Tensor]] | None = None,
    rows: Mapping[str, HeadRows] | None = None,
) -> Layer:
    return Layer(
        id="layer0",
        path="layer0",
        kind="self",
        layout="separate",
        heads=None,
        kv_heads=None,
        head_dim=None,
        scale=None,
        evidence={},
        tensors=tuple(
            LayerTensor(role, name, tuple(tensor.shape), str(tensor.dtype)[6:], "data.bin")
            for name, (role, tensor) in (tensors or {}).items()
        ),
        rows=rows or {},
        score_terms=terms,
    )


def attention(held: Held) -> Layer:
    """Four query heads of size 4 over two key heads."""
    tensors = {name: (name, tensor) for name, tensor in held.held.items()}
    own, shared = (0, 4, 8, 12), (0, 0, 4, 4)
    rows = {
        "q": HeadRows("q", own, 4),
        "k": HeadRows("k", shared, 4),
        "v": HeadRows("v", shared, 4),
        "o": HeadRows("o", own, 4, out_axis=1),
    }
    return layer_of((), tensors, rows)


def healthy() -> Held:
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}
    return Held({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def faults(held: Held) -> list[tuple[str, str, object, object]]:
    rows = value_measurements(held.tensors, held).measurements
    found = head_anomalies([attention(held)], rows, held)
    return [(a.kind, a.subject, a.evidence["role"], a.evidence.get("heads")) for a in found]


def test_healthy_heads_yield_nothing_and_no_tensor_is_read_for_them() -> None:
    held = healthy()
    held.held["q"][3, 5] = 0.0
    assert faults(held) == []
    assert held.loaded == []


def test_a_zero_query_head_is_named() -> None:
    held = healthy()
    held.held["q"][8:12] = 0.0
    assert faults(held) == [("zero-head", "q", "q", (2,))]
    assert held.loaded == ["q"]


def test_a_zero_key_or_value_head_names_every_query_head_that_uses_it() -> None:
    held = healthy()
    held.held["k"][4:8] = 0.0
    held.held["v"][:4] = -0.0
    assert faults(held) == [("zero-head", "k", "k", (2, 3)), ("zero-head", "v", "v", (0, 1))]


def test_a_head_whose_output_columns_are_zero_is_named() -> None:
    held = healthy()
    held.held["o"][:, 4:8] = 0.0
    assert faults(held) == [("zero-head", "o", "o", (1,))]


def test_as_many_zeros_as_a_head_in_other_places_are_no_zero_head() -> None:
    held = healthy()
    held.held["q"][:, 3:9] = 0.0
    assert faults(held) == []


def test_a_zero_projection_is_one_finding_not_one_a_head() -> None:
    held = healthy()
    held.held["q"].zero_()
    held.held["o"].zero_()
    assert faults(held) == [("zero-projection", "q", "q", None), ("zero-projection", "o", "o", None)]


def test_heads_with_nan_or_inf_are_named_with_their_counts() -> None:
    held = healthy()
    held.held["q"][15, 15] = math.nan
    held.held["k"][0, 0] = -math.inf
    rows = value_measurements(held.tensors, held).measurements
    found = head_anomalies([attention(held)], rows, held)
    assert [(a.kind, a.subject) for a in found] == [("nonfinite-head", "q"), ("nonfinite-head", "k")]
    assert dict(found[0].evidence) == {
        "layer": "layer0", "role": "q", "head": 3, "heads": (3,), "nan_count": 1, "inf_count": 0,
    }  # fmt: skip
    assert (found[1].evidence["heads"], found[1].evidence["inf_count"]) == ((0, 1), 1)


def test_heads_of_a_fused_projection_say_which_rows_they_are() -> None:
    qkv = torch.randn(24, 8, generator=torch.Generator().manual_seed(4))
    qkv[12:16] = 0.0
    held = Held({"qkv": qkv.mT.contiguous()})
    rows = {
        side: HeadRows("qkv", (first, first + 4), 4, 1) for side, first in (("q", 0), ("k", 8), ("v", 16))
    }
    layer = layer_of((), {"qkv": ("qkv", held.held["qkv"])}, rows)
    found = head_anomalies([layer], value_measurements(held.tensors, held).measurements, held)
    assert [(a.evidence["role"], a.evidence["head"]) for a in found] == [("qkv (k rows)", 1)]


# --- score bounds: closed forms -----------------------------------------------------------------------


def rms(size: int, weight: str | None = None, plus_one: bool = False) -> Norm:
    return Norm("rms", weight, plus_one=plus_one, size=size)


def scores(held: Held, *terms: ScoreTerm) -> list[tuple[Any, Any]]:
    """(score_bound, score_typical) of each head."""
    result = score_bounds([layer_of(tuple(terms))], held)
    assert result.skipped == ()
    return pairs(result.measurements)


def pairs(rows: tuple[Measurement, ...]) -> list[tuple[Any, Any]]:
    assert [row.head for row in rows] == [i // 2 for i in range(len(rows))]
    assert {row.metric for row in rows[::2]} <= {"score_bound"}
    assert {row.metric for row in rows[1::2]} <= {"score_typical"}
    return [(row.value, other.value) for row, other in zip(rows[::2], rows[1::2], strict=True)]


def one_head(
    width: int, before: Norm | None, after_q: Norm | None = None, after_k: Norm | None = None, **rows: object
) -> ScoreTerm:
    bias = {"bias": "qb", "bias_starts": (0,)} if rows.get("bias") else {}
    bias_k = {"bias": "kb", "bias_starts": (0,)} if rows.get("bias") else {}
    return ScoreTerm(
        ScoreSide(HeadRows("q", (0,), width, **bias), before, after_q, (0,) if after_q else ()),  # type: ignore[arg-type]
        ScoreSide(HeadRows("k", (0,), width, **bias_k), before, after_k, (0,) if after_k else ()),  # type: ignore[arg-type]
    )


def test_identity_projections_behind_an_rms_norm_reach_the_width() -> None:
    held = Held({"q": torch.eye(4), "k": torch.eye(4)})
    [(bound, typical)] = scores(held, one_head(4, rms(4)))
    assert 4 <= bound <= 4 * (1 + 1e-8)
    assert typical == pytest.approx(2.0)


def test_orthogonal_projections_scale_with_their_factor() -> None:
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(5)).double()).Q
    held = Held({"q": 3 * basis, "k": 5 * basis.mT.contiguous()})
    [(bound, typical)] = scores(held, one_head(16, rms(16)))
    assert bound == pytest.approx(16 * 15)
    assert typical == pytest.approx(15 * math.sqrt(16))


def test_rank_one_projections_have_the_product_of_their_factors_norms() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 3.0, 6.0, 0.0])
    held = Held({"q": torch.outer(a, b), "k": torch.outer(a, b)})
    [(bound, typical)] = scores(held, one_head(3, rms(4)))
    assert bound == pytest.approx(4 * (3 * 7) ** 2)
    assert typical == pytest.approx((3 * 7) ** 2)


def test_the_gain_of_the_norm_before_is_part_of_the_projection() -> None:
    held = Held({"q": torch.eye(4), "k": torch.eye(4), "g": torch.tensor([1.0, -7.0, 2.0, 3.0])})
    [(bound, typical)] = scores(held, one_head(4, rms(4, "g")))
    assert bound == pytest.approx(4 * 49)
    assert typical == pytest.approx(math.sqrt(1 + 7**4 + 2**4 + 3**4))
    held.held["g"] -= 1
    assert scores(held, one_head(4, rms(4, "g", plus_one=True)))[0] == pytest.approx((bound, typical))


def test_behind_a_layer_norm_a_projection_that_only_sums_gives_its_bias_alone() -> None:
    held = Held({"q": torch.full((2, 6), 3.0), "k": torch.full((2, 6), -1.0)})
    held.held |= {"qb": torch.tensor([3.0, 4.0]), "kb": torch.tensor([5.0, 12.0])}
    [(bound, typical)] = scores(held, one_head(2, Norm("layer", None, size=6), bias=True))
    assert 65 <= bound <= 65 * (1 + 1e-8)
    assert typical == pytest.approx(3 * 5 + 4 * 12)


def test_the_offset_of_a_layer_norm_passes_through_the_projection() -> None:
    held = Held(
        {"q": torch.eye(3), "k": torch.eye(3), "g": torch.zeros(3), "beta": torch.tensor([1.0, 2.0, 2.0])}
    )
    [(bound, typical)] = scores(held, one_head(3, Norm("layer", "g", "beta", size=3)))
    assert bound == pytest.approx(9)
    assert typical == pytest.approx(9)


def test_a_layer_norm_removes_the_mean_direction() -> None:
    held = Held({"q": torch.eye(4), "k": torch.eye(4)})
    [(bound, typical)] = scores(held, one_head(4, Norm("layer", None, size=4)))
    assert bound == pytest.approx(4)
    assert typical == pytest.approx(math.sqrt(3))


def test_unit_length_inputs_bound_the_score_by_the_spectral_norms() -> None:
    held = Held({"q": 3 * torch.eye(4), "k": 2 * torch.eye(4)})
    [(bound, typical)] = scores(held, one_head(4, Norm("l2", None, size=4)))
    assert bound == pytest.approx(6)
    assert typical == pytest.approx(6 * math.sqrt(4) / 4)


def test_norms_on_q_and_k_replace_the_projection_even_where_it_is_tiny() -> None:
    held = Held({"q": 1e-6 * torch.eye(4), "k": 1e-6 * torch.eye(4)})
    held.held |= {"gq": torch.tensor([1.0, -2.0, 0.5, 1.0]), "gk": torch.tensor([3.0, 1.0, 1.0, 1.0])}
    [(bound, typical)] = scores(held, one_head(4, rms(4), rms(4, "gq"), rms(4, "gk")))
    assert bound == pytest.approx(4 * 2 * 3)
    assert typical == pytest.approx(math.sqrt(9 + 4 + 0.25 + 1))
    assert held.loaded == ["gq", "gk"]


def test_cosine_attention_is_bounded_by_one() -> None:
    held = Held({})
    unit = Norm("l2", None, size=8)
    [(bound, typical)] = scores(held, one_head(8, None, unit, unit))
    assert bound == pytest.approx(1)
    assert typical == pytest.approx(1 / math.sqrt(8))


def test_a_norm_over_the_whole_projection_uses_each_heads_own_gains() -> None:
    gains = torch.tensor([1.0, 1.0, 10.0, 1.0])
    norm = rms(4, "g")
    side = ScoreSide(HeadRows("q", (0, 2), 2), None, norm, (0, 2))
    bounds = [bound for bound, _ in scores(Held({"g": gains}), ScoreTerm(side, side))]
    assert bounds == pytest.approx([4, 4 * 100])


def test_a_layer_norm_on_q_adds_its_offset() -> None:
    held = Held({"g": torch.tensor([2.0, 1.0]), "beta": torch.tensor([3.0, 4.0])})
    norm = Norm("layer", "g", "beta", size=2)
    [(bound, typical)] = scores(held, one_head(2, None, norm, norm))
    assert bound == pytest.approx((2 * math.sqrt(2) + 5) ** 2)
    assert typical == pytest.approx(math.sqrt(16 + 1 + 2 * (9 * 4 + 16 * 1) + 25**2))


def test_without_any_norm_there_is_no_bound_but_a_typical_size() -> None:
    held = Held({"q": torch.eye(4), "k": torch.eye(4)})
    result = score_bounds([layer_of((one_head(4, None),))], held)
    assert pairs(result.measurements) == [(math.inf, pytest.approx(2.0))]
    assert result.ingredients[0].input_norm is None


def test_a_zero_projection_bounds_the_score_by_zero_whatever_the_input() -> None:
    held = Held({"q": torch.zeros(4, 4), "k": torch.eye(4)})
    assert scores(held, one_head(4, None)) == [(0.0, 0.0)]


def test_the_terms_of_a_score_add_up() -> None:
    held = Held({"q": torch.eye(4), "k": torch.eye(4)})
    term = one_head(4, rms(4))
    [(bound, typical)] = scores(held, term, term)
    assert bound == pytest.approx(8)
    assert typical == pytest.approx(math.sqrt(8))


def test_grouped_query_heads_share_their_key_head() -> None:
    held = Held(
        {
            "q": torch.cat([torch.eye(2) * f for f in (1, 2, 3, 4)]),
            "k": torch.cat([torch.eye(2), 10 * torch.eye(2)]),
        }
    )
    term = ScoreTerm(
        ScoreSide(HeadRows("q", (0, 2, 4, 6), 2), rms(2)), ScoreSide(HeadRows("k", (0, 0, 2, 2), 2), rms(2))
    )
    assert [bound for bound, _ in scores(held, term)] == pytest.approx([2, 4, 60, 80])


@pytest.mark.parametrize("shape", [(16, 12), (16, 3, 4)])
def test_transposed_projections_give_the_same_bounds(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(6)
    q, k = torch.randn(12, 16, generator=generator), torch.randn(12, 16, generator=generator)
    starts = (0, 4, 8)

    def term(axis: int) -> ScoreTerm:
        return ScoreTerm(
            ScoreSide(HeadRows("q", starts, 4, axis), rms(16)),  # type: ignore[arg-type]
            ScoreSide(HeadRows("k", starts, 4, axis), rms(16)),  # type: ignore[arg-type]
        )

    straight = scores(Held({"q": q, "k": k}), term(0))
    turned = scores(Held({"q": q.mT.reshape(shape), "k": k.mT.reshape(shape)}), term(1))
    for left, right in zip(straight, turned, strict=True):
        assert left == pytest.approx(right)


def test_a_fused_projection_is_read_once() -> None:
    held = Held({"qkv": torch.randn(12, 4, generator=torch.Generator().manual_seed(7))})
    scores(
        held,
        ScoreTerm(ScoreSide(HeadRows("qkv", (0,), 4), rms(4)), ScoreSide(HeadRows("qkv", (4,), 4), rms(4))),
    )
    assert held.loaded == ["qkv"]


# --- score bounds: the oracle -------------------------------------------------------------------------


def random_case(kind: str, seed: int) -> tuple[Held, ScoreTerm, Norm]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    held = Held(
        {
            "q": draw(12, 24),
            "k": draw(12, 24),
            "g": draw(24),
            "beta": draw(24),
            "qb": draw(12),
            "kb": draw(12),
        }
    )
    norm = Norm(kind, "g", "beta" if kind == "layer" else None, size=24)  # type: ignore[arg-type]
    starts = (0, 4, 8)
    term = ScoreTerm(
        ScoreSide(HeadRows("q", starts, 4, bias="qb", bias_starts=starts), norm),
        ScoreSide(HeadRows("k", starts, 4, bias="kb", bias_starts=starts), norm),
    )
    return held, term, norm


def normalised(kind: str, x_nD: torch.Tensor) -> torch.Tensor:
    if kind == "layer":
        x_nD = x_nD - x_nD.mean(dim=1, keepdim=True)
    radius = 1.0 if kind == "l2" else math.sqrt(x_nD.shape[1])
    return torch.nn.functional.normalize(x_nD, dim=1) * radius


@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
def test_no_input_exceeds_the_bound_and_climbing_comes_near(kind: str) -> None:
    held, term, _ = random_case(kind, 8)
    found = scores(held, term)
    w = {name: tensor.double() for name, tensor in held.held.items()}
    beta = w["beta"] if kind == "layer" else torch.zeros_like(w["beta"])
    generator = torch.Generator().manual_seed(9)
    for head, (bound, _) in enumerate(found):
        rows = slice(4 * head, 4 * head + 4)
        longest = []
        for side, bias in (("q", "qb"), ("k", "kb")):
            m_dD, b_d = w[side][rows] * w["g"], w[bias][rows] + w[side][rows] @ beta
            u_nD = normalised(kind, torch.randn(64, 24, generator=generator, dtype=torch.float64))
            for _ in range(300):  # power iteration: the gradient of the length is the next input
                q_nd = u_nD @ m_dD.mT + b_d
                u_nD = normalised(kind, q_nd @ m_dD)
            longest.append(float(q_nd.norm(dim=1).max()))
        reached = longest[0] * longest[1]
        # The triangle inequality between projection and bias is the only slack.
        assert 0.6 * bound < reached <= bound


def test_the_bound_is_reached_where_query_and_key_can_point_the_same_way() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(10)).double()
    [(bound, _)] = scores(Held({"q": weight, "k": torch.eye(8).double()}), one_head(8, rms(8)))
    left, sigma, right = torch.linalg.svd(weight)
    x, y = math.sqrt(8) * right[0], math.sqrt(8) * left[:, 0]
    reached = float((weight @ x) @ y)
    assert reached == pytest.approx(8 * float(sigma[0]))
    assert reached <= bound <= reached * (1 + 1e-8)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_typical_score_is_the_root_mean_square_over_random_inputs(kind: str) -> None:
    held, term, _ = random_case(kind, 11)
    found = scores(held, term)
    w = {name: tensor.double() for name, tensor in held.held.items()}
    beta = w["beta"] if kind == "layer" else torch.zeros_like(w["beta"])
    generator = torch.Generator().manual_seed(12)
    u, v = torch.randn(2, 60_000, 24, generator=generator, dtype=torch.float64)
    if kind == "layer":
        u, v = u - u.mean(dim=1, keepdim=True), v - v.mean(dim=1, keepdim=True)
    for head, (_, typical) in enumerate(found):
        rows = slice(4 * head, 4 * head + 4)
        q = (u * w["g"] + beta) @ w["q"][rows].mT + w["qb"][rows]
        k = (v * w["g"] + beta) @ w["k"][rows].mT + w["kb"][rows]
        assert typical == pytest.approx(float((q * k).sum(dim=1).square().mean().sqrt()), rel=0.03)


def test_rotating_queries_and_keys_does_not_break_the_bound() -> None:
    generator = torch.Generator().manual_seed(13)
    q, k = (torch.randn(4, 8, generator=generator).double() for _ in range(2))
    [(bound, _)] = scores(Held({"q": q, "k": k}), one_head(4, rms(8)))
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator).double()).Q
    best = 8 * float(torch.linalg.matrix_norm(q.mT @ rotation @ k, 2))
    assert best <= bound


def test_the_bound_is_never_below_the_singular_values_it_is_made_of() -> None:
    generator = torch.Generator().manual_seed(14)
    for seed in range(20):
        q = torch.randn(8, 64, generator=generator).double() * 10.0 ** (seed - 10)
        [(bound, _)] = scores(Held({"q": q, "k": q}), one_head(8, rms(64)))
        exact = 64 * float(torch.linalg.svdvals(q)[0]) ** 2
        assert exact <= bound <= exact * (1 + 1e-8)


def test_a_layer_norm_that_cancels_a_large_common_part_keeps_the_proof() -> None:
    noise = torch.randn(4, 32, generator=torch.Generator().manual_seed(15)).double()
    q = noise + 1e8
    [(bound, _)] = scores(Held({"q": q, "k": q}), one_head(4, Norm("layer", None, size=32)))
    centred = q - q.mean(dim=1, keepdim=True)
    exact = 32 * float(torch.linalg.svdvals(centred)[0]) ** 2
    assert exact <= bound <= exact * (1 + 1e-3)


# --- score bounds: what stands in the way -------------------------------------------------------------


def test_a_head_with_nan_has_no_bound_and_leaves_the_others_theirs() -> None:
    held = Held({"q": torch.cat([torch.eye(4)] * 2), "k": torch.cat([torch.eye(4)] * 2)})
    held.held["q"][5, 1] = math.nan
    side = ScoreSide(HeadRows("q", (0, 4), 4), rms(4)), ScoreSide(HeadRows("k", (0, 4), 4), rms(4))
    found = scores(held, ScoreTerm(*side))
    assert found[0] == (pytest.approx(4), pytest.approx(2))
    assert found[1] == (math.inf, None)
    held.held["q"][5, 1] = math.inf
    assert scores(held, ScoreTerm(*side))[1] == (math.inf, None)


def term_with(**changes: object) -> ScoreTerm:
    rows: dict[str, object] = {"tensor": "q", "starts": (0,), "width": 4, **changes}
    return ScoreTerm(ScoreSide(HeadRows(**rows), rms(4)), ScoreSide(HeadRows("k", (0,), 4), rms(4)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("term", "kind", "reason"),
    [
        (None, "no-score-terms", None),
        (term_with(tensor="gone"), "unread-values", "no such tensor"),
        (term_with(tensor="zipped"), "unread-values", "not a known form of storage"),
        (term_with(starts=(2,)), "unread-values", "rows of a head lie outside the tensor"),
        (term_with(starts=(0, 0)), "unread-values", "heads of query and key do not pair up"),
        (
            term_with(bias="short", bias_starts=(0,)),
            "unread-values",
            "a head's gain or bias lies outside the tensor",
        ),
        (one_head(4, rms(4, "short")), "unread-values", "gain and projection differ in width"),
        (one_head(4, rms(3)), "unread-values", "norm and projection differ in width"),
        (
            one_head(4, None, rms(3, "short"), rms(4)),
            "unread-values",
            "a head's gain or bias lies outside the tensor",
        ),
    ],
)
def test_a_layer_that_cannot_be_bounded_is_named_with_the_reason(
    term: ScoreTerm | None, kind: str, reason: str | None
) -> None:
    weights = {"q": torch.eye(4), "k": torch.eye(4), "short": torch.ones(3), "zipped": torch.eye(4)}
    held = Held(weights, missing=("zipped",))
    good = layer_of((one_head(4, rms(4)),))
    seen: list[str] = []
    result = score_bounds([layer_of((term,) if term else ()), good], held, seen.append)
    [anomaly] = result.skipped
    assert (anomaly.kind, anomaly.subject, anomaly.evidence.get("reason")) == (kind, "layer0", reason)
    assert len(result.measurements) == 2
    assert seen == ["layer0", "layer0"]


def test_the_ingredients_say_what_a_bound_rests_on() -> None:
    held = Held({"q": torch.eye(4), "k": torch.eye(4), "qb": torch.ones(4), "kb": torch.ones(4)})
    plain, normed = one_head(4, rms(4), bias=True), one_head(4, None, rms(4), rms(4))
    first, second = score_bounds([layer_of((plain,)), layer_of((normed,))], held).ingredients
    assert (first.input_norm, first.biases, first.query_norm, first.terms) == ("rms", True, False, 1)
    assert (second.input_norm, second.biases, second.query_norm, second.key_norm) == (None, False, True, True)
