"""A plan in words: what a step takes, where the time goes, what a rank holds, what it rests on, and what else there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from ..hardware.figures import Figure, spoken
from ..schedule.actions import Action, Overlap
from .plan_flops import Flops
from .plan_inputs import Inputs
from .plan_train import Training, held_by
from .ui import count, plural, size, table

ENDS = {
    "gradients": "gradients added up",
    "optimiser": "optimiser",
    "weights": "weights handed out",
}
BUCKETS = {"tp": "split along tp", "replicated": "whole on each rank", "experts": "experts, split along ep"}
STEPS = {"FB": "forward and backward as one", "F": "forward alone", "B": "backward alone", "I": "backward for inputs", "W": "for weights"}


@dataclass(frozen=True)
class Effect:
    """What one assumption does to the total, in GPU-hours per trillion tokens, the others being in the middle."""

    key: str
    figure: Figure
    low: float
    high: float

    def swing(self) -> float:
        """How far the two ends are apart."""
        return abs(self.high - self.low)


def spread(mid: float, effects: Sequence[Effect]) -> tuple[float, float]:
    """The total's error bar: root of the sum of squares of what each assumption alone does to either side."""
    down = sqrt(sum(max(0.0, mid - min(e.low, e.high)) ** 2 for e in effects))
    up = sqrt(sum(max(0.0, max(e.low, e.high) - mid) ** 2 for e in effects))
    return mid - down, mid + up


def parts(plan: Training) -> dict[str, float]:
    """Seconds of a step by what the rank in the middle of the pipeline does, idling included."""
    rank = plan.schedule.ranks // 2
    found: dict[str, float] = {}
    for span in plan.timeline.spans[rank]:
        kind = span.step.kind.value if isinstance(span.step, Action) else "FB"
        found[kind] = found.get(kind, 0.0) + float(span.end - span.start)
    named = {STEPS[kind]: found[kind] for kind in STEPS if kind in found}
    return named | {"idle in the pipeline": float(plan.timeline.bubbles[rank])} | {ENDS[k]: v for k, v in plan.ends.items()}


def limits(plan: Training) -> str:
    """What takes most of the time, in words."""
    row = plan.schedule.rows[plan.schedule.ranks // 2]
    step = next((s for s in row if isinstance(s, Overlap)), row[0])
    run = plan.stages.run(step)
    computing, sending = run.computing, run.communicating
    what = "computation" if computing >= sending else "communication"
    if not plan.fits:
        what = "memory, which does not suffice; then " + what
    name = "an overlapped pair" if isinstance(step, Overlap) else "a forward chunk"
    return f"{what}: {name} computes {computing * 1e3:.1f} ms and communicates {sending * 1e3:.1f} ms, in {run.time * 1e3:.1f} ms"


HELPS = {
    "activations": "a schedule with fewer chunks in flight, a smaller --micro or --seq, more recomputation",
    "weights, gradients and optimiser": "more stages (pp), experts and products over more ranks (ep, tp)",
    "workspace": "a smaller --micro or --seq, a larger tp",
}
"""What would make the parts of a rank's memory less."""


def shortfall(plan: Training) -> str:
    """What the fullest rank needs and what would help, where not all ranks have room; else nothing. Of all placements that were found it is
    the one that lacks least."""
    if plan.fits:
        return ""
    peak, rank = plan.peak, plan.memory.index(plan.peak)
    held = " and ".join(f"stage {stage} ({plural(plan.stages.depths[stage], 'layer')})" for stage in held_by(plan.schedule)[rank])
    parts = dict(zip(HELPS, (peak.activations, peak.state, peak.workspace), strict=True))
    listed = ", ".join(f"{size(number)} {name}" for name, number in parts.items())
    found = "no placement" if plan.schedule.stages == plan.schedule.ranks else "no placement that was found"
    return (
        f"{found} fits: rank {rank} with {held} needs {size(peak.total)} of {size(plan.capacity)} ({listed}); "
        f"what would help: {HELPS[max(parts, key=parts.__getitem__)]}"
    )


def memory_table(plan: Training) -> str:
    """What the fullest rank holds."""
    peak = plan.peak
    rows = []
    for bucket, held in peak.buckets.items():
        if sum(held.values()):
            rows.append([BUCKETS[bucket], *(size(held[key]) for key in ("weights", "gradients", "optimiser")), size(sum(held.values()))])
    rows.append(["activations in flight", "", "", "", size(peak.activations)])
    rows.append(["workspace", "", "", "", size(peak.workspace)])
    rows.append([f"in all, of {size(plan.capacity)}", "", "", "", size(peak.total)])
    rank = plan.memory.index(peak)
    return table((f"rank {rank} of the pipeline", "weights", "gradients", "optimiser", "together"), rows)


def mfu(plan: Training, flops: Flops, peak: float) -> tuple[float, float]:
    """Causal and non-causal."""
    rate = plan.tokens_per_second / plan.setup.mesh.world / peak
    return flops.causal * rate, flops.full * rate


def unit_of(seconds: float) -> tuple[float, str]:
    """The largest unit of time of which `seconds` makes one or more, and its name."""
    return next(((scale, name) for scale, name in ((1.0, "s"), (1e-3, "ms")) if seconds >= scale), (1e-6, "us"))


def describe(
    name: str, plan: Training, flops: Flops, inputs: Inputs, effects: Sequence[Effect], others: Sequence[tuple[str, Training]]
) -> str:
    """The report."""
    setup, mesh, cluster = plan.setup, plan.setup.mesh, inputs.cluster
    low, high = spread(plan.gpu_hours, effects)
    price, peak = cluster.price.mid, cluster.device.peak.bf16.mid
    causal, full = mfu(plan, flops, peak)
    share = {n: f"{100 * s / plan.step:.1f}%" for n, s in parts(plan).items()}
    total = sum(parts(plan).values())
    micro = plural(setup.micro, "sequence")
    scale, unit = unit_of(plan.step)
    least, most = (float(f(plan.timeline.bubbles)) / scale for f in (min, max))
    lines = [
        f"{name} on {mesh.world:,} {cluster.name}: {mesh}, {setup.order}, "
        f"{setup.microbatches} micro-batches of {micro} of {setup.seq} tokens",
        "",
        f"step       {plan.step / scale:.2f} {unit} for {count(setup.tokens)} tokens: {count(plan.tokens_per_second)} tokens/s, "
        f"{plan.tokens_per_second / mesh.world:,.0f} on each GPU",
        f"cost       {count(plan.gpu_hours)} GPU-hours per trillion tokens ({count(low)} to {count(high)}), "
        f"{count(plan.gpu_hours * price)} USD at {price:g} USD an hour",
        f"MFU        {causal:.1%} causal, {full:.1%} non-causal: {flops.causal / 1e9:.4g} and {flops.full / 1e9:.4g} GFLOP a token "
        f"(three times the products of the",
        f"           forward pass; {flops.left_out}) by the peak of {peak / 1e12:.0f} TFLOP/s in BF16",
        f"bubble     {least:.2f} to {most:.2f} {unit}, {plan.bubble:.1%} of the pipeline's time",
        f"exposed    {plan.exposed / scale:.2f} {unit} of communication; computation hides {plan.hidden:.1%} of it"
        + (" in overlapped pairs" if setup.schedule.startswith("dualpipe") else ""),
        f"limited by {limits(plan)}",
        f"placement  {', '.join(map(str, plan.stages.depths))} layers on the stages, beside embedding, norms, head and losses",
        "",
        table(
            (f"where the time of a middle rank goes [{unit}]", "time", "share"),
            [[n, f"{s / scale:.2f}", share[n]] for n, s in parts(plan).items()] + [["step", f"{total / scale:.2f}", ""]],
        ),
        "",
        memory_table(plan),
        *filter(None, [shortfall(plan)]),
    ]
    if others:
        rows = [
            [label, f"{o.step / scale:.2f} {unit}", count(o.gpu_hours), f"{o.bubble:.1%}", size(o.peak.total), "yes" if o.fits else "no"]
            for label, o in others
        ]
        lines += ["", table(("instead", "step", "GPU-hours", "bubble", "fullest rank", "fits"), rows)]
    if effects:
        lines += ["", tornado(plan.gpu_hours, effects)]
    return "\n".join(lines)


def tornado(mid: float, effects: Sequence[Effect]) -> str:
    """Every assumption with its range and what its ends do to the total, the strongest first."""
    rows = []
    for e in sorted(effects, key=lambda e: -e.swing()):
        values = [spoken(v, e.figure.unit) for v in (e.figure.low, e.figure.mid, e.figure.high)]
        rows.append([e.key, *values, f"{(e.low - mid) / mid:+.1%}", f"{(e.high - mid) / mid:+.1%}", e.figure.provenance])
    return table(("assumption", "low", "mid", "high", "at low", "at high", "known as"), rows)


def document(
    name: str, plan: Training, flops: Flops, inputs: Inputs, effects: Sequence[Effect], others: Sequence[tuple[str, Training]]
) -> Mapping[str, Any]:
    """The plan as JSON."""
    setup, peak = plan.setup, inputs.cluster.device.peak.bf16.mid
    causal, full = mfu(plan, flops, peak)
    low, high = spread(plan.gpu_hours, effects)
    return {
        "source": name,
        "cluster": inputs.cluster.name,
        "gpus": setup.mesh.world,
        "mesh": setup.mesh.record(),
        "schedule": setup.schedule,
        "chunks": setup.chunks,
        "microbatches": setup.microbatches,
        "batch": setup.batch,
        "seq": setup.seq,
        "placement": list(plan.stages.sizes),
        "step_seconds": plan.step,
        "pipeline_seconds": float(plan.timeline.time),
        "tokens_per_second": plan.tokens_per_second,
        "gpu_hours_per_trillion_tokens": {"mid": plan.gpu_hours, "low": low, "high": high},
        "usd_per_trillion_tokens": plan.gpu_hours * inputs.cluster.price.mid,
        "mfu": {"causal": causal, "non_causal": full, "peak": peak, "flops_per_token": vars(flops)},
        "bubbles": [float(b) for b in plan.timeline.bubbles],
        "hidden": plan.hidden,
        "exposed_seconds": plan.exposed,
        "limited_by": limits(plan),
        "parts": parts(plan),
        "memory": [{"buckets": m.buckets, "activations": m.activations, "workspace": m.workspace, "total": m.total} for m in plan.memory],
        "capacity": plan.capacity,
        "fits": plan.fits,
        "shortfall": shortfall(plan),
        "assumptions": [
            {
                "key": e.key,
                **{k: getattr(e.figure, k) for k in ("low", "mid", "high", "unit", "provenance", "source")},
                "at_low": e.low,
                "at_high": e.high,
            }
            for e in sorted(effects, key=lambda e: -e.swing())
        ],
        "instead": [
            {"what": label, "step_seconds": o.step, "gpu_hours": o.gpu_hours, "memory": o.peak.total, "fits": o.fits} for label, o in others
        ],
    }
