"""Derivatives of the training losses."""

from __future__ import annotations

from ...ir.core import Value
from ...ir.ops.loss import BalanceLoss, BalanceLossBackward, CrossEntropy, CrossEntropyBackward
from .rules import Backward, Gradients, missing, vjp

missing("second derivatives are not taken", CrossEntropyBackward, BalanceLossBackward)


@vjp(CrossEntropy)
def cross_entropy(op: CrossEntropy, b: Backward, dy: Value) -> Gradients:
    """dlogits = dy (softmax(logits) - onehot(label)) / n at the n tokens that count."""
    return b.fit(b.emit(CrossEntropyBackward(op.logits, op.labels, dy, op.ignore)).result, op.logits), None


@vjp(BalanceLoss)
def balance_loss(op: BalanceLoss, b: Backward, dy: Value) -> Gradients:
    """Through the mean scores P_i; how often an expert was chosen is taken for constant."""
    return b.fit(b.emit(BalanceLossBackward(op.logits, op.ids, dy, op.sequences, op.score)).result, op.logits), None
