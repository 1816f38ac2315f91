"""Fused ops, where their kernels decline: one op of the expansion after the other."""

from __future__ import annotations

from ....ir.core import Op
from ....ir.ops import fused as ops
from ..tensors import Held
from .registry import run, torch_op


@torch_op(ops.RmsNormQuantize, ops.SwiGLUQuantize, ops.ScaledMatmulAdd, ops.RmsNormBackwardAdd)
@torch_op(ops.GroupedScaledMatmulAdd, waits=True)
def by_expansion(op: Op, *operands: Held) -> Held:
    func = ops.expansion(op)
    assert func is not None
    values = dict(zip(op.operands, operands, strict=True))
    for inner in func.ops:
        values.update(zip(inner.results, run(inner, tuple(values[v] for v in inner.operands)), strict=True))
    found = tuple(values[v] for v in func.results)
    return found if len(found) > 1 else found[0]
