"""Timing on a GPU: events around single runs, the L2 cache overwritten between them, the median of many."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

L2_BYTES = 256 << 20
"""More than the L2 cache of any GPU that is known here: writing as much leaves nothing of a run's operands in it."""


def median_seconds(run: Callable[[], Any], runs: int = 30) -> float:
    """Seconds of one call of `run`, which starts work on the current stream. It is called three times before, to warm up."""
    for _ in range(3):
        run()
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, stop in events:
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(stop) for start, stop in events) / 1e3
