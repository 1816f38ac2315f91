"""Block-scaled products: the single-rounding fma, promotion by each formula, tiles and groups, and what promotion is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc import DscError
from dsc.hardware.device import accumulation
from dsc.numerics.formats import BF16, F8E4M3, F8E5M2, round_to, widen
from dsc.numerics.scale import RULES, dequantize, quantize
from dsc.numerics.tensorcore import (
    Accumulation,
    fma,
    fused_dot_add,
    grouped_scaled_matmul,
    grouped_scaled_matmul_k,
    scaled_matmul,
)

HOPPER = accumulation("h800/wgmma")


def nearest_float32(x: Fraction) -> np.float32:
    """x rounded to nearest even by comparing neighbours exactly."""
    with np.errstate(over="ignore"):
        guess = np.float32(float(x))
        candidates = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min((c for c in candidates if np.isfinite(c)), key=lambda c: (abs(Fraction(float(c)) - x), int(c.view(np.uint32)) & 1))


def exact_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> list[int]:
    terms = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    return [int(nearest_float32(Fraction(x) * Fraction(y) + Fraction(z)).view(np.uint32)) for x, y, z in terms]


def test_fma_of_random_values() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(20_000).astype(np.float32) * np.exp2(rng.integers(-30, 30, 20_000)).astype(np.float32) for _ in range(3))
    assert fma(a, b, c).view(np.uint32).tolist() == exact_fma(a, b, c)


def test_fma_rounds_once_where_float64_cannot_see_the_side() -> None:
    """c plus half a unit of c plus less than float64 holds: float64 rounds to the midpoint, float32 then to even, wrong half the time."""
    rng = np.random.default_rng(1)
    c = rng.uniform(1, 2, 500).astype(np.float32)
    just_below = (1 + 2.0**-23, 1 - 2.0**-23)  # product 1 - 2^-46
    just_above = (1 + 2048 * 2.0**-23, 1 - 4095 * 2.0**-24)  # product 1 + 2^-36
    for x, y in (just_below, just_above):
        for scale in (1.0, 2.0**60, 2.0**-60, 2.0**-110):
            a, b = np.full(500, x * 2.0**-12, np.float32), np.full(500, y * 2.0**-12 * scale, np.float32)
            for addend in (c * np.float32(scale), -c * np.float32(scale)):
                expected = exact_fma(a, b, addend)
                assert fma(a, b, addend).view(np.uint32).tolist() == expected
                in_float64 = (a.astype(np.float64) * b + addend).astype(np.float32)
                assert 0.3 < np.mean(in_float64.view(np.uint32) != expected) < 0.7


@settings(max_examples=300)
@given(*(st.floats(width=32, allow_nan=False, allow_infinity=False) for _ in range(3)))
def test_fma_of_any_finite_values(a: float, b: float, c: float) -> None:
    got = fma(*(np.array([v], np.float32) for v in (a, b, c)))[0]
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    limit = Fraction(2) ** 128 - Fraction(2) ** 103
    if abs(exact) >= limit:
        assert got == np.inf * (1 if exact > 0 else -1)
    else:
        assert Fraction(float(got)) == Fraction(float(nearest_float32(exact)))


def test_fma_of_special_values() -> None:
    one, inf, nan = np.float32(1), np.float32(np.inf), np.float32(np.nan)
    assert fma(inf, one, one * np.ones(1, np.float32))[0] == inf
    assert fma(one, one, -inf * np.ones(1, np.float32))[0] == -inf
    for a, b, c in ((inf, one, -inf), (inf, np.float32(0), one), (nan, one, one), (one, one, nan)):
        assert np.isnan(fma(a, b, np.array([c]))[0])


def exact_node(a: np.ndarray, b: np.ndarray, c: float, model: Accumulation, bias: int) -> Fraction:
    """Section 2 of arXiv 2511.10909 in exact rationals, for finite values: one output."""
    terms = []
    for x, y in zip(a, b, strict=True):
        if x and y:
            terms.append((Fraction(float(x)) * Fraction(float(y)), max(np.frexp(x)[1] - 1, 1 - bias) + max(np.frexp(y)[1] - 1, 1 - bias)))
    if c:
        terms.append((Fraction(c), max(np.frexp(c)[1] - 1, -126)))
    if not terms:
        return Fraction(0)
    unit = Fraction(2) ** (int(max(e for _, e in terms)) - model.fraction_bits)
    total = sum(int(value / unit) for value, _ in terms) * unit
    if not total:
        return Fraction(0)
    exponent = np.frexp(float(total))[1] - 1
    keep = Fraction(2) ** (int(exponent) - model.result_bits)
    return int(total / keep) * keep


@given(
    st.integers(0, 32),
    st.sampled_from([F8E4M3, F8E5M2]),
    st.sampled_from(["h800/wgmma", "b200/tcgen05"]),
    st.integers(3, 20),
    st.integers(0, 2**32 - 1),
)
def test_node_equals_rational_arithmetic(size: int, fmt: Any, name: str, fraction_bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = replace(accumulation(name), fraction_bits=fraction_bits)
    a, b = (round_to(rng.standard_normal((2, size)) * np.exp2(rng.integers(-12, 6, (2, size))), fmt) for _ in range(2))
    c = np.where(rng.random((2, 2)) < 0.3, 0, rng.standard_normal((2, 2)) * np.exp2(rng.integers(-30, 30, (2, 2)))).astype(np.float32)
    got = fused_dot_add(a, b, c, model)
    for i in range(2):
        for j in range(2):
            assert Fraction(float(got[i, j])) == exact_node(widen(a[i]), widen(b[j]), float(c[i, j]), model, fmt.bias)


def by_loop(a: Any, sa: Any, b: Any, sb: Any, a_tile: tuple[int, int], b_tile: tuple[int, int], model: Accumulation) -> np.ndarray:
    """One output at a time: nodes, then the promotion formula in exact rationals rounded where the formula rounds."""

    def fl(x: Fraction) -> Fraction:
        return Fraction(float(nearest_float32(x)))

    out = np.empty((len(a), len(b)), np.float32)
    size = a.shape[1]
    for m in range(len(a)):
        for n in range(len(b)):
            acc, partial, start = Fraction(0), np.zeros((1, 1), np.float32), 0
            while start < size:
                ends = [start - start % step + step for step in (a_tile[1], b_tile[1], model.interval) if step]
                stop = min(size, *ends)
                for k in range(start, stop, model.products):
                    nodes = slice(k, min(k + model.products, stop))
                    partial = fused_dot_add(a[m : m + 1, nodes], b[n : n + 1, nodes], partial, model)
                p = Fraction(float(partial[0, 0]))
                x, y = Fraction(float(sa[m // a_tile[0], start // a_tile[1]])), Fraction(float(sb[n // b_tile[0], start // b_tile[1]]))
                if stop == size or (model.interval and stop % model.interval == 0):
                    if model.formula == "deepgemm":
                        acc = fl(fl(x * y) * p + acc)
                    elif model.formula == "cublas":
                        first, second = (y, x) if b_tile[0] == 1 and a_tile[0] > 1 else (x, y)
                        acc = fl(fl(p * first) * second + acc)
                    else:
                        acc = fl(acc + fl(fl(p * x) * y))
                    partial = np.zeros((1, 1), np.float32)
                else:
                    nx, ny = Fraction(float(sa[m // a_tile[0], stop // a_tile[1]])), Fraction(float(sb[n // b_tile[0], stop // b_tile[1]]))
                    partial = np.array([[float(fl(p * fl(fl(x * y) / fl(nx * ny))))]], np.float32)
                start = stop
            out[m, n] = float(acc)
    return out


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 90)),
    st.sampled_from([((1, 16), (16, 16)), ((1, 16), (1, 16)), ((4, 16), (1, 16)), ((1, 24), (3, 40)), ((1, 100), (2, 100))]),
    st.sampled_from(["h800/wgmma", "rtx4090/mma-sync", "b200/tcgen05"]),
    st.sampled_from([0, 16, 32, 48]),
    st.sampled_from(["deepgemm", "cublas", "unfused"]),
    st.integers(0, 2**32 - 1),
)
def test_scaled_matmul_equals_a_loop(size: Any, tiles: Any, name: str, interval: int, formula: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = replace(accumulation(name), interval=interval, formula=formula)
    m, n, k = size
    a_tile, b_tile = tiles
    # Neighbouring scales differ by up to 2^8.
    x, w = (rng.standard_normal((rows, k)) * np.exp2(rng.integers(-4, 4, (rows, k // 8 + 1)).repeat(8, 1)[:, :k]) for rows in (m, n))
    (a, sa), (b, sb) = quantize(x, a_tile), quantize(w, b_tile)
    got = scaled_matmul(a, sa, b, sb, a_tile, b_tile, model)
    assert np.array_equal(got, by_loop(a, sa, b, sb, a_tile, b_tile, model))


def random_operands(m: int, n: int, k: int, seed: int = 0, rule: str = "deepseek-v3") -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal((rows, k)).astype(np.float32) for rows in (m, n))
    return *quantize(x, (1, 128), rule=RULES[rule]), *quantize(w, (128, 128), rule=RULES[rule])


@pytest.mark.parametrize("shape", [(1, 600, 300), (600, 1, 300), (70, 576, 257), (33, 300, 1), (5, 5, 4096)])
@pytest.mark.parametrize("name", ["h800/wgmma", "b200/tcgen05"])
def test_output_blocks_do_not_matter(name: str, shape: tuple[int, int, int]) -> None:
    a, sa, b, sb = random_operands(*shape)
    whole = scaled_matmul(a, sa, b, sb, model=accumulation(name))
    row, column = shape[0] - 1, shape[1] - 1
    one = scaled_matmul(a[row:], sa[row:], b[column:], sb[column // 128 :], model=accumulation(name))
    assert whole[row, column] == one[0, 0]
    first = scaled_matmul(a[:1], sa[:1], b[:128], sb[:1], model=accumulation(name))
    assert np.array_equal(whole[:1, :128], first)


def test_formulas_differ_in_float32_but_not_with_power_of_two_scales() -> None:
    shape = (48, 200, 1024)
    results = {}
    for rule in ("deepseek-v3", "deepgemm-ue8m0"):
        operands = random_operands(*shape, rule=rule)
        for formula in ("deepgemm", "cublas", "unfused"):
            results[rule, formula] = scaled_matmul(*operands, model=replace(HOPPER, formula=formula))
    for one, other in (("deepgemm", "cublas"), ("deepgemm", "unfused"), ("cublas", "unfused")):
        assert (results["deepseek-v3", one] != results["deepseek-v3", other]).mean() > 0.3
        assert np.array_equal(results["deepgemm-ue8m0", one], results["deepgemm-ue8m0", other])
    as_bf16 = [round_to(results["deepseek-v3", f], BF16).view(np.uint16) for f in ("deepgemm", "cublas", "unfused")]
    assert (as_bf16[0] != as_bf16[1]).mean() < 1e-3
    assert (as_bf16[0] != as_bf16[2]).mean() < 1e-3


def test_result_types_round_once_at_the_end() -> None:
    operands = random_operands(7, 9, 300)
    for name in ("float32", "ideal/exact", "h800/wgmma"):
        wide = scaled_matmul(*operands, model=accumulation(name))
        assert wide.dtype == np.float32
        for dtype in (ml_dtypes.bfloat16, np.float16):
            narrow = scaled_matmul(*operands, model=accumulation(name), dtype=dtype)
            assert narrow.dtype == dtype
            if name != "ideal/exact":  # which goes from float64 to the result in one step
                assert np.array_equal(narrow.view(np.uint16), wide.astype(dtype).view(np.uint16))


def test_plain_float32_is_within_its_derived_bound_and_ideal_is_exact() -> None:
    m, n, k = 20, 30, 500
    a, sa, b, sb = random_operands(m, n, k)
    x, w = dequantize(a, sa, (1, 128), dtype=np.float64), dequantize(b, sb, (128, 128), dtype=np.float64)
    magnitudes = np.abs(x) @ np.abs(w).T
    plain = scaled_matmul(a, sa, b, sb)
    # each operand is rounded once, and k products and k - 1 sums in any order: (1 + 2^-24)^(k + 2) - 1, Higham 2002, section 3.1
    assert (np.abs(plain - x @ w.T) <= magnitudes * np.expm1((k + 2) * np.log1p(2.0**-24))).all()
    ideal = scaled_matmul(a, sa, b, sb, model=accumulation("ideal/exact"))
    exact = [[sum((Fraction(p) * Fraction(q) for p, q in zip(r, s, strict=True)), Fraction(0)) for s in w[:3]] for r in x[:3]]
    error = np.array([[float(abs(Fraction(float(ideal[i, j])) - exact[i][j])) for j in range(3)] for i in range(3)])
    assert (error <= np.abs(ideal[:3, :3]) * 2.0**-24 * (1 + 1e-6)).all()


@pytest.mark.parametrize("groups", [[5, 0, 130, 1], [136], [0, 0, 3]])
@pytest.mark.parametrize("name", ["float32", "h800/wgmma"])
def test_grouped_rows_and_grouped_k(name: str, groups: list[int]) -> None:
    model = accumulation(name)
    rng = np.random.default_rng(5)
    rows, k, n = sum(groups), 160, 24
    x = rng.standard_normal((rows, k)).astype(np.float32)
    w = rng.standard_normal((len(groups), n, k)).astype(np.float32)
    dy = rng.standard_normal((rows, n)).astype(np.float32)
    a, sa = quantize(x, (1, 128))
    b, sb = quantize(w, (128, 128))
    forward = grouped_scaled_matmul(a, sa, b, sb, groups, model=model)
    (xt, sxt), (dyt, sdyt) = quantize(x, (128, 1), groups=groups), quantize(dy, (128, 1), groups=groups)
    gradient = grouped_scaled_matmul_k(dyt.T, sdyt.T, xt.T, sxt.T, groups, model=model)
    assert forward.shape == (rows, n)
    assert gradient.shape == (len(groups), n, k)
    start = 0
    for expert, count in enumerate(groups):
        part = slice(start, start + count)
        one = scaled_matmul(*quantize(x[part], (1, 128)), *quantize(w[expert], (128, 128)), model=model)
        assert np.array_equal(forward[part], one)
        (left, s_left), (right, s_right) = quantize(dy[part], (128, 1)), quantize(x[part], (128, 1))
        one = scaled_matmul(left.T, s_left.T, right.T, s_right.T, (1, 128), (1, 128), model)
        assert np.array_equal(gradient[expert], one)
        if not count:
            assert not gradient[expert].any()
        start += count


def test_special_values_reach_the_result_and_only_where_they_belong() -> None:
    a, sa, b, sb = random_operands(4, 300, 256)
    nan, inf = F8E5M2.dtype.type(np.nan), F8E5M2.dtype.type(np.inf)
    a = widen(a).astype(F8E5M2.dtype)
    a[1, 200], a[2, 3] = nan, inf
    for name in ("h800/wgmma", "b200/tcgen05", "float32"):
        out = scaled_matmul(a, sa, b, sb, model=accumulation(name))
        assert np.isfinite(out[[0, 3]]).all()
        assert np.isnan(out[1]).all()
        assert (~np.isfinite(out[2])).all()


# What promotion is for. K = 4096, codes with unit scales, the exact product of the same codes as reference.


def unpromoted_and_promoted(data: str) -> dict[str, tuple[float, float, float]]:
    """By model: largest error / largest |reference|, median relative error, mean signed relative error."""
    rng = np.random.default_rng(2024)
    draw: Callable[[tuple[int, int]], np.ndarray] = rng.standard_normal if data == "zero-mean" else rng.random
    a, b = (round_to(draw((64, 4096)), F8E4M3) for _ in range(2))
    unit = [np.ones((64, 1), np.float32)] * 2
    reference = widen(a, np.float64) @ widen(b, np.float64).T
    figures = {}
    for name in ("h800/wgmma", "b200/tcgen05"):
        for interval in (0, 128):
            model = replace(accumulation(name), interval=interval)
            error = scaled_matmul(a, unit[0], b, unit[1], (1, 4096), (1, 4096), model) - reference
            relative = error / np.abs(reference)
            key = f"{name} {'promoted' if interval else 'unpromoted'}"
            figures[key] = (
                float(np.abs(error).max() / np.abs(reference).max()),
                float(np.median(np.abs(relative))),
                float(relative.mean()),
            )
    return figures


@pytest.mark.parametrize("data", ["zero-mean", "positive"])
def test_promotion_every_128_makes_the_error_ten_times_smaller(data: str) -> None:
    """DeepSeek-V3 report, section 3.5.2: close to 2% at K = 4096 without promotion, of data and by a measure that it does not name."""
    figures = unpromoted_and_promoted(data)
    unpromoted, promoted = figures["h800/wgmma unpromoted"], figures["h800/wgmma promoted"]
    assert 1e-3 < unpromoted[0] < 1e-1
    assert promoted[0] * 10 < unpromoted[0]
    if data == "positive":  # truncation is toward zero, so without promotion every element is too small, and by much
        assert promoted[1] * 10 < unpromoted[1]
        assert unpromoted[2] < -1e-2
        assert abs(promoted[2]) < 1e-3
    else:  # partial sums, and with them the truncations, grow as sqrt(K): the median gains sqrt(4096 / 128) = 5.7, the largest errors more
        assert promoted[1] * 5.6 < unpromoted[1]
    # The wide accumulator does not need promotion: the two differ by less than the loss of one Hopper instruction.
    assert max(figures["b200/tcgen05 unpromoted"][0], figures["b200/tcgen05 promoted"][0]) < 2.0**-13 / 10


def test_promoted_error_is_within_the_bound_of_the_truncations() -> None:
    """Four nodes per promoted 128: each loses less than 33 units of 2^(e - 13) in alignment and one of 2^(e_out - 13) in the result."""
    rng = np.random.default_rng(11)
    a, b = (round_to(rng.random((32, 1024)), F8E4M3) for _ in range(2))
    unit = np.ones((32, 1), np.float32)
    got = scaled_matmul(a, unit, b, unit, (1, 1024), (1, 1024), HOPPER)
    x, y = widen(a, np.float64), widen(b, np.float64)
    # Data in [0, 1): partial sums of 128 are below 128, so e and e_out are at most 6; promotion adds 8 float32 roundings.
    bound = 1024 / 32 * (33 + 1) * 2.0 ** (6 - 13) + 8 * (x @ y.T) * 2.0**-24
    error = x @ y.T - got
    assert (error >= -8 * (x @ y.T) * 2.0**-24).all(), "truncation of positive terms only loses"
    assert (error <= bound).all()
    assert error.max() > 2.0 ** (6 - 13), "and it does lose"


def test_rescaling_at_tile_edges_without_promotion() -> None:
    """Unpromoted, the register is rescaled where scales change; with powers of two that is exact."""
    a, _, b, _ = random_operands(16, 16, 512)
    model = replace(HOPPER, interval=0)
    one, many = np.ones((16, 1), np.float32), np.ones((16, 4), np.float32)
    whole = scaled_matmul(a, one, b, one, (1, 512), (1, 512), model)
    assert np.array_equal(scaled_matmul(a, many, b, many, (1, 128), (1, 128), model), whole)
    steps = np.exp2(np.arange(4, dtype=np.float32))[None] * many
    zeros = a.copy()
    zeros[:, 128:] = 0
    only_first = scaled_matmul(zeros, steps, b, many, (1, 128), (1, 128), model)
    assert np.array_equal(only_first, scaled_matmul(zeros, one, b, one, (1, 512), (1, 512), model))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a, s: scaled_matmul(a, s, a, s, (1, 64), (1, 128)),
            r"scales \[4, 2\] of a \[4, 256\] in tiles \[1, 64\], expected \[4, 4\]",
        ),
        (lambda a, s: scaled_matmul(a, s, a[:, :128], s), r"shapes \[4, 256\] and \[4, 128\], expected equal last dimensions"),
        (lambda a, s: scaled_matmul(widen(a), s, a, s), r"operand a is float32\[4, 256\], expected a matrix of f8e4m3 or f8e5m2"),
        (lambda a, s: scaled_matmul(a, s, a, s, (1, 128), (1, 128), dtype=np.int32), "result type int32, expected one of f32, bf16, f16"),
        (lambda a, s: grouped_scaled_matmul(a, s, a[None], s[None], [3]), r"groups \[3\] for 1 experts and 4 rows of a"),
        (lambda a, s: grouped_scaled_matmul_k(a, s, a, s, [100]), r"groups \[100\] for 1 experts and 256 columns of a"),
        (lambda a, s: fused_dot_add(a, a, np.zeros((4, 4), np.float32), HOPPER), "256 products for one node, expected at most 32"),
        (
            lambda a, s: fused_dot_add(a[:, :8], a[:, :8], np.zeros((4, 3), np.float32), HOPPER),
            r"accumulator of shape \[4, 3\], expected \[4, 4\]",
        ),
        (lambda a, s: fused_dot_add(a, a, np.zeros((4, 4), np.float32), accumulation("float32")), "only that has nodes"),
    ],
)
def test_errors_say_what_was_found_and_expected(call: Callable[..., object], message: str) -> None:
    a, s = quantize(np.ones((4, 256), np.float32), (1, 128))
    with pytest.raises(DscError, match=message):
        call(a, s)
