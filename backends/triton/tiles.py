"""Tile sizes: pure functions of shapes and target, so that the same program always gets the same kernels."""

from __future__ import annotations

from dataclasses import dataclass

from .targets import Target

LARGEST_BLOCK = 1 << 16
"""Elements that one program holds at a time, at most: 64 registers of float32 for each of 1024 threads."""


def power_of_two(n: int) -> int:
    """The least power of two that is n or more; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def warps(elements: int) -> int:
    """Warps of an element-wise or row-wise program: about 16 elements a thread, between 1 and 8 warps."""
    return min(8, max(1, power_of_two(elements) // 512))


@dataclass(frozen=True)
class Rows:
    """Whole rows per program."""

    rows: int
    width: int
    """Columns, up to a power of two."""

    @property
    def num_warps(self) -> int:
        return warps(self.rows * self.width)


def rows_of(columns: int, elements: int = 4096) -> Rows:
    """For kernels that hold whole rows: as many as make `elements`, at least one."""
    width = power_of_two(columns)
    return Rows(max(1, elements // width), width)


@dataclass(frozen=True)
class Gemm:
    """A tile of a matrix product, and how many rows of tiles are walked before the next column, so that operands stay in the L2 cache."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    group: int = 8


def scaled_gemm(m: int, n: int, k: int, k_step: int, target: Target) -> Gemm:
    """The tile of a block-scaled FP8 product [m, k] x [n, k], scaled every `k_step` elements of k.

    On Hopper m is never below 64: a narrower tile leaves the warp-group instruction, which changes speed and the bits of the result. Of
    the tiles that do not spill there, 128 x 128 on 8 warps has the least operand traffic, 64 x 128 on 4 fills the machine sooner: it is
    taken where the larger one would leave more than half of the units idle. Where rows are not aligned to 16 bytes, copies cannot run
    ahead of the product: operands wait in registers, and the tile is smaller.
    """
    if k % 16:
        return Gemm(64, 64, k_step, 8, 2)
    if target.backend == "hip":
        return Gemm(64 if m <= 64 else 128, 128, k_step, 8, 2)
    if target.name == "sm_90":
        large = ceil_div(m, 128) * ceil_div(n, 128) * 2 > target.units and m > 64
        return Gemm(128, 128, k_step, 8, 4) if large else Gemm(64, 128, k_step, 4, 4)
    if target.name == "sm_100":
        return Gemm(128, 128, k_step, 8, 3)
    return Gemm(64, 128, k_step, 8, 2)  # shared memory of 99 KiB, and accumulators in registers
