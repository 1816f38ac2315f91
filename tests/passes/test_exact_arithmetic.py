"""What simplify calls exact, against NumPy and ml_dtypes over every value of every narrow format."""

from __future__ import annotations

import math
from fractions import Fraction
from operator import add, floordiv, mul, sub, truediv

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc import backends
from dsc.backends.arrays import STORAGE, Array
from dsc.ir.core import Value
from dsc.ir.ops.elementwise import Cast
from dsc.ir.types import DType, Tensor
from dsc.passes.exact import exactly, holds, is_lossless
from dsc.passes.simplify import _composes

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # signalling NaNs, and what casts do
DTYPES = list(DType)


def values(dtype: DType) -> Array:
    """Every value of a dtype of up to 16 bits; of a wider one the edges, small numbers, and what narrower formats hold."""
    if dtype is DType.e5m6:
        return np.arange(2**16, dtype=np.uint16)[::16].view(np.float16)
    if dtype is DType.bool:
        return np.array([False, True])
    if dtype.bits <= 16:
        return np.arange(2**dtype.bits, dtype=f"u{dtype.bits // 8}").view(STORAGE[dtype])
    if dtype.is_int:
        limits = np.iinfo(STORAGE[dtype])
        return np.array([limits.min, limits.min + 1, *range(-300, 300), 2**24 - 1, 2**24 + 1, limits.max - 1, limits.max], STORAGE[dtype])
    with np.errstate(all="ignore"):
        narrow = [values(d).astype(STORAGE[dtype]) for d in (DType.f16, DType.bf16)]
        return np.concatenate([*narrow, np.array([0.1, -1 / 3, 1 + 2**-23, 2**31, -(2**63), 5e-324, 1.7e308], STORAGE[dtype])])


def run_cast(x: Array, source: DType, target: DType) -> Array:
    (result,) = backends.get("numpy").evaluate(Cast(Value(Tensor(source, x.shape), "x"), target), (x,))
    return np.asarray(result)


def same(a: Array, b: Array) -> bool:
    """Bit for bit, any NaN being as good as another."""
    bits = f"u{a.dtype.itemsize}"
    nan = np.isnan(a) & np.isnan(b) if a.dtype.kind in "fV" else np.zeros(a.shape, bool)
    return bool(np.array_equal(np.where(nan, 0, a.view(bits)), np.where(nan, 0, b.view(bits))))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_a_lossless_cast_can_be_undone(source: DType, target: DType) -> None:
    x = values(source)
    there = run_cast(x, source, target)
    finite = np.isfinite(x.astype(np.float64)) if source.is_float else np.ones(x.shape, bool)
    back = run_cast(there, target, source)
    if is_lossless(source, target):
        assert same(back[finite], x[finite])
        assert source.is_float <= target.is_float
    elif source is not target and target.is_float and (source.is_float or source.is_int) and target is not DType.e8m0:
        narrow = {DType.f8e4m3, DType.f8e5m2, DType.e5m6}
        assert target in narrow or not same(back, x), f"{source} to {target} loses nothing, and should be called lossless"


@pytest.mark.parametrize("source", DTYPES)
def test_casts_that_compose(source: DType) -> None:
    x = values(source)
    found = 0
    for between in DTYPES:
        middle = run_cast(x, source, between)
        for target in DTYPES:
            if _composes(source, between, target):
                found += 1
                assert same(run_cast(middle, between, target), run_cast(x, source, target)), f"{source} to {between} to {target}"
    assert found >= len(DTYPES) - 2


NARROW = {
    DType.f16: np.float16,
    DType.bf16: ml_dtypes.bfloat16,
    DType.f8e4m3: ml_dtypes.float8_e4m3fn,
    DType.f8e5m2: ml_dtypes.float8_e5m2,
    DType.e8m0: ml_dtypes.float8_e8m0fnu,
    DType.f32: np.float32,
}


@pytest.mark.parametrize("dtype", NARROW)
def test_a_dtype_holds_its_own_values_and_nothing_between(dtype: DType) -> None:
    own = values(dtype).astype(np.float64)
    own = np.unique(own[np.isfinite(own)])
    assert all(holds(float(v), dtype) for v in own[:: max(1, own.size // 3000)])
    between = (own[1:] + own[:-1]) / 2
    if dtype is not DType.f32:
        assert not any(holds(float(v), dtype) for v in between[:: max(1, between.size // 3000)] if v != 0 or dtype is DType.e8m0)
        assert not holds(2 * float(own[-1]), dtype)
        assert not holds(float(own[own > 0][0]) / 2, dtype)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.floats(width=32) | st.floats(width=16))
def test_holds_is_a_round_trip_through_the_format(value: float) -> None:
    for dtype in (DType.f32, DType.f16, DType.bf16):
        with np.errstate(all="ignore"):
            again = float(np.float64(value).astype(NARROW[dtype]))
        assert holds(value, dtype) == (again == value or math.isnan(value))


@given(st.integers(-(2**66), 2**66))
def test_integers(value: int) -> None:
    for dtype in (DType.i64, DType.i32, DType.i16, DType.i8, DType.u8):
        limits = np.iinfo(STORAGE[dtype])
        assert holds(value, dtype) == (limits.min <= value <= limits.max)
    assert holds(value, DType.f64) == (int(float(value)) == value)


numbers = st.integers(-300, 300) | st.floats(width=32, allow_nan=False) | st.sampled_from([0.5, -0.0, 0.1, 2.0**-140, 2.0**120])


@given(numbers, numbers, st.sampled_from([add, sub, mul, truediv]), st.sampled_from([DType.f32, DType.bf16, DType.f16, DType.f64]))
def test_float_arithmetic_is_exact_or_refused(a: float, b: float, function: object, dtype: DType) -> None:
    if function is truediv and b == 0:
        return
    result = exactly(function, a, b, dtype)  # type: ignore[arg-type]
    if result is None:
        return
    assert Fraction(result) == function(Fraction(a), Fraction(b))  # type: ignore[operator]
    by_numpy = {add: np.add, sub: np.subtract, mul: np.multiply, truediv: np.divide}[function](np.float32(a), np.float32(b))  # type: ignore[index]
    rounded = by_numpy.astype(STORAGE[dtype])
    assert (float(rounded), math.copysign(1, rounded)) == (result, math.copysign(1, result))


@given(st.integers(-200, 200), st.integers(-200, 200), st.sampled_from([add, sub, mul, floordiv]))
def test_integer_arithmetic_fits_or_is_refused(a: int, b: int, function: object) -> None:
    if function is floordiv and b == 0:
        return
    expected = function(a, b)  # type: ignore[operator]
    assert exactly(function, a, b, DType.i8) == (expected if -128 <= expected < 128 else None)  # type: ignore[arg-type]
