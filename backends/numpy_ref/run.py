"""The interpreter: runs a module op by op, in program order, and holds every result against its type.

An op reads its operands exactly, computes in float32 (`FLOAT32`) or float64 (`FLOAT64`, and wherever the program itself says f64), and
is rounded once, to nearest even, to the dtype of its result. A value is let go at its last use, and a weight is fetched when its op
is reached. On one rank of many the run is a program (`distributed/world.py`) that stops at each collective until the others are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from ...distributed.world import Program, Request, Start, Ticket, Wait, alone
from ...ir.core import Func, Module, Op, Value
from ...ir.errors import DscError, require
from ...ir.liveness import last_uses
from ...ir.ops.collective import Collective, Done, Transfer
from ...ir.ops.control import Call, Constant, Param
from ...ir.ops.fused import Fused, QuantizeTwice, RmsNormQuantize, SwiGLUQuantize, expansion
from ...ir.types import Bundle, DType, Tensor, landed
from ...ir.walk import join
from .. import Observer, Site, Weights
from ..arrays import STORAGE, Data, describe, fits, rounded, widen
from . import attention, collective, control, elementwise, linalg, loss, moe, norm, quant, reduce, shape  # noqa: F401 - they fill REFERENCES
from .registry import COLLECTIVES, OPERANDS, REFERENCES, reference


@dataclass(frozen=True)
class Interpreter:
    """The reference backend. `compute` is the dtype of its arithmetic."""

    compute: np.dtype[Any]

    def run(self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None) -> tuple[Data, ...]:
        """What the main function gives for `inputs`. `DscError` where an input or a weight is not what the program declares."""
        return alone(self.program(module, weights, inputs, observe))

    def program(
        self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None
    ) -> Program[tuple[Data, ...]]:
        """The same on one rank of many: a program that asks the others where a collective stands."""
        main = module.main
        takes = f"@{main.name} takes {len(main.params)} inputs"
        require(len(inputs) == len(main.params), f"{takes} ({', '.join(map(repr, main.params))}), found {len(inputs)}")
        for param, given in zip(main.params, inputs, strict=True):
            if not fits(given, param.type):
                raise DscError(f"parameter %{param.name} of @{main.name}: expected {param.type}, found {describe(given)}")
        program, answer = _Run(self, module, weights, observe, {}, Counter()).call(main, "", inputs), None
        while True:
            with np.errstate(all="ignore"):  # not around the yield: what NumPy warns of is up to whoever computes meanwhile
                try:
                    request = program.send(answer)
                except StopIteration as done:
                    return cast(tuple[Data, ...], done.value)
            answer = yield request

    def evaluate(self, op: Op, operands: Sequence[Data]) -> tuple[Data, ...]:
        """The results of one op. `DscError` for `param`, `constant` and `call`, which need a module."""
        require(type(op) in REFERENCES, f"{op.name} has no meaning outside a module")
        with np.errstate(all="ignore"):
            return self._evaluate(op, operands)

    def _evaluate(self, op: Op, operands: Sequence[Data]) -> tuple[Data, ...]:
        return _all_stored(op, _computed(op, operands, self._wide(op)))

    def _wide(self, op: Op) -> np.dtype[Any]:
        return STORAGE[DType.f64] if any(map(_is_f64, (*op.operands, *op.results))) else self.compute

    def _together(self, site: Site, op: Collective, operands: Sequence[Data]) -> Program[tuple[Data, ...]]:
        """The results of a collective, whose requests say where it stands."""
        program = COLLECTIVES[type(op)](op, self._wide(op), *operands)
        return (yield from self._ended(site, op, program, None))

    def _ended(self, site: Site, op: Collective, program: Program[Any], answer: Any) -> Program[tuple[Data, ...]]:
        """The results of a collective whose program has got as far as to need `answer`."""
        while True:
            try:
                request = program.send(answer)
            except StopIteration as done:
                return _all_stored(op, done.value if len(op.results) > 1 else (done.value,))
            answer = yield _named(request, op, site)

    def _begun(self, site: Site, op: Transfer, operands: Sequence[Data]) -> Program[_Flight]:
        """Start a collective: its first request is on the way, and what it does with the answer is left to its `done`."""
        program = COLLECTIVES[type(op)](op, self._wide(op), *operands)
        ticket = yield Start(_named(next(program), op, site))
        return _Flight(op, program, ticket)

    def _landed(self, site: Site, flight: _Flight) -> Program[tuple[Data, ...]]:
        """The results of a started collective."""
        answer = yield Wait(flight.ticket)
        return (yield from self._ended(site, flight.op, flight.program, answer))


def _named(asked: Any, op: Collective, site: Site) -> Request:
    """The request of a collective's program, saying what it is of and where that stands."""
    request: Request = replace(asked, op=op.signature, site=str(site))
    return request


@dataclass(frozen=True, eq=False)
class _Flight:
    """What stands for each result of a collective between its start and its `done`."""

    op: Transfer
    program: Program[Any]
    ticket: Ticket


FLOAT32 = Interpreter(STORAGE[DType.f32])
FLOAT64 = Interpreter(STORAGE[DType.f64])


def by_expansion(op: Op, wide: np.dtype[Any], *operands: Data) -> tuple[Data, ...]:
    """The results of a fused op: its expansion run op by op, each rounded."""
    func = expansion(op)
    assert func is not None
    values: dict[Value, Data] = dict(zip(op.operands, operands, strict=True))
    for inner in func.ops:
        values.update(zip(inner.results, Interpreter(wide)._evaluate(inner, tuple(values[v] for v in inner.operands)), strict=True))
    return tuple(values[v] for v in func.results)


for _cls in (RmsNormQuantize, SwiGLUQuantize, QuantizeTwice):
    reference(_cls, operands="blocks")(by_expansion)


def unrounded(op: Op, operands: Sequence[Data]) -> tuple[Data, ...]:
    """The results of one op computed in float64 and left so: what is rounded once to become the results."""
    with np.errstate(all="ignore"):
        return _computed(op, operands, STORAGE[DType.f64])


def _computed(op: Op, operands: Sequence[Data], wide: np.dtype[Any]) -> tuple[Data, ...]:
    function, takes = REFERENCES[type(op)], OPERANDS[type(op)]
    if takes == "stored":
        found = function(op, *operands)
    elif takes == "blocks":
        found = function(op, wide, *operands)
    else:
        found = function(op, *(_widened(v, x, wide) for v, x in zip(op.operands, operands, strict=True)))
    return (found,) if len(op.results) == 1 else tuple(found)


def _is_f64(value: Value) -> bool:
    return isinstance(value.type, Tensor) and value.type.dtype is DType.f64


def _widened(value: Value, x: Data, wide: np.dtype[Any]) -> Data:
    return widen(x, wide) if isinstance(x, np.ndarray) and value.dtype.is_float else x


def _stored(value: Value, x: Any) -> Data:
    """What a reference returned, rounded to the dtype of the result; of whole numbers the low bits, as hardware keeps."""
    type = landed(value.type)
    if isinstance(type, Bundle):
        return tuple(x)
    array = np.asarray(x)
    if type.dtype.is_float and array.dtype.kind == "f":
        return rounded(array, type.dtype)
    return array.astype(STORAGE[type.dtype], copy=False) if type.dtype.is_int and array.dtype.kind in "iu" else array


def _all_stored(op: Op, found: Sequence[Any]) -> tuple[Data, ...]:
    return checked(op, tuple(_stored(v, x) for v, x in zip(op.results, found, strict=True)))


def checked(op: Op, results: tuple[Data, ...]) -> tuple[Data, ...]:
    """`results`, if each is of the type that the op's rule gives it."""
    for value, result in zip(op.results, results, strict=True):
        if not fits(result, value.type):  # said only then: describing costs more than many an op
            raise DscError(f"%{value.name}: expected {value.type}, found {describe(result)}")
    return results


@dataclass(frozen=True)
class _Run:
    """One execution of a module."""

    interpreter: Interpreter
    module: Module
    weights: Weights
    observe: Observer | None
    dying: dict[str, tuple[tuple[Value, ...], ...]]
    """The values to let go of after each op, by function."""
    runs: Counter[tuple[str, str]]
    """How often each function has been entered with each prefix."""

    def call(self, func: Func, prefix: str, inputs: Sequence[Data]) -> Program[tuple[Data, ...]]:
        """The results of `func`, the names of its weights under `prefix`."""
        self.runs[func.name, prefix] += 1
        return (yield from self.steps(func, Site(func.name, prefix, "", self.runs[func.name, prefix]), inputs))

    def steps(self, func: Func, within: Site, inputs: Sequence[Data]) -> Program[tuple[Data, ...]]:
        """The results of `func`, whose ops are seen in the function, prefix and run of `within`."""
        if func.name not in self.dying:
            self.dying[func.name] = last_uses(func)
        values: dict[Value, Any] = dict(zip(func.params, inputs, strict=True))
        for op, dying in zip(func.ops, self.dying[func.name], strict=True):
            operands = tuple(values[v] for v in op.operands)
            site = Site(within.func, within.weights, op.id, within.run)
            try:
                if isinstance(op, Fused):  # its ops keep the ids that they had here, and are seen before the whole
                    results = self.observed(site, op, operands, (yield from self.steps(self.module[op.callee], within, operands)))
                elif isinstance(op, Call):
                    results = yield from self.call(self.module[op.callee], join(within.weights, op.weights), operands)
                elif isinstance(op, Transfer) and op.start:
                    flight = yield from self.interpreter._begun(site, op, operands)
                    values.update((result, flight) for result in op.results)
                    continue
                elif isinstance(op, Done):
                    results = yield from self.interpreter._landed(site, cast(_Flight, operands[0]))
                    results = self.observed(site, op, results, results)
                elif isinstance(op, Collective):
                    results = self.observed(site, op, operands, (yield from self.interpreter._together(site, op, operands)))
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

    def execute(self, site: Site, op: Op, operands: tuple[Data, ...]) -> tuple[Data, ...]:
        """The results of one op that a rank runs alone."""
        if isinstance(op, Param):
            name = join(site.weights, op.path)
            return self.source(f"weight {name}", op, self.weights(name, op.result.tensor))
        if isinstance(op, Constant):
            require(op.path in self.module.constants, f"the module has no constant {op.path!r}")
            return self.source(f"constant {op.path}", op, self.module.constants[op.path])
        return self.interpreter._evaluate(op, operands)

    def observed(self, site: Site, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...]) -> tuple[Data, ...]:
        """`results` as the observer leaves them."""
        if self.observe is None:
            return results
        replaced = self.observe(site, op, operands, results)
        return results if replaced is None else checked(op, tuple(replaced))

    @staticmethod
    def source(what: str, op: Op, found: Data) -> tuple[Data, ...]:
        """What a weight or a constant brought, if it is of the declared type."""
        if not fits(found, op.result.type):
            raise DscError(f"{what}: expected {op.result.type}, found {describe(found)}")
        return (found,)


class OpError(DscError):
    """An error that already says which op it met."""
