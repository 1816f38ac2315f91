"""What each op gives, on tensors as they are held: floats as float32 or float64, integers as int64. The caller rounds results.

An op with an `expand` (RMSNorm, RoPE, the fused ones, ...) needs no function: it is run as what it means. Experts, quantisation and
losses are in experts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dsc import DscError
from dsc.backends.arrays import STORAGE
from dsc.ir.core import OPS, Op
from dsc.ir.ops import attention, control, elementwise, linalg, reduce, shape
from dsc.ir.types import DType

Tensor = torch.Tensor


SAME = (
    *("neg", "abs", "exp", "log", "sin", "cos", "tanh", "erf", "floor", "relu"),
    *("add", "sub", "mul", "remainder", "pow", "eq", "ne", "lt", "le", "gt", "ge"),
)
"""Ops that torch has under the same name and means the same by."""

ALONE = ["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "own_part"]
"""Collectives, which on one rank give what they are given."""


def same(name: str) -> Callable[..., Any]:
    return lambda op, *operands: getattr(torch, name)(*operands)


FUNCTIONS: dict[type[Op], Callable[..., Any]] = {
    **{OPS[name]: same(name) for name in SAME},
    **{OPS[name]: lambda op, x: x for name in ALONE},
    elementwise.Sqrt: lambda op, x: x.double().sqrt().to(x.dtype),  # torch's root of float32 is an ulp off on some CPUs
    elementwise.Rsqrt: lambda op, x: 1 / x.sqrt(),
    elementwise.Sigmoid: lambda op, x: 1 / (1 + (-x).exp()),
    elementwise.Silu: lambda op, x: x / (1 + (-x).exp()),
    elementwise.Not: lambda op, x: ~x,
    elementwise.Div: lambda op, a, b: a / b if a.is_floating_point() else a.div(b, rounding_mode="floor"),
    elementwise.Maximum: lambda op, a, b: torch.maximum(*torch.broadcast_tensors(a, b.to(a.dtype))),
    elementwise.Minimum: lambda op, a, b: torch.minimum(*torch.broadcast_tensors(a, b.to(a.dtype))),
    elementwise.And: lambda op, a, b: a & b,
    elementwise.Or: lambda op, a, b: a | b,
    elementwise.Where: lambda op, condition, a, b: torch.where(condition, a.to(b.dtype) if a.ndim == 0 else a, b.to(a.dtype)),
    elementwise.SwiGLU: lambda op, gate, up, weight=1: gate / (1 + (-gate).exp()) * up * weight,
    shape.Reshape: lambda op, x: x.reshape(op.shape),
    shape.Transpose: lambda op, x: x.permute(op.perm),
    shape.Broadcast: lambda op, x: x.expand([x.shape[i - len(op.shape)] if not isinstance(d, int) else d for i, d in enumerate(op.shape)]),
    shape.Slice: lambda op, x: x[(slice(None),) * (op.axis % x.ndim) + (slice(op.start, op.stop, op.step),)],
    shape.Concat: lambda op, *xs: torch.cat(xs, op.axis),
    shape.Pad: lambda op, x: F.pad(x, [n for pair in zip(op.low[::-1], op.high[::-1], strict=True) for n in pair], value=op.value),
    shape.Gather: lambda op, x, indices: x.gather(op.axis, inside(indices, x.shape[op.axis])),
    shape.Scatter: lambda op, x, indices, updates: x.scatter(op.axis, inside(indices, x.shape[op.axis]), updates),
    shape.IndexAdd: lambda op, x, indices, updates: x.index_add(0, inside(indices, len(x)), updates),
    shape.CacheAppend: lambda op, x, new, at: x.index_put((torch.arange(len(new)), inside(at, x.shape[1])), new),
    reduce.Sum: lambda op, x: x.sum(op.axes, op.keepdims, dtype=x.dtype),
    reduce.Mean: lambda op, x: x.mean(op.axes, op.keepdims),
    reduce.Max: lambda op, x: x.amax(op.axes, op.keepdims),
    reduce.Min: lambda op, x: x.amin(op.axes, op.keepdims),
    reduce.Any: lambda op, x: x.any(op.axes, op.keepdims),
    reduce.All: lambda op, x: x.all(op.axes, op.keepdims),
    reduce.CumSum: lambda op, x: x.cumsum(op.axis),
    reduce.Softmax: lambda op, x: x.softmax(op.axis),
    reduce.LogSoftmax: lambda op, x: x.log_softmax(op.axis),
    reduce.Sort: lambda op, x: tuple(x.sort(dim=op.axis, descending=op.descending, stable=True)),
    reduce.TopK: lambda op, x: tuple(y.narrow(op.axis, 0, op.k) for y in x.sort(dim=op.axis, descending=True, stable=True)),
    linalg.Matmul: lambda op, a, b: a @ (b.mT if op.transpose_b else b),
    control.Literal: lambda op: numbers(op.values * (op.result.tensor.size if len(op.values) == 1 else 1), op.dtype).view(op.shape),
    control.Iota: lambda op: numbers([op.start + op.step * i for i in range(op.length)], op.dtype),
    control.Pack: lambda op, *xs: xs,
    control.Unpack: lambda op, xs: xs if len(xs) > 1 else xs[0],
}  # fmt: skip


def function(*classes: type[Op]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What the function below computes."""
    return lambda made: [FUNCTIONS.__setitem__(cls, made) for cls in classes] and made


def numbers(values: Any, dtype: DType) -> Tensor:
    """Given numbers; the caller rounds them."""
    return torch.tensor(list(values), dtype=torch.float64 if dtype.is_float else torch.int64)


def inside(indices: Tensor, extent: int) -> Tensor:
    """`indices`, unless one is out of range: torch itself answers that with an exception of its own, or on a GPU not at all."""
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < extent:
        raise DscError(f"an index is outside 0 .. {extent - 1}: they go from {int(indices.min())} to {int(indices.max())}")
    return indices


@function(elementwise.Cast)
def cast(op: elementwise.Cast, x: Tensor) -> Tensor:
    if op.dtype is DType.bool:
        return x != 0
    if x.is_floating_point() and op.dtype.is_int:  # toward zero; what lies beyond the range becomes its end, NaN becomes 0
        ends = np.iinfo(STORAGE[op.dtype])
        whole = x.double().nan_to_num(0.0).trunc()
        above, below = whole >= float(ends.max), whole <= float(ends.min)
        return torch.where(above, ends.max, torch.where(below, ends.min, torch.where(above | below, 0.0, whole).long()))
    return x.double() if op.dtype.is_float and not x.is_floating_point() and op.dtype is not DType.f32 else x


@function(shape.Take)
def take(op: shape.Take, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.axis % x.ndim
    rows = x.index_select(axis, inside(indices, x.shape[axis]).reshape(-1))
    return rows.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@function(reduce.ArgMax)
def argmax(op: reduce.ArgMax, x: Tensor) -> Tensor:
    first = x.sort(dim=op.axis, descending=True, stable=True).indices.narrow(op.axis, 0, 1)  # torch.argmax does not say which of equals
    return first if op.keepdims else first.squeeze(op.axis)


@function(reduce.Histogram)
def histogram(op: reduce.Histogram, x: Tensor) -> Tensor:
    return x[(x >= 0) & (x < op.bins)].bincount(minlength=op.bins)


# ---- attention


@function(attention.Attention)
def attention_forward(op: attention.Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    shared = q.shape[-3] // k.shape[-3]
    return probabilities(op, q, k, mask) @ v.repeat_interleave(shared, -3)


def probabilities(op: Any, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T * scale + mask), 0 for a query that sees nothing."""
    scores = q @ k.repeat_interleave(q.shape[-3] // k.shape[-3], -3).mT * op.scale
    if mask is not None and not mask.is_floating_point() and mask.dtype != torch.bool:  # boundaries of documents
        document = torch.searchsorted(mask, torch.arange(k.shape[-2]), right=True)
        mask = (document[:, None] == document) & (document > 0) & (document < len(mask))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if op.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


@function(attention.AttentionBackward)
def attention_backward(
    op: attention.AttentionBackward, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    shared = q.shape[-3] // k.shape[-3]
    p = probabilities(op, q, k, mask)
    ds = (dout @ v.repeat_interleave(shared, -3).mT - (dout * out).sum(-1, keepdim=True)) * p * op.scale
    dk, dv = (x.unflatten(-3, (-1, shared)).sum(-3) for x in (ds.mT @ q, p.mT @ dout))
    return ds @ k.repeat_interleave(shared, -3), dk, dv


@function(attention.AttentionDecode)
def attention_decode(
    op: attention.AttentionDecode, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, pages: Tensor | None = None
) -> Tensor:
    if pages is not None:
        k, v = (x[inside(pages, len(x))].flatten(1, 2) for x in (k, v))
    k, v = (x.transpose(1, 2).repeat_interleave(q.shape[1] // x.shape[2], 1) for x in (k, v))
    unseen = torch.arange(k.shape[2]) > positions[:, None]
    scores = (q[:, :, None] @ k.mT * op.scale).masked_fill(unseen[:, None, None], -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v)[:, :, 0]
