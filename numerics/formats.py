"""Number formats: what each one can hold, and the one cast into it that every backend must match.

A reader finds the table of formats (`FORMATS`), `round_to` (float32 or float64 to a format) and `widen` (exact decoding).
What the cast does, per format:

| value                | f8e4m3, f8e5m2         | e5m6                    | e8m0                    | bf16, f16, f32       |
|----------------------|------------------------|-------------------------|-------------------------|----------------------|
| in range             | nearest, ties to even  | as published, see below | nearest, ties upward    | nearest, ties to even|
| beyond the largest   | the largest, with sign | the largest, with sign  | 2^127                   | infinity, with sign  |
| infinity             | the largest, with sign | the largest, with sign  | 2^127                   | infinity, with sign  |
| NaN                  | NaN (code 0x7f)        | NaN                     | NaN (code 0xff)         | NaN                  |
| below the smallest   | subnormals, signed zero| subnormals, signed zero | 2^-127; negative: NaN   | subnormals, signed 0 |

float64 is rounded once, never by way of a rounded float32.

E5M6 is float16 without its last four mantissa bits, and is held as float16 values on that grid. DeepSeek's TileKernels casts to it by
truncating float32 to float16 and adding one unit when the last kept bit plus the low 17 bits of the *float32* pattern exceed 2^16. That is
nearest-even for normal numbers. Below 2^-14 the float32 exponent no longer matches the kept bits, so half of those values go to the farther
neighbour; they lie more than 30 binades under the largest value of their tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..ir.errors import require

Array = NDArray[Any]

BLOCK = 1 << 16
"""Elements worked on at a time: the scratch of one block (about 1 MB) stays in a core's second-level cache."""


@dataclass(frozen=True)
class Format:
    """A number format. `max`, `min_normal` and `min_subnormal` are positive values; `stored_bytes` is what one element takes in memory."""

    name: str
    dtype: np.dtype[Any]
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    min_normal: float
    min_subnormal: float
    has_inf: bool
    stored_bytes: float

    def __str__(self) -> str:
        return self.name


def _format(name: str, dtype: DTypeLike, exponent_bits: int, mantissa_bits: int, max: float, *, has_inf: bool = True) -> Format:
    bits = 1 + exponent_bits + mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    min_normal = 2.0 ** (1 - bias)
    return Format(
        name, np.dtype(dtype), bits, exponent_bits, mantissa_bits, bias, max,
        min_normal, min_normal * 2.0**-mantissa_bits, has_inf, bits / 8,
    )  # fmt: skip


F8E4M3 = _format("f8e4m3", ml_dtypes.float8_e4m3fn, 4, 3, 448.0, has_inf=False)
F8E5M2 = _format("f8e5m2", ml_dtypes.float8_e5m2, 5, 2, 57344.0)
E5M6 = _format("e5m6", np.float16, 5, 6, 65024.0)
E8M0 = Format("e8m0", np.dtype(ml_dtypes.float8_e8m0fnu), 8, 8, 0, 127, 2.0**127, 2.0**-127, 2.0**-127, False, 1.0)
BF16 = _format("bf16", ml_dtypes.bfloat16, 8, 7, (2.0 - 2.0**-7) * 2.0**127)
F16 = _format("f16", np.float16, 5, 10, 65504.0)
F32 = _format("f32", np.float32, 8, 23, (2.0 - 2.0**-23) * 2.0**127)

FORMATS = {fmt.name: fmt for fmt in (F8E4M3, F8E5M2, E5M6, E8M0, BF16, F16, F32)}

NAN_CODE_FP8 = 0x7F
"""What `cvt.rn.satfinite` writes for a NaN, in E4M3 and E5M2 alike."""


def round_to(x: ArrayLike, fmt: Format, *, saturate: bool = True) -> Array:
    """`x` (any shape; float32 or float64, or a narrower float, which is widened exactly first) cast to `fmt`, in `fmt.dtype`.

    The table at the head of this module says what happens to every kind of value. With `saturate=False` an FP8 value that rounds beyond the
    largest becomes what the format has there instead: NaN in E4M3, infinity in E5M2. Other formats ignore the option.
    """
    source = np.asarray(x)
    if (source.dtype == np.float32 and (fmt is BF16 or fmt is F16)) or (source.dtype == np.float64 and fmt is F16):
        with np.errstate(all="ignore"):
            return source.astype(fmt.dtype, order="C")  # these casts round once, as the table says
    values = np.ascontiguousarray(source).reshape(-1)
    out = np.empty(values.shape, fmt.dtype)
    for start in range(0, values.size, BLOCK):
        block = slice(start, start + BLOCK)
        round_block(to_float32(values[block], odd=fmt is not F32), fmt, out[block], saturate=saturate)
    return out.reshape(source.shape)


def round_block(x: NDArray[np.float32], fmt: Format, out: Array, *, saturate: bool = True) -> None:
    """`round_to` for one cache-sized block: `x` contiguous float32 [n] into `out` [n] of `fmt.dtype`. `x` is left as it was."""
    with np.errstate(all="ignore"):
        if fmt is F8E4M3 or fmt is F8E5M2:
            _round_fp8(x, fmt, out.view(np.uint8), saturate)
        elif fmt is E5M6:
            out.view(np.uint16)[:] = _e5m6_bits(x)
        elif fmt is E8M0:
            out[:] = np.where(x < 0, np.float32(np.nan), np.clip(x, np.float32(fmt.min_normal), np.float32(fmt.max)))
        else:
            out[:] = x.astype(fmt.dtype)


def to_float32(x: Array, *, odd: bool = False) -> NDArray[np.float32]:
    """float32 of `x`; exact for every narrower format. float64 is rounded to nearest even, or, with `odd`, to odd.

    Rounding to odd (inexact results take the neighbour whose last bit is set) keeps enough of the discarded bits that a second rounding,
    to a format at least two bits narrower, gives what one rounding would have given (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", IEEE Trans. Computers 57(4), 2008).
    """
    if x.dtype == np.float32:
        return x
    if x.dtype != np.float64:
        return widen(x)
    with np.errstate(all="ignore"):
        nearest = x.astype(np.float32)
        if odd:
            missing = x - nearest.astype(np.float64)
            round_to_odd(nearest, missing)
    return nearest


def round_to_odd(nearest: Array, missing: Array) -> None:
    """Turn `nearest` (in place), whose exact value is `nearest + missing`, into the same number rounded to odd."""
    bits: NDArray[np.signedinteger[Any]] = nearest.view(np.int32 if nearest.dtype == np.float32 else np.int64)
    # A NaN in `missing` means that nothing finite was lost; an infinite one that a finite number overflowed, and must come back.
    even = (bits & 1 == 0) & (missing != 0) & ~np.isnan(missing)
    # Magnitudes order like their bit patterns: one step up in bits is one step away from zero.
    outward = (missing > 0) == (bits >= 0)
    bits += np.where(even, np.where(outward, 1, -1), 0).astype(bits.dtype)


def _round_fp8(x: NDArray[np.float32], fmt: Format, codes: NDArray[np.uint8], saturate: bool) -> None:
    """Codes of `x`, rounded by a float32 addition: `|x| + 2^(e + 23 - m)` has units of 2^(e - m), those of m mantissa bits at e."""
    magnitude = np.abs(x)
    if saturate:  # clip, which keeps NaN, is three times as fast in numpy as minimum and maximum
        np.clip(magnitude, np.float32(0), np.float32(fmt.max), out=magnitude)
    power = (magnitude.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    np.clip(power, np.float32(fmt.min_normal), np.float32(np.inf), out=power)  # subnormals share the smallest normal number's unit
    power *= np.float32(2.0 ** (23 - fmt.mantissa_bits))
    magnitude += power
    magnitude -= power
    special = np.isnan(magnitude @ magnitude) or not saturate  # a sum that is cheap, and NaN where any magnitude is
    over = ~(magnitude <= fmt.max) if special else None  # NaN here: the sum above overflowed
    # Dividing by 2^(127 - bias) lines the exponents up, subnormals with subnormals, so the code is the top of the float32 pattern.
    magnitude *= np.float32(2.0 ** (fmt.bias - 127))
    bits = magnitude.view(np.uint32)
    bits >>= np.uint32(23 - fmt.mantissa_bits)
    signs = power.view(np.uint32)
    np.right_shift(x.view(np.uint32), np.uint32(24), out=signs)
    signs &= np.uint32(0x80)
    bits |= signs
    np.copyto(codes, bits, casting="unsafe")
    if special:
        if not saturate:
            codes[over] = (signs[over] | 0x7C) if fmt.has_inf else NAN_CODE_FP8
        codes[np.isnan(x)] = NAN_CODE_FP8


def _e5m6_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float16 patterns of `x` on the E5M6 grid: truncated to float16, cut by four bits, then one unit added by the published rule."""
    bits = np.clip(np.abs(x), np.float32(0), np.float32(E5M6.max)).view(np.uint32)
    exponent = bits >> 23
    significand = (bits & 0x7FFFFF) | 0x800000
    subnormal = significand >> np.minimum(126 - np.minimum(exponent, 113), 24)
    half = np.where(exponent >= 113, (bits >> 13) - (112 << 10), subnormal)
    code = half >> 4
    code += (code & 1) + (bits & 0x1FFFF) > 0x10000
    code <<= 4
    code[np.isnan(x)] = 0x7E00
    return (code | ((x.view(np.uint32) >> 16) & 0x8000)).astype(np.uint16)


@cache
def _values_of_codes(dtype: np.dtype[Any]) -> NDArray[np.float32]:
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def widen(x: Array, dtype: DTypeLike = np.float32) -> Array:
    """The exact values of `x` (any shape, any format's storage type) as float32 or float64. Rounds only float64 asked for as float32."""
    if x.dtype.itemsize == 1:
        require(x.dtype in _ONE_BYTE, f"codes of type {x.dtype}, expected one of {', '.join(str(d) for d in _ONE_BYTE)}")
        # "wrap" spares numpy the bounds check, which a byte cannot fail
        x = _values_of_codes(x.dtype).take(x.view(np.uint8), mode="wrap")
    return x.astype(dtype, copy=False)


_ONE_BYTE = (F8E4M3.dtype, F8E5M2.dtype, E8M0.dtype)
