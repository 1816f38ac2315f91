"""The schedule of the DeepSeek-V3 report, section 4.2, at the points that it names, and scaled to short runs."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc.driver.learning_rate import Schedule

WHOLE = round(14.8e12 / (15360 * 4096))
"""Steps of the whole run at the full batch: 235,240."""


def at(tokens: float) -> int:
    """The first step that begins after so many tokens."""
    return round(tokens / (15360 * 4096)) + 2


def test_the_rates_are_those_of_the_report() -> None:
    schedule = Schedule(WHOLE)
    assert schedule.warmup == 2000
    assert schedule.learning_rate(1000) == pytest.approx(1.1e-4)
    for step, rate in [(2000, 2.2e-4), (2001, 2.2e-4), (at(9.99e12), 2.2e-4), (at(14.31e12), 2.2e-5), (at(14.62e12), 2.2e-5)]:
        assert schedule.learning_rate(step) == pytest.approx(rate, rel=1e-12)
    assert schedule.learning_rate(at(12.15e12)) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-4)  # the middle of the cosine
    assert schedule.learning_rate(at(14.64e12)) == schedule.learning_rate(WHOLE) == pytest.approx(7.3e-6)


def test_gates_are_balanced_until_the_last_500_billion_tokens() -> None:
    schedule = Schedule(WHOLE)
    assert [schedule.balance_speed(step) for step in (1, at(14.29e12), at(14.31e12), WHOLE)] == [0.001, 0.001, 0.0, 0.0]


@given(steps=st.integers(1, 3000), peak=st.floats(1e-6, 1.0))
def test_a_run_of_any_length_rises_to_its_peak_and_never_rises_again(steps: int, peak: float) -> None:
    schedule = Schedule(steps, peak)
    rates = [schedule.learning_rate(step) for step in range(1, steps + 1)]
    top = schedule.warmup - 1
    assert max(rates) == rates[top] == peak
    assert all(rate > 0 for rate in rates)
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in pairwise(rates[top:]))
    if steps >= 100:
        assert rates[-1] / peak == pytest.approx(7.3e-6 / 2.2e-4)
