"""Device functions that kernels share: exact casts to and from narrow formats, and float32 functions whose error is known.

A cast rounds once, to nearest even, and saturates FP8, as `numerics.formats.round_to` does to the bit. A GPU's conversions do that by
themselves; Triton's interpreter does not (BF16 truncates and loses subnormals, FP8 rounds ties away from zero, loses carries and does not
saturate, NaN and infinity become numbers), so there the code is computed from the bits. `INTERPRET` is a constant when a kernel is
compiled: nothing of this remains in machine code.
"""

from __future__ import annotations

import triton.language as tl

from . import INTERPRET as _INTERPRET
from .jit import device

INTERPRET = tl.constexpr(_INTERPRET)


@device
def bits_of(x):
    """The pattern of float32 x, as int32."""
    return x.to(tl.int32, bitcast=True)


@device
def from_bits(bits):
    """The float32 of an int32 pattern."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@device
def to_bf16(x):
    """float32 x as bfloat16."""
    if INTERPRET:
        bits = bits_of(x)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x != x, bits | 0x400000, rounded)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@device
def _fp8_code(x, EXPONENT_BIAS: tl.constexpr, MANTISSA: tl.constexpr):
    """The code of float32 x, |x| at most the format's largest: |x| + 2^(e + 23 - m) has units of 2^(e - m), those of m bits at e."""
    magnitude = from_bits(bits_of(x) & 0x7FFFFFFF)
    power = from_bits(bits_of(x) & 0x7F800000)
    power = tl.maximum(power, 2.0 ** (1 - EXPONENT_BIAS)) * 2.0 ** (23 - MANTISSA)
    rounded = (magnitude + power) - power
    code = bits_of(rounded * 2.0 ** (EXPONENT_BIAS - 127)) >> (23 - MANTISSA)
    code = tl.where(x != x, 0x7F, code | ((bits_of(x) >> 24) & 0x80))
    return code.to(tl.uint8)


@device
def _clamped(x, LARGEST: tl.constexpr):
    """x within +-LARGEST; NaN stays."""
    return tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))


@device
def _e4m3_code(x, SATURATE: tl.constexpr):
    over = tl.abs(x) > 464.0
    code = _fp8_code(_clamped(x, 448.0), 7, 3)
    return code if SATURATE else tl.where(over, 0x7F, code).to(tl.uint8)


@device
def _e5m2_code(x, SATURATE: tl.constexpr):
    over = tl.abs(x) >= 61440.0
    code = _fp8_code(_clamped(x, 57344.0), 15, 2)
    return code if SATURATE else tl.where(over, ((bits_of(x) >> 24) & 0x80) | 0x7C, code).to(tl.uint8)


@device
def to_e4m3(x, SATURATE: tl.constexpr = True):
    """float32 x as E4M3: beyond 448 the largest number or, without SATURATE, NaN where it rounds beyond; NaN is code 0x7f."""
    if INTERPRET:
        return _e4m3_code(x, SATURATE).to(tl.float8e4nv, bitcast=True)
    over = tl.abs(x) > 464.0
    x = _clamped(x, 448.0)
    if not SATURATE:
        x = tl.where(over, float("nan"), x)
    return x.to(tl.float8e4nv)


@device
def to_e5m2(x, SATURATE: tl.constexpr = True):
    """float32 x as E5M2: beyond 57344 the largest number or, without SATURATE, infinity where it rounds beyond; NaN is code 0x7f."""
    if INTERPRET:
        return _e5m2_code(x, SATURATE).to(tl.float8e5, bitcast=True)
    code = _clamped(x, 57344.0).to(tl.float8e5)
    if not SATURATE:
        infinite = ((bits_of(x) >> 24) & 0x80) | 0x7C
        code = tl.where(tl.abs(x) >= 61440.0, infinite, code.to(tl.uint8, bitcast=True)).to(tl.uint8).to(tl.float8e5, bitcast=True)
    return code


@device
def to_e5m6(x):
    """float32 x on the E5M6 grid, as float16: truncated to float16, cut by four bits, one unit added by the rule of TileKernels.

    It has no hardware: the same integer operations everywhere (`numerics.formats` says what they mean).
    """
    sign = (bits_of(x) >> 16) & 0x8000
    bits = bits_of(_clamped(x, 65024.0)) & 0x7FFFFFFF
    exponent = bits >> 23
    significand = (bits & 0x7FFFFF) | 0x800000
    subnormal = significand >> tl.minimum(126 - tl.minimum(exponent, 113), 24)
    half = tl.where(exponent >= 113, (bits >> 13) - (112 << 10), subnormal)
    code = half >> 4
    code = (code + tl.where((code & 1) + (bits & 0x1FFFF) > 0x10000, 1, 0)) << 4
    code = tl.where(x != x, 0x7E00, code) | sign
    return code.to(tl.int16).to(tl.float16, bitcast=True)


@device
def narrow(x, FORMAT: tl.constexpr, SATURATE: tl.constexpr = True):
    """float32 x as what a slot of `format` FORMAT holds: a dtype (not e8m0), or FP8 `_bytes`."""
    if FORMAT == "bf16":
        return to_bf16(x)
    elif FORMAT == "f8e4m3":
        return to_e4m3(x, SATURATE)
    elif FORMAT == "f8e5m2":
        return to_e5m2(x, SATURATE)
    elif FORMAT == "f8e4m3_bytes":
        return _e4m3_code(x, SATURATE)
    elif FORMAT == "f8e5m2_bytes":
        return _e5m2_code(x, SATURATE)
    elif FORMAT == "e5m6":
        return to_e5m6(x)
    elif FORMAT == "f16":
        return x.to(tl.float16)
    else:
        return x


@device
def widen(x, FORMAT: tl.constexpr):
    """The exact value of x, loaded from a slot of `format` FORMAT, as float32 (float64 is rounded to it)."""
    if FORMAT == "e8m0":
        code = x.to(tl.int32)
        return from_bits(tl.where(code == 0, 0x400000, tl.where(code == 255, 0x7FC00000, code << 23)))
    elif FORMAT == "f8e4m3_bytes" or (INTERPRET and FORMAT == "f8e4m3"):
        code = x.to(tl.uint8, bitcast=True).to(tl.int32)
        magnitude = from_bits((code & 0x7F) << 20) * 2.0**120
        magnitude = tl.where((code & 0x7F) == 0x7F, float("nan"), magnitude)
        return from_bits(bits_of(magnitude) | ((code & 0x80) << 24))
    elif FORMAT == "f8e5m2_bytes" or (INTERPRET and FORMAT == "f8e5m2"):
        code = x.to(tl.uint8, bitcast=True).to(tl.int32)
        magnitude = from_bits((code & 0x7F) << 21) * 2.0**112
        special = from_bits(tl.where((code & 0x7F) == 0x7C, 0x7F800000, 0x7FC00000))
        magnitude = tl.where((code & 0x7F) >= 0x7C, special, magnitude)
        return from_bits(bits_of(magnitude) | ((code & 0x80) << 24))
    elif INTERPRET and FORMAT == "bf16":
        return from_bits(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@device
def exp(x):
    """e^x in float32 within 3 units in the last place, for every x: x = n ln 2 + r by Cody and Waite, then 2^n times e^r.

    The reduction costs less than half a unit, e^r of a small r at most 2.5 (NumPy's bound; `ex2.approx` after a rounded product has
    less). `tl.exp` of x itself would multiply x by log2 e in float32, which costs |x| units in the last place.
    """
    n = tl.floor(tl.minimum(tl.maximum(x, -150.0), 129.0) * 1.4426950408889634 + 0.5)
    r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, x))  # 0.693359375 has 9 bits: its product with n is exact
    half = tl.floor(n * 0.5)
    low = from_bits((half.to(tl.int32) + 127) << 23)
    high = from_bits(((n - half).to(tl.int32) + 127) << 23)
    return tl.where(x > 89.0, float("inf"), tl.where(x < -104.0, 0.0, tl.exp(r) * low * high))


@device
def sigmoid(x):
    """1 / (1 + e^-x) in float32, the division IEEE."""
    return tl.div_rn(1.0, 1.0 + exp(-x))


@device
def silu(x):
    """x / (1 + e^-x) in float32, the division IEEE."""
    return tl.div_rn(x, 1.0 + exp(-x))


@device
def larger(x, y):
    """The larger of two; NaN if either is. Of 0 and -0, of which the interpreter's takes either, their sum."""
    most, least = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL), tl.minimum(x, y)
    return tl.where((most == 0.0) & (least == 0.0), x + y, most)  # either may be a number, so neither is looked at alone


@device
def rounded(x, FORMAT: tl.constexpr):
    """float32 x on the grid of FORMAT, as float32."""
    return widen(narrow(x, FORMAT), FORMAT)


@device
def tanh(x):
    """tanh x in float32 within 3 units in the last place: a polynomial up to 0.625 (Cephes, tanhf), above it 1 - 2 / (e^2|x| + 1)."""
    z = x * x
    small = tl.fma(-5.70498872745e-3, z, 2.06390887954e-2)
    small = tl.fma(small, z, -5.37397155531e-2)
    small = tl.fma(small, z, 1.33314422036e-1)
    small = tl.fma(small, z, -3.33332819422e-1)
    small = tl.fma(small * z, x, x)
    magnitude = tl.abs(x)
    large = 1.0 - tl.div_rn(2.0, exp(magnitude + magnitude) + 1.0)
    return tl.where(magnitude < 0.625, small, tl.where(x < 0.0, -large, large))


@device
def swiglu_backward(gate, up, dy):
    """The gradients of silu(gate) * up by gate and up."""
    s = sigmoid(gate)
    return ((1.0 - s) * gate + 1.0) * s * up * dy, gate * s * dy


@device
def plus(x, ADDED, at, inside, FORMAT: tl.constexpr, PLUS: tl.constexpr):
    """float32 x; with PLUS rounded to FORMAT and what ADDED has at the same place added, which is of that format."""
    if PLUS:
        return rounded(x, FORMAT) + widen(tl.load(ADDED + at, mask=inside, other=0.0), FORMAT)
    else:
        return x


@device
def row_sum(x, inside):
    """The sum of what is inside of each row, [ROWS, 1], in the order of the reduction tree."""
    return tl.sum(tl.where(inside, x, 0.0), axis=1)[:, None]


@device
def row_max(x, inside):
    """The largest number inside each row, [ROWS, 1]; NaN if there is one, which `tl.max` drops."""
    nan = tl.max(tl.where(inside & (x != x), 1, 0), axis=1)[:, None]
    largest = tl.max(tl.where(inside & (x == x), x, -float("inf")), axis=1)[:, None]
    return tl.where(nan > 0, float("nan"), largest)


@device
def rms_norm(x, weight, inside, COLUMNS: tl.constexpr, eps):
    """x * rsqrt(mean(x^2) + eps) * weight of each row, the division and the root IEEE."""
    mean = tl.div_rn(row_sum(x * x, inside), COLUMNS * 1.0)
    return x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps)) * weight
