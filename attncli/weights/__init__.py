"""Weight values → measurements. Tensors come through `TensorValues`; no file format, no layout lore here."""

from attncli.weights.bounds import BoundIngredients, ScoreBounds, score_bounds
from attncli.weights.digests import digest_measurements
from attncli.weights.memory import ModelValues
from attncli.weights.values import TensorValues, ValueScan, head_anomalies, value_measurements

__all__ = [
    "BoundIngredients",
    "ModelValues",
    "ScoreBounds",
    "TensorValues",
    "ValueScan",
    "digest_measurements",
    "head_anomalies",
    "score_bounds",
    "value_measurements",
]
