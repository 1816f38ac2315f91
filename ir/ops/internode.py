"""Rows between nodes by one kernel: over the network to the rank of the sender's index in each node, and on inside the node as they arrive.

These are DeepSeek's kernels for training and prefill (DeepSeek-V3 report, section 3.2.2; `internode_dispatch` and `internode_combine` of
deepseek-ai/DeepEP): a token crosses the network once for each node that holds one of its experts, and a node's links once for each rank
that does. What such a kernel leaves at each rank is what two exchanges leave, one for each hop, with rows sorted and added up between
them: that is the `expand` of these ops, and what they mean bit for bit. A backend without the kernel runs it.

The `size` ranks along `axis` lie in `nodes` nodes. A hop is an exchange along `axis.node`, the next along `axis.local`; where each rank is
a node by itself, or all are in one, there is one hop. The handle is all that the way needs, there and back: of each hop the ids of the
tokens that it was given, the token of each row, and how many rows go to each rank and come from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from ..core import Builder, Func, Op, Trait, Value, family, op
from ..errors import require
from ..types import Ragged, Tensor, bound
from .collective import AllToAll, AllToAllRows, Collective, RowExchange
from .control import Unpack
from .fused import expansion
from .moe import CombineGroups, DispatchGroups
from .shape import Take

HOPS = {"node": ("to_nodes", "entered"), "local": ("to_ranks", "arrived")}
"""The legs of the way there, and what rows are called where they leave and where they arrive."""
WAY = ("ids", "tokens", "send", "recv")
"""What the handle holds of each hop."""


@family
class Internode(RowExchange):
    """What the ops of this file share."""

    @cached_property
    def meaning(self) -> Func:
        """Hop by hop, in other ops."""
        func = expansion(self)
        assert func is not None
        return func

    @property
    def hops(self) -> list[tuple[str, int]]:
        """The axis of each hop, and its ranks."""
        axis, size = self.along()
        nodes = self.attributes["nodes"]
        require(nodes >= 1 and self.require_ranks() % nodes == 0, f"{size} ranks along {axis} do not make {nodes} equal nodes")
        every = [(f"{axis}.node", nodes), (f"{axis}.local", size // nodes)]
        return [hop for hop in every if hop[1] > 1] or every[1:]

    def brought(self) -> tuple[Tensor, ...]:
        return tuple(v.tensor for v in self.expand(Builder("types")))

    def expand(self, b: Builder) -> tuple[Value, ...]:
        raise TypeError(f"{type(self).__name__} declares no meaning")

    def flops(self) -> int:
        return sum(inner.flops() for inner in self.meaning.ops)

    def steps(self, b: Builder, handle: Value) -> Iterator[tuple[str, int, Sequence[Value]]]:
        """Each hop's axis and ranks, and what `handle` holds of it."""
        expected = len(WAY) * len(self.hops)
        found = len(handle.bundle.fields)
        require(found == expected, f"the handle is {handle.type}, expected {expected} fields: {', '.join(WAY)} of each hop")
        fields = b.emit(Unpack(handle, names=WAY * len(self.hops))).results
        for i, (axis, ranks) in enumerate(self.hops):
            yield axis, ranks, fields[len(WAY) * i :][: len(WAY)]


def arriving(axis: str, bound: int) -> Ragged:
    """The rows that arrive by a hop."""
    return Ragged(HOPS[axis.rpartition(".")[2]][1], bound)


@op("internode_dispatch", Trait.COLLECTIVE, Trait.ROUTING)
class InternodeDispatch(Internode):
    """Tokens to the ranks of their experts: each token's vector once to each rank that holds one, over the network once to each node.

    Every x [T, H] (codes and their scales travel together) goes by ids i32[T, k]; rank r holds experts r * experts / size and up, and a
    negative id is a slot without expert. Gives the rows [R, H] that arrive, in the order of the ranks through which they came; what each
    chose of this rank's experts, i32[R, k], -1 where the slot's expert is elsewhere; and the handle's fields but for the first, which is
    ids. Its backward is `internode_combine`.
    """

    xs: tuple[Value, ...]
    ids: Value
    experts: int
    axis: str
    size: int
    nodes: int

    def expand(self, b: Builder) -> tuple[Value, ...]:
        xs, ids, held, most = self.xs, self.ids, self.experts, bound(self.ids.shape[0])
        require(held > 0 and held % self.require_ranks() == 0, f"{held} experts do not make equal parts for {self.size} ranks")
        names, way = tuple(x.name for x in xs), list[Value]()
        for axis, ranks in self.hops:
            leaving, _ = HOPS[axis.rpartition(".")[2]]
            held, most = held // ranks, most * ranks
            made = b.emit(DispatchGroups(xs, ids, ranks, held, leaving, names=(*names, "ids", "send", "tokens")))
            *rows, inside, send, tokens = made.results
            recv = b.emit(AllToAll(send, axis, ranks, names=("recv",))).result
            way += [ids, tokens, send, recv]
            come = b.emit(AllToAllRows((*rows, inside), send, recv, axis, ranks, arriving(axis, most), names=(*names, "ids")))
            xs, ids = come.results[:-1], come.results[-1]
        return (*xs, ids, *way[1:])


@op("internode_combine", Trait.COLLECTIVE)
class InternodeCombine(Internode):
    """Rows of ranks back to tokens: out[t] = sum of the rows of token t, those of a node added up before they cross the network.

    rows [R, H] and the handle of an `internode_dispatch` give [T, H]. Each sum, of a node and of the token, is accumulated in float32 in
    the order of the ranks, and rounded to the dtype of the rows, as DeepEP's kernel does. Its backward is `internode_redispatch`.
    """

    rows: Value
    handle: Value
    axis: str
    size: int
    nodes: int

    def expand(self, b: Builder) -> tuple[Value, ...]:
        x, names = self.rows, (self.rows.name,)
        for axis, ranks, (ids, tokens, send, recv) in reversed([*self.steps(b, self.handle)]):
            back = b.emit(AllToAllRows((x,), recv, send, axis, ranks, tokens.shape[0], names=names)).result
            x = b.emit(CombineGroups(back, tokens, ids, names=names)).result
        return (x,)


@op("internode_redispatch", Trait.COLLECTIVE)
class InternodeRedispatch(Internode):
    """Other vectors of the same tokens by the same way: every x [T, H] gives rows [R, H], as the `internode_dispatch` of the handle did.

    With it the gradient of `internode_combine` reaches the experts; it is DeepEP's dispatch with a cached handle.
    """

    xs: tuple[Value, ...]
    handle: Value
    axis: str
    size: int
    nodes: int

    def expand(self, b: Builder) -> tuple[Value, ...]:
        xs, names = self.xs, tuple(x.name for x in self.xs)
        most = bound(xs[0].shape[0]) if xs else 0
        for axis, ranks, (ids, tokens, send, recv) in self.steps(b, self.handle):
            require(all(x.shape[:1] == ids.shape[:1] for x in xs), f"expected every x as [T, H], a row for each of ids {ids.type}")
            xs, most = tuple(b.emit(Take(x, tokens, names=(x.name,))).result for x in xs), most * ranks
            xs = b.emit(AllToAllRows(xs, send, recv, axis, ranks, arriving(axis, most), names=names)).results
        return xs


def exchanges_of(op: Collective) -> tuple[Collective, ...]:
    """What ranks send for a collective: the collectives that it means, or itself."""
    return tuple(x for x in op.meaning.ops if isinstance(x, Collective)) if isinstance(op, Internode) else (op,)


def meant(op: Op) -> tuple[Op, ...]:
    """The op, or the hops that it means."""
    return op.meaning.ops if isinstance(op, Internode) else (op,)
