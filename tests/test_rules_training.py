"""Rules about training runs: each fires on its side of the threshold, and healthy curves stay silent.

Curves are closed forms: exponentials and powers run away, logistic curves level off, noise is a fixed pattern.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from rule_cases import Case, check

from attncli.records import Fault, Moved, Optimizer, Origin, Sample, Step, Training
from attncli.rules import Observed, early_warnings, judge
from attncli.rules.trends import falls_off, rise, slowing

LAYER = "blocks.3.attn"
EVERY = 5


def trained(seen: int = 600, **known: Any) -> Observed:
    return Observed(training=Training(seen, **known))


def curve(
    metric: str,
    value: Callable[[int], float],
    *,
    count: int = 64,
    every: int = EVERY,
    head: int = 0,
    last: int = 600,
    noise: float = 0.0,
    dtype: str | None = None,
    layer: str = LAYER,
    call: int = 0,
) -> tuple[Sample, ...]:
    """`count` samples, the last at step `last`; `noise`: the deviation of the logarithm."""
    chance = random.Random(head + 1)
    steps = range(last - every * (count - 1), last + 1, every)
    return tuple(
        Sample(step, layer, call, head, metric, value(step) * math.exp(chance.gauss(0.0, noise)), dtype)
        for step in steps
    )


def bits(value: Callable[[int], float], **where: Any) -> tuple[Sample, ...]:
    return curve("headroom_bits", lambda step: math.log2(65504 / value(step)), dtype="float16", **where)


def doubling(every: float, at_600: float) -> Callable[[int], float]:
    return lambda step: at_600 * 2.0 ** ((step - 600) / every)


def logistic(least: float, most: float, middle: float, rate: float) -> Callable[[int], float]:
    return lambda step: least + (most - least) / (1 + math.exp(-rate * (step - middle)))


def heads(count: int, *curves: Callable[[int], float], **where: Any) -> tuple[Sample, ...]:
    """Entropies without the sink: the first heads take the curves, the others stay at 2 nats."""
    level: list[Callable[[int], float]] = [*curves, *[lambda step: 2.0] * (count - len(curves))]
    return tuple(
        one for head, of in enumerate(level) for one in curve("entropy_rest", of, head=head, **where)
    )


def scores(count: int, value: float, **where: Any) -> tuple[Sample, ...]:
    return tuple(
        one for head in range(count) for one in curve("score_max", lambda step: value, head=head, **where)
    )


def losses(value: Callable[[int], float], first: int = 1, last: int = 600) -> tuple[Step, ...]:
    chance = random.Random(3)
    return tuple(Step(at, loss=value(at) + chance.gauss(0.0, 0.05)) for at in range(first, last + 1))


def skipping(scales: Iterable[float | None], skipped: int, first: int = 400) -> tuple[Step, ...]:
    """Steps with these loss scales, of which the last `skipped` were skipped."""
    listed = list(scales)
    return tuple(
        Step(first + at, loss_scale=scale, skipped=at >= len(listed) - skipped)
        for at, scale in enumerate(listed)
    )


def fault(**changes: Any) -> Fault:
    return Fault(**{"step": 412, "seen": "loss", "value": "nan", "reproduced": True, **changes})


def origin(phase: str = "forward") -> Origin:
    return Origin(
        "nan", phase, "overflow", True, "blk", "bmm", "train.py:9", None, None, None, "float32", {"seen": ["loss"]},
        (), "it overflows", "Scale q.",
    )  # fmt: skip


GRADIENTS = ("blk.3.wq.weight", "blk.3.wk.weight")
HALVED = [2.0**40 / 2**at for at in range(32)]
FALLING: Callable[[int], float] = lambda step: 0.5 + (600 - step) / 100  # noqa: E731

CASES = [
    # ATT711
    Case(
        "thirty-two skipped steps in a row",
        trained(steps=skipping([2.0**40, *HALVED], 32)),
        [
            (
                "ATT711",
                "error",
                "Step 432: the last 32 steps were all skipped, and the loss scale fell from 1.1e+12 to 512: the "
                "gradients are not finite at any scale.",
            )
        ],
        trained(steps=skipping([2.0**40, *HALVED[:31]], 31)),
    ),
    Case(
        "a scale below one",
        trained(steps=skipping([2.0, 1.0, 0.5], 2)),
        [
            (
                "ATT711",
                "error",
                "Step 402: the last 2 steps were all skipped, and the loss scale fell from 1 to 0.5: the gradients "
                "are not finite at any scale.",
            )
        ],
        # DeepSpeed and Megatron-LM go on at 1.
        trained(steps=skipping([4.0, 2.0, 1.0], 2)),
    ),
    Case(
        "a fault that the monitor saw in the loss scale",
        trained(fault=fault(seen="loss scale", value="")),
        [("ATT711", "error", "Step 412: the loss scale collapsed: the gradients are not finite at any scale.")],
        trained(steps=(*skipping([None] * 30, 30, 300), Step(400, loss_scale=64.0))),
    ),
    # ATT712
    Case(
        "float16 comes nearer",
        trained(samples=(*bits(doubling(40, 4100), head=1), *bits(doubling(40, 60), head=0))),
        [
            (
                "ATT712",
                "warning",
                f"{LAYER}: head 1: the largest q·k doubles every 40 steps (4 100 at step 600); at the present "
                "rate float16 ends at step 760.",
            )
        ],
        # More than five doublings away.
        trained(samples=bits(doubling(40, 2000))),
    ),
    Case(
        "the worst of several heads is named",
        trained(samples=tuple(one for head in range(4) for one in bits(doubling(40, 5000 + 9e3 * head), head=head))),
        [
            (
                "ATT712",
                "warning",
                f"{LAYER}: head 3: the largest q·k doubles every 40 steps (32 000 at step 600, 4 heads alike); "
                "at the present rate float16 ends at step 642.",
            )
        ],
        trained(samples=tuple(one for head in range(4) for one in bits(lambda step: 32000.0, head=head))),
    ),
    Case(
        "scores beyond 100 on the way to 1 000",
        trained(samples=curve("score_max", doubling(40, 230), noise=0.1)),
        [
            (
                "ATT712",
                "warning",
                f"{LAYER}: head 0: the largest score doubles every 40.6 steps (199 at step 600); at the present "
                "rate it reaches 1 000, where published runs lost quality, at step 688.",
            )
        ],
        trained(samples=curve("score_max", lambda step: 230.0, noise=0.1)),
    ),
    Case(
        "scores of 50 that do not slow down",
        trained(samples=curve("score_max", doubling(40, 75), count=20)),
        [
            (
                "ATT712",
                "warning",
                f"{LAYER}: head 0: the largest score doubles every 40 steps (75 at step 600); at the present "
                "rate it reaches 100, where large training runs clip scores, at step 617.",
            )
        ],
        trained(samples=curve("score_max", doubling(40, 49), count=20)),
    ),
    Case(
        "scores beyond all that is published",
        trained(samples=curve("score_max", doubling(40, 3e4))),
        [
            (
                "ATT712",
                "warning",
                f"{LAYER}: head 0: the largest score doubles every 40 steps (30 000 at step 600); it is beyond 10 000 "
                "since step 540, where every published run diverged.",
            )
        ],
        trained(samples=curve("score_max", lambda step: 3e4)),
    ),
    Case(
        "growth too slow for the next threshold, but beyond one",
        trained(samples=curve("score_max", doubling(300, 1500))),
        [
            (
                "ATT712",
                "warning",
                f"{LAYER}: head 0: the largest score doubles every 300 steps (1 500 at step 600); it is beyond 1 000 "
                "since step 425, where published runs lost quality.",
            )
        ],
        # 3.3 doublings are further than one that was watched.
        trained(samples=curve("score_max", doubling(300, 110))),
    ),
    # ATT713
    Case(
        "entropies fall and scores are large",
        trained(samples=(*heads(4, FALLING, FALLING), *scores(4, 120.0))),
        [
            (
                "ATT713",
                "warning",
                f"{LAYER}: 2 of 4 heads fall towards one key: beside the shared one, head 0 has 0.5 nats left at step "
                "600, and at the present rate under 0.2 nats from step 630 on, and scores reach 120.",
            )
        ],
        # One head of four specialises.
        trained(samples=(*heads(4, FALLING), *scores(4, 120.0))),
    ),
    Case(
        "entropies fall and the loss does not",
        trained(samples=(*heads(1, FALLING), *scores(1, 30.0)), steps=losses(lambda step: 3.5)),
        [
            (
                "ATT713",
                "warning",
                f"{LAYER}: its only head falls towards one key: beside the shared one, head 0 has 0.5 nats left at "
                "step 600, and at the present rate under 0.2 nats from step 630 on, and scores reach 30.",
            )
        ],
        # Attention that becomes sharp because it learns.
        trained(samples=(*heads(1, FALLING), *scores(1, 30.0)), steps=losses(lambda step: 4 - step / 200)),
    ),
    # ATT714
    Case(
        "a step that makes a parameter a hundred times larger",
        trained(moved=(Moved(37, "blk.wi.weight", 0.25, 25.0, 0.5, 3e4), Moved(37, "blk.wo.weight", 0.25, 25.1))),
        [
            (
                "ATT714",
                "warning",
                "blk.wo.weight: step 37 moved it from 0.25 to 25.1 at most, 100-fold, and 1 other parameter with it.",
            )
        ],
        trained(moved=(Moved(37, "blk.wi.weight", 0.25, 24.9, 0.5, 3e4),)),
    ),
    Case(
        "a thousandfold step before a fault",
        trained(
            moved=(Moved(411, "blk.wi.weight", 0.5, 1e6, 0.5, 3e4),), fault=fault(), steps=(Step(412),)
        ),
        [
            (
                "ATT714",
                "error",
                "blk.wi.weight: step 411 moved it from 0.5 to 1 000 000 at most, 2 000 000-fold (learning rate 0.5, "
                "largest gradient 30 000).",
            ),
            (
                "ATT716",
                "error",
                "Step 412: the loss was NaN; the step was repeated and showed it again, but no operator that made it "
                "was found.",
            ),
        ],
        # Zero at the start, and a first step of Adam.
        trained(moved=(Moved(1, "head.bias", 0.0, 1e-3), Moved(2, "lora_B", 0.0, 0.9))),
    ),
    Case(
        "a step that leaves nothing finite",
        trained(moved=(Moved(37, "blk.wi.weight", 0.5, math.inf),)),
        [
            (
                "ATT714",
                "warning",
                "blk.wi.weight: step 37 moved it from 0.5 to Inf at most, beyond all numbers.",
            )
        ],
        trained(moved=(Moved(38, "blk.wi.weight", math.inf, math.nan),)),
    ),
    # ATT715
    Case(
        "Adam's eps in float16",
        trained(optimizers=(Optimizer("AdamW", "float16", {"eps": 2.0**-25, "betas": (0.9, 0.95)}),)),
        [
            (
                "ATT715",
                "warning",
                "AdamW: eps is 2.98e-08, which is 0 in float16, the dtype of its parameters: a gradient of 0 gives "
                "0/0.",
            )
        ],
        trained(
            optimizers=(
                Optimizer("Adam", "float16", {"eps": math.nextafter(2.0**-25, 1)}),
                Optimizer("Adam", "bfloat16", {"eps": 1e-8}),
                Optimizer("Adam", "float32", {"eps": 1e-8}),
                Optimizer("Adam", "float16", {"eps": 1e-8, "fused": True}),
                Optimizer("Adafactor", "float16", {"eps": (None, 1e-3)}),
                Optimizer("SGD", "float16", {"lr": 1.0}),
                Optimizer("Own", "int8", {"eps": 1e-8}),
            )
        ),
    ),
    # ATT716
    Case(
        "a fault that did not come again",
        trained(
            fault=fault(seen="gradient", tensors=GRADIENTS, reproduced=False, why="the batch came from a generator.")
        ),
        [
            (
                "ATT716",
                "error",
                "Step 412: 2 gradients were NaN, first blk.3.wq.weight; the step was repeated and showed nothing "
                "(the batch came from a generator).",
            )
        ],
        trained(),
    ),
    Case(
        "a fault that was not repeated",
        trained(fault=fault(seen="parameter", value="+inf", tensors=GRADIENTS[:1], reproduced=None)),
        [
            (
                "ATT716",
                "error",
                "Step 412: the parameter blk.3.wq.weight was +Inf; the step was not repeated.",
            )
        ],
        Observed(),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_a_rule_finds_its_defect_and_nothing_in_its_healthy_twin(case: Case) -> None:
    check(case)


# --- the loss scale -----------------------------------------------------------------------------------


def test_skipped_steps_that_recover_are_silent_however_many() -> None:
    steps = (*skipping([*HALVED, *HALVED], 64), Step(464, loss=1.0, loss_scale=64.0))
    assert judge(trained(steps=steps)) == ()
    assert [one.code for one in judge(trained(steps=steps[:-1]))] == ["ATT711"]


def test_a_scale_that_was_always_below_one_was_chosen_so() -> None:
    assert judge(trained(steps=skipping([0.5] * 20, 0))) == ()


def test_a_collapsed_scale_is_told_once() -> None:
    found = judge(
        trained(steps=skipping([2.0, 1.0, 0.5], 2), fault=fault(step=402, seen="loss scale", value=""))
    )
    assert [one.code for one in found] == ["ATT711"]


# --- early warnings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("middle", [100, 300, 500, 580])
@pytest.mark.parametrize("most", [10.0, 30.0, 45.0])
def test_scores_that_grow_and_level_off_are_silent_at_every_step(
    most: float, middle: int, noise: float
) -> None:
    for rate in (0.01, 0.03, 0.1):
        healthy = logistic(0.7, most, middle, rate)
        samples = curve("score_max", healthy, noise=noise, count=120)
        stored = bits(lambda step, of=healthy: 11 * of(step), count=120)  # type: ignore[misc]
        for last in range(6, 120, 3):
            window = slice(max(0, last - 64), last)
            assert early_warnings(Training(600, samples=samples[window] + stored[window])) == ()


@pytest.mark.parametrize("power", [2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_powers_of_the_step_are_warned_of_before_a_thousand(power: int, noise: float) -> None:
    samples = curve("score_max", lambda step: (step / 12) ** power, count=100, last=500, noise=noise)
    warned = next(
        one.step
        for at, one in enumerate(samples, 1)
        if early_warnings(Training(one.step, samples=samples[max(0, at - 64) : at]))
    )
    assert warned + 20 <= 12 * 1000 ** (1 / power)


def test_one_odd_batch_is_no_trend() -> None:
    flat = curve("score_max", lambda step: 500.0 if step > 590 else 20.0)
    assert early_warnings(Training(600, samples=flat)) == ()


def test_five_samples_are_too_few() -> None:
    samples = curve("score_max", doubling(10, 800), count=6)
    assert early_warnings(Training(600, samples=samples))
    assert early_warnings(Training(600, samples=samples[1:])) == ()


def test_the_numbers_of_an_early_warning_are_its_evidence() -> None:
    (found,) = early_warnings(Training(600, samples=bits(doubling(40, 4100), head=1, call=2)))
    assert (found.layer, found.head) == (LAYER, 1)
    assert found.evidence["doubling_steps"] == pytest.approx(40)
    assert found.evidence["value"] == pytest.approx(4100)
    assert {key: found.evidence[key] for key in ("head", "call", "step", "reaches", "at_step", "heads")} == {
        "head": 1, "call": 2, "step": 600, "reaches": 65504.0, "at_step": 760, "heads": [1],
    }  # fmt: skip


def test_values_that_are_not_finite_do_not_hide_the_trend_before_them() -> None:
    samples = (
        *bits(doubling(40, 30000)),
        Sample(605, LAYER, 0, 0, "headroom_bits", -math.inf, "float16"),
        Sample(605, LAYER, 0, 0, "score_max", math.nan),
    )
    assert [one.code for one in early_warnings(Training(605, samples=samples))] == ["ATT712"]


def test_headroom_of_a_dtype_without_an_end_or_of_a_fused_call_is_not_judged() -> None:
    for dtype in (None, "float8_e4m3fn"):
        samples = curve("headroom_bits", lambda step: 3 - step / 300, dtype=dtype)
        assert early_warnings(Training(600, samples=samples)) == ()


@pytest.mark.parametrize("plateau", [0.25, 0.6, 1.2])
def test_heads_that_become_sharp_and_stay_so_are_silent(plateau: float) -> None:
    sharp = logistic(3.0, plateau, 380, 0.05)
    samples = (*heads(4, *[sharp] * 4, noise=0.02), *scores(4, 120.0))
    assert early_warnings(Training(600, samples=samples)) == ()


# Entropies as they were seen in a run: the fall slows down from the fourth sample on, above 0.2.
LEVELLING = (1.45, 1.3, 1.0, 0.8, 0.6, 0.5, 0.42, 0.36, 0.32, 0.29, 0.27, 0.26, 0.25, 0.24, 0.23, 0.22)


@pytest.mark.parametrize("count", range(6, len(LEVELLING) + 1))
def test_a_fall_that_levels_off_is_silent_from_the_sixth_sample_on(count: int) -> None:
    falling = tuple(
        Sample(EVERY * at, LAYER, 0, 0, "entropy_rest", value)
        for at, value in enumerate(LEVELLING[:count], 1)
    )
    assert early_warnings(Training(EVERY * count, samples=falling)) == ()


def test_a_collapse_that_fades_as_it_nears_zero_is_told_with_a_step_that_is_not_too_early() -> None:
    # tests/training_scripts/faults/entropy_collapse.py, every second step: 0.2 is passed after step 16.
    values = (1.941, 1.833, 1.414, 0.888, 0.552, 0.362, 0.262, 0.219, 0.192)
    samples = tuple(Sample(2 * at, LAYER, 0, 0, "entropy_rest", value) for at, value in enumerate(values, 1))
    told = [early_warnings(Training(2 * at, samples=samples[:at])) for at in range(6, 10)]
    assert [one.evidence["at_step"] for found in told for one in found] == [15, 16, 17, 18]
    assert (
        "0.362 nats left at step 12, and at the present rate, which slows down, under 0.2 nats from step 15"
        in (told[0][0].message)
    )
    assert "0.192 nats left at step 18, under 0.2 nats already" in told[-1][0].message


def test_scores_beyond_their_next_threshold_are_not_said_to_reach_it() -> None:
    samples = curve("score_max", doubling(40, 75), count=20)
    beyond = (*samples[:-1], Sample(600, LAYER, 0, 0, "score_max", 140.0))
    assert early_warnings(Training(600, samples=samples))
    assert early_warnings(Training(600, samples=beyond)) == ()


def test_a_history_too_short_to_show_the_loss_accuses_nobody() -> None:
    falling = (*heads(2, FALLING, FALLING), *scores(2, 30.0))
    assert early_warnings(Training(600, samples=falling, steps=losses(lambda step: 3.5, first=560))) == ()
    assert early_warnings(Training(600, samples=falling, steps=losses(lambda step: 3.5, first=400)))


def test_entropies_alone_are_judged_without_scores_and_losses() -> None:
    assert [one.code for one in early_warnings(Training(600, samples=heads(2, FALLING, FALLING)))] == [
        "ATT713"
    ]


def test_early_warnings_are_those_rules_alone() -> None:
    training = Training(600, samples=bits(doubling(40, 4100)), fault=fault(reproduced=None))
    assert [one.code for one in early_warnings(training)] == ["ATT712"]
    assert [one.code for one in judge(Observed(training=training))] == ["ATT716", "ATT712"]


def test_a_free_function_has_no_layer() -> None:
    (found,) = early_warnings(Training(600, samples=bits(doubling(40, 4100), layer="")))
    assert found.layer is None
    assert found.message.startswith("attention: head 0: ")


# --- faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reproduced", [True, False, None])
def test_a_fault_without_an_origin_is_never_silent(reproduced: bool | None) -> None:
    for seen in ("loss", "gradient", "parameter", "loss scale"):
        found = judge(trained(fault=fault(seen=seen, reproduced=reproduced)))
        assert [one.severity for one in found] == ["error"]


def test_an_origin_says_it_all() -> None:
    observed = Observed(origins=(origin(),), training=Training(412, fault=fault()))
    assert [one.code for one in judge(observed)] == ["ATT701"]


def test_an_update_that_is_the_origin_is_told_once_and_an_earlier_one_as_well() -> None:
    moved = (Moved(411, "w", 0.5, 1e6),)
    training = Training(412, fault=fault(), moved=moved)
    assert [one.code for one in judge(Observed(origins=(origin("optimizer"),), training=training))] == [
        "ATT703"
    ]
    earlier = Training(412, fault=fault(), moved=(Moved(100, "v", 0.5, 1e6), *moved))
    codes = [one.code for one in judge(Observed(origins=(origin("optimizer"),), training=earlier))]
    assert codes == ["ATT703", "ATT714"]


# --- trends -------------------------------------------------------------------------------------------


def test_a_line_has_its_slope_level_and_time() -> None:
    trend = rise([(at, 2.0 + 0.5 * at) for at in range(0, 100, 5)], 1.0)
    assert trend is not None
    assert (trend.slope, trend.level, trend.span, trend.steady) == (0.5, 49.5, 95, True)
    assert trend.steps_to(59.5) == 20


@pytest.mark.parametrize(
    "points",
    [
        [(at, 1.0) for at in range(20)],
        [(at, -float(at)) for at in range(20)],
        [(at, float(at % 2)) for at in range(20)],
        [(at, min(at, 12.0)) for at in range(20)],
        [(7, float(at)) for at in range(20)],
        [],
    ],
)
def test_what_does_not_go_on_rising_is_no_rise(points: Sequence[tuple[int, float]]) -> None:
    assert rise(points, 0.5) is None


def test_a_rise_whose_last_quarter_slows_down_goes_on_only_as_far_as_it_is_allowed_to() -> None:
    slowing = [(at, min(at, 48) + 0.3 * max(0, at - 48)) for at in range(65)]
    assert rise(slowing, 1.0) is None
    trend = rise(slowing, 1.0, 0.2)
    assert trend is not None
    assert trend.slope == pytest.approx(0.3)
    assert not trend.steady


def test_a_rise_towards_a_limit_reaches_what_lies_below_it_and_nothing_beyond() -> None:
    fades = slowing([(at, 10 * (1 - math.exp(-at / 20))) for at in range(0, 41, 2)])
    assert fades is not None
    left = 10 * math.exp(-2)
    assert fades.decay == pytest.approx(1 / 20, rel=0.02)
    assert fades.slope == pytest.approx(left / 20, rel=0.05)
    assert fades.steps_to(left / 2) == pytest.approx(20 * math.log(2), rel=0.1)
    assert fades.steps_to(1.1 * left) == math.inf


@pytest.mark.parametrize("power", [1, 2])
def test_a_rise_that_keeps_its_speed_does_not_slow_down(power: int) -> None:
    assert slowing([(at, float(at**power)) for at in range(40)]) is None


def test_a_loss_falls_where_its_last_third_is_below_the_first_by_more_than_chance() -> None:
    chance = random.Random(5)
    noise = [chance.gauss(0, 1) for _ in range(300)]
    assert not falls_off(noise)
    assert falls_off([value - at / 100 for at, value in enumerate(noise)])
    assert not falls_off([3.0, 2.0, 1.0])
    assert not falls_off([1.0] * 9)


@pytest.mark.parametrize(
    ("seen", "reproduced", "said"),
    [
        ("loss", None, "Repeat the step by hand"),
        ("loss", False, "Make the run repeatable"),
        ("parameter", None, "Look at what writes to gradients"),
    ],
)
def test_a_step_without_an_origin_gets_the_advice_that_fits_its_reason(
    seen: Any, reproduced: bool | None, said: str
) -> None:
    (found,) = judge(trained(fault=fault(seen=seen, reproduced=reproduced, why="some reason")))
    assert found.advice.startswith(said)
