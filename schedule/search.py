"""The schedule that takes least time on given ranks, among those whose memory fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.errors import DscError, require
from .actions import Number
from .generate import NAMES, generate
from .simulate import Durations, simulate
from .validate import check, in_flight


@dataclass(frozen=True)
class Memory:
    """What a rank holds, in any unit: its share of the parameters with all that they bring, and the activations of a micro-batch in it."""

    parameters: Number = 0
    activations: Number = 1


@dataclass(frozen=True)
class Candidate:
    """One schedule. `time` and `bubble`, of the rank that idles most, are in the unit of the durations, `memory` in that of `Memory`."""

    name: str
    chunks: int
    stages: int
    time: Number
    bubble: Number
    peak: Number
    memory: Number
    fits: bool


def search(
    ranks: int,
    microbatches: int,
    durations: Durations,
    *,
    memory: Memory | None = None,
    cap: Number | None = None,
    chunks: Sequence[int] = (1, 2, 4),
) -> list[Candidate]:
    """All schedules that exist for these numbers, those that fit under `cap` first, the quickest first.

    `durations` are those of 1/ranks of the model, what a rank does with one micro-batch; a stage of a rank that has several takes its
    part. DualPipe holds two copies of the parameters, one for each direction; DualPipeV one, for its two stages are halves. `peak` is in
    activations of a micro-batch in 1/ranks of the model.
    """
    require(ranks > 0, f"--stages is {ranks}, expected 1 or more")
    require(microbatches > 0, f"--microbatches is {microbatches}, expected 1 or more")
    needs = memory or Memory()
    found = []
    for name in NAMES:
        for count in chunks if name in ("interleaved", "zb1p") else (1 if name == "1f1b" else 2,):
            if name == "interleaved" and count == 1:  # which is 1f1b
                continue
            stages = ranks if name == "dualpipe" else ranks * count
            try:
                schedule = generate(name, stages, microbatches, count)
            except DscError:  # no such form for these numbers
                continue
            check(schedule)
            part = 1 if name == "dualpipe" or count == 1 else 1 / count
            timeline = simulate(schedule, durations.scaled(part))
            peak = max(map(max, in_flight(schedule))) * part
            held = needs.parameters * (2 if name == "dualpipe" else 1) + needs.activations * peak
            fits = cap is None or held <= cap
            found.append(Candidate(name, count, stages, timeline.time, max(timeline.bubbles), peak, held, fits))
    require(bool(found), f"no schedule takes {microbatches} micro-batches on {ranks} ranks")
    return sorted(found, key=lambda c: (not c.fits, c.time, c.memory))
