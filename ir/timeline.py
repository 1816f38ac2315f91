"""Which buffers are alive at each op of a whole run, calls followed: the memory of a program before it runs.

The program is executed on buffers in place of arrays. An op that moves data makes one for each result, a view lies in its operand's, a
bundle holds those of its values, and a value is let go after its last use, as in an executor; a parameter lives until its function
returns. Weights and constants are not counted here; rows that ranks exchange are as many as are expected (`expected.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from .core import Func, Module, Op, Phase, Trait, Value, once
from .expected import expected_bytes
from .gradients import bundles
from .liveness import last_uses
from .ops.collective import Collective
from .ops.control import Call, Pack, Unpack
from .ops.elementwise import Add, Cast
from .ops.shape import Reshape
from .types import Bundle, Type
from .walk import join

Kind = Literal["inputs", "residuals", "workspace", "gradients"]
"""What a buffer is for.

`inputs` are the caller's. `gradients` are those of weights that main returns, and the parts that main and its collectives add up to
them. `residuals` are made in phase F and read in another; `workspace` is everything else.
"""
KINDS: tuple[Kind, ...] = get_args(Kind)
ACTIVATIONS: tuple[Kind, ...] = ("residuals", "workspace")
"""What a memory budget for recomputing bounds."""


@dataclass(frozen=True, slots=True)
class Point:
    """One execution of one op: `run` counts the functions entered so far, so that it tells two calls apart."""

    func: Func
    prefix: str
    run: int
    op: Op


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory of one tensor: alive from the point at which it is `made` to the one at which it `dies`, both included."""

    bytes: int
    func: str
    name: str
    made: int
    dies: int
    gradient: bool = False
    kind: Kind = "workspace"


@dataclass(eq=False, slots=True)
class Fields:
    """A bundle: what its values hold."""

    items: tuple[Data, ...]


Data = Buffer | Fields | None
"""Where a value lies. None is what is not counted: a weight, a constant."""


@dataclass(frozen=True)
class Timeline:
    """A run: its points in order, and every buffer."""

    points: tuple[Point, ...]
    buffers: tuple[Buffer, ...]

    def series(self, *kinds: Kind) -> list[int]:
        """Bytes alive at each point, of these kinds, or of all."""
        steps = [0] * (len(self.points) + 1)
        for b in self.buffers:
            if not kinds or b.kind in kinds:
                steps[b.made] += b.bytes
                steps[b.dies + 1] -= b.bytes
        now = 0
        return [now := now + step for step in steps[:-1]]

    @cached_property
    def activations(self) -> list[int]:
        """Bytes of residuals and workspace at each point."""
        return self.series(*ACTIVATIONS)

    def peak(self, *kinds: Kind) -> tuple[int, int]:
        """The most bytes alive at once, and at which point that is first the case."""
        series = self.series(*kinds)
        most = max(series, default=0)
        return most, series.index(most) if series else 0


@dataclass
class Execution:
    """Runs a module on buffers. A subclass may change what an op does (`execute`)."""

    module: Module
    points: list[Point] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    runs: int = 0
    dying: dict[str, tuple[tuple[Value, ...], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.size = expected_bytes(self.module)

    def timeline(self) -> Timeline:
        """The whole run."""
        main = self.module.main
        inputs = [self.make(p.type, main.name, p.name, 0) for p in main.params]
        found = self.call(main, "", inputs)
        last = max(0, len(self.points) - 1)
        for data in (*inputs, *found):
            touch(data, last)
        given = set(flat(inputs))
        for b in self.buffers:
            b.kind = "inputs" if b in given else "gradients" if b.gradient else b.kind
            if b.kind == "workspace" and self.points and self._phase(b.made) is Phase.F and self._phase(b.dies) is not Phase.F:
                b.kind = "residuals"
        return Timeline(tuple(self.points), tuple(self.buffers))

    def _phase(self, point: int) -> Phase:
        return self.points[point].op.phase

    def call(self, func: Func, prefix: str, args: Sequence[Data]) -> list[Data]:
        """Run one function."""
        if func.name not in self.dying:
            self.dying[func.name] = last_uses(func)
        self.runs += 1
        run = self.runs
        values: dict[Value, Data] = dict(zip(func.params, args, strict=True))
        gradients = gradient_values(self.module) if func is self.module.main else ()
        for op, dying in zip(func.ops, self.dying[func.name], strict=True):
            if not isinstance(op, Call):
                self.points.append(Point(func, prefix, run, op))
            found = self.execute(func, prefix, op, [values[v] for v in op.operands])
            values.update(zip(op.results, found, strict=True))
            now = max(0, len(self.points) - 1)
            for value in dying:
                touch(values.pop(value), now)
            for value in op.results:
                if value in gradients:
                    for b in flat([values.get(value)]):
                        b.gradient = True
        return [values[v] for v in func.results]

    def execute(self, func: Func, prefix: str, op: Op, operands: Sequence[Data]) -> Sequence[Data]:
        """The results of one op."""
        if isinstance(op, Call):
            return self.call(self.module[op.callee], join(prefix, op.weights), operands)
        if isinstance(op, Pack):
            return [Fields(tuple(operands))]
        if isinstance(op, Unpack):
            (bundle,) = operands
            return bundle.items if isinstance(bundle, Fields) else [None for _ in op.results]
        if Trait.SOURCE in op.traits:
            return [None]
        if Trait.VIEW in op.traits:
            return operands if len(operands) == len(op.results) else [Fields(tuple(operands))]
        return [self.make(r.type, func.name, r.name, len(self.points) - 1) for r in op.results]

    def make(self, type: Type, func: str, name: str, now: int) -> Data:
        """New memory for a value."""
        if isinstance(type, Bundle):
            return Fields(tuple(self.make(t, func, name, now) for t in type.fields))
        self.buffers.append(Buffer(self.size(type), func, name, now, now))
        return self.buffers[-1]


@once
def timeline(module: Module) -> Timeline:
    """What a run of `module` holds, point by point."""
    return Execution(module).timeline()


def flat(items: Sequence[Data]) -> Iterator[Buffer]:
    """The buffers in some values."""
    for data in items:
        if isinstance(data, Fields):
            yield from flat(data.items)
        elif data is not None:
            yield data


def touch(data: Data, now: int) -> None:
    """What a value holds is alive until now."""
    for b in flat([data]):
        b.dies = max(b.dies, now)


def gradient_values(module: Module) -> Collection[Value]:
    """The values of main that hold gradients of weights: those that it returns, and what it adds up to them."""
    main = module.main
    wanted = set(main.results[len(main.results) - len(bundles(module)) :])
    for op in reversed(main.ops):
        if isinstance(op, Pack | Unpack | Add | Cast | Reshape | Collective) and not wanted.isdisjoint(op.results):
            wanted.update(op.operands)
    return wanted
