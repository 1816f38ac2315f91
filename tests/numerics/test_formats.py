"""The one cast, against an exact rational model and against three libraries nobody here wrote: torch, ml_dtypes, onnx.reference."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from functools import cache
from itertools import pairwise

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from dsc import DscError
from dsc.numerics.formats import BF16, E5M6, E8M0, F8E4M3, F8E5M2, F16, F32, FORMATS, Format, round_to, widen

FP8 = [F8E4M3, F8E5M2]
NEAREST = [F8E4M3, F8E5M2, BF16, F16]  # nearest even over the whole range
TORCH = {F8E4M3: torch.float8_e4m3fn, F8E5M2: torch.float8_e5m2, E8M0: torch.float8_e8m0fnu, BF16: torch.bfloat16, F16: torch.float16}
ONNX = {F8E4M3: TensorProto.FLOAT8E4M3FN, F8E5M2: TensorProto.FLOAT8E5M2}


def bits_of(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def random_patterns(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32).view(np.float32)


@cache
def magnitudes(fmt: Format) -> list[Fraction]:
    """Every finite value >= 0 of a format in ascending order: index = code. From the definition of the format, not from its tables."""
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    bias = 2 ** (e - 1) - 1
    values = []
    for code in range(2 ** (e + m)):
        exponent, mantissa = code >> m, code & (2**m - 1)
        if exponent == 2**e - 1 and (fmt is not F8E4M3 or mantissa == 2**m - 1):  # E4M3 "fn" gives up its last code only
            break
        values.append(Fraction(mantissa + (2**m if exponent else 0), 2**m) * Fraction(2) ** (max(exponent, 1) - bias))
    return values


def nearest_even(x: Fraction, fmt: Format) -> int:
    """Code of |x| rounded to nearest, ties to the even code; len(magnitudes) stands for overflow."""
    values, x = magnitudes(fmt), abs(x)
    above = bisect_left(values, x)
    if above == len(values):
        step = values[-1] - values[-2]
        return above if x - values[-1] >= step / 2 else above - 1  # the largest code is odd everywhere but in E4M3, which saturates
    if values[above] == x or above == 0:
        return above
    down, up = x - values[above - 1], values[above] - x
    return above if up < down or (up == down and above % 2 == 0) else above - 1


def expected_code(x: float, fmt: Format) -> int:
    """Code with sign by the rational model, saturated for FP8, infinity beyond the range for BF16 and F16."""
    code = nearest_even(Fraction(x), fmt)
    if code == len(magnitudes(fmt)) and fmt in FP8:
        code -= 1
    return code | (int(np.signbit(x)) << (fmt.bits - 1))


@pytest.mark.parametrize("fmt", [*NEAREST, E5M6], ids=str)
def test_constants_are_those_of_the_definition(fmt: Format) -> None:
    values = magnitudes(fmt)
    assert Fraction(fmt.max) == values[-1]
    assert Fraction(fmt.min_subnormal) == values[1]
    assert Fraction(fmt.min_normal) == values[2**fmt.mantissa_bits]
    assert fmt.stored_bytes == fmt.bits / 8


@pytest.mark.parametrize("fmt", [F8E4M3, F8E5M2, BF16, F16], ids=str)
def test_constants_are_those_of_ml_dtypes(fmt: Format) -> None:
    info = ml_dtypes.finfo(fmt.dtype)
    assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == tuple(map(float, (info.max, info.smallest_normal, info.smallest_subnormal)))


@pytest.mark.parametrize("fmt", [*NEAREST, E5M6], ids=str)
def test_every_code_point_decodes_and_returns(fmt: Format) -> None:
    values = magnitudes(fmt)
    shift = 4 if fmt is E5M6 else 0
    codes = np.arange(len(values)) << shift
    for sign in (0, 1):
        stored = (codes | (sign << (fmt.bits - 1 + shift))).astype(f"u{fmt.dtype.itemsize}").view(fmt.dtype)
        wide = widen(stored)
        assert wide.dtype == np.float32
        assert [Fraction(float(w)) for w in wide] == [v * (-1) ** sign for v in values]
        assert np.array_equal(bits_of(round_to(wide, fmt)), bits_of(stored))
        assert np.array_equal(bits_of(round_to(widen(stored, np.float64), fmt)), bits_of(stored))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fmt", NEAREST, ids=str)
def test_every_rounding_boundary(fmt: Format, dtype: type) -> None:
    """All midpoints and their neighbours on both sides: in float64 the neighbours are within 2^-52, so a second rounding would show."""
    values = [*magnitudes(fmt), 2 * magnitudes(fmt)[-1] - magnitudes(fmt)[-2]]  # one more, as if the exponent went on
    exact = [(a + b) / 2 for a, b in pairwise(values)]
    middles = np.array([float(m) for m in exact], dtype)
    assert [Fraction(float(m)) for m in middles] == exact
    below, above = np.arange(len(middles)), np.arange(1, len(middles) + 1)
    if fmt in FP8:
        above[-1] -= 1  # saturated
    ties = np.where(below % 2 == 0, below, above)
    for sign in (1, -1):
        signed = np.uint64(0 if sign == 1 else 1 << (fmt.bits - 1))
        for x, codes in ((middles, ties), (np.nextafter(middles, dtype(0)), below), (np.nextafter(middles, dtype(np.inf)), above)):
            assert np.array_equal(bits_of(round_to(sign * x, fmt)), codes.astype(np.uint64) | signed)


@pytest.mark.parametrize("fmt", NEAREST, ids=str)
def test_cast_matches_torch_after_clipping(fmt: Format) -> None:
    x = adversarial(fmt)
    clipped = torch.from_numpy(x).clamp(-fmt.max, fmt.max) if fmt in FP8 else torch.from_numpy(x)
    same_bits(round_to(x, fmt), clipped.to(TORCH[fmt]).view(torch.uint8 if fmt in FP8 else torch.int16).numpy().view(fmt.dtype))


@pytest.mark.parametrize("fmt", NEAREST, ids=str)
def test_cast_matches_ml_dtypes_after_clipping(fmt: Format) -> None:
    x = adversarial(fmt)
    with np.errstate(all="ignore"):
        same_bits(round_to(x, fmt), (np.clip(x, -fmt.max, fmt.max) if fmt in FP8 else x).astype(fmt.dtype))


@pytest.mark.parametrize("fmt", FP8, ids=str)
def test_cast_matches_the_onnx_reference(fmt: Format) -> None:
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], saturate=1)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]), helper.make_tensor_value_info("scale", TensorProto.FLOAT, [])]
    zero = helper.make_tensor("zero", ONNX[fmt], [], [0])
    graph = helper.make_graph([node], "cast", inputs, [helper.make_tensor_value_info("y", ONNX[fmt], ["n"])], [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=onnx.IR_VERSION_2024_3_25)
    x = adversarial(fmt)
    with np.errstate(all="ignore"):
        (y,) = ReferenceEvaluator(model).run(None, {"x": x, "scale": np.float32(1)})
    same_bits(round_to(x, fmt), y)


def adversarial(fmt: Format) -> np.ndarray:
    """Random bit patterns, values spread over the format's range, its boundaries with neighbours, and values about its largest."""
    rng = np.random.default_rng(1)
    values = np.array([float(v) for v in magnitudes(fmt)], np.float64)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    edge = np.array([fmt.max, 1.02 * fmt.max, 1.04 * fmt.max, 1.2 * fmt.max, 0.0, fmt.min_normal, fmt.min_subnormal / 2])
    with np.errstate(over="ignore"):
        edges = np.concatenate([edge, [np.inf, np.nan, 1e-45, 3.4e38, 464.0, 464.0001, 465.0, 61439.0, 61440.0]]).astype(np.float32)
        spread = (
            rng.standard_normal(500_000) * np.exp2(rng.uniform(np.log2(fmt.min_subnormal) - 3, np.log2(fmt.max) + 1, 500_000))
        ).astype(np.float32)
    parts = [
        random_patterns(500_000),
        spread,
        middles,
        np.nextafter(middles, np.float32(0)),
        np.nextafter(middles, np.float32(np.inf)),
        edges,
    ]
    x = np.concatenate(parts)
    return np.concatenate([x, -x])


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bit for bit, any NaN for any NaN."""
    assert ours.dtype == theirs.dtype
    nan = np.isnan(widen(ours))
    assert np.array_equal(nan, np.isnan(widen(theirs)))
    assert np.array_equal(bits_of(ours)[~nan], bits_of(theirs)[~nan])


@pytest.mark.parametrize("fmt", FP8, ids=str)
def test_without_saturation_overflow_goes_to_what_the_format_has(fmt: Format) -> None:
    x = adversarial(fmt)
    with np.errstate(all="ignore"):
        theirs = x.astype(fmt.dtype)
    ours = round_to(x, fmt, saturate=False)
    same_bits(ours, theirs)
    assert (widen(ours) != widen(round_to(x, fmt))).any()


@pytest.mark.parametrize(
    ("fmt", "inf", "nan"),
    [(F8E4M3, 0x7E, 0x7F), (F8E5M2, 0x7B, 0x7F), (E5M6, 0x7BF0, 0x7E00), (E8M0, 0xFE, 0xFF), (BF16, 0x7F80, None), (F16, 0x7C00, None)],
    ids=str,
)
def test_infinity_and_nan(fmt: Format, inf: int, nan: int | None) -> None:
    for dtype in (np.float32, np.float64):
        codes = round_to(np.array([np.inf, -np.inf, np.nan, -np.nan], dtype), fmt)
        assert bits_of(codes)[0] == inf
        if fmt is not E8M0:  # which has no sign: a negative value has no near neighbour in it
            assert bits_of(codes)[1] == inf | (1 << (8 * fmt.dtype.itemsize - 1))
        assert np.isnan(widen(codes[2:])).all()
        if nan is not None:
            assert bits_of(codes)[2] == nan


def test_e8m0_matches_torch_and_ml_dtypes_after_clipping() -> None:
    powers = np.exp2(np.arange(-140, 128, dtype=np.float64))
    with np.errstate(all="ignore"):
        x = np.concatenate([powers, 1.5 * powers, 1.4999 * powers, 1.5001 * powers, [0.0, -0.0, np.inf]]).astype(np.float32)
    x = np.concatenate([x, np.abs(random_patterns(200_000))])
    clipped = np.clip(x, np.float32(2.0**-127), np.float32(2.0**127))
    with np.errstate(all="ignore"):
        same_bits(round_to(x, E8M0), clipped.astype(E8M0.dtype))
    same_bits(round_to(x, E8M0), torch.from_numpy(clipped).to(TORCH[E8M0]).view(torch.uint8).numpy().view(E8M0.dtype))
    assert np.isnan(widen(round_to(np.array([-1.0, -np.inf], np.float32), E8M0))).all()
    assert widen(round_to(powers[13:], E8M0)).tolist() == powers[13:].tolist()


def e5m6_by_the_published_rule(x: np.float32) -> tuple[Fraction, bool]:
    """Magnitude, and whether it is the nearest: truncated to float16's grid, cut to six mantissa bits, then a unit more where the kept low
    bit plus the low 17 bits of the float32 pattern exceed 2^16."""
    pattern = int(np.abs(x).view(np.uint32))
    exact = abs(Fraction(float(x)))
    exponent = max((pattern >> 23) - 127, -14)
    unit = Fraction(2) ** (exponent - 6)
    units = int(exact / unit)
    units += (units % 2) + pattern % 2**17 > 2**16
    return units * unit, abs(units * unit - exact) * 2 <= unit


def test_e5m6_rounds_as_published() -> None:
    values = np.array([float(v) for v in magnitudes(E5M6)], np.float32)
    middles = (values[1:] + values[:-1]) / 2
    rng = np.random.default_rng(2)
    small = (rng.uniform(0, 2.0**-14, 20_000)).astype(np.float32)
    tiny = np.exp2(rng.uniform(-149, -20, 5_000)).astype(np.float32)
    spread = np.exp2(rng.uniform(-14, 15.98, 20_000)).astype(np.float32)
    x = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9)), small, tiny, spread])
    rounded = [e5m6_by_the_published_rule(v) for v in x]
    ours = widen(round_to(x, E5M6))
    assert [Fraction(float(v)) for v in ours] == [value for value, _ in rounded]
    assert np.array_equal(widen(round_to(-x, E5M6)), -ours)
    # nearest even where numbers are normal; not so below: the published rule reads the wrong bits there, and we keep it
    normal = x >= E5M6.min_normal
    assert all(near for (_, near), n in zip(rounded, normal, strict=True) if n)
    misses = [not near for (_, near), is_small in zip(rounded, (x > 2.0**-20) & (x < 2.0**-15), strict=True) if is_small]
    assert 0.3 < np.mean(misses) < 0.6


def test_e5m6_saturates_and_rounds_to_nearest_even_in_the_normal_range() -> None:
    x = np.array([65024, 65279, 65280, 65504, 1e9, -1e9, np.inf], np.float32)
    assert widen(round_to(x, E5M6)).tolist() == [65024] * 5 + [-65024, 65024]
    x = np.concatenate([random_patterns(100_000, 3), np.exp2(np.random.default_rng(3).uniform(-14, 16, 20_000)).astype(np.float32)])
    x = x[(np.abs(x) >= E5M6.min_normal) & (np.abs(x) <= E5M6.max)]
    codes = bits_of(round_to(x, E5M6)) >> 4
    assert codes.tolist() == [nearest_even(Fraction(float(v)), E5M6) | (int(v < 0) << 11) for v in x]


@given(
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5), elements=st.floats(width=64)),
    st.sampled_from(NEAREST),
)
def test_any_shape_and_any_float64(x: np.ndarray, fmt: Format) -> None:
    y = round_to(x, fmt)
    assert y.shape == x.shape
    assert y.dtype == fmt.dtype
    for value, code in zip(x.ravel(), bits_of(y).ravel(), strict=True):
        if np.isfinite(value):
            assert int(code) == expected_code(float(value), fmt)


def test_blocks_and_strides_do_not_matter() -> None:
    x = random_patterns(300_000, 5).reshape(600, 500)
    for fmt in FORMATS.values():
        whole = bits_of(round_to(x, fmt))
        assert np.array_equal(whole[::3, ::-2], bits_of(round_to(x[::3, ::-2], fmt)))
        assert np.array_equal(whole[17], bits_of(round_to(x[17], fmt)))


def test_float64_to_float32_is_nearest_and_narrow_inputs_are_exact() -> None:
    x = np.random.default_rng(6).standard_normal(1000)
    assert np.array_equal(round_to(x, F32), x.astype(np.float32))
    h = x.astype(np.float16)
    assert np.array_equal(bits_of(round_to(h, BF16)), bits_of(round_to(h.astype(np.float64), BF16)))


def test_widen_refuses_other_bytes() -> None:
    with pytest.raises(DscError, match="codes of type int8, expected one of float8_e4m3fn"):
        widen(np.zeros(3, np.int8))
