"""Weights, constants, calls and bundles: what ties functions and values together."""

from __future__ import annotations

from ..core import Op, Symbol, Trait, Value, op
from ..errors import require
from ..types import Bundle, DType, Tensor, Type


@op("param", Trait.SOURCE)
class Param(Op):
    """A weight, by the name that the checkpoint gives it. In a called function the name is relative to the call's `weights`.

    `shard` says along which mesh axes each dimension of the checkpoint's tensor is cut (ir/sharding.py); the result is a rank's part.
    """

    path: str
    result_types: tuple[Type, ...]
    shard: tuple[str, ...] = ()

    def infer(self) -> tuple[Type, ...]:
        require(len(self.result_types) == 1, f"a weight is one tensor, found {len(self.result_types)} results")
        rank = len(self.result_types[0].shape) if isinstance(self.result_types[0], Tensor) else 0
        require(len(self.shard) <= rank, f"shard names {len(self.shard)} dimensions of {self.result_types[0]}")
        return self.result_types


@op("constant", Trait.SOURCE)
class Constant(Op):
    """An array of the module's constants, by name: what no checkpoint holds and a literal is too small for."""

    path: str
    result_types: tuple[Type, ...]

    def infer(self) -> tuple[Type, ...]:
        require(len(self.result_types) == 1, f"a constant is one tensor, found {len(self.result_types)} results")
        return self.result_types


LITERAL_LIMIT = 4096
"""Elements that a literal may have; more go to the module's constants."""


@op("literal", Trait.SOURCE)
class Literal(Op):
    """Given numbers, in row-major order and exact in text; a single number fills the whole shape."""

    values: tuple[int | float, ...]
    shape: tuple[int, ...]
    dtype: DType

    def infer(self) -> tuple[Type, ...]:
        made = Tensor(self.dtype, self.shape)
        require(len(self.values) in (1, made.size), f"{made} holds {made.size} numbers, found {len(self.values)}")
        require(len(self.values) <= LITERAL_LIMIT, f"a literal holds at most {LITERAL_LIMIT} numbers, found {len(self.values)}")
        whole = all(isinstance(v, int) for v in self.values)
        require(whole or self.dtype.is_float, f"{self.dtype} holds whole numbers, found fractions")
        return (made,)


@op("iota", Trait.SOURCE)
class Iota(Op):
    """start, start + step, ..., `length` numbers in all."""

    length: int
    dtype: DType
    start: int = 0
    step: int = 1

    def infer(self) -> tuple[Type, ...]:
        require(self.length >= 0, f"length is {self.length}, expected 0 or more")
        return (Tensor(self.dtype, (self.length,)),)


@op("call")
class Call(Op):
    """Run another function of the module; `weights` is put before the names of its weights, with a dot."""

    callee: Symbol
    args: tuple[Value, ...]
    result_types: tuple[Type, ...]
    weights: str = ""

    def infer(self) -> tuple[Type, ...]:
        return self.result_types


@op("pack", Trait.VIEW)
class Pack(Op):
    """Several values as one bundle."""

    values: tuple[Value, ...]

    def infer(self) -> tuple[Type, ...]:
        return (Bundle(tuple(v.type for v in self.values)),)


@op("unpack", Trait.VIEW)
class Unpack(Op):
    """The values of a bundle."""

    x: Value

    def infer(self) -> tuple[Type, ...]:
        return self.x.bundle.fields
