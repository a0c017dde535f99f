"""Attention maps on a terminal: numbers that can be read off, at any width, with and without colour."""

from __future__ import annotations

import io
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from measured_reports import call, numbers, report
from rich.cells import cell_len
from rich.console import Console

from attncli.records import AttentionMap
from attncli.render import table
from attncli.render.calls import call_rows
from attncli.render.heads import colours
from attncli.render.maps import map_parts


def attention_map(probs: list[Any], **changes: Any) -> AttentionMap:
    queries, keys = len(probs), len(next(row for row in probs if row is not None))
    made = {
        "layer": "h.0.attn", "call": 0, "head": 2, "batch": 0, "queries": queries, "keys": keys,
        "query_starts": tuple(range(queries)), "key_starts": tuple(range(keys)),
        "probs": tuple(row if row is None else tuple(row) for row in probs),
    }  # fmt: skip
    return AttentionMap(**{**made, **changes})


def console(width: int = 80, **settings: Any) -> Console:
    made = {"color_system": None, "force_terminal": False, "legacy_windows": False, **settings}
    return Console(file=io.StringIO(), width=width, **made)


def shown(*maps: AttentionMap, on: Console | None = None, batch: int = 1) -> list[str]:
    """The lines below the legend, up to the first empty one of each map."""
    on = on or console()
    one = call(0, "h.0.attn", batch=batch)
    rows = call_rows(report("entropy", [(one, numbers(one))]))
    for part in map_parts(maps, rows, on):
        on.print(part, highlight=False)
    text = on.file.getvalue().split("\n\n", 1)[1]  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.split("\n")]


TOKENS = ("[CLS]", "the", "cat", "[SEP]")
TEXT = attention_map(
    [[1, 0, 0, 0], [0.005, 0.015, 0.15, 0.83], None, [0.25, 0.25, 0.3, 0.2]],
    query_tokens=TOKENS,
    key_tokens=TOKENS,
)


# --- what stands there --------------------------------------------------------------------------------


def test_a_map_of_a_text_names_each_query_and_its_strongest_key():
    title, ruler, *lines = shown(TEXT)
    assert title.startswith("h.0.attn head 2  entropy ")
    assert title.endswith(" nats · 4 queries × 4 keys")
    assert ruler == "        0 1 2 3"
    assert lines[:4] == [
        "0 [CLS] ██       → 0 [CLS] 1",
        "1 the   ··░░▒▒██ → 3 [SEP] 0.83",
        "2 cat   no key allowed",
        "3 [SEP] ▓▓▓▓▓▓▓▓ → 2 cat 0.30",
    ]


def test_the_legend_says_what_each_mark_means_and_comes_once():
    on = console(140)
    shown(TEXT, TEXT, on=on)
    text = on.file.getvalue()
    assert text.startswith(
        "Attention maps: a line per query, a cell per key\nProbability, the same in every map:"
    )
    assert (
        "blank 0  · below .01  ░ from .01  ▒ from .1  ▓ from .2  █ from .5  → the key that gets most" in text
    )
    assert text.count("Attention maps") == 1


def test_rows_of_the_batch_are_told_apart_and_the_entropy_is_of_all_of_them():
    lines = shown(TEXT, attention_map([[1.0]], batch=1), batch=2)
    assert " row 0 · entropy " in lines[0]
    assert "over the batch" in lines[0]
    assert any(" row 1 · entropy " in line for line in lines)


def test_places_stand_where_tokens_are_not_known():
    one = attention_map([[0.2, 0.8], [0.6, 0.4]], queries=5, keys=4, query_starts=(0, 3), key_starts=(0, 2))
    title, ruler, *lines = shown(one, on=console(120))
    assert title.endswith("5 queries × 4 keys · a line is the mean of 3 queries · a cell the sum of 2 keys")
    assert ruler == "  0 2"
    assert lines[:2] == ["0 ▓▓██ → 2–3 0.80", "3 ██▓▓ → 0–1 0.60"]


def test_a_probability_is_1_or_blank_only_where_it_is():
    lines = shown(attention_map([[0.9999, 1e-9, 0.0001]]))
    assert lines[2] == "0 ██···· → 0 >.99"


def test_nan_is_shown_as_such():
    lines = shown(attention_map([[math.nan, math.nan], [0.5, 0.5]]))
    assert lines[2:4] == ["0 ???? → nan", "1 ████ → 0 0.50"]


def test_no_map_draws_nothing_and_no_legend():
    assert map_parts((), [], console()) == []


def test_the_report_ends_with_its_maps_and_pipes_hold_no_escape():
    one = call(0, "h.0.attn")
    made = report("entropy", [(one, numbers(one))], maps=(TEXT,))
    text = table.text(made)
    assert "1 the   ··░░▒▒██ → 3 [SEP] 0.83\n" in text
    assert "\x1b" not in text
    assert table.text(report("entropy", [(one, numbers(one))])).count("█") == 0


# --- colour -------------------------------------------------------------------------------------------


def test_colours_are_steps_of_the_heads_picture_and_the_legend_names_them_all():
    on = console(force_terminal=True, color_system="256", width=100)
    lines = shown(TEXT, on=on)
    brightest, darkest = (f"\x1b[38;5;{fg};48;5;{bg}m" for fg, bg in ((16, 227), (231, 53)))
    assert colours(1).bgcolor.number == 227  # type: ignore[union-attr]
    assert lines[2].startswith(f"0 [CLS] {brightest}  \x1b[0m      \x1b[2m → 0")  # exactly 0 is left blank
    assert f"{darkest}  \x1b[0m" in lines[3]
    legend = on.file.getvalue().split("\n\n")[0]
    for word in ("<.01", ".01", ".03", ".06", ".12", ".25", ".5", ".75"):
        assert f"m {word} \x1b[0m" in legend


def test_no_color_and_few_colours_use_shades():
    for settings_ in ({"color_system": "256", "no_color": True}, {"color_system": "standard"}):
        lines = shown(TEXT, on=console(force_terminal=True, **settings_))
        assert "··░░▒▒██" in "\n".join(lines)


def test_a_terminal_without_unicode_gets_letters_and_a_legend_of_them():
    class Ascii(io.StringIO):
        encoding = "latin-1"

    on = Console(file=Ascii(), width=80, color_system=None, legacy_windows=False)
    shown(TEXT, on=on)
    assert "1 the   ..::++@@" in on.file.getvalue()  # type: ignore[attr-defined]
    assert "@ from .5" in on.file.getvalue()  # type: ignore[attr-defined]


# --- widths -------------------------------------------------------------------------------------------


def causal(size: int, tokens: int | None = None, **changes: Any) -> AttentionMap:
    """Even over the keys so far."""
    probs = [[1 / (i + 1) if j <= i else 0.0 for j in range(size)] for i in range(size)]
    return attention_map(probs, **changes)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(40, 200),
    size=st.integers(1, 64),
    step=st.sampled_from((1, 3, 300)),
    token=st.sampled_from(
        ("", "a", "▁naïve", "日本語", "supercalifragilistic", "\x1b[31m", "[red]", "\ud800")
    ),
)
def test_no_line_is_wider_than_the_terminal(width, size, step, token):
    starts = tuple(range(0, size * step, step))
    tokens = (token,) * size if token else ()
    one = causal(
        size,
        queries=size * step,
        keys=size * step,
        query_starts=starts,
        key_starts=starts,
        query_tokens=tokens,
        key_tokens=tokens,
    )
    on = console(width)
    lines = shown(one, on=on)
    assert max(cell_len(line) for line in on.file.getvalue().split("\n")) <= width  # type: ignore[attr-defined]
    pictured = [line for line in lines if "→" in line]
    assert len(pictured) == size or (not (token and step == 1) and len(pictured) <= 32)
    assert all("\x1b" not in line and "\ud800" not in line for line in lines)
    # What was wrapped would begin with no number.
    assert all(line.split()[0].isdecimal() for line in pictured)


def test_a_narrow_terminal_adds_neighbouring_keys_and_says_so():
    wide, narrow = shown(causal(30), on=console(120)), shown(causal(30), on=console(40))
    assert not any("a cell the sum" in line for line in wide)
    assert any(line.endswith("a cell the sum of 2 keys") for line in narrow)
    assert wide[-3].count("░") == 60
    # Two keys of 1/30 each.
    assert next(line for line in narrow if line.startswith("29")) == "29 ░░░░░░░░░░░░░░░ → 0 0.03"


def test_merged_queries_are_a_mean_weighted_by_their_number_and_a_masked_one_counts_in_none():
    probs = [[1.0, 0.0] for _ in range(39)] + [None] + [[0.0, 1.0]]
    one = attention_map(probs, queries=81, query_starts=tuple(range(0, 82, 2)))
    lines = [line for line in shown(one) if "→" in line]
    # 41 blocks of two queries, the last of one: 21 lines.
    assert len(lines) == 21
    assert lines[19] == "76 ██   → 0 1"
    assert lines[20] == "80   ██ → 1 1"
    probs = [[1.0, 0.0]] * 38 + [[1.0, 0.0], [0.0, 1.0]]
    one = attention_map(probs, queries=79, query_starts=tuple(range(0, 80, 2)))
    assert [line for line in shown(one) if "→" in line][-1] == "76 ██▓▓ → 0 0.67"


def test_tokens_of_a_text_keep_a_line_each_up_to_64():
    words = tuple(f"w{at}" for at in range(64))
    lines = [line for line in shown(causal(64, query_tokens=words, key_tokens=words)) if "→" in line]
    assert len(lines) == 64
    assert lines[40].startswith("40 w40 ")


# --- hostile names ------------------------------------------------------------------------------------


def test_tokens_and_layers_cannot_steer_the_terminal():
    one = attention_map(
        [[1.0, 0.0]],
        layer="h.\x1b[2J",
        call=9,
        query_tokens=("\x1b]0;owned\x07",),
        key_tokens=("[bold]x[/]\r", "b"),
    )
    title, _, line, *_ = shown(one, on=console(100))
    assert title.startswith(r"h.\x1b[2J head 2")
    assert r"\x1b]0;owned\x" in line
    assert r"[bold]x[/]\x0d" in line
    assert "\x1b" not in line
    assert "\r" not in line
