"""Training losses."""

from __future__ import annotations

import numpy as np

from ...ir.ops import loss as ops
from ..arrays import Array, widen
from .elementwise import sigmoid
from .reduce import normalized
from .registry import reference
from .shape import require_inside

BLOCK = 1 << 20
"""Logits worked on at a time: 4 MiB in float32."""


@reference(ops.CrossEntropy, operands="blocks")
def cross_entropy(op: ops.CrossEntropy, wide: np.dtype[np.floating], logits: Array, labels: Array) -> Array:
    counted = np.flatnonzero(labels != op.ignore)
    labels = labels[counted]
    require_inside(labels, logits.shape[1], "label")
    losses = np.empty(len(counted), wide)
    block = max(1, BLOCK // max(1, logits.shape[1]))
    for start in range(0, len(counted), block):
        some = slice(start, start + block)
        x = widen(logits[counted[some]], wide)
        x = x - x.max(-1, keepdims=True)
        picked = np.take_along_axis(x, labels[some, None], -1)[:, 0]
        losses[some] = np.log(np.exp(x, out=x).sum(-1)) - picked
    return np.divide(losses.sum(), len(counted), dtype=wide)


@reference(ops.BalanceLoss)
def balance_loss(op: ops.BalanceLoss, logits: Array, ids: Array) -> Array:
    tokens, experts = logits.shape
    require_inside(ids, experts, "expert")
    length = tokens // op.sequences
    scores = sigmoid(op, logits) if op.score == "sigmoid" else normalized(logits)
    scores /= scores.sum(-1, keepdims=True)
    mean = scores.reshape(op.sequences, length, experts).mean(1)
    slots = ids + (np.arange(tokens) // max(1, length) * experts)[:, None]
    chosen = np.bincount(slots.reshape(slots.size), minlength=op.sequences * experts).reshape(op.sequences, experts)
    frequency = chosen.astype(logits.dtype) * (experts / max(1, ids.shape[1] * length))
    return (frequency * mean).sum(-1).mean()
