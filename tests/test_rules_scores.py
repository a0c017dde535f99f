"""Rules about the factor on q·k and about how large scores are, on each side of every threshold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rule_cases import PATH, Case, above, below, check, layer, one, ran, seen

from attncli.records import Layer
from attncli.rules import RULES, Observed, judge
from attncli.rules.scales import SCALE_RULES
from attncli.rules.scores import SCORE_RULES

FLOAT16_MAX = 65504.0
SHARP = {"score_std": 12.0, "entropy_ratio": 0.2, "score_max": 60.0}
EVEN = {"score_std": 0.25, "entropy_ratio": 0.98, "score_max": 1.0}


def unscaled(**numbers: float) -> Observed:
    return one(scale=1.0, factors={}, numbers={**SHARP, **numbers})


def by_width(**numbers: float) -> Observed:
    return one(scale=1 / 16, factors={"scores": 1 / 16}, numbers={**EVEN, **numbers})


def twice(*places: str, **numbers: float) -> Observed:
    factors = dict.fromkeys(places, 0.125) if places else {"scores": 1 / 64}
    return one(scale=1 / 64, factors=factors, numbers={**EVEN, **numbers})


def in_float16(
    stored: str, dots: float | list[float], softmax: str | None = None, **changes: object
) -> Observed:
    numbers = {"dot_absmax": dots, "softmax_dtype": softmax}
    return one(dtype="float16", scores_dtype="float16", stored=stored, numbers=numbers, **changes)


CASES = [
    # ATT410
    Case(
        "no factor, and sharp scores",
        unscaled(),
        [
            (
                "ATT410",
                "warning",
                f"{PATH}: q·k is not scaled: the factor is 1, expected 1/√64; scores have a standard deviation "
                "of 12 and reach 60, the entropy is 0.2 of its maximum.",
            )
        ],
        # T5, GPT-Neo: the factor is folded into the weights.
        unscaled(score_std=1.2, entropy_ratio=0.6),
    ),
    Case(
        "the smallest spread that is too large",
        unscaled(score_std=4.0, entropy_ratio=0.5),
        [
            (
                "ATT410",
                "warning",
                f"{PATH}: q·k is not scaled: the factor is 1, expected 1/√64; scores have a standard deviation "
                "of 4 and reach 60, the entropy is 0.5 of its maximum.",
            )
        ],
        unscaled(score_std=below(4.0), entropy_ratio=0.5),
    ),
    Case(
        "no factor, and scores beyond 1000",
        unscaled(score_max=1500.0),
        [
            (
                "ATT410",
                "error",
                f"{PATH}: q·k is not scaled: the factor is 1, expected 1/√64; scores have a standard deviation "
                "of 12 and reach 1 500, the entropy is 0.2 of its maximum.",
            )
        ],
        unscaled(entropy_ratio=above(0.5)),
    ),
    Case(
        "multiplied by the root instead of divided",
        one(scale=8.0, numbers={**SHARP, "score_std": 70.0}),
        [
            (
                "ATT410",
                "warning",
                f"{PATH}: q·k is multiplied by 8: the factor is 8, expected 1/√64; scores have a standard "
                "deviation of 70 and reach 60, the entropy is 0.2 of its maximum.",
            )
        ],
        # The right factor is right whatever the scores are.
        one(scale=0.125, numbers=SHARP),
    ),
    # ATT411
    Case(
        "scaled by the width of all heads",
        by_width(),
        [
            (
                "ATT411",
                "warning",
                f"{PATH}: q·k is scaled by 1/√256, the width of all 4 heads, instead of 1/√64; scores have a "
                "standard deviation of 0.25, the entropy is 0.98 of its maximum.",
            )
        ],
        # CvT does so by design, and its trained scores are what they should be.
        by_width(score_std=1.5, entropy_ratio=0.9),
    ),
    Case(
        "the smallest scores that would tell keys apart",
        by_width(score_std=0.125),
        [
            (
                "ATT411",
                "warning",
                f"{PATH}: q·k is scaled by 1/√256, the width of all 4 heads, instead of 1/√64; scores have a "
                "standard deviation of 0.125, the entropy is 0.98 of its maximum.",
            )
        ],
        # Weights so small that 1/√d would not help either: an untrained model.
        by_width(score_std=0.124),
    ),
    # ATT412
    Case(
        "1/d in one place",
        twice(),
        [
            (
                "ATT412",
                "warning",
                f"{PATH}: q·k is scaled twice: the factor is 0.0156 = 1/√4096, expected 1/√64; scores have a "
                "standard deviation of 0.25, the entropy is 0.98 of its maximum.",
            )
        ],
        # µP scales by 1/d, and learns scores that are large enough.
        twice(score_std=1.5, entropy_ratio=0.6),
    ),
    Case(
        "1/√d on q and in the kernel, weights untrained",
        twice("query", "kernel", score_std=0.001),
        [
            (
                "ATT412",
                "warning",
                f"{PATH}: q·k is scaled twice (on q and the scores, by the kernel): the factor is 0.0156 = 1/√4096, "
                "expected 1/√64; scores have a standard deviation of 0.001, the entropy is 0.98 of its maximum.",
            )
        ],
        # Whisper: d^(-1/4) on q and on k.
        one(
            scale=0.125, factors={"query": 64**-0.25, "key": 64**-0.25}, numbers={**EVEN, "score_std": 0.001}
        ),
    ),
    # ATT501
    Case(
        "scores beyond 100",
        one(numbers={"score_max": [3.0, 101.0, 140.0, 100.0], "dot_absmax": 1500.0}),
        [
            (
                "ATT501",
                "warning",
                f"{PATH}: head 2: the largest score is 140 (2 of 4 heads): large training runs clip scores here.",
            )
        ],
        one(numbers={"score_max": 100.0}),
    ),
    Case(
        "scores beyond 1000",
        one(numbers={"score_max": [3.0, 1200.0, 3.0, 3.0]}),
        [
            (
                "ATT501",
                "error",
                f"{PATH}: head 1: the largest score is 1 200: published runs lost quality from here on.",
            )
        ],
        # A bias is nothing that q·k made: ALiBi as BLOOM has it.
        one(
            mask_kind="causal + bias", numbers={"score_max": [3.0, 1200.0, 3.0, 3.0], "dot_absmax": 8 * 100.0}
        ),
    ),
    Case(
        "scores beyond 10 000, most of them a bias",
        one(
            mask_kind="causal + bias", numbers={"score_max": 20_000.0, "dot_absmax": [0, 0, 0, 8 * 10_001.0]}
        ),
        [
            (
                "ATT501",
                "error",
                f"{PATH}: head 3: the largest score is 10 001: every published run that came this far diverged.",
            ),
            (
                "ATT504",
                "note",
                f"{PATH}: head 3: q·k reaches 80 008; overflows float16 before scaling; safe in bfloat16.",
            ),
        ],
        one(mask_kind="bias", scale=None, numbers={"score_max": 1200.0}),
    ),
    # ATT502, ATT503
    Case(
        "a raw product beyond float16",
        in_float16("raw", [100.0, 70_120.0, 66_000.0, 100.0]),
        [
            (
                "ATT502",
                "error",
                f"{PATH}: head 1: q·k reaches 70 120 (2 of 4 heads) and overflows float16, which ends at 65 504 "
                "before it is scaled.",
            )
        ],
        # The same q and k, scaled before the product, or in a kernel that accumulates in float32.
        in_float16("scaled", [100.0, 70_120.0, 66_000.0, 100.0], factors={"query": 0.125}),
    ),
    Case(
        "a scaled product beyond float16",
        in_float16("scaled", 8 * 70_120.0, factors={"query": 0.125}),
        [
            (
                "ATT502",
                "error",
                f"{PATH}: head 0: the scaled q·k reaches 70 120 (4 of 4 heads) and overflows float16, which ends at "
                "65 504.",
            )
        ],
        in_float16("nothing", 8 * 70_120.0),
    ),
    Case(
        "a product near the end of float16",
        in_float16("raw", [FLOAT16_MAX, 100.0, 100.0, 100.0]),
        [
            (
                "ATT503",
                "note",
                f"{PATH}: head 0: the product of q and k reaches 65 504, 0.00 bits below the largest "
                "float16.",
            )
        ],
        in_float16("raw", FLOAT16_MAX / 2),
    ),
    Case(
        "a product one step further than a bit away",
        in_float16("raw", [100.0, 100.0, 100.0, 40_000.0], softmax="float32"),
        [
            (
                "ATT503",
                "note",
                f"{PATH}: head 3: the product of q and k reaches 40 000, 0.71 bits below the largest "
                "float16; the cast to float32 behind it comes too late.",
            )
        ],
        in_float16("nothing", 40_000.0),
    ),
    # ATT504
    Case(
        "a product that float16 would not hold",
        one(numbers={"dot_absmax": [100.0, 100.0, 100.0, 71_200.0]}),
        [
            (
                "ATT504",
                "note",
                f"{PATH}: head 3: q·k reaches 71 200; overflows float16 before scaling; safe in bfloat16.",
            )
        ],
        one(numbers={"dot_absmax": FLOAT16_MAX}),
    ),
    Case(
        "a scaled product that float16 would not hold",
        one(stored="scaled", factors={"query": 0.125}, numbers={"dot_absmax": 8 * 71_200.0}),
        [
            (
                "ATT504",
                "note",
                f"{PATH}: head 0: the scaled q·k reaches 71 200 (4 of 4 heads); overflows float16; safe in bfloat16.",
            )
        ],
        one(stored="nothing", numbers={"dot_absmax": 8 * 71_200.0}),
    ),
    # ATT506
    Case(
        "NaN in q or k",
        one(numbers={"dot_absmax": math.nan, "score_max": math.nan}),
        [("ATT506", "error", f"{PATH}: q·k is NaN: queries or keys hold NaN or Inf.")],
        one(numbers={"score_max": None}),
    ),
    # ATT505
    Case(
        "scores of 140 in bfloat16",
        one(
            dtype="bfloat16", scores_dtype="bfloat16", mask_kind="causal + bias", numbers={"score_max": 140.0}
        ),
        [
            (
                "ATT505",
                "warning",
                f"{PATH}: head 0: scores of 140 are stored in bfloat16 (4 of 4 heads), where neighbours are 1 apart: "
                "probabilities are off by factors up to 1.65.",
            )
        ],
        one(
            dtype="bfloat16",
            scores_dtype="bfloat16",
            mask_kind="causal + bias",
            numbers={"score_max": below(128.0)},
        ),
    ),
    Case(
        "scores that all lie far below zero",
        one(scores_dtype="bfloat16", numbers={"score_max": [-300.0, 0, 0, 0]}),
        [
            (
                "ATT505",
                "warning",
                f"{PATH}: head 0: scores of 300 are stored in bfloat16, where neighbours are 2 apart: "
                "probabilities are off by factors up to 2.72.",
            )
        ],
        one(dtype="bfloat16", scores_dtype="float32", stored="nothing", numbers={"score_max": -300.0}),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_the_defect_is_found_by_name_and_its_healthy_neighbour_gives_nothing(case: Case) -> None:
    for finding in check(case):
        assert finding.layer == PATH


def test_the_cases_cover_every_rule_about_scores() -> None:
    rules = (*SCALE_RULES, *SCORE_RULES)
    assert {code for case in CASES for code, _, _ in case.expected} == {rule.code for rule in rules}
    assert set(rules) <= set(RULES)


# --- the factor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [unscaled(), by_width(), twice(), twice("query", "scores")])
@pytest.mark.parametrize(
    "changes",
    [
        {"evidence": {"scale": "config"}},
        {"facts": {"q_norm": True}},
        {"facts": {"cosine": True}},
    ],
)
def test_a_factor_that_the_design_asks_for_is_no_finding(
    broken: Observed, changes: dict[str, object]
) -> None:
    scale = broken.calls[0].scale
    known = layer(**{"scale": scale, **changes})
    assert len(judge(broken)) == 1
    assert judge(replace(broken, layers=(known,))) == ()


def test_a_config_that_asks_for_another_factor_excuses_nothing() -> None:
    asked = layer(scale=0.125, evidence={"scale": "config"})
    assumed = layer(scale=1.0, evidence={"scale": "assumed"})
    elsewhere: Layer = layer("encoder.layers.0", scale=1.0, evidence={"scale": "config"})
    for known in (asked, assumed, elsewhere):
        assert [finding.code for finding in judge(replace(unscaled(), layers=(known,)))] == ["ATT410"]


@pytest.mark.parametrize(
    ("factor", "head_dim"),
    [
        (1 / math.sqrt(3 * 64), 64),  # DeBERTa
        (0.0833, 64),  # Granite's multiplier, and others from a config
        (0.125 * 1.2**2, 64),  # YaRN
        (1 / 8 / 7, 64),  # divided by the layer's number as well
        (0.5, 4),
        (256**-0.5, 128),  # Gemma 2: query_pre_attn_scalar
    ],
)
@pytest.mark.parametrize("numbers", [SHARP, EVEN])
def test_a_factor_that_no_mistake_makes_is_no_finding(
    factor: float, head_dim: int, numbers: dict[str, float]
) -> None:
    assert judge(one(scale=factor, factors={"scores": factor}, head_dim=head_dim, numbers=numbers)) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": None},
        {"head_dim": None},
        {"head_dim": 1},
        {"soft_cap": 50.0},
        {"normaliser": "sigmoid"},
        {"explained": False},
    ],
)
def test_what_is_not_known_or_no_softmax_is_not_judged_by_its_factor(changes: dict[str, object]) -> None:
    assert judge(one(**{"scale": 1.0, "factors": {}, **changes, "numbers": SHARP})) == ()


def test_one_sharp_layer_of_a_family_without_a_factor_is_no_finding() -> None:
    healthy = [ran(n, layer=f"h.{n}", scale=1.0, factors={}) for n in range(5)]
    sharp = ran(5, layer="h.5", scale=1.0, factors={}, numbers=SHARP)
    assert judge(seen(*healthy, sharp)) == ()


def test_a_wrong_factor_is_found_in_each_layer_that_has_it() -> None:
    found = judge(
        seen(*(ran(n, layer=f"h.{n}", scale=1.0, factors={}, numbers=SHARP) for n in range(3)), ran(3))
    )
    assert [(finding.code, finding.layer) for finding in found] == [("ATT410", f"h.{n}") for n in range(3)]


def test_the_spread_that_is_too_large_grows_with_the_head_size() -> None:
    def spread(head_dim: int, std: float) -> tuple[object, ...]:
        return judge(one(head_dim=head_dim, scale=1.0, factors={}, numbers={**SHARP, "score_std": std}))

    assert len(spread(256, 8.0)) == 1
    assert spread(256, 7.9) == ()
    assert len(spread(4, 4.0)) == 1
    assert spread(4, 3.9) == ()


def test_one_head_has_no_width_of_its_own() -> None:
    assert judge(one(heads=1, kv_heads=1, scale=0.125, numbers=EVEN)) == ()


def test_what_follows_from_a_wrong_factor_is_not_told_twice() -> None:
    large = one(
        scale=1.0,
        factors={},
        numbers={**SHARP, "score_max": 2000.0, "entropy_rest": 0.001, "peaky_rows": 0.99},
    )
    assert [finding.code for finding in judge(large)] == ["ATT410"]
    even = by_width(entropy_ratio=0.999, entropy=3.4)
    assert [finding.code for finding in judge(even)] == ["ATT411"]


# --- sizes --------------------------------------------------------------------------------------------


def test_a_product_that_is_infinite_overflows_and_says_so() -> None:
    found = judge(in_float16("raw", math.inf, explained=False))
    assert [finding.message for finding in found] == [
        f"{PATH}: head 0: q·k reaches Inf (4 of 4 heads) and overflows float16, which ends at 65 504 before it is "
        "scaled."
    ]


def test_an_alpha_of_the_product_counts_as_a_factor_before_it() -> None:
    numbers = {"dot_absmax": 70_120.0, "stored_absmax": 70_120.0 / 8}
    assert (
        judge(
            one(
                dtype="float16",
                scores_dtype="float16",
                stored="scaled",
                factors={"scores": 0.125},
                numbers=numbers,
            )
        )
        == ()
    )


def test_clipping_is_told_in_numbers() -> None:
    (finding,) = judge(one(numbers={"score_max": 400.0}))
    assert (finding.head, finding.evidence["clip_weights_by"]) == (0, 0.5)


@pytest.mark.parametrize(
    "numbers", [{"score_max": None}, {"dot_absmax": None}, {"score_std": math.nan}, {"score_std": None}]
)
def test_numbers_that_are_missing_give_no_finding(numbers: dict[str, object]) -> None:
    for changes in ({}, {"scale": 1.0, "factors": {}}, {"scores_dtype": "float16"}, {"mask_kind": "bias"}):
        assert judge(one(**changes, numbers=numbers)) == ()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_a_factor_does_not_matter(sign: int) -> None:
    def names(observed: Observed) -> list[str]:
        return [finding.name for finding in judge(observed)]

    places = {"query": sign * 0.125, "kernel": 0.125}
    assert names(one(scale=sign * 1.0, factors={}, numbers=SHARP)) == ["unscaled-scores"]
    assert names(one(scale=sign / 16, factors={}, numbers=EVEN)) == ["scaled-by-model-width"]
    assert names(one(scale=sign / 64, factors={}, numbers=EVEN)) == ["scaled-twice"]
    assert names(one(scale=sign / 64, factors=places, numbers={**EVEN, "score_std": 0.0})) == ["scaled-twice"]
    asked = layer(scale=1.0, evidence={"scale": "config"})
    assert judge(replace(one(scale=sign * 1.0, factors={}, numbers=SHARP), layers=(asked,))) == ()
    before = {"factors": {"query": sign * 0.125}, "dtype": "float16", "scores_dtype": "float16"}
    found = names(one(stored="scaled", numbers={"dot_absmax": 8 * 70_000.0}, **before))
    assert found == ["product-overflows"]
    bias = {"mask_kind": "causal + bias", "numbers": {"score_max": 1200.0, "dot_absmax": 1600.0}}
    assert names(one(scale=sign * 0.125, factors={}, **bias)) == ["large-scores"]


@pytest.mark.parametrize(("off", "same"), [(1.009, True), (0.991, True), (1.015, False), (0.985, False)])
def test_a_factor_is_a_mistake_within_one_percent(off: float, same: bool) -> None:
    for factor in (1 / 16, 1 / 64):
        assert bool(judge(one(scale=factor * off, factors={}, numbers=EVEN))) is same


def test_the_largest_head_tells_what_stands_before_the_product() -> None:
    numbers = {"dot_absmax": [10.0, 8 * 70_000.0, 20.0, 30.0], "stored_absmax": 70_000.0}
    (finding,) = judge(one(dtype="float16", scores_dtype="float16", stored="scaled", numbers=numbers))
    assert (finding.head, finding.evidence["heads"]) == (1, [1])
