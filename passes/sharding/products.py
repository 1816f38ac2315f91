"""Rules of matrix products and of quantisation.

Weights stay where they are: what is spread in their way is gathered from the other operand. A product whose inner dimension is spread gives
a part of the sum.
"""

from __future__ import annotations

from ...ir.core import Op, Value
from ...ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad, Matmul
from ...ir.ops.quant import Dequantize, GroupedScaledMatmul, GroupedScaledMatmulWgrad, Quantize, ScaledMatmul
from .body import Body, sharding
from .layout import Dim, Factor, Layout, Rows, axes, canonical, gathered, whole
from .rules import joined, keep, stretched
from .tiles import finer, scale_layout


@sharding(Matmul)
def matmul(body: Body, op: Matmul) -> None:
    a, b, result = _operands(body, op.a, op.b, op.transpose_b)
    keep(body, op, body.emit(op.copy(a=body.get(op.a, a), b=body.get(op.b, b))), result)


@sharding(ScaledMatmul)
def scaled_matmul(body: Body, op: ScaledMatmul) -> None:
    a, b, result = _operands(body, op.a, op.b, True)
    codes, scales, a_tile = body.quantized(op.a, op.a_scales, a, op.a_tile)
    w, w_scales, b_tile = body.quantized(op.b, op.b_scales, b, op.b_tile)
    keep(body, op, body.emit(op.copy(a=codes, a_scales=scales, b=w, b_scales=w_scales, a_tile=a_tile, b_tile=b_tile)), result)


def _operands(body: Body, a: Value, b: Value, transposed: bool) -> tuple[Layout, Layout, Layout]:
    """Where a product's operands are wanted, and where its result is."""
    left, right = list(body.dims(a)), list(body.dims(b))
    inner, outer = (-1, -2) if transposed else (-2, -1)
    if len(right) > 2:
        shape = _stacks(a, b)
        lead = joined(body, [a, b], [*shape, 0, 0])[: len(shape)]
        left[:-2] = stretched(a, (*lead, *left[-2:]), (*shape, *a.shape[-2:]))[:-2]
        right[:-2] = stretched(b, (*lead, *right[-2:]), (*shape, *b.shape[-2:]))[:-2]
    fixed_left, fixed_right = body.is_weight(a), body.is_weight(b)
    rows, columns = {x for d in left[:-1] for x in axes(d)}, axes(right[outer])
    for axis in axes(left[-1]) | axes(right[inner]):
        if axis in axes(left[-1]) and axis in axes(right[inner]):
            continue
        ours, others = (left, columns) if axis in axes(left[-1]) else (right, rows)
        if axis in others:  # the other operand needs it for its own dimension: the sum is not split
            at = -1 if ours is left else inner
            ours[at] = gathered(ours[at], {axis})
    if not (axes(left[-1]) and left[-1] == right[inner]):
        wider = left[-1] if axes(left[-1]) >= axes(right[inner]) else right[inner]
        within = axes(left[-1]) <= axes(wider) and axes(right[inner]) <= axes(wider)
        left[-1] = right[inner] = wider if within else gathered(left[-1], axes(left[-1]))
    for axis in rows & columns:
        if fixed_right or not fixed_left:
            left[:-1] = [gathered(d, {axis}) for d in left[:-1]]
        else:
            right[outer] = gathered(right[outer], {axis})
    inner_axes = frozenset(axes(left[-1]))
    return Layout(tuple(left)), Layout(tuple(right)), Layout((*left[:-1], right[outer]), inner_axes)


def _stacks(a: Value, b: Value) -> tuple[object, ...]:
    """The leading dimensions of a product of stacks of matrices."""
    longer, shorter = (a.shape[:-2], b.shape[:-2]) if a.tensor.rank >= b.tensor.rank else (b.shape[:-2], a.shape[:-2])
    pad = len(longer) - len(shorter)
    return tuple(d if i < pad or d != 1 else shorter[i - pad] for i, d in enumerate(longer))


@sharding(Quantize)
def quantize(body: Body, op: Quantize) -> None:
    """Tiles restart at each rank, as those of experts restart at each expert."""
    have = body.layout(op.x).summed()
    made = body.quantize(op, have)
    body.set(op.results[0], have, made.results[0])
    if isinstance(have.dims[-2], Rows):
        extent = made.results[1].shape[-2]
        scales = Layout((Rows(extent), *whole(made.results[1].shape[1:]).dims))
    else:
        scales = scale_layout(have, op.tile)
    body.set(op.results[1], scales, made.results[1])


@sharding(Dequantize)
def dequantize(body: Body, op: Dequantize) -> None:
    have = body.layout(op.codes)
    scales, tile = finer(body, op.scales, have, op.tile)
    made = op.copy(codes=body.form(op.codes), scales=scales, counts=op.counts and body.form(op.counts), tile=tile)
    keep(body, op, body.emit(made), have)


@sharding(GroupedMatmul, GroupedScaledMatmul)
def grouped(body: Body, op: GroupedMatmul | GroupedScaledMatmul) -> None:
    """The rows that a rank has, by the experts that it has."""
    made = body.emit(op.with_operands(body.form))
    keep(body, op, made, Layout((Rows(made.result.shape[0]), *whole(made.result.shape[1:]).dims)))


@sharding(GroupedMatmulWgrad, GroupedScaledMatmulWgrad)
def grouped_wgrad(body: Body, op: GroupedMatmulWgrad | GroupedScaledMatmulWgrad) -> None:
    """Ranks that hold the same experts have other tokens: a part of the sum."""
    made: Op = body.emit(op.with_operands(body.form))
    experts: Dim = body.dims(op.counts)[0]
    keep(body, op, made, Layout((experts, *whole(op.result.shape[1:]).dims), partial_of_experts(body)))


def partial_of_experts(body: Body) -> frozenset[str]:
    """Along which axes sums over the rows of an expert are partial."""
    return frozenset({"edp"}) if body.size("edp") > 1 else frozenset()


def spread_experts(body: Body, experts: int) -> Dim:
    """How a dimension of all experts lies."""
    ep = body.size("ep")
    return canonical([Factor(ep, "ep"), Factor(experts // ep)])
