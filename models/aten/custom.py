"""The ops of `models.ops`: each is one op of the IR, most of them with the operands and attributes of torch's, in its order."""

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
from .rules import Emitter, OpClass, aten


def _alike(name: str, op: OpClass) -> None:
    @aten(name, namespace="dsc")
    def rule(b: Emitter, *arguments: Any) -> Value:
        return b.make(op(*arguments))


_op: OpClass

for _name, _op in (
    ("rope", Rope),
    ("combine", Combine),
    ("swiglu", SwiGLU),
    ("cache_append", CacheAppend),
    ("attention_decode", AttentionDecode),
    ("balance_loss", BalanceLoss),
):
    _alike(_name, _op)


@aten("route", namespace="dsc")
def route(b: Emitter, *arguments: Any) -> tuple[Value, ...]:
    return b.emit(Route(*arguments, names=("ids", "weights"))).results


@aten("dispatch", namespace="dsc")
def dispatch(b: Emitter, x: Value, ids: Value, experts: int) -> tuple[Value, ...]:
    """Torch's third result is the order, the IR's the handle that holds it."""
    return b.emit(Dispatch((x,), ids, experts, names=("rows", "counts", "handle"))).results


@aten("grouped_matmul", namespace="dsc")
def grouped_matmul(b: Emitter, x: Value, w: Value, counts: Value) -> Value:
    return b.make(GroupedMatmul(x, w, counts, transpose_b=True))
