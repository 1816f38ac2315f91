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


@reference(ops.CrossEntropyBackward, operands="blocks")
def cross_entropy_backward(op: ops.CrossEntropyBackward, wide: np.dtype[np.floating], logits: Array, labels: Array, dloss: Array) -> Array:
    counted = np.flatnonzero(labels != op.ignore)
    labels = labels[counted]
    require_inside(labels, logits.shape[1], "label")
    result = np.zeros(logits.shape, wide)
    each = np.divide(widen(dloss, wide), max(1, len(counted)), dtype=wide)
    block = max(1, BLOCK // max(1, logits.shape[1]))
    for start in range(0, len(counted), block):
        some = slice(start, start + block)
        p = normalized(widen(logits[counted[some]], wide))
        p[np.arange(len(p)), labels[some]] -= 1
        p *= each
        result[counted[some]] = p
    return result


@reference(ops.BalanceLoss)
def balance_loss(op: ops.BalanceLoss, logits: Array, ids: Array) -> Array:
    length = len(logits) // op.sequences
    scores = sigmoid(op, logits) if op.score == "sigmoid" else normalized(logits)
    scores /= scores.sum(-1, keepdims=True)
    mean = scores.reshape(op.sequences, length, -1).mean(1)
    return (_frequency(op, logits, ids) * mean).sum(-1).mean()


def _frequency(op: ops.BalanceLoss | ops.BalanceLossBackward, logits: Array, ids: Array) -> Array:
    """f [sequences, E]: how often each expert was chosen, 1 where it is the average."""
    tokens, experts = logits.shape
    require_inside(ids, experts, "expert")
    length = tokens // op.sequences
    slots = ids + (np.arange(tokens) // max(1, length) * experts)[:, None]
    chosen = np.bincount(slots.reshape(slots.size), minlength=op.sequences * experts).reshape(op.sequences, experts)
    return chosen.astype(logits.dtype) * (experts / max(1, ids.shape[1] * length))


@reference(ops.BalanceLossBackward)
def balance_loss_backward(op: ops.BalanceLossBackward, logits: Array, ids: Array, dloss: Array) -> Array:
    """By the scores where they are sigmoids; softmax scores add up to 1 already."""
    scores = sigmoid(op, logits) if op.score == "sigmoid" else normalized(logits)
    total = scores.sum(-1, keepdims=True)
    p = scores / total
    dp = np.repeat(_frequency(op, logits, ids) * (dloss / max(1, len(logits))), len(logits) // op.sequences, axis=0)
    dp -= (dp * p).sum(-1, keepdims=True)
    return dp / total * (scores * (1 - scores)) if op.score == "sigmoid" else dp * p
