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

from ..distributed.world import Abreast, Joint, Program, T, alone, of_rank
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

Results: TypeAlias = Sequence[tuple[Held, ...]]
"""What an op or a function gives on each rank."""


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
        rank, together = Rank(weights, given, observe), partial(self.abreast, module)
        found = yield Abreast((id(self), id(module)), rank, together)
        if found is None:
            (found,) = yield from together([rank])
        return self.given(main.results, found)

    def abreast(self, module: Module, ranks: Sequence[Rank]) -> Joint[Results]:
        """What the main function gives on each of `ranks`, which run it op by op, each op on all of them."""
        run = _Run(self, module, ranks)
        try:
            return (yield from run.call(module.main, "", [rank.inputs for rank in ranks]))
        except OpError as error:
            raise (of_rank(run.rank, error) if len(ranks) > 1 else error) from None

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


@dataclass(frozen=True, eq=False, slots=True)
class Rank:
    """What one rank has of its own where a module runs."""

    weights: Weights
    inputs: tuple[Held, ...]
    observe: Observer | None = None


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
    count: int
    """How many results there are."""
    gives: slice
    """Where they belong among all values."""
    dies: tuple[int, ...]
    """What nothing reads afterwards."""
    compute: Compute | None
    """What a rank does alone; None of an op that needs the module, its weights or other ranks."""
    shared: bool
    """Whether it depends on nothing but its function, so that all ranks have the same results."""


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
    shared: set[Value] = set()

    def step(op: Op, dying: Sequence[Value]) -> Step:
        takes, dies = (tuple(number[v] for v in values) for values in (op.operands, dying))
        count = len(op.results)
        first = number[op.results[0]] if count else 0
        compute = None if isinstance(op, Param | Constant | Call | Collective | Done) else backend.prepare(op)
        alike = compute is not None and shared.issuperset(op.operands)
        shared.update(op.results if alike else ())
        return Step(op, _taking(takes), count, slice(first, first + count), dies, compute, alike)

    return Plan(tuple(map(step, func.ops, last_uses(func))), tuple(number[v] for v in func.results), len(made))


def _taking(numbers: tuple[int, ...]) -> Callable[[list[Held]], tuple[Held, ...]]:
    """The values of these numbers, as fast as Python can."""
    if len(numbers) > 1:
        return itemgetter(*numbers)
    return (lambda values: (values[numbers[0]],)) if numbers else (lambda values: ())


@dataclass
class _Run:
    """One execution of a module, on one rank or on all of a world: what each has is listed in the order of the ranks."""

    backend: Eager
    module: Module
    ranks: Sequence[Rank]
    runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each function has been entered with each prefix."""
    rank: int = 0
    """Whose turn it is."""

    def call(self, func: Func, prefix: str, inputs: Sequence[Sequence[Held]]) -> Joint[Results]:
        """The results of `func`, the names of its weights under `prefix`."""
        self.runs[func.name, prefix] += 1
        return (yield from self.steps(func, Site(func.name, prefix, "", self.runs[func.name, prefix]), inputs))

    def steps(self, func: Func, within: Site, inputs: Sequence[Sequence[Held]]) -> Joint[Results]:
        """The results of `func`, whose ops are seen in the function, prefix and run of `within`."""
        plan = plan_of(self.backend, func)
        every = [[*given, *(None,) * plan.count] for given in inputs]
        watched = any([rank.observe is not None for rank in self.ranks])
        for step in plan.steps:
            op, take, compute, found = step.op, step.take, step.compute, None
            results: tuple[Held, ...] = ()
            try:
                if compute is None:
                    found = yield from self.special(within, op, [take(values) for values in every])
                for rank, values in enumerate(every):
                    self.rank = rank
                    if found is not None:
                        results = found[rank]
                    elif compute is not None and (not rank or watched or not step.shared):
                        results = compute(take(values))
                    if watched:
                        results = self.observed(within, op, take(values), results)
                    if len(results) != step.count:
                        raise ValueError(f"{op.name} gives {len(results)} results, expected {step.count}")
                    values[step.gives] = results
            except OpError:
                raise
            except DscError as error:
                raise OpError(f"{at(within, op)}: {op.name}: {error}") from None
            if step.dies:
                for values in every:
                    for i in step.dies:
                        values[i] = None
        return [tuple([values[i] for i in plan.results]) for values in every]

    def special(self, within: Site, op: Op, operands: Sequence[tuple[Held, ...]]) -> Joint[Results]:
        """The results of an op that needs the module, its weights or other ranks."""
        backend = self.backend
        match op:
            case Param():
                return self.param(op, join(within.weights, op.path))
            case Fused():  # its ops keep the ids that they had here, and are seen before the whole
                return (yield from self.steps(self.module[op.callee], within, operands))
            case Call():
                return (yield from self.call(self.module[op.callee], join(within.weights, op.weights), operands))
            case Transfer(start=True):
                flights = yield from self.together([backend.begin(at(within, op), op, given) for given in operands])
                return [(flight,) * len(op.results) for flight in flights]
            case Done():
                return (yield from self.together([backend.land(at(within, op), flight) for flight, *_ in operands]))
            case Collective():
                return (yield from self.together([backend.together(at(within, op), op, given) for given in operands]))
        assert isinstance(op, Constant)
        require(op.path in self.module.constants, f"the module has no constant {op.path!r}")
        return [(self.source("constant", op.path, self.module.constants[op.path], op.result.tensor),)] * len(operands)

    def param(self, op: Param, name: str) -> Results:
        """A weight, on each rank its own; what ranks have in common is looked at and held once."""
        type, found, before = cast(Tensor, op.result_types[0]), list[tuple[Held, ...]](), None
        for rank in self.ranks:
            self.rank = len(found)
            given = rank.weights(name, type)
            found.append(found[-1] if given is before else (self.source("weight", name, given, type),))
            before = given
        return found

    def together(self, programs: Sequence[Program[T]]) -> Joint[list[T]]:
        """The results of programs that ask at the same times: what they all are programs of is one op."""
        if len(programs) == 1:
            return [(yield from programs[0])]
        answers: Sequence[Any] = (None,) * len(programs)
        while True:
            asked, found = [], []
            for self.rank, program in enumerate(programs):
                try:
                    asked.append(program.send(answers[self.rank]))
                except StopIteration as done:
                    found.append(done.value)
            if found:
                assert not asked
                return found
            answers = yield tuple(asked)

    def observed(self, within: Site, op: Op, operands: tuple[Held, ...], results: tuple[Held, ...]) -> tuple[Held, ...]:
        """`results` as the observer leaves them. It sees no calls, and of a started collective the end."""
        observe = self.ranks[self.rank].observe
        if observe is None or (isinstance(op, Call) and not isinstance(op, Fused)) or (isinstance(op, Transfer) and op.start):
            return results
        backend, taken = self.backend, results if isinstance(op, Done) else operands
        replaced = observe(at(within, op), op, backend.given(op.operands, taken), backend.given(op.results, results))
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
