"""What an op costs on a device: a roofline, the longer of computing and of moving bytes (Williams et al., CACM 52(4), 2009)."""

from __future__ import annotations

from ..ir.core import Op, Trait, Value
from ..ir.ops.attention import Attention, AttentionBackward, AttentionDecode
from ..ir.ops.control import Call
from ..ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad, Matmul
from ..ir.ops.quant import GroupedScaledMatmul, GroupedScaledMatmulWgrad, ScaledMatmul
from ..ir.types import Tensor
from .device import Device

MATRIX = (
    Matmul,
    GroupedMatmul,
    GroupedMatmulWgrad,
    ScaledMatmul,
    GroupedScaledMatmul,
    GroupedScaledMatmulWgrad,
    Attention,
    AttentionBackward,
    AttentionDecode,
)
"""Ops that run on matrix units; all others on vector units."""


def seconds(op: Op, device: Device) -> float:
    """The least time that `op` takes on `device`: max(FLOPs / rate, bytes read and written / bandwidth).

    A view, a weight on its way to its reader and a bundle move nothing: 0. A call costs what it runs, which is for the caller to add up.
    """
    if Trait.VIEW in op.traits or Trait.SOURCE in op.traits or isinstance(op, Call):
        return 0.0
    moved = sum(v.type.bytes for v in dict.fromkeys((*op.operands, *op.results)))
    return max(op.flops() / rate(op, device), moved / device.peak.bandwidth)


def rate(op: Op, device: Device) -> float:
    """Operations per second of the units that `op` runs on."""
    return _matrix(op.operands[0], device) if isinstance(op, MATRIX) else device.peak.vector


def _matrix(operand: Value, device: Device) -> float:
    type, peak = operand.type, device.peak
    rates = {"f64": peak.f64, "f32": peak.f32, "f16": peak.f16, "bf16": peak.bf16}
    return rates.get(type.dtype.name, peak.f8) if isinstance(type, Tensor) else peak.f32
