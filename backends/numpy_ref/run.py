"""The interpreter: runs a module op by op, in program order, and holds every result against its type.

An op reads its operands exactly, computes in float32 (`FLOAT32`) or float64 (`FLOAT64`, and wherever the program itself says f64), and
is rounded once, to nearest even, to the dtype of its result. The walk over the module is that of `backends/eager.py`. On one rank of many
the run is a program (`distributed/world.py`) that stops at each collective until the others are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ...distributed.world import Joint, Program, Request, Start, Ticket, Wait
from ...ir.core import Module, Op, Value
from ...ir.errors import require
from ...ir.ops.collective import Collective, Transfer
from ...ir.ops.fused import NAMED
from ...ir.ops.internode import Internode, InternodeCombine, InternodeDispatch, InternodeRedispatch
from ...ir.types import Bundle, DType, Tensor, landed
from .. import Observer, Site, Weights
from ..arrays import STORAGE, Data, rounded, widen
from ..eager import Compute, Eager, Rank, Results, fitted, hop_by_hop
from . import attention, collective, control, elementwise, linalg, loss, moe, norm, quant, reduce, shape  # noqa: F401 - they fill REFERENCES
from .registry import COLLECTIVES, OPERANDS, REFERENCES, reference
from .registry import collective as communicates


@dataclass(frozen=True)
class Interpreter(Eager):
    """The reference backend. `wide` is the dtype of its arithmetic."""

    wide: np.dtype[Any]

    def program(
        self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None
    ) -> Program[tuple[Data, ...]]:
        """`run` on one rank of many: a program that asks the others where a collective stands."""
        return self.steps(module, weights, inputs, observe)

    def abreast(self, module: Module, ranks: Sequence[Rank]) -> Joint[Results]:
        program, answer = super().abreast(module, ranks), None
        while True:
            with np.errstate(all="ignore"):  # not around the yield: what NumPy warns of is up to whoever computes meanwhile
                try:
                    request = program.send(answer)
                except StopIteration as done:
                    return cast(Results, done.value)
            answer = yield request

    def evaluate(self, op: Op, operands: Sequence[Data]) -> tuple[Data, ...]:
        """The results of one op. `DscError` for `param`, `constant` and `call`, which need a module."""
        require(type(op) in REFERENCES, f"{op.name} has no meaning outside a module")
        with np.errstate(all="ignore"):
            return self.compute(op, tuple(operands))

    def compute(self, op: Op, operands: tuple[Data, ...]) -> tuple[Data, ...]:
        return self.prepare(op)(operands)

    def prepare(self, op: Op) -> Compute:
        computed = _computing(op, self._wide(op))
        if len(op.results) == 1:
            store = _storing(op.result)
            return lambda operands: (store(computed(operands)),)
        stored = tuple(map(_storing, op.results))
        return lambda operands: tuple([store(x) for store, x in zip(stored, computed(operands), strict=True)])

    def together(self, site: Site, op: Collective, operands: tuple[Data, ...]) -> Program[tuple[Data, ...]]:
        """The results of a collective, whose requests say where it stands."""
        program = COLLECTIVES[type(op)](op, self._wide(op), *operands)
        return (yield from self._ended(site, op, program, None))

    def begin(self, site: Site, op: Transfer, operands: tuple[Data, ...]) -> Program[_Flight]:
        """Start a collective: its first request is on the way, and what it does with the answer is left to its `done`."""
        program = COLLECTIVES[type(op)](op, self._wide(op), *operands)
        ticket = yield Start(_named(next(program), op, site))
        return _Flight(op, program, ticket)

    def land(self, site: Site, flight: _Flight) -> Program[tuple[Data, ...]]:
        """The results of a started collective."""
        answer = yield Wait(flight.ticket)
        return (yield from self._ended(site, flight.op, flight.program, answer))

    def _ended(self, site: Site, op: Collective, program: Program[Any], answer: Any) -> Program[tuple[Data, ...]]:
        """The results of a collective whose program has got as far as to need `answer`."""
        while True:
            try:
                request = program.send(answer)
            except StopIteration as done:
                found = done.value if len(op.results) > 1 else (done.value,)
                return tuple(_storing(v)(x) for v, x in zip(op.results, found, strict=True))
            answer = yield _named(request, op, site)

    def given(self, values: Sequence[Value], held: Sequence[Data]) -> tuple[Data, ...]:
        return tuple(held)  # arrays already

    def _wide(self, op: Op) -> np.dtype[Any]:
        return STORAGE[DType.f64] if any(map(_is_f64, (*op.operands, *op.results))) else self.wide


def _named(asked: Any, op: Collective, site: Site) -> Request:
    """The request of a collective's program, saying what it is of and where that stands."""
    request: Request = asked
    object.__setattr__(request, "op", op.signature)  # nobody has seen it yet
    object.__setattr__(request, "site", str(site))
    return request


@dataclass(frozen=True, eq=False)
class _Flight:
    """What stands for each result of a collective between its start and its `done`."""

    op: Transfer
    program: Program[Any]
    ticket: Ticket


FLOAT32 = Interpreter(STORAGE[DType.f32])
FLOAT64 = Interpreter(STORAGE[DType.f64])


def by_expansion(op: Op, wide: np.dtype[Any], *operands: Data) -> Any:
    """The results of a fused op: its expansion run op by op, each rounded."""
    found = Interpreter(wide).expanded(op, operands)
    return found if len(found) > 1 else found[0]


for _cls in NAMED:
    reference(_cls, operands="blocks")(by_expansion)


@communicates(InternodeDispatch, InternodeCombine, InternodeRedispatch)
def over_nodes(op: Internode, wide: np.dtype[Any], *operands: Data) -> Program[Any]:
    """An exchange over nodes, hop by hop."""
    return hop_by_hop(op, operands, Interpreter(wide).compute, lambda inner, *given: COLLECTIVES[type(inner)](inner, wide, *given))


def unrounded(op: Op, operands: Sequence[Data]) -> tuple[Data, ...]:
    """The results of one op computed in float64 and left so: what is rounded once to become the results."""
    with np.errstate(all="ignore"):
        found = _computing(op, STORAGE[DType.f64])(tuple(operands))
    return (found,) if len(op.results) == 1 else tuple(found)


def _computing(op: Op, wide: np.dtype[Any]) -> Callable[[tuple[Data, ...]], Any]:
    """What the reference of `op` makes of operands, not yet rounded."""
    function, takes = REFERENCES[type(op)], OPERANDS[type(op)]
    floats = tuple(isinstance(v.type, Tensor) and v.dtype.is_float for v in op.operands)
    if takes == "blocks":
        return lambda operands: function(op, wide, *operands)
    if takes == "stored" or not any(floats):
        return lambda operands: function(op, *operands)
    if any(v.dtype.bits == 8 for v, is_float in zip(op.operands, floats, strict=True) if is_float):
        return lambda operands: function(op, *[widen(x, wide) if is_float else x for x, is_float in zip(operands, floats, strict=True)])
    if len(floats) == 1:  # NumPy's own cast is exact; to say so by `widen`, operand by operand, would take as long as a small op
        return lambda operands: function(op, operands[0].astype(wide, copy=False))
    if floats == (True, True):
        return lambda operands: function(op, operands[0].astype(wide, copy=False), operands[1].astype(wide, copy=False))
    return lambda operands: function(
        op, *[x.astype(wide, copy=False) if is_float else x for x, is_float in zip(operands, floats, strict=True)]
    )


def _is_f64(value: Value) -> bool:
    return isinstance(value.type, Tensor) and value.type.dtype is DType.f64


def _storing(value: Value) -> Callable[[Any], Data]:
    """What becomes of what a reference returned: it is rounded to the dtype of the result; of whole numbers the low bits are kept."""
    type = landed(value.type)
    if isinstance(type, Bundle):
        return lambda x: fitted(value, tuple(x))
    dtype, storage, extents = type.dtype, STORAGE[type.dtype], type.shape
    cast = STORAGE[DType.f32] if dtype in (DType.bf16, DType.f16) else None

    def store(x: Any) -> Data:
        array = np.asarray(x)
        if array.dtype is cast:  # `rounded` does the same, but that takes longer to find out than many an op
            array = array.astype(storage, order="C")
        elif array.dtype is not storage or dtype is DType.e5m6:
            if dtype.is_float and array.dtype.kind == "f":
                array = rounded(array, dtype)
            elif dtype.is_int and array.dtype.kind in "iu":
                array = array.astype(storage)
        return array if array.dtype is storage and array.shape == extents else fitted(value, array)

    return store
