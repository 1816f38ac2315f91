"""Derivatives of normalisation and rotary position embedding."""

from __future__ import annotations

from ...ir.core import Value
from ...ir.ops.norm import RmsNorm, RmsNormBackward, Rope
from .rules import Backward, Gradients, missing, vjp

missing("second derivatives are not taken", RmsNormBackward)


@vjp(RmsNorm)
def rms_norm(op: RmsNorm, b: Backward, dy: Value) -> Gradients:
    """With r = rsqrt(mean(x^2) + eps), n = x r and g = dy weight: dx = r (g - n mean(g n)), dweight = sum over rows of dy n."""
    dx, dweight = b.emit(RmsNormBackward(op.x, op.weight, b.cast(dy, op.x.dtype), op.eps)).results
    return b.fit(dx, op.x), b.fit(dweight, op.weight)


@vjp(Rope)
def rope(op: Rope, b: Backward, dy: Value) -> Gradients:
    """A rotation's gradient turns back: dx = rope(dy, cos, -sin)."""
    b.refuse(op.cos, op, "the table of angles")
    b.refuse(op.sin, op, "the table of angles")
    return b.fit(b.emit(Rope(dy, op.cos, b.neg(op.sin), op.interleaved)).result, op.x), None, None
