"""Routers as imported modules spell them: which ops choose the experts, and with what weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal as OneOf

from ..ir.core import Builder, Op, Value
from ..ir.ops.control import Literal
from ..ir.ops.elementwise import Add, Cast, Div, Mul, Ne, Not, Sigmoid, Where
from ..ir.ops.moe import Route
from ..ir.ops.reduce import Max, Softmax, Sort, Sum, TopK
from ..ir.ops.shape import Broadcast, Gather, Reshape, Scatter
from ..ir.types import DType, Shape

Users = Mapping[Value, list[Op]]
Groups = tuple[int, int, OneOf["top2", "max"]]
"""How many groups, how many of them stay, by which score."""

_EPS = 1e-20  # what `route` adds to the sum that it divides by


@dataclass(frozen=True)
class Selection:
    """How a router chooses."""

    scores: Value
    logits: Value
    score: OneOf["sigmoid", "softmax"]
    bias: Value | None = None
    groups: Groups = (1, 1, "top2")

    def route(self, top_k: int, weights: Weights, b: Builder) -> Route:
        """The op, over logits in float32: scores are computed in it from logits of any type."""
        logits = self.logits if self.logits.dtype is DType.f32 else b.emit(Cast(self.logits, DType.f32)).result
        groups, top_groups, group_score = self.groups
        return Route(
            logits,
            self.bias,
            top_k,
            self.score,
            groups,
            top_groups,
            group_score,
            weights.normalize,
            weights.scale,
            names=("ids", "weights"),
        )


@dataclass(frozen=True)
class Weights:
    """What becomes of the chosen scores, up to `value`."""

    value: Value | None
    normalize: bool = False
    scale: float = 1.0


def chooses_experts(op: TopK, read: Users) -> bool:
    """Whether what it picks is sorted, as grouped experts do, or it picks from scores."""
    flat = [user for user in read.get(op.results[1], []) if isinstance(user, Reshape)]
    if any(isinstance(user, Sort) for view in flat for user in read.get(view.result, [])):
        return True
    return op.x.tensor.rank == 2 and bool(flat) and not isinstance(selection(op), str)


def selection(op: TopK) -> Selection | str:
    """The choice that ends in this top-k, or what is unlike a router's."""
    choice, rank = op.x, op.x.tensor.rank
    if rank != 2 or op.axis % rank != 1 or choice.dtype is not DType.f32:
        return f"it picks along axis {op.axis} of {choice.type}, expected f32[tokens, experts]"
    groups: Groups = 1, 1, "top2"
    fill = None
    mask = choice.owner
    if isinstance(mask, Where):
        masked = _group_mask(mask)
        if isinstance(masked, str):
            return masked
        choice, fill, groups = mask.b, number(mask.a), masked
    bias = None
    total = choice.owner
    if isinstance(total, Add) and (_score(total.a) or _score(total.b)):
        choice, bias = (total.a, total.b) if _score(total.a) else (total.b, total.a)
        if bias.shape != choice.shape[1:] or bias.dtype is not DType.f32:
            return f"the bias is {bias.type}, expected one float32 number for each expert of {choice.type}"
    score = _score(choice)
    if score is None:
        source = f"the result of {choice.owner.name}" if choice.owner else "a parameter"
        return f"it picks from {source}, expected sigmoid or softmax of logits, with or without a bias"
    if fill == 0 and bias is not None:
        return "other groups are masked with 0, which a biased score may fall below; expected -inf"
    experts = choice.shape[1]
    if not isinstance(experts, int) or op.k > groups[1] * experts // groups[0]:
        return f"it picks {op.k}, more than {groups[1]} of {groups[0]} groups hold"
    return Selection(choice, score.x, "sigmoid" if isinstance(score, Sigmoid) else "softmax", bias, groups)


def _score(value: Value) -> Sigmoid | Softmax | None:
    """The op that makes scores of logits, if it is one over experts in float32."""
    owner = value.owner
    if value.dtype is not DType.f32 or not isinstance(owner, (Sigmoid, Softmax)):
        return None
    return owner if isinstance(owner, Sigmoid) or owner.axis % owner.x.tensor.rank == 1 else None


def _group_mask(op: Where) -> Groups | str:
    """Groups, how many of them stay, and by which score, where `op` masks the experts of the other groups."""
    other = "a mask stands before the choice that is not one of expert groups"
    choice, keeps = op.b, op.condition.owner
    if number(op.a) not in (0.0, float("-inf")):
        return f"{other}: it fills in {number(op.a)}, expected -inf or 0"
    if not (isinstance(keeps, Not) and isinstance(keeps.x.owner, Ne) and number(keeps.x.owner.b) == 0):
        return other
    shapes, value = list[Shape](), keeps.x.owner.a
    while isinstance(value.owner, (Reshape, Broadcast)):
        shapes.append(value.shape)
        value = value.owner.x
    marks = value.owner
    marked = isinstance(marks, Scatter) and marks.axis % 2 == 1 and number(marks.x) == 0 and number(marks.updates) == 1
    if not (isinstance(marks, Scatter) and marked and isinstance(marks.indices.owner, TopK)):
        return other
    chosen = marks.indices.owner
    tokens, experts = choice.shape
    groups = chosen.x.shape[-1]
    if not (isinstance(groups, int) and isinstance(experts, int) and experts % groups == 0):
        return other
    size = experts // groups
    spread = {(tokens, groups, 1), (tokens, groups, size), (tokens, experts), (tokens, groups)}
    if not spread.issuperset(shapes) or marks.indices is not chosen.results[1]:
        return other
    best = chosen.x.owner
    if not (isinstance(best, (Max, Sum)) and [a % 3 for a in best.axes] == [2]):
        return "groups are not scored by their best or their two best experts"
    two = best.x.owner
    if isinstance(best, Max) and _grouped_choice(best.x, choice, size):
        return groups, chosen.k, "max"
    of_two = isinstance(best, Sum) and isinstance(two, TopK) and (two.k, two.axis % 3) == (2, 2) and best.x is two.results[0]
    if of_two and isinstance(two, TopK) and _grouped_choice(two.x, choice, size):
        return groups, chosen.k, "top2"
    return "groups are not scored by their best or their two best experts"


def _grouped_choice(value: Value, choice: Value, size: int) -> bool:
    return isinstance(value.owner, Reshape) and value.owner.x is choice and value.tensor.rank == 3 and value.shape[2] == size


def weights_of(op: TopK, found: Selection, read: Users) -> Weights:
    """Follow the chosen scores through normalisation and scaling, as far as `route` does the same."""
    ids = op.results[1]
    picked = [user.result for user in read.get(ids, []) if isinstance(user, Gather) and user.x is found.scores and user.axis % 2 == 1]
    if not picked and found.bias is not None:
        return Weights(None)  # what it picks are scores with the bias, which nobody gets from `route`
    value, normalize, scale = (picked or [op.results[0]])[0], False, 1.0
    for user in read.get(value, []):
        if isinstance(user, Div) and user.a is value and _is_sum_of(user.b, value, found.score):
            value, normalize = user.result, True
            break
    for user in read.get(value, []):
        factor = next((number(v) for v in user.operands if v is not value and v.shape == ()), None) if isinstance(user, Mul) else None
        if factor is not None:
            value, scale = user.result, factor
            break
    return Weights(value, normalize, scale)


def _is_sum_of(value: Value, parts: Value, score: str) -> bool:
    """Whether value is sum(parts) + 1e-20. Of softmax the sum alone will do: it is at least 1 / experts, which 1e-20 leaves as it is."""
    total = value.owner
    if isinstance(total, Add):
        if number(total.b) != _EPS:
            return False
        total = total.a.owner
    elif score != "softmax":
        return False
    return isinstance(total, Sum) and total.x is parts and total.keepdims and [a % 2 for a in total.axes] == [1]


def number(value: Value) -> int | float | None:
    """The number that a literal holds everywhere."""
    owner = value.owner
    return owner.values[0] if isinstance(owner, Literal) and len(set(owner.values)) == 1 else None
