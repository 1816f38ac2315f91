"""Which op of main belongs to which stage of a pipeline, and of which stages the gradient of a weight is made.

The forward ops are cut where they stand, in order. What goes back belongs to the stage of the forward op that it was derived from, which
its id says: `mlp#3.1` comes from `mlp#3`. Sums of gradients of activations stand where their parts meet, so that one tensor travels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ..hardware.cost import seconds
from ..hardware.device import Device
from ..ir.core import Module, Op, Phase, Value
from ..ir.errors import require
from ..ir.gradients import bundles
from ..ir.ops.control import Call, Pack, Param
from ..ir.ops.elementwise import Add
from ..ir.types import tensors
from ..ir.walk import walk
from ..schedule.partition import partition
from .outline import is_free, needed


class Placement:
    """The stage of every op of main that is not free; free ops are repeated by every stage that needs their results.

    Main packs its gradients itself: what it returns as a call gave it is unpacked before.
    """

    def __init__(self, module: Module, count: int, at: Sequence[str] = (), device: Device | None = None) -> None:
        self.module, self.device = module, device
        self.count = count
        self.repeated = _repeated(module)
        main = module.main
        self.units = [op for op in main.ops if op.phase is Phase.F and op not in self.repeated]
        self.forward = {op.id: op for op in main.ops if op.phase is Phase.F}
        require(count <= len(self.units), f"found {count} stages, but @{main.name} has {len(self.units)} ops to make them of")
        starts = self._starts(at) if at else list(accumulate(partition(self.costs(), count)))[:-1]
        self.stage = {op: bisect_right(starts, i) for i, op in enumerate(self.units)}
        """Of every op but sums over stages."""
        self.parts: dict[str, tuple[tuple[int, Value], ...]] = {}
        """Of each weight, in the order of the module's record: its gradient, in a part from each stage that reads it."""
        self.sums: dict[str, tuple[Op, ...]] = {}
        """Of each weight that several stages read: the ops that add these parts up."""
        self._place_backward()
        self._place_gradients()

    def free(self, op: Op) -> bool:
        """Whether stages repeat `op` rather than send its results."""
        return op in self.repeated

    def roots(self, ops: Sequence[Op], values: Sequence[Value] = ()) -> set[Value]:
        """What ops and values need from elsewhere: inputs, and results of ops that are not free."""
        return needed(ops, values, (), self.free)

    def homes(self, values: Sequence[Value]) -> list[int]:
        """The stages of what `values` are made of, in order."""
        return sorted({self.stage[v.owner] for v in self.roots((), values) if v.owner in self.stage})

    def costs(self) -> list[float]:
        """Of each forward op and of what goes back through it: seconds on the device that was given, else FLOPs."""

        def cost(op: Op) -> float:
            return op.flops() if self.device is None else seconds(op, self.device)

        inside = {func.name: sum(cost(op) for *_, op in walk(self.module, func)) for func in self.module.funcs[1:]}
        found: dict[Op, float] = dict.fromkeys(self.units, 0)
        for op in self.module.main.ops:
            if (unit := self._origin(op)) in found:
                found[unit] += inside[op.callee] if isinstance(op, Call) else cost(op)
        return list(found.values())

    def _starts(self, at: Sequence[str]) -> list[int]:
        """Where the named components begin."""
        components = [op.id.partition("#")[0] for op in self.units]
        starts: list[int] = []
        for name in at:
            after = starts[-1] + 1 if starts else 1
            start = next((i for i in range(after, len(components)) if f"{components[i]}.".startswith(f"{name}.")), None)
            require(start is not None, f"at: no {name} after the stage before it; @{self.module.main.name} is {_listed(components)}")
            starts.append(start)  # type: ignore[arg-type]
        return starts

    def _origin(self, op: Op) -> Op | None:
        """The forward op from which `op` was derived."""
        id = op.id
        while id not in self.forward and "." in id.partition("#")[2]:
            id = id.rpartition(".")[0]
        return self.forward.get(id)

    def _place_backward(self) -> None:
        for op in self.module.main.ops:
            if op.phase is Phase.F or self.free(op):
                continue
            unit = self._origin(op)
            meets = isinstance(op, Add) and op.phase is Phase.I
            self.stage[op] = self.stage[unit] if unit in self.stage and not meets else min(self.homes(op.operands), default=self.count - 1)

    def _place_gradients(self) -> None:
        named = bundles(self.module)
        results = self.module.main.results
        for names, bundle in zip(named, results[len(results) - len(named) :], strict=True):
            assert isinstance(bundle.owner, Pack)
            for name, field in zip(names, bundle.owner.values, strict=True):
                sums: list[Op] = []
                self.parts[name] = tuple(self._parts(field, sums))
                if sums:
                    self.sums[name] = tuple(sums)
        for op in (op for sums in self.sums.values() for op in sums):
            del self.stage[op]

    def _parts(self, value: Value, sums: list[Op]) -> list[tuple[int, Value]]:
        """Stage and value of the parts of a gradient; the sums over stages are added to `sums`, in order."""
        owner = value.owner
        if isinstance(owner, Add) and owner.phase is Phase.W:
            below: list[Op] = []
            parts = [part for operand in owner.operands for part in self._parts(operand, below)]
            if len({stage for stage, _ in parts}) > 1:
                sums += [*below, owner]
                return parts
            self.stage[owner] = parts[0][0]
        homes = self.homes([value])
        require(len(homes) < 2, f"%{value.name} of @{self.module.main.name} is made in stages {homes} at once: it cannot be cut there")
        return [(homes[0] if homes else self.count - 1, value)]


def _repeated(module: Module) -> set[Op]:
    """Ops that follow from inputs and constants alone and cost next to nothing: tables of positions, masks, labels moved by one."""
    known = set(module.main.params)
    found: set[Op] = set()
    for op in module.main.ops:
        if not isinstance(op, Param) and known.issuperset(op.operands) and _linear(module, op):
            found.add(op)
            known.update(op.results)
        elif is_free(op):
            found.add(op)
    return found


def _linear(module: Module, op: Op) -> bool:
    """Whether an op reads no weight and computes no more than a few operations for each element that it reads or makes."""
    if isinstance(op, Call):
        return all(_linear(module, inner) for inner in module[op.callee].ops)
    return not isinstance(op, Param) and op.flops() <= sum(t.size for v in (*op.operands, *op.results) for t in tensors(v.type))


def _listed(components: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(components))
