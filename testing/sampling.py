"""What a sample of an op is, and how the tables `samples.py` and `wrong_calls.py` are written.

A sample's arrays come from a seeded generator within the domain of the op: a logarithm gets positive numbers, ids lie in
range, counts add up to rows and some groups are empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from ..backends.arrays import STORAGE, Array, Data, rounded
from ..ir.core import Builder, Func, Module, Op, Role, Value
from ..ir.ops.collective import AllGather
from ..ir.ops.control import Call, Constant, Param
from ..ir.ops.elementwise import Add
from ..ir.ops.fused import Fused
from ..ir.printer import print_attribute
from ..ir.types import Async, Bundle, DType, Ragged, Shape, Tensor, Type, landed, tensors

Generator = np.random.Generator
Domain = Callable[[Generator, tuple[int, ...]], Array]
"""Draws numbers of a shape, as float64, int64 or bool: the sample rounds them to its dtype."""


@dataclass(frozen=True)
class Operand:
    """One operand: its type and where its numbers come from. A bundle's tensors share the domain."""

    type: Type
    domain: Domain

    def draw(self, rng: Generator) -> Data:
        """Seeded numbers of the type; a ragged extent is two below its bound."""
        type = landed(self.type)
        if isinstance(type, Bundle):
            return tuple(Operand(field, self.domain).draw(rng) for field in type.fields)
        return draw(type, self.domain, rng)


def draw(type: Tensor, domain: Domain, rng: Generator) -> Array:
    """An array of `type` with numbers of `domain`."""
    numbers = domain(rng, tuple(d.bound - 2 if isinstance(d, Ragged) else d for d in type.shape))
    return rounded(np.asarray(numbers, np.float64), type.dtype) if type.dtype.is_float else np.asarray(numbers).astype(STORAGE[type.dtype])


@dataclass(frozen=True)
class Sample:
    """A well-typed call of one op."""

    cls: type[Op]
    operands: tuple[Operand, ...]
    attributes: dict[str, Any] = field(hash=False)
    """Those of the op, and None for an optional operand that is absent before one that is not."""
    tag: str = ""
    """What is special about it."""

    @property
    def name(self) -> str:
        shown = ((key, value) for key, value in self.attributes.items() if value is not None and key != "result_types")
        attributes = (f"{key}={print_attribute(value)}" for key, value in shown)
        given = ", ".join([*(str(o.type) for o in self.operands), *attributes])
        return f"{self.cls.name}({given}){f' {self.tag}' if self.tag else ''}"

    def arrays(self, seed: int = 0) -> tuple[Data, ...]:
        """The operands' values; another seed, other numbers."""
        rng = np.random.default_rng([seed, *self.cls.name.encode()])
        return tuple(operand.draw(rng) for operand in self.operands)

    def op(self, *values: Value) -> Op:
        """The op on `values`, by default on values of its own."""
        given = values or tuple(Value(o.type, f"x{i}") for i, o in enumerate(self.operands))
        return make(self.cls, given, self.attributes)

    def module(self) -> Module:
        """A function of the operands that returns every result of the op. What is on its way is that of a collective of one rank."""
        b = Builder("sample")
        given = [b.param(f"x{i}", landed(o.type)) for i, o in enumerate(self.operands)]
        started = (isinstance(o.type, Async) for o in self.operands)
        made = b.emit(self.op(*(b.emit(AllGather(x, "dp", 1, start=True)).result if s else x for x, s in zip(given, started, strict=True))))
        funcs: tuple[Func, ...] = (b.finish(made.results),)
        if isinstance(made, Call):
            funcs = (*funcs, _doubled(made.callee, made.result.tensor, weighted=not isinstance(made, Fused)))
        constants = {made.path: seeded(made.path, made.result.tensor)} if isinstance(made, Constant) else {}
        return Module(funcs, constants=constants)


def seeded(name: str, type: Tensor) -> Array:
    """Weights for the modules of samples and random programs: numbers that depend on the name and the type alone."""
    return draw(type, normal if type.dtype.is_float else integers(-9, 9), np.random.default_rng(list(name.encode())))


def make(cls: type[Op], values: tuple[Value, ...], attributes: dict[str, Any]) -> Op:
    """An op of `cls` on `values`, shared out over its operand fields in order, but for those that `attributes` say are None.

    `DscError` where its type rule refuses them.
    """
    given: dict[str, Any] = {}
    rest = list(values)
    fields = [a for a in cls.arguments if a.role is not Role.ATTRIBUTE]
    for i, argument in enumerate(fields):
        if argument.role is Role.OPERANDS:
            count = len(rest) - sum(a.required for a in fields[i + 1 :])
            given[argument.name], rest = tuple(rest[:count]), rest[count:]
        elif rest and argument.name not in attributes:
            given[argument.name] = rest.pop(0)
    return cls(**given, **attributes)


def _doubled(name: str, type: Tensor, weighted: bool) -> Func:
    b = Builder(name, component=name)
    x = b.param("x", type)
    other = b.emit(Param("w", (type,))).result if weighted else x
    return b.finish([b.emit(Add(x, other)).result])


@dataclass(frozen=True)
class WrongCall:
    """A call that the type rule refuses, and the whole of its message."""

    cls: type[Op]
    types: tuple[Type, ...]
    attributes: dict[str, Any] = field(hash=False)
    message: str

    @property
    def name(self) -> str:
        return f"{self.cls.name}({' '.join(map(str, self.types))}): {self.message}"

    def make(self) -> Op:
        """Raises the `DscError`."""
        return make(self.cls, tuple(Value(t, f"x{i}") for i, t in enumerate(self.types)), self.attributes)


# ---- domains


def normal(rng: Generator, shape: tuple[int, ...]) -> Array:
    """Standard normal."""
    return rng.standard_normal(shape)


def wide(rng: Generator, shape: tuple[int, ...]) -> Array:
    """Magnitudes over 2^-12 to 2^12, either sign, a few zeros."""
    return rng.standard_normal(shape) * np.exp2(rng.integers(-12, 12, shape)) * (rng.random(shape) > 0.05)


def positive(rng: Generator, shape: tuple[int, ...]) -> Array:
    """From 0.1 to 10."""
    return np.exp(rng.uniform(np.log(0.1), np.log(10), shape))


def away_from_zero(rng: Generator, shape: tuple[int, ...]) -> Array:
    """From 0.5 to 2, either sign."""
    return rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)


def integers(low: int, high: int) -> Domain:
    """low .. high - 1."""
    return lambda rng, shape: rng.integers(low, high, shape)


def repeated(low: int, high: int) -> Domain:
    """low .. high - 1 as floats: many equal ones."""
    return lambda rng, shape: rng.integers(low, high, shape).astype(np.float64)


def coin(rng: Generator, shape: tuple[int, ...]) -> Array:
    """True for half."""
    return rng.random(shape) < 0.5


def coin_but_first(rng: Generator, shape: tuple[int, ...]) -> Array:
    """True for half, but nowhere in the first row: a query that sees no key."""
    kept = rng.random(shape) < 0.5
    kept[..., 0, :] = False
    return kept


def closed(rng: Generator, shape: tuple[int, ...]) -> Array:
    """Standard normal, and -inf for a third."""
    return np.where(rng.random(shape) < 1 / 3, -np.inf, rng.standard_normal(shape))


def choices(options: int) -> Domain:
    """Distinct numbers of 0 .. options - 1 along the last axis."""

    def domain(rng: Generator, shape: tuple[int, ...]) -> Array:
        every = np.broadcast_to(np.arange(options), (*shape[:-1], options))
        return rng.permuted(every, axis=-1)[..., : shape[-1]]

    return domain


def permutation(rng: Generator, shape: tuple[int, ...]) -> Array:
    """0 .. n - 1 in some order."""
    return rng.permutation(shape[0])


def counts(total: int) -> Domain:
    """Numbers that add up to `total`; the second is 0 and the last has most."""

    def domain(rng: Generator, shape: tuple[int, ...]) -> Array:
        size = int(np.prod(shape))
        shares = np.arange(1, size + 1) * (np.arange(size) != 1)
        return rng.multinomial(total, shares / shares.sum()).reshape(shape)

    return domain


def boundaries(total: int) -> Domain:
    """Where documents of `total` tokens begin and end; some may be empty."""

    def domain(rng: Generator, shape: tuple[int, ...]) -> Array:
        return np.sort(np.concatenate([[0, total], rng.integers(0, total + 1, shape[0] - 2)]))

    return domain


def labels(classes: int, ignore: int) -> Domain:
    """Classes, about every fifth ignored."""
    return lambda rng, shape: np.where(rng.random(shape) < 0.2, ignore, rng.integers(0, classes, shape))


def constantly(value: float) -> Domain:
    """The same number everywhere."""
    return lambda rng, shape: np.full(shape, value)


# ---- how a table is written


def tensor(text: str) -> Type:
    """A type from its text: `bf16[4, rows<=9]`, `bundle{i32[6]}`, `async f32[4]`."""
    if text.startswith("async "):
        return Async(cast(Tensor, tensor(text.removeprefix("async "))))
    if text.startswith("bundle{"):
        return Bundle(tuple(tensor(t) for t in re.findall(r"\w+\[[^]]*\]", text)))
    dtype, dims = cast(re.Match[str], re.fullmatch(r"(\w+)\[(.*)\]", text)).groups()
    return Tensor(DType[dtype], cast(Shape, tuple(_dim(d.strip()) for d in dims.split(",") if d.strip())))


def _dim(text: str) -> int | Ragged:
    name, _, limit = text.partition("<=")
    return Ragged(name, int(limit)) if limit else int(text)


Written = str | tuple[str, Domain]


def operand(written: Written) -> Operand:
    """An operand from its type, with a domain unless the usual one will do."""
    text, domain = (written, None) if isinstance(written, str) else written
    type = tensor(text)
    first = next(tensors(type))
    usual = normal if first.dtype.is_float else integers(-9, 9) if first.dtype.is_int else coin
    return Operand(type, domain or usual)


def sample(cls: type[Op], *operands: Written, tag: str = "", **attributes: Any) -> Sample:
    """One line of a table."""
    return Sample(cls, tuple(map(operand, operands)), attributes, tag)


def wrong(cls: type[Op], *types: str, message: str, **attributes: Any) -> WrongCall:
    """One line of a table of wrong calls."""
    return WrongCall(cls, tuple(map(tensor, types)), attributes, message)


def result(text: str) -> tuple[Type, ...]:
    """The `result_types` of a weight or a call."""
    return (tensor(text),)
