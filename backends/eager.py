"""A backend that runs a module op by op, in program order: the walk that needs doing whatever computes the ops.

A class derived from `Eager` says in `compute` what one op gives. Weights, constants, calls, fused ops, observers and the letting go of
values are seen to here; so is the error that names the op it met. `numpy_ref` is such a backend, and one of your own may be
(docs/adding_a_backend.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias, cast

from ..distributed.world import Program, alone
from ..ir.core import Func, Module, Op, Value
from ..ir.errors import DscError, require
from ..ir.liveness import last_uses
from ..ir.ops.collective import Collective, Done, Transfer
from ..ir.ops.control import Call, Constant, Param
from ..ir.ops.fused import Fused, expansion
from ..ir.ops.internode import Internode
from ..ir.types import Bundle, Tensor, Type, landed
from ..ir.walk import join
from . import Observer, Site, Weights
from .arrays import Array, Data, describe, fits

Held: TypeAlias = Any
"""What a value is while the backend has it: whatever `hold` makes of an array, or for a bundle a tuple of such."""

Compute: TypeAlias = Callable[[tuple[Held, ...]], tuple[Held, ...]]
"""What one op does: operands in, results out."""


class Eager(ABC):
    """A `Runner` made of what one op gives."""

    @abstractmethod
    def compute(self, op: Op, operands: tuple[Held, ...]) -> tuple[Held, ...]:
        """The results of one op, as many as it has: of any but `param`, `constant`, `call`, `fused` and `done`."""

    def prepare(self, op: Op) -> Compute:
        """What `compute` does of `op`, for any number of runs: what follows from the op alone may be worked out here."""
        return partial(self.compute, op)

    def hold(self, x: Array, type: Tensor) -> Held:
        """An array as the backend works with it. Nobody writes to it."""
        return x

    def give(self, x: Held, type: Tensor) -> Array:
        """What `hold` made or `compute` returned as an array in the storage of `type` (`backends.arrays.STORAGE`)."""
        return cast(Array, x)

    def together(self, site: Site, op: Collective, operands: tuple[Held, ...]) -> Program[tuple[Held, ...]]:
        """The results of a collective, as a program that asks the other ranks. As it stands here: for one rank alone."""
        ranks = op.attributes["size"]
        require(ranks == 1, f"{op.name} over {ranks} ranks: this backend runs on one")
        return self.compute(op, operands)
        yield  # no request, but a program nevertheless

    def begin(self, site: Site, op: Transfer, operands: tuple[Held, ...]) -> Program[Any]:
        """What stands for a started collective until its `done`. As it stands here: its results, which are there at once."""
        return (yield from self.together(site, op.copy(start=False), operands))

    def land(self, site: Site, flight: Any) -> Program[tuple[Held, ...]]:
        """The results of a started collective, from what `begin` returned."""
        return tuple(flight)
        yield

    def run(self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None) -> tuple[Data, ...]:
        """What the main function gives for `inputs`. `DscError` where an input or a weight is not what the program declares."""
        return alone(self.steps(module, weights, inputs, observe))

    def evaluate(self, op: Op, operands: Sequence[Data]) -> tuple[Data, ...]:
        """The results of one op. `DscError` for `param`, `constant`, `call` and `fused`, which need a module."""
        require(not isinstance(op, Param | Constant | Call), f"{op.name} has no meaning outside a module")
        if isinstance(op, Done):  # what it waits for is what it is given
            return checked(op, tuple(operands))
        given = tuple(_each(self.hold, x, v.type) for x, v in zip(operands, op.operands, strict=True))
        return checked(op, self.given(op.results, self.compute(op, given)))

    def expanded(self, op: Op, operands: tuple[Held, ...]) -> tuple[Held, ...]:
        """The results of an op by what it means in others: its `expand`, op by op, each rounded. `DscError` where it declares none."""
        func = expansion(op)
        if func is None:
            raise DscError(f"this backend has no {op.name}")
        values: dict[Value, Held] = dict(zip(op.operands, operands, strict=True))
        for inner in func.ops:
            values.update(zip(inner.results, self.compute(inner, tuple(values[v] for v in inner.operands)), strict=True))
        return tuple(values[v] for v in func.results)

    def steps(self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None) -> Program[tuple[Data, ...]]:
        """`run` as a program that stops at each collective until the other ranks are there (`distributed/world.py`)."""
        main = module.main
        check_inputs(main, inputs)
        given = tuple(_each(self.hold, x, v.type) for x, v in zip(inputs, main.params, strict=True))
        results = yield from _Run(self, module, weights, observe).call(main, "", given)
        return self.given(main.results, results)

    def given(self, values: Sequence[Value], held: Sequence[Held]) -> tuple[Data, ...]:
        """The arrays of `held`, which are of `values`."""
        return tuple(_each(self.give, x, v.type) for x, v in zip(held, values, strict=True))


def hop_by_hop(
    op: Internode, operands: Sequence[Held], compute: Callable[[Op, tuple[Held, ...]], Sequence[Held]], ask: Callable[..., Program[Any]]
) -> Program[Any]:
    """An exchange over nodes by what it means: `compute` gives the results of an op, `ask` is the program of a collective, of it and its
    operands, which like this one returns one result or a tuple."""
    values: dict[Value, Held] = dict(zip(op.operands, operands, strict=True))
    for inner in op.meaning.ops:
        given = tuple(values[v] for v in inner.operands)
        found = (yield from ask(inner, *given)) if isinstance(inner, Collective) else compute(inner, given)
        several = len(inner.results) > 1 or not isinstance(inner, Collective)
        values.update(zip(inner.results, found if several else (found,), strict=True))
    results = tuple(values[v] for v in op.meaning.results)
    return results if len(results) > 1 else results[0]


def _each(change: Any, x: Any, type: Type) -> Any:
    there = landed(type)
    return tuple(_each(change, f, t) for f, t in zip(x, there.fields, strict=True)) if isinstance(there, Bundle) else change(x, there)


def check_inputs(main: Func, inputs: Sequence[Data], holds: Callable[[Any, Type], bool] = lambda x, type: False) -> None:
    """`DscError` unless `inputs` are what `main` takes: arrays, or what the backend `holds` already."""
    takes = f"@{main.name} takes {len(main.params)} inputs"
    require(len(inputs) == len(main.params), f"{takes} ({', '.join(map(repr, main.params))}), found {len(inputs)}")
    for param, given in zip(main.params, inputs, strict=True):
        if not (fits(given, param.type) or holds(given, param.type)):
            raise DscError(f"parameter %{param.name} of @{main.name}: expected {param.type}, found {describe(given)}")


def checked(op: Op, results: tuple[Data, ...]) -> tuple[Data, ...]:
    """`results`, if each is of the type that the op's rule gives it."""
    return tuple([fitted(value, result) for value, result in zip(op.results, results, strict=True)])


def fitted(value: Value, found: Data) -> Data:
    """`found`, if it is of the type of `value`."""
    if not fits(found, value.type):  # said only then: describing costs more than many an op
        raise DscError(f"%{value.name}: expected {value.type}, found {describe(found)}")
    return found


@dataclass(frozen=True, slots=True)
class Step:
    """One op, made ready. Values are numbered: the parameters of the function, then what each op gives."""

    op: Op
    take: Callable[[list[Held]], tuple[Held, ...]]
    """The operands, out of all values."""
    gives: tuple[int, ...]
    dies: tuple[int, ...]
    """What nothing reads afterwards."""
    compute: Compute | None
    """What a rank does alone; None of an op that needs the module, its weights or other ranks."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A function made ready for one backend: its steps, the numbers of its results, and how many values there are besides parameters."""

    steps: tuple[Step, ...]
    results: tuple[int, ...]
    count: int


def plan_of(backend: Eager, func: Func) -> Plan:
    """How `backend` runs `func`: worked out once for all calls, ranks and runs."""
    found: tuple[Eager, Plan] | None = func.kept.get(id(backend))
    if found is None:  # kept beside the backend, whose id is nobody else's as long as it lives
        found = func.kept[id(backend)] = backend, _plan(backend, func)
    return found[1]


def _plan(backend: Eager, func: Func) -> Plan:
    made = tuple(result for op in func.ops for result in op.results)
    number = {value: i for i, value in enumerate((*func.params, *made))}

    def step(op: Op, dying: Sequence[Value]) -> Step:
        takes, gives, dies = (tuple(number[v] for v in values) for values in (op.operands, op.results, dying))
        compute = None if isinstance(op, Param | Constant | Call | Collective | Done) else backend.prepare(op)
        return Step(op, _taking(takes), gives, dies, compute)

    return Plan(tuple(map(step, func.ops, last_uses(func))), tuple(number[v] for v in func.results), len(made))


def _taking(numbers: tuple[int, ...]) -> Callable[[list[Held]], tuple[Held, ...]]:
    """The values of these numbers, as fast as Python can."""
    if len(numbers) > 1:
        return itemgetter(*numbers)
    return (lambda values: (values[numbers[0]],)) if numbers else (lambda values: ())


@dataclass(frozen=True)
class _Run:
    """One execution of a module."""

    backend: Eager
    module: Module
    weights: Weights
    observe: Observer | None
    runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each function has been entered with each prefix."""

    def call(self, func: Func, prefix: str, inputs: Sequence[Held]) -> Program[tuple[Held, ...]]:
        """The results of `func`, the names of its weights under `prefix`."""
        self.runs[func.name, prefix] += 1
        return (yield from self.steps(func, Site(func.name, prefix, "", self.runs[func.name, prefix]), inputs))

    def steps(self, func: Func, within: Site, inputs: Sequence[Held]) -> Program[tuple[Held, ...]]:
        """The results of `func`, whose ops are seen in the function, prefix and run of `within`."""
        plan = plan_of(self.backend, func)
        values: list[Held] = [*inputs, *(None,) * plan.count]
        for step in plan.steps:
            op, operands = step.op, step.take(values)
            try:
                if step.compute is not None:
                    results = step.compute(operands)
                elif isinstance(op, Param):
                    name, type = join(within.weights, op.path), cast(Tensor, op.result_types[0])
                    results = (self.source("weight", name, self.weights(name, type), type),)
                else:
                    results = yield from self.special(within, op, operands)
                if self.observe is not None:
                    results = self.observed(self.observe, at(within, op), op, operands, results)
            except OpError:
                raise
            except DscError as error:
                raise OpError(f"{at(within, op)}: {op.name}: {error}") from None
            for i, result in zip(step.gives, results, strict=True):
                values[i] = result
            for i in step.dies:
                values[i] = None
        return tuple(values[i] for i in plan.results)

    def special(self, within: Site, op: Op, operands: tuple[Held, ...]) -> Program[tuple[Held, ...]]:
        """The results of an op that needs the module or other ranks."""
        match op:
            case Fused():  # its ops keep the ids that they had here, and are seen before the whole
                return (yield from self.steps(self.module[op.callee], within, operands))
            case Call():
                return (yield from self.call(self.module[op.callee], join(within.weights, op.weights), operands))
            case Transfer(start=True):
                flight = yield from self.backend.begin(at(within, op), op, operands)
                return (flight,) * len(op.results)
            case Done():
                return (yield from self.backend.land(at(within, op), operands[0]))
            case Collective():
                return (yield from self.backend.together(at(within, op), op, operands))
        assert isinstance(op, Constant)
        require(op.path in self.module.constants, f"the module has no constant {op.path!r}")
        return (self.source("constant", op.path, self.module.constants[op.path], op.result.tensor),)

    def observed(self, observe: Observer, site: Site, op: Op, operands: tuple[Held, ...], results: tuple[Held, ...]) -> tuple[Held, ...]:
        """`results` as the observer leaves them. It sees no calls, and of a started collective the end."""
        if (isinstance(op, Call) and not isinstance(op, Fused)) or (isinstance(op, Transfer) and op.start):
            return results
        backend, taken = self.backend, results if isinstance(op, Done) else operands
        replaced = observe(site, op, backend.given(op.operands, taken), backend.given(op.results, results))
        if replaced is None:
            return results
        return tuple(_each(backend.hold, x, v.type) for x, v in zip(checked(op, tuple(replaced)), op.results, strict=True))

    def source(self, what: str, name: str, found: Data, type: Tensor) -> Held:
        """A weight or a constant, if it is of the declared type."""
        if not fits(found, type):
            raise DscError(f"{what} {name}: expected {type}, found {describe(found)}")
        return self.backend.hold(found, type)


def at(within: Site, op: Op) -> Site:
    """Where `op` stands."""
    return Site(within.func, within.weights, op.id, within.run)


class OpError(DscError):
    """An error that already says which op it met."""
