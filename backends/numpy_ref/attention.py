"""Attention, one head and one block of queries at a time: the scores of a whole layer are never held at once."""

from __future__ import annotations

import numpy as np

from ...ir.ops import attention as ops
from ..arrays import Array, widen
from .registry import reference

SCORES = 1 << 19
"""Scores held at a time: 2 MiB in float32, about what stays in a second-level cache."""


@reference(ops.Attention, operands="blocks")
def attention(op: ops.Attention, wide: np.dtype[np.floating], q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    *lead, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[-3:-1]
    every = (*lead, heads, queries, keys)
    masks = None if mask is None else np.broadcast_to(mask, every)
    result = np.empty((*q.shape[:-1], v.shape[-1]), wide)
    block = max(1, SCORES // max(1, keys))
    for *batch, kv_head in np.ndindex(*lead, kv_heads):
        key, value = (widen(x[(*batch, kv_head)], wide) for x in (k, v))
        for h in range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads):
            head = (*batch, h)
            for start in range(0, queries, block):
                rows = slice(start, min(start + block, queries))
                seen = min(keys, rows.stop) if op.causal else keys
                scores = np.matmul(widen(q[head][rows], wide), key[:seen].T)
                scores *= op.scale
                if masks is not None:
                    _apply(masks[head][rows, :seen], scores)
                if op.causal:
                    np.copyto(scores, -np.inf, where=np.arange(seen) > np.arange(rows.start, rows.stop)[:, None])
                result[head][rows] = weighted(scores, value[:seen])
    return result


def _apply(mask: Array, scores: Array) -> None:
    if mask.dtype == np.bool:
        np.copyto(scores, -np.inf, where=~mask)
    else:
        scores += widen(mask, scores.dtype)


def weighted(scores: Array, v: Array) -> Array:
    """softmax(scores) v for scores [n, L], which it overwrites, and v [L, D]; 0 for a row that is -inf throughout."""
    largest = scores.max(-1, keepdims=True, initial=-np.inf)
    largest[np.isneginf(largest)] = 0
    scores -= largest
    np.exp(scores, out=scores)
    total = scores.sum(-1, keepdims=True)
    total[total == 0] = 1
    result = np.matmul(scores, v)
    result /= total
    return result


@reference(ops.AttentionDecode, operands="blocks")
def attention_decode(op: ops.AttentionDecode, wide: np.dtype[np.floating], q: Array, k: Array, v: Array, positions: Array) -> Array:
    batch, heads, _ = q.shape
    kv_heads = k.shape[2]
    result = np.empty((batch, heads, v.shape[-1]), wide)
    for b in range(batch):
        seen = max(0, int(positions[b]) + 1)
        for kv_head in range(kv_heads):
            rows = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
            scores = np.matmul(widen(q[b, rows], wide), widen(k[b, :seen, kv_head], wide).T)
            scores *= op.scale
            result[b, rows] = weighted(scores, widen(v[b, :seen, kv_head], wide))
    return result
