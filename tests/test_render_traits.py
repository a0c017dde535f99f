"""Which heads get a word, which word, and that no layer is drowned by the others."""

from __future__ import annotations

from typing import Any

from measured_reports import DIAGONAL, EVEN, ON_KEY_0, call, encoder, encoder_decoder, numbers, report
from rich.console import Console, Group

from attncli.records import Report
from attncli.render.calls import call_rows
from attncli.render.traits import heads_that_stand_out


def words(shown: Report, width: int = 200) -> list[str]:
    console = Console(width=width, color_system=None, _environ={})
    with console.capture() as capture:
        console.print(Group(*heads_that_stand_out(call_rows(shown), console)))
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


def of(*heads: dict[str, Any], **changes: Any) -> list[str]:
    one = call(0, "attn", heads=len(heads), kv_heads=len(heads), **changes)
    return words(report("entropy", [(one, numbers(one, heads))]))


def test_a_cross_attention_on_token_0_and_a_diagonal_one_read_differently() -> None:
    on_key_0, diagonal = (words(encoder_decoder("entropy", [kind])) for kind in (ON_KEY_0, DIAGONAL))
    assert on_key_0 == [
        "On one key (over half of the attention): 4 of 16 heads",
        "  decoder.layers.1.encoder_attn  all 4 heads  0.97 on key 0",
    ]
    assert diagonal[:2] == [
        "Local (mean reach below an eighth of the keys): 4 of 16 heads",
        "  decoder.layers.1.encoder_attn  all 4 heads  diagonal: reach 0.40",
    ]


def test_nothing_is_said_where_no_head_stands_out() -> None:
    assert of({}, {}) == []


def test_heads_on_different_keys_stand_in_different_lines() -> None:
    found = of(ON_KEY_0, {**ON_KEY_0, "sink_mass": 0.8}, {**ON_KEY_0, "sink_key": 7}, {})
    assert found[0] == "On one key (over half of the attention): 3 of 4 heads"
    assert found[1:] == ["  attn  heads 0–1  0.80–0.97 on key 0", "  attn  head 2     0.97 on key 7"]


def test_half_of_the_attention_on_a_key_is_not_over_half() -> None:
    assert of({"sink_mass": 0.5}) == []
    assert of({"sink_mass": 0.51})[1] == "  attn  head 0  0.51 on key 5"


def test_a_head_that_looks_at_its_neighbours_is_local_and_not_diagonal() -> None:
    assert of({"reach": 0.99}, {})[1] == "  attn  head 0  diagonal: reach 0.99"
    assert of({"reach": 1.1}, {})[1] == "  attn  head 0  local: reach 1.10"
    assert of({"reach": 15.9}, {})[1] == "  attn  head 0  local: reach 15.90"
    assert of({"reach": 16.0}, {}) == []


def test_in_a_window_near_is_measured_by_the_window() -> None:
    assert of({"reach": 3.0}, {})[1:] == ["  attn  head 0  local: reach 3.00"]
    assert of({"reach": 3.0}, {}, window=16) == []


def test_even_heads_are_told_with_enough_digits() -> None:
    assert of(EVEN, {})[0] == "Even (over 99 % of ln n): 1 of 2 heads"
    assert of(EVEN, {})[1] == "  attn  head 0  0.9996 of ln n"
    assert of({"entropy_ratio": 0.99999999})[1] == "  attn  head 0  0.9999 of ln n"
    assert of({"entropy_ratio": 1.0})[1] == "  attn  head 0  1 of ln n"
    assert of({"entropy_ratio": 0.99}) == []


def test_concentration_is_told_without_the_sink() -> None:
    assert of({"entropy_rest": 0.69}, {})[1] == "  attn  head 0  0.69 nats besides the sink"
    assert of({"entropy_rest": 0.7}, {}) == []
    assert of({"entropy_rest": None}) == []


def test_among_two_or_three_keys_no_head_stands_out() -> None:
    assert of(ON_KEY_0, keys=3) == []
    assert of(ON_KEY_0, queries=1) == []


def test_broken_numbers_do_not_stand_out() -> None:
    nan = float("nan")
    assert of({"sink_mass": nan, "reach": nan, "entropy_ratio": nan, "entropy_rest": nan}) == []


def test_layers_in_which_the_same_heads_stand_out_are_one_line() -> None:
    made = [call(index, f"h.{index}.attn", heads=2, kv_heads=2) for index in range(4)]
    heads = [{**ON_KEY_0, "sink_mass": 0.6}, {**ON_KEY_0, "sink_mass": 0.9}]
    shown = report("entropy", [(one, numbers(one, heads)) for one in made])
    assert words(shown)[1:] == ["  h.{0–3}.attn  all 2 heads  0.60–0.90 on key 0"]


def test_five_lines_each_of_self_and_cross_attention_and_the_rest_is_counted() -> None:
    made = []
    for index in range(8):
        one = call(2 * index, f"h.{index}.attn", heads=9, kv_heads=9)
        special = [ON_KEY_0 if head == index else {} for head in range(9)]
        made.append((one, numbers(one, special)))
    cross = call(99, "h.3.cross", kind="cross", heads=2, kv_heads=2)
    made.append((cross, numbers(cross, [{**ON_KEY_0, "sink_mass": 0.55}, {}])))
    found = words(report("entropy", made))
    assert found[0].endswith(": 9 of 74 heads")
    assert len(found) == 1 + 5 + 1 + 1
    assert found[-2:] == ["  h.3.cross  head 0  0.55 on key 0", "  and 3 more"]


def test_whole_layers_come_before_single_heads_and_strong_before_weak() -> None:
    made = []
    for index, masses in enumerate(([0.99, 0.1], [0.6, 0.6], [0.9, 0.9])):
        one = call(index, f"block_{index}", heads=2, kv_heads=2)
        made.append((one, numbers(one, [{"sink_mass": mass, "sink_key": 0} for mass in masses])))
    order = [line.split()[0] for line in words(report("entropy", made))[1:]]
    assert order == ["block_2", "block_1", "block_0"]


def test_narrow_terminals_get_two_lines_a_head_and_no_word_is_lost() -> None:
    wide, narrow = (" ".join(words(encoder("entropy"), width)) for width in (200, 40))
    assert narrow.replace(", ", " ").split() == wide.split()


def test_a_range_that_ends_beyond_the_digits_shown_is_still_read_as_one() -> None:
    found = of({**ON_KEY_0, "sink_mass": 0.55}, {**ON_KEY_0, "sink_mass": 0.9999})
    assert found[1] == "  attn  all 2 heads  0.55 to >.99 on key 0"
