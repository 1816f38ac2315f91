"""Collectives: what the ranks of one axis of the mesh do together. Every rank of the axis runs the op at the same point of its program.

`size` is the number of ranks along `axis` (`ir/mesh.py` names the axes); rank i is the one whose index along the axis is i. A type rule
sees no mesh, so a law of the stage `sharded` holds `size` against it. Reductions take the ranks' values exactly, accumulate in float32
in the order of the ranks and round once, so the result does not depend on who runs it or how the ranks are wired.

A collective that sends may be in flight while a rank computes: with `start=true` it only begins, its results are `async`, and one `done` of
all of them, later in the same function, waits and gives the tensors. What it reads has to lie where it is until then.
"""

from __future__ import annotations

from dataclasses import field
from functools import cached_property
from typing import Literal

from ..core import Op, Trait, Value, family, op
from ..errors import require
from ..printer import print_attribute
from ..types import Async, Dim, DType, Tensor, Type
from .rules import axis_of, require_int, static


@family
class Collective(Op):
    """What the ops of this file share."""

    def along(self) -> tuple[str, int]:
        """The axis and how many ranks it has."""
        given = self.attributes
        return given["axis"], given["size"]

    @cached_property
    def signature(self) -> str:
        """The op with its types and attributes, without the names of values: ranks that run it together have the same, started or not."""
        types = (str(v.type) for v in self.operands)
        given = (f"{key}={print_attribute(value)}" for key, value in self.attributes.items() if key != "start")
        return f"{self.name}({', '.join((*types, *given))})"

    def require_ranks(self) -> int:
        """`size`, if it is a number of ranks."""
        axis, size = self.along()
        require(size >= 1, f"size is {size}, expected the number of ranks along {axis}, 1 or more")
        return size


@family
class Transfer(Collective):
    """A collective in which ranks send to one another. `start` lets it begin; what it brings is there after `done`."""

    start: bool = field(default=False, kw_only=True)

    def brought(self) -> tuple[Tensor, ...]:
        """The type rule: what is there in the end."""
        raise TypeError(f"{type(self).__name__} declares no type rule")

    def infer(self) -> tuple[Type, ...]:
        return tuple(map(Async, self.brought())) if self.start else self.brought()


@family
class RowExchange(Transfer):
    """An exchange of rows of tokens: the way to experts on other ranks, or back."""


def _require_numbers(x: Value) -> None:
    require(x.dtype is not DType.bool, f"expected numbers, found {x.type}")


def _resized(x: Value, dim: int, extent: int) -> tuple[Tensor, ...]:
    axis = axis_of(x, dim)
    return (Tensor(x.dtype, (*x.shape[:axis], extent, *x.shape[axis + 1 :])),)


@op("all_gather", Trait.COLLECTIVE)
class AllGather(Transfer):
    """Every rank's x, one after the other along `dim` in the order of the ranks: [..., D, ...] gives [..., size * D, ...] everywhere."""

    x: Value
    axis: str
    size: int
    dim: int = 0

    def brought(self) -> tuple[Tensor, ...]:
        extent = static(self.x, self.name)[axis_of(self.x, self.dim)]
        return _resized(self.x, self.dim, extent * self.require_ranks())


@op("reduce_scatter", Trait.COLLECTIVE)
class ReduceScatter(Transfer):
    """The sum over the ranks, cut along `dim` into equal parts of which rank i keeps part i: [..., size * D, ...] gives [..., D, ...]."""

    x: Value
    axis: str
    size: int
    dim: int = 0

    def brought(self) -> tuple[Tensor, ...]:
        _require_numbers(self.x)
        extent, size = static(self.x, self.name)[axis_of(self.x, self.dim)], self.require_ranks()
        require(extent % size == 0, f"dimension {self.dim} of {self.x.type} does not make {size} equal parts")
        return _resized(self.x, self.dim, extent // size)

    def flops(self) -> int:
        return (self.size - 1) * self.brought()[0].size


@op("all_reduce", Trait.COLLECTIVE)
class AllReduce(Transfer):
    """The sum, or the largest, of every rank's x, element by element, on every rank; of type like x. A NaN stays one; 0 exceeds -0."""

    x: Value
    axis: str
    size: int
    kind: Literal["sum", "max"] = "sum"

    def brought(self) -> tuple[Tensor, ...]:
        _require_numbers(self.x)
        static(self.x, self.name)
        self.require_ranks()
        return (self.x.tensor,)

    def flops(self) -> int:
        """A rank reduces its part, and receives the others'."""
        return (self.size - 1) * self.x.tensor.size // self.size


@op("all_to_all", Trait.COLLECTIVE)
class AllToAll(Transfer):
    """Equal parts along dimension 0: part j goes to rank j, and what rank i sent lies at part i. [size * D, ...] stays of that type."""

    x: Value
    axis: str
    size: int

    def brought(self) -> tuple[Tensor, ...]:
        extents, size = static(self.x, self.name), self.require_ranks()
        require(len(extents) > 0 and extents[0] % size == 0, f"{self.x.type} does not make {size} equal parts along dimension 0")
        return (self.x.tensor,)


@op("all_to_all_rows", Trait.COLLECTIVE)
class AllToAllRows(RowExchange):
    """As many rows to each rank as `send` says: the way of tokens to experts on other ranks, and back.

    The rows of every x [R, ...] (codes and their scales travel together) are sorted by destination: the first send[0] go to rank 0, the
    next send[1] to rank 1, ...; rows beyond their sum stay behind. What rank i sent comes as recv[i] rows, in the order of i. send and recv
    are i32[size], or i32[size, J]: then rows lie on that side in J blocks, each in the order of the ranks, [i, j] counting those of block j
    and rank i. So tokens come sorted by expert, and leave sorted so, while each rank sends and gets one message.

    Each result is [rows, ...]: with `rows` ragged it has as many rows as arrive, and more than the bound are an error; with `rows` a number
    exactly so many arrive. The way back, which is the derivative too, is the same op with send and recv exchanged.
    """

    xs: tuple[Value, ...]
    send: Value
    recv: Value
    axis: str
    size: int
    rows: Dim

    def brought(self) -> tuple[Tensor, ...]:
        size = self.require_ranks()
        for counts in (self.send, self.recv):
            require_int(counts)
            fits = counts.tensor.rank in (1, 2) and counts.shape[0] == size
            require(fits, f"expected send and recv of shape [{size}] or [{size}, blocks], found {self.send.type} and {self.recv.type}")
        require(len(self.xs) > 0 and all(x.tensor.rank > 0 for x in self.xs), "all_to_all_rows needs at least one x of rows")
        for x in self.xs:
            same = x.shape[0] == self.xs[0].shape[0] and all(isinstance(d, int) for d in x.shape[1:])
            require(same, f"expected every x as [R, ...] with the same R, found {self.xs[0].type} and {x.type}")
        return tuple(Tensor(x.dtype, (self.rows, *x.shape[1:])) for x in self.xs)


@op("own_part")
class OwnPart(Collective):
    """This rank's part of what all ranks of the axis hold: [..., size * D, ...] gives [..., D, ...], part i on rank i. Nothing is sent."""

    x: Value
    axis: str
    size: int
    dim: int = 0

    def infer(self) -> tuple[Type, ...]:
        extent, size = static(self.x, self.name)[axis_of(self.x, self.dim)], self.require_ranks()
        require(extent % size == 0, f"dimension {self.dim} of {self.x.type} does not make {size} equal parts")
        return _resized(self.x, self.dim, extent // size)


@op("done", Trait.VIEW, Trait.COLLECTIVE)
class Done(Op):
    """Wait for a started collective, and give what it brought: all of its results, in order, each once."""

    xs: tuple[Value, ...]

    def infer(self) -> tuple[Type, ...]:
        require(len(self.xs) > 0, "done needs the results of a started collective")
        return tuple(x.coming for x in self.xs)

    @property
    def started(self) -> Op | None:
        """What it waits for; None where its operands are a function's parameters."""
        return self.xs[0].owner


def reads(op: Op) -> tuple[Value, ...]:
    """What has to lie in memory until `op` is over: its operands, and of a `done` what the collective that it ends reads, too."""
    if isinstance(op, Done) and op.started is not None:
        return (*op.started.operands, *op.operands)
    return op.operands
