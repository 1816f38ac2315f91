"""Literals and bundles."""

from __future__ import annotations

import torch

from ....ir.ops import control as ops
from ....ir.types import DType
from ..tensors import DTYPES, Held, plain, rounded
from .registry import torch_op


@torch_op(ops.Literal)
def literal(op: ops.Literal) -> torch.Tensor:
    values = _stored(torch.tensor(op.values, dtype=torch.float64 if op.dtype.is_float else torch.int64), op.dtype)
    whole = values.numel() > 1 or op.result.tensor.size == 1
    return values.reshape(op.shape) if whole else plain(values).expand(op.shape).contiguous().view(values.dtype)


@torch_op(ops.Iota)
def iota(op: ops.Iota) -> torch.Tensor:
    numbers = op.start + op.step * torch.arange(op.length, dtype=torch.int64)
    return _stored(numbers.to(torch.float64) if op.dtype.is_float else numbers, op.dtype)


def _stored(numbers: torch.Tensor, dtype: DType) -> torch.Tensor:
    return rounded(numbers, dtype) if dtype.is_float else numbers.to(DTYPES[dtype])


@torch_op(ops.Pack)
def pack(op: ops.Pack, *values: Held) -> tuple[Held, ...]:
    return values


@torch_op(ops.Unpack)
def unpack(op: ops.Unpack, x: tuple[Held, ...]) -> Held:
    return x if len(x) != 1 else x[0]
