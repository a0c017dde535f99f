"""The table of a comparison against golden files, and what must hold of it at any width.

Golden files are made anew by `python tests/test_render_changes.py`; look at their diff before committing it.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compared import RUN, checkpoint, finding, layer, measured, stack
from rich.console import Console

import attncli
from attncli.records import Change, Measurement, Report
from attncli.render import table
from attncli.render.changes import labels

GOLDEN = Path(__file__).parent / "golden_diff"


def values(name: str, nan: int, absmax: float | None, rms: float | None) -> tuple[Measurement, ...]:
    found = {"nan_count": nan, "inf_count": 0, "absmax": absmax, "rms": rms, "zero_fraction": 0.0}
    return tuple(Measurement(metric, name, value) for metric, value in found.items())


def of_run(path: str, step: int, *numbers: dict[str, Any], **changes: Any) -> Report:
    source = {"kind": "huggingface", "path": path, "format": "huggingface", "parameters": 137_022_720}
    return measured(numbers, layers=stack(3, "model.layers"), source={**source, "step": step}, **changes)


def large(layer_path: str, head: int, score: int) -> Any:
    return finding(f"{layer_path}: head {head}: the largest score is {score}.", layer_path)


def reports() -> dict[str, Report]:
    small = checkpoint(*stack(12, "model.layers", kv_heads=4, shape=(64, 64)))
    reshaped = checkpoint(
        *stack(10, "model.layers", kv_heads=2, shape=(32, 64), dtype="bfloat16"),
        layer("cross.0.attn", kind="cross", facts={"window": 64}),
        source={**small.source, "path": "new.gguf", "format": "GGUF", "parameters": 137_022_720},
    )
    name = "model.layers.{}.attn.{}_proj.weight"
    first = replace(
        small,
        measurements=tuple(
            row
            for index in range(12)
            for role in "qk"
            for row in values(name.format(index, role), 0, 1.0, 0.05)
        ),
    )
    second = replace(
        small,
        measurements=tuple(
            row
            for index in range(12)
            for role in "qk"
            for row in values(
                name.format(index, role),
                7 if (index, role) == (3, "k") else 0,
                1.0 + index,
                0.05 * (1 + index / 2),
            )
        ),
    )
    bounds = [
        replace(
            small,
            measurements=(
                *(
                    Measurement("score_bound", "model.layers.0.attn", bound, head=h)
                    for h, bound in enumerate(of)
                ),
                Measurement("overflow_float16", "model.layers.0.attn", verdict),
            ),
        )
        for of, verdict in (((300.0, 400.0), "proven safe"), ((70_000.0, math.inf), "not excluded"))
    ]
    before = of_run(
        "step-1000",
        1000,
        {"entropy": [1.8, 1.9, 2.0, 2.1]},
        findings=(large("model.layers.0.attn", 1, 120), large("model.layers.1.attn", 0, 130)),
    )
    after = of_run(
        "step-2000",
        2000,
        {"entropy": [1.8, 0.2, 2.2, 2.1], "entropy_ratio": 0.5, "score_max": [6.0, 31.0, 5.5, 6.0]},
        {"dot_absmax": [15.0, 60.0, 240.0, 60.0]},
        {"entropy": [math.nan, None, 1.8, 1.8]},
        findings=(large("model.layers.0.attn", 2, 140), large("model.layers.2.attn", 0, 160)),
    )
    return {
        "equal": attncli.diff(small, small),
        "reshaped": attncli.diff(small, reshaped),
        "values": attncli.diff(first, second),
        "bounds": attncli.diff(*bounds),
        "run": attncli.diff(before, after),
        "other-batch": attncli.diff(before, replace(after, run={**RUN, "batch": "synthetic"})),
        "better": attncli.diff(after, before),
        "nothing": attncli.diff(checkpoint(layers=()), checkpoint(layers=())),
    }


REPORTS = reports()
VIEWS = {
    **{name: (name, 0, False) for name in REPORTS},
    "run-unfolded": ("run", 0, True),
    "values-unfolded": ("values", 0, True),
    "run-40-columns": ("run", 40, False),
    "run-unfolded-40-columns": ("run", 40, True),
    "reshaped-40-columns": ("reshaped", 40, False),
    "values-40-columns": ("values", 40, False),
}


def view(name: str) -> str:
    report, width, unfolded = VIEWS[name]
    shown = REPORTS[report]
    return drawn(shown, width, unfolded=unfolded) if width else table.text(shown, unfolded=unfolded)


def drawn(report: Report, width: int, *, unfolded: bool = False, color: bool = False) -> str:
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=width,
        force_terminal=color,
        color_system="256" if color else None,
        legacy_windows=False,
    )
    table.draw(report, console, unfolded=unfolded)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("name", VIEWS)
def test_the_table_is_as_the_golden_file(name: str) -> None:
    assert view(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("unfolded", [False, True])
def test_no_line_is_wider_than_the_terminal(report: str, width: int, unfolded: bool) -> None:
    assert max(map(len, drawn(REPORTS[report], width, unfolded=unfolded).splitlines())) <= width


def test_at_40_columns_no_number_is_torn_apart() -> None:
    text = drawn(REPORTS["run"], 40)
    for words in ("head 1: 1.9 → 0.2 (−1.7)", "head 2: 2 → 2.2 (+0.2)", "head 1: 6 → 31 (×5.17)"):
        assert words in text


def test_every_changed_head_is_shown_where_layers_were_chosen() -> None:
    text = table.text(REPORTS["run"], unfolded=True)
    metrics = [change for change in REPORTS["run"].changes if change.kind == "metric"]
    rows = [
        line for line in text.splitlines() if line.split() and line.split()[0] in {c.what for c in metrics}
    ]
    assert len(rows) == len(metrics) == 12


def test_nothing_is_cut_short_where_the_output_is_no_terminal() -> None:
    path = "m" * 300 + ".0.attn"
    found = attncli.diff(checkpoint(layer(path)), checkpoint(layer(path, heads=2)))
    text = table.text(found)
    assert path in text
    assert "…" not in text


def test_colour_is_decoration_the_words_are_the_same_without_it() -> None:
    for report in REPORTS.values():
        coloured = re.sub(r"\x1b\[[0-9;]*m", "", drawn(report, 120, color=True))
        assert [line.rstrip() for line in coloured.splitlines()] == drawn(report, 120).splitlines()


HOSTILE = "[red]x[/red]:smile:\x1b[2J\x07\x9b1m\u202e\u2028\n::error::"


@pytest.mark.parametrize("width", [40, 100, 3000])
@pytest.mark.parametrize("unfolded", [False, True])
def test_markup_and_control_characters_are_shown_and_never_obeyed(width: int, unfolded: bool) -> None:
    source = {"path": HOSTILE, "format": HOSTILE, "report": HOSTILE, "parameters": HOSTILE}
    shown = Report(
        command="diff",
        version="0.1.0",
        source={**source, "compared_with": source},
        environment={},
        layers=(layer(HOSTILE),),
        findings=(finding(HOSTILE, HOSTILE),),
        known=(finding(HOSTILE, HOSTILE),),
        notes=(HOSTILE,),
        changes=(
            Change("source", None, None, HOSTILE, HOSTILE, HOSTILE),
            Change("removed", HOSTILE, None, "layer", {"kind": HOSTILE, "heads": HOSTILE}, None),
            Change("added", HOSTILE, None, "layer", None, HOSTILE),
            Change("structure", HOSTILE, None, HOSTILE, HOSTILE, [HOSTILE]),
            Change("metric", HOSTILE, 0, "entropy", 1.0, 2.0),
            Change("metric", HOSTILE, 0, HOSTILE, 1.0, 2.0),
            Change("metric", HOSTILE, None, "rms", 1.0, 2.0),
            Change("metric", HOSTILE, None, HOSTILE, HOSTILE, 1.0),
            Change("finding", HOSTILE, None, HOSTILE, HOSTILE, None),
        ),
    )
    plain = drawn(shown, width, unfolded=unfolded)
    assert all(letter.isprintable() or letter == "\n" for letter in plain)
    assert "\x1b[2J" not in drawn(shown, width, unfolded=unfolded, color=True)
    assert "smile:" in plain
    plain.encode("utf-8")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], []),
        (["a"], ["a"]),
        (["h.0.attn", "h.1.attn", "h.2.attn"], ["h.{0–2}.attn"]),
        (["h.0.attn", "h.0.attn"], ["h.0.attn"]),
        (["h.3.attn", "h.1.attn"], ["h.{1,3}.attn"]),
        (["s.0.b.0.attn", "s.0.b.1.attn", "s.1.b.0.attn"], ["s.0.b.{0–1}.attn", "s.1.b.0.attn"]),
        (["s.0.b.7.attn", "s.1.b.7.attn"], ["s.{0–1}.b.7.attn"]),
        (["h.0.attn", "h.0.mlp"], ["h.0.attn", "h.0.mlp"]),
        (["h.007.attn", "h.7.attn"], ["h.007.attn", "h.7.attn"]),
        (["h.٣.attn", "h.3.attn"], ["h.٣.attn", "h.3.attn"]),
        (["h." + "9" * 5000], ["h." + "9" * 5000]),
        (["", "0", "1"], ["", "{0–1}"]),
    ],
)
def test_paths_that_differ_in_one_number_are_one_label(paths: list[str], expected: list[str]) -> None:
    assert labels(paths) == expected


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for golden in VIEWS:
        (GOLDEN / f"{golden}.txt").write_text(view(golden), encoding="utf-8")
