"""Rules about concentration: collapse needs more than low entropy, and healthy sharp heads stay unmentioned."""

from __future__ import annotations

import math

import pytest
from rule_cases import PATH, Case, Ran, above, check, one, ran, seen

from attncli.rules import RULES, judge
from attncli.rules.entropy import ENTROPY_RULES

ONE_HOT = {"entropy_rest": 0.01, "peaky_rows": 0.99, "entropy": 0.01, "entropy_ratio": 0.01}
SINK = {"sink_mass": 0.99, "sink_key": 0, "entropy": 0.05, "entropy_ratio": 0.02, "peaky_rows": 0.98}


def some(broken: dict[str, float], heads: tuple[int, ...], **changes: object) -> Ran:
    """A healthy call in which some of the heads have the numbers of `broken`."""
    healthy = ran().numbers
    numbers = {
        metric: [value if head in heads else healthy[metric] for head in range(4)]
        for metric, value in broken.items()
    }
    return ran(numbers=numbers, **changes)


def to_encoder(index: int = 0, **numbers: object) -> Ran:
    return ran(index, kind="cross", mask_kind="none", causal_offset=None, keys=40, numbers=numbers)


CASES = [
    # ATT601
    Case(
        "one-hot heads with large scores",
        seen(
            some({**ONE_HOT, "score_max": 99.0}, (0,)),
            some({**ONE_HOT, "score_max": 120.0}, (1, 3), index=1),
        ),
        [
            (
                "ATT501",
                "warning",
                f"{PATH}: head 1: the largest score is 120 (2 of 4 heads): large training runs clip scores here.",
            ),
            (
                "ATT601",
                "warning",
                f"{PATH}: head 1: attention has collapsed (2 of 4 heads): 99 % of its rows lie on one key, 0.01 "
                "nats are left beside the shared one, and scores reach 120.",
            ),
        ],
        # A head on the previous token: sharp by training, on scores that softmax can use.
        seen(some({**ONE_HOT, "score_max": 45.0}, (1, 3))),
    ),
    Case(
        "nearly all heads of the model one-hot",
        seen(*(ran(n, layer=f"h.{n}", numbers=ONE_HOT) for n in range(9)), ran(9)),
        [
            (
                "ATT601",
                "warning",
                "36 of 40 heads of self-attention are one-hot: without the key they share, none has more than 0.01 "
                "nats left.",
            )
        ],
        seen(*(ran(n, layer=f"h.{n}", numbers=ONE_HOT) for n in range(8)), ran(8), ran(9)),
    ),
    # ATT602
    Case(
        "an even head",
        seen(some({"entropy_ratio": 0.995, "entropy": 3.4}, (2,))),
        [
            (
                "ATT602",
                "note",
                f"{PATH}: head 2 attends to all keys alike: the entropy is 0.9950 of its maximum.",
            )
        ],
        seen(some({"entropy_ratio": 0.99, "entropy": 3.4}, (2,))),
    ),
    Case(
        "a layer of even heads",
        one(numbers={"entropy_ratio": above(0.99), "entropy": 3.4}),
        [
            (
                "ATT602",
                "note",
                f"{PATH}: all 4 heads attend to all keys alike: the entropy is 0.9900 of its maximum.",
            )
        ],
        one(queries=7, keys=7, numbers={"entropy_ratio": 1.0, "entropy": 3.4}),
    ),
    Case(
        "some even heads",
        seen(some({"entropy_ratio": 1.0, "entropy": 3.4}, (0, 2))),
        [
            (
                "ATT602",
                "note",
                f"{PATH}: 2 of 4 heads attend to all keys alike: the entropy is 1.0000 of its maximum.",
            )
        ],
        one(softmax_axis="channels", numbers={"entropy_ratio": 1.0, "entropy": 3.4}),
    ),
    Case(
        "random weights",
        seen(*(ran(n, layer=f"h.{n}", numbers={"entropy_ratio": 0.999, "entropy": 3.4}) for n in range(6))),
        [("ATT602", "note", "all 24 heads of 6 layers attend to all keys alike, as with random weights.")],
        seen(*(ran(n, layer=f"h.{n}", numbers={"entropy_ratio": 0.98, "entropy": 3.4}) for n in range(6))),
    ),
    # ATT603
    Case(
        "cross-attention on one token in every head",
        seen(to_encoder(sink_mass=[0.99, 0.93, 0.95, 0.9761], sink_key=0)),
        [
            (
                "ATT603",
                "warning",
                f"{PATH}: all 4 heads lie on key 0 of 40, with at least 93 % of the attention: what the others "
                "say is not read.",
            )
        ],
        # Self-attention does so in most healthy language models.
        one(numbers=SINK),
    ),
    Case(
        "cross-attention of one head on one token",
        seen(
            ran(
                kind="cross",
                mask_kind="none",
                causal_offset=None,
                heads=1,
                kv_heads=1,
                keys=40,
                numbers={"sink_mass": 0.999, "sink_key": 7},
            )
        ),
        [
            (
                "ATT603",
                "warning",
                f"{PATH}: the only head lies on key 7 of 40, with at least 99.9 % of the attention: what the "
                "others say is not read.",
            )
        ],
        # One head that reads is enough, and so is another key.
        seen(
            to_encoder(0, sink_mass=[0.99, 0.99, 0.99, 0.9]),
            to_encoder(1, sink_mass=0.99, sink_key=[0, 0, 3, 0]),
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_the_defect_is_found_by_name_and_its_healthy_neighbour_gives_nothing(case: Case) -> None:
    check(case)


def test_the_cases_cover_every_rule_about_entropy() -> None:
    codes = {code for case in CASES for code, _, _ in case.expected}
    assert {rule.code for rule in ENTROPY_RULES} == codes - {"ATT501"}
    assert set(ENTROPY_RULES) <= set(RULES)


def test_a_model_full_of_sinks_is_healthy() -> None:
    assert judge(seen(*(ran(n, layer=f"h.{n}", numbers=SINK) for n in range(30)))) == ()


def test_sharp_cross_attention_is_an_alignment() -> None:
    diagonal = {**ONE_HOT, "sink_mass": 0.04, "reach": 0.1}
    assert judge(seen(*(to_encoder(n, **diagonal) for n in range(6)))) == ()


@pytest.mark.parametrize(
    ("numbers", "collapsed"),
    [
        ({}, True),
        ({"entropy_rest": 0.2}, False),
        ({"peaky_rows": 0.3}, False),
        ({"entropy_rest": None}, False),
        ({"peaky_rows": None}, False),
        ({"score_max": 100.0}, False),
    ],
)
def test_collapse_needs_all_of_its_evidence(numbers: dict[str, float], collapsed: bool) -> None:
    found = judge(seen(some({**ONE_HOT, "score_max": 101.0, **numbers}, (0,))))
    assert ("ATT601" in {finding.code for finding in found}) is collapsed


@pytest.mark.parametrize(
    "changes", [{"keys": 7, "queries": 7}, {"batch": 1, "queries": 7}, {"kind": "cross"}]
)
def test_few_keys_or_rows_are_sharp_by_chance(changes: dict[str, object]) -> None:
    found = judge(one(**{"causal_offset": None, **changes}, numbers={**ONE_HOT, "score_max": 101.0}))
    assert {finding.code for finding in found} == {"ATT501"}


def test_a_decoding_step_on_a_sink_is_no_cross_attention() -> None:
    assert judge(one(queries=1, batch=16, keys=33, mask_kind="none", causal_offset=None, numbers=SINK)) == ()


def test_the_head_is_named_only_where_it_is_one() -> None:
    (finding,) = judge(seen(some({"entropy_ratio": 0.995, "entropy": 3.4}, (2,))))
    assert (finding.head, finding.layer) == (2, PATH)
    (finding,) = judge(seen(some({"entropy_ratio": 0.995, "entropy": 3.4}, (2, 3))))
    assert (finding.head, finding.evidence["heads"]) == (None, [2, 3])


def test_streams_that_share_nothing_are_cross_attention_whatever_the_call_is_called() -> None:
    apart = {"query_sources": ("input a",), "key_sources": ("input b",), "value_sources": ("input b",)}
    together = {"query_sources": ("input a",), "key_sources": ("input a", "input b")}
    unknown = {"query_sources": (), "key_sources": ("input b",)}
    assert [finding.name for finding in judge(one(numbers=SINK, **apart))] == ["cross-attention-on-one-token"]
    for sources in (together, unknown):
        assert judge(one(numbers=SINK, **sources)) == ()


def test_heads_without_a_number_attend_to_nothing_alike() -> None:
    nothing = {"entropy": float("nan"), "entropy_ratio": float("nan"), "entropy_rest": float("nan")}
    assert judge(seen(*(ran(n, layer=f"h.{n}", numbers=nothing) for n in range(3)))) == ()


@pytest.mark.parametrize(("visible", "told"), [(5, False), (20, True)])
def test_few_keys_that_each_row_may_see_are_even_by_themselves(visible: int, told: bool) -> None:
    even = {"entropy": math.log(visible), "entropy_ratio": 1.0, "entropy_rest": 1.0, "sink_mass": 1 / visible}
    found = judge(seen(ran(mask_kind="none", causal_offset=None, queries=20, keys=20, numbers=even)))
    assert [finding.code for finding in found] == ["ATT602"] * told


def test_eight_keys_and_four_heads_are_enough() -> None:
    assert [finding.code for finding in judge(one(keys=8, queries=8, numbers={"entropy_ratio": 1.0}))] == [
        "ATT602"
    ]
    collapsed = one(batch=1, queries=8, keys=8, numbers=ONE_HOT)
    assert [finding.code for finding in judge(collapsed)] == ["ATT601"]
    three = one(heads=3, kv_heads=3, numbers=ONE_HOT)
    assert judge(three) == ()
