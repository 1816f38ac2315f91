"""A compiled program as layers: what each runs in every phase of a training step, as tasks on the streams of a rank, and what it keeps.

A layer is one call that main makes in its forward pass, with the calls that stem from it in backward; what main does beside them belongs
to the layer whose name it bears. Costs are those of the program's own ops. A cast of weights runs once a step, not for each micro-batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from ..ir.core import Func, Module, Op, Phase, Trait, Value
from ..ir.expected import expected_bytes, mean_rows
from ..ir.liveness import live_bytes
from ..ir.ops.collective import Collective, OwnPart
from ..ir.ops.control import Call, Pack, Param, Unpack
from ..ir.ops.fused import Fused
from ..ir.ops.shape import Transpose
from ..ir.types import Bundle, Ragged, Type
from ..ir.walk import join, walk
from ..schedule.streams import Task

ROOT = re.compile(r"(.*?#\d+)")
"""The id of the op that another stems from: `layers.3#1` of `layers.3#1.2`."""


class Clock(Protocol):
    """What an op takes on a rank."""

    def seconds(self, op: Op, overlapped: bool) -> float:
        """Alone, or while the other stream works as well."""

    def stream(self, op: Op) -> str:
        """`compute` or `comm`."""


@dataclass(frozen=True)
class Layer:
    """One layer. `kind` is equal for layers that run the same functions on weights of the same shapes."""

    name: str
    kind: str
    ops: tuple[Op, ...]
    """Of main, forward and then backward."""


FORWARD, BACKWARD = (Phase.F,), (Phase.I, Phase.R, Phase.W)
"""The phases of a micro-batch's two ways."""
BUCKETS = ("tp", "replicated", "experts")
"""How a rank holds a weight: a part along tp, whole, or some of the experts."""


@dataclass(frozen=True)
class Program:
    """A program that is planned, sharded for the ranks of one stage, forward alone or differentiated with split phases.

    `imbalance` is how many times the mean of rows the experts of the fullest rank have.
    """

    module: Module
    imbalance: float = 1.0

    @cached_property
    def extents(self) -> Mapping[Ragged, int]:
        """How many rows ragged dimensions have on average."""
        return mean_rows(self.module)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """In the order of the forward pass."""
        return _layers(self.module.main)

    @cached_property
    def _sizes(self) -> Mapping[str, tuple[int, int]]:
        """Of each kind of layer: bytes that it keeps of a micro-batch, and that it stashes."""
        size = expected_bytes(self.module)
        return {layer.kind: (_kept(self.module, layer, size), _stashed(layer, size)) for layer in self.layers}

    @cached_property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return any(op.phase is not Phase.F for op in self.module.main.ops)

    def tasks(self, layers: Sequence[Layer], phases: Iterable[Phase], clock: Clock, overlapped: bool = False) -> tuple[Task, ...]:
        """The tasks of these layers in one micro-batch, in program order: forward, or phases of backward, which runs layers in reverse.

        Dependences are those of values, between functions and through the bundles that backward parts hand on. What other phases made is
        there from the start.
        """
        steps = self._traced(layers, frozenset(phases)).steps
        return tuple(Task(op, clock.stream(op), clock.seconds(op, overlapped), after) for op, after in steps)

    def once(self, layers: Sequence[Layer], clock: Clock) -> float:
        """Seconds of what depends on weights alone, which a step does once: their casts to the formats of products."""
        return sum(clock.seconds(op, False) for layer in layers for op in self._traced([layer], frozenset(Phase)).once)

    def _traced(self, layers: Sequence[Layer], phases: frozenset[Phase]) -> _Tracer:
        """Layers of the same kinds run the same ops: traced once."""
        key = tuple(layer.kind for layer in layers), phases
        if key not in self._traces:
            tracer = _Tracer(self.module, phases)
            ways = ((True, layers), (False, layers[::-1]))
            rows = (op for forward, ordered in ways for layer in ordered for op in layer.ops if (op.phase is Phase.F) is forward)
            values: dict[Value, Data] = {}
            for op in rows:
                if op.phase in phases or not phases.isdisjoint(_within(self.module, op)):
                    tracer.op(op, values)
            self._traces[key] = tracer
        return self._traces[key]

    @cached_property
    def _traces(self) -> dict[tuple[tuple[str, ...], frozenset[Phase]], _Tracer]:
        return {}

    @property
    def boundary(self) -> int:
        """Bytes that a layer hands to the next."""
        return max((op.results[0].type.bytes for layer in self.layers[:2] for op in layer.ops[:1] if op.results), default=0)

    def weights(self, layer: Layer) -> Mapping[str, tuple[str, int, int]]:
        """Every weight that the layer reads: full name -> bucket, parameters and bytes of a rank's part."""
        if layer.name not in self._weights:
            found: dict[str, tuple[str, int, int]] = {}
            for call in layer.ops:
                ops: Iterable[tuple[str, Op]] = [("", call)]
                if isinstance(call, Call):
                    ops = ((prefix, op) for prefix, _, op in walk(self.module, self.module[call.callee], call.weights))
                for prefix, op in ops:
                    if isinstance(op, Param):
                        bucket = "experts" if "ep" in op.shard else "tp" if "tp" in op.shard else "replicated"
                        found[join(prefix, op.path)] = bucket, op.result.tensor.size, op.result.tensor.bytes
            self._weights[layer.name] = found
        return self._weights[layer.name]

    @cached_property
    def _weights(self) -> dict[str, Mapping[str, tuple[str, int, int]]]:
        return {}

    def kept(self, layer: Layer) -> int:
        """Bytes that the layer keeps of a micro-batch from its forward pass to its backward pass; what follows from weights alone aside."""
        return self._sizes[layer.kind][0]

    def stashed(self, layer: Layer) -> int:
        """Bytes that the part of backward for inputs leaves for that of weights."""
        return self._sizes[layer.kind][1]

    @cached_property
    def workspace(self) -> int:
        """The most bytes that a function has in use beside what it was given and what it returns."""
        most = 0
        size = expected_bytes(self.module)
        for func in self.module.funcs[1:]:
            returned = sum(size(r.type) for r in func.results)
            most = max(most, live_bytes(self.module, func).peak - returned)
        return most


def _layers(main: Func) -> tuple[Layer, ...]:
    found: dict[str, list[Op]] = {}
    kinds: dict[str, str] = {}
    names: dict[str, str] = {}
    last = ""
    for op in main.ops:
        root = _root(op)
        if op.phase is Phase.F and isinstance(op, Call) and not isinstance(op, Fused):
            last = root
            found[root] = [op]
            kinds[root], names[root] = str(op.callee), op.weights or root
        elif _ends_step(op):
            continue
        elif root in found or last:
            found[root if root in found else last].append(op)
        else:
            last = root
            found[root], kinds[root], names[root] = [op], main.name, root
    return tuple(Layer(names[root], kinds[root], tuple(ops)) for root, ops in found.items())


def _kept(module: Module, layer: Layer, size: Callable[[Type], int]) -> int:
    forward = next((op for op in layer.ops if op.phase is Phase.F and isinstance(op, Call)), None)
    used = {value for op in layer.ops if op.phase is not Phase.F for value in op.operands}
    if forward is None:
        return 0
    func = module[forward.callee]
    fixed = _fixed(func)
    total = 0
    for inner, outer in zip(func.results, forward.results, strict=True):
        if outer in used and isinstance(outer.type, Bundle):
            fields = inner.owner.values if isinstance(inner.owner, Pack) else (inner,)
            total += sum(size(v.type) for v in dict.fromkeys(fields) if v not in fixed and not _shared(v, func))
    return total


def _stashed(layer: Layer, size: Callable[[Type], int]) -> int:
    made = [op for op in layer.ops if op.phase is Phase.I and isinstance(op, Call)]
    read = {value for op in layer.ops if op.phase is Phase.W for value in op.operands}
    return sum(size(r.type) for op in made for r in op.results if r in read and isinstance(r.type, Bundle))


Data = tuple[int, ...] | list["Data"] | None
"""Where a value is from: the tasks that it waits for, those of a bundle's values apart, or None for what follows from weights alone."""


@dataclass
class _Tracer:
    """Runs ops on the numbers of tasks in place of arrays. A view, a weight and a bundle are no tasks."""

    module: Module
    phases: frozenset[Phase]
    steps: list[tuple[Op, tuple[int, ...]]] = field(default_factory=list)
    once: list[Op] = field(default_factory=list)

    def op(self, op: Op, values: dict[Value, Data]) -> None:
        """Run one op; what it reads and nobody made is there from the start."""
        given = [values.get(v, ()) for v in op.operands]
        if isinstance(op, Call) and not isinstance(op, Fused):
            func = self.module[op.callee]
            inner: dict[Value, Data] = dict(zip(func.params, given, strict=True))
            for one in func.ops:
                self.op(one, inner)
            found = [inner.get(r, ()) for r in func.results]
        elif isinstance(op, Pack):
            found = [list(given)]
        elif isinstance(op, Unpack):
            (bundle,) = given
            found = list(bundle) if isinstance(bundle, list) else [bundle for _ in op.results]
        else:
            found = [self._made(op, given)] * len(op.results)
        values.update(zip(op.results, found, strict=True))

    def _made(self, op: Op, given: Sequence[Data]) -> Data:
        moves = Trait.SOURCE not in op.traits and (Trait.VIEW not in op.traits or _turns_codes(op))
        if not isinstance(op, Collective) and all(map(_fixed_data, given)):
            self.once += [op] if moves else []
            return None
        after = tuple(sorted({i for data in given for i in _numbers(data)}))
        if op.phase not in self.phases:
            return ()
        if not moves:
            return after
        self.steps.append((op, after))
        return (len(self.steps) - 1,)


def _turns_codes(op: Op) -> bool:
    """Whether a view may be a copy all the same: of codes that a product wants turned."""
    return isinstance(op, Transpose) and op.x.dtype.bits <= 8


def _fixed_data(data: Data) -> bool:
    return all(map(_fixed_data, data)) if isinstance(data, list) else data is None


def _numbers(data: Data) -> Iterator[int]:
    if isinstance(data, list):
        for item in data:
            yield from _numbers(item)
    elif data is not None:
        yield from data


def _within(module: Module, op: Op) -> frozenset[Phase]:
    """The phases of the ops that a call runs."""
    return frozenset(one.phase for one in module[op.callee].ops) if isinstance(op, Call) else frozenset()


def _root(op: Op) -> str:
    found = ROOT.match(op.id)
    return found[1] if found else op.id


def _ends_step(op: Op) -> bool:
    """Whether main does it once for all micro-batches: adding up gradients and metrics among ranks, which a step's end is charged with."""
    return (isinstance(op, Collective) and not isinstance(op, OwnPart)) or _root(op).startswith("main.results#")


def _fixed(func: Func) -> frozenset[Value]:
    """The values of a function that follow from weights and numbers alone."""
    found: set[Value] = set()
    for op in func.ops:
        if Trait.SOURCE in op.traits or (op.operands and found.issuperset(op.operands) and not isinstance(op, Collective)):
            found.update(op.results)
    return frozenset(found)


def _shared(value: Value, func: Func) -> bool:
    """Whether it is one of the function's parameters that every layer is given, such as tables of angles: no activation of this layer."""
    return value in func.params and value is not func.params[0]
