"""Training losses and their gradients in standard ops."""

from __future__ import annotations

import numpy as np

from ...ir.ops import loss as ops
from ...ir.ops.rules import static
from ...ir.types import DType
from .emit import Emitter, Value
from .ops_moe import scores_of
from .ops_reduce import counted
from .registry import onnx

ONE = np.float32(1)


def _labels(g: Emitter, op: ops.CrossEntropy | ops.CrossEntropyBackward, labels: Value) -> tuple[Value, Value]:
    """Whether each token counts, as float32 [T], and labels [T, 1] that may be looked up."""
    labels = g.Cast(labels, to=7)
    counts = g.Not(g.Equal(labels, np.int64(op.ignore)))
    return g.cast(counts, DType.f32), g.Unsqueeze(g.Where(counts, labels, np.int64(0)), [1])


@onnx(ops.CrossEntropy)
def cross_entropy(g: Emitter, op: ops.CrossEntropy, logits: Value, labels: Value) -> Value:
    counted_, labels = _labels(g, op, labels)
    x = g.Sub(logits, g.ReduceMax(logits, [-1], keepdims=1))
    losses = g.Sub(g.Log(g.sum(g.Exp(x), 1)), g.GatherElements(x, labels, axis=1))
    return g.Div(g.sum(g.Mul(g.Squeeze(losses, [1]), counted_), 0, keepdims=False), g.sum(counted_, 0, keepdims=False))


@onnx(ops.CrossEntropyBackward)
def cross_entropy_backward(g: Emitter, op: ops.CrossEntropyBackward, logits: Value, labels: Value, dloss: Value) -> Value:
    counted_, labels = _labels(g, op, labels)
    p = g.Softmax(logits, axis=-1)
    hot = g.Equal(np.arange(static(op.logits, op.name)[1], dtype=np.int64), labels)
    each = g.Div(dloss, g.Max(g.sum(counted_, 0, keepdims=False), ONE))
    return g.Mul(g.Mul(g.Sub(p, g.cast(hot, DType.f32)), each), g.Unsqueeze(counted_, [1]))


@onnx(ops.BalanceLoss)
def balance_loss(g: Emitter, op: ops.BalanceLoss, logits: Value, ids: Value) -> Value:
    tokens, experts = static(op.logits, op.name)
    scores = scores_of(g, op, logits)
    p = g.reshaped(g.Div(scores, g.sum(scores, -1)), op.sequences, tokens // op.sequences, experts)
    return g.ReduceMean(g.sum(g.Mul(_frequency(g, op, ids), g.ReduceMean(p, [1], keepdims=0)), 1, keepdims=False), [0], keepdims=0)


def _frequency(g: Emitter, op: ops.BalanceLoss | ops.BalanceLossBackward, ids: Value) -> Value:
    """How often each expert was chosen, 1 where it is the average: float32 [sequences, E]."""
    tokens, experts = static(op.logits, op.name)
    length = tokens // op.sequences
    first = np.arange(tokens, dtype=np.int64)[:, None] // max(1, length) * experts
    chosen = counted(g, g.Reshape(g.Add(g.Cast(ids, to=7), first), [-1]), op.sequences * experts)
    average = np.float32(experts / max(1, static(op.ids, op.name)[1] * length))
    return g.Mul(g.cast(g.reshaped(chosen, op.sequences, experts), DType.f32), average)


@onnx(ops.BalanceLossBackward)
def balance_loss_backward(g: Emitter, op: ops.BalanceLossBackward, logits: Value, ids: Value, dloss: Value) -> Value:
    tokens, experts = static(op.logits, op.name)
    scores = scores_of(g, op, logits)
    total = g.sum(scores, -1)
    p = g.Div(scores, total)
    each = g.Mul(_frequency(g, op, ids), g.Div(dloss, np.float32(max(1, tokens))))
    each = g.Expand(g.Unsqueeze(each, [1]), [op.sequences, tokens // op.sequences, experts])
    dp = g.reshaped(each, tokens, experts)
    dp = g.Sub(dp, g.sum(g.Mul(dp, p), -1))
    return g.Mul(g.Div(dp, total), g.Mul(scores, g.Sub(ONE, scores))) if op.score == "sigmoid" else g.Mul(dp, p)
