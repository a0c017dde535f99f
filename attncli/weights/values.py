"""What the values of each tensor are like, and which heads of a projection are dead or broken.

This file must not know where values come from (`TensorValues`), nor what is a fault: rules judge.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from attncli.records import Anomaly, HeadRows, Layer, Measurement, Tensor
from attncli.weights.statistics import Scanner, Statistics, block_kernel


class TensorValues(Protocol):
    """Where values come from: the checkpoint room satisfies it.

    `load` gives a whole tensor; `parts` the elements of a plain one as groups of 1-D pieces, each group for
    one thread.
    """

    def find(self, name: str) -> Tensor | None: ...

    def available(self, tensor: Tensor) -> bool: ...

    def load(self, tensor: Tensor) -> torch.Tensor: ...

    def parts(self, tensor: Tensor) -> Iterator[Iterator[torch.Tensor]]: ...


@dataclass(frozen=True, slots=True)
class ValueScan:
    """`measurements`: five rows a tensor, in the order of the tensors given. `skipped`: one anomaly
    "unread-values" for each tensor whose values are not available: it was not looked at."""

    measurements: tuple[Measurement, ...]
    skipped: tuple[Anomaly, ...]


def value_measurements(
    tensors: Iterable[Tensor], values: TensorValues, progress: Callable[[int], None] | None = None
) -> ValueScan:
    """`nan_count`, `inf_count`, `absmax`, `rms` and `zero_fraction` of each tensor, `layer` its name.

    `absmax` and `rms` are over the finite elements, None where there are none; relative error of `rms`
    below 1e-5. Complex elements count by their modulus. `progress` gets the bytes that were read since its
    last call, from any thread. Plain tensors are shared out to a few threads; while they run, torch's
    number of threads is 1.
    """
    wanted = list(tensors)
    readable = [index for index, tensor in enumerate(wanted) if values.available(tensor)]
    # In the order of the files: a disk reads forward.
    readable.sort(key=lambda index: _place(wanted[index]))
    statistics = {index: Statistics() for index in readable}
    plain = [index for index in readable if wanted[index].scheme == "plain"]
    _scan_plain([(wanted[index], statistics[index]) for index in plain], values, progress)
    for index in readable:
        if wanted[index].scheme != "plain":
            _scan_quantised(wanted[index], statistics[index], values, progress)
    rows: list[Measurement] = []
    for index, tensor in enumerate(wanted):
        if index in statistics:
            rows.extend(_rows(tensor.name, statistics[index]))
    skipped = tuple(
        unread(tensor.name, tensor) for index, tensor in enumerate(wanted) if index not in statistics
    )
    return ValueScan(tuple(rows), skipped)


def head_anomalies(
    layers: Iterable[Layer], measurements: Iterable[Measurement], values: TensorValues
) -> tuple[Anomaly, ...]:
    """All-zero projections, and the heads that are all zero or hold NaN or Inf, of every attention layer.

    Kinds "zero-projection" {"layer", "role"}, "zero-head" and "nonfinite-head" {"layer", "role", "head",
    "heads", "nan_count", "inf_count"}; `subject` is the tensor. `head` is the first query head that uses
    the rows, `heads` all of them (more than one where keys are grouped). `Layer.rows` says where heads lie.
    `measurements` are those of `value_measurements`: only a tensor with zeros enough for a head, or with a
    non-finite value, is read.
    """
    table: dict[tuple[str, str], float | int | str | None] = {
        (row.layer, row.metric): row.value for row in measurements
    }
    found: list[Anomaly] = []
    for layer in layers:
        roles = {tensor.name: tensor.role for tensor in layer.tensors}
        whole = set()
        for tensor in layer.tensors:
            if tensor.role in _PROJECTIONS and table.get((tensor.name, "zero_fraction")) == 1.0:
                whole.add(tensor.name)
                found.append(
                    Anomaly("zero-projection", tensor.name, {"layer": layer.id, "role": tensor.role})
                )
        for name, places in _head_places(layer).items():
            tensor_record = values.find(name)
            if tensor_record is None or name in whole or not values.available(tensor_record):
                continue
            zeros = _number(table.get((name, "zero_fraction"))) * tensor_record.numel
            broken = _number(table.get((name, "nan_count"))) + _number(table.get((name, "inf_count")))
            smallest = min(rows.width for _, rows in places) * _columns(tensor_record, places[0][1])
            if broken == 0 and round(zeros) < smallest:
                continue
            weight = values.load(tensor_record)
            for side, rows in places:
                matrix = output_rows(weight, rows.out_axis)
                role = roles.get(name, side)
                label = role if role == side else f"{role} ({side} rows)"
                found.extend(_head_faults(layer.id, label, rows, matrix))
    return tuple(found)


def output_rows(weight: torch.Tensor, out_axis: int) -> torch.Tensor:
    """`weight` as [out, in]: Linear and Conv [out, in, …] for axis 0; Conv1D [in, out], [D, H, d] for 1."""
    if weight.dim() < 2:
        return weight.reshape(-1, 1)
    return weight.flatten(1) if out_axis == 0 else weight.flatten(1).mT


def unread(subject: str, tensor: Tensor | None) -> Anomaly:
    """The statement that a tensor's values were not looked at, and how they are stored."""
    if tensor is None:
        return Anomaly("unread-values", subject, {"reason": "no such tensor"})
    parts = tensor.parts.values()
    addressable = bool(parts) and all(part.offset is not None for part in parts)
    reason = "not a known form of storage" if addressable else "compressed or absent: no place in the file"
    return Anomaly(
        "unread-values", subject, {"reason": reason, "scheme": tensor.scheme, "dtype": tensor.dtype}
    )


# --- the scan -----------------------------------------------------------------------------------------


def _rows(name: str, found: Statistics) -> tuple[Measurement, ...]:
    return (
        Measurement("nan_count", name, found.nan),
        Measurement("inf_count", name, found.inf),
        Measurement("absmax", name, found.absmax if found.finite else None),
        Measurement("rms", name, found.rms if found.finite else None),
        Measurement("zero_fraction", name, found.zeros / found.numel if found.numel else None),
    )


def _scan_plain(
    jobs: Sequence[tuple[Tensor, Statistics]],
    values: TensorValues,
    progress: Callable[[int], None] | None,
) -> None:
    """Fills the statistics of each job. Threads take parts of tensors in turn, in the order of the files."""
    work = ((total, part) for tensor, total in jobs for part in values.parts(tensor))
    lock = threading.Lock()
    stopped = threading.Event()

    def run() -> None:
        torch.set_num_threads(1)  # threads of torch's own wait busily: on a shared core 100 times slower
        scanner = Scanner()
        while not stopped.is_set():
            with lock:
                job = next(work, None)
            if job is None:
                return
            total, part = job
            size = 0
            for piece in part:
                scanner.add(piece)
                size += piece.numel() * piece.element_size()
            found = scanner.take()
            with lock:
                total.merge(found)
            if progress is not None:
                progress(size)

    def run_or_stop() -> None:
        try:
            run()
        except BaseException:
            stopped.set()  # the others need not finish what nobody will see
            raise

    block_kernel()  # compiled here once: threads would wait for it
    before = torch.get_num_threads()
    workers = max(1, min(_MAX_WORKERS, _usable_cores()))
    try:
        with ThreadPoolExecutor(workers, "attncli-values") as pool:
            runs = [pool.submit(run_or_stop) for _ in range(workers)]
            try:
                for future in runs:
                    future.result()
            finally:
                stopped.set()
    finally:
        work.close()
        torch.set_num_threads(before)


def _scan_quantised(
    tensor: Tensor, total: Statistics, values: TensorValues, progress: Callable[[int], None] | None
) -> None:
    """One at a time, so that only one dequantised tensor is ever held."""
    scanner = Scanner()
    scanner.add(values.load(tensor).reshape(-1))
    total.merge(scanner.take())
    if progress is not None:
        progress(tensor.size_bytes)


# --- heads --------------------------------------------------------------------------------------------


def _head_places(layer: Layer) -> dict[str, list[tuple[str, HeadRows]]]:
    """Tensor → the rows (of "o": the columns) of heads in it, by side."""
    places: dict[str, list[tuple[str, HeadRows]]] = {}
    for side, rows in layer.rows.items():
        places.setdefault(rows.tensor, []).append((side, rows))
    return places


def _head_faults(layer: str, role: str, rows: HeadRows, matrix: torch.Tensor) -> Iterator[Anomaly]:
    heads_of: dict[int, list[int]] = {}
    for head, start in enumerate(rows.starts):
        heads_of.setdefault(start, []).append(head)
    for start, heads in heads_of.items():
        block = matrix[start : start + rows.width]
        evidence: dict[str, object] = {"layer": layer, "role": role, "head": heads[0], "heads": tuple(heads)}
        wide = block.float() if block.is_floating_point() else block
        nan, inf = int(torch.isnan(wide).sum()), int(torch.isinf(wide).sum())
        if nan or inf:
            yield Anomaly("nonfinite-head", rows.tensor, {**evidence, "nan_count": nan, "inf_count": inf})
        elif block.numel() and not bool(torch.count_nonzero(wide)):
            yield Anomaly("zero-head", rows.tensor, evidence)


def _columns(tensor: Tensor, rows: HeadRows) -> int:
    if len(tensor.shape) < 2:
        return 1
    return math.prod(tensor.shape[1:]) if rows.out_axis == 0 else tensor.shape[0]


def _number(value: float | int | str | None) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _place(tensor: Tensor) -> tuple[str, int]:
    offsets = [(part.file, part.offset or 0) for part in tensor.parts.values()]
    return min(offsets, default=("", 0))


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


_MAX_WORKERS = 4
_PROJECTIONS = frozenset({"q", "k", "v", "o", "qkv", "kv", "qk", "q_a", "q_b", "kv_a", "kv_b"})
