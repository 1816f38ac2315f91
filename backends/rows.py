"""Rows of an `all_to_all_rows`, as `send` and `recv` count them: [size], rows lie by rank, or [size, J], in J blocks, in each by rank."""

from __future__ import annotations

import numpy as np

from .arrays import Array


def rows_of_each(counts: Array) -> list[int]:
    """How many rows go to each rank, or come from it."""
    found: list[int] = (counts.sum(1) if counts.ndim > 1 else counts).tolist()
    return found


def by_rank(counts: Array) -> Array | None:
    """Which rows lie where, told rank by rank: `counts` [size, J] of them lie in J blocks. None where that is their order."""
    if counts.ndim < 2 or counts.shape[1] < 2:
        return None
    blocks = counts.T
    starts = (blocks.cumsum().reshape(blocks.shape) - blocks).T.ravel()
    flat = counts.ravel()
    ends = flat.cumsum()
    return np.repeat(starts - ends + flat, flat) + np.arange(ends[-1])
