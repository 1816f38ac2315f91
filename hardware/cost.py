"""What an op costs: on one device (`seconds`), or as a rank of a cluster runs it (`Costs`), beside communication or alone.

Computing is `kernels.py`, with `products.py` for matrix products; communication is `links.py`. The coefficients are figures of the device
and the cluster, each with its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..ir.core import Module, Op, Value
from ..ir.errors import require
from ..ir.mesh import ATTRIBUTE, Mesh, mesh_of
from ..ir.ops.attention import AttentionDecode
from ..ir.ops.collective import AllReduce, AllToAll, AllToAllRows, Collective, OwnPart, ReduceScatter, RowExchange, Transfer
from ..ir.ops.control import Param
from ..ir.ops.internode import Internode, exchanges_of
from ..ir.ops.shape import Slice
from ..ir.types import DType, Ragged, Tensor, bound
from .cluster import Cluster
from .device import Device
from .kernels import MATRIX, NOTHING, Compute, Cost, slower
from .links import Group, Legs, exchanged, gathered, group, reduced
from .links import seconds as transfer
from .streams import COMPUTE

__all__ = ["MATRIX", "Cost", "Costs", "seconds"]


def seconds(op: Op, device: Device) -> float:
    """The time that `op` takes alone on `device`, ragged dimensions at their bound. A call is 0: the caller adds up what it runs."""
    return Compute(device).cost(op).seconds


@dataclass(frozen=True)
class Costs:
    """Ops as a rank of `mesh` on `cluster` runs them.

    comm_sms      units that communication takes from computation; by default those of the cluster where `overlap`, else none
    overlap       whether computation and communication run side by side: then both are slower, as the cluster says
    imbalance     rows of the busiest rank by those of the mean, in exchanges of rows; `rows` are to include it themselves
    rows          how long ragged dimensions are expected to be; where nothing is said their bound counts
    repeats       how often the program runs before weights change: what depends on weights alone is run once, and costs its part;
                  inf where they never change
    shared        how many queries of a sequence read its cache at once in decoding
    """

    cluster: Cluster
    mesh: Mesh | None = None
    comm_sms: int | None = None
    overlap: bool = False
    imbalance: float = 1.0
    rows: Mapping[Ragged, float] = field(default_factory=dict)
    repeats: float = 1
    shared: int = 1

    def __post_init__(self) -> None:
        units = self.cluster.device.units
        require(self.imbalance >= 1, f"imbalance is {self.imbalance}, expected 1 or more")
        require(self.repeats >= 1, f"repeats is {self.repeats}, expected 1 or more")
        require(0 <= self.taken < max(2, units), f"comm_sms is {self.taken}, but {self.cluster.device.name} has {units}")

    @classmethod
    def of(cls, module: Module, cluster: Cluster, **options: object) -> Costs:
        """Costs for a module by its own mesh. What leaves a domain is the cluster's to say, how hops go is the mesh's."""
        found: dict[str, object] = {"mesh": mesh_of(module)} if ATTRIBUTE in module.attributes else {}
        return cls(cluster, **(found | options))  # type: ignore[arg-type]

    @property
    def taken(self) -> int:
        """Units that communication takes."""
        if self.comm_sms is not None:
            return self.comm_sms
        return round(self.cluster.comm.sms.mid) if self.overlap else 0

    @cached_property
    def _compute(self) -> Compute:
        device = self.cluster.device
        return Compute(device, device.units - self.taken, self.cluster.features, self.rows)

    @cached_property
    def _weights(self) -> dict[Op, bool]:
        return {}

    def stream(self, op: Op) -> str:
        """Where it runs: `compute`, or the link that it takes longest on, `inter` where ranks lie in several domains, else `intra`."""
        if not isinstance(op, Transfer):
            return COMPUTE
        return "inter" if self._group(*op.along()).nodes > 1 else "intra"

    def seconds(self, op: Op) -> float:
        """How long one execution takes."""
        return self.cost(op).seconds

    def cost(self, op: Op) -> Cost:
        """What one execution takes."""
        if isinstance(op, OwnPart):
            return NOTHING
        if isinstance(op, Collective):
            return self._communication(op)
        cost = self._compute.cost(_together(op, self.shared) if isinstance(op, AttentionDecode) and self.shared > 1 else op)
        if cost is NOTHING:
            return cost
        factor = self.cluster.comm.compute_slowdown.mid if self.overlap else 1.0
        launched = self.cluster.launch.mid
        found = slower(cost, factor, launched)
        if cost.seconds * factor < launched:
            found = replace(found, bound="latency")
        return slower(found, 1 / self.repeats) if self.repeats > 1 and of_weights(op, self._weights) else found

    def send(self, bytes: float, away: bool = True) -> float:
        """Seconds of `bytes` from one rank to another, in another domain or in its own: a hop of the pipeline."""
        legs = Legs(bytes, 0.0) if away else Legs(0.0, bytes)
        return transfer(self.cluster, legs)[0] * (self.cluster.comm.slowdown.mid if self.overlap else 1.0)

    def _group(self, axis: str, size: int) -> Group:
        ranks = self.mesh.group(axis, 0) if self.mesh is not None else tuple(range(size))
        require(len(ranks) == size, f"the op runs on {size} ranks along {axis}, but mesh {self.mesh} has {len(ranks)}")
        return group(ranks, self.cluster.node)

    def _communication(self, op: Collective) -> Cost:
        axis, size = op.along()
        legs = self._legs(op)
        took, moving = transfer(self.cluster, legs)
        if isinstance(op, RowExchange) and size > 1 and axis != "ep.local":  # both hops go by what ranks said before the first
            took += self.cluster.comm.notify.mid
        factor = self.cluster.comm.slowdown.mid if self.overlap else 1.0
        sent = legs.inter + legs.intra
        return Cost(took * factor, "network" if moving else "latency", op.flops(), 2 * sent, sent)

    def _legs(self, op: Collective) -> Legs:
        """What an op sends over each link.

        A kernel that forwards keeps both links busy at once: it takes what the longer of its hops does, and rows are sorted and added up by
        the units that communication has anyway (DeepSeek-V3 report, section 3.2.2). DeepEP's kernels are timed by the same (`tables.py`).
        """
        if isinstance(op, Internode):
            hops = [self._legs(hop) for hop in exchanges_of(op) if isinstance(hop, AllToAllRows)]
            return Legs(sum(hop.inter for hop in hops), sum(hop.intra for hop in hops))
        ranks, whole = self._group(*op.along()), self._compute.bytes(op.operands[0].type)
        match op:
            case AllToAllRows():
                return exchanged(ranks, self._rows(op))
            case ReduceScatter():
                return gathered(ranks, whole / ranks.size)
            case AllReduce():
                return reduced(ranks, whole)
            case AllToAll():
                return exchanged(ranks, whole)
        return gathered(ranks, whole)

    def _rows(self, op: AllToAllRows) -> float:
        """Bytes of rows: by the side whose number of rows is static, else by what is expected, which bears its imbalance."""
        sides = (op.xs[0].shape[0], op.rows)
        static = [d for d in sides if isinstance(d, int)]
        known = [d for d in sides if d in self.rows]
        number = static[0] * self.imbalance if static else self._compute.extent((known or sides)[0])
        return number * sum(self._compute.bytes(x.type) / max(1.0, self._compute.extent(x.shape[0])) for x in op.xs)


def _together(op: AttentionDecode, queries: int) -> AttentionDecode:
    """The same queries, each `queries` of them over one cache, which a page holds; values that are a part of the keys stay one."""
    rows, width = bound(op.q.shape[0]), bound(op.v.shape[-1])
    keys, values = (Value(Tensor(v.dtype, (rows // queries, *v.shape[1:])), v.name) for v in (op.k, op.v))
    values = Slice(keys, 3, 0, width).result if isinstance(op.v.owner, Slice) else values
    return op.copy(k=keys, v=values, pages=Value(Tensor(DType.i32, (rows, 1)), "pages"))


def of_weights(op: Op, known: dict[Op, bool]) -> bool:
    """Whether it depends on weights alone; `known` keeps what was found."""
    if op not in known:
        owners = [v.owner for v in op.operands]
        known[op] = isinstance(op, Param) or (
            bool(owners) and not isinstance(op, Collective) and all(owner is not None and of_weights(owner, known) for owner in owners)
        )
    return known[op]
