"""Reports of training runs in every format, against golden files, and what must hold of them at any width.

Golden files are made anew by `python tests/test_render_training.py`; look at their diff before committing it.
"""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from rich.cells import cell_len
from rich.console import Console
from test_render_html import bare, parsed, words
from training_reports import FAULT, REPORTS

from attncli.records import Report
from attncli.render import FORMATS, html, table
from attncli.render.observed import verdict
from attncli.render.training import curve, fault_facts, headline, history, notice

GOLDEN = Path(__file__).parent / "golden_training"
VIEWS = {
    **{f"{name}.txt": (name, "table", None) for name in ("stopped", "continued", "growing", "watched")},
    **{f"{name}.txt": (name, "table", None) for name in ("nothing", "scale")},
    "stopped-40-columns.txt": ("stopped", "table", 40),
    "growing-40-columns.txt": ("growing", "table", 40),
    "stopped.md": ("stopped", "markdown", None),
    "continued.md": ("continued", "markdown", None),
    "hostile.md": ("hostile", "markdown", None),
    "stopped.github": ("stopped", "github", None),
    "continued.github": ("continued", "github", None),
    "stopped.sarif": ("stopped", "sarif", None),
    "stopped.xml": ("stopped", "junit", None),
    "continued.xml": ("continued", "junit", None),
    "watched.xml": ("watched", "junit", None),
    "stopped.html": ("stopped", "html", None),
}  # fmt: skip
HOSTILE_PARTS = ("<script>alert(1)", "\x1b", "\x00")


def drawn(report: Report, columns: int, color: str | None = None) -> str:
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=columns, color_system=color, force_terminal=color is not None, legacy_windows=False,
        _environ={},
    )  # type: ignore[arg-type]  # fmt: skip
    table.draw(report, console)
    return buffer.getvalue()


def view(file: str) -> str:
    name, output_format, columns = VIEWS[file]
    if columns is not None:
        lines = drawn(REPORTS[name], columns).splitlines()
        return "\n".join(line.rstrip() for line in lines) + "\n"
    text = FORMATS[output_format].text(REPORTS[name])
    return bare(text) if output_format == "html" else text


def read_back(report: Report) -> Report:
    """The report as it comes out of its own JSON: numbers that are not finite are words."""
    return replace(report, run=json.loads(report.to_json())["run"])


# --- golden files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", VIEWS)
def test_a_report_is_the_golden_one(file: str) -> None:
    assert view(file) == (GOLDEN / file).read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    assert {file.name for file in GOLDEN.glob("*")} == set(VIEWS)


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("columns", [30, 40, 80, 133])
def test_no_line_is_wider_than_the_console(name: str, columns: int) -> None:
    assert [line for line in drawn(REPORTS[name], columns).splitlines() if cell_len(line) > columns] == []


@pytest.mark.parametrize("name", REPORTS)
def test_colour_is_decoration_the_words_are_the_same_without_it(name: str) -> None:
    coloured = re.sub(r"\x1b\[[0-9;]*m", "", drawn(REPORTS[name], 80, "truecolor"))
    assert coloured.split() == drawn(REPORTS[name], 80).split()


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("name", [name for name in REPORTS if name != "hostile"])
def test_a_report_read_back_from_its_json_looks_the_same(name: str, output_format: str) -> None:
    report = REPORTS[name]
    assert FORMATS[output_format].text(read_back(report)) == FORMATS[output_format].text(report)


@pytest.mark.parametrize("output_format", ["table", "markdown", "github", "junit", "html"])
def test_names_are_shown_and_never_obeyed(output_format: str) -> None:
    text = FORMATS[output_format].text(REPORTS["hostile"])
    forbidden = HOSTILE_PARTS if output_format in ("markdown", "html", "junit") else HOSTILE_PARTS[1:]
    assert [part for part in forbidden if part in text] == []


# --- sentences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stopped", "step 412 of 412: 1 origin of NaN, proved; 1 error."),
        (
            "continued",
            "step 412 of 900, the first of 3 that went wrong: 12 gradients were +Inf, first blocks.0.wq.weight, its "
            "origin is not known; 2 errors.",
        ),
        (
            "growing",
            "600 steps watched, nothing non-finite, 1 of the last 24 skipped by the loss scaler; 1 warning.",
        ),
        ("watched", "200 steps watched, nothing non-finite; no findings."),
        ("nothing", "not observed: no training step ran."),
        ("scale", "step 60 of 60: the loss scale collapsed, its origin is not known; 1 error."),
    ],
)
def test_the_verdict_is_one_sentence_in_every_format(name: str, said: str) -> None:
    report = REPORTS[name]
    assert verdict(report) == said
    last = table.text(report).splitlines()[-1]
    assert last.lower() == said.lower()
    if report.looked:
        assert last in words(html.text(report)).replace("\N{NARROW NO-BREAK SPACE}", " ")


def test_the_notice_is_one_line_with_step_batch_and_symptom() -> None:
    fault = REPORTS["stopped"].run["training"]["fault"]  # type: ignore[index]
    assert notice(fault) == (
        "step 412 (epoch 2, batch 37 of DataLoader over TensorDataset): the loss was NaN at train.py:88"
    )
    assert notice({"step": 3, "seen": "parameter", "value": "-inf", "tensors": ("w",), "batch": None}) == (
        "step 3: the parameter w was −Inf"
    )
    assert notice({"step": 3, "seen": "gradient", "value": "nan", "tensors": ["a\n", "b"], "batch": {}}) == (
        "step 3: 2 gradients were NaN, first a\\x0a"
    )
    assert notice({"step": 9, "seen": "loss scale", "value": ""}) == "step 9: the loss scale collapsed"
    assert "\n" not in notice(REPORTS["hostile"].run["training"]["fault"])  # type: ignore[index]


def test_the_facts_say_what_is_known_and_nothing_else() -> None:
    training = {"fault": {"step": 5, "seen": "loss", "value": "nan"}, "stopped": True}
    assert headline(training) == "Training stopped in step 5"
    assert fault_facts(training) == [("seen", "the loss was NaN"), ("replay", "was not done")]
    assert fault_facts({"fault": None}) == []
    assert headline({}) == ""


def test_the_command_that_repeats_a_capsule_can_be_pasted() -> None:
    facts = dict(fault_facts({"fault": {"step": 5, "seen": "loss"}, "capsule": "a b/$(x)"}))
    assert facts["again"] == "attncli nan-check --replay 'a b/$(x)'"


def test_a_process_is_named_only_where_there_are_several() -> None:
    fault = {"step": 5, "seen": "loss", "rank": 0}
    assert "rank" not in dict(fault_facts({"fault": fault, "world": 1}))
    assert "rank" not in dict(fault_facts({"fault": {**fault, "rank": None}, "world": 2}))
    assert dict(fault_facts({"fault": fault, "world": 2}))["rank"].startswith("0 of 2 processes")


# --- steps --------------------------------------------------------------------------------------------


def test_columns_that_a_terminal_has_no_room_for_are_named() -> None:
    wide, narrow = (drawn(REPORTS["stopped"], columns) for columns in (120, 50))
    assert "too narrow" not in wide
    assert "too narrow for: " in narrow
    assert all(name in wide for name in ("learning rate", "largest parameter"))


@pytest.mark.parametrize("columns", [40, 50, 80, 133])
@pytest.mark.parametrize("name", REPORTS)
def test_parts_stand_one_empty_line_apart(name: str, columns: int) -> None:
    short = REPORTS[name]
    training = (short.run or {})["training"]
    short = replace(
        short, run={**(short.run or {}), "training": {**training, "steps": training["steps"][-3:]}}
    )
    for report in (REPORTS[name], short):
        assert "\n\n\n" not in re.sub(r" +\n", "\n", drawn(report, columns))


def test_only_columns_with_numbers_are_shown_and_the_faulty_step_is_marked() -> None:
    training = {
        "steps": [
            {"number": 4, "loss": 2.0, "loss_scale": None},
            {"number": 5, "loss": "nan", "loss_scale": None},
        ],
        "fault": {"step": 5},
    }
    assert history(training, 9) == (["step", "loss", ""], [["4", "2", ""], ["5", "NaN", "went wrong"]])
    assert history(training, 1)[1] == [["5", "NaN", "went wrong"]]
    assert history({}, 9) == (["step"], [])


def test_a_curve_keeps_what_is_not_finite_and_leaves_out_what_was_not_seen() -> None:
    steps = [{"number": 1, "loss": "inf"}, {"number": 2, "loss": None}, {"number": 3, "loss": 2}]
    assert curve({"steps": steps}, "loss") == [(1, math.inf), (3, 2.0)]


def page_of(losses: list[float]) -> str:
    report = REPORTS["stopped"]
    training = {"seen": 9, "steps": [{"number": at, "loss": loss} for at, loss in enumerate(losses, 1)]}
    return html.text(replace(report, run={**(report.run or {}), "training": training}))


def test_the_page_draws_lines_that_break_where_numbers_are_not_finite() -> None:
    document = parsed(page_of([1.0, 2.0, math.nan, 4.0, 5.0, 6.0]))
    picture = next(one for one in document.iter() if one.get("role") == "img")
    assert picture.get("aria-label") == "loss from step 1 to step 6: between 1 and 6; not finite in 1 step"
    lines = [one.get("points") for one in picture.iter() if one.get("points")]
    assert lines == ["0.0,100.0 120.0,80.0", "360.0,40.0 480.0,20.0 600.0,0.0"]
    assert [one.get("d") for one in picture.iter() if one.get("class") == "broken"] == ["M240.0 0V100"]


def test_a_point_between_two_that_are_not_finite_is_a_dot() -> None:
    document = parsed(page_of([1.0, math.inf, 2.0, math.nan, 3.0, 3.0]))
    assert [one.get("cx") for one in document.iter() if one.get("cx")] == ["0.0", "240.0"]


def test_a_run_that_spans_magnitudes_is_drawn_on_a_logarithmic_scale() -> None:
    assert "loss, on a logarithmic scale" in page_of([1.0, 10.0, 101.0])
    assert "loss, on a" not in page_of([1.0, 10.0, 99.0])
    assert "loss, on a" not in page_of([-1.0, 10.0, 101.0])


def test_the_finding_of_a_fault_lies_in_the_line_that_saw_it() -> None:
    report = REPORTS["stopped"]
    unknown = replace(
        report, origins=(), findings=(replace(report.findings[0], evidence={"source": FAULT.source}),)
    )
    assert "file=train.py,line=88," in FORMATS["github"].text(unknown)


def test_a_fault_of_no_layer_is_one_of_the_training_run() -> None:
    comment = FORMATS["markdown"].text(REPORTS["scale"])
    assert "| the training run | Step 60: " in comment
    assert "whole model" not in comment


def test_the_case_of_a_run_is_named_for_what_it_is() -> None:
    suite = ET.fromstring(FORMATS["junit"].text(REPORTS["continued"]))
    assert "the training run" in {case.get("name") for case in suite.iter("testcase")}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.glob("*"):
        stale.unlink()
    for golden_file in VIEWS:
        (GOLDEN / golden_file).write_text(view(golden_file), encoding="utf-8")
