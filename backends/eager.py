"""A backend that runs a module op by op, in program order: the walk that needs doing whatever computes the ops.

A class derived from `Eager` says in `compute` what one op gives. Weights, constants, calls, fused ops, observers and the letting go of
values are seen to here; so is the error that names the op it met. `numpy_ref` is such a backend, and one of your own may be
(docs/adding_a_backend.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from ..distributed.world import Program, alone
from ..ir.core import Func, Module, Op, Value
from ..ir.errors import DscError, require
from ..ir.liveness import last_uses
from ..ir.ops.collective import Collective, Done, Transfer
from ..ir.ops.control import Call, Constant, Param
from ..ir.ops.fused import Fused, expansion
from ..ir.types import Bundle, Tensor, Type, landed
from ..ir.walk import join
from . import Observer, Site, Weights
from .arrays import Array, Data, describe, fits

Held: TypeAlias = Any
"""What a value is while the backend has it: whatever `hold` makes of an array, or for a bundle a tuple of such."""


class Eager(ABC):
    """A `Runner` made of what one op gives."""

    @abstractmethod
    def compute(self, op: Op, operands: tuple[Held, ...]) -> tuple[Held, ...]:
        """The results of one op, as many as it has: of any but `param`, `constant`, `call`, `fused` and `done`."""

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


def _each(change: Any, x: Any, type: Type) -> Any:
    there = landed(type)
    return tuple(_each(change, f, t) for f, t in zip(x, there.fields, strict=True)) if isinstance(there, Bundle) else change(x, there)


def check_inputs(main: Func, inputs: Sequence[Data]) -> None:
    """`DscError` unless `inputs` are what `main` takes."""
    takes = f"@{main.name} takes {len(main.params)} inputs"
    require(len(inputs) == len(main.params), f"{takes} ({', '.join(map(repr, main.params))}), found {len(inputs)}")
    for param, given in zip(main.params, inputs, strict=True):
        if not fits(given, param.type):
            raise DscError(f"parameter %{param.name} of @{main.name}: expected {param.type}, found {describe(given)}")


def checked(op: Op, results: tuple[Data, ...]) -> tuple[Data, ...]:
    """`results`, if each is of the type that the op's rule gives it."""
    for value, result in zip(op.results, results, strict=True):
        if not fits(result, value.type):  # said only then: describing costs more than many an op
            raise DscError(f"%{value.name}: expected {value.type}, found {describe(result)}")
    return results


@dataclass(frozen=True)
class _Run:
    """One execution of a module."""

    backend: Eager
    module: Module
    weights: Weights
    observe: Observer | None
    dying: dict[str, tuple[tuple[Value, ...], ...]] = field(default_factory=dict)
    """The values to let go of after each op, by function."""
    runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each function has been entered with each prefix."""

    def call(self, func: Func, prefix: str, inputs: Sequence[Held]) -> Program[tuple[Held, ...]]:
        """The results of `func`, the names of its weights under `prefix`."""
        self.runs[func.name, prefix] += 1
        return (yield from self.steps(func, Site(func.name, prefix, "", self.runs[func.name, prefix]), inputs))

    def steps(self, func: Func, within: Site, inputs: Sequence[Held]) -> Program[tuple[Held, ...]]:
        """The results of `func`, whose ops are seen in the function, prefix and run of `within`."""
        if func.name not in self.dying:
            self.dying[func.name] = last_uses(func)
        values: dict[Value, Held] = dict(zip(func.params, inputs, strict=True))
        for op, dying in zip(func.ops, self.dying[func.name], strict=True):
            operands = tuple(values[v] for v in op.operands)
            site = Site(within.func, within.weights, op.id, within.run)
            try:
                if isinstance(op, Fused):  # its ops keep the ids that they had here, and are seen before the whole
                    results = self.observed(site, op, operands, (yield from self.steps(self.module[op.callee], within, operands)))
                elif isinstance(op, Call):
                    results = yield from self.call(self.module[op.callee], join(within.weights, op.weights), operands)
                elif isinstance(op, Transfer) and op.start:
                    flight = yield from self.backend.begin(site, op, operands)
                    values.update((result, flight) for result in op.results)
                    continue
                elif isinstance(op, Done):
                    results = yield from self.backend.land(site, operands[0])
                    results = self.observed(site, op, results, results)
                elif isinstance(op, Collective):
                    results = self.observed(site, op, operands, (yield from self.backend.together(site, op, operands)))
                else:
                    results = self.observed(site, op, operands, self.execute(site, op, operands))
            except OpError:
                raise
            except DscError as error:
                raise OpError(f"{site}: {op.name}: {error}") from None
            values.update(zip(op.results, results, strict=True))
            for value in dying:
                del values[value]
        return tuple(values[v] for v in func.results)

    def execute(self, site: Site, op: Op, operands: tuple[Held, ...]) -> tuple[Held, ...]:
        """The results of one op that a rank runs alone."""
        if isinstance(op, Param):
            name = join(site.weights, op.path)
            return self.source(f"weight {name}", op, self.weights(name, op.result.tensor))
        if isinstance(op, Constant):
            require(op.path in self.module.constants, f"the module has no constant {op.path!r}")
            return self.source(f"constant {op.path}", op, self.module.constants[op.path])
        return self.backend.compute(op, operands)

    def observed(self, site: Site, op: Op, operands: tuple[Held, ...], results: tuple[Held, ...]) -> tuple[Held, ...]:
        """`results` as the observer leaves them."""
        if self.observe is None:
            return results
        backend = self.backend
        replaced = self.observe(site, op, backend.given(op.operands, operands), backend.given(op.results, results))
        if replaced is None:
            return results
        return tuple(_each(backend.hold, x, v.type) for x, v in zip(checked(op, tuple(replaced)), op.results, strict=True))

    def source(self, what: str, op: Op, found: Data) -> tuple[Held, ...]:
        """What a weight or a constant brought, if it is of the declared type."""
        if not fits(found, op.result.type):
            raise DscError(f"{what}: expected {op.result.type}, found {describe(found)}")
        return (self.backend.hold(found, op.result.tensor),)


class OpError(DscError):
    """An error that already says which op it met."""
