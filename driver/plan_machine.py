"""The costs of a cluster as a plan reads them: seconds of an op on a stream, and of what a step sends beside its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..hardware.cost import Cost, Costs
from ..ir.core import Op, Value
from ..ir.mesh import Mesh, mesh_of
from ..ir.ops.collective import AllGather, ReduceScatter
from ..ir.routing import routing_of
from ..ir.types import DType, Tensor
from ..schedule.streams import COMM, COMPUTE
from .plan_inputs import Inputs
from .plan_layers import BACKWARD, FORWARD, Program


@dataclass
class Machine:
    """Costs of a program on a mesh of a cluster's ranks. Rows of experts count as they are expected on the fullest rank."""

    inputs: Inputs
    mesh: Mesh
    program: Program
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else `Costs` are to know."""
    known: dict[tuple[int, bool], Cost] = field(default_factory=dict)

    @cached_property
    def costs(self) -> tuple[Costs, Costs]:
        """Of ops alone, and of ops beside the other stream."""
        more = self.program.imbalance
        rows = {ragged: extent * more for ragged, extent in self.program.extents.items()}
        module, cluster = self.program.module, self.inputs.cluster
        mesh, routing = replace(mesh_of(module), node=self.mesh.node), routing_of(module)
        given: dict[str, Any] = {"imbalance": more, "rows": rows, "routing": routing, **self.options}
        alone, beside = (Costs(cluster, mesh, overlap=overlap, **given) for overlap in (False, True))
        return alone, beside

    def cost(self, op: Op, overlapped: bool) -> Cost:
        """What `op` takes, alone or beside the other stream, and what bounds it. Ops of the program alone: they are known by identity."""
        key = id(op), overlapped
        if key not in self.known:
            self.known[key] = self.costs[overlapped].cost(op)
        return self.known[key]

    def seconds(self, op: Op, overlapped: bool) -> float:
        """What `op` takes, alone or beside the other stream."""
        return self.cost(op, overlapped).seconds

    def stream(self, op: Op) -> str:
        """`compute` or `comm`."""
        return self.costs[0].stream(op)

    @cached_property
    def busy(self) -> Mapping[str, tuple[float, float]]:
        """By the kind of layer: seconds of computation and of communication for one micro-batch, forward and backward, where neither slows
        the other down."""
        found = {}
        for layer in {layer.kind: layer for layer in self.program.layers}.values():
            tasks = [t for phases in (FORWARD, BACKWARD) for t in self.program.tasks([layer], phases, self)]
            computing, sending = (sum(t.seconds for t in tasks if t.stream == stream) for stream in (COMPUTE, COMM))
            found[layer.kind] = computing, sending
        return found

    @property
    def busiest(self) -> Mapping[str, float]:
        """By the kind of layer: seconds of the busier stream."""
        return {kind: max(both) for kind, both in self.busy.items()}

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
