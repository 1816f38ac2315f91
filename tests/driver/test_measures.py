"""The measures of a difference against their formulas written out, infinities and NaN included."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsc.driver.measure import flat, measure, same_bits

SHAPES = hnp.array_shapes(max_dims=3, max_side=5)
FLOATS = st.floats(-1e6, 1e6, width=32)


@st.composite
def pairs(draw: st.DrawFn, elements: st.SearchStrategy[float] = FLOATS) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPES)
    return draw(hnp.arrays(np.float32, shape, elements=elements)), draw(hnp.arrays(np.float32, shape, elements=elements))


@given(pairs())
@settings(max_examples=200, deadline=None)
def test_against_torch(both: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = both
    if np.array_equal(a, b) or not a.any() or not b.any():
        return
    found = measure(a, b)
    x, y = (torch.tensor(v, dtype=torch.float64).flatten() for v in both)
    error = torch.linalg.vector_norm(y - x) / torch.linalg.vector_norm(x)
    assert found.relative_l2 == pytest.approx(error.item(), rel=1e-12)
    assert found.max_error == torch.max(torch.abs(y - x)).item()
    assert found.sqnr_db == pytest.approx(-20 * math.log10(error), rel=1e-9, abs=1e-9)
    inner = sum(p * q for p, q in zip(a.ravel().astype(float), b.ravel().astype(float), strict=True))
    # the sum may cancel: the error is that of the terms, not of the sum
    slack = 1e-14 * x.numel() * (x.abs() * y.abs()).sum().item()
    assert found.cosine * math.sqrt((x @ x).item() * (y @ y).item()) == pytest.approx(inner, rel=1e-9, abs=slack)
    expected = 1 - 2 * inner / (x.square().sum() + y.square().sum()).item()  # DeepGEMM's testing/numeric.py
    assert found.calc_diff == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(width=32)))
@settings(max_examples=100, deadline=None)
def test_nothing_differs_from_itself(a: np.ndarray) -> None:
    """NaN and infinities included."""
    found = measure(a, a.copy())
    assert (found.relative_l2, found.max_error, found.sqnr_db, found.cosine, found.calc_diff) == (0, 0, math.inf, 1, 0)


@given(pairs(st.floats(width=32)))
@settings(max_examples=200, deadline=None)
def test_what_differs_never_measures_zero(both: tuple[np.ndarray, np.ndarray]) -> None:
    """A difference anywhere is a relative difference above 0, infinite, or NaN, which no tolerance admits."""
    a, b = both
    different = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    assert (measure(a, b).relative_l2 != 0) == different.any()
    assert (measure(a, b).max_error != 0) == different.any()


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("a", "b", "relative", "largest"),
    [
        ([NAN, 3.0], [NAN, 4.0], 1 / 3, 1.0),  # NaN in the same place is no difference and no signal
        ([INF, 3.0], [INF, 4.0], 1 / 3, 1.0),
        ([INF, 3.0], [-INF, 3.0], NAN, INF),
        ([NAN, 3.0], [1.0, 3.0], NAN, NAN),
        ([1.0, 3.0], [NAN, 3.0], NAN, NAN),
        ([1.0, 3.0], [INF, 3.0], INF, INF),
        ([0.0, 0.0], [0.0, 2.0], INF, 2.0),  # noise without a signal
        ([0.0, 2.0], [0.0, 0.0], 1.0, 2.0),
        ([0.0], [-0.0], 0.0, 0.0),
        ([], [], 0.0, 0.0),
    ],
)
def test_edges(a: list[float], b: list[float], relative: float, largest: float) -> None:
    found = measure(np.array(a), np.array(b))
    np.testing.assert_allclose(found.relative_l2, relative, rtol=1e-15)
    np.testing.assert_equal(found.max_error, largest)


def test_narrow_types_are_measured_exactly() -> None:
    a = np.array([1.0, 448.0, 2.0**-9], ml_dtypes.float8_e4m3fn)
    b = np.array([1.0, 416.0, 0.0], ml_dtypes.float8_e4m3fn)
    assert measure(a, b).max_error == 32.0
    assert measure(a, b).relative_l2 == math.sqrt(32**2 + 2.0**-18) / math.sqrt(1 + 448**2 + 2.0**-18)
    wide = np.array([2**53 + 1], np.int64), np.array([2**53 + 3], np.int64)
    assert measure(*wide).max_error > 0


def test_same_bits_tells_what_equality_does_not() -> None:
    zero, one = np.zeros(2, np.float32), np.ones(2, np.float32)
    assert same_bits(zero, zero.copy())
    assert same_bits(np.full(2, np.nan), np.full(2, np.nan))
    assert not same_bits(zero, -zero)
    assert not same_bits(one, one.astype(np.float64))
    assert not same_bits(one, one.reshape(2, 1))
    assert same_bits(np.arange(6).reshape(2, 3).T, np.ascontiguousarray(np.arange(6).reshape(2, 3).T))
    assert [x.shape for x in flat([zero, (one, (zero,))])] == [(2,), (2,), (2,)]
