"""A compiled program as layers: what each runs in every phase of a training step, alone or beside another, and what it keeps.

A layer is one call that main makes in its forward pass, with the calls that stem from it in backward; what main does beside them belongs
to the layer whose name it bears. What layers run is what the pass `overlap` makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ..hardware.cluster import Cluster
from ..hardware.streams import Costing
from ..ir.core import Func, Module, Op, Phase, Trait, Value
from ..ir.expected import expected_bytes, mean_rows
from ..ir.liveness import live_bytes
from ..ir.ops.collective import Collective, OwnPart
from ..ir.ops.control import Call, Pack, Param
from ..ir.ops.fused import Fused
from ..ir.types import Bundle, Ragged, Type
from ..ir.walk import join, walk
from ..passes.overlap import costing_of
from ..passes.overlapping.chunks import beside, exchanging, gradients_of
from ..passes.overlapping.merge import Groups
from ..passes.overlapping.schedule import ordered
from ..schedule.partition import Span

ROOT = re.compile(r"(.*?#\d+)")
"""The id of the op that another stems from: `layers.3#1` of `layers.3#1.2`."""


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
    """A program that is planned, sharded for the ranks of one stage, forward alone or differentiated with split phases; its functions are
    ordered for a cluster as `overlap` does it.
    """

    module: Module
    cluster: Cluster
    repeats: int
    """How often it runs before weights change, by which it is ordered."""

    @cached_property
    def extents(self) -> Mapping[Ragged, int]:
        """How many rows ragged dimensions have on average."""
        return mean_rows(self.module)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """In the order of the forward pass."""
        return _layers(self.module.main)

    @cached_property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return any(op.phase is not Phase.F for op in self.module.main.ops)

    def alone(self, layers: Sequence[Layer], phases: Collection[Phase]) -> Iterator[Func | Op]:
        """What a chunk runs in one micro-batch, one after the other: functions in their order, and ops of main. Backward takes layers in
        reverse."""
        for layer in layers if Phase.F in phases else layers[::-1]:
            yield from (self.piece(op) for op in layer.ops if op.phase in phases)

    def paired(self, forward: Sequence[Layer], backward: Sequence[Layer]) -> Iterator[Func | Op]:
        """What a forward and a backward chunk run as one: layers that exchange rows one beside the other, each two in one function, and the
        rest of both alone (`overlap`)."""
        pairs = list(self.pairs(forward, backward))
        joined = {op for x, y in pairs for op in (self.exchanging(x)[0], *self.exchanging(y)[1:])}
        yield from (self.beside(x, y) for x, y in pairs)
        for layers, phases in ((forward, FORWARD), (backward[::-1], BACKWARD)):
            yield from (self.piece(op) for layer in layers for op in layer.ops if op.phase in phases and op not in joined)

    def pairs(self, forward: Sequence[Layer], backward: Sequence[Layer]) -> Iterator[tuple[Layer, Layer]]:
        """The layers of two chunks that run one beside the other."""
        return zip(filter(self.exchanging, forward), filter(self.exchanging, backward[::-1]), strict=False)

    def piece(self, op: Op) -> Func | Op:
        """The function that an op of main calls, in its order, or the op."""
        if not isinstance(op, Call) or isinstance(op, Fused):
            return op
        name = str(op.callee)
        if name not in self._ordered:
            self._ordered[name] = ordered(self.module, self.module[name], self.costing).func
        return self._ordered[name]

    def beside(self, forward: Layer, backward: Layer) -> Func:
        """The function that runs one layer forward and one backward, of two micro-batches, in its order."""
        key = forward.kind, backward.kind
        if key not in self._beside:
            groups = Groups(self.module)
            made, parts = beside(groups, self.exchanging(forward)[0], self.exchanging(backward)[1:])
            self._beside[key] = ordered(groups.module, made, self.costing, backward=parts).func
        return self._beside[key]

    def exchanging(self, layer: Layer) -> tuple[Call, ...]:
        """The call that exchanges a layer's rows, and those of its backward pass that run beside another's; none if it has none."""
        if layer.name not in self._exchanges:
            calls = [op for op in layer.ops if isinstance(op, Call) and str(op.callee) in self._exchanging]
            rest = [op for op in layer.ops if isinstance(op, Call) and gradients_of(op, calls[-1])] if calls else []
            self._exchanges[layer.name] = (*calls, *rest)
        return self._exchanges[layer.name]

    @cached_property
    def costing(self) -> Costing:
        """By which ops are ordered: what the pass `overlap` goes by."""
        return costing_of(self.module, self.cluster, repeats=self.repeats)

    @cached_property
    def _exchanging(self) -> frozenset[str]:
        return exchanging(self.module)

    @cached_property
    def _exchanges(self) -> dict[str, tuple[Call, ...]]:
        return {}

    @cached_property
    def _ordered(self) -> dict[str, Func]:
        return {}

    @cached_property
    def _beside(self) -> dict[tuple[str, str], Func]:
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

    def parameters(self, spans: tuple[Span, ...]) -> Mapping[str, tuple[int, int]]:
        """Parameters and bytes of the weights of some spans of layers, by bucket. A weight that several layers read counts once."""
        if spans not in self._parameters:
            every: dict[str, tuple[str, int, int]] = {}
            for start, end in spans:
                for layer in self.layers[start:end]:
                    every |= self.weights(layer)
            held = {bucket: [(count, size) for kind, count, size in every.values() if kind == bucket] for bucket in BUCKETS}
            self._parameters[spans] = {bucket: (sum(n for n, _ in own), sum(size for _, size in own)) for bucket, own in held.items()}
        return self._parameters[spans]

    @cached_property
    def _parameters(self) -> dict[tuple[Span, ...], Mapping[str, tuple[int, int]]]:
        return {}

    def kept(self, span: Span) -> int:
        """Bytes that layers keep of a micro-batch from forward to backward; what follows from weights alone aside."""
        return self._sums[0][span[1]] - self._sums[0][span[0]]

    def stashed(self, span: Span) -> int:
        """Bytes that the part of backward for inputs leaves for that of weights."""
        return self._sums[1][span[1]] - self._sums[1][span[0]]

    @cached_property
    def _sums(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of what is kept and stashed: that of the layers before each."""
        size = expected_bytes(self.module)
        kinds = {layer.kind: (_kept(self.module, layer, size), _stashed(layer, size)) for layer in self.layers}
        kept, stashed = (tuple(accumulate((kinds[layer.kind][i] for layer in self.layers), initial=0)) for i in (0, 1))
        return kept, stashed

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
