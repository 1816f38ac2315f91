"""Derivatives of quantisation: straight through, as if codes times scales were the value itself.

So the gradient of `dequantize` is taken for that of its codes, scales get none, and `quantize` hands it on. A program that quantises by a
recipe is differentiated first: quantised products come after, forward and backward each as the recipe says.
"""

from __future__ import annotations

from ...ir.core import Value
from ...ir.ops.quant import Dequantize, GroupedScaledMatmul, GroupedScaledMatmulWgrad, Quantize, ScaledMatmul
from .rules import Backward, Gradients, missing, vjp

missing("a program is differentiated before its products are quantised", ScaledMatmul, GroupedScaledMatmul, GroupedScaledMatmulWgrad)


@vjp(Quantize)
def quantize(op: Quantize, b: Backward, dcodes: Value | None, dscales: Value | None) -> Gradients:
    """dx = dcodes, unchanged."""
    dx = None if dcodes is None else b.fit(dcodes, op.x)
    return dx, *[None for _ in (op.counts,) if op.counts]


@vjp(Dequantize)
def dequantize(op: Dequantize, b: Backward, dy: Value) -> Gradients:
    """dcodes = dy, unchanged; scales have no gradient."""
    return b.fit(dy, op.codes), None, *[None for _ in (op.counts,) if op.counts]
