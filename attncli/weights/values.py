"""What the values of each tensor are like: NaN, Inf, largest magnitude, root mean square, share of zeros.

Seen as integers without their sign bit, the bits of floats grow with their magnitude. So one pass of
integer maximum and minimum over a piece that fits the cache tells the largest magnitude, whether anything is
NaN or Inf, and whether anything is zero; only where it says so are these counted. This file must not know
where values come from (`TensorValues`), nor what is a fault: rules judge.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from attncli.records import Anomaly, HeadRows, Layer, Measurement, Tensor


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
    statistics = {index: _Statistics() for index in readable}
    plain = [index for index in readable if wanted[index].scheme == "plain"]
    _scan_plain([(wanted[index], statistics[index]) for index in plain], values, progress)
    for index in readable:
        if wanted[index].scheme != "plain":
            _scan_quantised(wanted[index], statistics[index], values, progress)
    rows: list[Measurement] = []
    for index, tensor in enumerate(wanted):
        if index in statistics:
            rows.extend(statistics[index].measurements(tensor.name))
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
    the rows, `heads` all of them (more than one where keys are grouped). Heads are known for the query and
    key rows of `score_terms`, and for a value projection of the key's shape. `measurements` are those of
    `value_measurements`: only a tensor with zeros enough for a head, or with a non-finite value, is read.
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
            if broken == 0 and zeros < smallest:
                continue
            matrix = output_rows(values.load(tensor_record), places[0][1].out_axis)
            for side, rows in places:
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


@dataclass(slots=True)
class _Statistics:
    """Running statistics of one tensor. `rms` is over `finite` elements; both merge without overflow."""

    numel: int = 0
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    absmax: float = 0.0
    rms: float = 0.0

    @property
    def finite(self) -> int:
        return self.numel - self.nan - self.inf

    def merge(self, other: _Statistics) -> None:
        finite = self.finite + other.finite
        if finite:
            mine, theirs = math.sqrt(self.finite / finite), math.sqrt(other.finite / finite)
            self.rms = math.hypot(self.rms * mine, other.rms * theirs)
        self.numel += other.numel
        self.nan += other.nan
        self.inf += other.inf
        self.zeros += other.zeros
        self.absmax = max(self.absmax, other.absmax)

    def measurements(self, name: str) -> tuple[Measurement, ...]:
        return (
            Measurement("nan_count", name, self.nan),
            Measurement("inf_count", name, self.inf),
            Measurement("absmax", name, self.absmax if self.finite else None),
            Measurement("rms", name, self.rms if self.finite else None),
            Measurement("zero_fraction", name, self.zeros / self.numel if self.numel else None),
        )


def _scan_plain(
    jobs: Sequence[tuple[Tensor, _Statistics]],
    values: TensorValues,
    progress: Callable[[int], None] | None,
) -> None:
    """Fills the statistics of each job. Threads take parts of tensors in turn, in the order of the files."""
    work = ((total, part) for tensor, total in jobs for part in values.parts(tensor))
    lock = threading.Lock()
    stopped = threading.Event()

    def run() -> None:
        torch.set_num_threads(1)  # threads of torch's own wait busily: on a shared core 100 times slower
        scanner = _Scanner()
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
    tensor: Tensor, total: _Statistics, values: TensorValues, progress: Callable[[int], None] | None
) -> None:
    """One at a time, so that only one dequantised tensor is ever held."""
    scanner = _Scanner()
    scanner.add(values.load(tensor).reshape(-1))
    total.merge(scanner.take())
    if progress is not None:
        progress(tensor.size_bytes)


class _Scanner:
    """Statistics of the pieces of one tensor, by one thread.

    Pieces are cut into blocks that stay in the core's cache, together with the buffers written for them,
    from one pass to the next; buffers are used again and again.
    """

    def __init__(self) -> None:
        self._total = _Statistics()
        self._buffers: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        # Of the blocks that took the quick path, all of one dtype:
        self._dtype = torch.float32
        self._numel = 0
        self._zeros = 0
        self._largest = 0
        self._squares = 0.0
        self._row_norms = torch.empty(_NORM_SLOTS, _BLOCK // _ROW)
        self._slots = self._row_norms.unbind(0)
        self._used = 0

    def add(self, piece: torch.Tensor) -> None:
        """Takes a 1-D piece of any dtype into the statistics."""
        form = _FLOATS.get(piece.dtype)
        if piece.numel() == 0:
            return
        if form is None:
            for first in range(0, piece.numel(), _BLOCK):
                block = piece[first : first + _BLOCK]
                exact = _byte_statistics if block.element_size() == 1 else _careful_statistics
                self._total.merge(exact(block))
            return
        if piece.dtype != self._dtype:
            self._settle()
            self._dtype = piece.dtype
        integers = piece.view(form.integer)
        whole = piece.numel() // _BLOCK * _BLOCK
        for block, bits in zip(
            piece[:whole].view(-1, _BLOCK).unbind(0), integers[:whole].view(-1, _BLOCK).unbind(0), strict=True
        ):
            self._add_block(block, bits, form)
        if whole < piece.numel():
            self._add_block(piece[whole:], integers[whole:], form)

    def take(self) -> _Statistics:
        """The statistics of everything since the last call."""
        self._settle()
        total, self._total = self._total, _Statistics()
        return total

    def _add_block(self, block: torch.Tensor, bits: torch.Tensor, form: _FloatForm) -> None:
        numel = block.numel()
        magnitudes, wide = self._buffer(block.dtype, form.integer, numel)
        narrow = block.dtype in (torch.bfloat16, torch.float16)
        if narrow:  # for them the norm kernel is slow or rounds its result to their own few digits
            wide.copy_(block)
        torch.bitwise_and(bits, form.magnitude, out=magnitudes)
        low, high = torch.aminmax(magnitudes)
        smallest, largest = int(low), int(high)
        if not form.square_floor <= largest < form.square_ceiling:
            if largest:
                self._total.merge(_careful_statistics(block))
                return
        elif block.dtype == torch.float64:
            self._squares += float(torch.linalg.vector_norm(block)) ** 2
        else:
            self._add_squares(wide if narrow else block, numel)
        if smallest == 0:
            self._zeros += numel - int(torch.count_nonzero(magnitudes))
        self._numel += numel
        self._largest = max(self._largest, largest)

    def _add_squares(self, block: torch.Tensor, numel: int) -> None:
        """Sum of squares of a float32 block. The kernel sums in float32, so rows are short and their norms
        meet in float64: a row of 1,024 in lanes of at least 4 adds 256 squares, which errs by at most
        256 · 2^-24 = 1.5e-5 of the sum and half of that in the norm, even if every rounding goes one way.
        """
        if numel == _BLOCK:
            torch.linalg.vector_norm(block.view(-1, _ROW), dim=1, out=self._slots[self._used])
            self._used += 1
            if self._used == _NORM_SLOTS:
                self._settle_norms()
            return
        whole = numel // _ROW * _ROW
        if whole:
            norms = torch.linalg.vector_norm(block[:whole].view(-1, _ROW), dim=1)
            self._squares += float(norms.double().square().sum())
        self._squares += float(block[whole:].double().square().sum())

    def _settle_norms(self) -> None:
        if self._used:
            self._squares += float(self._row_norms[: self._used].double().square().sum())
            self._used = 0

    def _settle(self) -> None:
        """Moves what the quick path gathered into the total."""
        self._settle_norms()
        if self._numel:
            absmax = torch.tensor(self._largest, dtype=_FLOATS[self._dtype].integer).view(self._dtype)
            rms = math.sqrt(self._squares / self._numel)
            self._total.merge(_Statistics(self._numel, 0, 0, self._zeros, float(absmax.item()), rms))
        self._numel, self._zeros, self._largest, self._squares = 0, 0, 0, 0.0

    def _buffer(
        self, dtype: torch.dtype, integer: torch.dtype, numel: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the magnitudes of a block, and for its float32 copy."""
        buffers = self._buffers.get(dtype)
        if buffers is None:
            buffers = torch.empty(_BLOCK, dtype=integer), torch.empty(_BLOCK if dtype.itemsize == 2 else 0)
            self._buffers[dtype] = buffers
        if numel == _BLOCK:
            return buffers
        return buffers[0][:numel], buffers[1][:numel]


def _careful_statistics(piece: torch.Tensor) -> _Statistics:
    """Any dtype and any values, in float64: slower by an order of magnitude, used only where needed."""
    numel = piece.numel()
    if piece.dtype.is_complex:
        wide = piece.to(torch.complex128)
        is_nan = torch.isnan(wide)
        wide = torch.where(is_nan, torch.nan, wide.abs())
    elif piece.dtype.is_floating_point:
        wide = piece.double().abs()
    else:
        wide = piece.to(torch.float64).abs()
    return _weighted_statistics(wide, torch.ones((), dtype=torch.int64).expand(numel))


def _byte_statistics(piece: torch.Tensor) -> _Statistics:
    """Dtypes of one byte: counts of the 256 patterns say everything, exactly."""
    counts = torch.bincount(piece.view(torch.uint8), minlength=256)
    patterns = torch.arange(256, dtype=torch.uint8)
    if piece.dtype == torch.bool:
        magnitudes = (patterns != 0).double()
    elif piece.dtype.is_floating_point:
        magnitudes = patterns.view(piece.dtype).float().double().abs()
    else:
        magnitudes = patterns.view(piece.dtype).double().abs()
    return _weighted_statistics(magnitudes[counts > 0], counts[counts > 0])


def _weighted_statistics(magnitudes: torch.Tensor, counts: torch.Tensor) -> _Statistics:
    """From float64 magnitudes, each `counts` times. Scaled by the largest: no square overflows."""
    numel = int(counts.sum())
    nan = int(counts[torch.isnan(magnitudes)].sum())
    inf = int(counts[torch.isinf(magnitudes)].sum())
    finite = torch.isfinite(magnitudes)
    if nan or inf:
        magnitudes, counts = magnitudes[finite], counts[finite]
    if nan + inf == numel:
        return _Statistics(numel, nan, inf)
    absmax = float(magnitudes.max())
    zeros = int(counts[magnitudes == 0].sum())
    if absmax == 0:
        return _Statistics(numel, nan, inf, zeros)
    mean_square = float((counts * (magnitudes / absmax).square()).sum()) / (numel - nan - inf)
    return _Statistics(numel, nan, inf, zeros, absmax, absmax * math.sqrt(mean_square))


# --- heads --------------------------------------------------------------------------------------------


def _head_places(layer: Layer) -> dict[str, list[tuple[str, HeadRows]]]:
    """Tensor → the rows of heads in it, by side ("q", "k", "v")."""
    places: dict[str, list[tuple[str, HeadRows]]] = {}
    shapes = {tensor.name: tensor.shape for tensor in layer.tensors}
    for term in layer.score_terms:
        for side, rows in (("q", term.query.rows), ("k", term.key.rows)):
            places.setdefault(rows.tensor, []).append((side, rows))
    keys = [rows for found in places.values() for side, rows in found if side == "k"]
    for tensor in layer.tensors:
        fits = len(keys) == 1 and shapes.get(keys[0].tensor) == tensor.shape
        if tensor.role == "v" and fits and tensor.name not in places:
            same = HeadRows(tensor.name, keys[0].starts, keys[0].width, keys[0].out_axis)
            places[tensor.name] = [("v", same)]
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


# --- tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _FloatForm:
    """A float's bits as an integer: mask of the magnitude, pattern of infinity, and the range of largest
    magnitudes for which a sum of squares in the kernel's precision neither overflows nor loses digits.

    float32 sums: 2^10 squares below (2^58)² stay below 2^127; from 2^-44 on, what underflows is less than
    1e-5 of the sum even if subnormals are flushed to zero. Outside, the careful path takes over.
    """

    integer: torch.dtype
    magnitude: int
    infinity: int
    square_floor: int
    square_ceiling: int


def _form(dtype: torch.dtype, integer: torch.dtype, floor: float, ceiling: float) -> _FloatForm:
    bits: Mapping[str, int] = {
        name: int(torch.tensor(value, dtype=dtype).view(integer))
        for name, value in (("infinity", math.inf), ("floor", floor), ("ceiling", ceiling))
    }
    return _FloatForm(integer, torch.iinfo(integer).max, bits["infinity"], bits["floor"], bits["ceiling"])


_FLOATS = {
    torch.bfloat16: _form(torch.bfloat16, torch.int16, 2.0**-44, 2.0**58),
    torch.float16: _form(torch.float16, torch.int16, 0.0, math.inf),
    torch.float32: _form(torch.float32, torch.int32, 2.0**-44, 2.0**58),
    torch.float64: _form(torch.float64, torch.int64, 2.0**-400, 2.0**480),
}
# Elements. A block, its magnitudes and its float32 copy are 1 MB together: they fit a second-level cache.
_BLOCK = 128 << 10
_ROW = 1024
_NORM_SLOTS = 64
_MAX_WORKERS = 4
_PROJECTIONS = frozenset({"q", "k", "v", "o", "qkv", "kv", "qk", "q_a", "q_b", "kv_a", "kv_b"})
