"""Placing buffers in one arena: those alive at the same time must not overlap, the rest may share bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Every buffer starts at a multiple of it: vector loads need 16, tensor descriptors 128, and cudaMalloc itself gives 256."""


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `bytes`, alive from op number `start` up to and with op number `stop`."""

    bytes: int
    start: int
    stop: int


@dataclass(frozen=True)
class Placement:
    """Where each buffer starts, and the bytes of the whole arena."""

    offsets: tuple[int, ...]
    bytes: int


def aligned(bytes: int) -> int:
    """`bytes` up to a multiple of the alignment."""
    return -(-bytes // ALIGNMENT) * ALIGNMENT


ORDERS: tuple[Callable[[Lifetime], tuple[int, ...]], ...] = (
    lambda x: (-x.bytes, x.start),
    lambda x: (-(x.stop - x.start), -x.bytes),
    lambda x: (-x.bytes * (x.stop - x.start + 1), x.start),
    lambda x: (x.start, -x.stop),
    lambda x: (-x.stop, x.start),
)
"""What is placed first: large, long-lived, both, early, late. No one of them is best for every program."""


def place(lifetimes: Sequence[Lifetime]) -> Placement:
    """Each buffer at the lowest place where none alive at the same time lies, in the best of several orders.

    The first is "greedy by size" of Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (arXiv 2001.03288),
    section 5.2. The first order that reaches the lower bound is taken, else the one that needs least.
    """
    bound = lower_bound(lifetimes)
    best: Placement | None = None
    for order in ORDERS:
        found = _placed(lifetimes, sorted(range(len(lifetimes)), key=lambda i: (*order(lifetimes[i]), i)))
        if best is None or found.bytes < best.bytes:
            best = found
        if best.bytes == bound:
            break
    assert best is not None
    return best


def _placed(lifetimes: Sequence[Lifetime], order: Sequence[int]) -> Placement:
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for index in order:
        mine = lifetimes[index]
        size = aligned(mine.bytes)
        together = [i for i in placed if lifetimes[i].start <= mine.stop and mine.start <= lifetimes[i].stop]
        offset = 0
        for other in sorted(together, key=lambda i: offsets[i]):
            if offsets[other] >= offset + size:
                break
            offset = max(offset, offsets[other] + aligned(lifetimes[other].bytes))
        offsets[index] = offset
        placed.append(index)
    return Placement(tuple(offsets), max((o + aligned(x.bytes) for o, x in zip(offsets, lifetimes, strict=True)), default=0))


def lower_bound(lifetimes: Sequence[Lifetime]) -> int:
    """The most bytes alive at one op: no placement needs less."""
    starts = {lifetime.start for lifetime in lifetimes}
    return max((sum(aligned(x.bytes) for x in lifetimes if x.start <= at <= x.stop) for at in starts), default=0)
