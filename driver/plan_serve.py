"""What serving takes on a cluster: prompts read, or a token for each sequence, two micro-batches hiding each other's communication."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..hardware.figures import spoken
from ..ir.expected import expected_bytes
from ..ir.mesh import Mesh
from ..ir.ops.collective import AllToAllRows
from ..ir.walk import weights
from ..schedule.streams import COMM, COMPUTE, Run, joined, listed
from .plan_inputs import Inputs
from .plan_layers import FORWARD, Program
from .plan_machine import Machine
from .plan_program import Compiler
from .plan_report import Effect, spread, tornado
from .ui import count, size

Mode = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Serving:
    """Two micro-batches of `micro` sequences on each rank along dp: of `seq` new tokens each in prefill, of one in decoding."""

    mode: Mode
    mesh: Mesh
    program: Program
    machine: Machine
    micro: int
    seq: int

    @cached_property
    def run(self) -> Run:
        """Both micro-batches through all layers, interleaved."""
        tasks = self.program.tasks(self.program.layers, FORWARD, self.machine, overlapped=True)
        return listed(joined(tasks, tasks))

    @property
    def new(self) -> int:
        """Tokens that a run makes or reads on a rank along dp."""
        return 2 * self.micro * (self.seq if self.mode == "prefill" else 1)

    @property
    def per_node(self) -> float:
        """Tokens a second of a node."""
        return self.new / self.run.time / self.mesh.tp * self.mesh.node

    @property
    def bound(self) -> float:
        """Seconds that the exchanges of both micro-batches take one after the other, nothing else in their way: no run is shorter."""
        return sum(self.machine.seconds(t.what, False) for t in self.run.tasks if isinstance(t.what, AllToAllRows))

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of a rank: weights, what the program is given (in decoding the caches of both micro-batches), workspace."""
        module, bytes_of = self.program.module, expected_bytes(self.program.module)
        given = 2 * sum(bytes_of(p.type) for p in module.main.params)
        return {"weights": sum(t.bytes for t in weights(module).values()), "inputs and caches": given, "workspace": self.program.workspace}


def serve(compiler: Compiler, inputs: Inputs, mode: Mode, mesh: Mesh, micro: int, seq: int) -> Serving:
    """A run of two micro-batches."""
    program = compiler.program(mesh, micro, inputs["run.imbalance"])
    return Serving(mode, mesh, program, Machine(inputs, mesh, program), micro, seq)


def effects(mid: Serving, compiler: Compiler, on_step: Callable[[str], None] = lambda step: None) -> list[Effect]:
    """What each assumption does to the seconds of a run."""
    found, inputs = [], mid.machine.inputs
    for key, figure in inputs.figures.items():
        if figure.low != figure.high and not key.startswith("price") and key not in ("run.available", "run.reserved"):
            ends = [serve(compiler, inputs.fixed(key, w), mid.mode, mid.mesh, mid.micro, mid.seq).run.time for w in ("low", "high")]
            found.append(Effect(key, figure, *ends))
            on_step(key)
    return found


def document(name: str, plan: Serving, found: list[Effect]) -> dict[str, Any]:
    """As JSON."""
    low, high = spread(plan.run.time, found)
    return {
        "source": name,
        "mode": plan.mode,
        "cluster": plan.machine.inputs.cluster.name,
        "mesh": plan.mesh.record(),
        "sequences_of_a_rank": 2 * plan.micro,
        "seconds": {"mid": plan.run.time, "low": low, "high": high},
        "bound_seconds": plan.bound,
        "tokens_per_second_of_a_node": plan.per_node,
        "compute_seconds": plan.run.busy(COMPUTE),
        "communication_seconds": plan.run.busy(COMM),
        "exposed_seconds": plan.run.exposed,
        "hidden": plan.run.hidden,
        "memory": dict(plan.memory),
        "assumptions": [
            {
                "key": e.key,
                "low": e.figure.low,
                "mid": e.figure.mid,
                "high": e.figure.high,
                "at_low": e.low,
                "at_high": e.high,
                "source": e.figure.source,
            }
            for e in found
        ],
    }


def describe(name: str, plan: Serving, found: list[Effect]) -> str:
    """The report."""
    low, high = spread(plan.run.time, found)
    run, mesh, cluster = plan.run, plan.mesh, plan.machine.inputs.cluster
    what = "prompts read in" if plan.mode == "prefill" else "TPOT"
    tokens = f"two micro-batches of {plan.micro} sequences on each rank along dp, " + (
        f"{plan.seq} tokens each" if plan.mode == "prefill" else f"{plan.seq} tokens of context each"
    )
    times = [spoken(t, "s") for t in (run.time, low, high)]
    memory = plan.memory
    lines = [
        f"{name} on {mesh.world:,} {cluster.name}, {plan.mode}: {mesh}, {tokens}",
        "",
        f"{what:<15} {times[0]} ({times[1]} to {times[2]}); bound by the exchanges: {spoken(plan.bound, 's')}",
        f"{'throughput':<15} {count(plan.per_node)} tokens/s on a node of {mesh.node}",
        f"{'streams':<15} computation {spoken(run.busy(COMPUTE), 's')}, communication {spoken(run.busy(COMM), 's')}, "
        f"of which {spoken(run.exposed, 's')} shows ({run.hidden:.1%} hidden)",
        f"{'memory':<15} {size(sum(memory.values()))} of {size(plan.machine.capacity)}: "
        + ", ".join(f"{size(v)} {k}" for k, v in memory.items()),
    ]
    return "\n".join([*lines, "", tornado(run.time, found)] if found else lines)
