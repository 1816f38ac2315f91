"""The gate, and the way to the experts and back. Nothing waits for the GPU but sums over rows of groups.

Where the number of rows is known at run time only, there are as many as there can be, and those beyond are zeros.
"""

from __future__ import annotations

from typing import Any

import torch

from ....ir.ops import moe as ops
from ....ir.types import DType, bound
from ..tensors import plain, rounded, widen
from .registry import torch_op

Tensor = torch.Tensor


def scores_of(op: Any, logits: Tensor) -> Tensor:
    """The gate's scores by its rule, [T, E]."""
    return 1 / (1 + torch.exp(-logits)) if op.score == "sigmoid" else torch.softmax(logits, -1)


@torch_op(ops.Route, operands="wide")
def route(op: ops.Route, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = scores_of(op, logits)
    choice = scores if bias is None else scores + bias
    if op.top_groups < op.groups:
        grouped = choice.reshape(len(choice), op.groups, -1)
        best = torch.sort(grouped, dim=-1, descending=True).values
        score = best[..., 0] if op.group_score == "max" else best[..., :2].sum(-1)
        kept = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, : op.top_groups]
        outside = torch.ones(score.shape, dtype=torch.bool, device=score.device).scatter(1, kept, False)
        choice = grouped.masked_fill(outside[..., None], -torch.inf).reshape(choice.shape)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, : op.top_k]
    weights = scores.gather(1, ids)
    if op.normalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return ids.to(torch.int32), weights * op.scale


@torch_op(ops.Dispatch)
def dispatch(op: ops.Dispatch, *operands: Tensor) -> tuple[Tensor | tuple[Tensor], ...]:
    *xs, ids = operands
    slots = ids.reshape(-1).to(torch.int64)
    order = torch.sort(slots, stable=True).indices
    counts = torch.zeros(op.experts, dtype=torch.int32, device=ids.device).index_add(0, slots, torch.ones_like(slots, dtype=torch.int32))
    tokens = order // max(1, ids.shape[1])
    return *(plain(x).index_select(0, tokens).view(x.dtype) for x in xs), counts, (order.to(torch.int32),)


@torch_op(ops.Combine)
def combine(op: ops.Combine, rows: Tensor, handle: tuple[Tensor], weights: Tensor) -> Tensor:
    wide = torch.float64 if op.rows.dtype is DType.f64 else torch.float32
    order = handle[0].to(torch.int64)
    row_of = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device)).reshape(weights.shape)
    result = torch.zeros((len(weights), rows.shape[1]), dtype=wide, device=rows.device)
    for slot in range(weights.shape[1]):  # in the order of slots, which is part of the op's meaning
        result = result + widen(plain(rows).index_select(0, row_of[:, slot]).view(rows.dtype), wide) * widen(weights[:, slot, None], wide)
    return rounded(result, op.result.dtype)


@torch_op(ops.RouteBackward, operands="wide")
def route_backward(op: ops.RouteBackward, logits: Tensor, ids: Tensor, dweights: Tensor) -> Tensor:
    ids = ids.to(torch.int64)
    scores = scores_of(op, logits)
    chosen = dweights * op.scale
    if op.normalize:
        p = scores.gather(1, ids)
        total = p.sum(1, keepdim=True) + 1e-20
        chosen = (chosen - (chosen * p).sum(1, keepdim=True) / total) / total
    ds = torch.zeros_like(scores).scatter(1, ids, chosen)
    if op.score == "sigmoid":
        return ds * (scores * (1 - scores))
    return (ds - (ds * scores).sum(1, keepdim=True)) * scores


@torch_op(ops.Redispatch)
def redispatch(op: ops.Redispatch, *operands: Tensor | tuple[Tensor]) -> tuple[Tensor, ...] | Tensor:
    *xs, (order,) = operands
    tokens = order.to(torch.int64) // max(1, len(order) // max(1, len(xs[0])))
    rows = tuple(plain(x).index_select(0, tokens).view(x.dtype) for x in xs if isinstance(x, Tensor))
    return rows if len(rows) > 1 else rows[0]


@torch_op(ops.RowWeights)
def row_weights(op: ops.RowWeights, weights: Tensor, handle: tuple[Tensor]) -> Tensor:
    return weights.reshape(-1)[handle[0].to(torch.int64), None]


@torch_op(ops.SlotWeights)
def slot_weights(op: ops.SlotWeights, rows: Tensor, handle: tuple[Tensor]) -> Tensor:
    found = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)
    return found.scatter(0, handle[0].to(torch.int64), rows[:, 0]).reshape(-1, op.slots)


@torch_op(ops.DispatchGroups)
def dispatch_groups(op: ops.DispatchGroups, *operands: Tensor) -> tuple[Tensor, ...]:
    *xs, ids = operands
    group = torch.where(ids < 0, op.groups, ids // op.size).to(torch.int64)
    chosen = torch.zeros((len(ids), op.groups + 1), dtype=torch.bool, device=ids.device).scatter(1, group, True)[:, :-1].T
    counts = chosen.sum(1, dtype=torch.int32)
    most = bound(op.results[0].shape[0])
    place = torch.sort((~chosen).reshape(-1).to(torch.uint8), stable=True).indices[:most]  # what is chosen comes first, in its order
    place = torch.nn.functional.pad(place, (0, most - len(place)))
    within = torch.arange(len(place), device=ids.device) < counts.sum()
    groups, tokens = place // max(1, len(ids)), torch.where(within, place % max(1, len(ids)), 0)
    here = (group[tokens] == groups[:, None]) & within[:, None]
    inside = torch.where(here, ids[tokens] - groups[:, None] * op.size, -1)
    rows = (plain(x).index_select(0, tokens).masked_fill(~within[:, None], 0).view(x.dtype) for x in xs)
    return *rows, inside.to(torch.int32), counts, tokens.to(torch.int32)


@torch_op(ops.CombineGroups, waits=True)
def combine_groups(op: ops.CombineGroups, rows: Tensor, tokens: Tensor, ids: Tensor, weights: Tensor | None = None) -> Tensor:
    wide = torch.float64 if op.rows.dtype is DType.f64 else torch.float32
    terms = widen(rows, wide) if weights is None else widen(rows, wide) * widen(weights, wide)
    result = torch.zeros((len(ids), rows.shape[1]), dtype=wide, device=rows.device)
    order = torch.sort(tokens.to(torch.int64), stable=True)
    starts = torch.searchsorted(order.values, order.values)
    turns = torch.arange(len(order.values), device=rows.device) - starts
    for turn in range(int(turns.max()) + 1 if len(turns) else 0):  # in the order of rows, which is part of the op's meaning
        some = order.indices[turns == turn]
        result = result.index_add(0, tokens[some], terms[some])
    return rounded(result, op.result.dtype)


@torch_op(ops.ChooseSlots)
def choose_slots(op: ops.ChooseSlots, ids: Tensor, slots: Tensor, start: Tensor | None = None) -> Tensor:
    chosen, held = ids.reshape(-1).to(torch.int64), torch.sort(slots.to(torch.int64), stable=True)
    firsts = torch.searchsorted(held.values, chosen)
    counts = torch.searchsorted(held.values, chosen, right=True) - firsts
    order = torch.sort(chosen, stable=True)
    turns = torch.arange(len(chosen), device=ids.device) - torch.searchsorted(order.values, order.values)
    turns = torch.empty_like(turns).scatter(0, order.indices, turns)
    turns = turns if start is None else turns + start.to(torch.int64)
    return held.indices[firsts + turns % counts].reshape(ids.shape).to(torch.int32)
