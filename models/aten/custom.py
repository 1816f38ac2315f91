"""The ops of `models.ops`: each is one op of the IR."""

from __future__ import annotations

from typing import Any

from ...ir.core import Value
from ...ir.ops.attention import AttentionDecode
from ...ir.ops.elementwise import SwiGLU
from ...ir.ops.linalg import GroupedMatmul
from ...ir.ops.loss import BalanceLoss
from ...ir.ops.moe import Combine, Dispatch, Route
from ...ir.ops.norm import Rope
from ...ir.ops.shape import CacheAppend
from .rules import Emitter, aten


@aten("rope", namespace="dsc")
def rope(b: Emitter, x: Value, cos: Value, sin: Value, interleaved: bool) -> Value:
    return b.make(Rope(x, cos, sin, interleaved))


@aten("route", namespace="dsc")
def route(b: Emitter, logits: Value, bias: Value | None, *options: Any) -> tuple[Value, ...]:
    """`options` in the order that both declare: top_k, score, groups, top_groups, group_score, normalize, scale."""
    return b.emit(Route(logits, bias, *options, names=("ids", "weights"))).results


@aten("dispatch", namespace="dsc")
def dispatch(b: Emitter, x: Value, ids: Value, experts: int) -> tuple[Value, ...]:
    """Torch's third result is the order, the IR's the handle that holds it."""
    return b.emit(Dispatch((x,), ids, experts, names=("rows", "counts", "handle"))).results


@aten("combine", namespace="dsc")
def combine(b: Emitter, rows: Value, handle: Value, weights: Value) -> Value:
    return b.make(Combine(rows, handle, weights))


@aten("grouped_matmul", namespace="dsc")
def grouped_matmul(b: Emitter, x: Value, w: Value, counts: Value) -> Value:
    return b.make(GroupedMatmul(x, w, counts, transpose_b=True))


@aten("swiglu", namespace="dsc")
def swiglu(b: Emitter, gate: Value, up: Value) -> Value:
    return b.make(SwiGLU(gate, up))


@aten("cache_append", namespace="dsc")
def cache_append(b: Emitter, cache: Value, new: Value, positions: Value) -> Value:
    return b.make(CacheAppend(cache, new, positions))


@aten("attention_decode", namespace="dsc")
def attention_decode(b: Emitter, q: Value, k: Value, v: Value, positions: Value, scale: float) -> Value:
    return b.make(AttentionDecode(q, k, v, positions, scale))


@aten("balance_loss", namespace="dsc")
def balance_loss(b: Emitter, logits: Value, ids: Value, sequences: int, score: Any) -> Value:
    return b.make(BalanceLoss(logits, ids, sequences, score))
