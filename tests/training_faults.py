"""Training scripts as users write them, each with a fault whose ground truth is known, and with its healthy twin.

The scripts stand in `training_scripts/faults/` and know nothing of attncli; their arguments switch the fault on or off.
What is true stands beside them. The line of the fault ends in `# FAULT` in the script; of an
autograd function of one's own that is where it is called, and what it consists of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "training_scripts" / "faults"


@dataclass(frozen=True)
class Case:
    """`step`: counted from 1 in optimiser steps, all optimisers and skipped steps included. A range where rounding may
    move it: the plain run then says which of them it is.

    `seen`, `value`: where it shows first and as what ("" where either may be). `phases`, `ops`, `causes`: all that
    would be right. `module`: the end of the module path. `line`: whether the origin lies in a line marked `# FAULT`.
    `batch`: index in the loader, from 0; `items`: of the dataset, bad ones among those of the batch. `element`: row of
    the batch; "item": the place of the bad item in its batch.
    `withheld`: whether the weights from before the step must have survived.
    """

    name: str
    script: str
    faulty: tuple[str, ...]
    healthy: tuple[str, ...]
    step: int | range
    seen: str
    value: str
    phases: tuple[str, ...]
    ops: tuple[str, ...]
    causes: tuple[str, ...]
    module: str | None = None
    tensor: str | None = None
    line: bool = False
    forward: tuple[str, ...] = ()
    # False: something that no replay can know decides; saying so is right as well.
    repeatable: bool = True
    loader: bool = False
    # None: as the plain run says, which takes the last batch that was fetched for the one in use.
    index: int | None = None
    epoch: int | None = None
    items: tuple[int, ...] = ()
    element: int | str | None = None
    withheld: bool | None = True
    # As many places are bad of themselves.
    origins: int = 1
    environment: tuple[str, ...] = ()
    healthy_environment: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return SCRIPTS / self.script


@dataclass(frozen=True)
class Silent:
    """A run that must end as it would alone, and of which nothing is said."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return SCRIPTS / self.script


SOFTMAX = ("_softmax", "_safe_softmax", "softmax")
DIVISION = ("div", "division-by-zero")
PRODUCTS = ("bmm", "baddbmm")

CASES: tuple[Case, ...] = (
    Case(
        "unscaled scores in mixed precision", "forecast.py", (), ("--scale", "0.125", "--level", "3"),
        range(35, 64), "loss", "nan", ("forward",), PRODUCTS, ("overflow-scores",), "cross",
        line=True, loader=True,
    ),
    Case(
        "unscaled scores under a loss scaler", "forecast.py", ("--scaler",),
        ("--scaler", "--scale", "0.125", "--level", "3"),
        range(35, 64), "loss", "nan", ("forward",), PRODUCTS, ("overflow-scores",), "cross",
        line=True, loader=True,
    ),
    Case(
        "explosion of the learning rate", "learning_rate.py", ("20:1e25",), ("20:0.1",),
        21, "loss", "nan", ("optimizer",), ("step",), ("optimizer-step",),
    ),
    Case(
        "explosion at the first step", "learning_rate.py", ("1:1e25",), ("1:0.1",),
        2, "loss", "nan", ("optimizer",), ("step",), ("optimizer-step",),
    ),
    Case(
        "one bad row among thousands", "bad_sample.py", ("--broken", "1234"), (),
        range(1, 189), "gradient", "nan", ("input",), ("leaf",), ("bad-input",),
        loader=True, epoch=0, items=(1234,), element="item",
    ),
    Case(
        "one bad row from a worker", "bad_sample.py", ("--broken", "77", "--workers", "1"), ("--workers", "1"),
        range(1, 189), "gradient", "nan", ("input",), ("leaf",), ("bad-input",),
        loader=True, epoch=0, items=(77,), element="item",
    ),
    Case(
        "a batch without labels", "tagger.py", ("--unlabelled", "31"), (),
        16, "loss", "nan", ("forward",), ("nll_loss_forward",), ("label-ignored",),
        line=True, loader=True, epoch=0, items=(30, 31),
    ),
    Case(
        "a sample of padding", "padding.py", ("83",), (),
        range(1, 21), "loss", "nan", ("forward",), SOFTMAX, ("masked-row",), "layers.0",
        line=True, loader=True, epoch=0, items=(83,), element="item",
    ),
    Case(
        "Adam in float16", "half_adam.py", ("1e-8",), ("1e-4",),
        1, "parameter", "", ("optimizer",), ("addcdiv", "_foreach_addcdiv"), ("optimizer-eps",),
        line=True, withheld=None,
    ),
    Case(
        "a loss scale that collapses", "loss_scale.py", (), ("--eps", "1e-6"),
        range(3, 61), "loss scale", "", ("backward",), ("div",), ("singular-gradient",),
        line=True, forward=("sqrt",),
    ),
    Case(
        "a loss too heavy for float16 at any scale", "loss_scale_huge.py", ("--weight", "1e30"), (),
        range(3, 41), "loss scale", "", ("backward",), ("_to_copy", "mm", "mul"), ("overflow-gradient",),
    ),
    Case(
        "a sigmoid that is 1", "by_hand.py", (), ("--clamp",),
        18, "loss", "", ("forward",), ("log",), ("log-of-zero",), "", line=True,
    ),
    Case(
        "a mean over no token", "token_mean.py", (), (),
        10, "loss", "nan", ("forward",), ("div",), ("division-by-zero",), "",
        line=True, loader=True, epoch=0, items=(36, 37, 38, 39), healthy_environment=("MIN_TOKENS",),
    ),
    Case(
        "an embedding of length 0", "contrastive.py", ("50",), ("-1",),
        range(1, 13), "loss", "nan", ("forward",), ("div",), ("division-by-zero",), "",
        line=True, loader=True, epoch=0, items=(50,), element="item",
    ),
    Case(
        "points that coincide", "distance.py", ("11",), ("-1",),
        12, "gradient", "nan", ("backward",), ("div",), ("singular-gradient",), line=True, forward=("sqrt",),
    ),
    Case(
        "the branch that is not taken", "survival.py", (), ("--safe",),
        13, "gradient", "nan", ("forward",), ("exp",), ("where-trap",), "", line=True,
    ),
    Case(
        "a backward pass of one's own, in a module", "custom_in_module.py", ("0",), ("0.01",),
        10, "gradient", "nan", ("backward",), ("log",), ("log-of-zero", "singular-gradient"), "router",
        line=True,
    ),
    Case(
        "a forward pass of one's own, in the loss", "custom_in_loss.py", ("0",), ("0.1",),
        8, "loss", "nan", ("forward",), ("log", "mul"), ("log-of-zero",), "", line=True,
    ),
    Case(
        "a backward pass of one's own, in the loss", "custom_backward_in_loss.py", ("0",), ("2",),
        8, "gradient", "nan", ("backward",), ("div",), ("division-by-zero",), "", line=True,
    ),
    Case(
        "entropy that collapses", "entropy_collapse.py", (), ("--normed",),
        range(80, 140), "loss", "nan", ("forward",), PRODUCTS, ("overflow-scores",), line=True,
    ),
    Case(
        "one gradient of Inf, and clipping", "clipping.py", ("0",), ("1e-6",),
        15, "gradient", "", ("backward",), ("div",), ("singular-gradient",),
        line=True, forward=("sqrt",), tensor="strength",
    ),
    Case(
        "the third of four micro-batches", "accumulation.py", ("--zero-row", "45"), (),
        6, "loss", "nan", ("forward",), ("div",), ("division-by-zero",), "0",
        line=True, loader=True, epoch=0, items=(45,), element=1,
    ),
    Case(
        "the discriminator's loss", "gan.py", (), ("--eps", "1e-7"),
        27, "loss", "", ("forward",), ("log",), ("log-of-zero",), "", line=True,
    ),
    Case(
        "a closure that is asked several times", "lbfgs.py", ("0",), ("2",),
        4, "loss", "nan", ("forward",), ("div",), ("division-by-zero",), "", line=True,
    ),
    Case(
        "a window of padding in a recomputed block", "checkpointing.py", (), ("--window", "6"),
        7, "loss", "nan", ("forward",), SOFTMAX, ("masked-row",), "layers.0",
        line=True, loader=True, epoch=0, items=(27,), element=3,
    ),
    Case(
        "a window of padding in a reentrant block", "checkpointing.py", ("--reentrant",),
        ("--reentrant", "--window", "6"),
        7, "loss", "nan", ("forward",), SOFTMAX, ("masked-row",), "layers.0",
        line=True, loader=True, epoch=0, items=(27,), element=3,
    ),
    Case(
        "statistics that a skipped batch has poisoned", "batch_norm.py", ("4",), ("-1",),
        10, "loss", "nan", ("buffer",), ("leaf",), ("bad-buffer",), "bn", tensor="bn.running_mean",
        origins=2,
    ),
    Case(
        "a compiled model", "compiled.py", ("0",), ("2",),
        9, "loss", "", ("forward",), ("div",), ("division-by-zero",), "", line=True,
    ),
    Case(
        "1 − p in bfloat16", "bfloat.py", (), ("--dtype", "float32"),
        range(2, 60), "loss", "", ("forward",), ("log",), ("log-of-zero",), "", line=True,
    ),
    Case(
        "a reading of NaN in random windows", "get_batch.py", ("999",), ("-1",),
        range(1, 121), "loss", "nan", ("input",), ("leaf",), ("bad-input",), origins=2,  # inputs and targets
    ),
    Case(
        "a model without a module", "functional_model.py", ("500",), ("1",),
        11, "loss", "", ("forward",), ("log",), ("log-of-zero",), "", line=True,
    ),
    Case(
        "a bad row in the checkpoint", "resume.py", ("nan",), ("0.5",),
        1, "loss", "nan", ("parameter",), ("leaf",), ("bad-embedding-row",), "embedding",
        tensor="embedding.weight", element=1,
    ),
    Case(
        "a row that dropout leaves empty", "dropout.py", (), ("--dropout", "0"),
        range(1, 65), "loss", "nan", ("forward",), ("div",), ("division-by-zero",), "3",
        line=True, loader=True,
    ),
    Case(
        "a flat critic", "penalty.py", ("8",), ("-1",),
        9, "gradient", "nan", ("backward",), ("div",), ("singular-gradient",), line=True, forward=("sqrt",),
    ),
    Case(
        "a sample that goes wrong in the second epoch", "augmented.py", ("0,1,0",), ("0,0.5,0",),
        range(7, 13), "loss", "nan", ("input", "forward"), ("leaf", "div"), ("bad-input", "division-by-zero"),
        loader=True, epoch=1, items=(19,), element="item",
    ),
    Case(
        "a loop that fetches a batch ahead", "lookahead.py", ("30",), ("-1",),
        8, "loss", "nan", ("forward",), ("div",), ("division-by-zero",), "",
        line=True, loader=True, epoch=0, index=7, items=(30,), element="item",
    ),
    Case(
        "a stream without indices", "stream.py", ("9",), ("-1",),
        10, "loss", "nan", ("forward",), ("nll_loss_forward",), ("label-ignored",),
        line=True, loader=True, epoch=0,
    ),
    Case(
        "a state that is carried on", "carried.py", ("100",), ("0.5",),
        10, "loss", "", ("forward",), ("mul",), ("overflow-factor",), "cell", line=True,
    ),
    Case(
        "a batch that is changed in place", "in_place.py", ("43",), ("-1",),
        6, "loss", "nan", ("forward",), ("div",), ("division-by-zero",), "0",
        line=True, loader=True, epoch=0, items=(43,), element=3,
    ),
    Case(
        "a temperature that meets 0", "annealed.py", ("0.25",), ("0.125",),
        8, "loss", "nan", ("forward",), ("div",), ("division-by-zero",), "1", line=True,
    ),
    Case(
        "a temperature in a compiled model", "annealed.py", ("0.25", "--compile"), ("0.125", "--compile"),
        8, "loss", "nan", ("forward",), ("div",), ("division-by-zero",), line=True,
    ),
    Case(
        "entropy that collapses in a compiled model", "entropy_collapse.py", ("--compile",),
        ("--compile", "--normed"),
        range(80, 140), "loss", "nan", ("forward",), PRODUCTS, ("overflow-scores",), line=True,
    ),
    Case(
        "a module that counts its calls", "counts_calls.py", ("7",), ("0",),
        7, "loss", "", ("forward",), ("div",), ("division-by-zero",), line=True, repeatable=False,
    ),
    Case(
        "a codebook that a module poisons", "two_losses.py", ("0",), ("0.9",),
        range(2, 8), "loss", "nan", ("buffer",), ("leaf",), ("bad-buffer",), tensor="codes",
    ),
)  # fmt: skip

SILENT: tuple[Silent, ...] = (
    Silent("gradients of NaN that nothing steps", "frozen_branch.py"),
    Silent("a scaler that skips two steps and recovers", "loss_scale_huge.py", ("--init-scale", "16384")),
    Silent(
        "a scaler that begins far too high and recovers", "loss_scale_huge.py", ("--init-scale", "67108864")
    ),
    Silent("masks, eval losses and logged numbers that are not finite", "infinities.py"),
)
