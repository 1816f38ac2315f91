"""Which numbers a dtype holds exactly, and arithmetic that needs no rounding: what may be computed in the IR itself."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isfinite
from typing import NamedTuple

from ..ir.types import DType

Number = int | float


class _Format(NamedTuple):
    """A binary float: significand bits with the hidden one, exponent of the least normal number, largest number."""

    precision: int
    least: int
    largest: Fraction


def _format(precision: int, least: int, most: int, significand: Fraction | None = None) -> _Format:
    largest = significand or 2 - Fraction(2) ** (1 - precision)
    return _Format(precision, least, largest * Fraction(2) ** most)


FORMATS = {
    DType.f64: _format(53, -1022, 1023),
    DType.f32: _format(24, -126, 127),
    DType.f16: _format(11, -14, 15),
    DType.bf16: _format(8, -126, 127),
    DType.e5m6: _format(7, -14, 15),
    DType.f8e4m3: _format(4, -6, 8, Fraction(7, 4)),  # the largest significand at the largest exponent is NaN
    DType.f8e5m2: _format(3, -14, 15),
    DType.e8m0: _format(1, -127, 127),
}

OPEN = frozenset({DType.f64, DType.f32, DType.f16, DType.bf16})
"""Floats that keep an infinity through every op: rounding to the others may saturate."""


def bounds(dtype: DType) -> tuple[int, int]:
    """The least and the largest number of an integer or bool dtype."""
    if dtype is DType.bool:
        return 0, 1
    return (0, 2**dtype.bits - 1) if dtype is DType.u8 else (-(2 ** (dtype.bits - 1)), 2 ** (dtype.bits - 1) - 1)


def holds(value: Number, dtype: DType) -> bool:
    """Whether `dtype` has exactly this number, or this infinity or NaN."""
    if not isfinite(value):
        return dtype in OPEN
    exact = Fraction(value)
    if not dtype.is_float:
        least, largest = bounds(dtype)
        return exact.denominator == 1 and least <= exact <= largest
    made = FORMATS[dtype]
    if dtype is DType.e8m0 and exact <= 0:
        return False
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()  # the denominator is a power of two
    quantum = Fraction(2) ** (max(exponent, made.least) - made.precision + 1)
    return abs(exact) <= made.largest and (exact / quantum).denominator == 1


def is_lossless(source: DType, target: DType) -> bool:
    """Whether a cast from `source` changes no number, infinity or NaN."""
    if target.is_float and target not in OPEN:
        return False
    if source.is_float:
        if not target.is_float:
            return False
        a, b = FORMATS[source], FORMATS[target]
        return a.precision <= b.precision and a.least - a.precision >= b.least - b.precision and a.largest <= b.largest
    least, largest = bounds(source)
    if target.is_float:
        return max(-least - 1, largest).bit_length() <= FORMATS[target].precision
    return bounds(target)[0] <= least and largest <= bounds(target)[1]


def exactly(function: Callable[[Number, Number], Number], a: Number, b: Number, dtype: DType) -> Number | None:
    """`function(a, b)` as a number of `dtype`, where no rounding is needed on the way (in float32 or wider); else None."""
    if not dtype.is_float:
        result = function(a, b)
        return result if holds(result, dtype) else None
    if not (isfinite(a) and isfinite(b) and holds(a, DType.f32) and holds(b, DType.f32)):
        return None
    result = function(float(a), float(b))  # IEEE arithmetic: it gives the sign of a zero
    unrounded = isfinite(result) and Fraction(result) == function(Fraction(a), Fraction(b))  # type: ignore[arg-type]
    return result if unrounded and holds(result, DType.f32) and holds(result, dtype) else None
