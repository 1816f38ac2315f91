"""Dgrad and Wgrad of a quantised product (DeepSeek-V3 report, section 3.3).

A Linear y = x W^T whose Fprop is quantised is so backward, too:

    Dgrad  dx = dy W     dy in tiles of 1x128, along what is summed over; the codes of W are transposed, its blocks of 128x128 with them
    Wgrad  dW = dy^T x   dy and x in tiles of 128x1, over the tokens that are summed over; the result is float32

Of experts the tiles of 128x1 restart at each expert, whose tokens alone its gradient sums over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..ir.core import Builder, Value
from ..ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad, Matmul
from ..ir.ops.moe import Redispatch
from ..ir.ops.quant import Dequantize, GroupedScaledMatmulWgrad, ScaledMatmul
from ..ir.ops.shape import Transpose
from .recipe import Quantization

if TYPE_CHECKING:
    from .quantize_fp8 import Rule

Replacement = Sequence[Value] | None


def turned(chosen: Quantization) -> Quantization:
    """The same decision for the other use of a value: tiles along tokens where they were along channels."""
    return replace(chosen, tile=chosen.tile[::-1])


def dgrad(rule: Rule, op: Matmul, b: Builder) -> Replacement:
    """dy W, in place of the gradient of a Linear's input."""
    reason = _why_not(rule, op)
    return rule.decline(op, reason) if reason else rule.linear(op, rule.recipe.gradient, b, backward=True)


def grouped_dgrad(rule: Rule, op: GroupedMatmul, b: Builder) -> Replacement:
    """dy W of each expert."""
    reason = _why_not(rule, op)
    return rule.decline(op, reason) if reason else rule.experts(op, rule.recipe.gradient, b, backward=True)


def wgrad(rule: Rule, op: Matmul | GroupedMatmulWgrad, b: Builder) -> Replacement:
    """dy^T x, in place of the gradient of a weight; of experts over the tokens of each."""
    if reason := _why_not(rule, op):
        return rule.decline(op, reason)
    assert rule.recipe.gradient
    assert rule.recipe.activation
    of_dy, of_x = turned(rule.recipe.gradient), turned(rule.recipe.activation)
    how = rule.recipe.accumulation, op.result.dtype
    if isinstance(op, GroupedMatmulWgrad):
        operands = *rule.quantize(op.a, of_dy, b, op.counts), *rule.quantize(op.b, of_x, b, op.counts)
        return b.emit(GroupedScaledMatmulWgrad(*operands, op.counts, rule.tile(of_dy, op.a), rule.tile(of_x, op.b), *how)).results
    dy = op.a.owner.x if isinstance(op.a.owner, Transpose) and op.a.owner.perm == (1, 0) else _transposed(op.a, b)
    operands = *transposed(rule.quantize(dy, of_dy, b), b), *transposed(rule.quantize(op.b, of_x, b), b)
    return b.emit(ScaledMatmul(*operands, rule.tile(of_dy, dy)[::-1], rule.tile(of_x, op.b)[::-1], *how)).results


def redispatch(rule: Rule, op: Redispatch, x: Value, chosen: Quantization, b: Builder) -> Replacement:
    """Gradients go to the experts as tokens do: quantised, their scales with them."""
    codes, scales = rule.quantize(x, chosen, b)
    sent = b.emit(Redispatch((codes, scales), op.handle, id=op.id, phase=op.phase, names=("sent_q", "sent_s")))
    rows, row_scales = sent.results
    wide = b.emit(Dequantize(rows, row_scales, tile=chosen.tile, dtype=x.dtype, id=f"{op.id}.2", phase=op.phase)).result
    rule.sent[wide] = (rows, row_scales), chosen.tile
    return (wide,)


def _why_not(rule: Rule, op: Matmul | GroupedMatmul | GroupedMatmulWgrad) -> str:
    """Why a product backward stays as it is; empty where it does not."""
    reason = rule.reason_of_forward(op.id)
    if reason is None:
        return "neither operand is a weight"
    if reason:
        return f"its forward product stays as it is: {reason}"
    if rule.recipe.gradient is None:
        return f"recipe {rule.recipe.name} does not quantise gradients"
    return ""


def transposed(quantized: tuple[Value, Value], b: Builder) -> tuple[Value, Value]:
    """Codes and scales, the rows of each matrix as its columns."""
    return _transposed(quantized[0], b), _transposed(quantized[1], b)


def _transposed(x: Value, b: Builder) -> Value:
    rank = x.tensor.rank
    return b.emit(Transpose(x, (*range(rank - 2), rank - 1, rank - 2))).result
