"""Ops that are their expansion, where their kernels decline: one of its ops after the other."""

from __future__ import annotations

from ....ir.core import Module, Op
from ....ir.ops import elementwise, norm
from ....ir.ops import fused as ops
from ..tensors import Held
from .registry import run, torch_op


@torch_op(norm.RmsNorm, norm.RmsNormBackward, norm.Rope, elementwise.SwiGLUBackward)
@torch_op(*(cls for cls in ops.NAMED if cls is not ops.GroupedScaledMatmulAdd))
@torch_op(ops.GroupedScaledMatmulAdd, waits=True)
def by_expansion(op: Op, *operands: Held, module: Module | None = None) -> Held:
    func = ops.expansion(op, module)
    assert func is not None
    values = dict(zip(func.params, dict(zip(op.operands, operands, strict=True)).values(), strict=True))
    for inner in func.ops:
        values.update(zip(inner.results, run(inner, tuple(values[v] for v in inner.operands)), strict=True))
    found = tuple(values[v] for v in func.results)
    return found if len(found) > 1 else found[0]
