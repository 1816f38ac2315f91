"""LogFMT against levels computed with 50 decimal digits."""

from __future__ import annotations

from decimal import Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc import DscError
from dsc.numerics.logfmt import decode_logfmt, encode_logfmt


def levels_of(low: np.float32, step: np.float32, bits: int) -> list[Decimal]:
    """Zero and exp(low + step * (K - 1)) for every K."""
    with localcontext() as context:
        context.prec = 50
        return [Decimal(0), *((Decimal(float(low)) + Decimal(float(step)) * k).exp() for k in range(2 ** (bits - 1) - 1))]


def nearest_level(x: np.float32, levels: list[Decimal]) -> int:
    magnitude = abs(Decimal(float(x)))
    return min(range(len(levels)), key=lambda k: (abs(levels[k] - magnitude), k))


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize(("least", "largest"), [(1e-3, 7.0), (0.5, 0.75), (3e-12, 2.0), (2e-38, 3e38), (1e-45, 1e-40)])
def test_every_level_and_every_midpoint_of_a_range(bits: int, least: float, largest: float) -> None:
    """Around each level and each midpoint between levels, values go to the level nearest in linear space."""
    ends = np.array([least, largest], np.float32)
    _, low, step = encode_logfmt(ends, bits)
    levels = levels_of(low[0], step[0], bits)
    assert len(levels) == 2 ** (bits - 1)
    points = [*levels[1:], *((a + b) / 2 for a, b in pairwise(levels))]
    at = np.array([float(p) for p in points]).astype(np.float32)
    near = np.concatenate([np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(np.inf))])
    # Inside the tile's own range, and below it only where the range is capped: there zero is a neighbour.
    capped = np.log(largest / least) > 32 * np.log(2)
    near = near[(near <= ends[1]) & ((near >= ends[0]) | capped)]
    x = np.concatenate([ends, near, -near])
    codes, low_again, step_again = encode_logfmt(x, bits, tile=len(x))
    assert (low_again[0], step_again[0]) == (low[0], step[0])
    top = 2 ** (bits - 1)
    assert np.array_equal(codes >> (bits - 1), (x < 0).astype(codes.dtype))
    expected = [nearest_level(v, levels) for v in x]
    assert (codes & (top - 1)).tolist() == expected
    if least > 1e-38:  # among float32's subnormals there are fewer values than levels
        assert set(expected) >= set(range(1, top)), "every code is met"
    decoded = decode_logfmt(codes, low, step, bits, tile=len(x))
    assert np.allclose(decoded, [float(levels[k]) * np.sign(v) for k, v in zip(expected, x, strict=True)], rtol=2.0**-23, atol=1e-45)


def test_ends_of_a_tile_get_the_first_and_the_last_code() -> None:
    x = np.array([[0.25, -8.0, 0.0, 1.0]], np.float32)
    codes, low, step = encode_logfmt(x, 8)
    assert codes[0, :3].tolist() == [1, 0x80 | 127, 0]
    assert low[0, 0] == np.float32(np.log(0.25))
    assert step[0, 0] == np.float32(np.log(32) / 126)
    assert codes.dtype == np.uint8
    assert encode_logfmt(x, 10)[0].dtype == np.uint16


def test_range_is_capped_at_two_to_the_thirty_two() -> None:
    x = np.array([1.0, 2.0**-31, 2.0**-32, 0.9 * 2.0**-32, 0.51 * 2.0**-32, 0.49 * 2.0**-32, 1e-20], np.float32)
    codes, low, _ = encode_logfmt(x, 8)
    assert low[0] == np.float32(-32 * np.log(2))
    assert (codes[2:] == [1, 1, 1, 0, 0]).all()
    assert codes[1] > 1


def test_special_tiles() -> None:
    tiny, huge = np.float32(1e-45), np.finfo(np.float32).max
    x = np.array(
        [[0.0, -0.0, 0.0], [3.0, -3.0, 0.0], [np.inf, -1.0, 1e30], [np.nan, 1.0, -2.0], [tiny, -tiny, tiny], [huge, 1, -huge]], np.float32
    )
    with np.errstate(all="raise", under="ignore"):
        codes, low, step = encode_logfmt(x, 8)
        y = decode_logfmt(codes, low, step, 8)
    assert y[0].tolist() == [0, 0, 0]
    assert np.signbit(y[0]).tolist() == [False, True, False]
    assert (low[0, 0], step[0, 0], step[1, 0]) == (0, 0, 0)
    assert np.allclose(y[1], x[1], rtol=2.0**-22)
    assert np.allclose(y[2], [huge, 0, 1e30], rtol=0.1)
    assert np.isnan(y[3]).all()
    assert y[4].tolist() == x[4].tolist()
    assert np.isfinite(y[5]).all()
    assert np.allclose(y[5, ::2], x[5, ::2], rtol=1e-4)


@given(st.integers(1, 300), st.integers(1, 130), st.sampled_from([5, 8, 10]), st.integers(0, 2**32 - 1))
def test_error_is_at_most_half_a_step(columns: int, tile: int, bits: int, seed: int) -> None:
    """Neighbouring levels are a factor exp(step) apart, so the nearest is within (exp(step) - 1) / 2 of the lower one."""
    x = np.random.default_rng(seed).standard_normal((2, columns)).astype(np.float32)
    codes, low, step = encode_logfmt(x, bits, tile)
    assert low.shape == step.shape == (2, -(-columns // tile))
    y = decode_logfmt(codes, low, step, bits, tile)
    bound = np.repeat(np.expm1(step.astype(np.float64)) / 2, tile, -1)[:, :columns]
    assert (np.abs(y - x) <= np.abs(x) * (bound + 3e-6)).all()  # 3e-6: low is stored in float32, at most 32 * 2^-24 off, and y rounded
    for i in range(0, columns, tile):  # a tile knows nothing of its neighbours
        alone = encode_logfmt(x[:, i : i + tile], bits, tile)
        assert np.array_equal(alone[0], codes[:, i : i + tile])
        assert np.array_equal(alone[1][:, 0], low[:, i // tile])


def test_rounding_is_unbiased_in_linear_space() -> None:
    """Rounding the logarithm instead would shift the mean, which shows at 5 bits."""
    rng = np.random.default_rng(4)
    x = rng.uniform(0.5, 1.0, (1, 200_000)).astype(np.float32)
    codes, low, step = encode_logfmt(x, 5, tile=x.size)
    errors = decode_logfmt(codes, low, step, 5, tile=x.size).astype(np.float64) - x
    spread = errors.std() / np.sqrt(x.size)
    assert abs(errors.mean()) < 5 * spread
    in_logarithm = np.exp(np.rint((np.log(x) - low) / step) * step + low) - x
    assert abs(in_logarithm.mean()) > 5 * spread


def test_errors() -> None:
    with pytest.raises(DscError, match="LogFMT of 2 bits, expected 3 to 16"):
        encode_logfmt(np.ones(3, np.float32), 2)
    codes, low, step = encode_logfmt(np.ones(300, np.float32), 8)
    with pytest.raises(DscError, match=r"expected \[5\]"):
        decode_logfmt(codes, low, step, 8, tile=64)
