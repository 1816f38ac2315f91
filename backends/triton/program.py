"""A function made ready to run: which kernel or torch function runs each op, and where every buffer lies in the arena.

The plan is made once per function and layout of its arguments, on tensors without memory (torch's `meta` device), which tell strides and
views exactly. Running it allocates nothing: a value lies in its function's part of the arena, a called function's part is a buffer of
the caller that lives only during the call, and what a function returns lies in buffers of its caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias

import torch

from ...ir.core import Func, Module, Op, Trait, Value
from ...ir.ops.collective import Collective, Done, reads
from ...ir.ops.control import Call, Constant, Iota, Literal, Pack, Param, Unpack
from ...ir.ops.fused import Fused, Joined
from ...ir.ops.shape import Transpose
from ...ir.strides import VIEWS, made, viewed
from ...ir.types import Bundle, DType, Ragged, Tensor, Type, bound, landed, tensors
from . import codegen, kernels, torch_ops
from .memory import Lifetime, aligned, place
from .registry import Declined, Launch, Slot, Slots, plan
from .targets import Target
from .tensors import DTYPES, meta

__all__ = ["Buffer", "FunctionPlan", "Step", "kernels", "plan_function"]


@dataclass(frozen=True)
class Argument:
    """Whose memory a planned value lies in, where it is not a buffer: the function's argument number `index`."""

    index: int


Root: TypeAlias = "int | Argument | None"
"""Whose memory a tensor lies in: a buffer of the function, an argument, or nothing of either (weights and constants)."""


@dataclass(frozen=True)
class Planned:
    """A tensor that is going to be: its layout and its root."""

    meta: torch.Tensor
    root: Root


Layout: TypeAlias = Any
"""`Planned`, or for a bundle a tuple of such."""


@dataclass
class Buffer:
    """Memory of the function: alive from op `start` to op `stop`; `returned` where it outlives the call, and so is the caller's."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    returned: bool = False

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class Step:
    """How one op runs.

    how         "view" | "source" (weights and constants) | "call" | "kernel" | "torch" | "together" (with other ranks) | "done"
    results     where each result tensor lies, bundles field by field; none of a call, and none of a view of an operand
    launches    of a kernel
    copies      operand tensors (by number) that the kernel wants contiguous, and the buffers for them
    workspace   the buffers of the launches' workspace; for a call the one in which the callee's arena lies, and
                those of what it returns
    callee      of a call
    declined    why no kernel runs the op, where it has one
    """

    op: Op
    how: str
    results: tuple[Planned, ...] = ()
    launches: tuple[Launch, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    workspace: tuple[int, ...] = ()
    callee: FunctionPlan | None = None
    declined: str = ""


@dataclass(frozen=True)
class FunctionPlan:
    """A function on arguments of one layout.

    offsets   where each buffer starts in the function's arena, which has `bytes`; without those that are returned
    returned  the buffers that hold what the function returns: its caller says where they lie
    """

    func: Func
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    offsets: Mapping[int, int]
    bytes: int
    returned: tuple[int, ...]
    results: tuple[Layout, ...]

    def all_steps(self) -> Iterator[Step]:
        """Every step, called functions included, each function once."""
        seen: set[int] = set()

        def visit(plan: FunctionPlan) -> Iterator[Step]:
            seen.add(id(plan))
            for step in plan.steps:
                yield step
                if step.callee is not None and id(step.callee) not in seen:
                    yield from visit(step.callee)

        return visit(self)


def flat(layout: Any) -> Iterator[Any]:
    """The tensors of a value, bundles field by field."""
    if isinstance(layout, tuple):
        for item in layout:
            yield from flat(item)
    else:
        yield layout


Plans: TypeAlias = "dict[tuple[Any, ...], FunctionPlan]"


def plan_function(module: Module, func: Func, arguments: Sequence[Layout], target: Target, plans: Plans) -> FunctionPlan:
    """`func` on `arguments` (layouts of tensors on the meta device), made ready for `target`. `plans` keeps what is planned already."""
    key = (func.name, target.name, tuple((m.dtype, m.shape, m.stride()) for m in flat(tuple(arguments))))
    if key not in plans:
        plans[key] = _Planner(module, func, target, plans).plan(arguments)
    return plans[key]


def layout_of(type: Type) -> Any:
    """A contiguous value of `type` on the meta device, ragged dimensions at their bound."""
    type = landed(type)
    if isinstance(type, Bundle):
        return tuple(map(layout_of, type.fields))
    return meta(type, tuple(d.bound if isinstance(d, Ragged) else d for d in type.shape))


@dataclass
class _Planner:
    module: Module
    func: Func
    target: Target
    plans: Plans
    buffers: list[Buffer] = field(default_factory=list)
    values: dict[Value, Layout] = field(default_factory=dict)
    extents: dict[str, int] = field(default_factory=dict)
    joins: dict[Joined, Planned] = field(default_factory=dict)
    """What is made in parts, from the first part on."""

    def plan(self, arguments: Sequence[Layout]) -> FunctionPlan:
        self.parts = dict(part for op in self.func.ops if isinstance(op, Joined) for part in _parts(op))
        number = 0
        for param, given in zip(self.func.params, arguments, strict=True):
            self.bind(param.type, given)
            self.values[param], number = _as_arguments(given, number)
        steps = []
        for index, op in enumerate(self.func.ops):
            for operand in reads(op):
                self.touch(self.values[operand], index)
            steps.append(self.step(op, index))
        results = tuple(self.values[v] for v in self.func.results)
        for layout in flat(results):
            if isinstance(layout.root, int):
                self.buffers[layout.root].returned = True
        inner = tuple(i for i, b in enumerate(self.buffers) if not b.returned)
        returned = tuple(i for i, b in enumerate(self.buffers) if b.returned)
        placement = place([Lifetime(self.buffers[i].bytes, self.buffers[i].start, self.buffers[i].stop) for i in inner])
        offsets = dict(zip(inner, placement.offsets, strict=True))
        return FunctionPlan(self.func, tuple(steps), tuple(self.buffers), offsets, placement.bytes, returned, results)

    def bind(self, type: Type, given: Any) -> None:
        """Learn the extents of ragged dimensions from an argument."""
        type = landed(type)
        if isinstance(type, Bundle):
            for part, item in zip(type.fields, given, strict=True):
                self.bind(part, item)
            return
        for dim, extent in zip(type.shape, given.shape, strict=True):
            if isinstance(dim, Ragged):
                self.extents[dim.name] = extent

    def touch(self, layout: Layout, index: int) -> None:
        for planned in flat(layout):
            if isinstance(planned.root, int):
                self.buffers[planned.root].stop = max(self.buffers[planned.root].stop, index)

    def buffer(self, dtype: torch.dtype, shape: tuple[int, ...], index: int) -> int:
        self.buffers.append(Buffer(dtype, shape, index, index))
        return len(self.buffers) - 1

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(self.extents.get(d.name, d.bound) if isinstance(d, Ragged) else d for d in tensor.shape)

    def results(self, type: Type, index: int, op: Op | None = None) -> Layout:
        """A fresh buffer for each tensor of a result, which lies as those of `op` do."""
        type = landed(type)
        if isinstance(type, Bundle):
            return tuple(self.results(part, index) for part in type.fields)
        there = meta(type, self.shape(type))
        shape = tuple(there.shape)
        return Planned(there.as_strided(shape, made(op, shape)) if op else there, self.buffer(there.dtype, shape, index))

    def part(self, value: Value, index: int) -> Planned:
        """The place of a result in what it is a part of."""
        whole, number, start, perms = self.parts[value]
        if whole not in self.joins:
            self.joins[whole] = self.results(whole.result.type, index)
        there = self.joins[whole]
        part = there.meta.narrow(whole.axis, start, bound(whole.xs[number].shape[whole.axis]))
        for perm in perms:
            part = part.permute([perm.index(axis) for axis in range(len(perm))])
        return Planned(part, there.root)

    def step(self, op: Op, index: int) -> Step:
        operands = tuple(self.values[v] for v in op.operands)
        if isinstance(op, Param | Constant | Literal | Iota):
            self.values[op.result] = Planned(meta(op.result.tensor, self.shape(op.result.tensor)), None)
            return Step(op, "source")
        if isinstance(op, Done):
            self.values.update(zip(op.results, operands, strict=True))
            return Step(op, "done")
        if isinstance(op, Pack | Unpack):
            self.values.update(zip(op.results, (operands,) if isinstance(op, Pack) else operands[0], strict=True))
            return Step(op, "view")
        if isinstance(op, Joined) and op in self.joins:
            self.values[op.result] = self.joins[op]
            return Step(op, "view", (self.joins[op],))
        if isinstance(op, VIEWS) and (viewed := _view(op, operands[0])) is not None:
            self.values[op.result] = viewed
            return Step(op, "view")
        if isinstance(op, Call) and not isinstance(op, Fused):
            return self.call(op, operands, index)
        known = len(self.buffers)
        made = tuple(self.part(v, index) if v in self.parts else self.results(v.type, index, op) for v in op.results)
        self.values.update(zip(op.results, made, strict=True))
        if isinstance(op, Collective):
            return Step(op, "together", tuple(flat(made)))
        step = self.compute(op, operands, made, index)
        if isinstance(op, Fused) and step.how != "kernel":
            del self.buffers[known:]
            return replace(self.call(op, operands, index), declined=step.declined)
        return step

    def compute(self, op: Op, operands: tuple[Layout, ...], made: tuple[Layout, ...], index: int) -> Step:
        results = tuple(flat(made))
        found = kernels.KERNELS.get(type(op))
        region = self.module[op.callee] if isinstance(op, Fused) else codegen.lone(op) if found is None else None
        if found is None and region is None:
            return Step(op, "torch", results)
        strided = found is not None and Trait.STRIDED in op.traits
        types = [t for v in op.operands for t in tensors(v.type)]
        layouts = [planned.meta for planned in flat(operands)]
        uneven = [i for i, m in enumerate(layouts) if not strided and not m.is_contiguous()]
        packed = [m.contiguous() if i in uneven else m for i, m in enumerate(layouts)]
        operand_slots = [_slot("operand", i, t.dtype, m) for i, (t, m) in enumerate(zip(types, packed, strict=True))]
        result_types = [t for v in op.results for t in tensors(v.type)]
        result_slots = [_slot("result", i, t.dtype, m.meta) for i, (t, m) in enumerate(zip(result_types, flat(made), strict=True))]
        launches: tuple[Launch, ...] | Declined
        if region is not None:
            own = dict(zip(op.operands, operand_slots, strict=True)) if region.ops[0] is op else dict(enumerate(operand_slots))
            generated = codegen.launch_of(region, self.target, tuple(own.values()), result_slots)
            launches = generated if isinstance(generated, Declined) else (generated,)
        else:
            slots, wanted = iter(operand_slots), iter(result_slots)
            launches = plan(op, self.target, tuple(_like(x, slots) for x in operands), tuple(_like(x, wanted) for x in made))
        if isinstance(launches, Declined):
            return Step(op, "torch", results, declined=launches.reason)
        copies = tuple((i, self.buffer(packed[i].dtype, tuple(packed[i].shape), index)) for i in uneven)
        extra = sorted((slot for launch in launches for slot in launch.workspace), key=lambda slot: slot.index)
        workspace = tuple(self.buffer(DTYPES[slot.dtype], slot.shape, index) for slot in extra)
        return Step(op, "kernel", results, tuple(launch for launch in launches if prod(launch.grid)), copies, workspace)

    def call(self, op: Call, operands: tuple[Layout, ...], index: int) -> Step:
        callee = plan_function(self.module, self.module[op.callee], _metas(operands), self.target, self.plans)
        mine = {i: self.buffer(callee.buffers[i].dtype, callee.buffers[i].shape, index) for i in callee.returned}
        arguments = list(flat(operands))

        def translated(layout: Layout) -> Layout:
            if isinstance(layout, tuple):
                return tuple(map(translated, layout))
            root = layout.root
            return Planned(layout.meta, mine[root] if isinstance(root, int) else arguments[root.index].root if root else None)

        self.values.update(zip(op.results, map(translated, callee.results), strict=True))
        space = self.buffer(torch.uint8, (callee.bytes,), index)
        return Step(op, "call", workspace=(space, *mine.values()), callee=callee)


def _as_arguments(given: Any, number: int) -> tuple[Layout, int]:
    if not isinstance(given, tuple):
        return Planned(given, Argument(number)), number + 1
    made = []
    for item in given:
        layout, number = _as_arguments(item, number)
        made.append(layout)
    return tuple(made), number


def _metas(layout: Layout) -> Any:
    return tuple(map(_metas, layout)) if isinstance(layout, tuple) else layout.meta


def _slot(kind: Any, index: int, dtype: DType, layout: torch.Tensor) -> Slot:
    return Slot(kind, index, dtype, tuple(layout.shape), tuple(layout.stride()))


def _like(layout: Layout, slots: Iterator[Slot]) -> Slots:
    return tuple(_like(item, slots) for item in layout) if isinstance(layout, tuple) else next(slots)


def _view(op: Op, x: Planned) -> Planned | None:
    """The result of a view op as a view; None where the elements have to be copied."""
    if viewed(op, x.meta.stride()) is None:
        return None
    (found,) = torch_ops.run(op, (x.meta,))
    return Planned(found, x.root)


def _parts(op: Joined) -> Iterator[tuple[Value, tuple[Joined, int, int, list[tuple[int, ...]]]]]:
    """The results that `op` joins: its number, where its part begins, and the transposes that make the part of it, the last first."""
    start = 0
    for number, x in enumerate(op.xs):
        made, perms = x, list[tuple[int, ...]]()
        while isinstance(made.owner, Transpose):
            perms.append(made.owner.perm)
            made = made.owner.x
        yield made, (op, number, start, perms)
        start += bound(x.shape[op.axis])


def total_bytes(plan: FunctionPlan) -> int:
    """Bytes of the arena that runs `plan`: its own part, and behind it what it returns."""
    return plan.bytes + sum(aligned(plan.buffers[i].bytes) for i in plan.returned)
