"""Mixture of experts: choose experts, send tokens to them, bring the results back; and the same for gradients."""

from __future__ import annotations

import typing

from ..core import Op, Trait, Value, op
from ..errors import require
from ..types import Bundle, Dim, DType, Ragged, Tensor, Type, bound
from .control import Literal
from .rules import require_float, require_int

WEIGHTS = (DType.f32, DType.f64)
"""The dtypes of weights for rows."""


@op("route", Trait.ROUTING, work=5)
class Route(Op):
    """The gate: which `top_k` experts each token goes to, and with what weight (DeepSeek-V3 report, equations 12 to 16).

    logits are f32[T, E]. s = sigmoid(logits), or softmax over E. Experts are chosen by s + bias: of `groups` equal groups
    the `top_groups` with the best score (`top2`: sum of the group's two best, V3; `max`: its best, V2) stay, and of their
    experts the best top_k are taken, in descending order, equals by lower index first. The weights come from s without
    the bias, divided by (their sum + 1e-20) where `normalize`, times `scale`. Gives ids i32[T, k] and weights f32[T, k].
    """

    logits: Value
    bias: Value | None = None
    top_k: int = 1
    score: typing.Literal["sigmoid", "softmax"] = "sigmoid"
    groups: int = 1
    top_groups: int = 1
    group_score: typing.Literal["top2", "max"] = "top2"
    normalize: bool = True
    scale: float = 1.0

    def infer(self) -> tuple[Type, ...]:
        logits = self.logits.tensor
        require(logits.rank == 2 and logits.dtype is DType.f32, f"logits are {logits}, expected f32[tokens, experts]")
        experts = logits.shape[1]
        require(isinstance(experts, int), f"the number of experts is static, found {logits}")
        if self.bias is not None:
            require(self.bias.type == Tensor(DType.f32, (experts,)), f"bias is {self.bias.type}, expected f32[{experts}]")
        divides = self.groups > 0 and experts % self.groups == 0  # type: ignore[operator]
        require(divides, f"{experts} experts do not make {self.groups} equal groups")
        require(0 < self.top_groups <= self.groups, f"top_groups = {self.top_groups}, but there are {self.groups} groups")
        reachable = self.top_groups * experts // self.groups  # type: ignore[operator]
        require(
            0 < self.top_k <= reachable, f"top_k = {self.top_k}, but {self.top_groups} of {self.groups} groups hold {reachable} experts"
        )
        shape: tuple[Dim, ...] = (logits.shape[0], self.top_k)
        return Tensor(DType.i32, shape), Tensor(DType.f32, shape)


@op("route_backward", work=7)
class RouteBackward(Op):
    """The gradient of the gate's weights by the logits, for the experts that were chosen; the choice itself and the bias have none.

    logits f32[T, E], the ids [T, k] of `route` and dweights f32[T, k] give f32[T, E]. With p the scores of the chosen, S = sum p + 1e-20
    and w = p / S where `normalize`: dp = scale (dw - sum dw w) / S, else dp = scale dw. ds is dp at the chosen and 0 elsewhere;
    then ds_i s_i (1 - s_i) for sigmoid scores, s_i (ds_i - sum_j ds_j s_j) for softmax.
    """

    logits: Value
    ids: Value
    dweights: Value
    score: typing.Literal["sigmoid", "softmax"] = "sigmoid"
    normalize: bool = True
    scale: float = 1.0

    def infer(self) -> tuple[Type, ...]:
        logits, ids, dweights = self.logits.tensor, self.ids.tensor, self.dweights.tensor
        require_int(self.ids)
        require(logits.rank == 2 and logits.dtype is DType.f32, f"logits are {logits}, expected f32[tokens, experts]")
        require(ids.rank == 2 and ids.shape[0] == logits.shape[0], f"expected ids [T, k] for logits {logits}, found {ids}")
        require(dweights == Tensor(DType.f32, ids.shape), f"dweights are {dweights}, expected {Tensor(DType.f32, ids.shape)}")
        return (logits,)


@op("dispatch", Trait.ROUTING)
class Dispatch(Op):
    """Tokens to expert rows: each token's vector once for each expert that it chose, sorted by expert.

    Every x [T, H] (codes and their scales travel together) gives rows [T*k, H] by ids i32[T, k]; then come counts
    i32[experts], how many rows each expert has, and the handle, a bundle of the order i32[T*k]: row r is slot order[r] % k
    of token order[r] / k. Rows of one expert keep the tokens' order.
    Backward of dispatch is combine with the same handle, and the reverse.
    """

    xs: tuple[Value, ...]
    ids: Value
    experts: int

    def infer(self) -> tuple[Type, ...]:
        ids = self.ids.tensor
        require_int(self.ids)
        require(ids.rank == 2 and len(self.xs) > 0, f"expected at least one x, and ids [T, k], found {len(self.xs)} and {ids}")
        tokens, k = ids.shape
        for x in self.xs:
            require(x.tensor.rank == 2 and x.shape[0] == tokens, f"expected x [T, H] and ids [T, k], found {x.type} and {ids}")
        require(isinstance(tokens, int) and isinstance(k, int), f"the number of tokens is static here, found {ids}")
        rows = tokens * k  # type: ignore[operator]
        sent = tuple(Tensor(x.dtype, (rows, x.shape[1])) for x in self.xs)
        return *sent, Tensor(DType.i32, (self.experts,)), Bundle((Tensor(DType.i32, (rows,)),))

    @property
    def counts(self) -> Value:
        """The result that says how many rows each expert has."""
        return self.results[-2]

    @property
    def handle(self) -> Value:
        """The result that leads the rows back."""
        return self.results[-1]


@op("combine", work=2)
class Combine(Op):
    """Expert rows back to tokens: out[t] = sum over slots s of weights[t, s] * (the row of slot s of token t).

    rows [T*k, H], the dispatch's handle and weights f32[T, k] give [T, H]; summed in float32 in the order of slots,
    rounded once.
    """

    rows: Value
    handle: Value
    weights: Value

    def infer(self) -> tuple[Type, ...]:
        rows, weights = self.rows.tensor, self.weights.tensor
        require_float(self.rows, self.weights)
        require(rows.rank == weights.rank == 2, f"expected rows [T*k, H] and weights [T, k], found {rows} and {weights}")
        _require_order(self.handle, rows.shape[0])
        require(weights.size == rows.shape[0], f"weights are {weights}, but there are {rows.shape[0]} rows")
        return (Tensor(rows.dtype, (weights.shape[0], rows.shape[1])),)

    @property
    def is_sum(self) -> bool:
        """Whether every weight is known to be 1."""
        owner = self.weights.owner
        return isinstance(owner, Literal) and set(owner.values) == {1.0}


@op("redispatch")
class Redispatch(Op):
    """Tokens to expert rows once more, by the handle of an earlier `dispatch`: row r of each result is row order[r] / k of its x.

    Every x [T, H] (codes and their scales travel together) gives rows [T*k, H]. With it the gradient of `combine` reaches the experts.
    """

    xs: tuple[Value, ...]
    handle: Value

    def infer(self) -> tuple[Type, ...]:
        require(len(self.xs) > 0, "redispatch needs at least one x")
        fields = self.handle.bundle.fields
        known = len(fields) == 1 and isinstance(fields[0], Tensor) and fields[0].rank == 1 and fields[0].dtype is DType.i32
        require(known, f"the handle is {self.handle.type}, expected bundle{{i32[rows]}}")
        (rows,) = next(self.handle.bundle.tensors()).shape
        tokens = self.xs[0].shape[0]
        for x in self.xs:
            require(x.tensor.rank == 2 and x.shape[0] == tokens, f"expected every x as [T, H], found {self.xs[0].type} and {x.type}")
        divides = isinstance(rows, int) and isinstance(tokens, int) and (rows % tokens == 0 if tokens else rows == 0)
        require(divides, f"the handle orders {rows} rows, which are not the same number for each of {tokens} tokens")
        return tuple(Tensor(x.dtype, (rows, x.shape[1])) for x in self.xs)


@op("row_weights")
class RowWeights(Op):
    """The weights of tokens' slots as those of expert rows: weights f32[T, k] and the dispatch's handle give f32[T*k, 1].

    Row r, slot s of token t, gets weights[t, s]. So weights reach the experts: for `swiglu`, or for the gradient of `combine`.
    """

    weights: Value
    handle: Value

    def infer(self) -> tuple[Type, ...]:
        weights = self.weights.tensor
        require(weights.rank == 2 and weights.dtype in WEIGHTS, f"weights are {weights}, expected f32[T, k]")
        require(weights.is_static, f"the number of tokens is static here, found {weights}")
        _require_order(self.handle, weights.size)
        return (Tensor(weights.dtype, (weights.size, 1)),)


@op("slot_weights")
class SlotWeights(Op):
    """Numbers of expert rows back at their tokens' slots, the inverse of `row_weights`: rows f32[T*k, 1] and the handle give f32[T, k]."""

    rows: Value
    handle: Value
    slots: int
    """k."""

    def infer(self) -> tuple[Type, ...]:
        rows = self.rows.tensor
        require(rows.rank == 2 and rows.shape[1] == 1 and rows.dtype in WEIGHTS, f"rows are {rows}, expected f32[T*k, 1]")
        require(rows.is_static, f"the number of tokens is static here, found {rows}")
        divides = self.slots > 0 and rows.size % self.slots == 0
        require(divides, f"{rows.size} rows are not {self.slots} for each of several tokens")
        _require_order(self.handle, rows.size)
        return (Tensor(rows.dtype, (rows.size // self.slots, self.slots)),)


def _require_order(handle: Value, rows: Dim) -> None:
    expected = Bundle((Tensor(DType.i32, (rows,)),))
    require(handle.type == expected, f"the handle is {handle.type}, expected {expected}")


@op("dispatch_groups", Trait.ROUTING)
class DispatchGroups(Op):
    """Tokens to groups of experts: each token's vector once for each group that holds an expert of its choice, sorted by group.

    Every x [T, H] (codes and their scales travel together) gives rows [R, H] by ids i32[T, k]; group g of `groups` holds the experts
    g * size to (g + 1) * size - 1, and a negative id is a slot without expert. Then come the choice of each row within its group,
    i32[R, k]: id - g * size, or -1 where the slot's expert is elsewhere; counts i32[groups], how many rows each group has; and tokens
    i32[R], the token of each row. Rows of one group keep the tokens' order. R is ragged, of the name `rows`, at most T * min(k, groups).
    Its backward is `combine_groups` with the same tokens.
    """

    xs: tuple[Value, ...]
    ids: Value
    groups: int
    size: int
    rows: str = "rows"

    def infer(self) -> tuple[Type, ...]:
        ids = self.ids.tensor
        require(ids.dtype is DType.i32 and ids.rank == 2 and len(self.xs) > 0, f"expected at least one x, and ids i32[T, k], found {ids}")
        require(self.groups > 0 and self.size > 0, f"{self.groups} groups of {self.size} experts, expected 1 or more of each")
        tokens, k = ids.shape
        for x in self.xs:
            require(x.tensor.rank == 2 and x.shape[0] == tokens, f"expected x [T, H] and ids [T, k], found {x.type} and {ids}")
        require(isinstance(k, int), f"the number of slots is static, found {ids}")
        rows = Ragged(self.rows, bound(tokens) * min(bound(k), self.groups))
        sent = tuple(Tensor(x.dtype, (rows, x.shape[1])) for x in self.xs)
        return *sent, Tensor(DType.i32, (rows, k)), Tensor(DType.i32, (self.groups,)), Tensor(DType.i32, (rows,))


@op("combine_groups")
class CombineGroups(Op):
    """Rows of groups back to tokens: out[t] = sum over the rows r of token t of weights[r] * rows[r]; without weights of rows[r].

    rows [R, H], the tokens i32[R] of a `dispatch_groups`, the ids i32[T, k] that it was given (they say how many tokens there are) and
    weights f32[R, 1] give [T, H]; summed in float32 in the order of rows, rounded once. A token without rows gets 0.
    """

    rows: Value
    tokens: Value
    ids: Value
    weights: Value | None = None

    def infer(self) -> tuple[Type, ...]:
        rows, tokens, ids = self.rows.tensor, self.tokens.tensor, self.ids.tensor
        require_float(self.rows)
        require_int(self.tokens, self.ids)
        require(rows.rank == ids.rank == 2, f"expected rows [R, H] and ids [T, k], found {rows} and {ids}")
        require(tokens.shape == rows.shape[:1], f"tokens are {tokens}, expected one for each row of {rows}")
        if self.weights is not None:
            expected = Tensor(DType.f32, (rows.shape[0], 1))
            require(self.weights.type == expected, f"weights are {self.weights.type}, expected {expected}")
        return (Tensor(rows.dtype, (ids.shape[0], rows.shape[1])),)

    def flops(self) -> int:
        return (1 if self.weights is None else 2) * self.rows.tensor.size


@op("choose_slots", Trait.ROUTING)
class ChooseSlots(Op):
    """The slot for each choice of an expert, where experts have several: they take turns, so that each gets as many as the others.

    ids i32[T, k] and slots i32[S], the expert in each slot, give i32[T, k]. Of the c slots of an expert, in their order, the j-th choice
    of it (from 0, token by token) takes slot (start + j) mod c, with `start` i32[1], 0 where it is left out: ranks that have few tokens
    start at different slots.
    """

    ids: Value
    slots: Value
    start: Value | None = None

    def infer(self) -> tuple[Type, ...]:
        require_int(self.ids, self.slots, *([self.start] if self.start else []))
        ids, slots = self.ids.tensor, self.slots.tensor
        require(ids.rank == 2 and ids.dtype is DType.i32, f"expected ids i32[T, k], found {ids}")
        require(slots.rank == 1 and slots.size > 0, f"expected slots i32[S], found {slots}")
        require(self.start is None or self.start.shape == (1,), f"expected start i32[1], found {self.start and self.start.type}")
        return (ids,)
