"""Attention, one head and one block of queries at a time: the scores of a whole layer are never held at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...ir.errors import require
from ...ir.ops import attention as ops
from ..arrays import Array, widen
from .registry import reference
from .shape import require_inside

SCORES = 1 << 19
"""Scores held at a time: 2 MiB in float32, about what stays in a second-level cache."""


@reference(ops.Attention, operands="blocks")
def attention(op: ops.Attention, wide: np.dtype[np.floating], q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    result = np.empty((*q.shape[:-1], v.shape[-1]), wide)
    for at, key, value in _blocks(op, wide, q, k, v):
        result[at.head][at.rows] = weighted(_scores(op, at, widen(q[at.head][at.rows], wide), key, mask), value)
    return result


class _Block(NamedTuple):
    """Some queries of one head."""

    head: tuple[int, ...]
    """The index of the query head, batch included."""
    shared: tuple[int, ...]
    """The index of its key head."""
    rows: slice
    seen: int
    """How many keys the last of these queries can see."""
    shape: tuple[int, ...]
    """That of the scores of all heads."""


def _blocks(
    op: ops.Attention | ops.AttentionBackward, wide: np.dtype[np.floating], q: Array, k: Array, v: Array
) -> Iterator[tuple[_Block, Array, Array]]:
    """Every block with the keys and values that it sees, which are widened once for each key head."""
    *lead, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[-3:-1]
    block = max(1, SCORES // max(1, keys))
    for *batch, kv_head in np.ndindex(*lead, kv_heads):
        shared = (*batch, kv_head)
        key, value = (widen(x[shared], wide) for x in (k, v))
        for h in range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads):
            for start in range(0, queries, block):
                rows = slice(start, min(start + block, queries))
                seen = min(keys, rows.stop) if op.causal else keys
                yield _Block((*batch, h), shared, rows, seen, (*q.shape[:-1], keys)), key[:seen], value[:seen]


def _scores(op: ops.Attention | ops.AttentionBackward, at: _Block, q: Array, key: Array, mask: Array | None) -> Array:
    """q k^T * scale of one block, masked."""
    scores = np.matmul(q, key.T)
    scores *= op.scale
    if mask is not None and mask.dtype.kind in "iu":
        np.copyto(scores, -np.inf, where=~same_document(mask, at.shape[-1], at.rows, slice(at.seen)))
    elif mask is not None:
        _apply(np.broadcast_to(mask, at.shape)[at.head][at.rows, : at.seen], scores)
    if op.causal:
        np.copyto(scores, -np.inf, where=np.arange(at.seen) > np.arange(at.rows.start, at.rows.stop)[:, None])
    return scores


def same_document(boundaries: Array, tokens: int, rows: slice, columns: slice) -> Array:
    """Which of the tokens `rows` and `columns` lie in one document, [rows, columns]; those in no document do with none."""
    fine = boundaries[0] >= 0 and boundaries[-1] <= tokens and bool((boundaries[1:] >= boundaries[:-1]).all())
    require(fine, f"boundaries are {boundaries.tolist()}, expected rising ones from 0 to {tokens}")
    document = np.searchsorted(boundaries, np.arange(tokens), side="right")
    inside = (document > 0) & (document < len(boundaries))
    return np.asarray((document[rows, None] == document[columns]) & inside[columns])


def _apply(mask: Array, scores: Array) -> None:
    if mask.dtype == np.bool:
        np.copyto(scores, -np.inf, where=~mask)
    else:
        scores += widen(mask, scores.dtype)


def _exponentials(scores: Array) -> Array:
    """e^(scores - max scores) along the last axis, in place of `scores`; their sum, 1 for a row that is -inf throughout."""
    largest = scores.max(-1, keepdims=True, initial=-np.inf)
    largest[np.isneginf(largest)] = 0
    scores -= largest
    np.exp(scores, out=scores)
    total = scores.sum(-1, keepdims=True)
    total[total == 0] = 1
    return total


def weighted(scores: Array, v: Array) -> Array:
    """softmax(scores) v for scores [n, L], which it overwrites, and v [L, D]; 0 for a row that is -inf throughout."""
    total = _exponentials(scores)
    result = np.matmul(scores, v)
    result /= total
    return result


@reference(ops.AttentionBackward, operands="blocks")
def attention_backward(
    op: ops.AttentionBackward,
    wide: np.dtype[np.floating],
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    dout: Array,
    mask: Array | None = None,
) -> tuple[Array, Array, Array]:
    dq, dk, dv = (np.zeros(x.shape, wide) for x in (q, k, v))
    for at, key, value in _blocks(op, wide, q, k, v):
        query, gradient, result = (widen(x[at.head][at.rows], wide) for x in (q, dout, out))
        p = _scores(op, at, query, key, mask)
        p /= _exponentials(p)
        ds = np.matmul(gradient, value.T)
        ds -= np.einsum("nd,nd->n", gradient, result)[:, None]
        ds *= p
        ds *= op.scale
        np.matmul(ds, key, out=dq[at.head][at.rows])
        dk[at.shared][: at.seen] += np.matmul(ds.T, query)
        dv[at.shared][: at.seen] += np.matmul(p.T, gradient)
    return dq, dk, dv


@reference(ops.AttentionDecode, operands="blocks")
def attention_decode(
    op: ops.AttentionDecode,
    wide: np.dtype[np.floating],
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    pages: Array | None = None,
) -> Array:
    batch, heads, _ = q.shape
    kv_heads = k.shape[2]
    result = np.empty((batch, heads, v.shape[-1]), wide)
    for b in range(batch):
        seen = max(0, int(positions[b]) + 1)
        for kv_head in range(kv_heads):
            rows = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
            key, value = (widen(cached(x, b, seen, pages)[:, kv_head], wide) for x in (k, v))
            scores = np.matmul(widen(q[b, rows], wide), key.T)
            scores *= op.scale
            result[b, rows] = weighted(scores, value)
    return result


def cached(cache: Array, sequence: int, seen: int, pages: Array | None) -> Array:
    """The first `seen` entries of a sequence's cache [B, N, ...], or of one that lies in pages [P, size, ...]."""
    if pages is None:
        return cache[sequence, :seen]
    used = pages[sequence, : -(-seen // cache.shape[1])]
    require_inside(used, len(cache), "page")
    return cache[used].reshape(-1, *cache.shape[2:])[:seen]
