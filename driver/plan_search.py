"""Plans side by side: other schedules for a mesh, all meshes of a number of GPUs, and what each assumption does to a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..ir.errors import DscError
from ..ir.mesh import Mesh
from .plan_inputs import Inputs
from .plan_machine import Machine
from .plan_program import Compiler
from .plan_report import Effect
from .plan_train import CHUNKS, Setup, Training, plan_training


@dataclass
class Planner:
    """Plans steps of one program under the same inputs."""

    compiler: Compiler
    inputs: Inputs
    machines: dict[tuple[int, Mesh], Machine] = field(default_factory=dict)
    refusal: str = ""  # why the last setup that cannot be cannot

    def plan(self, setup: Setup, inputs: Inputs | None = None, sizes: Sequence[int] = ()) -> Training:
        """One step, its layers on the stages as `sizes` says, or where they take least (`plan_training`)."""
        given = inputs or self.inputs
        program = self.compiler.program(setup.mesh, setup.micro, given.cluster)
        if given is not self.inputs:
            return plan_training(program, Machine(given, setup.mesh, program, {"repeats": max(1, setup.microbatches)}), setup, sizes)
        key = id(program), setup.mesh
        if key not in self.machines:
            self.machines[key] = Machine(given, setup.mesh, program, {"repeats": max(1, setup.microbatches)})
        return plan_training(program, self.machines[key], setup, sizes)

    def candidates(self, meshes: Sequence[Mesh], names: Sequence[str], batch: int, seq: int, micro: int) -> Iterator[Training]:
        """A step by each schedule that exists for each mesh, none simulated yet. One stage needs no schedule, and runs as 1f1b."""
        for mesh in meshes:
            for name, chunks in ((n, c) for n in (names if mesh.pp > 1 else ("1f1b",)) for c in CHUNKS[n]):
                try:
                    yield self.plan(Setup(mesh, name, chunks, batch, seq, micro))
                except DscError as error:  # no such form for these numbers
                    self.refusal = str(error)

    def effects(self, plan: Training, on_step: Callable[[str], None] = lambda step: None) -> list[Effect]:
        """What each assumption that has a range does to GPU-hours, the layers staying where they are."""
        found = []
        ranged = {key: figure for key, figure in self.inputs.figures.items() if figure.low != figure.high and not key.startswith("price")}
        for key, figure in ranged.items():
            low, high = (self._hours(plan, key, which) for which in ("low", "high"))
            on_step(key)
            found.append(Effect(key, figure, low, high))
        return found

    def _hours(self, plan: Training, key: str, which: Literal["low", "high"]) -> float:
        return self.plan(plan.setup, self.inputs.fixed(key, which), plan.stages.sizes).gpu_hours

    def on(self, plan: Training, inputs: Inputs) -> Training:
        """The same step on another cluster, the layers staying where they are."""
        setup = replace(plan.setup, mesh=replace(plan.setup.mesh, node=inputs.cluster.node))
        return self.plan(setup, inputs, plan.stages.sizes)


def best_of(candidates: Iterable[Training], wanted: int, on_step: Callable[[str], None] = lambda step: None) -> list[Training]:
    """The `wanted` quickest that fit, or where none does those that need least memory.

    A candidate that does not fit is placed anew, and each is simulated, only while its least time could still place it among them.
    """
    found: list[Training] = []
    full: list[Training] = []
    every = list(candidates)
    for candidate in sorted([c for c in every if not c.hopeless] or every, key=lambda c: c.least):
        if len(found) == wanted and candidate.least >= found[-1].step:
            break
        placed = candidate.within()
        if placed.fits:
            found = sorted([*found, placed], key=lambda c: c.step)[:wanted]
        else:
            full.append(placed)
        on_step(f"{candidate.setup.mesh} {candidate.setup.schedule}")
    return found or sorted(full, key=lambda c: (c.peak.total, c.least))[:wanted]
