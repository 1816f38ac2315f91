"""Rows in consecutive groups, as kernels see them: where each group lies, and which rows are a tile's where tiles restart at each group.

Counts are on the device and stay there: a launch has programs for as many tiles as there can be, and each program finds its own rows by a
prefix sum of the counts. Counts that exceed the rows are cut to them, so that no memory outside is touched.
"""

from __future__ import annotations

import triton.language as tl

from .jit import device


@device
def extents(COUNTS, rows, groups, GROUPS: tl.constexpr, SPARE: tl.constexpr):
    """First row of each group, and the row behind its last, both int64[GROUPS]; GROUPS is a power of two, groups past the last are empty.

    With SPARE, which wants GROUPS > groups, the rows past the sum of the counts are the group behind the last.
    """
    group = tl.arange(0, GROUPS)
    counts = tl.maximum(tl.load(COUNTS + group, mask=group < groups, other=0).to(tl.int64), 0)
    sums = tl.cumsum(counts, axis=0)
    starts, ends = tl.minimum(sums - counts, rows), tl.minimum(sums, rows)
    if SPARE:
        ends = tl.where(group == groups, rows, ends)
    return starts, ends


@device
def rows_of_tile(tile, starts, ends, HEIGHT: tl.constexpr, GROUPS: tl.constexpr):
    """Group, first row and row behind the last of a tile, where tiles of HEIGHT rows restart at each group; no rows past the last tile."""
    tiles = (ends - starts + HEIGHT - 1) // HEIGHT
    nth = tile - (tl.cumsum(tiles, axis=0) - tiles)
    mine = (nth >= 0) & (nth < tiles)
    group = tl.sum(tl.where(mine, tl.arange(0, GROUPS), 0), axis=0)
    start = tl.sum(tl.where(mine, starts + nth * HEIGHT, 0), axis=0)
    stop = tl.minimum(tl.sum(tl.where(mine, ends, 0), axis=0), start + HEIGHT)
    return group, start, stop


@device
def rows_of_group(group, starts, ends, HEIGHT: tl.constexpr, GROUPS: tl.constexpr):
    """First row, number of rows and first tile of a group, where tiles of HEIGHT rows restart at each group."""
    tiles = (ends - starts + HEIGHT - 1) // HEIGHT
    each = tl.arange(0, GROUPS)
    start = tl.sum(tl.where(each == group, starts, 0), axis=0)
    count = tl.sum(tl.where(each == group, ends - starts, 0), axis=0)
    return start, count.to(tl.int32), tl.sum(tl.where(each < group, tiles, 0), axis=0)
