"""Mixture of experts as imported modules spell it, lifted to `route`, `dispatch` and `combine`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar, TypeGuard

from ..ir.core import Builder, Func, Module, Op, Value, users
from ..ir.ops.control import Iota
from ..ir.ops.elementwise import Cast, Div, Mul, Silu, SwiGLU
from ..ir.ops.linalg import GroupedMatmul
from ..ir.ops.moe import Combine, Dispatch, Route
from ..ir.ops.reduce import Histogram, Sort, Sum, TopK
from ..ir.ops.shape import Reshape, Scatter, Take
from ..ir.types import DType
from .manager import Pass, register
from .rewrite import rebuild
from .routers import Selection, Users, Weights, chooses_experts, number, selection, weights_of
from .simplify import drop_unused

_EXACT_ROWS = 1 << 24  # counts below it survive the way through float32 that the histogram takes


@register
@dataclass(frozen=True)
class RaiseMoe(Pass):
    """Lift the router and the grouped experts of an imported module (transformers' grouped_mm) to the ops made for them.

    A router is a sigmoid or softmax of the logits, an optional bias, an optional choice of groups (by their two best or their best
    score), the top k, and their weights, normalised and scaled or not: `route`. Experts are a sort of the chosen ids, a histogram of
    them, rows gathered in that order, grouped products, the inverse order and a weighted sum over slots: `dispatch`, the products,
    `swiglu` where one reads silu(gate) * up, and `combine`. The arithmetic is the same, in the same order; what only looks alike
    stays, and says why. (One corner differs: a router that masks other groups with 0 may pick one of their experts, with weight 0,
    where a score itself underflows to 0.)

    `swiglu` skips the rounding of silu, so below float32 it is lifted only where that is asked for: `raise-moe{swiglu=true}`.

    Before `raise-moe`:

        func @f(%x: f32[3, 8], %logits: f32[3, 4], %w: f32[4, 8, 8]) {
          %score: f32[3, 4] = softmax(%logits, axis=-1)                    @ gate#1 F
          %best: f32[3, 2], %ids: i64[3, 2] = topk(%score, k=2)            @ gate#2 F
          %scale: f32[] = literal([2.5], [], f32)                          @ gate#3 F
          %weights: f32[3, 2] = mul(%best, %scale)                         @ gate#4 F
          %flat: f32[6] = reshape(%weights, shape=[6])                     @ experts#1 F
          %chosen: i64[6] = reshape(%ids, shape=[6])                       @ experts#2 F
          %sorted: i64[6], %order: i64[6] = sort(%chosen)                  @ experts#3 F
          %k: i64[] = literal([2], [], i64)                                @ experts#4 F
          %token: i64[6] = div(%order, %k)                                 @ experts#5 F
          %rows: f32[6, 8] = take(%x, %token)                              @ experts#6 F
          %counts: i32[4] = histogram(%sorted, bins=4)                     @ experts#7 F
          %y: f32[6, 8] = grouped_matmul(%rows, %w, %counts)               @ experts#8 F
          %share: f32[6] = take(%flat, %order)                             @ experts#9 F
          %column: f32[6, 1] = reshape(%share, shape=[6, 1])               @ experts#10 F
          %weighted: f32[6, 8] = mul(%y, %column)                          @ experts#11 F
          %zero: i64[6] = literal([0], [6], i64)                           @ experts#12 F
          %place: i64[6] = iota(6, i64)                                    @ experts#13 F
          %inverse: i64[6] = scatter(%zero, %order, %place, axis=0)        @ experts#14 F
          %back: f32[6, 8] = take(%weighted, %inverse)                     @ experts#15 F
          %slots: f32[3, 2, 8] = reshape(%back, shape=[3, 2, 8])           @ experts#16 F
          %out: f32[3, 8] = sum(%slots, axes=[1])                          @ experts#17 F
          return %out
        }

    after:

        func @f(%x: f32[3, 8], %logits: f32[3, 4], %w: f32[4, 8, 8]) {
          %ids: i32[3, 2], %weights: f32[3, 2] = route(%logits, top_k=2, score=softmax, normalize=false, scale=2.5)  @ gate#2.1 F
          %rows: f32[6, 8], %counts: i32[4], %handle: bundle{i32[6]} = dispatch([%x], %ids, experts=4)  @ experts#6 F
          %y: f32[6, 8] = grouped_matmul(%rows, %w, %counts)               @ experts#8 F
          %out: f32[3, 8] = combine(%y, %handle, %weights)                 @ experts#17 F
          return %out
        }
    """

    name: ClassVar[str] = "raise-moe"
    requires: ClassVar[str] = "traced"

    swiglu: bool = False
    """Whether silu(gate) * up becomes `swiglu` in BF16 and FP16 too, and its result is rounded once instead of twice."""

    def __call__(self, module: Module) -> Module:
        return module.map(self._raise)

    def _raise(self, func: Func) -> Func:
        routed = self._routers(func)
        raised = self._experts(routed)
        return func if raised is func else drop_unused(raised)

    def _routers(self, func: Func) -> Func:
        read = users(func)
        plans = dict[int, tuple[Weights, int]]()
        for index, op in enumerate(func.ops):
            if isinstance(op, TopK) and chooses_experts(op, read):
                found = selection(op)
                if isinstance(found, str):
                    self.decline(func, op, found)
                else:
                    weights = weights_of(op, found, read)
                    plans[index] = weights, func.ops.index(weights.value.owner) if weights.value and weights.value.owner else -1
        position, lifted = count(), dict[int, Value]()

        def rule(op: Op, b: Builder) -> tuple[Value, ...] | None:
            index = next(position)
            if index in plans and isinstance(op, TopK):
                weights, last = plans[index]
                found = selection(op)
                assert isinstance(found, Selection)  # it was, before its operands were rebuilt
                b.emit(op)
                route = b.emit(found.route(op.k, weights, b))
                ids = b.emit(Cast(route.results[0], op.results[1].dtype)).result
                lifted[last] = route.results[1]
                return (route.results[1] if last == index else op.results[0]), ids
            return (lifted[index],) if index in lifted else None

        return rebuild(func, rule)

    def _experts(self, func: Func) -> Func:
        read = users(func)
        plans = dict[int, _Experts]()
        for op in func.ops:
            if isinstance(op, Sort) and _counts_of(op, read) is not None:
                found = _grouped(op, read)
                if isinstance(found, str):
                    self.decline(func, op, found)
                else:
                    plans |= {func.ops.index(part): found for part in (found.rows, *found.products, found.sum)}
        position, sent = count(), dict[Op, Dispatch]()

        def rule(op: Op, b: Builder) -> tuple[Value, ...] | None:
            plan = plans.get(next(position))
            if plan is None or not (isinstance(op, Take) or plan.sort in sent):
                return None
            if isinstance(op, GroupedMatmul):
                return (b.emit(op.copy(id="", x=self._swiglu(func, op, b), counts=sent[plan.sort].counts)).result,)
            if isinstance(op, Take):
                dispatch = Dispatch((op.x,), _ids_behind(op), plan.experts, names=(op.result.name, "counts", "handle"))
                sent[plan.sort] = b.emit(dispatch)
                return (dispatch.results[0],)
            total = op.x.owner if isinstance(op, Cast) else op
            parts = _weighted_sum(total) if isinstance(total, Sum) else "no sum"
            assert not isinstance(parts, str)  # it was one, before its operands were rebuilt
            return (b.emit(Combine(parts.rows, sent[plan.sort].handle, parts.weights)).result,)

        return rebuild(func, rule)

    def _swiglu(self, func: Func, product: GroupedMatmul, b: Builder) -> Value:
        """What the product reads, as one op where it is silu(gate) * up."""
        x = product.x
        if isinstance(x.owner, Mul):
            for gate, up in ((x.owner.a, x.owner.b), (x.owner.b, x.owner.a)):
                if isinstance(gate.owner, Silu) and up.type == gate.type:
                    if self.swiglu or x.dtype.bits >= 32:
                        return b.emit(SwiGLU(gate.owner.x, up)).result
                    self.decline(
                        func, x.owner, f"swiglu would skip the rounding of silu to {x.dtype}; raise-moe{{swiglu=true}} accepts that"
                    )
        return x


@dataclass(frozen=True)
class _Experts:
    """The ops that a group of experts consists of, and how many experts it has."""

    sort: Sort
    experts: int
    rows: Take
    products: tuple[GroupedMatmul, ...]
    sum: Op


@dataclass(frozen=True)
class _WeightedSum:
    rows: Value
    weights: Value
    order: Value


def _counts_of(sort: Sort, read: Users) -> Histogram | None:
    return next((user for user in read.get(sort.results[0], []) if isinstance(user, Histogram)), None)


def _grouped(sort: Sort, read: Users) -> _Experts | str:
    """The experts whose rows this sort orders, or what is unlike them."""
    histogram = _counts_of(sort, read)
    flat = sort.x.owner
    if histogram is None or sort.descending or not (isinstance(flat, Reshape) and sort.x.tensor.rank == 1 and flat.x.tensor.rank == 2):
        return f"it sorts {sort.x.type}, expected flattened expert ids [tokens, k] in ascending order"
    tokens, k = flat.x.shape
    if _least_bound(flat.x) != histogram.bins:
        return f"it is not known that the expert ids are below {histogram.bins}, the number that is counted"
    if sort.x.tensor.size >= _EXACT_ROWS:
        return f"{sort.x.tensor.size} rows are not counted exactly in float32"
    order = sort.results[1]
    taken = [u for v in read.get(order, []) if _is_token(v, k) for u in read.get(v.results[0], []) if isinstance(u, Take) and u.axis == 0]
    rows = next((take for take in taken if take.x.tensor.rank == 2 and take.x.shape[0] == tokens), None)
    if rows is None:
        return f"no rows of [{tokens}, width] are taken in its order divided by {k}"
    products = tuple(u for v in _casts(histogram.result, read) for u in read.get(v, []) if isinstance(u, GroupedMatmul) and u.counts is v)
    if not products:
        return "no grouped product reads its counts"
    reasons = ["no weighted sum over slots ends the experts"]
    for total in _sums(order, read):
        found = _weighted_sum(total)
        if isinstance(found, str):
            reasons.append(found)
        elif found.order is order and found.weights.shape == (tokens, k):
            ends = [total, *(u for u in read.get(total.result, []) if isinstance(u, Cast))]
            if end := next((op for op in ends if op.results[0].type == _combined(found, total)), None):
                return _Experts(sort, histogram.bins, rows, products, end)
            reasons.append(f"rows are {found.rows.type}, but their sum stays {total.result.type}")
    return reasons[-1]


def _combined(found: _WeightedSum, total: Sum) -> object:
    return type(total.result.tensor)(found.rows.dtype, total.result.shape)


def _is_token(op: Op, k: object) -> TypeGuard[Div]:
    return isinstance(op, Div) and number(op.b) == k


def _casts(value: Value, read: Users) -> Iterator[Value]:
    """The value and what casts make of it."""
    yield value
    for user in read.get(value, []):
        if isinstance(user, Cast):
            yield from _casts(user.result, read)


def _sums(order: Value, read: Users) -> Iterator[Sum]:
    """The sums over slots of what is taken by the inverse of `order`."""
    inverses = [user.result for user in read.get(order, []) if isinstance(user, Scatter) and user.indices is order]
    taken = [u.result for inverse in inverses for u in read.get(inverse, []) if isinstance(u, Take) and u.indices is inverse]
    slots = [u.result for rows in taken for u in read.get(rows, []) if isinstance(u, Reshape)]
    yield from (u for view in slots for u in read.get(view, []) if isinstance(u, Sum))


def _weighted_sum(total: Sum) -> _WeightedSum | str:
    """sum over slots of (row * weight), rows in the order of slots; or what is unlike it."""
    shape = total.x.shape
    if len(shape) != 3 or [a % 3 for a in total.axes] != [1] or total.keepdims:
        return f"it sums {total.x.type} over axes {list(total.axes)}, expected slots, the middle axis of three"
    slots = total.x.owner
    back = slots.x.owner if isinstance(slots, Reshape) else None
    weighted = back.x.owner if isinstance(back, Take) and back.axis == 0 else None
    inverse = back.indices.owner if isinstance(back, Take) else None
    if not (isinstance(weighted, Mul) and isinstance(inverse, Scatter) and isinstance(inverse.updates.owner, Iota)):
        return "what is summed is not a product of rows and weights brought back by the inverse of the sort"
    places = inverse.updates.owner
    if (places.start, places.step, inverse.axis) != (0, 1, 0):
        return "the order that brings rows back is not the inverse of the sort"
    if weighted.result.dtype is not DType.f32:
        return f"weighted rows are rounded to {weighted.result.dtype} before they are summed, expected float32"
    column = weighted.b.owner
    share = column.x.owner if isinstance(column, Reshape) and weighted.b.shape[1:] == (1,) else None
    flat = share.x.owner if isinstance(share, Take) and share.indices is inverse.indices else None
    if not (isinstance(flat, Reshape) and flat.x.shape == shape[:2] and flat.x.dtype is DType.f32):
        return f"rows are not multiplied by float32 weights {list(shape[:2])} in their order"
    wide = weighted.a.owner
    rows = wide.x if isinstance(wide, Cast) and wide.x.dtype.is_float and wide.x.dtype.bits <= 32 else weighted.a
    return _WeightedSum(rows, flat.x, inverse.indices)


def _ids_behind(rows: Take) -> Value:
    """The expert ids whose order rows are taken in."""
    tokens = rows.indices.owner
    sort = tokens.a.owner if isinstance(tokens, Div) else None
    flat = sort.x.owner if isinstance(sort, Sort) else None
    assert isinstance(flat, Reshape)  # it was, before its operands were rebuilt
    return _plain(flat.x)


def _plain(ids: Value) -> Value:
    """Expert ids before a cast from narrower whole numbers."""
    owner = ids.owner
    return owner.x if isinstance(owner, Cast) and owner.x.dtype.is_int and owner.x.dtype.bits <= ids.dtype.bits else ids


def _least_bound(ids: Value) -> object:
    """The number that expert ids stay below, where their origin says so."""
    owner = _plain(ids).owner
    if isinstance(owner, Route):
        return owner.logits.shape[1]
    return owner.x.shape[owner.axis] if isinstance(owner, TopK) and _plain(ids) is owner.results[1] else None
