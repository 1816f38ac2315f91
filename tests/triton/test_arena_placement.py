"""Buffers alive together never overlap, and the arena is close to what no placement can beat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from dsc.backends.triton.memory import ALIGNMENT, Lifetime, aligned, lower_bound, place

lifetimes = st.lists(
    st.builds(
        lambda size, start, length: Lifetime(size, start, start + length), st.integers(0, 10_000), st.integers(0, 30), st.integers(0, 12)
    ),
    max_size=40,
)


@given(lifetimes)
def test_no_two_live_buffers_overlap(buffers: list[Lifetime]) -> None:
    placement = place(buffers)
    assert len(placement.offsets) == len(buffers)
    for i, a in enumerate(buffers):
        assert placement.offsets[i] % ALIGNMENT == 0
        assert placement.offsets[i] + a.bytes <= placement.bytes
        for j, b in enumerate(buffers[:i]):
            together = a.start <= b.stop and b.start <= a.stop
            apart = placement.offsets[i] + a.bytes <= placement.offsets[j] or placement.offsets[j] + b.bytes <= placement.offsets[i]
            assert apart or not together or not (a.bytes and b.bytes)


@given(lifetimes)
def test_the_arena_is_no_smaller_than_the_bound_nor_larger_than_everything(buffers: list[Lifetime]) -> None:
    assert lower_bound(buffers) <= place(buffers).bytes <= sum(aligned(b.bytes) for b in buffers)


def test_a_chain_needs_two_buffers() -> None:
    """Each op reads the last result: two of them are alive at any time, whatever the length."""
    chain = [Lifetime(1000, i, i + 1) for i in range(50)]
    assert place(chain).bytes == lower_bound(chain) == 2 * 1024


def test_a_freed_hole_is_used_again() -> None:
    buffers = [Lifetime(512, 0, 1), Lifetime(512, 0, 9), Lifetime(256, 2, 3), Lifetime(256, 2, 3)]
    assert place(buffers).bytes == 1024
