"""What goes wrong while a model trains, and what can be seen of it beforehand."""

from __future__ import annotations

import math

from attncli.records.pages import Block, Column, Formula, Prose, Row, Table
from attncli.topics.arithmetic import largest, rounded
from attncli.topics.topic import Topic

# --- watching a run -----------------------------------------------------------------------------------


def watching() -> tuple[Block, ...]:
    rows: list[Row] = []
    for value in (512.0, 4_100.0, 16_000.0, 48_000.0):
        left = math.log2(largest("float16") / value)
        rows.append((value, left, *(left * doubling for doubling in (5, 40, 400))))
    return (
        Prose(
            "A loss that is NaN tells the step, not the cause: the product that overflowed is gone, and one "
            "update later every weight is NaN. nan-check runs a training script unchanged, looks at the "
            "loss, the gradients and the parameters of each step, withholds the bad update, and repeats "
            "that step in full detail: which operator, which batch, which items."
        ),
        Prose(
            "Two numbers of each head warn before it happens. The largest |q·k| grows towards the end of its "
            "dtype, and scores pass 1 000, from where published runs lost quality. The entropy besides the "
            "sink falls to 0, and a one-hot softmax passes no gradient. What grows by factors is a line in "
            "log2, with a step at which it ends:"
        ),
        Formula(("bits left   h = log2(max / |q·k|)", "steps left  h × steps per doubling")),
        Table(
            (
                Column("|q·k|", ",.0f"),
                Column("bits left", ".2f"),
                Column("every 5", ".0f"),
                Column("every 40", ".0f"),
                Column("every 400", ".0f"),
            ),
            tuple(rows),
            "Steps until float16 ends, where |q·k| doubles every 5, 40 or 400 steps.",
        ),
        Prose(
            "Scores of healthy models grow too, in their first hundreds of steps, and heads become sharp as "
            "they learn. So a trend counts from the sixth sample on (step 300 with --every 50), where the "
            "whole window, its recent half and its last quarter show it, and a falling entropy where scores "
            "are large or the loss gains nothing by it."
        ),
    )


# --- the loss scale -----------------------------------------------------------------------------------


def loss_scale() -> tuple[Block, ...]:
    gradients: tuple[Row, ...] = tuple(
        (scale, *(rounded(gradient * scale, "float16") / scale for gradient in (1e-8, 1e-5, 3.0)))
        for scale in (1.0, 1024.0, 65536.0)
    )
    return (
        Prose(
            "Gradients of float16 vanish below 2^-25 = 3e-8. A loss scale lifts them: the loss is multiplied "
            "by it, the gradients are divided by it before the step. Too large a scale makes them Inf; then "
            "the step is skipped and the scale halved, and after 2 000 good steps it is doubled."
        ),
        Formula(
            (
                "not finite  skip, scale × 1/2",
                "finite      step, and after 2 000",
                "            in a row scale × 2",
            )
        ),
        Table(
            (
                Column("scale", ",.0f"),
                Column("1e-8 becomes", ".2g"),
                Column("1e-5 becomes", ".2g"),
                Column("3 becomes", ".2g"),
            ),
            gradients,
            "A gradient as float16 holds it under a scale, divided by it again.",
        ),
        Prose(
            "A few skipped steps are how the scale is found. Where every step is skipped, no scale helps: "
            "the forward or backward pass itself makes Inf or NaN, and the scale only hides it. From 65 536 "
            "it takes 16 skipped steps to 1, where Megatron-LM and DeepSpeed stop; torch goes on for ever."
        ),
        Prose(
            f"The eps of Adam meets the same end: 1e-8 in float16 is {rounded(1e-8, 'float16'):g}, and a "
            "gradient of 0 then gives 0/0."
        ),
    )


# --- the topics ---------------------------------------------------------------------------------------

TRAINING_TOPICS: tuple[Topic, ...] = (
    Topic(
        name="watching-training",
        aliases=("training", "watch", "early-warning", "early-warnings", "train"),
        title="what warns before a loss is NaN",
        blocks=watching,
        sources=(
            "Zhai et al. 2023, arXiv 2303.06296 (entropy collapse)",
            "Wortsman et al. 2023, arXiv 2309.14322 §3.3 (growth of scores)",
            "Theil 1950; Sen 1968 (the slope that odd batches do not move)",
        ),
        rules=("ATT712", "ATT713", "ATT714", "ATT716"),
        commands=("nan-check SCRIPT.py",),
        see=("score-growth", "entropy", "nan", "loss-scale"),
    ),
    Topic(
        name="loss-scale",
        aliases=("gradscaler", "grad-scaler", "loss-scaling", "mixed-precision", "amp", "eps", "adam-eps"),
        title="how float16 training keeps its gradients",
        blocks=loss_scale,
        sources=(
            "Micikevicius et al. 2018, arXiv 1710.03740",
            "documentation of torch 2: torch.amp.GradScaler",
        ),
        rules=("ATT711", "ATT715"),
        commands=("nan-check SCRIPT.py",),
        see=("overflow", "nan", "watching-training"),
    ),
)
