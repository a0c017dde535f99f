"""Pieces of one tensor → counts of NaN, Inf and zeros, largest magnitude, root mean square. Made for speed.

Seen as integers without their sign bit, the bits of floats grow with their magnitude. So integer maximum and
minimum over a block that fits the cache tell the largest magnitude, whether anything is NaN or Inf, and
whether anything is zero; only where they say so are these counted. This file must not know threads, names or
files.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch


@dataclass(slots=True)
class Statistics:
    """What is known of `numel` elements. `absmax` and `rms` are over the finite ones, 0 where there are none.

    Merging neither overflows nor loses digits, whatever the magnitudes.
    """

    numel: int = 0
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    absmax: float = 0.0
    rms: float = 0.0

    @property
    def finite(self) -> int:
        return self.numel - self.nan - self.inf

    def merge(self, other: Statistics) -> None:
        finite = self.finite + other.finite
        if finite:
            mine, theirs = math.sqrt(self.finite / finite), math.sqrt(other.finite / finite)
            self.rms = math.hypot(self.rms * mine, other.rms * theirs)
        self.numel += other.numel
        self.nan += other.nan
        self.inf += other.inf
        self.zeros += other.zeros
        self.absmax = max(self.absmax, other.absmax)


class Scanner:
    """Statistics of the pieces of one tensor after another, for one thread: it keeps buffers for its blocks.

    `rms` errs by less than 1e-5 of itself, everything else is exact. Complex elements count by their modulus.
    """

    def __init__(self) -> None:
        self._total = Statistics()
        self._buffers: dict[torch.dtype, _Buffers] = {}
        self._kernel = block_kernel()

    def add(self, piece: torch.Tensor) -> None:
        """Takes a 1-D piece of any dtype and length into the statistics."""
        if piece.dtype not in _FLOATS:
            self._add_exactly(piece)
            return
        whole = piece.numel() // BLOCK * BLOCK
        rows = piece.numel() // ROW * ROW
        if whole:
            self._add_blocks(piece[:whole], BLOCK)
        if rows > whole:
            self._add_blocks(piece[whole:rows], rows - whole)
        if rows < piece.numel():
            self._add_exactly(piece[rows:])

    def take(self) -> Statistics:
        """The statistics of everything since the last call."""
        total, self._total = self._total, Statistics()
        return total

    def _add_blocks(self, piece: torch.Tensor, block: int) -> None:
        form = _FLOATS[piece.dtype]
        buffers = self._buffers.get(piece.dtype)
        if buffers is None:
            buffers = self._buffers[piece.dtype] = _Buffers(piece.dtype, form)
        count = piece.numel() // block
        highs, nonzeros, norms = buffers.results(count)
        norms = norms[:, : block // ROW]
        narrow = piece.element_size() == 2
        self._kernel(
            piece,
            piece.view(form.integer),
            form.magnitude,
            buffers.magnitudes[:block],
            buffers.wide[:block],
            narrow,
            highs,
            nonzeros,
            norms,
        )
        squares = norms.double().square().sum(dim=1).tolist()
        quick = Statistics()
        largest, sum_of_squares = 0, 0.0
        for index, (high, nonzero) in enumerate(zip(highs.tolist(), nonzeros.tolist(), strict=True)):
            if high and not form.square_floor <= high < form.square_ceiling:
                self._add_exactly(piece[index * block : (index + 1) * block])
                continue
            quick.numel += block
            quick.zeros += block - nonzero
            largest = max(largest, high)
            sum_of_squares += squares[index]
        if quick.numel:
            bits = torch.tensor(largest, dtype=form.integer)
            quick.absmax = float(bits.view(piece.dtype))
            quick.rms = math.sqrt(sum_of_squares / quick.numel)
            self._total.merge(quick)

    def _add_exactly(self, piece: torch.Tensor) -> None:
        for first in range(0, piece.numel(), BLOCK):
            block = piece[first : first + BLOCK]
            exact = _byte_statistics if block.element_size() == 1 else _float64_statistics
            self._total.merge(exact(block))


# --- the quick way ------------------------------------------------------------------------------------


def scan_blocks(
    piece: torch.Tensor,
    bits: torch.Tensor,
    magnitude: int,
    magnitudes: torch.Tensor,
    wide: torch.Tensor,
    narrow: bool,
    highs: torch.Tensor,
    nonzeros: torch.Tensor,
    norms: torch.Tensor,
) -> None:
    """Largest bits [n], number of elements that are not zero [n] and norms of the rows [n, rows] of n blocks.

    `magnitudes` and `wide` are room for one block. The norm kernel sums in float32, so rows are short and
    their norms meet in float64 elsewhere: a row of 1,024 in lanes of at least 4 adds 256 squares, which
    errs by at most 256 · 2^-24 = 1.5e-5 of the sum and half of that in the norm, even if every rounding goes
    one way.
    """
    block = magnitudes.numel()
    for index in range(highs.numel()):
        values = piece.narrow(0, index * block, block)
        torch.bitwise_and(bits.narrow(0, index * block, block), magnitude, out=magnitudes)
        low, high = torch.aminmax(magnitudes)
        highs[index].copy_(high)
        if bool(low == 0):
            nonzeros[index].copy_(torch.count_nonzero(magnitudes))
        else:
            nonzeros[index].fill_(block)
        if narrow:  # for these the norm kernel is slow, or rounds its result to their own few digits
            wide.copy_(values)
            values = wide
        torch.linalg.vector_norm(values.view(norms.size(1), -1), 2.0, [1], False, out=norms[index])


@functools.cache
def block_kernel() -> Callable[..., Any]:
    """`scan_blocks` as a TorchScript program, which runs without Python's global lock.

    As plain Python two threads wait for that lock after every operation and are hardly faster than one.
    TorchScript is deprecated; where torch no longer has it, the plain function does the same more slowly.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return cast("Callable[..., Any]", torch.jit.script(scan_blocks))
        except (AttributeError, NotImplementedError, OSError, RuntimeError):
            return scan_blocks


class _Buffers:
    """Room for one block at a time and for the results of a piece, used again and again."""

    def __init__(self, dtype: torch.dtype, form: _FloatForm) -> None:
        self.magnitudes = torch.empty(BLOCK, dtype=form.integer)
        self.wide = torch.empty(BLOCK if dtype.itemsize == 2 else 0)
        self._norm_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._highs = torch.empty(0, dtype=form.integer)
        self._nonzeros = torch.empty(0, dtype=torch.int64)
        self._norms = torch.empty(0, BLOCK // ROW, dtype=self._norm_dtype)

    def results(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._highs.numel() < count:
            self._highs = torch.empty(count, dtype=self._highs.dtype)
            self._nonzeros = torch.empty(count, dtype=torch.int64)
            self._norms = torch.empty(count, BLOCK // ROW, dtype=self._norm_dtype)
        return self._highs[:count], self._nonzeros[:count], self._norms[:count]


# --- the exact way ------------------------------------------------------------------------------------


def _float64_statistics(piece: torch.Tensor) -> Statistics:
    """Any dtype and any values, in float64: several times slower, used only where the quick way cannot be."""
    if piece.dtype.is_complex:
        wide = piece.to(torch.complex128)
        magnitudes = torch.where(torch.isnan(wide), torch.nan, wide.abs())
    else:
        magnitudes = piece.double().abs()
    numel = piece.numel()
    nan = int(torch.count_nonzero(magnitudes != magnitudes))
    inf = int(torch.count_nonzero(magnitudes == math.inf))
    zeros = numel - int(torch.count_nonzero(magnitudes))
    if nan or inf:
        magnitudes = torch.nan_to_num(magnitudes, nan=0.0, posinf=0.0)
    absmax = float(magnitudes.max())
    return _scaled(Statistics(numel, nan, inf, zeros, absmax), magnitudes, None)


def _byte_statistics(piece: torch.Tensor) -> Statistics:
    """Dtypes of one byte: counts of the 256 patterns say everything."""
    counts = torch.bincount(piece.view(torch.uint8), minlength=256)
    patterns = torch.arange(256, dtype=torch.uint8)
    if piece.dtype == torch.bool:
        magnitudes = (patterns != 0).double()
    elif piece.dtype.is_floating_point:
        magnitudes = patterns.view(piece.dtype).float().double().abs()
    else:
        magnitudes = patterns.view(piece.dtype).double().abs()
    present = counts > 0
    magnitudes, counts = magnitudes[present], counts[present]
    nan, inf = (int(counts[which].sum()) for which in (magnitudes.isnan(), magnitudes.isinf()))
    zeros = int(counts[magnitudes == 0].sum())
    magnitudes = torch.nan_to_num(magnitudes, nan=0.0, posinf=0.0)
    absmax = float(magnitudes.max())
    return _scaled(Statistics(piece.numel(), nan, inf, zeros, absmax), magnitudes, counts)


def _scaled(found: Statistics, magnitudes: torch.Tensor, counts: torch.Tensor | None) -> Statistics:
    """`found` with its `rms`, from float64 magnitudes scaled by the largest: no square overflows."""
    if found.absmax:
        squares = (magnitudes / found.absmax).square()
        total = float(squares.sum() if counts is None else (counts * squares).sum())
        found.rms = found.absmax * math.sqrt(total / found.finite)
    return found


# --- tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _FloatForm:
    """A float's bits as an integer: mask of the magnitude, and the range of largest magnitudes for which a
    sum of squares in the kernel's precision neither overflows nor loses digits.

    float32 sums: 2^10 squares below (2^58)² stay below 2^127; from 2^-44 on, what underflows is less than
    1e-5 of the sum even if subnormals are flushed to zero. Outside, NaN and Inf included, the exact way
    takes over.
    """

    integer: torch.dtype
    magnitude: int
    square_floor: int
    square_ceiling: int


def _form(dtype: torch.dtype, integer: torch.dtype, floor: float, ceiling: float) -> _FloatForm:
    low, high = (int(torch.tensor(value, dtype=dtype).view(integer)) for value in (floor, ceiling))
    return _FloatForm(integer, torch.iinfo(integer).max, low, high)


_FLOATS = {
    torch.bfloat16: _form(torch.bfloat16, torch.int16, 2.0**-44, 2.0**58),
    torch.float16: _form(torch.float16, torch.int16, 0.0, math.inf),
    torch.float32: _form(torch.float32, torch.int32, 2.0**-44, 2.0**58),
    torch.float64: _form(torch.float64, torch.int64, 2.0**-400, 2.0**480),
}
# Elements. A block of bfloat16, its magnitudes and its float32 copy are 1 MB: they fit a core's cache.
BLOCK = 128 << 10
ROW = 1024
