"""Groups of rows, quantisation, the gate, the way to the experts and back, and losses. As in ops.py the caller rounds results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dsc import DscError
from dsc.backends.arrays import rounded, widen
from dsc.ir.ops import collective, linalg, loss, moe, quant
from dsc.ir.types import DType
from dsc.numerics import scale
from dsc.numerics.formats import FORMATS

from .ops import function, inside

Tensor = torch.Tensor


def groups(counts: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, and where they lie."""
    if int(counts.min()) < 0 or int(counts.sum()) > rows:
        raise DscError(f"counts are {counts.tolist()}, but there are {rows} rows")
    start = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            yield group, slice(start, start + count)
        start += count


@function(linalg.GroupedMatmul)
def grouped_matmul(op: Any, x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    w = w if getattr(op, "transpose_b", True) else w.mT
    result = x.new_zeros(len(x), w.shape[1])
    for group, rows in groups(counts, len(x)):
        result[rows] = x[rows] @ w[group].T
    return result


@function(linalg.GroupedMatmulWgrad)
def grouped_matmul_wgrad(op: Any, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    result = a.new_zeros(len(counts), a.shape[1], b.shape[1])
    for group, rows in groups(counts, len(a)):
        result[group] = a[rows].T @ b[rows]
    return result


@function(quant.Quantize)
def quantize(op: quant.Quantize, x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """By dsc's own rule: what a code is, is no matter of taste."""
    source = rounded(x.contiguous().numpy(), op.x.dtype)
    codes, scales = scale.quantize(source, op.tile, FORMATS[op.dtype.name], op.rule, None if counts is None else counts.tolist())
    room = [d if isinstance(d, int) else n for d, n in zip(op.results[1].shape, scales.shape, strict=True)]
    padded = np.zeros(room, scales.dtype)
    padded[tuple(map(slice, scales.shape))] = scales
    return torch.from_numpy(widen(codes)), torch.from_numpy(padded)


def times(codes: Tensor, scales: Tensor, tile: tuple[int, int], counts: Tensor | None = None, exact: bool = False) -> Tensor:
    """Codes times the scale of their tile; tiles of several rows restart at each group. With `exact` in float64."""
    row = torch.arange(codes.shape[-2]) // tile[0]
    if counts is not None and tile[0] > 1:
        first = (-(-counts // tile[0])).cumsum(0) - -(-counts // tile[0])
        for group, rows in groups(counts, codes.shape[-2]):
            row[rows] = first[group] + torch.arange(rows.stop - rows.start) // tile[0]
        row[int(counts.sum()) :] = 0
    column = torch.arange(codes.shape[-1]) // tile[1]
    codes, scales = (codes.double(), scales.double()) if exact else (codes, scales)
    return codes * scales.index_select(-2, row).index_select(-1, column)


@function(quant.Dequantize)
def dequantize(op: quant.Dequantize, codes: Tensor, scales: Tensor, counts: Tensor | None = None) -> Tensor:
    return times(codes, scales, op.tile, counts, op.dtype is DType.f64)


@function(quant.ScaledMatmul)
def scaled_matmul(op: quant.ScaledMatmul, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    exact = op.accumulation.arithmetic == "exact"
    return times(a, a_scales, op.a_tile, exact=exact) @ times(b, b_scales, op.b_tile, exact=exact).T


@function(quant.GroupedScaledMatmul)
def grouped_scaled_matmul(op: Any, x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, counts: Tensor) -> Tensor:
    if x.ndim == 3:  # room for so many rows of each group, of which the first are used
        used = torch.arange(x.shape[1]) < counts[:, None]
        result = x.new_zeros(*x.shape[:2], w.shape[1])
        result[used] = grouped_scaled_matmul(op, x[used], x_scales[used], w, w_scales, counts).to(x.dtype)
        return result
    exact = op.accumulation.arithmetic == "exact"
    return grouped_matmul(None, times(x, x_scales, op.x_tile, counts, exact), times(w, w_scales, op.w_tile, exact=exact), counts)


@function(quant.GroupedScaledMatmulWgrad)
def grouped_scaled_matmul_wgrad(op: Any, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, counts: Tensor) -> Tensor:
    exact, used = op.accumulation.arithmetic == "exact", int(counts.sum())
    left, right = times(a[:used], a_scales, op.a_tile, counts, exact), times(b[:used], b_scales, op.b_tile, counts, exact)
    return grouped_matmul_wgrad(op, left, right, counts)


# ---- experts


def derivative(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    """The gradient by x where that by function(x) is dy."""
    return torch.autograd.grad(function(x := x.detach().requires_grad_()), x, dy)[0]


def scores_of(op: Any, logits: Tensor) -> Tensor:
    return 1 / (1 + (-logits).exp()) if op.score == "sigmoid" else logits.softmax(-1)


@function(moe.Route)
def route(op: moe.Route, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = scores_of(op, logits)
    choice = scores if bias is None else scores + bias
    if op.top_groups < op.groups:
        grouped = choice.unflatten(1, (op.groups, -1))
        best = grouped.sort(dim=-1, descending=True).values
        score = best[..., 0] if op.group_score == "max" else best[..., :2].sum(-1)
        kept = score.sort(dim=-1, descending=True, stable=True).indices[:, : op.top_groups]
        choice = grouped.masked_fill(torch.ones_like(score, dtype=torch.bool).scatter(1, kept, False)[..., None], -torch.inf).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : op.top_k]
    return ids, weights_of(op, scores, ids)


def weights_of(op: Any, scores: Tensor, ids: Tensor) -> Tensor:
    chosen = scores.gather(1, ids)
    return (chosen / (chosen.sum(1, keepdim=True) + 1e-20) if op.normalize else chosen) * op.scale


@function(moe.RouteBackward)
def route_backward(op: moe.RouteBackward, logits: Tensor, ids: Tensor, dweights: Tensor) -> Tensor:
    return derivative(lambda x: weights_of(op, scores_of(op, x), inside(ids, x.shape[1])), logits, dweights)


@function(moe.Dispatch)
def dispatch(op: moe.Dispatch, *operands: Tensor) -> tuple[Any, ...]:
    *xs, ids = operands
    order = inside(ids, op.experts).reshape(-1).sort(stable=True).indices
    counts = ids.reshape(-1).bincount(minlength=op.experts)
    return *(x.index_select(0, order // max(1, ids.shape[1])) for x in xs), counts, (order,)


@function(moe.Redispatch)
def redispatch(op: moe.Redispatch, *operands: Any) -> Any:
    *xs, (order,) = operands
    rows = tuple(x.index_select(0, order // max(1, len(order) // max(1, len(x)))) for x in xs)
    return rows if len(rows) > 1 else rows[0]


@function(moe.Combine)
def combine(op: moe.Combine, rows: Tensor, handle: tuple[Tensor], weights: Tensor) -> Tensor:
    row_of = handle[0].argsort().reshape(weights.shape)
    result = rows.new_zeros(len(weights), rows.shape[1])
    for slot in range(weights.shape[1]):  # in the order of slots, which is part of the op's meaning
        result = result + rows[row_of[:, slot]] * weights[:, slot, None]
    return result


@function(moe.RowWeights)
def row_weights(op: moe.RowWeights, weights: Tensor, handle: tuple[Tensor]) -> Tensor:
    return weights.reshape(-1)[handle[0], None]


@function(moe.SlotWeights)
def slot_weights(op: moe.SlotWeights, rows: Tensor, handle: tuple[Tensor]) -> Tensor:
    return rows.new_zeros(len(rows)).scatter(0, handle[0], rows[:, 0]).reshape(-1, op.slots)


@function(moe.DispatchGroups)
def dispatch_groups(op: moe.DispatchGroups, *operands: Tensor) -> tuple[Tensor, ...]:
    *xs, ids = operands
    group = torch.where(ids < 0, op.groups, inside(ids.clamp(min=0), op.groups * op.size) // op.size)
    chosen = torch.zeros(op.groups + 1, len(ids), dtype=torch.bool)
    chosen[group, torch.arange(len(ids))[:, None]] = True
    groups, tokens = chosen[:-1].nonzero(as_tuple=True)
    within = torch.where(group[tokens] == groups[:, None], ids[tokens] - groups[:, None] * op.size, -1)
    return *(x[tokens] for x in xs), within, groups.bincount(minlength=op.groups), tokens


@function(moe.CombineGroups)
def combine_groups(op: moe.CombineGroups, rows: Tensor, tokens: Tensor, ids: Tensor, weights: Tensor | None = None) -> Tensor:
    terms = rows if weights is None else rows * weights
    return rows.new_zeros(len(ids), rows.shape[1]).index_add(0, inside(tokens, len(ids)), terms)


@function(moe.ChooseSlots)
def choose_slots(op: moe.ChooseSlots, ids: Tensor, slots: Tensor, start: Tensor | None = None) -> Tensor:
    held = [(slots == expert).nonzero()[:, 0] for expert in range(int(slots.max()) + 1)]
    turns = [0 if start is None else int(start)] * len(held)
    found = []
    for expert in inside(ids, len(held)).flatten().tolist():
        found.append(held[expert][turns[expert] % len(held[expert])])
        turns[expert] += 1
    return torch.stack(found).reshape(ids.shape) if found else ids


@function(collective.AllToAllRows)
def all_to_all_rows(op: collective.AllToAllRows, *operands: Tensor) -> Any:
    *xs, _, recv = operands
    rows = tuple(x[: int(recv.sum())] for x in xs)
    return rows if len(rows) > 1 else rows[0]


# ---- losses


@function(loss.CrossEntropy)
def cross_entropy(op: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=op.ignore)


@function(loss.CrossEntropyBackward)
def cross_entropy_backward(op: loss.CrossEntropyBackward, logits: Tensor, labels: Tensor, dloss: Tensor) -> Tensor:
    return derivative(lambda x: cross_entropy(op, x, labels), logits, dloss).nan_to_num(0.0)  # 0 where no label counts


@function(loss.BalanceLoss)
def balance_loss(op: Any, logits: Tensor, ids: Tensor) -> Tensor:
    tokens, experts = logits.shape
    chosen = torch.stack([part.reshape(-1).bincount(minlength=experts) for part in ids.reshape(op.sequences, -1)])
    frequency = chosen * (experts * op.sequences / max(1, ids.shape[1] * tokens))  # 1 where it is the average
    scores = scores_of(op, logits)
    p = (scores / scores.sum(-1, keepdim=True)).unflatten(0, (op.sequences, -1)).mean(1)
    return (frequency * p).sum(-1).mean()


@function(loss.BalanceLossBackward)
def balance_loss_backward(op: loss.BalanceLossBackward, logits: Tensor, ids: Tensor, dloss: Tensor) -> Tensor:
    return derivative(lambda x: balance_loss(op, x, ids), logits, dloss)
