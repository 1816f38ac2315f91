"""Mixture of experts as imported modules spell it, lifted to `route`, `dispatch` and `combine`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import ClassVar, TypeGuard

from ..ir.core import Builder, Func, Module, Op, Value, users
from ..ir.ops.control import Iota, Literal
from ..ir.ops.elementwise import Add, Cast, Div, Mul, Ne, Not, Sigmoid, Silu, SwiGLU, Where
from ..ir.ops.linalg import GroupedMatmul
from ..ir.ops.moe import Combine, Dispatch, Route
from ..ir.ops.reduce import Histogram, Max, Softmax, Sort, Sum, TopK
from ..ir.ops.shape import Broadcast, Gather, Reshape, Scatter, Take
from ..ir.types import DType, Shape
from .manager import Pass, register
from .rewrite import rebuild
from .simplify import drop_unused

Users = Mapping[Value, list[Op]]
_EXACT_ROWS = 1 << 24  # counts below it survive the way through float32 that the histogram takes
_EPS = 1e-20  # what `route` adds to the sum that it divides by


@register
@dataclass(frozen=True)
class RaiseMoe(Pass):
    """Lift the router and the grouped experts of an imported module (transformers' grouped_mm) to the ops made for them.

    A router is a sigmoid or softmax of the logits, an optional bias, an optional choice of groups (by their two best or their best
    score), the top k, and their weights, normalised and scaled or not: `route`. Experts are a sort of the chosen ids, a histogram of
    them, rows gathered in that order, grouped products, the inverse order and a weighted sum over slots: `dispatch`, the products,
    `swiglu` where one reads silu(gate) * up, and `combine`. The result is the same, bit for bit; what only looks alike stays, and
    says why. `swiglu` skips the rounding of silu, so below float32 it is lifted only where that is asked for: `raise-moe{swiglu=true}`.

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
        plans = dict[int, tuple[_Weights, int]]()
        for index, op in enumerate(func.ops):
            if isinstance(op, TopK) and _chooses_experts(op, read):
                found = _selection(op)
                if isinstance(found, str):
                    self.decline(func, op, found)
                else:
                    weights = _weights(op, found, read)
                    plans[index] = weights, func.ops.index(weights.value.owner) if weights.value.owner else -1
        position, lifted = count(), dict[int, Value]()

        def rule(op: Op, b: Builder) -> tuple[Value, ...] | None:
            index = next(position)
            if index in plans and isinstance(op, TopK):
                weights, last = plans[index]
                found = _selection(op)
                assert isinstance(found, _Selection)  # it was, before its operands were rebuilt
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
            if plan is None:
                return None
            if isinstance(op, GroupedMatmul):
                return (b.emit(op.copy(id="", x=self._swiglu(func, op, b), counts=sent[plan.sort].counts)).result,)
            if isinstance(op, Take):
                sort = op.indices.owner.a.owner  # type: ignore[union-attr]
                ids = _plain(sort.x.owner.x)  # type: ignore[union-attr]
                dispatch = Dispatch((op.x,), ids, plan.experts, names=(op.result.name, "counts", "handle"))
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
class _Selection:
    """How a router chooses."""

    scores: Value
    logits: Value
    score: str
    bias: Value | None = None
    groups: int = 1
    top_groups: int = 1
    group_score: str = "top2"

    def route(self, top_k: int, weights: _Weights, b: Builder) -> Route:
        """The op, over logits in float32: scores are computed in it from logits of any type."""
        logits = self.logits if self.logits.dtype is DType.f32 else b.emit(Cast(self.logits, DType.f32)).result
        grouping = {"groups": self.groups, "top_groups": self.top_groups, "group_score": self.group_score}
        names = ("ids", "weights")
        return Route(  # type: ignore[misc]
            logits, self.bias, top_k, self.score, **grouping, normalize=weights.normalize, scale=weights.scale, names=names
        )


@dataclass(frozen=True)
class _Weights:
    """What becomes of the chosen scores, up to `value`."""

    value: Value
    normalize: bool = False
    scale: float = 1.0


def _chooses_experts(op: TopK, read: Users) -> bool:
    """Whether what it picks is sorted, as grouped experts do, or it picks from scores."""
    flat = [user for user in read.get(op.results[1], []) if isinstance(user, Reshape)]
    if any(isinstance(user, Sort) for view in flat for user in read.get(view.result, [])):
        return True
    return op.x.tensor.rank == 2 and bool(flat) and not isinstance(_selection(op), str)


def _selection(op: TopK) -> _Selection | str:
    """The choice that ends in this top-k, or what is unlike a router's."""
    choice, rank = op.x, op.x.tensor.rank
    if rank != 2 or op.axis % rank != 1 or choice.dtype is not DType.f32:
        return f"it picks along axis {op.axis} of {choice.type}, expected f32[tokens, experts]"
    groups: tuple[int, int, str] = 1, 1, "top2"
    fill = None
    if isinstance(choice.owner, Where):
        masked = _group_mask(choice.owner)
        if isinstance(masked, str):
            return masked
        choice, fill, groups = choice.owner.b, _number(choice.owner.a), masked
    bias = None
    if isinstance(choice.owner, Add) and not _is_score(choice):
        pair = choice.owner.a, choice.owner.b
        choice, bias = pair if _is_score(pair[0]) else pair[::-1]
        if bias.shape != choice.shape[1:] or bias.dtype is not DType.f32:
            return f"the bias is {bias.type}, expected one float32 number for each expert of {choice.type}"
    if not _is_score(choice):
        return f"it picks from a {choice.owner.name if choice.owner else 'parameter'}, expected sigmoid or softmax of logits"
    if fill == 0 and bias is not None:
        return "other groups are masked with 0, which a biased score may fall below; expected -inf"
    score = "sigmoid" if isinstance(choice.owner, Sigmoid) else "softmax"
    return _Selection(choice, choice.owner.x, score, bias, *groups)


def _is_score(value: Value) -> bool:
    owner = value.owner
    over_experts = isinstance(owner, Softmax) and owner.axis % owner.x.tensor.rank == 1
    return (isinstance(owner, Sigmoid) or over_experts) and value.dtype is DType.f32


def _group_mask(op: Where) -> tuple[int, int, str] | str:
    """Groups, how many of them stay, and by which score, where `op` masks the experts of the other groups."""
    other = "a mask stands before the choice that is not one of expert groups"
    choice, keeps = op.b, op.condition.owner
    if _number(op.a) not in (0.0, float("-inf")):
        return f"{other}: it fills in {_number(op.a)}, expected -inf or 0"
    if not (isinstance(keeps, Not) and isinstance(keeps.x.owner, Ne) and _number(keeps.x.owner.b) == 0):
        return other
    shapes, value = list[Shape](), keeps.x.owner.a
    while isinstance(value.owner, (Reshape, Broadcast)):
        shapes.append(value.shape)
        value = value.owner.x
    marks = value.owner
    marked = isinstance(marks, Scatter) and marks.axis % 2 == 1 and _number(marks.x) == 0 and _number(marks.updates) == 1
    if not (isinstance(marks, Scatter) and marked and isinstance(marks.indices.owner, TopK)):
        return other
    chosen = marks.indices.owner
    tokens, experts = choice.shape
    groups, size = chosen.x.shape[-1], 0
    if isinstance(groups, int) and isinstance(experts, int):
        size = experts // groups
    spread = {(tokens, groups, 1), (tokens, groups, size), (tokens, experts), (tokens, groups)}
    if not spread.issuperset(shapes) or groups * size != experts or marks.indices is not chosen.results[1]:  # type: ignore[operator]
        return other
    best = chosen.x.owner
    if isinstance(best, Max) and _grouped_choice(best.x, choice, size) and [a % 3 for a in best.axes] == [2]:
        return groups, chosen.k, "max"  # type: ignore[return-value]
    if isinstance(best, Sum) and [a % 3 for a in best.axes] == [2] and isinstance(two := best.x.owner, TopK):
        if two.k == 2 and two.axis in (-1, 2) and best.x is two.results[0] and _grouped_choice(two.x, choice, size):
            return groups, chosen.k, "top2"  # type: ignore[return-value]
    return "groups are not scored by their best or their two best experts"


def _grouped_choice(value: Value, choice: Value, size: int) -> bool:
    return isinstance(value.owner, Reshape) and value.owner.x is choice and value.tensor.rank == 3 and value.shape[2] == size


def _weights(op: TopK, found: _Selection, read: Users) -> _Weights:
    """Follow the chosen scores through normalisation and scaling, as far as `route` does the same."""
    ids = op.results[1]
    picked = [user.result for user in read.get(ids, []) if isinstance(user, Gather) and user.x is found.scores and user.axis % 2 == 1]
    if not picked and found.bias is not None:
        return _Weights(op.results[0])
    value, normalize, scale = (picked or [op.results[0]])[0], False, 1.0
    if found.bias is not None and value is op.results[0]:
        return _Weights(value)
    for user in read.get(value, []):
        if isinstance(user, Div) and user.a is value and _is_sum_of(user.b, value, found.score):
            value, normalize = user.result, True
            break
    for user in read.get(value, []):
        factor = next((_number(v) for v in user.operands if v is not value and v.shape == ()), None) if isinstance(user, Mul) else None
        if factor is not None:
            value, scale = user.result, factor
            break
    return _Weights(value, normalize, scale)


def _is_sum_of(value: Value, parts: Value, score: str) -> bool:
    """Whether value is sum(parts) + 1e-20. Of softmax the sum alone will do: k of E cannot be less than 1 / E, which 1e-20 leaves as it is."""
    total = value.owner
    if isinstance(total, Add):
        if _number(total.b) != _EPS:
            return False
        total = total.a.owner
    elif score != "softmax":
        return False
    return isinstance(total, Sum) and total.x is parts and total.keepdims and [a % 2 for a in total.axes] == [1]


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
    return isinstance(op, Div) and _number(op.b) == k


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
    rows = weighted.a.owner.x if isinstance(weighted.a.owner, Cast) and weighted.a.owner.x.dtype.is_float else weighted.a
    return _WeightedSum(rows, flat.x, inverse.indices)


def _plain(ids: Value) -> Value:
    """Expert ids before a cast from whole numbers."""
    return ids.owner.x if isinstance(ids.owner, Cast) and ids.owner.x.dtype.is_int else ids


def _number(value: Value) -> int | float | None:
    """The number that a literal holds everywhere."""
    owner = value.owner
    return owner.values[0] if isinstance(owner, Literal) and len(set(owner.values)) == 1 else None
