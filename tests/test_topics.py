"""The topics of `attncli explain`: their numbers against closed forms and slow loops, their texts against the house.

Golden files are made anew by `python tests/test_topics.py`; look at their diff before committing it.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from attncli.api.explained import explained
from attncli.cli import app
from attncli.layout import LAYOUTS
from attncli.records.pages import Facts, Formula, Prose, Table
from attncli.render import pages
from attncli.rules import RULES
from attncli.topics import TOPICS, Topic, arithmetic, heads, health, numerics, usage

GOLDEN = Path(__file__).parent / "golden_topics"
EXAMPLE = Path(__file__).parents[1] / "examples" / "dates" / "model.py"
GOLDEN_PAGES = {
    "scaling.txt": ("scaling", 80),
    "scaling-40-columns.txt": ("scaling", 40),
    "masks-40-columns.txt": ("masks", 40),
    "overflow.txt": ("overflow", 80),
    "overflow-40-columns.txt": ("overflow", 40),
    "sinks.txt": ("sinks", 80),
}
every_topic = pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)


def named(name: str) -> Topic:
    return next(topic for topic in TOPICS if topic.name == name)


def tables(name: str) -> list[Table]:
    return [block for block in named(name).blocks() if isinstance(block, Table)]


def column(table: Table, name: str) -> list[Any]:
    at = [column.name for column in table.columns].index(name)
    return [row[at] for row in table.rows]


def words(topic: Topic) -> str:
    """Everything that the topic's page says, as one line."""
    return " ".join(pages.text(explained([topic.name]), width=100_000).split())


# --- every topic --------------------------------------------------------------------------------------


@every_topic
def test_a_topic_computes_and_gives_the_same_numbers_each_time(topic: Topic) -> None:
    first = topic.blocks()
    assert any(isinstance(block, Table) and block.rows for block in first)
    assert repr(first) == repr(topic.blocks())


@every_topic
def test_a_topic_fits_a_screen(topic: Topic) -> None:
    lines = pages.text(explained([topic.name]), width=80).splitlines()
    assert len(lines) <= 40
    assert max(map(cell_len, lines)) <= 80


@every_topic
@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_shows_every_word_and_number_of_a_topic(topic: Topic, width: int) -> None:
    narrow = pages.text(explained([topic.name]), width=width)
    assert max(map(cell_len, narrow.splitlines())) <= width
    said = "".join(narrow.split())
    for block in topic.blocks():
        if isinstance(block, Prose):
            assert "".join(block.text.split()) in said
        elif isinstance(block, Formula):
            assert all(line in narrow for line in block.lines)
        elif isinstance(block, Table):
            for row in block.rows:
                for value, shown in zip(row, block.columns, strict=True):
                    assert "".join(pages.cell(value, shown).split()) in said


@every_topic
def test_a_topic_is_well_formed(topic: Topic) -> None:
    assert re.fullmatch(r"[a-z][a-z-]*", topic.name)
    assert topic.sources
    for source in topic.sources:
        assert not source.endswith(".")
        assert all(
            re.fullmatch(r"\d{4}\.\d{4,5}", number)
            for number in re.findall(r"arXiv (\S+?)[\s,;)]", f"{source} ")
        )
    for block in topic.blocks():
        assert not isinstance(block, Facts)
        if isinstance(block, Formula):
            assert all(cell_len(line) <= 38 for line in block.lines)
        if isinstance(block, Table):
            assert all(len(row) == len(block.columns) for row in block.rows)


@every_topic
def test_a_topic_names_only_rules_and_topics_that_exist(topic: Topic) -> None:
    known = {rule.code: rule.name for rule in RULES}
    assert set(re.findall(r"ATT\d{3}", words(topic))) <= known.keys()
    assert set(topic.rules) <= known.keys()
    assert set(topic.see) <= {other.name for other in TOPICS} - {topic.name}


@every_topic
def test_a_topic_names_only_commands_and_options_that_exist(topic: Topic) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert topic.commands
    for command in topic.commands:
        name, *rest = command.split()
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options
    mentioned = re.findall(r"attncli ([a-z][a-z-]*)((?: [A-Z]+)?(?: --[a-z-]+)?)", words(topic))
    said = {name for name, options in mentioned if options or name in commands}
    assert said <= commands.keys()
    for name, option in re.findall(
        r"\b(inspect|entropy|overflow|nan-check|check|diff) (--[a-z-]+)", words(topic)
    ):
        assert option in {known for parameter in commands[name].params for known in parameter.opts}


def test_no_word_means_two_topics_or_a_topic_and_a_rule() -> None:
    meanings = [name for topic in TOPICS for name in (topic.name, *topic.aliases)]
    assert len(meanings) == len(set(meanings))
    assert all(name == name.lower() and "_" not in name and " " not in name for name in meanings)
    assert set(meanings).isdisjoint({rule.name for rule in RULES} | {rule.code.lower() for rule in RULES})


def test_every_rule_on_how_attention_computes_is_taught_somewhere() -> None:
    taught = {code for topic in TOPICS for code in topic.rules}
    assert {rule.code for rule in RULES if "ATT4" <= rule.code < "ATT8"} <= taught


@pytest.mark.parametrize("file", GOLDEN_PAGES)
def test_a_topic_looks_as_it_did(file: str) -> None:
    name, width = GOLDEN_PAGES[file]
    assert pages.text(explained([name]), width=width) == (GOLDEN / file).read_text(encoding="utf-8")


# --- arithmetic ---------------------------------------------------------------------------------------


@settings(deadline=None)  # numpy is imported first
@given(st.floats(allow_nan=False, width=64))
def test_numbers_are_rounded_as_numpy_rounds_them(number: float) -> None:
    numpy = pytest.importorskip("numpy")
    with numpy.errstate(over="ignore", under="ignore"):
        assert arithmetic.rounded(number, "float16") == float(numpy.float16(number))
        assert arithmetic.rounded(number, "float32") == float(numpy.float32(number))


@settings(deadline=None)  # torch is imported first
@given(st.floats(allow_nan=False, width=32))
def test_bfloat16_is_rounded_as_torch_rounds_it(number: float) -> None:
    torch = pytest.importorskip("torch")
    assert arithmetic.rounded(number, "bfloat16") == torch.tensor(number).bfloat16().item()


@pytest.mark.parametrize(("dtype", "most", "bits"), [("float16", 65504, 10), ("bfloat16", 3.3895313892515355e38, 7),
                                                     ("float32", 3.4028234663852886e38, 23)])  # fmt: skip
def test_a_dtype_ends_and_steps_where_ieee_754_says(dtype: str, most: float, bits: int) -> None:
    assert arithmetic.largest(dtype) == most
    assert [arithmetic.spacing(at, dtype) for at in (1.0, 128.0)] == [2.0**-bits, 2.0 ** (7 - bits)]
    assert arithmetic.rounded(2 * most, dtype) == math.inf
    assert arithmetic.rounded(-2 * most, dtype) == -math.inf


def test_a_tie_is_rounded_to_even() -> None:
    assert arithmetic.rounded(1 + 2**-8, "bfloat16") == 1
    assert arithmetic.rounded(1 + 3 * 2**-8, "bfloat16") == 1 + 2**-6
    assert arithmetic.rounded(1 + 2**-11, "float16") == 1


def test_a_division_by_zero_is_that_of_ieee_754() -> None:
    assert arithmetic.divided(1.0, 0.0) == math.inf
    assert arithmetic.divided(-1.0, 0.0) == arithmetic.divided(1.0, -0.0) == -math.inf
    assert math.isnan(arithmetic.divided(0.0, 0.0))
    assert arithmetic.divided(3.0, 2.0) == 1.5


def test_a_softmax_sums_to_one_and_that_of_nothing_is_nan() -> None:
    assert arithmetic.softmax([1000.0, 1000.0]) == [0.5, 0.5]
    assert arithmetic.softmax([0.0, -math.inf]) == [1.0, 0.0]
    assert all(math.isnan(p) for row in ([-math.inf] * 2, [math.nan, 0.0]) for p in arithmetic.softmax(row))


def test_the_spectral_norm_is_the_largest_singular_value() -> None:
    numpy = pytest.importorskip("numpy")
    matrix = arithmetic.normal(random.Random(1), 6, 9)
    assert math.isclose(arithmetic.spectral_norm(matrix), numpy.linalg.norm(matrix, 2), rel_tol=1e-4)


# --- basics -------------------------------------------------------------------------------------------


def test_rows_of_the_small_self_attention_sum_to_one() -> None:
    (table,) = tables("self-attention")
    for row in table.rows:
        assert math.isclose(sum(row[1:4]), 1.0)
    power = math.exp(1 / math.sqrt(2))
    assert math.isclose(table.rows[0][1], power / (2 * power + 1))


def test_a_soft_lookup_weighs_the_key_by_its_gap() -> None:
    (table,) = tables("query-key-value")
    for gap, p, value in table.rows:
        assert math.isclose(p, math.exp(gap) / (math.exp(gap) + 3))
        assert math.isclose(value, 3 * p + 7 * (1 - p) / 3)


def test_a_gap_of_scores_is_a_ratio_of_probabilities() -> None:
    (table,) = tables("scores")
    for gap, ratio, best, gradient in table.rows:
        assert math.isclose(ratio, math.exp(gap))
        assert math.isclose(best, 1 / (1 + math.exp(-gap)))
        assert math.isclose(gradient, math.exp(-gap) / (1 + math.exp(-gap)) ** 2)


def test_products_deviate_by_the_root_of_the_head_size_and_scaled_ones_by_one() -> None:
    (table,) = tables("scaling")
    assert column(table, "d") == [16, 32, 64, 128, 256, 512, 1024]
    for d, deviation, root, scaled, raw_evenness, evenness in table.rows:
        assert root == math.sqrt(d)
        assert abs(deviation / root - 1) < 0.1
        assert math.isclose(scaled, deviation / root)
        # Of normal scores with deviation 1, H ≈ ln n − 1/2.
        assert abs(evenness - (1 - 0.5 / math.log(64))) < 0.03
        assert raw_evenness < 0.4
    assert table.rows[-1][4] < 0.05


def test_the_products_of_growing_heads_are_those_of_their_first_numbers() -> None:
    from attncli.topics import basics

    generator = random.Random(2017)
    queries, keys = arithmetic.normal(generator, 24, 1024), arithmetic.normal(generator, 64, 1024)
    for d, dots in basics._growing_products():
        assert math.isclose(dots[3][5], math.fsum(queries[3][i] * keys[5][i] for i in range(d)), abs_tol=1e-9)


def test_exp_overflows_where_the_softmax_topic_says() -> None:
    (table,) = tables("softmax")
    finite = {row[0]: [math.isfinite(value) for value in row[1:]] for row in table.rows}
    assert finite == {
        5: [True] * 3,
        11: [True] * 3,
        12: [False, True, True],
        88: [False, True, True],
        90: [False] * 3,
    }
    said = words(named("softmax"))
    assert "NaN, NaN, 0 as written, 0.665, 0.245, 0.090 with the maximum" in said
    assert "11.09 in float16, 88.72 in float32" in said


# --- heads --------------------------------------------------------------------------------------------


def test_grouped_heads_shrink_weights_and_cache_as_counted_by_hand() -> None:
    (table,) = tables("multi-head")
    width, layers, tokens = 4096, 32, 8192
    for _, query_heads, kv_heads, weights, cache in table.rows:
        assert weights == sum(
            (
                width * query_heads * 128,
                width * kv_heads * 128,
                width * kv_heads * 128,
                query_heads * 128 * width,
            )
        )
        assert cache == 2 * kv_heads * 128 * 2 * tokens * layers
    assert [row[4] for row in table.rows] == [2**32, 2**30, 2**27]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dates_model_of_topics", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_shapes_of_cross_attention_are_those_of_the_example(example: ModuleType) -> None:
    config, batch = example.Config(), example.batch()
    assert {
        "d_model": config.d_model,
        "num_attention_heads": config.num_attention_heads,
        "source": batch["input_ids"].shape[1],
        "target": batch["decoder_input_ids"].shape[1],
        "batch": batch["input_ids"].shape[0],
    } == heads.DATES
    shapes = {row[0]: tuple(map(int, str(row[1]).split("×"))) for row in tables("cross-attention")[0].rows}
    layer = example.EncoderAttention(config)
    hidden = layer.heads(layer.q_proj(example.torch.zeros(shapes["decoder hidden"])))
    assert tuple(hidden.shape) == shapes["q, of the decoder"]
    assert shapes["scores"] == (4, 4, 10, 33)
    weights = sum(parameter.numel() for parameter in layer.parameters())
    assert f"4·(E² + E) = {weights} numbers" in words(named("cross-attention"))


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 40])
def test_pairs_are_those_that_a_loop_counts(tokens: int) -> None:
    window = 6
    seen = [(i, j) for i, j in itertools.product(range(tokens), repeat=2) if j <= i]
    assert heads.causal_pairs(tokens) == len(seen)
    assert heads.window_pairs(tokens, window) == sum(i - j < window for i, j in seen)
    assert heads.strided_pairs(tokens, window) == sum(
        i - j < window or (i - j) % window == 0 for i, j in seen
    )


def test_a_window_saves_what_the_table_says() -> None:
    (table,) = tables("local-attention")
    for tokens, full, window, saved, strided in table.rows:
        assert (full, window) == (tokens * (tokens + 1) // 2, 512 * 513 // 2 + (tokens - 512) * 512)
        assert math.isclose(saved, full / window)
        assert math.sqrt(tokens) * tokens < strided < 2 * math.sqrt(tokens) * tokens


def test_a_rotated_product_depends_on_the_distance_alone() -> None:
    (table,) = tables("positions")
    right, wrong = ({row[0]: row[at] for row in table.rows} for at in (1, 2))
    assert math.isclose(right["3, 0"], right["103, 100"])
    assert math.isclose(right["0, 0"], wrong["0, 0"])
    assert all(abs(right[at] - wrong[at]) > 0.1 for at in ("3, 0", "0, 3", "9, 0"))
    slow = 2 * 10000 ** (-2 / 4)
    assert heads.rotated([1.0, 0.0, 0.0, 1.0], 2) == pytest.approx(
        [math.cos(2), math.sin(2), -math.sin(slow), math.cos(slow)]
    )
    vector = [3.0, 4.0, 1.0, -2.0]
    assert math.isclose(math.hypot(*heads.rotated(vector, 7)), math.hypot(*vector))


def test_the_first_rows_of_a_head_are_those_of_a_tensor_written_out() -> None:
    (table,) = tables("layouts")
    block = [("q", h) for h in range(8)] + [(side, h) for side in "kv" for h in range(2)]
    group = [
        row
        for g in range(2)
        for row in (*(("q", 4 * g + h) for h in range(4)), ("k", g), ("v", g))
    ]  # fmt: skip
    one_by_one = [(side, h) for h in range(8) for side in "qkv"]
    for (_, *found), order, kv_head in zip(table.rows, (block, group, one_by_one), (1, 1, 5), strict=True):
        assert found == [64 * order.index(row) for row in (("q", 5), ("k", kv_head), ("v", kv_head))]


def test_the_layouts_have_the_names_that_reports_use() -> None:
    assert {row[0].split(",")[0] for row in tables("layouts")[0].rows} <= LAYOUTS.keys()
    assert set(re.findall(r"fused-\w+|q\+kv", words(named("layouts")))) <= LAYOUTS.keys()


# --- health -------------------------------------------------------------------------------------------


def test_the_entropy_falls_from_ln_n_to_zero() -> None:
    (table,) = tables("entropy")
    nats, effective, most = (column(table, name) for name in ("H", "e^H", "max p"))
    assert math.isclose(nats[0], math.log(64))
    assert math.isclose(effective[0], 64)
    assert math.isclose(most[0], 1 / 64)
    assert nats == sorted(nats, reverse=True)
    assert nats[-1] < 1e-3
    assert most[-1] > 0.999
    assert arithmetic.entropy_nats([1.0, 0.0]) == 0
    # H ≈ ln n − σ²/2 for σ = 1/2 and 1.
    assert abs(nats[1] - (math.log(64) - 0.125)) < 0.05
    assert abs(nats[2] - (math.log(64) - 0.5)) < 0.1


def test_the_entropy_without_the_sink_does_not_see_it() -> None:
    (table,) = tables("sinks")
    generator = random.Random(2023)
    rest = arithmetic.entropy_nats(arithmetic.softmax([generator.gauss(0.0, 1.0) for _ in range(63)]))
    assert all(math.isclose(value, rest, rel_tol=1e-9) for value in column(table, "H_rest"))
    assert column(table, "H")[-1] < 0.1
    assert column(table, "mass") == sorted(column(table, "mass"))


def test_the_entropy_floor_is_ln_n_without_scores_and_below_any_row_that_they_allow() -> None:
    assert math.isclose(health.entropy_floor(0.0, 256), math.log(256))
    (table,) = tables("score-growth")
    floors = column(table, "H at least")
    assert floors == sorted(floors, reverse=True)
    # The row that the proof is about: one score at σ·√((T−1)/T), the others as far below as the length allows.
    for norm in (1.0, 5.0, 10.0):
        apart = norm * math.sqrt(256 / 255)
        row = arithmetic.softmax([apart, *[0.0] * 255])
        assert math.isclose(arithmetic.entropy_nats(row), health.entropy_floor(norm, 256), rel_tol=1e-6)


def test_caps_and_clips_are_those_of_their_papers() -> None:
    (table,) = tables("score-growth")
    for score, _, capped, gamma in table.rows:
        assert capped == 50 * math.tanh(score / 50) <= 50
        assert min(score, 100.0) == pytest.approx(score * gamma)


# --- numerics -----------------------------------------------------------------------------------------


def test_headroom_is_the_logarithm_of_what_is_left() -> None:
    dtypes, headroom = tables("overflow")
    assert column(dtypes, "largest")[0] == 65504
    assert column(dtypes, "at 128") == [2**-3, 1, 2**-16]
    for size, *bits in headroom.rows:
        assert bits == [math.log2(most / size) for most in column(dtypes, "largest")]
    assert [bits < 0 for bits in column(headroom, "float16")] == [False, False, False, True, True]
    assert "√(65504/128) = 22.6" in words(named("overflow"))


def test_every_operation_of_the_table_is_nan() -> None:
    births, _ = tables("nan")
    assert len(births.rows) == 6
    assert all(math.isnan(result) for _, result in births.rows)


def test_a_nan_spreads_as_the_algebra_says() -> None:
    _, spread = tables("nan")
    assert [row[1:] for row in spread.rows] == [(1, 1), (4, 3), (4, 4)]


def test_no_product_passes_its_bound() -> None:
    bound, typical, largest = numerics.bounded_scores()
    assert typical < largest < bound
    (table,) = tables("bounds")
    assert [row[4] == "proven safe" for row in table.rows] == [row[1] <= 65504 for row in table.rows]
    assert {row[4] for row in table.rows} == {"proven safe", "not excluded"}
    # E[(q·k)²] = tr(M_q M_qᵀ M_k M_kᵀ) ≈ d for rows of unit length: the RMS is near √8.
    assert abs(typical / math.sqrt(8) - 1) < 0.25


def test_tiles_give_what_the_whole_row_gives() -> None:
    generator = random.Random(3)
    q, keys, values = (arithmetic.normal(generator, rows, 16) for rows in (1, 50, 50))
    scores = [arithmetic.dot(q[0], key) / 4 for key in keys]
    probs = arithmetic.softmax(scores)
    output, lse, mean_score = numerics.online_attention(q[0], keys, values)
    assert output == pytest.approx(arithmetic.product([probs], values)[0])
    assert lse == pytest.approx(math.log(math.fsum(map(math.exp, scores))))
    assert lse - mean_score == pytest.approx(arithmetic.entropy_nats(probs))
    said = words(named("fused-kernels"))
    entropies = re.findall(r"= (\d\.\d{6})", said)
    assert len(entropies) == 2
    assert entropies[0] == entropies[1]


# --- training -----------------------------------------------------------------------------------------


def test_steps_left_are_doublings_left_times_their_steps() -> None:
    (table,) = tables("watching-training")
    for value, bits, *steps in table.rows:
        assert value * 2.0**bits == pytest.approx(65504)
        assert steps == pytest.approx([bits * 5, bits * 40, bits * 400])


def test_a_loss_scale_lifts_what_vanishes_and_overflows_what_is_large() -> None:
    numpy = pytest.importorskip("numpy")
    (table,) = tables("loss-scale")
    for scale, *kept in table.rows:
        with numpy.errstate(over="ignore"):
            assert kept == [float(numpy.float16(g * scale)) / scale for g in (1e-8, 1e-5, 3.0)]
    assert table.rows[0][1] == 0
    assert table.rows[-1][-1] == math.inf
    assert "1e-8 in float16 is 0" in words(named("loss-scale"))


# --- usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_visible_keys_are_those_of_tril(offset: int) -> None:
    numpy = pytest.importorskip("numpy")
    assert usage.visible_keys(offset, False) == numpy.tril(numpy.ones((4, 4)), offset).sum(1).tolist()
    assert usage.visible_keys(0, True) == numpy.triu(numpy.ones((4, 4))).sum(1).tolist()


def test_a_mask_of_ones_and_zeros_hides_nothing() -> None:
    added, zero_fill = 3 / (3 + math.e**2), 3 / (3 + math.e)
    said = words(named("masks"))
    assert f"gives the hidden ones {added:.2f} of its attention" in said
    assert f"and {zero_fill:.2f} where hidden scores are set to 0" in said
    assert "finfo.min plus a score of −16 is −inf itself" in said


def test_exit_codes_are_those_of_the_help() -> None:
    (table,) = tables("exit-codes")
    assert {row[0]: row[1:] for row in table.rows} == {
        "attention, no finding": (0, 0, 0),
        "a note": (0, 0, 0),
        "a warning": (0, 1, 0),
        "an error": (1, 1, 0),
        "no attention at all": (3, 3, 3),
    }


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file, (name, width) in GOLDEN_PAGES.items():
        (GOLDEN / file).write_text(pages.text(explained([name]), width=width), encoding="utf-8")
