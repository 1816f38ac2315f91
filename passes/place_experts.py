"""Redundant experts: a program that holds popular experts several times, and sends tokens to one of their slots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..ir.core import Func, Module, Op, OpT, Value
from ..ir.errors import DscError, require
from ..ir.gradients import bundles
from ..ir.ops.control import Literal as Number
from ..ir.ops.control import Param
from ..ir.ops.elementwise import Add, Cast, SwiGLU
from ..ir.ops.linalg import GroupedMatmul, Matmul
from ..ir.ops.moe import ChooseSlots, Combine, Dispatch
from ..ir.ops.quant import GroupedScaledMatmul, Quantize
from ..ir.ops.shape import Concat, IndexAdd, Reshape, Slice, Transpose
from ..ir.routing import routing_of
from ..ir.slots import ATTRIBUTE, SUFFIX, Slots
from ..ir.types import DType, Tensor
from ..ir.walk import join, walk
from .manager import Pass, register
from .placement import Placement, balanced, hierarchical
from .rewrite import Replacements, inherit
from .simplify import drop_unused


@register
@dataclass(frozen=True)
class PlaceExperts(Pass):
    """Give experts slots, more than there are experts: those that many tokens choose get several.

    `replicas` is how many slots there are on how many `ranks` along ep, experts being taken for equally popular; or `placement` is a file
    that `dsc place` wrote. Where the ranks are in several `nodes` and the gate's groups of experts make equal shares for them, a group
    stays on one node with its redundant experts, so that tokens go to no more nodes than without (report, section 3.4.1). The slots of an
    expert take turns (`choose_slots`), so each gets as many of its tokens as the others. Weights are then stacks of slots, filled with
    their experts' (ir/slots.py), and counts of tokens that something else than a product reads are counts of experts again. An expert
    computes the same in each of its slots: results are equal but for the order in which a backend adds up a row where other rows stand
    beside it. With `shared=routed` the shared expert becomes one more routed expert, which every token chooses with weight 1 (DeepSeek-V3
    report, section 3.4.2); its result is then added in float32 with the others', not after they were rounded. A program that is trained is
    refused.

    Before `place-experts{replicas=4,ranks=2}`:

        func @f(%x: bf16[4, 8], %ids: i32[4, 2], %weights: f32[4, 2]) {
          %rows: bf16[8, 8], %counts: i32[3], %handle: bundle{i32[8]} = dispatch([%x], %ids, experts=3)  @ f#1 F
          %w: bf16[3, 8, 8] = param("experts.up_proj")                                  @ f#2 F
          %y: bf16[8, 8] = grouped_matmul(%rows, %w, %counts)                           @ f#3 F
          %out: bf16[4, 8] = combine(%y, %handle, %weights)                             @ f#4 F
          return %out
        }

    after:

        module { stage=traced, placement={experts=3, ranks=2, stacks=["experts"], slots=[[0, 1, 0, 2]]} }

        func @f(%x: bf16[4, 8], %ids: i32[4, 2], %weights: f32[4, 2]) {
          %slots: i32[4] = param("experts.slots")  @ f#1.1 F
          %ids_1: i32[4, 2] = choose_slots(%ids, %slots)  @ f#1.2 F
          %rows: bf16[8, 8], %counts: i32[4], %handle: bundle{i32[8]} = dispatch([%x], %ids_1, experts=4)  @ f#1 F
          %w: bf16[4, 8, 8] = param("experts.up_proj")  @ f#2 F
          %y: bf16[8, 8] = grouped_matmul(%rows, %w, %counts)  @ f#3 F
          %out: bf16[4, 8] = combine(%y, %handle, %weights)  @ f#4 F
          return %out
        }
    """

    name: ClassVar[str] = "place-experts"
    requires: ClassVar[str] = "..quantized"

    replicas: int | None = None
    ranks: int | None = None
    nodes: int = 1
    placement: str | None = None
    shared: Literal["apart", "routed"] = "apart"

    def __post_init__(self) -> None:
        given = (self.replicas is None) == (self.ranks is None) != (self.placement is None)
        require(given, "place-experts: expected placement=FILE, or replicas=N and ranks=N, how many slots there are on how many ranks")

    def __call__(self, module: Module) -> Module:
        trained = module.attributes.get("mode") == "train" or bool(bundles(module))
        require(not trained, "redundant experts are for inference: in training an expert is held once for each group of ranks")
        require(ATTRIBUTE not in module.attributes, "the experts of the program have slots already")
        sent = {func.name: op for func in module.funcs for op in func.ops if isinstance(op, Dispatch)}
        require(bool(sent), "the program has no experts to place")
        sizes = sorted({op.experts for op in sent.values()})
        require(len(sizes) == 1, f"the program's layers have {' and '.join(map(str, sizes))} experts: expected as many in each")
        rewritten = {func.name: _Rewriting(func, self.shared == "routed", sizes[0]) for func in module.funcs if func.name in sent}
        layers = [(prefix, func.name) for prefix, func, op in walk(module) if isinstance(op, Dispatch)]
        routing = routing_of(module)
        held, ranks = self._slots(layers, sizes[0], next(iter(sent.values())).ids.shape[1], routing.groups if routing else 1)
        made = {name: one.func(len(held[0])) for name, one in rewritten.items()}
        stacks = {join(prefix, rewritten[name].stack): slots for (prefix, name), slots in zip(layers, held, strict=True)}
        funcs = tuple(made.get(func.name, func) for func in module.funcs)
        record = Slots(sizes[0], ranks, stacks).record()
        placed = module.replace(funcs=funcs, attributes={**module.attributes, ATTRIBUTE: record})
        return placed.map(lambda func: drop_unused(func, frozenset()) if func.name in made else func)

    def _slots(self, layers: list[tuple[str, str]], experts: int, top_k: Any, groups: int) -> tuple[list[tuple[int, ...]], int]:
        """The expert in each slot, for every layer, and on how many ranks they are."""
        every = experts + (self.shared == "routed")
        if self.placement is not None:
            placement, named = read(Path(self.placement))
            own = [prefix or name for prefix, name in layers]
            hint = ": place the shared expert as compile takes it, apart or routed" if abs(placement.experts - every) == 1 else ""
            require(placement.experts == every, f"{self.placement} places {placement.experts} experts, the program has {every}{hint}")
            lacking = [name for name in own if name not in named]
            require(not lacking, f"{self.placement} places no layer {lacking[:1]}; it has {', '.join(named)}")
            return [named[name] for name in own], placement.gpus
        assert self.replicas
        assert self.ranks
        loads = [float(top_k) / experts] * experts + [1.0] * (every - experts)
        if self.nodes > 1 and every == experts and groups % self.nodes == 0:
            found = hierarchical([loads], self.replicas, self.ranks, self.nodes, groups)
        else:
            found = balanced([loads], self.replicas, self.ranks)
        return [found.slots[0]] * len(layers), self.ranks


def read(file: Path) -> tuple[Placement, dict[str, tuple[int, ...]]]:
    """A placement that `dsc place -o` wrote, and its slots by layer. `DscError` with one line where it is none."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DscError(f"{file}: {getattr(error, 'strerror', None) or f'not JSON: {error}'}") from None
    kind = raw.get("format") if isinstance(raw, Mapping) else None
    require(kind == "dsc-placement" and raw.get("version") == 1, f"{file}: expected a placement as dsc place -o writes it")
    try:
        layers = {str(name): tuple(map(int, slots)) for name, slots in raw["layers"].items()}
        return Placement(tuple(layers.values()), int(raw["experts"]), int(raw["gpus"]), int(raw["nodes"])), layers
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DscError(f"{file}: not a placement: {error}") from None
    except DscError as error:
        raise DscError(f"{file}: {error}") from None


class _Rewriting:
    """One function whose tokens go to slots."""

    def __init__(self, func: Func, shared: bool, experts: int) -> None:
        self.before = func
        self.experts = experts
        found = [op for op in func.ops if isinstance(op, Dispatch)]
        require(len(found) == 1, f"@{func.name} dispatches {len(found)} times, expected once")
        (self.dispatch,) = found
        self.combine = next((op for op in func.ops if isinstance(op, Combine) and op.handle is self.dispatch.handle), None)
        self.weights = frozenset(_stacks(func, self.dispatch))
        stacks = {op.path.rpartition(".")[0] for op in self.weights}
        require(
            len(stacks) == 1, f"@{func.name} has the experts {', '.join(sorted(stacks)) or 'of no weights'}, expected one stack of them"
        )
        (self.stack,) = stacks
        self.sum = _shared_sum(func, self) if shared else None

    def func(self, slots: int) -> Func:
        """The function with `slots` slots."""
        body = _Body(self.before, slots)
        taken = {op.id for op in self.before.ops}
        for op in self.before.ops:
            start = len(body.ops)
            values = self.placed(op, body)
            inherit(op, values, [made for made in body.ops[start:] if made is not op], taken)
            body.new.update(zip(op.results, values, strict=True))
        results = tuple(body.new[v] for v in self.before.results)
        return Func(self.before.name, self.before.params, tuple(body.ops), results, self.before.updates)

    def placed(self, was: Op, body: _Body) -> tuple[Value, ...]:
        """What stands for the results of `was`."""
        if was in self.weights:
            assert isinstance(was, Param)
            shape = body.slots, *was.result.shape[1:]
            return body.emit(was.copy(result_types=(Tensor(was.result.dtype, shape),), id="")).results
        if was is self.combine and self.sum:
            weights = self.beside(body.new[self.combine.weights], 1.0, body)
            rows, handle = body.new[self.combine.rows], body.new[self.combine.handle]
            return body.emit(self.combine.copy(rows=rows, handle=handle, weights=weights, id="")).results
        op = was.with_operands(body.lookup(was))
        if isinstance(op, Dispatch):
            return self.dispatched(op, body)
        if was is self.sum:
            assert isinstance(op, Add)
            return (op.a if _tokens(op.a) else op.b,)
        body.emit(op)
        return op.results

    def dispatched(self, op: Dispatch, body: _Body) -> tuple[Value, ...]:
        """Tokens to slots; the counts are those of experts."""
        held = body.emit(Param(f"{self.stack}{SUFFIX}", (Tensor(DType.i32, (body.slots,)),), names=("slots",))).result
        ids = self.beside(op.ids, self.experts, body) if self.sum else op.ids
        chosen = body.emit(ChooseSlots(ids, held, names=(op.ids.name,))).result
        made = body.emit(op.copy(ids=chosen, experts=body.slots, id=""))
        every = self.experts + bool(self.sum)
        zeros = body.emit(Number((0,), (every,), DType.i32)).result
        counts = body.emit(IndexAdd(zeros, held, made.counts)).result
        if self.sum:
            counts = body.emit(Slice(counts, axis=0, start=0, stop=self.experts)).result
        body.by_slot[counts] = made.counts
        return *made.results[:-2], counts, made.handle

    @staticmethod
    def beside(x: Value, value: float, body: _Body) -> Value:
        """x [T, k] with one more column."""
        column = body.emit(Number((value,), (int(x.shape[0]), 1), x.dtype)).result  # type: ignore[arg-type]
        return body.emit(Concat((x, column), 1, names=(x.name,))).result


class _Body:
    """The ops of the function that is made."""

    def __init__(self, before: Func, slots: int) -> None:
        self.slots = slots
        self.ops: list[Op] = []
        self.new = Replacements()
        self.by_slot: dict[Value, Value] = {}
        """Of counts of experts those of their slots."""

    def lookup(self, op: Op) -> Callable[[Value], Value]:
        """What stands for the operands of `op`: products of experts have the counts of slots."""
        if not isinstance(op, GroupedMatmul | GroupedScaledMatmul | Quantize):
            return self.new.__getitem__
        return lambda value: self.by_slot.get(self.new[value], self.new[value])

    def emit(self, op: OpT) -> OpT:
        self.ops.append(op)
        return op


def _stacks(func: Func, dispatch: Dispatch) -> Iterator[Param]:
    """The weights of the experts that a dispatch leads to, and their scales."""
    for op in func.ops:
        if isinstance(op, GroupedMatmul | GroupedScaledMatmul) and op.counts is dispatch.counts:
            for value in (op.w, op.w_scales) if isinstance(op, GroupedScaledMatmul) else (op.w,):
                owner = value.owner
                while isinstance(owner, Quantize | Transpose | Cast):
                    owner = owner.operands[0].owner
                if not isinstance(owner, Param):
                    raise DscError(f"{op.id} of @{func.name}: its experts are no weights, and cannot have several slots")
                yield owner


def _shared_sum(func: Func, one: _Rewriting) -> Add:
    """The sum of what routed experts give and what the shared expert gives, where that is an expert like the others."""
    found = [op for op in func.ops if isinstance(op, Add) and _tokens(op.a) != _tokens(op.b)]
    sums = [op for op in found if (one.combine is (_tokens(op.a) or _tokens(op.b))) and _is_expert(op.b if _tokens(op.a) else op.a, one)]
    require(
        len(sums) == 1,
        f"shared=routed: @{func.name} adds no shared expert of the routed ones' width to their sum; it has to run before quantize-fp8",
    )
    return sums[0]


def _tokens(x: Value) -> Combine | None:
    """The combine that x is a view of."""
    owner = x.owner
    while isinstance(owner, Reshape):
        owner = owner.x.owner
    return owner if isinstance(owner, Combine) else None


def _is_expert(x: Value, one: _Rewriting) -> bool:
    """Whether x is down(swiglu(gate(t), up(t))) of the dispatched tokens t, with weights named and shaped as those of an expert."""
    match x.owner:
        case Matmul(a=Value(owner=SwiGLU(gate=Value(owner=Matmul() as gate), up=Value(owner=Matmul() as up))), b=down):
            widths = {op.path.rpartition(".")[2]: op.result.shape[1:] for op in one.weights}
            wanted = {"gate_proj": gate.b, "up_proj": up.b, "down_proj": down}
            alike = all(
                isinstance(w.owner, Param)
                and w.owner.path == f"{one.stack.removesuffix('experts')}shared_experts.{name}.weight"
                and w.shape == widths.get(name)
                for name, w in wanted.items()
            )
            return alike and _source(gate.a) is _source(up.a) is _source(one.dispatch.xs[0])
    return False


def _source(x: Value) -> Value:
    """What x is a view of."""
    while isinstance(x.owner, Reshape):
        x = x.owner.x
    return x
