"""Attention in plain Python, small and slow, so that an explanation can compute what it says without torch.

Matrices are lists of rows. Floats are float64; `rounded` makes the narrower dtypes of them.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from operator import mul

Matrix = list[list[float]]


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    return float(sum(map(mul, left, right)))


def softmax(scores: Sequence[float]) -> list[float]:
    """Probabilities of one row, the maximum subtracted first. A row of nothing but −inf is NaN, as in torch."""
    largest = max(scores)
    if math.isnan(sum(scores)) or largest == -math.inf:
        return [math.nan] * len(scores)
    powers = [math.exp(score - largest) for score in scores]
    total = sum(powers)
    return [power / total for power in powers]


def entropy_nats(probs: Sequence[float]) -> float:
    """−Σ p ln p in nats; 0·ln 0 is 0."""
    return -sum(p * math.log(p) for p in probs if p > 0)


def normal(generator: random.Random, rows: int, columns: int, deviation: float = 1.0) -> Matrix:
    """Independent normal numbers of mean 0."""
    return [[generator.gauss(0.0, deviation) for _ in range(columns)] for _ in range(rows)]


def product(left: Matrix, right: Matrix) -> Matrix:
    """The matrix product; 0·NaN and 0·inf are NaN as IEEE 754 has it."""
    columns = list(zip(*right, strict=True))
    return [[dot(row, column) for column in columns] for row in left]


def deviation(numbers: Sequence[float]) -> float:
    """The root of the mean square about the mean."""
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / len(numbers))


def spectral_norm(matrix: Matrix, steps: int = 100) -> float:
    """The largest singular value ‖M‖₂, by power iteration on MᵀM."""
    transposed = [list(column) for column in zip(*matrix, strict=True)]
    vector = [1.0 / math.sqrt(len(transposed))] * len(transposed)
    length = 0.0
    for _ in range(steps):
        mapped = [dot(row, [dot(line, vector) for line in matrix]) for row in transposed]
        length = math.sqrt(dot(mapped, mapped))
        vector = [number / length for number in mapped]
    return math.sqrt(length)


def divided(left: float, right: float) -> float:
    """left / right as IEEE 754 has it, where Python raises for a zero."""
    if right == 0:
        undefined = left == 0 or math.isnan(left)
        return math.nan if undefined else math.copysign(math.inf, left) * math.copysign(1.0, right)
    return left / right


# --- narrower dtypes ----------------------------------------------------------------------------------


def rounded(number: float, dtype: str) -> float:
    """`number` as "float16", "bfloat16" or "float32" holds it; ±inf beyond the dtype's largest number.

    To nearest, ties to even (IEEE 754-2019 §4.3.1).
    """
    if not math.isfinite(number):
        return number
    if dtype == "bfloat16":
        bits = _bits(rounded(number, "float32"), "float32")
        bits += 0x7FFF + (bits >> 16 & 1)
        return _value(bits & 0xFFFF0000, "float32")
    try:
        return _value(_bits(float(number), dtype), dtype)
    except OverflowError:
        return math.copysign(math.inf, number)


def largest(dtype: str) -> float:
    """The largest finite number of a dtype."""
    bits, word = _LARGEST[dtype]
    return _value(bits, word)


def spacing(number: float, dtype: str) -> float:
    """From a positive `number` of the dtype to the next larger one."""
    word = "float32" if dtype == "bfloat16" else dtype
    step = 0x10000 if dtype == "bfloat16" else 1
    return _value(_bits(rounded(number, dtype), word) + step, word) - rounded(number, dtype)


def _bits(number: float, dtype: str) -> int:
    bits: int = struct.unpack(_INTEGER[dtype], struct.pack(_FLOAT[dtype], number))[0]
    return bits


def _value(bits: int, dtype: str) -> float:
    number: float = struct.unpack(_FLOAT[dtype], struct.pack(_INTEGER[dtype], bits))[0]
    return number


_FLOAT = {"float16": "<e", "float32": "<f"}
_INTEGER = {"float16": "<H", "float32": "<I"}
# The bit pattern of the largest number, and in which word it stands.
_LARGEST = {
    "float16": (0x7BFF, "float16"),
    "bfloat16": (0x7F7F0000, "float32"),
    "float32": (0x7F7FFFFF, "float32"),
}
