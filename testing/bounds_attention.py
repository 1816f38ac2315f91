"""Error bounds of attention, in the notation of `bounds.py`: what errors of the scores do to probabilities, and those to their sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backends.arrays import Array
from ..backends.numpy_ref.attention import cached, same_document
from ..ir.ops import attention
from .bounds import Floats, Precision, error_of, softmax_error


@error_of(attention.Attention)
def attend(op: attention.Attention, p: Precision, y: Floats, q: Floats, k: Floats, v: Floats, mask: Array | None = None) -> Any:
    """See `_attend`, per head."""
    added = masked_scores(op, q, k, mask)
    result = np.empty_like(y)
    for head in np.ndindex(*q.shape[:-2]):
        shared = (*head[:-1], head[-1] * k.shape[-3] // q.shape[-3])
        result[head] = _attend(p, q[head], k[shared], v[shared], op.scale, added[head])
    return result


def masked_scores(op: attention.Attention | attention.AttentionBackward, q: Floats, k: Floats, mask: Array | None) -> Floats:
    """What the mask and causality add to the scores [..., Hq, S, L]."""
    shape = (*q.shape[:-1], k.shape[-2])
    if mask is not None and mask.dtype.kind in "iu":
        mask = same_document(mask, k.shape[-2], slice(None), slice(None))
    given = np.broadcast_to(np.zeros(()) if mask is None else mask, shape)
    added = np.where(given, 0.0, -np.inf) if given.dtype == np.bool else given
    return np.where(np.tril(np.ones(shape[-2:], np.bool)), added, -np.inf) if op.causal else added


def score_error(p: Precision, q: Floats, k: Floats, scale: float, scores: Floats) -> Floats:
    """The absolute error of the scores of one head: a sum of Dk products, scaled (by a rounded factor) and added to."""
    finite = np.where(np.isfinite(scores), np.abs(scores), 0.0)
    return p.gamma(q.shape[-1] + 2) * abs(scale) * (np.abs(q) @ np.abs(k).T) + p.unit * finite


@error_of(attention.AttentionDecode)
def decode(
    op: attention.AttentionDecode, p: Precision, y: Floats, q: Floats, k: Floats, v: Floats, positions: Array, pages: Array | None = None
) -> Any:
    """See `_attend`, per sequence and head."""
    result = np.zeros_like(y)
    for b, head in np.ndindex(*q.shape[:2]):
        seen, shared = max(0, int(positions[b]) + 1), head * k.shape[2] // q.shape[1]
        key, value = (cached(x, b, seen, pages)[:, shared] for x in (k, v))
        result[b, head] = _attend(p, q[b, head, None], key, value, op.scale, np.zeros(()))[0]
    return result


def _attend(p: Precision, q: Floats, k: Floats, v: Floats, scale: float, added: Floats) -> Floats:
    """q [S, Dk], k [L, Dk], v [L, Dv], `added` to the scores; [S, Dv].

    The absolute error of a score is a relative one of its probability. The weighted sum over L keys takes L roundings; as many again are
    granted to the rescaling of an online softmax, at most 10 for each block of 16 keys.
    """
    scores = q @ k.T * scale + added
    y, relative = softmax_error(p, scores, before=score_error(p, q, k, scale, scores))
    return (y * (relative + p.gamma(2 * k.shape[0] + 1))) @ np.abs(v)
