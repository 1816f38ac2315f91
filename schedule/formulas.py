"""The published closed forms of bubble and memory, and where they are exact: the simulation is held to them there."""

from __future__ import annotations

from dataclasses import dataclass

from .actions import Number
from .simulate import Durations


@dataclass(frozen=True)
class ClosedForm:
    """The idle time of a rank, and the most chunks of activations that one holds.

    `exact` says whether the bubble is derived for these durations; else it is an approximation, and may miss either way.
    """

    bubble: Number
    peak: int
    exact: bool
    formula: str
    source: str


def closed_form(name: str, stages: int, chunks: int, durations: Durations) -> ClosedForm:
    """Of a schedule of `generate`, for a model cut into `stages`, `chunks` on a rank, and at least as many micro-batches as ranks.

    F, B = I + W and FB are those of one chunk. Transfers take no time in any of them. `peak` counts a chunk from its forward to the end
    of its backward, weights included.
    """
    d, ranks = durations, stages // chunks
    even = d.FB == d.F + d.B
    free = d.comm == 0 == (d.comm_overlap or 0)
    match name:
        case "1f1b":
            return ClosedForm((stages - 1) * (d.F + d.B), stages, free, "(PP-1)(F+B)", "DeepSeek-V3 report, table 2")
        case "interleaved":
            bubble, peak = (ranks - 1) * (d.F + d.B), ranks * chunks + ranks - 1
            return ClosedForm(bubble, peak, free, "(ranks-1)(F+B)", "Narayanan et al., SC 2021, section 2.2")
        case "zb1p":
            exact = free and d.F >= d.W and d.I >= d.W
            bubble, peak = (ranks - 1) * (d.F + d.B - 2 * d.W), ranks * chunks
            source = "DeepSeek-V3 report, table 2; Qi et al., ICLR 2024, ZB-H1"
            return ClosedForm(bubble, peak, exact, "(ranks-1)(F+B-2W)", source)
        case _:
            exact = free and even and d.F == d.I >= d.W
            bubble = (stages // 2 - 1) * (d.FB + d.B - 3 * d.W)
            return ClosedForm(
                bubble, stages + 1, exact, "(PP/2-1)(F&B+B-3W)", "DeepSeek-V3 report, table 2; github.com/deepseek-ai/DualPipe"
            )
