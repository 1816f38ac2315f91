"""Scaled dot-product attention."""

from __future__ import annotations

from ...ir.core import Value
from ...ir.ops.attention import Attention
from .rules import Emitter, aten, extent, unsupported
from .shape import reshaped


@aten("scaled_dot_product_attention")
def attention(
    b: Emitter,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """The scale is 1 / sqrt(width) unless given. Torch takes a single head without an axis for it, the IR does not."""
    if dropout_p:
        raise unsupported("attention with dropout", "a module in evaluation mode: call model.eval() first")
    rank = max(3, *(x.tensor.rank for x in (q, k, v)))
    batch = b.shape[:-2] if not enable_gqa else None

    def heads(x: Value) -> Value:
        lead = (1,) * (rank - x.tensor.rank) + tuple(x.shape[:-2])
        whole = reshaped(b, x, (*lead, *x.shape[-2:]))
        return whole if batch is None else b.stretch(whole, ((1,) * (rank - 2 - len(batch)) + batch) + tuple(x.shape[-2:]))

    made = Attention(heads(q), heads(k), heads(v), mask, extent(q, -1) ** -0.5 if scale is None else scale, is_causal)
    return reshaped(b, b.make(made), b.shape)
