"""Frozen facts that cross the borders between rooms. Standard library only; no tensor ever enters a record.

In the order in which they arise: what lies in the files (`stored`), what attention it makes (`layers`), what ran
and was measured (`runs`), what a training run showed (`training`), what is judged of it and what changed (`judged`),
and the whole answer (`report`). Shapes are in elements, sizes in bytes.
"""

from attncli.records.judged import SEVERITIES, Change, Expectation, Finding, Severity
from attncli.records.layers import (
    Evidence,
    HeadRows,
    Layer,
    LayerTensor,
    Norm,
    ScoreSide,
    ScoreTerm,
    structure,
)
from attncli.records.report import SCHEMA, Report, strict_json
from attncli.records.runs import AttentionMap, Call, Measurement, Origin
from attncli.records.stored import Anomaly, Array, Checkpoint, Config, Tensor
from attncli.records.training import Fault, Moved, Optimizer, Sample, Step, Training

__all__ = [
    "SCHEMA", "SEVERITIES", "Anomaly", "Array", "AttentionMap", "Call", "Change", "Checkpoint", "Config",
    "Evidence", "Expectation", "Fault", "Finding", "HeadRows", "Layer", "LayerTensor", "Measurement", "Moved", "Norm",
    "Optimizer", "Origin", "Report", "Sample", "ScoreSide", "ScoreTerm", "Severity", "Step", "Tensor", "Training",
    "strict_json", "structure",
]  # fmt: skip
