"""What is written down while a training run goes on: JSON lines, and TensorBoard. Knows records; judges nothing.

Lines have the schema `attncli-log/1`, which each of them names: strict JSON (RFC 8259), one object a step.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from attncli.errors import UsageError
from attncli.records import Sample, Step, strict_json

SCHEMA = "attncli-log/1"


def line_of(step: Step, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """One line of the log as plain JSON types; non-finite numbers are the strings "nan", "inf" and "-inf".

    {"schema", "step", "loss", "gradient_norm", "learning_rate", "loss_scale", "skipped", "seconds", "attention":
    [{"layer", "call", "dtype", METRIC: [a number for each head], …}]}: every call has each of `_METRICS`, entropies in
    nats, headroom in bits of `dtype`, in which the products of the call are stored. None is not observed, such as
    `dtype` and headroom of a fused kernel, which stores no products. `seconds`: since the run began.
    """
    calls: dict[tuple[str, int], dict[str, Any]] = {}
    numbers: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    for one in samples:
        call = calls.setdefault(
            (one.layer, one.call),
            {"layer": one.layer, "call": one.call, "dtype": one.dtype, **dict.fromkeys(_METRICS)},
        )
        call["dtype"] = call["dtype"] or one.dtype
        numbers.setdefault((one.layer, one.call), {}).setdefault(one.metric, {})[one.head] = one.value
    for key, metrics in numbers.items():
        heads = range(1 + max(head for values in metrics.values() for head in values))
        calls[key] |= {metric: [values.get(head) for head in heads] for metric, values in metrics.items()}
    line: dict[str, Any] = strict_json(
        {
            "schema": SCHEMA,
            "step": step.number,
            "loss": step.loss,
            "gradient_norm": step.gradient_norm,
            "learning_rate": step.learning_rate,
            "loss_scale": step.loss_scale,
            "skipped": step.skipped,
            "seconds": round(seconds, 3),
            "attention": list(calls.values()),
        }
    )
    return line


class JsonLines:
    """A file of lines, truncated at the start; each is flushed, so that a run that is killed keeps its own.

    Raises UsageError at once where the file cannot be written. A write that fails later is told on stderr, once, and
    never stops the training.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file: TextIO | None = None
        try:
            self._file = self._path.open("w", encoding="utf-8", newline="\n")
        except (OSError, ValueError) as error:
            folder = self._path.parent
            missing = f"The folder {folder} does not exist." if not _is_folder(folder) else _because(error)
            raise UsageError(
                str(path), missing, "Give log (--log) a file in a folder that can be written."
            ) from error

    def write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(f"{json.dumps(strict_json(line), ensure_ascii=False, allow_nan=False)}\n")
            self._file.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:  # what was buffered when the disk filled
                _tell(self._path, error)

    def _give_up(self, error: Exception) -> None:
        _tell(self._path, error)
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                return  # the same error again, of what is still buffered


class TensorBoard:
    """Scalars for TensorBoard, by torch's own writer: "train/loss", "attention/LAYER/entropy_min" and the like.

    Of each metric of a layer the extreme that matters, and each head where there are at most 16. What is not finite is
    left out: TensorBoard draws a gap. Raises UsageError at once without the package `tensorboard`, or where the folder
    cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "tensorboard",
                f"The package tensorboard is missing ({error}).",
                "Run pip install tensorboard.",
            ) from error
        self._folder = Path(folder)
        self._writer: Any = None
        try:
            self._writer = SummaryWriter(str(folder), flush_secs=10)
        except (OSError, ValueError) as error:
            raise UsageError(
                str(folder), _because(error), "Give tensorboard (--tensorboard) a folder that can be written."
            ) from error

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line as `line_of` makes it."""
        if self._writer is None:
            return
        try:
            for name, value in _scalars(line):
                self._writer.add_scalar(name, value, line["step"])
        except (OSError, ValueError, RuntimeError) as error:
            _tell(self._folder, error)
            self._writer = None

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except (OSError, ValueError, RuntimeError) as error:
                _tell(self._folder, error)


def writers(
    log: str | Path | None, tensorboard: str | Path | None, rank: int
) -> list[JsonLines | TensorBoard]:
    """Of several processes each has a log of its own, run.jsonl, run.rank1.jsonl …; TensorBoard shows the first."""
    found: list[JsonLines | TensorBoard] = []
    if log is not None:
        log = Path(log)
        found.append(JsonLines(log.with_suffix(f".rank{rank}{log.suffix}") if rank else log))
    if tensorboard is not None and not rank:
        found.append(TensorBoard(Path(tensorboard)))
    return found


# --- building blocks ----------------------------------------------------------------------------------


def _scalars(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(name, value) of everything finite in a line."""
    found: list[tuple[str, Any]] = [(f"train/{name}", line.get(name)) for name in _OF_THE_STEP]
    for call in line.get("attention") or ():
        place = f"attention/{call['layer'] or 'attention'}"
        place += f"/call_{call['call']}" if call["call"] else ""
        for metric, extremes in _EXTREMES.items():
            values = [value for value in call.get(metric) or () if _is_finite(value)]
            if values:
                found += [(f"{place}/{metric}{name}", of(values)) for name, of in extremes.items()]
            if len(call.get(metric) or ()) <= _EACH_HEAD:
                found += [
                    (f"{place}/{metric}/head_{head}", value)
                    for head, value in enumerate(call.get(metric) or ())
                ]
    return [(name, float(value)) for name, value in found if _is_finite(value)]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _because(error: Exception) -> str:
    said = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return f"It cannot be written: {said[0].lower()}{said[1:].rstrip('.')}."


def _tell(path: Path, error: Exception) -> None:
    try:
        print(f"attncli: {path}: {_because(error)} The training goes on without it.", file=sys.stderr)  # noqa: T201
    except (OSError, ValueError):
        return  # no stderr to tell it to


# --- tables -------------------------------------------------------------------------------------------

_METRICS = ("entropy", "entropy_ratio", "entropy_rest", "score_max", "dot_absmax", "headroom_bits")
_OF_THE_STEP = ("loss", "gradient_norm", "learning_rate", "loss_scale")
_EXTREMES: dict[str, dict[str, Callable[[Sequence[float]], float]]] = {
    "entropy": {"_min": min, "_mean": _mean},
    "entropy_ratio": {"_min": min, "_mean": _mean},
    "score_max": {"": max},
    "dot_absmax": {"": max},
    "headroom_bits": {"": min},
}
_EACH_HEAD = 16
