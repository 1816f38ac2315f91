"""Derivatives of the mixture of experts: gradients go the ways of the tokens, backwards, by the handle of the forward pass.

The backward of dispatch is combine with the same handle, and the backward of combine is dispatch with the same handle. The choice of
experts is taken for constant: gradients reach the logits through the weights of the chosen experts alone.
"""

from __future__ import annotations

from ...ir.core import Value
from ...ir.ops.control import Literal
from ...ir.ops.moe import (
    ChooseSlots,
    Combine,
    CombineGroups,
    Dispatch,
    DispatchGroups,
    Redispatch,
    Route,
    RouteBackward,
    RowWeights,
    SlotWeights,
)
from ...ir.ops.reduce import Sum
from ...ir.types import DType
from .rules import Backward, Gradients, extents, missing, vjp

missing("second derivatives are not taken", RouteBackward, Redispatch)
missing("shard-experts makes it, and works on what is differentiated already", DispatchGroups, CombineGroups)
missing("an expert that is held several times is not trained: place-experts is for inference", ChooseSlots)


@vjp(Route)
def route(op: Route, b: Backward, _: None, dweights: Value) -> Gradients:
    """dlogits from the weights of the chosen experts, through normalisation and scale. The choice has no gradient, nor has the bias.

    The loads move the bias, by a rule of their own (DeepSeek-V3 report, section 2.1.2).
    """
    dlogits = b.emit(RouteBackward(op.logits, op.results[0], dweights, op.score, op.normalize, op.scale)).result
    return b.fit(dlogits, op.logits), *[None for _ in (op.bias,) if op.bias]


@vjp(Dispatch)
def dispatch(op: Dispatch, b: Backward, *dys: Value | None) -> Gradients:
    """dx[t] = sum of the gradients of the rows that token t became: combine with weights of one."""
    ones = b.emit(Literal((1.0,), extents(op.ids), DType.f32)).result
    rows = (None if dy is None else b.emit(Combine(dy, op.handle, ones)).result for dy in dys[: len(op.xs)])
    return *(None if dx is None else b.fit(dx, x) for dx, x in zip(rows, op.xs, strict=True)), None


@vjp(Combine)
def combine(op: Combine, b: Backward, dy: Value) -> Gradients:
    """dy goes to the experts by the handle; there drows = weight dy, dweights = the dot product of row and dy."""
    (sent,) = b.emit(Redispatch((b.cast(dy, op.rows.dtype),), op.handle)).results
    drows, wide, dweights = sent, b.wide(sent), None
    if not op.is_sum:
        drows = b.mul(wide, b.emit(RowWeights(b.cast(op.weights, wide.dtype), op.handle)).result)
    if b.wants(op.weights):
        dots = b.emit(Sum(b.mul(b.wide(op.rows), wide), axes=(1,), keepdims=True)).result
        dweights = b.fit(b.emit(SlotWeights(dots, op.handle, extents(op.weights)[1])).result, op.weights)
    return b.fit(drows, op.rows), None, dweights


@vjp(RowWeights)
def row_weights(op: RowWeights, b: Backward, dy: Value) -> Gradients:
    """Each row's gradient is that of its token's slot."""
    return b.fit(b.emit(SlotWeights(dy, op.handle, extents(op.weights)[1])).result, op.weights), None


@vjp(SlotWeights)
def slot_weights(op: SlotWeights, b: Backward, dy: Value) -> Gradients:
    """The inverse."""
    return b.fit(b.emit(RowWeights(dy, op.handle)).result, op.rows), None
