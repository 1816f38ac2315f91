"""Error bounds of the ops that compute gradients, in the notation of `bounds.py`: one E for each result.

A gradient is a sum of terms of either sign, so E is mostly gamma(roundings on the way) times the sum of the terms' magnitudes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backends.arrays import Array
from ..backends.numpy_ref.run import unrounded
from ..ir.ops import attention, elementwise, linalg, loss, moe, norm, quant
from .bounds import LIBRARY, RSQRT, SIGMOID, Floats, Precision, error_of, softmax_error
from .bounds_attention import masked_scores, score_error


@error_of(elementwise.SwiGLUBackward)
def swiglu_backward(op: Any, p: Precision, ys: Any, gate: Floats, up: Floats, dy: Floats) -> tuple[Any, Any]:
    """1 - s is off by what s is off, so the slope 1 + gate (1 - s) by gamma(SIGMOID + 3) (1 + |gate|)."""
    s = 1 / (1 + np.exp(-gate))
    lost = p.tiny * (1 + np.abs(gate)) * (1 + np.abs(up)) * (1 + np.abs(dy))
    dgate = p.gamma(2 * SIGMOID + 6) * np.abs(dy * up) * s * (1 + np.abs(gate))
    return dgate + lost, p.gamma(SIGMOID + 2) * np.abs(dy * gate) * s + lost


@error_of(norm.RmsNormBackward)
def rms_norm_backward(op: norm.RmsNormBackward, p: Precision, ys: Any, x: Floats, weight: Floats, dy: Floats) -> tuple[Any, Any]:
    """n takes c roundings (see rms_norm); mean(g n) takes n + 1 more, and dx multiplies by n and by r once more."""
    size = x.shape[-1]
    c = (size + 3) / 2 + RSQRT + 1
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + op.eps)
    n, g = np.abs(x) * r, np.abs(dy * weight)
    dx = p.gamma(3 * c + size + 8) * r * (g + n * (g * n).mean(-1, keepdims=True))
    rows = x.size // max(1, size)
    return dx, p.gamma(rows + c + 2) * (np.abs(dy) * n).reshape(-1, size).sum(0)


@error_of(attention.AttentionBackward)
def attention_backward(
    op: attention.AttentionBackward,
    p: Precision,
    ys: Any,
    q: Floats,
    k: Floats,
    v: Floats,
    out: Floats,
    dout: Floats,
    mask: Array | None = None,
) -> tuple[Any, ...]:
    """Per head: P as in attention, dS = P (dP - D) from two sums over Dv, then sums over keys, or over queries and heads.

    As in attention the sum over keys is granted as many roundings again, for the rescaling of an online softmax.
    """
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    heads = q.shape[-3] // k.shape[-3]
    for head in np.ndindex(*q.shape[:-2]):
        shared = (*head[:-1], head[-1] // heads)
        scores = q[head] @ k[shared].T * op.scale + masked_scores(op, q, k, mask)[head]
        prob, relative = softmax_error(p, scores, before=score_error(p, q[head], k[shared], op.scale, scores))
        d = np.abs(dout[head])
        dp, row = d @ np.abs(v[shared]).T, (d * np.abs(out[head])).sum(-1, keepdims=True)
        ds = prob * (dp + row)
        ds_error = ds * (relative + p.gamma(v.shape[-1] + 3))
        length, queries = k.shape[-2], q.shape[-2] * heads
        dq[head] = abs(op.scale) * (ds_error + p.gamma(2 * length + 2) * ds) @ np.abs(k[shared])
        dk[shared] += abs(op.scale) * (ds_error + p.gamma(queries + 2) * ds).T @ np.abs(q[head])
        dv[shared] += (prob * (relative + p.gamma(queries + 2))).T @ d
    return dq, dk, dv


@error_of(linalg.GroupedMatmulWgrad)
def grouped_matmul_wgrad(op: linalg.GroupedMatmulWgrad, p: Precision, y: Floats, a: Floats, b: Floats, counts: Array) -> Any:
    """Like matmul, a group's rows being the terms."""
    (magnitude,) = unrounded(op, (np.abs(a), np.abs(b), counts))
    return p.gamma(counts.astype(np.float64))[:, None, None] * magnitude


@error_of(quant.GroupedScaledMatmulWgrad)
def grouped_scaled_matmul_wgrad(op: quant.GroupedScaledMatmulWgrad, p: Precision, y: Floats, *operands: Array) -> Any:
    """Like grouped_matmul_wgrad, each product with two more roundings for the scales."""
    if op.accumulation.arithmetic != "float32":
        return 0.0
    *given, counts = operands
    (magnitude,) = unrounded(op, (*map(np.abs, given), counts))
    return p.gamma(counts.astype(np.float64) + 2)[:, None, None] * magnitude


@error_of(moe.RouteBackward)
def route_backward(op: moe.RouteBackward, p: Precision, y: Floats, logits: Floats, ids: Array, dweights: Floats) -> Any:
    """dp subtracts a weighted mean of dw; s (1 - s) is off by gamma(SIGMOID + 2) s; softmax subtracts a mean over all experts once more."""
    ids = ids.astype(np.int64)
    if op.score == "sigmoid":
        s, relative = 1 / (1 + np.exp(-logits)), np.full(logits.shape, p.gamma(SIGMOID))
    else:
        s, relative = softmax_error(p, logits)
    dp, worst = np.abs(dweights * op.scale), relative.max(-1, keepdims=True, initial=0.0)
    if op.normalize:
        chosen = np.take_along_axis(s, ids, 1)
        total = chosen.sum(1, keepdims=True) + 1e-20
        dp = (dp + (dp * chosen).sum(1, keepdims=True) / total) / total
    ds = np.zeros(logits.shape)
    np.put_along_axis(ds, ids, dp, 1)
    each = p.gamma(2 * op.ids.tensor.shape[1] + 6) + 4 * worst  # type: ignore[operator]
    if op.score == "sigmoid":
        return ds * s * (each + p.gamma(SIGMOID + 4)) + p.tiny * (1 + ds)
    return (ds + (ds * s).sum(1, keepdims=True)) * s * (each + p.gamma(logits.shape[1] + 4) + 2 * worst) + p.tiny * (1 + ds)


@error_of(loss.CrossEntropyBackward)
def cross_entropy_backward(op: Any, p: Precision, y: Floats, logits: Floats, labels: Array, dloss: Floats) -> Any:
    """A softmax, 1 subtracted from it, a quotient and a product."""
    s, relative = softmax_error(p, logits)
    counted = (labels != op.ignore)[:, None]
    each = np.abs(dloss) / max(1, int(counted.sum()))
    return np.where(counted, each * s * relative + p.gamma(3) * np.abs(y) + p.tiny * (1 + each), 0.0)


@error_of(loss.BalanceLossBackward)
def balance_loss_backward(op: loss.BalanceLossBackward, p: Precision, y: Floats, logits: Floats, ids: Array, dloss: Floats) -> Any:
    """dp is positive and takes a few roundings; what is subtracted from it is its mean by p, which sums over E twice."""
    tokens, experts = logits.shape
    sigmoid = op.score == "sigmoid"
    s = 1 / (1 + np.exp(-logits)) if sigmoid else softmax_error(p, logits)[0]
    total = s.sum(-1, keepdims=True)
    roundings = SIGMOID if sigmoid else LIBRARY + experts + 2 + float(np.ptp(logits, axis=-1).max(initial=0))
    length = max(1, tokens // op.sequences)
    slots = ids.astype(np.int64).reshape(op.sequences, -1)
    chosen = np.stack([np.bincount(row, minlength=experts) for row in slots]) if tokens else np.zeros((op.sequences, experts))
    dp = np.repeat(chosen * (experts / max(1, ids.shape[1] * length)), tokens // op.sequences, axis=0) * np.abs(dloss) / max(1, tokens)
    dp = dp + (dp * s / total).sum(-1, keepdims=True)
    return p.gamma(4 * roundings + 3 * experts + 12) * dp * s / total + p.tiny
