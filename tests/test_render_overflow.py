"""The headroom table: the worst head, the scale in words, and a sentence where it matters."""

from __future__ import annotations

import math
from typing import Any

import pytest
from measured_reports import call, finding, numbers, report
from rich.console import Console, Group

from attncli.render.calls import call_rows
from attncli.render.overflow import bits, headroom_part, scale_words


def drawn(
    *heads: dict[str, Any], findings: tuple[Any, ...] = (), width: int = 120, **changes: Any
) -> list[str]:
    one = call(7, "h.7.attn", heads=len(heads), kv_heads=len(heads), **changes)
    shown = report("overflow", [(one, numbers(one, heads))], findings=findings)
    console = Console(width=width, color_system=None, _environ={})
    with console.capture() as capture:
        console.print(Group(*headroom_part(call_rows(shown), shown.findings, console)))
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"scale": 0.125}, "scale 1/√64"),
        ({"scale": 0.12501}, "scale 1/√64"),
        ({"scale": 1.0}, "scale 1 = 8 × 1/√64"),
        ({"scale": 1 / 64}, "scale 0.01562 = 0.125 × 1/√64"),
        ({"scale": None}, "scale not recovered"),
        ({"scale": 0.5, "head_dim": None}, "scale 0.5"),
        ({"scale": 0.0}, "scale 0 = 0 × 1/√64"),
    ],
)
def test_the_scale_is_compared_with_one_over_the_root_of_the_head_size(
    changes: dict[str, Any], shown: str
) -> None:
    assert scale_words(call(0, "a", **changes)) == shown


@pytest.mark.parametrize(
    ("value", "shown", "style"),
    [
        (9.96, "+10.0", ""),
        (0.99, "+1.0", "yellow"),
        (0.0, "+0.0", "yellow"),
        (-0.01, "-0.1", "bold red"),
        (-3.25, "-3.2", "bold red"),
        (math.inf, "inf", ""),
        (-math.inf, "-inf", "bold red"),
        (math.nan, "nan", "bold red"),
        (None, "—", "dim"),
    ],
)
def test_headroom_has_its_sign_and_never_reads_minus_zero(
    value: float | None, shown: str, style: str
) -> None:
    assert (bits(value).plain, bits(value).style) == (shown, style)


def test_the_row_is_that_of_the_worst_head_and_scores_name_their_own() -> None:
    lines = drawn({"dot_absmax": 90.0, "score_max": 1.0}, {"dot_absmax": 20.0, "score_max": 2.5})
    assert lines[-1].split() == ["90", "0", "2.5", "1", "+9.5", "+121.5", "+121.5"]


def test_nothing_hides_a_nan_or_an_infinity() -> None:
    assert drawn({"dot_absmax": math.inf}, {"dot_absmax": math.nan}, {})[-1].split()[:2] == ["nan", "1"]
    row = next(
        line for line in drawn({"dot_absmax": 5.0}, {"dot_absmax": math.inf}) if line.split()[0] == "inf"
    )
    assert row.split()[1] == "1"


def test_a_layer_without_numbers_has_dashes() -> None:
    assert drawn({"dot_absmax": None, "score_max": None})[-1].split() == ["—", "—", "—", "—", "—"]


REACHES = {"dot_absmax": 71_200.0}
EAGER = {"kernel": "softmax", "stored": "raw", "scores_dtype": "float32"}


@pytest.mark.parametrize(
    ("values", "changes", "sentence"),
    [
        (REACHES, EAGER, "q·k reaches 71 200; would overflow float16 before scaling; safe in bfloat16."),
        (
            REACHES,
            {**EAGER, "scores_dtype": "float16"},
            "q·k reaches 71 200; overflows float16 before scaling; safe in bfloat16.",
        ),
        (
            REACHES,
            {**EAGER, "stored": "scaled", "factors": {"query": 0.5}},
            "q·k reaches 71 200; would overflow float16 without the scale that comes before the product; "
            "safe in bfloat16.",
        ),
        (
            {"dot_absmax": 200_000.0},
            {
                **EAGER,
                "stored": "scaled",
                "factors": {"query": 0.5, "scores": 0.01},
                "scores_dtype": "float16",
            },
            "q·k reaches 200 000; overflows float16 although it is scaled first; safe in bfloat16.",
        ),
        (
            REACHES,
            {},
            "q·k reaches 71 200; would overflow float16 if it were stored, which this kernel never does; "
            "safe in bfloat16.",
        ),
        ({"dot_absmax": 40_000.0}, {}, "q·k reaches 40 000; within one bit of the largest float16."),
    ],
)
def test_a_product_near_overflow_gets_a_plain_sentence(
    values: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    assert drawn({}, values, width=200, **changes)[-1] == f"h.7.attn head 1: {sentence}"


def test_there_is_no_sentence_where_more_than_a_bit_is_left_or_a_finding_tells_it() -> None:
    assert "reaches" not in " ".join(drawn({"dot_absmax": 30_000.0}))
    told = finding("ATT501", "x", "note", "h.7.attn: head 0: q·k reaches 71 200.", "h.7.attn")
    assert "reaches" in " ".join(drawn(REACHES))
    assert "reaches" not in " ".join(drawn(REACHES, findings=(told,)))
    other = finding("ATT601", "x", "note", "h.7.attn: head 0 is even.", "h.7.attn")
    assert "reaches" in " ".join(drawn(REACHES, findings=(other,)))


def test_layers_with_the_same_sentence_share_it() -> None:
    made = [call(index, f"h.{index}.attn", heads=1, kv_heads=1) for index in range(5)]
    shown = report("overflow", [(one, numbers(one, [{"dot_absmax": 70_000.0 + one.index}])) for one in made])
    console = Console(width=200, color_system=None, _environ={})
    with console.capture() as capture:
        console.print(Group(*headroom_part(call_rows(shown), (), console)))
    said = [line for line in capture.get().splitlines() if "reaches" in line]
    assert len(said) == 1
    assert said[0].rstrip().endswith("(and 4 more like it)")


def test_where_the_scale_stands_is_said() -> None:
    shown = " ".join(drawn({}, **{**EAGER, "factors": {"query": 0.354, "key": 0.354, "scores": 1.0}}))
    assert "on q before the product and on k before the product" in shown
    assert "q·k stored unscaled in float32" in shown
    assert "in the kernel · q·k never stored (flash (CPU))" in " ".join(drawn({}))
