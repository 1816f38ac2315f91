"""What a value can be: a `Tensor` of one `DType`, a `Bundle` of values that travel together, or an `Async` tensor that is still on its way.

A dimension is an int, or a `Ragged` one: a named extent known only at run time, under a static bound. Quantised data and
its scales are two ordinary tensors, and sharding is not a type: both would otherwise have to be understood by every op.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import cached_property
from math import prod

from .errors import DscError


class DType(Enum):
    """An element type. `bits` is what one element counts for in memory figures; `kind` is float, int or bool."""

    f64 = ("float", 64)
    f32 = ("float", 32)
    f16 = ("float", 16)
    bf16 = ("float", 16)
    e5m6 = ("float", 12)  # FP16 without its last four mantissa bits: DeepSeek's cache of the attention output
    f8e4m3 = ("float", 8)  # the "fn" form: no infinity, largest value 448
    f8e5m2 = ("float", 8)
    e8m0 = ("float", 8)  # a power of two: a scale
    i64 = ("int", 64)
    i32 = ("int", 32)
    i16 = ("int", 16)
    i8 = ("int", 8)
    u8 = ("int", 8)
    bool = ("bool", 8)

    def __new__(cls, kind: str, bits: int) -> DType:
        member = object.__new__(cls)
        member._value_ = len(cls.__members__)  # the tuples are not unique, and an Enum would make equals aliases
        return member

    def __init__(self, kind: str, bits: int) -> None:
        self.kind = kind
        self.bits = bits

    __hash__ = object.__hash__  # Enum's is written in Python, and tables by dtype are looked up for every op that runs

    @property
    def is_float(self) -> builtins.bool:
        return self.kind == "float"

    @property
    def is_int(self) -> builtins.bool:
        return self.kind == "int"

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"DType.{self.name}"


@dataclass(frozen=True, slots=True)
class Ragged:
    """A dimension known only at run time: `rows<=4608`. Two are equal when name and bound are."""

    name: str
    bound: int

    def __str__(self) -> str:
        return f"{self.name}<={self.bound}"


Dim = int | Ragged
Shape = tuple[Dim, ...]


def bound(dim: Dim) -> int:
    """The largest extent that `dim` can have."""
    return dim.bound if isinstance(dim, Ragged) else dim


@dataclass(frozen=True)
class Tensor:
    """A dense array: `bf16[4096, 7168]`. Rank 0 is written `f32[]`. A negative dimension raises `DscError`."""

    dtype: DType
    shape: Shape

    def __post_init__(self) -> None:
        for dim in self.shape:
            if bound(dim) < 0:
                raise DscError(f"a dimension is 0 or more, found {self}")

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def size(self) -> int:
        """Number of elements, ragged dimensions at their bound."""
        return prod(bound(dim) for dim in self.shape)

    @cached_property
    def bytes(self) -> int:
        """Bytes in memory, ragged dimensions at their bound; an odd number of 12-bit values is rounded up."""
        return int(-(-Fraction(self.size * self.dtype.bits, 8) // 1))

    @property
    def is_static(self) -> bool:
        return all(isinstance(dim, int) for dim in self.shape)

    @cached_property
    def _text(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"

    def __str__(self) -> str:
        return self._text  # kept: type rules say it in messages that are seldom shown


@dataclass(frozen=True)
class Bundle:
    """Several values as one: residuals on their way to a backward function, or the handle of a dispatch."""

    fields: tuple[Type, ...]

    @property
    def bytes(self) -> int:
        return sum(field.bytes for field in self.fields)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor in it, bundles within it included, in order."""
        for field in self.fields:
            yield from tensors(field)

    def __str__(self) -> str:
        return f"bundle{{{', '.join(map(str, self.fields))}}}"


@dataclass(frozen=True)
class Async:
    """A tensor that a started collective is going to bring: `async bf16[4, 8]`. Only a `done` can read it."""

    tensor: Tensor

    @property
    def bytes(self) -> int:
        return self.tensor.bytes

    def __str__(self) -> str:
        return f"async {self.tensor}"


Type = Tensor | Bundle | Async


def landed(type: Type) -> Tensor | Bundle:
    """What a value of this type is once it is there."""
    return type.tensor if isinstance(type, Async) else type


def tensors(type: Type) -> Iterator[Tensor]:
    """The tensors that a value of this type holds, or is going to hold."""
    there = landed(type)
    if isinstance(there, Bundle):
        yield from there.tensors()
    else:
        yield there
