"""Gathering ops that one kernel can compute from one read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ..ir.core import Func, Module, Op, Phase, Symbol, Trait, Value, users
from ..ir.errors import DscError
from ..ir.ops.elementwise import Add
from ..ir.ops.fused import SUMS, Fused
from ..ir.ops.shape import Reshape
from ..ir.region import downward, free, member, region_of
from ..ir.types import Dim
from .in_place import in_place
from .manager import Pass, register
from .rewrite import fresh, unused
from .stashes import quantized_stashes

MOST_TENSORS = 16
"""Tensors that a kernel reads and writes, at most: each takes registers for its address."""


@register
@dataclass(frozen=True)
class Fuse(Pass):
    """Gather ops element by element and along rows into regions that one kernel computes each.

    A region becomes a function, and one `fused` op in its place. What is read elsewhere is a result of the region. Ops that read the same
    tensor are in one region where that is possible. No op is computed twice, numbers and reshapes apart; ops of different phases stay
    apart, and what no region takes keeps its order.

    Before `fuse`:

        module { stage=quantized }

        func @f(%x: bf16[4, 256], %r: bf16[4, 256], %w: bf16[256]) {
          %h: bf16[4, 256] = add(%x, %r)                           @ f#1 F
          %y: bf16[4, 256] = rms_norm(%h, %w, eps=1e-06)           @ f#2 F
          %q: f8e4m3[4, 256], %s: f32[4, 2] = quantize(%y)         @ f#3 F
          %z: bf16[4, 256] = silu(%y)                              @ f#4 W
          return %h, %q, %s, %z
        }

    after:

        module { stage=lowered }

        func @f(%x: bf16[4, 256], %r: bf16[4, 256], %w: bf16[256]) {
          %h: bf16[4, 256], %y: bf16[4, 256], %q: f8e4m3[4, 256], %s: f32[4, 2] = fused(@add_rms_norm_quantize, [%x, %r, %w])  @ f#3.1 F
          %z: bf16[4, 256] = silu(%y)                              @ f#4 W
          return %h, %q, %s, %z
        }

        func @add_rms_norm_quantize(%x: bf16[4, 256], %r: bf16[4, 256], %w: bf16[256]) {
          %h: bf16[4, 256] = add(%x, %r)                           @ f#1 F
          %y: bf16[4, 256] = rms_norm(%h, %w, eps=1e-06)           @ f#2 F
          %q: f8e4m3[4, 256], %s: f32[4, 2] = quantize(%y)         @ f#3 F
          return %h, %y, %q, %s
        }

    Before `fuse`:

        module { stage=quantized }

        func @f(%gate: bf16[4, 256], %up: bf16[4, 256], %dy: bf16[2, 3, 256]) {
          %y: bf16[4, 256] = swiglu(%gate, %up)                             @ f#1 F
          %q: f8e4m3[4, 256], %s: f32[4, 2] = quantize(%y)                  @ f#2 F
          %dq: f8e4m3[2, 3, 256], %ds: f32[2, 3, 2] = quantize(%dy)         @ f#3 I
          %dm: bf16[6, 256] = reshape(%dy, shape=[6, 256])                  @ f#4 W
          %wq: f8e4m3[6, 256], %ws: f32[1, 256] = quantize(%dm, tile=[128, 1])  @ f#5 W
          return %q, %s, %dq, %ds, %wq, %ws
        }

    after:

        module { stage=lowered }

        func @f(%gate: bf16[4, 256], %up: bf16[4, 256], %dy: bf16[2, 3, 256]) {
          %q: f8e4m3[4, 256], %s: f32[4, 2] = fused(@swiglu_quantize, [%gate, %up])  @ f#2.1 F
          %dq: f8e4m3[2, 3, 256], %ds: f32[2, 3, 2], %wq: f8e4m3[6, 256], %ws: f32[1, 256] = fused(@quantize_quantize, [%dy])  @ f#5.1 I
          return %q, %s, %dq, %ds, %wq, %ws
        }

        func @swiglu_quantize(%gate: bf16[4, 256], %up: bf16[4, 256]) {
          %y: bf16[4, 256] = swiglu(%gate, %up)                             @ f#1 F
          %q: f8e4m3[4, 256], %s: f32[4, 2] = quantize(%y)                  @ f#2 F
          return %q, %s
        }

        func @quantize_quantize(%dy: bf16[2, 3, 256]) {
          %dq: f8e4m3[2, 3, 256], %ds: f32[2, 3, 2] = quantize(%dy)         @ f#3 I
          %dm: bf16[6, 256] = reshape(%dy, shape=[6, 256])                  @ f#4 W
          %wq: f8e4m3[6, 256], %ws: f32[1, 256] = quantize(%dm, tile=[128, 1])  @ f#5 W
          return %dq, %ds, %wq, %ws
        }

    The two quantisations of a gradient are of two phases: the one for weights is done with the one for inputs, which reads the same, in
    another function if need be, where backward is split.
    """

    name: ClassVar[str] = "fuse"
    ensures: ClassVar[str | None] = "lowered"

    def __call__(self, module: Module) -> Module:
        names = {func.name for func in module.funcs}
        funcs: list[Func] = []
        regions: list[Func] = []
        module = quantized_stashes(in_place(module))
        for func in module.funcs:
            fusion = _Fusion(self, _summed(func), names)
            funcs.append(fusion.rebuilt())
            regions += fusion.regions
        return module.replace(funcs=(*funcs, *regions), stage="lowered")


def _matrix(x: Value) -> tuple[Value, Dim]:
    """What matrix of rows x is: the value that it is a reshape of, and the length of a row."""
    columns = x.shape[-1] if x.tensor.rank else 1
    while isinstance(x.owner, Reshape):
        x = x.owner.x
    return x, columns


def _replaced(func: Func, ops: list[Op], new: dict[Value, Value]) -> Func:
    """`func` of `ops`, values replaced as `new` says, and in turn by the results of ops that change for it."""

    def now(value: Value) -> Value:
        while value in new:
            value = new[value]
        return value

    body = []
    for op in ops:
        changed = op.with_operands(now)
        new |= {a: b for a, b in zip(op.results, changed.results, strict=True) if a is not b}
        body.append(changed)
    return Func(func.name, func.params, tuple(body), tuple(map(now, func.results)), func.updates)


def _summed(func: Func) -> Func:
    """`func` with the sums of products, and of gradients of norms, with what is there before, made by the kernels of these.

    None of them is made to wait for a collective for which it does not wait anyway.
    """
    readers, place, awaited = users(func), {op: i for i, op in enumerate(func.ops)}, _awaited(func)
    made: dict[Op, Op] = {}
    new: dict[Value, Value] = {}
    dropped = set[Op]()
    for op in func.ops:
        for value, other in ((op.a, op.b), (op.b, op.a)) if isinstance(op, Add) else ():
            owner = value.owner
            if type(owner) not in SUMS or owner is None or owner in made or op in dropped or value is not owner.results[0]:
                continue
            alone = readers[value] == [op] and value not in func.results and owner.phase is op.phase
            there = other.owner is None or (place[other.owner] < place[owner] and awaited[other] <= awaited[value])
            if alone and there and other.type == value.type == op.result.type:
                given = {a.name: getattr(owner, a.name) for a in owner.arguments} | {"added": other}
                names = (op.result.name, *(v.name for v in owner.results[1:]))
                made[owner] = SUMS[type(owner)](**given, id=op.id, phase=op.phase, names=names)
                new |= {op.result: made[owner].results[0]} | dict(zip(owner.results[1:], made[owner].results[1:], strict=True))
                dropped.add(op)
    if not made:
        return func
    return _replaced(func, [made.get(op, op) for op in func.ops if op not in dropped], new)


def _awaited(func: Func) -> dict[Value, frozenset[Op]]:
    """The collectives that each value waits for."""
    found: dict[Value, frozenset[Op]] = dict.fromkeys(func.params, frozenset())
    for op in func.ops:
        own = {op} if Trait.COLLECTIVE in op.traits else set()
        found |= dict.fromkeys(op.results, frozenset(own.union(*(found[v] for v in op.operands))))
    return found


# ---- regions


@dataclass
class _Fusion:
    """The regions of one function."""

    rule: Fuse
    func: Func
    names: set[str]
    regions: list[Func] = field(default_factory=list)
    group: dict[Op, list[Op]] = field(default_factory=dict)
    """The ops of the region that an op belongs to, in program order; the same list for all of them."""

    def __post_init__(self) -> None:
        self.place = {op: i for i, op in enumerate(self.func.ops)}
        self.readers = users(self.func)
        for op in self.func.ops:
            if not free(op) and member(op) is None:
                self.group[op] = [op]
        for op in self.func.ops:
            for value in op.operands if op in self.group else ():
                for owner in self.made_by(value):
                    if self.group[owner] is not self.group[op]:
                        self.merge(self.group[owner], self.group[op])
        readers: dict[tuple[Value, Dim], list[Op]] = {}
        for op in self.group:
            largest = max(v.tensor.size for v in (*op.operands, *op.results))
            for matrix in dict.fromkeys(_matrix(v) for v in op.operands if v.tensor.size == largest):
                readers.setdefault(matrix, []).append(op)
        for first, *others in readers.values():
            for op in others:
                if self.group[first] is not self.group[op]:
                    self.merge(self.group[first], self.group[op])

    def made_by(self, value: Value) -> Iterator[Op]:
        """The op of a region that makes `value`, by way of reshapes or not."""
        while isinstance(value.owner, Reshape):
            value = value.owner.x
        if value.owner in self.group:
            yield value.owner

    def merge(self, a: list[Op], b: list[Op]) -> None:
        """Make one region of two, if they fit in one kernel and the order of the program allows it; else say why not."""
        both = sorted((*a, *b), key=self.place.__getitem__)
        reason = self.unfit(both)
        if reason is None:
            before = {op: self.group[op] for op in both}
            self.group |= dict.fromkeys(both, both)
            if self.order() is None:
                self.group |= before
                reason = "what lies between them would have to change places"
        if reason is not None:
            self.rule.decline(self.func, b[-1], f"not fused with {a[-1].id}: {reason}")

    def unfit(self, ops: list[Op]) -> str | None:
        phases = self.phases(ops)
        if len(phases) > 1:
            return f"phases {' and '.join(p.name for p in phases)}"
        body, results = self.body(ops), self.results(ops)
        try:
            region_of(body)
        except DscError as error:
            return str(error)
        if not results:
            return "nothing reads what they make"
        tensors = len(self.operands(body)) + len(results)
        return f"{tensors} tensors to read and write, expected at most {MOST_TENSORS}" if tensors > MOST_TENSORS else None

    def phases(self, ops: list[Op]) -> list[Phase]:
        """Of a region: tiles down the columns of a gradient are for weights, but made where it is read for inputs."""
        return list(dict.fromkeys(op.phase for op in ops if not downward(op)) or dict.fromkeys(op.phase for op in ops))

    def body(self, ops: list[Op]) -> list[Op]:
        """The ops with the free ones that they read, those that lead from one of them to another or make them read the same."""
        chosen, found = set(ops), list[Op]()
        read = {v for op in ops for v in op.operands}

        def visit(op: Op) -> None:
            for value in op.operands:
                owner = value.owner
                known = owner is not None and owner not in found and owner in self.place
                if owner is not None and known and free(owner) and (self.inside(owner, chosen) or _same(owner, read)):
                    visit(owner)
                    found.append(owner)

        for op in ops:
            visit(op)
            found.append(op)
        return found

    def inside(self, op: Op, chosen: set[Op]) -> bool:
        """Whether a free op belongs into the region that reads it: a number does, a view of what the region makes, too."""
        while isinstance(op, Reshape):
            if op.x.owner is None or member(op) is not None:
                return False
            op = op.x.owner
            if op in chosen:
                return True
        return not op.operands and free(op)

    def operands(self, body: list[Op]) -> tuple[Value, ...]:
        made = {value for op in body for value in op.results}
        return tuple(dict.fromkeys(v for op in body for v in op.operands if v not in made))

    def results(self, ops: list[Op]) -> tuple[Value, ...]:
        """What is read outside of the region, by another op or by a free one that is."""
        chosen = set(ops)
        made = (value for op in ops for value in op.results)
        return tuple(v for v in made if v in self.func.results or any(self.outside(u, chosen) for u in self.readers.get(v, ())))

    def outside(self, reader: Op, chosen: set[Op]) -> bool:
        if reader in chosen:
            return False
        if not isinstance(reader, Reshape):
            return True
        return reader.result in self.func.results or any(self.outside(u, chosen) for u in self.readers.get(reader.result, ()))

    def order(self) -> list[list[Op]] | None:
        """Regions and other ops, each after what it reads, the others in their order; None where there is no such order.

        A region runs where its last op stood, or before the first op that reads from it.
        """
        found: list[list[Op]] = []
        state: dict[int, bool] = {}
        reached = -1

        def visit(unit: list[Op]) -> bool:
            nonlocal reached
            if id(unit) in state:
                return state[id(unit)]
            state[id(unit)] = False
            for value in self.operands(self.body(unit) if unit[0] in self.group else unit):
                owner = value.owner
                if owner is not None and not visit(self.units[owner]):
                    return False
            if unit[0] not in self.group and not free(unit[0]):
                if self.place[unit[0]] < reached:
                    return False
                reached = self.place[unit[0]]
            state[id(unit)] = True
            found.append(unit)
            return True

        self.units = {op: self.group.get(op) or [op] for op in self.func.ops}
        return found if all(visit(self.units[op]) for op in self.func.ops if op is self.units[op][-1]) else None

    def rebuilt(self) -> Func:
        """The function with a fused op for each region of two ops or more."""
        order = self.order()
        if order is None or all(len(unit) == 1 for unit in order):
            return self.func
        taken = {op.id for op in self.func.ops}
        ops: list[Op] = []
        new: dict[Value, Value] = {}
        for unit in order:
            if len(unit) == 1:
                ops.append(unit[0])
                continue
            made, values = self.fused(unit, taken)
            ops.append(made)
            new |= dict(zip(values, made.results, strict=True))
        return _dead(_replaced(self.func, ops, new))

    def fused(self, ops: list[Op], taken: set[str]) -> tuple[Op, tuple[Value, ...]]:
        """The op that stands for a region, and the values that its results replace."""
        body, results = self.body(ops), self.results(ops)
        operands = self.operands(body)
        inner = {value: Value(value.type, value.name) for value in operands}
        params, moved = tuple(inner.values()), list[Op]()
        for op in body:
            moved.append(op.with_operands(inner.__getitem__) if op.operands else op.copy())
            inner |= dict(zip(op.results, moved[-1].results, strict=True))
        func = Func(self.named(ops), params, tuple(moved), tuple(inner[v] for v in results))
        self.regions.append(func)
        last = ops[-1].id
        id = fresh(last, taken) if last else ""
        phase = self.phases(ops)[0]
        types = tuple(v.type for v in results)
        return Fused(Symbol(func.name), operands, types, id=id, phase=phase, names=tuple(v.name for v in results)), results

    def named(self, ops: list[Op]) -> str:
        """A name after the ops, new in the module."""
        kinds = [op.name for op in ops]
        return unused("_".join(kinds if len(kinds) <= 4 else [*kinds[:2], "to", kinds[-1]]), self.names)


def _same(op: Op, read: set[Value]) -> bool:
    """Whether an op is a view of a matrix that is read in another form, too."""
    return isinstance(op, Reshape) and any(v is not op.result and _matrix(v) == _matrix(op.result) for v in read)


def _dead(func: Func) -> Func:
    """`func` without the free ops that nothing reads any more: regions have their own."""
    read, kept = set(func.results), list[Op]()
    for op in reversed(func.ops):
        if free(op) and op.result not in read:
            continue
        read.update(op.operands)
        kept.append(op)
    return Func(func.name, func.params, tuple(reversed(kept)), func.results, func.updates)
