"""Mixture of experts: the gate, and the way to the experts and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ir.errors import require
from ...ir.ops import moe as ops
from ..arrays import Array, widen
from .elementwise import sigmoid
from .reduce import descending, normalized
from .registry import reference
from .shape import require_inside


@reference(ops.Route)
def route(op: ops.Route, logits: Array, bias: Array | None = None) -> tuple[Array, Array]:
    scores = sigmoid(op, logits) if op.score == "sigmoid" else normalized(logits)
    choice = scores if bias is None else scores + bias
    if op.top_groups < op.groups:
        choice = _keep_groups(op, choice)
    ids = descending(choice)[:, : op.top_k]
    weights = scores[np.arange(len(ids))[:, None], ids]
    if op.normalize:
        weights /= weights.sum(1, keepdims=True) + 1e-20
    weights *= op.scale
    return ids, weights


def _keep_groups(op: ops.Route, choice: Array) -> Array:
    """`choice` [T, E] with -inf for the experts outside each token's best groups."""
    tokens, experts = choice.shape
    grouped = choice.reshape(tokens, op.groups, experts // op.groups)
    score = grouped.max(-1) if op.group_score == "max" else np.sort(grouped, -1)[..., -2:].sum(-1)
    outside = np.ones((tokens, op.groups, 1), np.bool)
    outside[np.arange(tokens)[:, None], descending(score)[:, : op.top_groups]] = False
    return np.where(outside, -np.inf, grouped).reshape(tokens, experts)


@reference(ops.RouteBackward)
def route_backward(op: ops.RouteBackward, logits: Array, ids: Array, dweights: Array) -> Array:
    require_inside(ids, logits.shape[1], "expert")
    ids = ids.astype(np.int64, copy=False)
    scores = sigmoid(op, logits) if op.score == "sigmoid" else normalized(logits)
    chosen = dweights * op.scale
    if op.normalize:
        p = np.take_along_axis(scores, ids, 1)
        total = p.sum(1, keepdims=True) + 1e-20
        chosen -= (chosen * p).sum(1, keepdims=True) / total
        chosen /= total
    ds = np.zeros_like(scores)
    np.put_along_axis(ds, ids, chosen, 1)
    if op.score == "sigmoid":
        return ds * (scores * (1 - scores))
    return (ds - (ds * scores).sum(1, keepdims=True)) * scores


@reference(ops.Dispatch, operands="stored")
def dispatch(op: ops.Dispatch, *operands: Array) -> tuple[Array | tuple[Array], ...]:
    *xs, ids = operands
    require_inside(ids, op.experts, "expert")
    slots = ids.reshape(ids.size)
    order = np.argsort(slots, kind="stable")
    counts = np.bincount(slots, minlength=op.experts).astype(np.int32)
    tokens = order // max(1, ids.shape[1])
    return *(x.take(tokens, axis=0) for x in xs), counts, (order.astype(np.int32),)


@reference(ops.Combine, operands="blocks")
def combine(op: ops.Combine, wide: np.dtype[np.floating], rows: Array, handle: tuple[Array], weights: Array) -> Array:
    (order,) = handle
    row_of = np.empty(len(order), np.int64)
    require_inside(order, len(order), "slot")
    row_of[order] = np.arange(len(order))
    require(len(order) == weights.size, f"the handle orders {len(order)} rows, but there are {weights.size} weights")
    weights = widen(weights, wide)
    result = np.zeros((len(weights), rows.shape[1]), wide)
    for slot, row in enumerate(row_of.reshape(weights.shape).T):
        term = widen(rows.take(row, axis=0), wide)
        term *= weights[:, slot, None]
        result += term
    return result


@reference(ops.Redispatch, operands="stored")
def redispatch(op: ops.Redispatch, *operands: Any) -> tuple[Array, ...] | Array:
    *xs, (order,) = operands
    require_inside(order, len(order), "slot")
    tokens = order // max(1, len(order) // max(1, len(xs[0])))
    rows = tuple(x.take(tokens, axis=0) for x in xs)
    return rows if len(rows) > 1 else rows[0]


@reference(ops.RowWeights, operands="stored")
def row_weights(op: ops.RowWeights, weights: Array, handle: tuple[Array]) -> Array:
    (order,) = handle
    require_inside(order, weights.size, "slot")
    return weights.reshape(weights.size).take(order)[:, None]


@reference(ops.SlotWeights, operands="stored")
def slot_weights(op: ops.SlotWeights, rows: Array, handle: tuple[Array]) -> Array:
    (order,) = handle
    require_inside(order, len(rows), "slot")
    found = np.zeros(len(rows), rows.dtype)
    found[order] = rows[:, 0]
    return found.reshape(-1, op.slots)


@reference(ops.DispatchGroups, operands="stored")
def dispatch_groups(op: ops.DispatchGroups, *operands: Array) -> tuple[Array, ...]:
    *xs, ids = operands
    require_inside(np.maximum(ids, 0), op.groups * op.size, "expert")
    group = np.where(ids < 0, op.groups, ids // op.size)
    chosen = np.zeros((op.groups + 1, len(ids)), np.bool)
    chosen[group, np.arange(len(ids))[:, None]] = True
    groups, tokens = np.nonzero(chosen[:-1])
    inside = np.where(group[tokens] == groups[:, None], ids[tokens] - groups[:, None] * op.size, -1)
    counts = np.bincount(groups, minlength=op.groups).astype(np.int32)
    return *(x.take(tokens, axis=0) for x in xs), inside.astype(np.int32), counts, tokens.astype(np.int32)


@reference(ops.CombineGroups, operands="blocks")
def combine_groups(
    op: ops.CombineGroups, wide: np.dtype[np.floating], rows: Array, tokens: Array, ids: Array, weights: Array | None = None
) -> Array:
    require_inside(tokens, len(ids), "token")
    result = np.zeros((len(ids), rows.shape[1]), wide)
    order = np.argsort(tokens, kind="stable")
    owners = tokens[order]
    starts = np.searchsorted(owners, owners)  # of each row, where those of its token begin
    turns = np.arange(len(order)) - starts
    for turn in range(int(turns.max(initial=-1)) + 1):  # the first row of every token, then the second, ...
        some = order[turns == turn]
        term = widen(rows.take(some, axis=0), wide)
        if weights is not None:
            term *= widen(weights.take(some, axis=0), wide)
        result[tokens[some]] += term
    return result


@reference(ops.ChooseSlots, operands="stored")
def choose_slots(op: ops.ChooseSlots, ids: Array, slots: Array, start: Array | None = None) -> Array:
    counts = np.bincount(slots)
    chosen = ids.reshape(ids.size)
    require_inside(chosen, len(counts), "expert")
    missing = chosen[counts[chosen] == 0]
    require(not len(missing), f"expert {missing[:1].tolist()} has no slot")
    by_expert = np.argsort(slots, kind="stable")
    firsts = np.cumsum(counts) - counts
    order = np.argsort(chosen, kind="stable")
    turns = np.empty(len(order), np.int64)
    turns[order] = np.arange(len(order)) - np.searchsorted(chosen[order], chosen[order])
    turns += 0 if start is None else int(start[0])
    return by_expert[firsts[chosen] + turns % counts[chosen]].reshape(ids.shape).astype(np.int32)
