"""What a step of training takes on a cluster: a program's layers on the stages of a pipeline, simulated, and all else that a step does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from itertools import accumulate, pairwise

from ..hardware.streams import hidden
from ..ir.core import Phase
from ..ir.errors import require
from ..ir.mesh import Mesh
from ..schedule.actions import Action, Kind, Overlap, Schedule, Step
from ..schedule.generate import generate
from ..schedule.partition import Room, Span, balanced
from ..schedule.simulate import Timeline, simulate
from ..schedule.validate import most_in_flight
from .memory import GRADIENT, MASTER, MOMENTS
from .plan_layers import BACKWARD, FORWARD, Layer, Program
from .plan_machine import Machine, Run

PHASES = {Kind.F: FORWARD, Kind.I: (Phase.I, Phase.R), Kind.W: (Phase.W,), Kind.B: BACKWARD}
"""What actions of a schedule run."""
NUMBERED = re.compile(r"\blayers\.[0-9]+$")
"""The names of a model's layers."""
CHUNKS = {"1f1b": (1,), "interleaved": (2, 4), "zb1p": (1, 2), "dualpipe": (1,), "dualpipev": (2,)}
"""Stages on a rank that are tried; dualpipe's second stage is that of the other direction."""
ADAMW = GRADIENT + 2 * (MASTER + MOMENTS) + 2
"""Bytes that an update reads and writes for each parameter: gradient, master weight and moments there and back, the BF16 weight."""


@dataclass(frozen=True)
class Setup:
    """How a program is trained: `batch` sequences of `seq` tokens a step, `micro` of them at once on each rank along dp."""

    mesh: Mesh
    schedule: str
    chunks: int
    batch: int
    seq: int
    micro: int = 1

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return self.mesh.pp if self.schedule == "dualpipe" else self.mesh.pp * self.chunks

    @property
    def order(self) -> str:
        """The schedule in words, with the stages of a rank where that is open."""
        tried = len(CHUNKS[self.schedule]) > 1 and self.mesh.pp > 1
        return f"{self.schedule} with {self.chunks} {'stage' if self.chunks == 1 else 'stages'} on a rank" if tried else self.schedule

    @property
    def microbatches(self) -> int:
        """Of a step, on each rank along dp."""
        return self.batch // (self.mesh.dp * self.micro)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.seq

    @property
    def copies(self) -> int:
        """How often the pipeline holds each parameter: DualPipe has one for each direction."""
        return 2 if self.schedule == "dualpipe" else 1

    def check(self) -> None:
        """`DscError` where the numbers do not go together."""
        lanes = self.mesh.dp * self.micro
        fits = f"{max(1, self.batch // lanes) * lanes} would fit"
        require(self.batch % lanes == 0 and self.batch >= lanes, f"a batch of {self.batch} does not divide over dp={self.mesh.dp}; {fits}")


@dataclass
class Stages:
    """Layers on stages, with what a micro-batch takes of each. Stages of the same kinds of layers are timed once."""

    program: Program
    machine: Machine
    sizes: Sequence[int]
    hop: float = 0.0
    """Seconds of a transfer to the next stage, which overlapped pairs send beside their other communication."""
    runs: dict[tuple[tuple[Kind, int], ...], Run] = field(default_factory=dict)
    known: dict[tuple[Kind | int, int], float] = field(default_factory=dict)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Of each stage."""
        return tuple(pairwise(accumulate(self.sizes, initial=0)))

    @cached_property
    def layers(self) -> tuple[tuple[Layer, ...], ...]:
        """Of each stage."""
        return tuple(self.program.layers[start:end] for start, end in self.spans)

    @property
    def depths(self) -> tuple[int, ...]:
        """How many of the model's numbered layers each stage has, embedding, norms, head and losses apart."""
        return tuple(sum(NUMBERED.search(layer.name) is not None for layer in layers) for layers in self.layers)

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """Of each stage, the first that has layers of the same kinds."""
        kinds = [tuple(layer.kind for layer in layers) for layers in self.layers]
        return tuple(map(kinds.index, kinds))

    def run(self, step: Step) -> Run:
        """A step of the schedule on the streams of its rank.

        Alone a chunk hides communication under what of its own does not wait for it; a pair under each other's computation.
        """
        key = tuple([(action.kind, self.kinds[action.stage]) for action in step.parts])
        if key not in self.runs:
            if isinstance(step, Action):
                self.runs[key] = self.machine.run(self.program.alone(self.layers[step.stage], PHASES[step.kind]))
            else:
                forward, backward = (self.layers[action.stage] for action in step.parts)
                self.runs[key] = self.machine.run(self.program.paired(forward, backward), 2 * self.hop)
        return self.runs[key]

    def seconds(self, step: Step) -> float:
        """What a step of the schedule takes."""
        key = (step.kind, step.stage) if isinstance(step, Action) else (step.forward.stage, step.backward.stage)
        if key not in self.known:
            self.known[key] = self.run(step).time
        return self.known[key]

    def least(self, schedule: Schedule, microbatches: int) -> float:
        """Seconds below which no rank gets through its steps. Where chunks run one by one a rank waits for the first, runs all of them, and
        stages before it take the last one back; where they overlap no stream of the busiest rank pauses, nor slows another down.
        """
        overlaps = any(isinstance(step, Overlap) for row in schedule.rows for step in row)
        split = any(action.kind is Kind.I for _, _, action in schedule.actions())
        kinds = (Kind.F, Kind.I, Kind.W) if split else (Kind.F, Kind.B)
        most = 0.0
        for held in held_by(schedule):
            if overlaps:
                busy = [self.machine.busy[layer.kind] for stage in held for layer in self.layers[stage]]
                each = max((sum(b.get(stream, 0.0) for b in busy) for stream in {stream for b in busy for stream in b}), default=0.0)
                most = max(most, microbatches * each)
                continue
            every = [[self.seconds(Action(kind, stage, 0)) for kind in kinds] for stage in range(1 + max(held))]
            before = [sum(row) if not split else row[0] for row in every[: min(held)]]
            most = max(most, sum(before) + microbatches * sum(sum(every[stage]) for stage in held))
        return most


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. Buckets are those of `BUCKETS`, each with weights, gradients and the optimiser's share."""

    buckets: Mapping[str, Mapping[str, int]]
    activations: int
    workspace: int

    @property
    def state(self) -> int:
        """Weights, gradients and the optimiser's share of all buckets."""
        return sum(sum(bucket.values()) for bucket in self.buckets.values())

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.activations + self.workspace


@dataclass(frozen=True)
class Training:
    """A step that is planned; what costs time to find out is found out when it is asked for. Times are in seconds."""

    setup: Setup
    stages: Stages
    schedule: Schedule

    @cached_property
    def timeline(self) -> Timeline:
        """The pipeline, simulated."""
        return simulate(self.schedule, self.stages.seconds, lambda step: self.stages.hop if isinstance(step, Action) else 0.0)

    @cached_property
    def memory(self) -> tuple[Memory, ...]:
        """Of each rank."""
        own, spans = self.stages, self.stages.spans
        held = enumerate(held_by(self.schedule))
        return tuple(memory_of(own.program, self.schedule, self.setup, rank, tuple(spans[s] for s in stages)) for rank, stages in held)

    @property
    def hopeless(self) -> bool:
        """Whether ranks do not even have room for weights, gradients and the optimiser's share, wherever the layers are."""
        return sum(m.state + m.workspace for m in self.memory) > len(self.memory) * self.capacity

    def within(self) -> Training:
        """The same with layers where all ranks have room for them; where none are found, where the fullest lacks least."""
        own, schedule, setup = self.stages, self.schedule, self.setup
        if self.fits:
            return self
        room = Room(self.capacity, cache(lambda rank, spans: memory_of(own.program, schedule, setup, rank, spans).total))
        return replace(self, stages=replace(own, sizes=placed(own.program, own.machine, schedule, room), runs={}, known={}))

    @cached_property
    def ends(self) -> Mapping[str, float]:
        """What follows the pipeline: gradients, optimiser, weights."""
        return ends(self.stages, self.schedule, self.setup)

    @cached_property
    def least(self) -> float:
        """A step takes this long at least."""
        return self.stages.least(self.schedule, self.setup.microbatches // self.setup.copies) + sum(self.ends.values())

    @cached_property
    def step(self) -> float:
        """From one update to the next, interruptions aside."""
        return float(self.timeline.time) + sum(self.ends.values())

    @property
    def available(self) -> float:
        """The share of time in which the cluster trains."""
        return self.stages.machine.inputs["run.available"]

    @property
    def gpu_hours(self) -> float:
        """Per trillion tokens, interruptions included."""
        return self.step / self.setup.tokens * 1e12 * self.setup.mesh.world / 3600 / self.available

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster, interruptions aside."""
        return self.setup.tokens / self.step

    @property
    def bubble(self) -> float:
        """The share of the pipeline's time in which the rank that idles most does."""
        return float(max(self.timeline.bubbles)) / float(self.timeline.time)

    @property
    def exposed(self) -> float:
        """Seconds of a step in which a rank of the middle communicates and does not compute."""
        return sum(self.stages.run(step).exposed for step in self.schedule.rows[self.schedule.ranks // 2])

    @property
    def hidden(self) -> float:
        """The share of that rank's communication which computation covers, in overlapped pairs where there are any, else in all steps."""
        row = self.schedule.rows[self.schedule.ranks // 2]
        runs = [self.stages.run(step) for step in row if isinstance(step, Overlap)] or [self.stages.run(step) for step in row]
        return hidden(sum(run.exposed for run in runs), sum(run.communicating for run in runs))

    @property
    def peak(self) -> Memory:
        """The fullest rank's."""
        return max(self.memory, key=lambda m: m.total)

    @property
    def capacity(self) -> float:
        """Bytes of a GPU for tensors."""
        return self.stages.machine.capacity

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.peak.total <= self.capacity


def plan_training(program: Program, machine: Machine, setup: Setup, sizes: Sequence[int] = ()) -> Training:
    """A step. `sizes` places layers on stages; without it they go where they take least, whatever a rank has room for (`Training.within`).
    `DscError` where the numbers do not go together."""
    setup.check()
    schedule = scheduled(setup.schedule, setup.stages, setup.microbatches, None if setup.schedule == "dualpipe" else setup.chunks)
    stages = Stages(program, machine, sizes or placed(program, machine, schedule), machine.hop(program.boundary))
    return Training(setup, stages, schedule)


scheduled = cache(generate)
"""Schedules are the same for many meshes."""


def placed(program: Program, machine: Machine, schedule: Schedule, room: Room | None = None) -> tuple[int, ...]:
    """Layers on stages, ranks balanced by what a micro-batch takes, forward and backward: where two overlap, by what both pairs of their
    stages take."""
    costs, held = [machine.apart[layer.kind] for layer in program.layers], held_by(schedule)
    fill = max(0.0, (schedule.ranks - 2) / schedule.microbatches)  # steps of one stage beside those of both, as DualPipe's bubble has them

    def both(spans: tuple[Span, ...]) -> float:
        first, last = (program.layers[a:b] for a, b in spans)
        gained = sum(machine.gained(x, y) for f, b in ((first, last), (last, first)) for x, y in program.pairs(f, b))
        return sum(machine.apart[layer.kind] for layer in (*first, *last)) - gained

    overlaps = any(isinstance(step, Overlap) for row in schedule.rows for step in row)
    return balanced(costs, held, both if overlaps else None, fill, room)


@lru_cache(maxsize=256)
def held_by(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """The stages of each rank."""
    found: list[list[int]] = [[] for _ in schedule.rows]
    for (stage, _), rank in schedule.home.items():
        found[rank].append(stage)
    return tuple(tuple(sorted(stages)) for stages in found)


def memory_of(program: Program, schedule: Schedule, setup: Setup, rank: int, spans: tuple[Span, ...]) -> Memory:
    """Of a rank whose stages have such layers. The optimiser's state of a weight is spread over all ranks that hold it (ZeRO-1)."""
    mesh, stages = setup.mesh, held_by(schedule)[rank]
    spread = {"tp": mesh.dp, "replicated": mesh.dp, "experts": mesh.edp}
    buckets = {}
    for bucket, (count, size) in program.parameters(spans).items():
        state = (MASTER + MOMENTS) * count // (spread[bucket] * setup.copies)
        buckets[bucket] = {"weights": size, "gradients": GRADIENT * count, "optimiser": state}
    kept, stashed = ({stage: what(span) for stage, span in zip(stages, spans, strict=True)} for what in (program.kept, program.stashed))
    return Memory(buckets, int(most_in_flight(schedule, rank, kept, stashed)), program.workspace)


def ends(stages: Stages, schedule: Schedule, setup: Setup) -> dict[str, float]:
    """What the slowest rank does after its last micro-batch, part by part."""
    machine, mesh = stages.machine, setup.mesh
    most: dict[str, float] = {}
    for held in held_by(schedule):
        count = {bucket: n for bucket, (n, _) in stages.program.parameters(tuple(stages.spans[s] for s in held)).items()}
        parts = {
            "gradients": machine.reduce(GRADIENT * (count["tp"] + count["replicated"]), "dp", setup.copies)
            + machine.reduce(GRADIENT * count["experts"], "edp", setup.copies),
            "optimiser": ADAMW
            * ((count["tp"] + count["replicated"]) / (mesh.dp * setup.copies) + count["experts"] / (mesh.edp * setup.copies))
            / machine.memory_bandwidth,
            "weights": machine.gather(2 * (count["tp"] + count["replicated"]), "dp", setup.copies)
            + machine.gather(2 * count["experts"], "edp", setup.copies),
        }
        if sum(parts.values()) > sum(most.values()):
            most = parts
    return most
