"""Attention, one head and one block of queries at a time: the scores of a whole layer are never held at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ...ir.errors import require
from ...ir.ops import attention as ops
from ..arrays import Array, widen
from .registry import reference
from .shape import require_inside

SCORES = 1 << 19
"""Scores of one head held at a time: 2 MiB in float32."""

TOGETHER = 1 << 17
"""Scores up to which several heads are worked on at once: 512 KiB in float32, about what stays in a second-level cache."""


@reference(ops.Attention, operands="blocks")
def attention(op: ops.Attention, wide: np.dtype[np.floating], q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    result = np.empty((*q.shape[:-1], v.shape[-1]), wide)
    for at, key, value in _blocks(op, wide, q, k, v):
        result[at.queries] = weighted(_scores(op, at, _widened(q[at.queries], wide), key, mask), value)
    return result


class _Block(NamedTuple):
    """Some queries of some heads."""

    queries: tuple[Any, ...]
    """Where they lie, batch, heads and rows."""
    shared: tuple[Any, ...]
    """Where their key heads lie, batch included."""
    rows: slice
    seen: int
    """How many keys the last of these queries can see."""
    shape: tuple[int, ...]
    """That of the scores of all heads."""


def _blocks(
    op: ops.Attention | ops.AttentionBackward, wide: np.dtype[np.floating], q: Array, k: Array, v: Array
) -> Iterator[tuple[_Block, Array, Array]]:
    """Every block with the keys and values that it sees, which are widened once for each key head. Small heads come several at a time."""
    *lead, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[-3:-1]
    together, block = max(1, TOGETHER // max(1, queries * keys)), max(1, SCORES // max(1, keys))
    group = heads // kv_heads
    for batch in np.ndindex(*lead):
        for first in range(0, kv_heads, together):
            shared = (*batch, slice(first, min(first + together, kv_heads)))
            key, value = (_widened(x[shared], wide) for x in (k, v))
            for of_group in range(group):
                some = slice(first * group + of_group, shared[-1].stop * group, group)
                for start in range(0, queries, block):
                    rows = slice(start, min(start + block, queries))
                    seen = min(keys, rows.stop) if op.causal else keys
                    at = _Block((*batch, some, rows), shared, rows, seen, (*q.shape[:-1], keys))
                    yield at, key[:, :seen], value[:, :seen]


def _widened(x: Array, wide: np.dtype[np.floating]) -> Array:
    """`x`, head after head in memory where it has to be copied."""
    return x if x.dtype == wide else widen(np.ascontiguousarray(x), wide)


def _scores(op: ops.Attention | ops.AttentionBackward, at: _Block, q: Array, key: Array, mask: Array | None) -> Array:
    """q k^T * scale of one block, masked."""
    scores = np.matmul(q, key.swapaxes(-1, -2))
    scores *= op.scale
    if mask is not None and mask.dtype.kind in "iu":
        np.copyto(scores, -np.inf, where=~same_document(mask, at.shape[-1], at.rows, slice(at.seen)))
    elif mask is not None:
        _apply(np.broadcast_to(mask, at.shape)[at.queries][..., : at.seen], scores)
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
    largest[largest == -np.inf] = 0
    scores -= largest
    np.exp(scores, out=scores)
    total = scores.sum(-1, keepdims=True)
    total[total == 0] = 1
    return total


def weighted(scores: Array, v: Array) -> Array:
    """softmax(scores) v for scores [..., n, L], which it overwrites, and v [..., L, D]; 0 for a row that is -inf throughout."""
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
        query, gradient, result = (_widened(x[at.queries], wide) for x in (q, dout, out))
        p = _scores(op, at, query, key, mask)
        p /= _exponentials(p)
        ds = np.matmul(gradient, value.swapaxes(-1, -2))
        ds -= np.einsum("hnd,hnd->hn", gradient, result)[..., None]
        ds *= p
        ds *= op.scale
        np.matmul(ds, key, out=dq[at.queries])
        dk[at.shared][:, : at.seen] += np.matmul(ds.swapaxes(-1, -2), query)
        dv[at.shared][:, : at.seen] += np.matmul(p.swapaxes(-1, -2), gradient)
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
