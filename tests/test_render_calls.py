"""Calls as rows: which stand together, what they are called, and what is said once for all of them."""

from __future__ import annotations

from typing import Any

import pytest
from measured_reports import call, encoder_decoder, layer, numbers, report
from rich.console import Console, Group

from attncli.records import Call
from attncli.render import calls
from attncli.render.calls import blocks, call_rows, full_label, headline


def rows_of(*where: str, **changes: Any) -> list[calls.Row]:
    made = [call(index, path, **changes) for index, path in enumerate(where)]
    return call_rows(report("entropy", [(one, numbers(one)) for one in made]))


def named(*where: str, width: int = 200) -> list[tuple[str, tuple[str, ...]]]:
    return [(block.title, block.labels) for block in blocks(rows_of(*where), width)]


def test_layers_of_a_stack_stand_in_one_block_by_number() -> None:
    assert named("h.0.attn", "h.1.attn", "h.10.attn") == [("h.{0–1,10}.attn", ("0", "1", "10"))]


def test_interleaved_stacks_stand_apart_in_the_order_in_which_they_ran() -> None:
    found = [(block.title, block.labels) for block in blocks(call_rows(encoder_decoder("entropy", [])), 80)]
    assert found == [
        ("decoder.layers.{0–1}.self_attn", ("0", "1")),
        ("decoder.layers.{0–1}.encoder_attn", ("0", "1")),
    ]


def test_a_layer_that_runs_more_than_once_has_a_row_per_call() -> None:
    assert named("shared.attn", "shared.attn") == [("shared.attn", ("0", "1"))]
    assert named("h.0.attn", "h.1.attn", "h.0.attn", "h.1.attn") == [
        ("h.{0–1}.attn", ("0 call 0", "0 call 2", "1 call 1", "1 call 3"))
    ]


def test_single_layers_share_a_block_where_their_paths_leave_room() -> None:
    assert named("self_attn", "cross_attn") == [("", ("self_attn", "cross_attn"))]
    assert named("self_attn", "cross_attn", width=18) == [("self_attn", ("",)), ("cross_attn", ("",))]
    assert named("attn") == [("attn", ("",))]


def test_attention_outside_of_any_module_has_a_name_too() -> None:
    assert named("") == [("(no module)", ("",))]


def test_a_call_whose_layer_is_not_listed_is_named_by_its_id() -> None:
    one = call(0, "free.call", heads=1)
    rows = call_rows(report("entropy", [(one, numbers(one))], layers=()))
    assert [block.title for block in blocks(rows, 80)] == ["free.call"]


def test_layers_whose_numbers_do_not_tell_them_apart_keep_their_paths() -> None:
    twins = (layer("a.0.x", stack="s.#"), layer("b.0.x", stack="s.#"))
    made = [call(index, one.path) for index, one in enumerate(twins)]
    rows = call_rows(report("entropy", [(one, numbers(one)) for one in made], layers=twins))
    assert [block.labels for block in blocks(rows, 80)] == [("a.0.x", "b.0.x")]


def test_full_labels_fold_layers_and_name_calls_only_where_needed() -> None:
    rows = rows_of("h.0.attn", "h.1.attn", "h.2.attn")
    assert full_label(rows, rows) == "h.{0–2}.attn"
    assert full_label(rows[:1], rows) == "h.0.attn"
    rows = rows_of("h.0.attn", "h.0.attn", "h.1.attn")
    assert full_label(rows[:1], rows) == "h.0.attn call 0"
    assert full_label(rows[:2], rows) == "h.0.attn calls 0–1"
    assert full_label(rows[2:], rows) == "h.1.attn"


def said(*made: Call, width: int = 200) -> list[str]:
    rows = call_rows(report("entropy", [(one, numbers(one)) for one in made]))
    console = Console(width=width, color_system=None, _environ={})
    with console.capture() as capture:
        for block in blocks(rows, width):
            console.print(Group(*headline(block, lambda one: (calls.kind(one), calls.mask(one)), width)))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_what_holds_for_all_rows_is_said_once_and_the_rest_by_row() -> None:
    window = {"mask_kind": "causal + sliding window", "window": 64}
    made = [call(i, f"h.{i}.attn", **({"mask_kind": "causal"} if i % 2 else window)) for i in range(6)]
    assert said(*made) == [
        "h.{0–5}.attn  self-attention",
        "  layers 0–4 step 2: causal + sliding window of 64",
        "  layers 1–5 step 2: causal",
    ]


def test_facts_of_calls_and_of_paths_name_what_they_are_true_of() -> None:
    made = [call(0, "a", mask_kind="causal"), call(1, "a"), call(2, "a")]
    assert said(*made)[1:] == ["  call 0: causal", "  calls 1–2: no mask"]
    made = [call(0, "a", mask_kind="causal"), call(1, "b")]
    assert said(*made)[1:] == ["  a: causal", "  b: no mask"]


def test_facts_go_below_a_title_that_leaves_them_no_room() -> None:
    assert said(call(0, "encoder.attention"), width=30) == ["encoder.attention", "  self-attention · no mask"]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"mask_kind": "none"}, "no mask"),
        ({"mask_kind": None}, "mask not recovered"),
        ({"mask_kind": "causal + padding"}, "causal + padding"),
        ({"mask_kind": "causal", "causal_offset": -1}, "causal, diagonal hidden"),
        ({"mask_kind": "causal", "causal_offset": 1}, "causal, one future key visible"),
        ({"mask_kind": "causal + sliding window", "window": 4096}, "causal + sliding window of 4096"),
        ({"mask_kind": "other"}, "a mask of another shape"),
        ({"mask_kind": "bias"}, "additive bias"),
    ],
)
def test_masks_are_in_words(changes: dict[str, Any], shown: str) -> None:
    assert calls.mask(call(0, "a", **changes)) == shown


def test_what_a_call_has_by_design_is_in_words() -> None:
    assert calls.design(call(0, "a")) == []
    special = call(
        0, "a", normaliser="softmax plus one", softmax_axis="queries", soft_cap=50.0, sinks=True, dropout=0.1
    )
    assert calls.design(special) == [
        "softmax plus one",
        "normalised over the queries",
        "soft cap 50",
        "learned sinks",
        "dropout 0.1",
    ]
    assert calls.heads(call(0, "a", kv_heads=3)) == "12 heads on 3 KV"
    assert calls.heads(call(0, "a", heads=1, kv_heads=1)) == "1 head"
    assert calls.kind(call(0, "a", kind=None)) == "self or cross unknown"
