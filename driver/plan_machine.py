"""The costs of a cluster as a plan reads them: what a function takes on the streams of a rank, and what a step sends beside its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..hardware.cost import Costs
from ..hardware.streams import COMPUTE, Costing, Span, Times, hidden, simulate
from ..ir.core import Func, Op, Value
from ..ir.mesh import Mesh, mesh_of
from ..ir.ops.collective import AllGather, ReduceScatter
from ..ir.types import DType, Tensor
from ..passes.overlap import costing_of
from .plan_inputs import Inputs
from .plan_layers import BACKWARD, FORWARD, Layer, Program


@dataclass(frozen=True)
class Run:
    """What a rank does in one step of its schedule: functions one after the other, and transfers of the pipeline beside them."""

    parts: tuple[Times, ...]
    sends: float = 0.0
    """Seconds of transfers, which share the link with the exchanges and take what is left of it."""

    @cached_property
    def time(self) -> float:
        """Until everything is over."""
        links = {span.stream for part in self.parts for span in part.spans} - {COMPUTE} if self.sends else ()
        longest = max((sum(part.busy(link) for part in self.parts) for link in links), default=0.0)
        return max(sum(part.total for part in self.parts), longest + self.sends)

    @cached_property
    def computing(self) -> float:
        """Seconds of computation."""
        return sum(part.computing for part in self.parts)

    @cached_property
    def communicating(self) -> float:
        """Seconds in which any link carries an exchange."""
        return sum(part.communicating for part in self.parts)

    @cached_property
    def exposed(self) -> float:
        """Seconds of exchanges during which nothing computes."""
        return sum(part.exposed for part in self.parts)

    @property
    def hidden(self) -> float:
        """The share of exchanges during which something computes."""
        return hidden(self.exposed, self.communicating)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every op that takes time."""
        found, start = [], 0.0
        for part in self.parts:
            found += [replace(s, start=s.start + start, end=s.end + start) for s in part.spans]
            start += part.total
        return tuple(found)


@dataclass
class Machine:
    """Costs of a program on a mesh of a cluster's ranks. Rows of experts count as they are expected on the fullest rank."""

    inputs: Inputs
    mesh: Mesh
    program: Program
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else `Costs` are to know, such as how many micro-batches share one cast of weights (`repeats`)."""
    known: dict[int, Times] = field(default_factory=dict)
    gains: dict[tuple[str, str], float] = field(default_factory=dict)

    @cached_property
    def costing(self) -> Costing:
        """Of ops alone, and of ops beside communication."""
        mesh = replace(mesh_of(self.program.module), node=self.mesh.node)
        more = self.inputs["run.imbalance"]
        return costing_of(self.program.module, self.inputs.cluster, mesh=mesh, imbalance=more, **self.options)

    @property
    def costs(self) -> tuple[Costs, Costs]:
        """Of ops alone, and of ops beside communication."""
        alone, beside = self.costing.alone, self.costing.beside
        assert isinstance(alone, Costs)
        assert isinstance(beside, Costs)
        return alone, beside

    def times(self, piece: Func | Op) -> Times:
        """A function, or an op alone, on the streams of a rank. Those of the program alone: they are known by identity."""
        if id(piece) not in self.known:
            func = piece if isinstance(piece, Func) else _lone(piece)
            self.known[id(piece)] = simulate(self.program.module, self.costing, func)
        return self.known[id(piece)]

    def run(self, pieces: Iterable[Func | Op], sends: float = 0.0) -> Run:
        """One after the other."""
        return Run(tuple(map(self.times, pieces)), sends)

    @cached_property
    def busy(self) -> Mapping[str, Mapping[str, float]]:
        """By the kind of layer and the stream: seconds for one micro-batch, forward and backward, where neither slows the other."""
        found: dict[str, dict[str, float]] = {}
        for layer in {layer.kind: layer for layer in self.program.layers}.values():
            own = [simulate(self.program.module, self.costing.alone, _lone(op)) for op in layer.ops]
            streams = dict.fromkeys(span.stream for times in own for span in times.spans)
            found[layer.kind] = {stream: sum(times.busy(stream) for times in own) for stream in streams}
        return found

    @cached_property
    def apart(self) -> Mapping[str, float]:
        """By the kind of layer: seconds for one micro-batch, forward and backward, one layer after the other."""
        kinds = {layer.kind: layer for layer in self.program.layers}
        both = {kind: [*self.program.alone([layer], FORWARD), *self.program.alone([layer], BACKWARD)] for kind, layer in kinds.items()}
        return {kind: self.run(pieces).time for kind, pieces in both.items()}

    def gained(self, forward: Layer, backward: Layer) -> float:
        """Seconds by which two layers, one forward and one backward, are quicker side by side than one after the other."""
        key = forward.kind, backward.kind
        if key not in self.gains:
            alone = self.run([*self.program.alone([forward], FORWARD), *self.program.alone([backward], BACKWARD)])
            self.gains[key] = alone.time - self.run(self.program.paired([forward], [backward])).time
        return self.gains[key]

    @property
    def capacity(self) -> float:
        """Bytes of a GPU for tensors."""
        return self.inputs.cluster.device.memory.mid - self.inputs["run.reserved"]

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second of kernels along rows."""
        device = self.inputs.cluster.device
        return device.peak.bandwidth.mid * device.kernels.rows.mid

    def hop(self, bytes: float) -> float:
        """Seconds of a tensor to the next stage: on another node where stages fill nodes."""
        cluster, mesh = self.inputs.cluster, self.mesh
        link = cluster.inter if mesh.dp * mesh.tp >= mesh.node else cluster.intra
        return bytes / link.bandwidth.mid + link.latency.mid if mesh.pp > 1 else 0.0

    def reduce(self, bytes: float, axis: str, copies: int) -> float:
        """Seconds to add up `bytes` of gradients over an axis, each rank keeping its part; copies of a pipeline first among them."""
        return self._along(ReduceScatter, bytes, axis, copies)

    def gather(self, bytes: float, axis: str, copies: int) -> float:
        """Seconds to hand out `bytes` of weights, of which each rank of an axis has a part."""
        return self._along(AllGather, bytes, axis, copies)

    def _along(self, kind: type[ReduceScatter] | type[AllGather], bytes: float, axis: str, copies: int) -> float:
        size = self.mesh.size(axis)
        between = self.hop(bytes / 2) if copies > 1 else 0.0  # each of the two ends up with half of both
        part = -(-int(bytes / copies) // (4 * size))
        if size == 1 or not part:
            return between
        x = Value(Tensor(DType.f32, (part if kind is AllGather else part * size,)), "x")
        return between + Costs(self.inputs.cluster, self.mesh).seconds(kind(x, axis=axis, size=size))


def _lone(op: Op) -> Func:
    """An op as a function."""
    return Func("lone", tuple(op.operands), (op,), op.results)
