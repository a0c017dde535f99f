"""Reports of training runs, made by hand: that stopped, that went on, that are warned of, and without any fault."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from ci_reports import HOSTILE, ORIGIN
from test_render import layer

from attncli.records import Fault, Moved, Optimizer, Report, Sample, Step, Training
from attncli.rules import Observed, judge

SAMPLES = tuple(
    Sample(step, "blocks.3.attn", 0, 1, "headroom_bits", (760 - step) / 40, "float16")
    for step in range(285, 601, 5)
)
FAULT = Fault(
    step=412,
    seen="loss",
    value="nan",
    batch={
        "loader": "DataLoader over TensorDataset", "epoch": 2, "index": 37,
        "items": [9123, 44, 1007, 3, 5120, 77, 8, 901, 15, 2],
    },
    reproduced=True,
    withheld=True,
    source="train.py:88",
)  # fmt: skip


def steps(last: int = 411, count: int = 24, scale: float | None = 1024.0) -> tuple[Step, ...]:
    """A loss that falls and then runs away."""
    return tuple(
        Step(
            at,
            loss=2.5 - (at - last + count) / 40 if at < last - 4 else 2.0 * 3.0 ** (at - last + 4),
            gradient_norm=0.75 * 2.0 ** max(0, at - last + 6),
            learning_rate=3e-4,
            loss_scale=scale,
            skipped=at == last - 2,
            parameter="blocks.3.mlp.up.weight",
            parameter_absmax=1.5 + (at - last + count) / 8,
        )
        for at in range(last - count + 1, last + 1)
    )


def trained(training: Training, *, origins: Any = (), **run: Any) -> Report:
    observed = Observed((layer("decoder.0.attn"),), origins=origins, training=training)
    return Report(
        command="nan-check",
        version="0.1.0",
        source={"kind": "script", "path": "train.py", "parameters": 1_250_000},
        environment={"python": "3.11.0", "torch": "2.13.0", "device": "cpu", "dtype": "float32"},
        layers=observed.layers,
        origins=origins,
        findings=judge(observed),
        run={
            "batch": "training",
            "inputs": {},
            "operators": 900 if origins else 0,
            "operators_by_phase": {"forward": 300, "backward": 600} if origins else {},
            "training": {
                **asdict(training),
                "capsule": None,
                "world": 1,
                "faults": int(training.fault is not None),
                "stopped": training.fault is not None,
                **run,
            },
        },
    )


OPTIMIZERS = (Optimizer("AdamW", "float32", {"lr": 3e-4, "eps": 1e-8}),)
REPORTS: dict[str, Report] = {
    "stopped": trained(
        Training(412, steps(), (), (), OPTIMIZERS, FAULT), origins=(ORIGIN,), capsule="runs/capsule of today"
    ),
    "continued": trained(
        Training(
            900,
            steps(scale=None),
            moved=(Moved(411, "blocks.3.mlp.up.weight", 0.5, 3.2e6, 0.5, 3e4),),
            fault=replace(
                FAULT, seen="gradient", value="+inf", tensors=tuple(f"blocks.{at}.wq.weight" for at in range(12)),
                batch=None, reproduced=False, why="the batch came from a generator.", withheld=False, source=None,
                rank=3,
            ),
        ),
        stopped=False,
        faults=3,
        world=4,
    ),
    "growing": trained(Training(600, steps(600), SAMPLES, (), OPTIMIZERS)),
    "watched": trained(Training(200, steps(200, scale=None)[:10], (), (), OPTIMIZERS)),
    "nothing": trained(Training(0)),
    "scale": trained(
        Training(
            60,
            tuple(Step(at, loss=2.0, loss_scale=2.0 ** (59 - at), skipped=True) for at in range(44, 61)),
            fault=Fault(60, "loss scale", "", reproduced=None, why="only a loss is replayed", withheld=True),
        )
    ),
    "hostile": trained(
        Training(
            3,
            (Step(1, loss=math.nan, parameter=HOSTILE, parameter_absmax=math.inf), Step(2, loss=-math.inf)),
            optimizers=(Optimizer(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}),),
            moved=(Moved(1, HOSTILE, 1.0, math.inf),),
            fault=Fault(
                3, "gradient", "nan", (HOSTILE, HOSTILE),
                {"loader": HOSTILE, "epoch": 0, "index": 1, "items": [HOSTILE]},
                False, HOSTILE, None, HOSTILE, 0,
            ),
        ),
        capsule=HOSTILE,
        world=2,
    ),
}  # fmt: skip
