"""Mixture of experts in standard ops: the gate by TopK, whose equals go by lower index first as ours do, the way by Gather."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ir.ops import moe as ops
from ...ir.ops.rules import static
from ...ir.types import DType
from .emit import FP8, Emitter, Tree, Value
from .ops_elementwise import sigmoid
from .ops_reduce import counted
from .registry import onnx


def scores_of(g: Emitter, op: Any, logits: Value) -> Value:
    """The gate's scores by its rule, float32 [T, E]."""
    return sigmoid(g, op, logits) if op.score == "sigmoid" else g.Softmax(logits, axis=-1)


@onnx(ops.Route)
def route(g: Emitter, op: ops.Route, logits: Value, bias: Value | None = None) -> tuple[Value, Value]:
    scores = scores_of(g, op, logits)
    choice = scores if bias is None else g.Add(scores, bias)
    if op.top_groups < op.groups:
        choice = _keep_groups(g, op, choice)
    _, ids = g.TopK(choice, [op.top_k], axis=-1, outputs=2)
    weights = g.GatherElements(scores, ids, axis=1)
    if op.normalize:
        weights = g.Div(weights, g.Add(g.sum(weights, 1), np.float32(1e-20)))
    return g.cast(ids, DType.i32), g.Mul(weights, np.float32(op.scale))


def _keep_groups(g: Emitter, op: ops.Route, choice: Value) -> Value:
    """`choice` [T, E] with -inf for the experts outside each token's best groups."""
    tokens, experts = static(op.logits, "route")
    grouped = g.reshaped(choice, tokens, op.groups, experts // op.groups)
    if op.group_score == "max" or experts == op.groups:
        score = g.ReduceMax(grouped, [-1], keepdims=0)
    else:
        score = g.sum(g.TopK(grouped, [2], axis=-1, outputs=2)[0], -1, keepdims=False)
    _, best = g.TopK(score, [op.top_groups], axis=-1, outputs=2)
    kept = g.ScatterElements(np.zeros((tokens, op.groups), np.int32), best, g.Expand(np.int32(1), [tokens, op.top_groups]), axis=1)
    kept = g.Unsqueeze(g.cast(kept, DType.bool), [-1])
    return g.reshaped(g.Where(kept, grouped, np.float32(-np.inf)), tokens, experts)


@onnx(ops.RouteBackward)
def route_backward(g: Emitter, op: ops.RouteBackward, logits: Value, ids: Value, dweights: Value) -> Value:
    scores = scores_of(g, op, logits)
    ids = g.Cast(ids, to=7)
    chosen = g.Mul(dweights, np.float32(op.scale))
    if op.normalize:
        p = g.GatherElements(scores, ids, axis=1)
        total = g.Add(g.sum(p, 1), np.float32(1e-20))
        chosen = g.Div(g.Sub(chosen, g.Div(g.sum(g.Mul(chosen, p), 1), total)), total)
    ds = g.ScatterElements(np.zeros(static(op.logits, "route_backward"), np.float32), ids, chosen, axis=1)
    if op.score == "sigmoid":
        return g.Mul(ds, g.Mul(scores, g.Sub(np.float32(1), scores)))
    return g.Mul(g.Sub(ds, g.sum(g.Mul(ds, scores), 1)), scores)


def _picked(g: Emitter, x: Value, dtype: DType, rows: Value) -> Value:
    """Rows of x; FP8 by way of float32."""
    if dtype not in FP8:
        return g.Gather(x, rows, axis=0)
    return g.uncarried(g.Gather(g.carried(x, dtype), rows, axis=0), dtype)


@onnx(ops.Dispatch, "stored")
def dispatch(g: Emitter, op: ops.Dispatch, *operands: Value) -> tuple[Tree, ...]:
    *xs, ids = operands
    tokens, k = static(op.ids, "dispatch")
    slots = g.reshaped(g.Cast(ids, to=7), tokens * k)
    _, order = g.TopK(slots, [tokens * k], axis=0, largest=0, outputs=2)
    token = g.Div(order, np.int64(max(1, k)))
    rows = (_picked(g, x, v.dtype, token) for x, v in zip(xs, op.xs, strict=True))
    return *rows, g.cast(counted(g, slots, op.experts), DType.i32), (g.cast(order, DType.i32),)


@onnx(ops.Combine)
def combine(g: Emitter, op: ops.Combine, rows: Value, handle: tuple[Value], weights: Value) -> Value:
    tokens, k = static(op.weights, "combine")
    width = op.rows.shape[1]
    assert isinstance(width, int)
    slots = np.arange(tokens * k, dtype=np.int64)
    row_of = g.ScatterElements(np.zeros_like(slots), g.Cast(handle[0], to=7), slots, axis=0)
    by_slot = g.reshaped(g.Gather(rows, row_of, axis=0), tokens, k, width)
    return g.sum(g.Mul(by_slot, g.Unsqueeze(weights, [-1])), 1, keepdims=False)


@onnx(ops.Redispatch, "stored")
def redispatch(g: Emitter, op: ops.Redispatch, *operands: Tree) -> tuple[Value, ...]:
    *xs, (order,) = operands
    k = op.results[0].shape[0] // max(1, op.xs[0].shape[0])  # type: ignore[operator,type-var]
    token = g.Div(g.Cast(order, to=7), np.int64(max(1, k)))
    return tuple(_picked(g, x, v.dtype, token) for x, v in zip(xs, op.xs, strict=True))


@onnx(ops.RowWeights)
def row_weights(g: Emitter, op: ops.RowWeights, weights: Value, handle: tuple[Value]) -> Value:
    return g.Unsqueeze(g.Gather(g.Reshape(weights, [-1]), g.Cast(handle[0], to=7), axis=0), [-1])


@onnx(ops.SlotWeights)
def slot_weights(g: Emitter, op: ops.SlotWeights, rows: Value, handle: tuple[Value]) -> Value:
    tokens, k = static(op.result, "slot_weights")
    slots = g.ScatterElements(np.zeros(tokens * k, np.float32), g.Cast(handle[0], to=7), g.Reshape(rows, [-1]), axis=0)
    return g.reshaped(slots, tokens, k)
