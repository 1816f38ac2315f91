"""Ops that move elements. FP8 moves as bytes: torch indexes and joins only dtypes that it can compute with."""

from __future__ import annotations

import torch

from ....ir.core import Op
from ....ir.ops import shape as ops
from ....ir.types import DType
from ..tensors import plain, rounded, widen
from .elementwise import convert
from .registry import torch_op

Tensor = torch.Tensor


@torch_op(ops.Reshape)
def reshape(op: ops.Reshape, x: Tensor) -> Tensor:
    return x.reshape(op.shape)


@torch_op(ops.Transpose)
def transpose(op: ops.Transpose, x: Tensor) -> Tensor:
    return x.permute(op.perm)


@torch_op(ops.Broadcast)
def broadcast(op: ops.Broadcast, x: Tensor) -> Tensor:
    return x.expand([x.shape[i - len(op.shape)] if not isinstance(d, int) else d for i, d in enumerate(op.shape)])


@torch_op(ops.Slice)
def slice_(op: ops.Slice, x: Tensor) -> Tensor:
    return x[(slice(None),) * (op.axis % x.ndim) + (slice(op.start, op.stop, op.step),)]


@torch_op(ops.Concat)
def concat(op: ops.Concat, *xs: Tensor) -> Tensor:
    return torch.cat([plain(x) for x in xs], op.axis).view(xs[0].dtype)


@torch_op(ops.Pad)
def pad(op: ops.Pad, x: Tensor) -> Tensor:
    dtype = op.result.dtype
    value = torch.full((1,), op.value, dtype=torch.float64, device=x.device)
    filler = rounded(value, dtype) if dtype.is_float else convert(value, DType.f64, dtype) if dtype is DType.bool else value.to(x.dtype)
    shape = [low + d + high for low, d, high in zip(op.low, x.shape, op.high, strict=True)]
    result = plain(filler).expand(shape).clone()
    result[tuple(slice(low, low + d) for low, d in zip(op.low, x.shape, strict=True))] = plain(x)
    return result.view(x.dtype)


@torch_op(ops.Take)
def take(op: ops.Take, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.axis % x.ndim
    rows = plain(x).index_select(axis, indices.reshape(-1).to(torch.int64))
    return rows.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]).view(x.dtype)


@torch_op(ops.Gather)
def gather(op: ops.Gather, x: Tensor, indices: Tensor) -> Tensor:
    return torch.gather(plain(x), op.axis, indices.to(torch.int64)).view(x.dtype)


@torch_op(ops.Scatter)
def scatter(op: ops.Scatter, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return torch.scatter(plain(x), op.axis, indices.to(torch.int64), plain(updates)).view(x.dtype)


@torch_op(ops.IndexAdd)
def index_add(op: ops.IndexAdd, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """In float32; in the order of rows on the CPU, in any order on a GPU."""
    if not op.x.dtype.is_float:
        return x.index_add(0, indices.to(torch.int64), updates)
    wide = torch.float64 if op.x.dtype is DType.f64 else torch.float32
    return rounded(widen(x, wide).index_add(0, indices.to(torch.int64), widen(updates, wide)), op.x.dtype)


@torch_op(ops.CacheAppend)
def cache_append(op: ops.CacheAppend, cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    result = plain(cache).clone()
    result[torch.arange(len(new), device=cache.device), positions.to(torch.int64)] = plain(new)
    return result.view(cache.dtype)


VIEWS: tuple[type[Op], ...] = (ops.Reshape, ops.Transpose, ops.Broadcast, ops.Slice)
"""Ops whose torch function returns a view wherever torch can."""
