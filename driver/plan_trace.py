"""A plan as pictures: a trace for Perfetto, and a drawing of the schedule over the memory of each rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..hardware.streams import COMPUTE, united
from ..schedule.actions import Overlap
from ..schedule.timeline import COLOURS, MEANING, kind_of, trace
from ..schedule.validate import in_flight
from .plan_train import Training

MICROSECONDS = 1e6
STREAMS = {COMPUTE: 0, "inter": 100, "intra": 101}
"""Threads of a rank: its computation, which is the schedule's own, and exchanges within chunks by link, after transfers to neighbours."""
DETAIL = 10_000
"""The process that shows one step op by op."""


def write_trace(plan: Training, file: Path) -> None:
    """The Chrome trace: a process for each rank of the pipeline, with threads for computation, communication and links, arrows along
    transfers, and counters of activations in chunks and of memory in bytes; then the ops of one step of the rank in the middle."""
    found = trace(plan.timeline, MICROSECONDS)
    found["traceEvents"] += [*_communication(plan), *_memory(plan), *_detail(plan)]
    file.write_text(json.dumps(found), encoding="utf-8")


def _communication(plan: Training) -> Iterator[dict[str, Any]]:
    for rank, spans in enumerate(plan.timeline.spans):
        for stream, thread in list(STREAMS.items())[1:]:
            yield _named("thread_name", rank, thread, f"exchanges, {stream}")
            for span in spans:
                sent = (s for s in plan.stages.run(span.step).spans if s.stream == stream)
                for start, end in united((s.start, s.end) for s in sent):
                    yield _slice(f"exchanges of {span.step}", "exchange", rank, thread, float(span.start) + start, end - start)


def _memory(plan: Training) -> Iterator[dict[str, Any]]:
    kept, stashed = (list(map(what, plan.stages.spans)) for what in (plan.stages.program.kept, plan.stages.program.stashed))
    for rank, row in enumerate(in_flight(plan.schedule, kept, stashed)):
        held = plan.memory[rank]
        for span, active in zip(plan.timeline.spans[rank], row, strict=True):
            args = {"weights, gradients, optimiser": held.state, "activations": float(active), "workspace": held.workspace}
            yield {"ph": "C", "name": "memory, bytes", "pid": rank, "ts": float(span.start) * MICROSECONDS, "args": args}


def _detail(plan: Training) -> Iterator[dict[str, Any]]:
    row = plan.schedule.rows[plan.schedule.ranks // 2]
    step = next((s for s in row if isinstance(s, Overlap)), row[0])
    run = plan.stages.run(step)
    yield _named("process_name", DETAIL, 0, f"ops of {step}")
    for stream, thread in STREAMS.items():
        yield _named("thread_name", DETAIL, thread, stream)
    for span in run.spans:
        yield _slice(f"{span.op.name} {span.op.id}", span.op.phase.name, DETAIL, STREAMS[span.stream], span.start, span.end - span.start)


def _named(what: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": thread, "args": {"name": name}}


def _slice(name: str, category: str, rank: int, thread: int, start: float, seconds: float) -> dict[str, Any]:
    times = {"ts": start * MICROSECONDS, "dur": seconds * MICROSECONDS}
    return {"ph": "X", "name": name, "cat": category, "pid": rank, "tid": thread, **times}


def draw(plan: Training, file: Path) -> None:
    """The schedule, rank by rank, over what each rank's memory holds at its fullest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(11, 7), height_ratios=(3, 2), layout="constrained")
    seen: set[str] = set()
    for rank, spans in enumerate(plan.timeline.spans):
        for kind in COLOURS:
            own = [s for s in spans if kind_of(s.step) == kind]
            seen.update({kind} if own else ())
            bars = [(float(s.start), float(s.end - s.start)) for s in own]
            above.broken_barh(bars, (rank - 0.4, 0.8), facecolors=COLOURS[kind], edgecolor="white", linewidth=0.2)
    ranks = range(plan.schedule.ranks)
    setup = plan.setup
    figure.suptitle(f"{setup.schedule}, {setup.microbatches} micro-batches: {plan.step:.2f} s a step")
    above.set(xlabel="seconds", ylabel="rank", yticks=list(ranks), xlim=(0, float(plan.timeline.time)))
    outside: dict[str, Any] = {"fontsize": 8, "frameon": False, "loc": "lower center", "bbox_to_anchor": (0.5, 1)}
    above.invert_yaxis()
    above.legend(handles=[Patch(color=COLOURS[k], label=MEANING[k]) for k in COLOURS if k in seen], ncols=5, **outside)
    kinds = ("weights", "gradients", "optimiser")
    parts = {k: [sum(b[k] for b in m.buckets.values()) for m in plan.memory] for k in kinds}
    parts |= {"activations in flight": [m.activations for m in plan.memory], "workspace": [m.workspace for m in plan.memory]}
    bottom = [0.0 for _ in ranks]
    for (name, values), colour in zip(parts.items(), ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#bbbbbb"), strict=True):
        heights = [v / 1e9 for v in values]
        below.bar(list(ranks), heights, bottom=bottom, label=name, color=colour)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    below.axhline(plan.capacity / 1e9, color="black", linewidth=0.8, linestyle=":", label="room for tensors")
    below.set(xlabel="rank", ylabel="GB", xticks=list(ranks))
    below.legend(ncols=6, **outside)
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
