"""RMSNorm and rotary position embedding."""

from __future__ import annotations

import torch

from ....ir.ops import norm as ops
from .registry import torch_op


@torch_op(ops.RmsNorm, operands="wide")
def rms_norm(op: ops.RmsNorm, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (1 / torch.sqrt((x * x).mean(-1, keepdim=True) + op.eps)) * weight


@torch_op(ops.Rope, operands="wide")
def rope(op: ops.Rope, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if op.interleaved else (slice(0, half), slice(half, None))
    a, b, cos, sin = x[..., first], x[..., second], cos[..., None, :], sin[..., None, :]
    result = torch.empty_like(x)
    result[..., first] = a * cos - b * sin
    result[..., second] = b * cos + a * sin
    return result


@torch_op(ops.RmsNormBackward, operands="wide")
def rms_norm_backward(
    op: ops.RmsNormBackward, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.sqrt((x * x).mean(-1, keepdim=True) + op.eps)
    normed = x / scale
    dweight = (dy * normed).reshape(-1, x.shape[-1]).sum(0)
    dx = dy * weight
    return (dx - normed * (dx * normed).mean(-1, keepdim=True)) / scale, dweight
