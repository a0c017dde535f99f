"""The tables of `entropy` and `overflow` against golden files, and what must hold of them for any run.

Golden files are made anew by `python tests/test_render_run.py`; look at their diff before committing it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from measured_reports import (
    DIAGONAL,
    ON_KEY_0,
    call,
    encoder,
    encoder_decoder,
    finding,
    language_model,
    layer,
    numbers,
    report,
)
from rich.console import Console

from attncli.records import Report
from attncli.render import FORMATS, table

GOLDEN = Path(__file__).parent / "golden_runs"


def near_overflow() -> Report:
    """Four kinds of layers in float16: unscaled product, product scaled before, fused, and one that overflowed."""
    eager = {"kernel": "softmax", "dtype": "float16", "scores_dtype": "float16", "heads": 2, "kv_heads": 2}
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (
            {**eager, "stored": "raw", "factors": {"scores": 0.125}},
            {"dot_absmax": 71_200.0, "score_max": 8900.0},
        ),
        (
            {**eager, "stored": "scaled", "factors": {"query": 0.125}},
            {"dot_absmax": 71_200.0, "score_max": 8900.0},
        ),
        ({"stored": "nothing", "heads": 2, "kv_heads": 2}, {"dot_absmax": 40_000.0, "score_max": 5000.0}),
        (
            {**eager, "stored": "raw", "factors": {}, "scale": 1.0},
            {"dot_absmax": math.inf, "score_max": math.inf},
        ),
        (
            {**eager, "stored": "raw", "scale": None, "factors": {}},
            {"dot_absmax": math.nan, "score_max": math.nan},
        ),
    ]
    made = []
    for index, (changes, values) in enumerate(kinds):
        one = call(index, f"blocks.{index}.attn", **changes)
        made.append((one, numbers(one, [{}, values])))
    found = finding(
        "ATT502", "product-overflows", "error", "blocks.3.attn: head 1: q·k reaches inf.", "blocks.3.attn"
    )
    return report("overflow", made, findings=(found,))


def shared_layer() -> Report:
    """One layer that runs three times, one free function, and one call that nothing explains."""
    where = "encoder.shared.attention"
    made = [(one, numbers(one)) for one in (call(index, where, heads=2, kv_heads=2) for index in range(3))]
    free = call(3, "", heads=1, kv_heads=1, queries=3, keys=5, kind="cross", kernel="softmax", head_dim=None)
    made.append((free, numbers(free)))
    odd = call(
        4,
        "decoder.mystery",
        heads=2,
        kv_heads=2,
        explained=False,
        mask_kind=None,
        scale=None,
        normaliser="sigmoid",
        reason="the output differs by 0.3 from softmax(q·k)·v",
    )
    empty = dict.fromkeys(("entropy", "entropy_ratio", "entropy_rest", "sink_mass", "reach", "dot_absmax"))
    made.append((odd, numbers(odd, [empty])))
    return report("entropy", made, notes=("the fast path was switched off",), run={"batch": "text"})


REPORTS: dict[str, Report] = {
    "encoder": encoder("entropy"),
    "language-model": language_model("entropy"),
    "cross-on-key-0": encoder_decoder("entropy", [ON_KEY_0]),
    "cross-diagonal": encoder_decoder("entropy", [DIAGONAL]),
    "one-head": encoder("entropy", 1, 1),
    "shared": shared_layer(),
    "no-attention": report("entropy", [], layers=(layer("mixer.0", kind=None), layer("mixer.1", kind=None))),
    "overflow": encoder("overflow", 3),
    "near-overflow": near_overflow(),
    "measure": encoder("measure", 2),
}
VIEWS: dict[str, tuple[str, int | None, bool]] = {
    **{name: (name, None, False) for name in REPORTS},
    "encoder-40-columns": ("encoder", 40, False),
    "cross-diagonal-60-columns": ("cross-diagonal", 60, False),
    "near-overflow-80-columns": ("near-overflow", 80, False),
    "overflow-40-columns": ("overflow", 40, False),
    "cross-on-key-0-unfolded": ("cross-on-key-0", None, True),
    "shared-unfolded-80-columns": ("shared", 80, True),
}


def drawn(
    shown: Report, columns: int, *, unfolded: bool = False, color: str | None = None, **options: Any
) -> str:
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=columns,
        color_system=color,  # type: ignore[arg-type]
        force_terminal=color is not None,
        legacy_windows=False,
        _environ={},
        **options,
    )
    table.draw(shown, console, unfolded=unfolded)
    return buffer.getvalue()


def view(name: str) -> str:
    source, columns, unfolded = VIEWS[name]
    if columns is None:
        return table.text(REPORTS[source], unfolded=unfolded)
    lines = drawn(REPORTS[source], columns, unfolded=unfolded).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


@pytest.mark.parametrize("name", VIEWS)
def test_the_table_is_the_golden_one(name: str) -> None:
    assert view(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.glob("*")} == set(VIEWS)


# --- widths and colours -------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [20, 40, 80, 133])
@pytest.mark.parametrize("name", REPORTS)
def test_no_line_is_wider_than_the_console(name: str, columns: int) -> None:
    for unfolded in (False, True):
        lines = drawn(REPORTS[name], columns, unfolded=unfolded).splitlines()
        assert [line for line in lines if len(line) > columns] == []


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_every_number_of_the_picture_is_there_at_any_width(columns: int) -> None:
    shown = encoder("entropy", 4, 50)
    words = drawn(shown, columns).split()
    for row in shown.measurements:
        if row.metric == "entropy":
            assert f"{row.value:.2f}" in words


def test_a_pipe_gets_all_heads_of_a_layer_in_one_line_however_many() -> None:
    lines = table.text(encoder("entropy", 3, 128)).splitlines()
    assert [len(line.split()) for line in lines if re.match(r" +[012]  ", line)] == [130] * 3


def test_colour_is_decoration_the_words_are_the_same_without_it() -> None:
    shown = REPORTS["near-overflow"]
    coloured = drawn(shown, 100, color="truecolor")
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == drawn(shown, 100)
    assert "\x1b[1;31m" in coloured


@pytest.mark.parametrize("system", ["truecolor", "256"])
def test_cells_are_painted_where_the_terminal_has_the_colours(system: str) -> None:
    assert "48;5;" in drawn(REPORTS["encoder"], 100, color=system)
    assert "Colour: H/ln n" in drawn(REPORTS["encoder"], 100, color=system)


@pytest.mark.parametrize(
    "options", [{"color": "standard"}, {"color": "256", "no_color": True}, {"color": None}]
)
def test_cells_are_plain_numbers_where_it_has_not(options: dict[str, Any]) -> None:
    output = drawn(REPORTS["encoder"], 100, **options)
    assert "48;5;" not in output
    assert "Colour" not in output
    assert " 2.67" in output


# --- hostile names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 100_000])
@pytest.mark.parametrize("command", ["entropy", "overflow", "measure"])
def test_markup_and_control_characters_are_shown_and_never_obeyed(command: str, columns: int) -> None:
    evil = "[red]a[/red]\x1b[31m\x9b2J\r\n\x07{}%"
    one = call(
        0,
        evil,
        heads=2,
        kv_heads=2,
        module=evil + "m",
        kernel=evil,
        normaliser=evil,
        mask_kind=evil,
        dtype=evil,
        scores_dtype=evil + "s",
        source=evil,
        query_sources=(evil,),
        factors={evil: 0.5},
        stored="raw",
    )
    unexplained = dataclasses.replace(one, index=1, explained=False, reason=evil)
    special = {
        "sink_mass": 0.9,
        "sink_key": evil,
        "reach": 0.1,
        "entropy_rest": 0.1,
        "dot_absmax": 1e5,
        evil: 1.0,
    }
    shown = report(
        command,
        [(one, numbers(one, [special], **{evil: evil})), (unexplained, numbers(unexplained))],
        layers=(layer(evil),),
        run={"batch": evil, "inputs": {evil: {"shape": [evil], "dtype": evil}}, "notes": [evil]},
        notes=(evil,),
    )
    output = drawn(shown, columns, unfolded=True)
    assert re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", output) == []
    assert "[red]a[/red]" in output.replace("\n", "").replace(" ", "")


# --- what is said -------------------------------------------------------------------------------------


def test_a_random_batch_is_called_so_and_a_real_one_is_not() -> None:
    assert "synthetic batch" in table.text(REPORTS["encoder"])
    assert "Random inputs" in table.text(REPORTS["encoder"])
    assert "Random inputs" not in table.text(REPORTS["shared"])
    assert "\x1b[33mRandom inputs" in drawn(REPORTS["encoder"], 100, color="256")


def test_the_last_line_is_the_verdict() -> None:
    lasts = {name: table.text(shown).splitlines()[-1] for name, shown in REPORTS.items()}
    assert lasts["encoder"] == "6 calls, 6 explained (largest difference 3e-06); no findings."
    assert lasts["one-head"] == "1 call, 1 explained (largest difference 3e-06); no findings."
    assert lasts["shared"] == "Not observed: 1 of 5 calls (4 explained, largest difference 3e-06)."
    assert lasts["no-attention"] == "Not observed: no attention ran; 2 layers without softmax attention."
    assert lasts["near-overflow"] == "5 calls, 5 explained (largest difference 3e-06); 1 error."


def test_what_was_not_observed_is_yellow_and_named_with_its_reason() -> None:
    output = drawn(REPORTS["shared"], 120, color="256")
    reason = "decoder.mystery: the output differs by 0.3 from softmax(q·k)·v."
    assert f"\x1b[33mnot observed: {reason}" in output
    assert "\x1b[1;33mNot observed: " in output


def test_many_unexplained_calls_with_one_reason_take_one_line() -> None:
    calls = [call(i, f"h.{i}.attn", explained=False, reason="x") for i in range(9)]
    lines = table.text(report("entropy", [(one, numbers(one)) for one in calls])).splitlines()
    assert [line for line in lines if "not observed" in line] == [
        "not observed: h.0.attn, h.1.attn, h.2.attn and 6 more: x."
    ]


def test_findings_beside_what_was_not_observed_are_both_in_the_verdict() -> None:
    shown = dataclasses.replace(REPORTS["shared"], findings=(finding("ATT601", "x", "warning", "m: n."),))
    assert table.text(shown).splitlines()[-1].startswith("Not observed: 1 of 5 calls")
    assert table.text(shown).endswith("; 1 warning.\n")


def test_the_two_commands_and_both_together_show_their_own_numbers() -> None:
    shown = {command: table.text(encoder(command, 2)) for command in ("entropy", "overflow", "measure")}
    assert ["Entropy in nats" in text for text in shown.values()] == [True, False, True]
    assert ["|q·k|" in text for text in shown.values()] == [False, True, True]


def test_unfolded_shows_every_metric_of_every_head() -> None:
    shown = encoder_decoder("entropy", [ON_KEY_0])
    text = table.text(shown, unfolded=True)
    for row in shown.measurements:
        if row.head is not None and not row.metric.startswith(("headroom", "rows")):
            assert f"  {row.metric}" in text
    tail = text[text.index("decoder.layers.0.self_attn\n") :]
    assert sum(bool(re.match(r" +[0-3]  ", line)) for line in tail.splitlines()) == 16


def test_reports_without_a_batch_inputs_or_environment_can_be_drawn() -> None:
    bare = Report(command="entropy", version="0", source={}, environment={}, run={})
    assert table.text(bare).endswith("Not observed: no attention ran.\n")


@pytest.mark.parametrize("name", REPORTS)
def test_json_is_the_report(name: str) -> None:
    assert json.loads(FORMATS["json"].text(REPORTS[name])) == REPORTS[name].to_dict()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.glob("*"):
        stale.unlink()
    for view_name in VIEWS:
        (GOLDEN / f"{view_name}.txt").write_text(view(view_name), encoding="utf-8")
