"""Reductions, scans, softmax, sorting and counting."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ....ir.core import Op
from ....ir.ops import reduce as ops
from .registry import torch_op

Tensor = torch.Tensor


REDUCTIONS: dict[type[Op], Callable[..., Tensor]] = {
    ops.Sum: lambda x, *how: torch.sum(x, *how, dtype=x.dtype),
    ops.Mean: torch.mean,
    ops.Max: torch.amax,
    ops.Min: torch.amin,
    ops.Any: torch.any,
    ops.All: torch.all,
}


@torch_op(*REDUCTIONS, operands="wide")
def reduction(op: ops.Reduction | ops.Quantified, x: Tensor) -> Tensor:
    """Over nothing it is x itself: torch takes an empty list of axes for all of them."""
    return REDUCTIONS[type(op)](x, [a % x.ndim for a in op.axes], op.keepdims) if op.axes else x


@torch_op(ops.ArgMax, operands="wide")
def argmax(op: ops.ArgMax, x: Tensor) -> Tensor:
    """Of equals the first, by a stable sort: torch.argmax does not say which."""
    comparable = x.to(torch.int8) if x.dtype == torch.bool else x
    first = torch.sort(comparable, dim=op.axis, descending=True, stable=True).indices.narrow(op.axis, 0, 1)
    return first if op.keepdims else first.squeeze(op.axis)


@torch_op(ops.CumSum, operands="wide")
def cumsum(op: ops.CumSum, x: Tensor) -> Tensor:
    return torch.cumsum(x, op.axis, dtype=x.dtype)


@torch_op(ops.Softmax, operands="wide")
def softmax(op: ops.Softmax, x: Tensor) -> Tensor:
    return torch.softmax(x, op.axis)


@torch_op(ops.LogSoftmax, operands="wide")
def log_softmax(op: ops.LogSoftmax, x: Tensor) -> Tensor:
    return torch.log_softmax(x, op.axis)


@torch_op(ops.TopK, operands="wide")
def topk(op: ops.TopK, x: Tensor) -> tuple[Tensor, Tensor]:
    best = torch.sort(x, dim=op.axis, descending=True, stable=True)
    return best.values.narrow(op.axis, 0, op.k), best.indices.narrow(op.axis, 0, op.k)


@torch_op(ops.Sort, operands="wide")
def sort(op: ops.Sort, x: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.sort(x, dim=op.axis, descending=op.descending, stable=True)
    return found.values, found.indices


@torch_op(ops.Histogram)
def histogram(op: ops.Histogram, x: Tensor) -> Tensor:
    """Numbers outside are counted in a bin of their own, which is dropped: nothing waits for the GPU."""
    bins = torch.where((x >= 0) & (x < op.bins), x, op.bins).reshape(-1).to(torch.int64)
    counted = torch.zeros(op.bins + 1, dtype=torch.int32, device=x.device)
    return counted.index_add(0, bins, torch.ones_like(bins, dtype=torch.int32))[: op.bins]
