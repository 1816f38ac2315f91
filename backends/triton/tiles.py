"""Tile sizes: pure functions of shapes and target, so that the same program always gets the same kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import ParamSpec

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
    specialized: bool = False
    """Whether warps divide the work: one group copies, two multiply."""


P = ParamSpec("P")


def tunable(choose: Callable[P, Gemm]) -> Callable[P, Gemm]:
    """A choice that a file may override: by the name of the function and its arguments, `m` up to a power of two."""
    parameters = signature(choose)

    @wraps(choose)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> Gemm:
        given = parameters.bind(*args, **kwargs)
        target = given.arguments["target"]
        if target.tuned is None:
            return choose(*args, **kwargs)
        given.apply_defaults()
        values = {name: power_of_two(v) if name == "m" else v for name, v in given.arguments.items() if name != "target"}
        key = " ".join((choose.__name__, *(f"{name}={v}" for name, v in values.items())))
        return target.tuned.get(key, choose(*args, **kwargs))

    return chosen


@tunable
def scaled_gemm(m: int, n: int, k: int, k_step: int, target: Target, *, scale_rows: int, groups: int = 1, specialize: bool = False) -> Gemm:
    """The tile of a block-scaled FP8 product [m, k] x [n, k], scaled every `k_step` elements of k.

    With `groups` it is one of so many, each of m rows on average; one scale is for `scale_rows` rows of [n, k]; `specialize` where the
    kernel can.

    On Hopper m is never below 64: a narrower tile leaves the warp-group instruction, which changes speed and the bits of the result. Of
    the tiles that do not spill there, 128 x 128 has the least operand traffic, and is the only one that can be specialised; 64 x 128 on 4
    warps fills the machine sooner: it is taken where the larger one would leave more than half of the units idle, where groups are short,
    each of which wastes half a tile, and where scales of columns take the registers: Triton 3.7 spills 56 bytes of 128 x 128 on 8 warps
    then (on Blackwell 352). Specialised tiles take one scale for all columns, and steps of 128, whose buffers fit. Where rows are not
    aligned to 16 bytes, copies cannot run ahead of the product: operands wait in registers, and the tile is smaller. CDNA3 clears -0 in
    registers, which leaves no room for 128 x 128 either: Triton 3.9 spills 120 bytes of it, 3.7 none.
    """
    if k % 16:
        return Gemm(64, 64, k_step, 8, 2)
    if target.backend == "hip":
        return Gemm(64 if m <= 64 or target.fp8 == "fnuz" else 128, 128, k_step, 8, 2)
    if target.name == "sm_90":
        if scale_rows < 128 or not _fills(m, n, 128, 128, groups, target):
            return Gemm(64, 128, k_step, 4, 4)
        specialized = specialize and scale_rows % 128 == 0 and k_step == 128 <= k and groups * n < 2**31
        return Gemm(128, 128, k_step, 4, 4, specialized=True) if specialized else Gemm(128, 128, k_step, 8, 4)
    if target.name == "sm_100":
        return Gemm(64 if scale_rows < 128 else 128, 128, k_step, 8, 3)
    return Gemm(64, 128, k_step, 8, 2)  # shared memory of 99 KiB, and accumulators in registers


@tunable
def gemm(m: int, n: int, groups: int, bits: int, aligned: bool, target: Target) -> Gemm:
    """The tile of `groups` products of m x n elements on average, with operands of 16 or 32 `bits`; `aligned`: their rows are, to 16 bytes.

    Float32 is multiplied without tensor cores. On Hopper as in `scaled_gemm`, but without promotion accumulators of 128 x 256 fit.
    """
    if bits == 32:
        return Gemm(64, 64, 32, 4, 2)
    if not aligned:
        return Gemm(64, 64, 64, 4, 2)
    if target.backend == "hip":
        return Gemm(64 if m <= 64 else 128, 128, 64, 8, 2)
    if target.name == "sm_90":
        return Gemm(128, 256, 64, 8, 3) if _fills(m, n, 128, 256, groups, target) else Gemm(64, 128, 64, 4, 4)
    if target.name == "sm_100":
        return Gemm(128, 128, 64, 8, 3)
    return Gemm(64, 128, 64, 4, 2)


def _fills(m: int, n: int, tile_m: int, tile_n: int, groups: int, target: Target) -> bool:
    """Whether so large tiles occupy half of the target's units or more, and waste no more than half of what they compute."""
    return groups * ceil_div(m, tile_m) * ceil_div(n, tile_n) * 2 > target.units and m > (tile_m // 2 if groups == 1 else 2 * tile_m)
