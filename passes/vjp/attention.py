"""The derivative of attention."""

from __future__ import annotations

from ...ir.core import Value
from ...ir.ops.attention import Attention, AttentionBackward, AttentionDecode
from .rules import Backward, Gradients, missing, vjp

missing("second derivatives are not taken", AttentionBackward)
missing("decoding is not trained", AttentionDecode)


@vjp(Attention)
def attention(op: Attention, b: Backward, dy: Value) -> Gradients:
    """dq, dk and dv by one op, from q, k, v, the result and dy: probabilities are computed again, never kept."""
    b.refuse(op.mask, op, "the mask")
    dq, dk, dv = b.emit(AttentionBackward(op.q, op.k, op.v, op.result, b.cast(dy, op.q.dtype), op.mask, op.scale, op.causal)).results
    return b.fit(dq, op.q), b.fit(dk, op.k), b.fit(dv, op.v), *[None for _ in (op.mask,) if op.mask]
