"""Placing buffers in one arena: those alive at the same time must not overlap, the rest may share bytes."""

from __future__ import annotations

from collections.abc import Sequence
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


def place(lifetimes: Sequence[Lifetime]) -> Placement:
    """Offsets by decreasing size, each at the lowest place where no buffer alive at the same time lies.

    "Greedy by size" of Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (arXiv 2001.03288), section 5.2:
    at the lower bound or a few percent above it for networks.
    """
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].bytes, i)):
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
