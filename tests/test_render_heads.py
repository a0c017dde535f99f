"""The cells of the layers × heads picture: numbers that never lie, colours that can be read, bands that fit."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured_reports import call, layer, numbers, report
from rich.color import Color
from rich.console import Console, Group

from attncli.render.calls import call_rows
from attncli.render.heads import colours, nats, picture, share


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (-1e-9, "0"),
        (-0.3, "-0.30"),
        (1e-9, "<.01"),
        (0.0049, "<.01"),
        (0.005, "0.01"),
        (2.345, "2.35"),
        (11.09, "11.09"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (None, "—"),
        ("text", "—"),
    ],
)
def test_an_entropy_has_two_decimals_and_is_0_only_where_it_is(value: object, shown: str) -> None:
    assert nats(value) == shown  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1, "1"),
        (1.0, "1"),
        (0.9999, ">.99"),
        (0.996, ">.99"),
        (0.995, "0.99"),
        (0.5, "0.50"),
        (0.001, "<.01"),
        (0, "0"),
        (None, "—"),
    ],
)
def test_a_share_is_0_or_1_only_where_it_is(value: float | None, shown: str) -> None:
    assert share(value) == shown


def luminance(color: Color) -> float:
    """Relative luminance, 0 to 1. Source: WCAG 2.1."""
    linear = [
        c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4
        for c in color.get_truecolor()
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@given(st.floats(-0.1, 1.1))
def test_the_number_in_a_painted_cell_is_readable(fraction: float) -> None:
    style = colours(fraction)
    assert style.color is not None
    assert style.bgcolor is not None
    dark, bright = sorted((luminance(style.color), luminance(style.bgcolor)))
    assert (bright + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.1, AA


def test_a_more_even_head_is_never_darker_and_eight_steps_can_be_told_apart() -> None:
    shades = [luminance(colours(step / 8).bgcolor) for step in range(8)]  # type: ignore[arg-type]
    lightness = [116 * shade ** (1 / 3) - 16 for shade in shades]
    assert min(b - a for a, b in pairwise(lightness)) > 5


def lines(width: int, heads: int, layers: int = 2) -> list[str]:
    calls = [call(i, f"h.{i}.attn", heads=heads, kv_heads=heads) for i in range(layers)]
    shown = report("entropy", [(one, numbers(one)) for one in calls])
    console = Console(width=width, color_system=None, force_terminal=False, _environ={})
    with console.capture() as capture:
        console.print(Group(*picture(call_rows(shown), console)))
    return capture.get().splitlines()


@pytest.mark.parametrize("heads", [1, 2, 7, 12, 32, 128])
@pytest.mark.parametrize("width", [24, 40, 80, 133])
def test_the_bands_hold_every_head_once_in_order(heads: int, width: int) -> None:
    headings = [line.removeprefix("layer").replace("H/ln n", "").split() for line in lines(width, heads)]
    named = [
        word for words in headings if words and all(word.isdecimal() for word in words) for word in words
    ]
    assert named == [str(head) for head in range(heads)]


def test_heads_stand_above_their_numbers() -> None:
    heading, first = (line for line in lines(80, 12) if line.startswith(("layer ", "    0 ")))
    ends = [
        at
        for at in range(len(heading))
        if heading[at].isdecimal() and not heading[at + 1 : at + 2].isdecimal()
    ]
    assert [first[at] for at in ends] == ["7", "0", "0", "3", "3", "2", "6", "5", "5", "8", "7", "7"]


def test_a_broken_number_is_red_and_an_undefined_one_has_no_colour() -> None:
    one = call(0, "h.0.attn", heads=2, kv_heads=2)
    rows = numbers(
        one, [{"entropy": math.nan, "entropy_ratio": math.nan}, {"entropy": None, "entropy_ratio": None}]
    )
    console = Console(width=80, color_system="256", force_terminal=True, _environ={})
    with console.capture() as capture:
        console.print(Group(*picture(call_rows(report("entropy", [(one, rows)])), console)[1:]))
    assert "\x1b[1;31m nan\x1b[0m   —" in capture.get()
    assert "48;5;" not in capture.get()


def test_a_call_without_numbers_says_so() -> None:
    one = call(0, "h.0.attn")
    console = Console(width=80, color_system=None, _environ={})
    with console.capture() as capture:
        console.print(
            Group(*picture(call_rows(report("entropy", [(one, [])], layers=(layer("h.0.attn"),))), console))
        )
    assert "  no numbers" in capture.get()
