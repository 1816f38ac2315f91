"""Normalisation, rotary embedding and attention, as the standard ops of these names where they say the same."""

from __future__ import annotations

from math import prod

import numpy as np

from ...ir.ops import attention, norm
from ...ir.ops.rules import static
from ...ir.types import DType
from .emit import Emitter, Value, wide_of
from .registry import onnx


@onnx(norm.RmsNorm)
def rms_norm(g: Emitter, op: norm.RmsNorm, x: Value, weight: Value) -> Value:
    return g.RMSNormalization(x, weight, axis=-1, epsilon=op.eps)


@onnx(norm.Rope)
def rope(g: Emitter, op: norm.Rope, x: Value, cos: Value, sin: Value) -> Value:
    """RotaryEmbedding takes [B, S, heads * D] and tables [B, S, D/2]."""
    shape = static(op.x, "rope")
    *lead, tokens, heads, width = shape
    tables = [g.reshaped(g.Expand(t, [*lead, tokens, width // 2]), prod(lead), tokens, width // 2) for t in (cos, sin)]
    rows = g.reshaped(x, prod(lead), tokens, heads * width)
    return g.reshaped(g.RotaryEmbedding(rows, *tables, interleaved=int(op.interleaved), num_heads=heads), *shape)


@onnx(attention.Attention)
def attention_(g: Emitter, op: attention.Attention, q: Value, k: Value, v: Value, mask: Value | None = None) -> Value:
    *lead, heads, queries, _ = static(op.q, op.name)
    keys = static(op.k, op.name)[-2]
    mask, boolean = opened(g, op, mask)
    q, k, v = (g.reshaped(x, prod(lead), *static(t, op.name)[-3:]) for x, t in ((q, op.q), (k, op.k), (v, op.v)))
    if mask is not None:
        mask = g.reshaped(g.Expand(mask, [*lead, heads, queries, keys]), prod(lead), heads, queries, keys)
    if op.causal and (mask is not None or queries != keys):
        lower = g.value(np.tril(np.ones((queries, keys), np.bool)))
        mask = lower if mask is None else g.And(mask, lower) if boolean else g.Where(lower, mask, g.number(-np.inf, wide_of(op)))
    found = attend(g, wide_of(op), q, k, v, mask, op.scale, op.causal and mask is None, boolean)
    return g.reshaped(found, *static(op.result, op.name))


def opened(g: Emitter, op: attention.Attention | attention.AttentionBackward, mask: Value | None) -> tuple[Value | None, bool]:
    """The mask, boundaries of documents as what they open, and whether it is of bools."""
    if mask is None or op.mask is None or not op.mask.dtype.is_int:
        return mask, op.mask is None or op.mask.dtype is DType.bool
    (boundaries,) = static(op.mask, op.name)
    tokens = np.arange(static(op.q, op.name)[-2], dtype=np.int64)[:, None]
    passed = g.sum(g.cast(g.GreaterOrEqual(tokens, g.Cast(mask, to=7)), DType.i64), 1)
    inside = g.And(g.Greater(passed, np.int64(0)), g.Less(passed, np.int64(boundaries)))
    return g.And(g.Equal(passed, g.swapped(passed, 2)), inside), True


def attend(
    g: Emitter, dtype: DType, q: Value, k: Value, v: Value, mask: Value | None, scale: float, causal: bool = False, boolean: bool = True
) -> Value:
    """The standard Attention on [B, heads, tokens, width]. It leaves open what a query that sees no key gives: here 0."""
    found = g.Attention(q, k, v, mask, scale=scale, is_causal=int(causal))
    if mask is None:
        return found
    seen = mask if boolean else g.Greater(mask, g.number(-np.inf, dtype))
    some = g.ReduceMax(g.cast(seen, DType.i32), [-1], keepdims=1)
    return g.Where(g.cast(some, DType.bool), found, g.number(0.0, dtype))


@onnx(attention.AttentionDecode)
def attention_decode(
    g: Emitter, op: attention.AttentionDecode, q: Value, k: Value, v: Value, positions: Value, pages: Value | None = None
) -> Value:
    """Attention of one query per sequence, which sees the keys up to its position. Pages of a cache are gathered first."""
    keys, sequences = op.keys, static(op.q, op.name)[0]
    if pages is not None:
        last = static(op.k, op.name)[0] - 1
        used = g.Min(g.Max(g.Cast(pages, to=7), np.int64(0)), np.int64(last))  # entries past a position may name no page
        k, v = (g.reshaped(g.Gather(x, used, axis=0), sequences, keys, *static(t, op.name)[2:]) for x, t in ((k, op.k), (v, op.v)))
    k, v = (g.Transpose(x, perm=[0, 2, 1, 3]) for x in (k, v))
    seen = g.LessOrEqual(np.arange(keys, dtype=np.int64), g.Unsqueeze(g.Cast(positions, to=7), [1, 2, 3]))
    return g.Squeeze(attend(g, wide_of(op), g.Unsqueeze(q, [2]), k, v, seen, op.scale), [2])


@onnx(attention.AttentionBackward)
def attention_backward(
    g: Emitter, op: attention.AttentionBackward, q: Value, k: Value, v: Value, out: Value, dout: Value, mask: Value | None = None
) -> tuple[Value, Value, Value]:
    """By its formula. Query heads that share a key head lie along an axis of their own, [..., Hkv, group, tokens, width]."""
    dtype = wide_of(op)
    *lead, heads, queries, _ = static(op.q, "attention_backward")
    shared, keys = static(op.k, "attention_backward")[-3:-1]
    group, rank = heads // shared, len(lead) + 4

    def split(x: Value, width: int) -> Value:
        return g.reshaped(x, *lead, shared, group, queries, width)

    width, value_width = static(op.q, op.name)[-1], static(op.v, op.name)[-1]
    qs, outs, douts = split(q, width), split(out, value_width), split(dout, value_width)
    ks, vs = (g.Unsqueeze(x, [rank - 3]) for x in (k, v))
    scores = g.Mul(g.MatMul(qs, g.swapped(ks, rank)), g.number(op.scale, dtype))
    closed = g.number(-np.inf, dtype)
    mask, boolean = opened(g, op, mask)
    if mask is not None:
        every = split(g.Expand(mask, [*lead, heads, queries, keys]), keys)
        scores = g.Where(every, scores, closed) if boolean else g.Add(scores, every)
    if op.causal:
        scores = g.Where(np.tril(np.ones((queries, keys), np.bool)), scores, closed)
    largest = g.ReduceMax(scores, [-1], keepdims=1)
    largest = g.Where(g.IsInf(largest), g.number(0.0, dtype), largest)
    p = g.Exp(g.Sub(scores, largest))
    total = g.sum(p, -1)
    p = g.Div(p, g.Where(g.Equal(total, g.number(0.0, dtype)), g.number(1.0, dtype), total))
    along = g.sum(g.Mul(douts, outs), -1)
    ds = g.Mul(g.Mul(p, g.Sub(g.MatMul(douts, g.swapped(vs, rank)), along)), g.number(op.scale, dtype))
    dq = g.reshaped(g.MatMul(ds, ks), *static(op.q, "attention_backward"))
    dk, dv = (g.sum(g.MatMul(g.swapped(a, rank), b), rank - 3, keepdims=False) for a, b in ((ds, qs), (p, douts)))
    return dq, dk, dv
