"""Routing weights inside SwiGLU: what an expert's row counts for in its token's sum is applied before the down projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir.core import Builder, Func, Module, Op, Value, users
from ..ir.ops.control import Literal
from ..ir.ops.elementwise import SwiGLU
from ..ir.ops.linalg import GroupedMatmul
from ..ir.ops.moe import Combine, RowWeights
from ..ir.ops.rules import static
from ..ir.types import DType
from .manager import Pass, register
from .rewrite import rebuild


@register
@dataclass(frozen=True)
class WeightedSwiGLU(Pass):
    """Apply the weights of routed experts inside SwiGLU instead of to what the down projection gives.

    A projection is linear, so weight * down(swiglu(gate, up)) is down(weight * swiglu(gate, up)): the same number but for where it is
    rounded. The weights travel to the experts once, forward, and their gradient is a dot product of what the projection reads. So what it
    gives, [rows, H] and the largest residual of a layer of experts, is kept no longer. DeepSeek's kernels do so
    (`swiglu_forward_with_weight` in deepseek-ai/profile-data, train.json), and the weighted SwiGLU of Megatron-LM.

    Before `weighted-swiglu`:

        func @f(%x: bf16[4, 8], %ids: i32[4, 2], %weights: f32[4, 2], %up: bf16[3, 8, 8], %down: bf16[3, 8, 8]) {
          %rows: bf16[8, 8], %counts: i32[3], %handle: bundle{i32[8]} = dispatch([%x], %ids, experts=3)  @ f#1 F
          %u: bf16[8, 8] = grouped_matmul(%rows, %up, %counts)    @ f#2 F
          %s: bf16[8, 8] = swiglu(%u, %u)                         @ f#3 F
          %y: bf16[8, 8] = grouped_matmul(%s, %down, %counts)     @ f#4 F
          %out: bf16[4, 8] = combine(%y, %handle, %weights)       @ f#5 F
          return %out
        }

    after:

        func @f(%x: bf16[4, 8], %ids: i32[4, 2], %weights: f32[4, 2], %up: bf16[3, 8, 8], %down: bf16[3, 8, 8]) {
          %rows: bf16[8, 8], %counts: i32[3], %handle: bundle{i32[8]} = dispatch([%x], %ids, experts=3)  @ f#1 F
          %u: bf16[8, 8] = grouped_matmul(%rows, %up, %counts)    @ f#2 F
          %row_weights: f32[8, 1] = row_weights(%weights, %handle)  @ f#3.1 F
          %s: bf16[8, 8] = swiglu(%u, %u, weight=%row_weights)    @ f#3 F
          %y: bf16[8, 8] = grouped_matmul(%s, %down, %counts)     @ f#4 F
          %literal: f32[4, 2] = literal([1.0], [4, 2], f32)       @ f#5.1 F
          %out: bf16[4, 8] = combine(%y, %handle, %literal)       @ f#5 F
          return %out
        }
    """

    name: ClassVar[str] = "weighted-swiglu"
    requires: ClassVar[str] = "traced"

    def __call__(self, module: Module) -> Module:
        return module.map(self._weighted)

    def _weighted(self, func: Func) -> Func:
        read = users(func)
        chosen: dict[Op, Combine] = {}
        for op in func.ops:
            if isinstance(op, Combine) and not op.is_sum:
                found = _activation(func, op, read)
                if isinstance(found, str):
                    self.decline(func, op, found)
                else:
                    chosen[found] = op
        combines = set(chosen.values())
        olds = iter(func.ops)
        values: dict[Value, Value] = {}

        def rule(op: Op, b: Builder) -> Sequence[Value] | None:
            old = next(olds)
            values.update(zip(old.results, op.results, strict=True))
            if isinstance(op, SwiGLU) and old in chosen:
                weights, handle = (values.get(v, v) for v in (chosen[old].weights, chosen[old].handle))
                weight = b.emit(RowWeights(weights, handle, names=("row_weights",))).result
                return b.emit(SwiGLU(op.gate, op.up, weight)).results
            if isinstance(op, Combine) and old in combines:
                ones = b.emit(Literal((1.0,), static(op.weights, self.name), op.weights.dtype)).result
                return b.emit(op.copy(id="", weights=ones)).results
            return None

        return rebuild(func, rule) if chosen else func


def _activation(func: Func, combine: Combine, read: Mapping[Value, Sequence[Op]]) -> SwiGLU | str:
    """The SwiGLU whose result a projection of each expert turns into what is combined; or what is in the way of weighing that."""
    down = combine.rows.owner
    if not isinstance(down, GroupedMatmul):
        return f"%{combine.rows.name} is no product of experts' rows"
    found = down.x.owner
    if not isinstance(found, SwiGLU) or found.weight:
        return f"%{down.x.name}, which the projection of %{combine.rows.name} reads, is no swiglu without a weight"
    for value in (combine.rows, down.x):
        if len(read[value]) > 1 or value in func.results:
            return f"%{value.name} is read elsewhere too"
    expected = SwiGLU(found.gate, found.up).result.dtype
    if combine.weights.dtype is not (DType.f64 if expected is DType.f64 else DType.f32):
        return f"its weights are {combine.weights.type}, beside rows of {expected}"
    if combine.weights.owner and func.ops.index(combine.weights.owner) > func.ops.index(found):
        return f"%{combine.weights.name} is made after %{down.x.name}"
    return found
