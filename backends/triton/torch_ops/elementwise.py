"""Elementwise ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ....ir.core import Op
from ....ir.ops import elementwise as ops
from ....ir.types import DType
from ..tensors import DTYPES, plain, rounded, widen
from .registry import torch_op

Tensor = torch.Tensor


def larger(x: Tensor, y: Tensor) -> Tensor:
    """`torch.maximum` gives either of 0 and -0; their sum is 0."""
    return torch.where((x == 0) & (y == 0), x + y, torch.maximum(x, y))


def smaller(x: Tensor, y: Tensor) -> Tensor:
    """Likewise -0."""
    return -larger(-x, -y) if x.dtype.is_floating_point else torch.minimum(x, y)


UNARY: dict[type[Op], Callable[[Tensor], Tensor]] = {
    ops.Neg: torch.neg,
    ops.Abs: torch.abs,
    ops.Exp: torch.exp,
    ops.Log: torch.log,
    ops.Sqrt: lambda x: torch.sqrt(x.to(torch.float64)).to(x.dtype),  # torch's own root of float32 is an ulp off on some CPUs
    ops.Rsqrt: lambda x: 1 / torch.sqrt(x),
    ops.Sin: torch.sin,
    ops.Cos: torch.cos,
    ops.Tanh: torch.tanh,
    ops.Erf: torch.erf,
    ops.Floor: torch.floor,
    ops.Sigmoid: lambda x: 1 / (1 + torch.exp(-x)),
    ops.Silu: lambda x: x / (1 + torch.exp(-x)),
    ops.Relu: torch.relu,
    ops.Not: torch.logical_not,
}

BINARY: dict[type[Op], Callable[[Tensor, Tensor], Tensor]] = {
    ops.Add: torch.add,
    ops.Sub: torch.sub,
    ops.Mul: torch.mul,
    ops.Div: lambda a, b: a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="floor"),
    ops.Remainder: torch.remainder,
    ops.Pow: torch.pow,
    ops.Maximum: larger,
    ops.Minimum: smaller,
    ops.Eq: torch.eq,
    ops.Ne: torch.ne,
    ops.Lt: torch.lt,
    ops.Le: torch.le,
    ops.Gt: torch.gt,
    ops.Ge: torch.ge,
    ops.And: torch.logical_and,
    ops.Or: torch.logical_or,
}


@torch_op(*UNARY, operands="wide")
def unary(op: Op, x: Tensor) -> Tensor:
    return UNARY[type(op)](x)


@torch_op(*BINARY, operands="wide")
def binary(op: Op, a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.is_floating_point != b.dtype.is_floating_point:  # an integer scalar next to a float tensor becomes a float
        a, b = (a, b.to(a.dtype)) if a.dtype.is_floating_point else (a.to(b.dtype), b)
    return BINARY[type(op)](a, b)


@torch_op(ops.Cast)
def cast(op: ops.Cast, x: Tensor) -> Tensor:
    return convert(x, op.x.dtype, op.dtype)


def convert(x: Tensor, source: DType, target: DType) -> Tensor:
    """`x`, whose elements are of `source`, as the cast op gives it in `target`."""
    if source is target:
        return x
    if source.is_float and target.is_float:
        return rounded(x if source is DType.f64 else widen(x), target)
    if source.is_float:
        wide = x if source is DType.f64 else widen(x)
        return wide != 0 if target is DType.bool else _toward_zero(wide, DTYPES[target])
    if target is DType.bool:
        return x != 0
    if not target.is_float or target in (DType.f32, DType.f64):
        return x.to(DTYPES[target])
    return rounded(x.to(torch.float64), target)  # exact up to 2^53, so narrower formats round once


def _toward_zero(x: Tensor, target: torch.dtype) -> Tensor:
    """Truncated; what lies beyond the range becomes its end, NaN becomes 0. In float64 every bound but that of int64 is a number."""
    limits = torch.iinfo(target)
    whole = x.to(torch.float64).nan_to_num(0.0).trunc()
    above, below = whole >= float(limits.max), whole <= float(limits.min)
    inside = torch.where(above | below, 0.0, whole).to(target)
    return torch.where(above, limits.max, torch.where(below, limits.min, inside)).to(target)


@torch_op(ops.Where)
def where(op: ops.Where, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    dtype = op.result.dtype
    a, b = convert(a, op.a.dtype, dtype), convert(b, op.b.dtype, dtype)
    return torch.where(condition, plain(a), plain(b)).view(a.dtype)


@torch_op(ops.SwiGLU, operands="wide")
def swiglu(op: ops.SwiGLU, gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Any:
    y = gate / (1 + torch.exp(-gate)) * up
    return y if weight is None else y * weight
