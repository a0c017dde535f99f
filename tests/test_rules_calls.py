"""Rules about how attention is computed: each finds its defect by name, and nothing in its nearest neighbour."""

from __future__ import annotations

import pytest
from rule_cases import PATH, Case, check, one, ran, seen

from attncli.rules import RULES, judge
from attncli.rules.calls import CALL_RULES
from attncli.rules.masks import MASK_RULES

ENCODER = ("input src", "call 0")
DECODER = ("input tgt", "call 1")


def cross(query: tuple[str, ...], key: tuple[str, ...], value: tuple[str, ...]):
    """Encoder, decoder and the cross-attention between them, as a model runs them."""
    return seen(
        ran(0, layer="encoder", mask_kind="none", causal_offset=None),
        ran(1, layer="decoder"),
        ran(
            2,
            layer="cross",
            kind="cross",
            mask_kind="none",
            causal_offset=None,
            query_sources=query,
            key_sources=key,
            value_sources=value,
        ),
    )


CASES = [
    # ATT401
    Case(
        "softmax over the queries",
        one(softmax_axis="queries", queries=16, numbers={"row_sum_min": 0.7, "row_sum_max": 5.0}),
        [
            (
                "ATT401",
                "error",
                f"{PATH}: the softmax runs over the queries instead of the keys: the weights of a row sum to 0.7 … 5.",
            )
        ],
        # Slot attention divides by the sum of each row afterwards.
        one(softmax_axis="queries", queries=16, numbers={"row_sum_min": 0.9999, "row_sum_max": 1.0}),
    ),
    Case(
        "softmax over the queries whose sums are not known",
        one(softmax_axis="queries", numbers={"row_sum_min": None, "row_sum_max": None}),
        [("ATT401", "error", f"{PATH}: the softmax runs over the queries instead of the keys.")],
        # Grouping divides by the sum plus one: no row reaches S/T.
        one(softmax_axis="queries", queries=8, numbers={"row_sum_min": 0.5, "row_sum_max": 0.97}),
    ),
    Case(
        "softmax over the queries where rows come out even",
        one(softmax_axis="queries", queries=16, numbers={"row_sum_min": 2.0, "row_sum_max": 2.0}),
        [
            (
                "ATT401",
                "error",
                f"{PATH}: the softmax runs over the queries instead of the keys: the weights of a row sum to 2 … 2.",
            )
        ],
        one(softmax_axis="channels"),
    ),
    # ATT402
    Case(
        "a mask after the softmax",
        one(masked_after_softmax=True, numbers={"row_sum_min": 0.03}),
        [
            (
                "ATT402",
                "error",
                f"{PATH}: a mask is applied after the softmax: the weights of a row sum to 0.03 … 1.",
            )
        ],
        # Padding rows set to zero, or rows divided by their sum again.
        one(masked_after_softmax=True),
    ),
    Case(
        "1/√d after the softmax",
        one(numbers={"row_sum_min": 0.125, "row_sum_max": 0.1251}),
        [
            (
                "ATT402",
                "error",
                f"{PATH}: the weights are multiplied by 1/√64 after the softmax: the weights of every row sum "
                "to 0.125.",
            )
        ],
        one(sinks=True, numbers={"row_sum_min": 0.125, "row_sum_max": 0.1251}),
    ),
    Case(
        "weights that grow",
        one(numbers={"row_sum_max": 1.0011}),
        [("ATT402", "warning", f"{PATH}: the weights of a row sum to 1 … 1.001.")],
        one(numbers={"row_sum_max": 1.0009}),
    ),
    Case(
        "weights that shrink in bfloat16",
        one(dtype="bfloat16", numbers={"row_sum_min": 0.97}),
        [("ATT402", "warning", f"{PATH}: the weights of a row sum to 0.97 … 1.")],
        one(dtype="bfloat16", numbers={"row_sum_min": 0.985}),
    ),
    Case(
        "heads mixed after the softmax",
        one(numbers={"row_sum_min": 0.4, "row_sum_max": 1.7}),
        [("ATT402", "warning", f"{PATH}: the weights of a row sum to 0.4 … 1.7.")],
        one(normaliser="sigmoid", numbers={"row_sum_min": 0.4, "row_sum_max": 1.7}),
    ),
    # ATT403
    Case(
        "dropout on scores",
        one(dropout_before_softmax=True),
        [("ATT403", "warning", f"{PATH}: dropout stands before the softmax, on the scores.")],
        one(dropout=0.1, numbers={"row_sum_min": 0.4, "row_sum_max": 1.7}),
    ),
    # ATT404
    Case(
        "queries of the encoder, keys of the decoder",
        cross(ENCODER, DECODER, DECODER),
        [
            (
                "ATT404",
                "error",
                "cross: the queries come from the encoder (input src, call 0) and the keys from the decoder "
                "(input tgt, call 1).",
            )
        ],
        cross(DECODER, ENCODER, ENCODER),
    ),
    Case(
        "plain attention with its sides swapped",
        one(
            kind="cross",
            mask_kind="none",
            causal_offset=None,
            query_sources=("input encoder_outputs",),
            key_sources=("input decoder_hidden",),
            value_sources=("input decoder_hidden",),
        ),
        [
            (
                "ATT404",
                "error",
                f"{PATH}: the queries come from the encoder (input encoder_outputs) and the keys from the decoder "
                "(input decoder_hidden).",
            )
        ],
        one(
            kind="cross",
            mask_kind="none",
            causal_offset=None,
            query_sources=("input decoder_hidden",),
            key_sources=("input encoder_outputs",),
            value_sources=("input encoder_outputs",),
        ),
    ),
    Case(
        "values of the queries' side",
        cross(DECODER, ENCODER, DECODER),
        [
            (
                "ATT404",
                "error",
                "cross: the values come from where the queries do (input tgt, call 1), the keys from elsewhere "
                "(input src, call 0).",
            )
        ],
        # A later layer: what the decoder has read of the encoder is in its queries too.
        cross((*DECODER, *ENCODER, "call 2"), ENCODER, ENCODER),
    ),
    # ATT405
    Case(
        "exp without the maximum subtracted",
        one(normaliser="softmax by hand", subtracts_maximum=False, numbers={"score_max": 80.0}),
        [
            (
                "ATT405",
                "warning",
                f"{PATH}: exp is taken of the scores as they are, and overflows float32 from 88.7 on; here the "
                "largest score is 80.",
            )
        ],
        one(normaliser="softmax by hand", subtracts_maximum=True, numbers={"score_max": 80.0}),
    ),
    Case(
        "exp that overflows",
        one(
            normaliser="softmax by hand",
            subtracts_maximum=False,
            scores_dtype="float16",
            numbers={"score_max": 12.0},
        ),
        [
            (
                "ATT405",
                "error",
                f"{PATH}: exp is taken of the scores as they are, and overflows float16 from 11.1 on; here the "
                "largest score is 12.",
            )
        ],
        one(normaliser="softmax by hand", subtracts_maximum=False, soft_cap=50.0),
    ),
    # ATT406
    Case(
        "the diagonal hidden",
        one(causal_offset=-1, numbers={"rows_masked": 2}),
        [
            (
                "ATT406",
                "error",
                f"{PATH}: no token sees itself: the causal mask hides the diagonal, so the first row has no key.",
            )
        ],
        # A cache that is longer than what was written into it.
        one(causal_offset=-1, keys=33),
    ),
    Case(
        "the diagonal and its neighbour hidden",
        one(causal_offset=-2),
        [
            (
                "ATT406",
                "error",
                f"{PATH}: no token sees itself nor the 1 token before it: the causal mask hides the diagonal, so the "
                "first 2 rows have no key.",
            )
        ],
        # One weight for q and k: each token is its own best match.
        one(causal_offset=-1, parameters={"q": "qk.weight", "k": "qk.weight"}),
    ),
    # ATT407
    Case(
        "one key of the future shown",
        one(causal_offset=1),
        [
            (
                "ATT407",
                "error",
                f"{PATH}: each token sees 1 token of its future: the causal mask ends 1 key too late.",
            )
        ],
        one(causal_offset=0, queries=1, keys=33),
    ),
    Case(
        "a look-ahead",
        one(causal_offset=3),
        [
            (
                "ATT407",
                "warning",
                f"{PATH}: each token sees 3 tokens of its future: the causal mask ends 3 keys too late.",
            )
        ],
        one(causal_offset=None, mask_kind="none"),
    ),
    # ATT408
    Case(
        "rows without a key",
        one(numbers={"rows_masked": 3}),
        [("ATT408", "warning", f"{PATH}: 3 of 64 rows may attend to no key (4 of 4 heads).")],
        one(numbers={"rows_padded": 3}),
    ),
    Case(
        "a row without a key in one head",
        one(numbers={"rows_masked": [0, 0, 1, 0]}),
        [("ATT408", "warning", f"{PATH}: 1 of 64 rows may attend to no key.")],
        one(sinks=True, numbers={"rows_masked": [0, 0, 1, 0]}),
    ),
    # ATT409
    Case(
        "the future alone visible",
        one(mask_kind="future only", causal_offset=None, numbers={"rows_masked": 2}),
        [
            (
                "ATT409",
                "error",
                f"{PATH}: each token sees its future alone: the causal mask hides what it should show.",
            )
        ],
        one(mask_kind="other", causal_offset=None),
    ),
    Case(
        "a mask that adds",
        one(mask_kind="bias", causal_offset=None, numbers={"score_max": 1e9, "dot_absmax": 80.0}),
        [("ATT409", "error", f"{PATH}: the mask adds 1e+09 to scores instead of taking it away.")],
        # ALiBi as BLOOM has it, at 16,384 tokens.
        one(mask_kind="causal + bias", numbers={"score_max": 13_000.0, "dot_absmax": 80.0}),
    ),
    # ATT413
    Case(
        "a mask of zeros and ones that is added",
        one(mask_kind="0/1 bias (causal)", causal_offset=None),
        [
            (
                "ATT413",
                "error",
                f"{PATH}: a causal mask of zeros and ones is added to the scores: nothing is hidden.",
            )
        ],
        one(mask_kind="causal + bias"),
    ),
    Case(
        "padding of zeros and ones that is added",
        one(mask_kind="0/1 bias (padding)", causal_offset=None),
        [
            (
                "ATT413",
                "warning",
                f"{PATH}: a padding mask of zeros and ones is added to the scores: nothing is hidden.",
            )
        ],
        one(mask_kind="bias", causal_offset=None),
    ),
    Case(
        "hidden scores that become 0",
        one(mask_kind="padding + zero fill (causal)", causal_offset=None),
        [
            (
                "ATT413",
                "error",
                f"{PATH}: a causal mask sets hidden scores to 0, which is a score like any other: nothing is hidden.",
            )
        ],
        one(mask_kind="zero fill (causal)", causal_offset=None, masked_after_softmax=True),
    ),
    # ATT414
    Case(
        "heads that are slices of tokens",
        one(numbers={"tokens_per_head": 8.0}),
        [
            (
                "ATT414",
                "error",
                f"{PATH}: q and k are cut into 4 heads along the tokens: each head holds 8 of 32 tokens instead of "
                "a part of every token.",
            )
        ],
        one(),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_the_defect_is_found_by_name_and_its_healthy_neighbour_gives_nothing(case: Case) -> None:
    for finding in check(case):
        assert finding.layer in {call.layer for call in case.broken.calls}


def test_the_cases_cover_every_rule_about_calls() -> None:
    assert {code for case in CASES for code, _, _ in case.expected} == {
        rule.code for rule in (*CALL_RULES, *MASK_RULES)
    }
    assert {*CALL_RULES, *MASK_RULES} <= set(RULES)


def test_a_healthy_call_gives_nothing() -> None:
    assert judge(one()) == ()
    assert judge(seen(ran(0), ran(1, layer="encoder", mask_kind="padding", causal_offset=None))) == ()


def test_a_call_that_was_not_explained_is_not_judged() -> None:
    assert (
        judge(one(explained=False, causal_offset=1, softmax_axis="queries", numbers={"score_max": 1e5})) == ()
    )


def test_a_layer_that_ran_more_than_once_gets_one_finding_that_counts_its_calls() -> None:
    (finding,) = judge(seen(ran(0), ran(1, causal_offset=1), ran(2, causal_offset=1)))
    assert finding.message.endswith("the causal mask ends 1 key too late, in 2 of 3 calls.")
    (finding,) = judge(seen(ran(0, causal_offset=1), ran(1, causal_offset=1)))
    assert finding.message.endswith("the causal mask ends 1 key too late.")


def test_each_cause_of_weights_that_do_not_sum_to_one_gets_its_own_advice() -> None:
    (masked,) = judge(one(masked_after_softmax=True, numbers={"row_sum_min": 0.03}))
    (scaled,) = judge(one(numbers={"row_sum_min": 0.125, "row_sum_max": 0.125}))
    (other,) = judge(one(numbers={"row_sum_min": 0.3}))
    assert "before the softmax: scores.masked_fill(mask, -inf).softmax(-1)" in masked.advice
    assert "Divide the scores by sqrt(head_dim) before the softmax" in scaled.advice
    assert other.advice == next(rule.remedy for rule in RULES if rule.code == "ATT402")
    assert masked.evidence == {"row_sum_min": 0.03, "row_sum_max": 1.0, "masked_after_softmax": True}


def test_fully_masked_rows_name_the_head_only_where_it_is_one() -> None:
    (finding,) = judge(one(numbers={"rows_masked": [0, 0, 1, 0]}))
    assert (finding.head, finding.evidence["heads"]) == (2, [2])
    (finding,) = judge(one(numbers={"rows_masked": [0, 0, 1, 1]}))
    assert (finding.head, finding.evidence["heads"]) == (None, [2, 3])


@pytest.mark.parametrize(
    ("query", "key"),
    [
        # Two encoders that read each other, or a model without marks: no side is known to be wrong.
        (("input text", "call 0"), ("input image", "call 0")),
        (("input image",), ("input text",)),
        # Learned queries have no source.
        ((), ENCODER),
        # Names that only look like a side.
        (("input encoding",), ("input decoded",)),
        (("input srcs",), ("input target2",)),
    ],
)
def test_sides_that_are_not_known_are_not_called_swapped(
    query: tuple[str, ...], key: tuple[str, ...]
) -> None:
    assert judge(cross(query, key, key)) == ()


@pytest.mark.parametrize("name", ["encoder_outputs", "src", "enc", "memory", "source_tokens", "encoder"])
def test_the_encoder_is_known_by_the_name_of_its_input(name: str) -> None:
    found = judge(cross((f"input {name}",), ("input decoder_input_ids",), ("input decoder_input_ids",)))
    assert [finding.name for finding in found] == ["queries-and-keys-swapped"]


def test_one_of_two_streams_may_hide_the_diagonal() -> None:
    content, query = ran(0, causal_offset=0), ran(1, causal_offset=-1)
    assert judge(seen(content, query)) == ()
    # A decoding step shows its only key; that excuses nothing.
    step = ran(0, queries=1, keys=1, causal_offset=0)
    assert [finding.name for finding in judge(seen(step, query))] == ["causal-mask-hides-diagonal"]


@pytest.mark.parametrize(
    "changes", [{"masked_after_softmax": True}, {"parameters": {"q": "qk.weight", "k": "qk.weight"}}]
)
def test_empty_rows_that_are_meant_are_no_finding(changes: dict[str, object]) -> None:
    assert judge(one(mask_kind="other", causal_offset=None, numbers={"rows_masked": 4}, **changes)) == ()


def test_a_softmax_over_the_queries_leaves_open_which_side_asks() -> None:
    found = judge(
        one(
            softmax_axis="queries",
            query_sources=("input memory",),
            key_sources=("input tgt",),
            value_sources=("input memory",),
            numbers={"row_sum_min": 0.2, "row_sum_max": 3.0},
        )
    )
    assert [finding.name for finding in found] == ["softmax-over-wrong-axis"]


@pytest.mark.parametrize(("queries", "keys"), [(64, 8), (8, 64)])
def test_columns_that_sum_to_one_are_known_by_the_mean_of_the_rows(queries: int, keys: int) -> None:
    def found(low: float, high: float) -> list[str]:
        sums = {"row_sum_min": low, "row_sum_max": high}
        return [f.name for f in judge(one(softmax_axis="queries", queries=queries, keys=keys, numbers=sums))]

    assert found(3.0, 12.0) == ["softmax-over-wrong-axis"]
    assert found(0.05, 0.3) == ["softmax-over-wrong-axis"]
    assert found(0.8, 0.95) == []
    assert found(1.0, 1.0) == []


def test_sides_are_told_by_the_masks_of_earlier_calls_alone() -> None:
    found = judge(cross(("call 0",), ("call 1",), ("call 1",)))
    assert [finding.name for finding in found] == ["queries-and-keys-swapped"]
    assert judge(cross(("call 1",), ("call 0",), ("call 0",))) == ()
    # What an earlier cross-attention gave, or a call that is not known, is of no side.
    assert judge(cross(("call 2",), ("call 1",), ("call 1",))) == ()
    assert judge(cross(("call 9",), ("call 1",), ("call 1",))) == ()


def test_long_lists_of_sources_are_cut() -> None:
    names = tuple(f"input src_{letter}" for letter in "abcd")
    (finding,) = judge(cross(names, ("input tgt",), ("input tgt",)))
    assert "(input src_a, input src_b, input src_c and 1 more)" in finding.message
    (finding,) = judge(cross(names[:3], ("input tgt",), ("input tgt",)))
    assert "(input src_a, input src_b, input src_c)" in finding.message


@pytest.mark.parametrize(
    ("dtype", "largest"), [("float16", 11.09), ("bfloat16", 88.72), ("float32", 88.72), ("float64", 709.78)]
)
def test_exp_overflows_where_its_dtype_ends(dtype: str, largest: float) -> None:
    def severity(score: float) -> str:
        changes = {"normaliser": "softmax by hand", "subtracts_maximum": False, "scores_dtype": dtype}
        found = judge(one(**changes, mask_kind="bias", scale=None, numbers={"score_max": [score, 0, 0, 0]}))
        return next(finding.severity for finding in found if finding.code == "ATT405")

    assert severity(largest - 0.01) == "warning"
    assert severity(largest + 0.01) == "error"


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (0.125, 1.0, "the weights of a row sum to 0.125 … 1."),
        (0.5, 0.5, "the weights of every row sum to 0.5."),
    ],
)
def test_only_a_constant_factor_of_one_over_root_d_is_called_one(
    low: float, high: float, message: str
) -> None:
    (finding,) = judge(one(numbers={"row_sum_min": low, "row_sum_max": high}))
    assert (finding.severity, finding.message) == ("warning", f"{PATH}: {message}")
    assert judge(one(head_dim=None, numbers={"row_sum_min": low, "row_sum_max": high})) == (finding,)


def test_a_softmax_over_queries_is_found_where_no_row_grows() -> None:
    found = judge(one(softmax_axis="queries", numbers={"row_sum_min": 0.3, "row_sum_max": 1.0}))
    assert [finding.name for finding in found] == ["softmax-over-wrong-axis"]


def test_a_single_token_hides_no_diagonal() -> None:
    assert judge(one(queries=1, keys=1, causal_offset=-1)) == ()


def test_a_bias_below_nine_thousand_is_no_mask() -> None:
    def found(added: float) -> list[str]:
        numbers = {"score_max": 10.0 + added, "dot_absmax": 80.0}
        return [f.name for f in judge(one(mask_kind="bias", causal_offset=None, numbers=numbers))]

    assert found(8999.0) == []
    assert found(9000.0) == ["mask-of-the-wrong-sign"]


def test_a_look_ahead_gets_other_advice_than_a_mask_that_is_off_by_one() -> None:
    (one_key,), (more,) = judge(one(causal_offset=1)), judge(one(causal_offset=2))
    assert one_key.advice == next(rule.remedy for rule in RULES if rule.code == "ATT407")
    assert more.advice.startswith("If this look-ahead is meant, ignore this rule")


def test_one_head_to_which_the_mask_adds_is_enough_whatever_the_sign_of_the_scale() -> None:
    numbers = {"score_max": [0.0, 1e4, 0.0, 0.0], "dot_absmax": 8.0}
    (finding,) = judge(one(mask_kind="bias", causal_offset=None, scale=-0.125, numbers=numbers))
    assert finding.evidence == {"added": 9999.0}
