"""Samples of every op: one table that drives everything tested for each op.

Its type rule, its text, its reference, its derivative, its kernels, its exports: all of them go through `SAMPLES`, so a new op is tested by
adding its lines here. Sizes are odd on purpose: rank 3 and more, extents of 1, widths that are no multiple of 128, groups without rows.
"""

from __future__ import annotations

import math

import numpy as np

from ..ir.core import OPS, Op, Symbol
from ..ir.ops import fused
from ..ir.ops.attention import Attention, AttentionBackward, AttentionDecode
from ..ir.ops.collective import AllGather, AllReduce, AllToAll, AllToAllRows, Done, OwnPart, ReduceScatter
from ..ir.ops.control import Call, Constant, Iota, Literal, Pack, Param, Unpack
from ..ir.ops.elementwise import (
    Abs,
    Arithmetic,
    Cast,
    Comparison,
    Cos,
    Div,
    Erf,
    Exp,
    Floor,
    Log,
    Logical,
    Maximum,
    Minimum,
    Neg,
    Not,
    Pow,
    Relu,
    Remainder,
    Rsqrt,
    Sigmoid,
    Silu,
    Sin,
    Sqrt,
    SwiGLU,
    SwiGLUBackward,
    Tanh,
    Where,
)
from ..ir.ops.internode import InternodeCombine, InternodeDispatch, InternodeRedispatch
from ..ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad, Matmul
from ..ir.ops.loss import BalanceLoss, BalanceLossBackward, CrossEntropy, CrossEntropyBackward
from ..ir.ops.moe import (
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
from ..ir.ops.norm import RmsNorm, RmsNormBackward, Rope
from ..ir.ops.quant import Dequantize, GroupedScaledMatmul, GroupedScaledMatmulWgrad, Quantize, ScaledMatmul
from ..ir.ops.reduce import All, Any, ArgMax, CumSum, Histogram, LogSoftmax, Max, Mean, Min, Softmax, Sort, Sum, TopK
from ..ir.ops.shape import Broadcast, CacheAppend, Concat, Gather, IndexAdd, Pad, Reshape, Scatter, Slice, Take, Transpose
from ..ir.quantization import Accumulation, ScaleRule
from ..ir.types import DType, Ragged
from .sampling import (
    Domain,
    Sample,
    Written,
    away_from_zero,
    boundaries,
    choices,
    closed,
    coin_but_first,
    constantly,
    counts,
    integers,
    labels,
    normal,
    permutation,
    positive,
    repeated,
    result,
    sample,
    wide,
)


def _family(cls: type[Op]) -> list[type[Op]]:
    return [op for op in OPS.values() if issubclass(op, cls)]


UNARY: dict[type[Op], Domain] = {
    **{cls: wide for cls in (Neg, Abs, Floor, Relu)},
    **{cls: normal for cls in (Exp, Sin, Cos, Tanh, Erf, Sigmoid, Silu)},
    **{cls: positive for cls in (Log, Sqrt, Rsqrt)},
}

EDGES = tuple(
    sample(cls, ("f32[5]", constantly(value)), tag=f"of {value:g}")
    for cls, values in {
        Exp: (-100.0, 100.0),
        Log: (0.0, math.inf),
        Rsqrt: (0.0,),
        Sigmoid: (-100.0, 100.0),
        Silu: (-100.0, 100.0, -math.inf),
        Tanh: (50.0,),
    }.items()
    for value in values
)

ELEMENTWISE = [
    *(sample(cls, (f"{dtype}[2, 1, 131]", domain)) for cls, domain in UNARY.items() for dtype in ("f32", "bf16")),
    *(sample(cls, ("f64[3, 5]", domain)) for cls, domain in UNARY.items()),
    *EDGES,
    sample(Neg, "i32[3, 4]"),
    sample(Abs, "i64[3, 4]"),
    *(sample(cls, f"{dtype}[2, 3, 37]", (f"{dtype}[3, 1]", away_from_zero)) for cls in _family(Arithmetic) for dtype in ("f32", "bf16")
      if cls is not Pow),
    *(sample(cls, "i32[4, 7]", ("i32[7]", integers(1, 5))) for cls in _family(Arithmetic)),
    *(sample(cls, "bf16[2, 1, 9]", ("f32[]", away_from_zero), tag="by a scalar") for cls in _family(Arithmetic) if cls is not Pow),
    *(sample(cls, "f32[2, 1, 9]", ("i64[]", constantly(3)), tag="by a whole scalar") for cls in _family(Arithmetic)),
    *(sample(cls, ("i64[5]", integers(-9, 9)), ("i64[5]", constantly(-3))) for cls in (Div, Remainder)),
    *(sample(cls, ("f32[5]", constantly(math.nan)), "f32[5]", tag="of NaN") for cls in (Maximum, Minimum)),
    sample(Div, "f32[5]", ("f32[5]", constantly(0.0)), tag="by zero"),
    *(sample(Pow, (f"{dtype}[2, 3, 5]", positive), f"{dtype}[3, 5]") for dtype in ("f32", "bf16")),
    sample(Pow, "f32[2, 9]", ("f32[]", constantly(2.0)), tag="squared"),
    *(sample(cls, (f"{dtype}[2, 3, 1]", repeated(0, 3)), (f"{dtype}[3, 9]", repeated(0, 3)))
      for cls in _family(Comparison) for dtype in ("f32", "bf16")),
    *(sample(cls, ("i64[3, 4]", integers(0, 3)), ("i64[]", integers(0, 3))) for cls in _family(Comparison)),
    *(sample(cls, "bool[2, 1, 9]", "bool[3, 1]") for cls in _family(Logical)),
    sample(Not, "bool[2, 3, 1]"),
    sample(Where, "bool[2, 1, 7]", "f32[3, 7]", "f32[1]"),
    sample(Where, "bool[4, 7]", "bf16[4, 7]", ("f32[]", constantly(-math.inf)), tag="or -inf"),
    sample(Where, "bool[4, 7]", "i64[4, 7]", "i64[]"),
    *(sample(SwiGLU, f"{dtype}[2, 3, 129]", f"{dtype}[2, 3, 129]") for dtype in ("f32", "bf16")),
    *(sample(SwiGLU, f"{dtype}[2, 3, 129]", f"{dtype}[2, 3, 129]", "f32[2, 3, 1]", tag="with weights") for dtype in ("f32", "bf16")),
    *(sample(SwiGLUBackward, *[f"{dtype}[2, 3, 129]"] * 3) for dtype in ("f32", "bf16")),
    sample(SwiGLUBackward, ("f32[9]", wide), "f32[9]", "f32[9]", tag="of large gates"),
    *(sample(Cast, (f"{source}[3, 1, 67]", wide), dtype=target)
      for source in ("f32", "bf16", "f16", "f64") for target in (DType.f32, DType.bf16, DType.f16, DType.f64, DType.f8e4m3, DType.f8e5m2)),
    *(sample(Cast, (f"{source}[5, 7]", wide), dtype=DType.f32) for source in ("f8e4m3", "f8e5m2", "e5m6")),
    sample(Cast, ("e8m0[9]", positive), dtype=DType.f32),
    sample(Cast, ("f32[9]", positive), dtype=DType.e8m0),
    sample(Cast, ("f32[3, 67]", wide), dtype=DType.e5m6),
    *(sample(Cast, ("f32[2, 3]", constantly(1e9)), dtype=dtype, tag="beyond the range") for dtype in (DType.f8e4m3, DType.i8)),
    sample(Cast, ("f32[2, 3]", constantly(math.nan)), dtype=DType.f8e4m3, tag="of NaN"),
    *(sample(Cast, ("f32[4, 9]", wide), dtype=dtype) for dtype in (DType.i32, DType.i64, DType.i16, DType.bool)),
    *(sample(Cast, ("i64[4, 9]", integers(-1000, 1000)), dtype=dtype) for dtype in (DType.f32, DType.bf16, DType.u8, DType.bool)),
    *(sample(Cast, "bool[4, 9]", dtype=dtype) for dtype in (DType.f32, DType.bf16, DType.i64)),
]  # fmt: skip

SHAPES = [
    *(sample(Reshape, f"{dtype}[2, 1, 15]", shape=(3, 10)) for dtype in ("f32", "bf16", "i64")),
    sample(Reshape, "f32[1, 1]", shape=()),
    *(sample(Transpose, f"{dtype}[2, 3, 1, 5]", perm=(2, 0, 3, 1)) for dtype in ("f32", "f8e4m3")),
    sample(Broadcast, "bf16[3, 1]", shape=(2, 3, 5)),
    sample(Broadcast, "f32[]", shape=(4, 1)),
    sample(Slice, "f32[2, 9, 3]", axis=1, start=1, stop=8, step=3),
    sample(Slice, "bf16[2, 9, 3]", axis=-1, start=2, stop=2, tag="of nothing"),
    sample(Concat, "f32[2, 1, 5]", "f32[2, 3, 5]", "f32[2, 0, 5]", axis=1),
    sample(Concat, "bf16[3, 4]", "bf16[3, 1]", axis=-1),
    sample(Pad, "f32[2, 1, 5]", low=(0, 1, 2), high=(0, 0, 3), value=-1.5),
    sample(Pad, "bf16[3, 130]", low=(0, 0), high=(1, 126)),
    sample(Pad, "i32[3]", low=(1,), high=(2,), value=7.0),
    *(sample(Take, f"{dtype}[13, 1, 7]", ("i64[2, 5]", integers(0, 13))) for dtype in ("f32", "bf16")),
    sample(Take, "f32[3, 11, 2]", ("i32[4]", integers(0, 11)), axis=1),
    sample(Take, "f32[5, 3]", ("i64[]", integers(0, 5)), tag="of one row"),
    *(sample(Gather, f"{dtype}[3, 7, 2]", ("i64[3, 4, 2]", integers(0, 7)), axis=1) for dtype in ("f32", "bf16")),
    sample(Scatter, "f32[3, 1, 7]", ("i64[3, 1, 4]", choices(7)), "f32[3, 1, 4]", axis=-1),
    sample(Scatter, "bf16[5, 7]", ("i32[5, 7]", choices(7)), "bf16[5, 7]", axis=1),
    *(sample(IndexAdd, f"{dtype}[5, 1, 7]", ("i64[11]", integers(0, 5)), f"{dtype}[11, 1, 7]") for dtype in ("f32", "bf16")),
    sample(IndexAdd, "f32[4]", ("i32[300]", integers(0, 2)), "f32[300]", tag="many to few"),
    sample(IndexAdd, "i64[5]", ("i64[9]", integers(0, 5)), "i64[9]"),
    *(sample(CacheAppend, f"{dtype}[3, 5, 1, 7]", f"{dtype}[3, 1, 7]", ("i64[3]", integers(0, 5))) for dtype in ("f32", "bf16")),
]

REDUCTIONS = [
    *(sample(cls, f"{dtype}[2, 3, 131]", axes=(-1,), keepdims=True) for cls in (Sum, Mean, Max, Min) for dtype in ("f32", "bf16")),
    *(sample(cls, "f32[5, 1, 4, 3]", axes=(0, 2)) for cls in (Sum, Mean, Max, Min)),
    *(sample(cls, "i32[3, 5]", axes=(0, 1)) for cls in (Sum, Max, Min)),
    sample(Sum, "f32[4, 0]", axes=(1,), tag="of nothing"),
    sample(Max, ("f32[4]", constantly(math.nan)), axes=(0,), tag="of NaN"),
    *(sample(cls, "bool[2, 3, 4]", axes=(0, 2), keepdims=keep) for cls in (Any, All) for keep in (False, True)),
    *(sample(ArgMax, (f"{dtype}[3, 1, 9]", repeated(0, 4)), axis=-1, keepdims=keep) for dtype in ("f32", "bf16") for keep in (False, True)),
    *(sample(CumSum, f"{dtype}[3, 33, 2]", axis=1) for dtype in ("f32", "bf16", "i64")),
    *(sample(cls, f"{dtype}[2, 3, 131]", axis=axis) for cls in (Softmax, LogSoftmax) for dtype, axis in (("f32", 1), ("bf16", -1))),
    *(sample(cls, "bf16[4, 1, 9]", axis=-1, out=DType.f32) for cls in (Softmax, LogSoftmax)),
    *(sample(cls, ("f32[4, 9]", wide), axis=-1, tag="of large numbers") for cls in (Softmax, LogSoftmax)),
    *(sample(TopK, (f"{dtype}[3, 1, 17]", repeated(0, 6)), k=5, tag="with equals") for dtype in ("f32", "bf16", "i32")),
    sample(TopK, "f32[9, 4]", k=9, axis=0),
    sample(TopK, "f32[3, 4]", k=0, tag="of nothing"),
    *(sample(Sort, (f"{dtype}[2, 13, 3]", repeated(0, 5)), axis=1, descending=d) for dtype in ("f32", "bf16") for d in (False, True)),
    sample(Sort, ("i64[40]", integers(0, 9))),
    sample(Histogram, ("i64[3, 50]", integers(-2, 9)), bins=7),
    sample(Histogram, "i32[0]", bins=3, tag="of nothing"),
]

PRODUCTS = [
    *(sample(Matmul, f"{dtype}[2, 1, 5, 131]", f"{dtype}[3, 131, 7]") for dtype in ("f32", "bf16")),
    *(sample(Matmul, f"{dtype}[3, 5, 67]", f"{dtype}[9, 67]", transpose_b=True) for dtype in ("f32", "bf16")),
    sample(Matmul, "bf16[4, 300]", "bf16[300, 6]", out=DType.f32),
    sample(Matmul, "f8e4m3[4, 33]", "f8e4m3[5, 33]", transpose_b=True, out=DType.bf16),
    sample(Matmul, "f64[4, 3]", "f64[3, 1]"),
    sample(Matmul, "f32[1, 1, 9]", "f32[9, 1]", tag="of one row"),
    sample(Matmul, "f32[2, 3, 0]", "f32[0, 4]", tag="over nothing"),
    *(sample(GroupedMatmul, f"{dtype}[23, 35]", f"{dtype}[5, 35, 9]", ("i32[5]", counts(23))) for dtype in ("f32", "bf16")),
    *(sample(GroupedMatmul, f"{dtype}[23, 35]", f"{dtype}[5, 9, 35]", ("i32[5]", counts(20)), transpose_b=True, tag="with spare rows")
      for dtype in ("f32", "bf16")),
    sample(GroupedMatmul, "f32[rows<=14, 35]", "f32[3, 35, 9]", ("i32[3]", counts(12)), tag="of a ragged number of rows"),
    *(sample(GroupedMatmulWgrad, f"{dtype}[23, 35]", f"{dtype}[23, 9]", ("i32[5]", counts(20))) for dtype in ("f32", "bf16")),
    sample(GroupedMatmulWgrad, "bf16[23, 3]", "bf16[23, 1]", ("i64[2]", counts(23)), out=DType.bf16, tag="rounded"),
    sample(GroupedMatmulWgrad, "f32[rows<=14, 3]", "f32[rows<=14, 9]", ("i32[3]", counts(12)), tag="of a ragged number of rows"),
    sample(GroupedMatmulWgrad, "f32[0, 3]", "f32[0, 9]", ("i32[3]", constantly(0)), tag="of no rows"),
    sample(GroupedMatmul, "f32[0, 35]", "f32[3, 35, 9]", ("i32[3]", constantly(0)), tag="of no rows"),
]  # fmt: skip

NORMS = [
    *(sample(RmsNorm, f"{dtype}[2, 3, 193]", f"{dtype}[193]", eps=1e-6) for dtype in ("f32", "bf16")),
    sample(RmsNorm, "bf16[4, 1, 33]", "f32[33]", eps=1e-5, tag="with a wider weight"),
    sample(RmsNorm, ("f32[3, 9]", constantly(0.0)), "f32[9]", eps=1e-6, tag="of zeros"),
    *(sample(RmsNormBackward, f"{dtype}[2, 3, 193]", f"{dtype}[193]", f"{dtype}[2, 3, 193]", eps=1e-6) for dtype in ("f32", "bf16")),
    sample(RmsNormBackward, "bf16[4, 1, 33]", "f32[33]", "bf16[4, 1, 33]", eps=1e-5, tag="with a wider weight"),
    sample(RmsNormBackward, ("f32[3, 9]", constantly(0.0)), "f32[9]", "f32[3, 9]", eps=1e-6, tag="of zeros"),
    *(sample(Rope, f"{dtype}[2, 5, 3, 10]", "f32[5, 5]", "f32[5, 5]", interleaved=i) for dtype in ("f32", "bf16") for i in (False, True)),
    sample(Rope, "f32[2, 5, 1, 6]", "f32[2, 5, 3]", "f32[2, 5, 3]", interleaved=True, tag="with a table per sequence"),
]


def _attention(dtype: str, heads: int, kv: int, queries: int, keys: int) -> tuple[str, str, str]:
    return f"{dtype}[2, {heads}, {queries}, 11]", f"{dtype}[2, {kv}, {keys}, 11]", f"{dtype}[2, {kv}, {keys}, 7]"


def _backward(dtype: str, heads: int, kv: int, queries: int, keys: int) -> tuple[str, ...]:
    return *_attention(dtype, heads, kv, queries, keys), *[f"{dtype}[2, {heads}, {queries}, 7]"] * 2


ATTENTION = [
    *(sample(Attention, *_attention(dtype, 4, 2, 5, 9), scale=0.3) for dtype in ("f32", "bf16")),
    *(sample(Attention, *_attention(dtype, 3, 3, 9, 9), scale=0.3, causal=True) for dtype in ("f32", "bf16")),
    sample(Attention, *_attention("f32", 4, 1, 9, 5), scale=0.3, causal=True, tag="of more queries than keys"),
    sample(Attention, *_attention("f32", 2, 2, 5, 9), ("f32[5, 9]", closed), scale=0.3, tag="with a mask added"),
    sample(Attention, *_attention("bf16", 4, 2, 5, 9), ("bool[2, 1, 5, 9]", coin_but_first), scale=0.3, tag="with a mask of bools"),
    sample(Attention, *_attention("f32", 2, 2, 5, 5), ("bool[5, 5]", coin_but_first), scale=0.3, causal=True, tag="masked twice"),
    sample(Attention, *_attention("bf16", 4, 2, 9, 9), ("i32[6]", boundaries(9)), scale=0.3, causal=True, tag="of packed documents"),
    sample(Attention, *_attention("f32", 2, 2, 9, 9), ("i64[4]", boundaries(8)), scale=0.3, tag="of documents and tokens of none"),
    sample(Attention, "f32[1, 3, 4]", "f32[1, 3, 4]", "f32[1, 3, 4]", tag="without a batch"),
    *(sample(AttentionBackward, *_backward(dtype, 4, 2, 5, 9), scale=0.3) for dtype in ("f32", "bf16")),
    *(sample(AttentionBackward, *_backward(dtype, 3, 3, 9, 9), scale=0.3, causal=True) for dtype in ("f32", "bf16")),
    sample(AttentionBackward, *_backward("f32", 4, 1, 9, 5), scale=0.3, causal=True, tag="of more queries than keys"),
    sample(AttentionBackward, *_backward("f32", 2, 2, 5, 9), ("f32[5, 9]", closed), scale=0.3, tag="with a mask added"),
    sample(AttentionBackward, *_backward("f32", 2, 2, 5, 5), ("bool[5, 5]", coin_but_first), scale=0.3, causal=True, tag="masked twice"),
    sample(AttentionBackward, *_backward("bf16", 4, 2, 9, 9), ("i32[6]", boundaries(9)), scale=0.3, causal=True, tag="of packed documents"),
    sample(AttentionBackward, *_backward("f32", 2, 2, 9, 9), ("i64[4]", boundaries(8)), scale=0.3, tag="of documents and tokens of none"),
    *(sample(AttentionDecode, f"{dtype}[3, 4, 11]", f"{dtype}[3, 9, 2, 11]", f"{dtype}[3, 9, 2, 7]", ("i64[3]", integers(0, 9)), scale=0.3)
      for dtype in ("f32", "bf16")),
    sample(AttentionDecode, "f32[2, 5, 11]", "f32[2, 9, 1, 11]", "f32[2, 9, 1, 7]", ("i64[2]", constantly(8)), scale=0.3, tag="of all"),
    *(sample(AttentionDecode, f"{dtype}[3, 4, 11]", f"{dtype}[7, 4, 2, 11]", f"{dtype}[7, 4, 2, 7]", ("i64[3]", integers(0, 12)),
             ("i32[3, 3]", integers(0, 7)), scale=0.3, tag="of a paged cache") for dtype in ("f32", "bf16")),
]  # fmt: skip

EXPERTS = [
    sample(Route, "f32[13, 24]", ("f32[24]", normal), top_k=6, groups=4, top_groups=2, scale=2.5, tag="V3"),
    sample(Route, "f32[13, 24]", top_k=5, score="softmax", groups=4, top_groups=3, group_score="max", normalize=False, scale=16, tag="V2"),
    sample(Route, "f32[7, 9]", top_k=3, score="softmax", normalize=False, tag="V2 Lite"),
    sample(Route, ("f32[7, 9]", constantly(0.5)), top_k=3, tag="of equals"),
    sample(Route, "f32[1, 5]", "f32[5]", top_k=5, tag="of all"),
    *(sample(Dispatch, f"{dtype}[11, 19]", ("i32[11, 3]", choices(7)), experts=7) for dtype in ("f32", "bf16", "f8e4m3")),
    sample(Dispatch, "f8e4m3[11, 19]", "f32[11, 1]", ("i32[11, 3]", choices(7)), experts=7, tag="with scales"),
    sample(Dispatch, "f32[4, 3]", ("i32[4, 1]", constantly(5)), experts=9, tag="to one expert"),
    sample(Dispatch, "f32[0, 3]", "i32[0, 2]", experts=3, tag="of no tokens"),
    *(sample(Combine, f"{dtype}[33, 19]", ("bundle{i32[33]}", permutation), "f32[11, 3]") for dtype in ("f32", "bf16")),
    *(sample(RouteBackward, "f32[13, 24]", ("i32[13, 6]", choices(24)), "f32[13, 6]", score=score, normalize=normalize, scale=2.5)
      for score in ("sigmoid", "softmax") for normalize in (True, False)),
    sample(RouteBackward, "f32[1, 5]", ("i64[1, 5]", choices(5)), "f32[1, 5]", tag="of all"),
    *(sample(Redispatch, f"{dtype}[11, 19]", ("bundle{i32[33]}", permutation)) for dtype in ("f32", "bf16")),
    sample(Redispatch, "f8e4m3[11, 19]", "f32[11, 1]", ("bundle{i32[33]}", permutation), tag="with scales"),
    sample(Redispatch, "f32[0, 3]", ("bundle{i32[0]}", permutation), tag="of no tokens"),
    sample(RowWeights, "f32[11, 3]", ("bundle{i32[33]}", permutation)),
    sample(RowWeights, "f32[0, 4]", ("bundle{i32[0]}", permutation), tag="of no tokens"),
    sample(SlotWeights, "f32[33, 1]", ("bundle{i32[33]}", permutation), slots=3),
    sample(SlotWeights, "f32[8, 1]", ("bundle{i32[8]}", permutation), slots=8, tag="of one token"),
    sample(Combine, "bf16[8, 1]", ("bundle{i32[8]}", permutation), "bf16[1, 8]", tag="into one token"),
    *(sample(DispatchGroups, f"{dtype}[11, 19]", ("i32[11, 3]", choices(8)), groups=4, size=2) for dtype in ("f32", "bf16")),
    sample(DispatchGroups, "f8e4m3[11, 19]", "f32[11, 1]", ("i32[11, 4]", integers(-1, 6)), groups=3, size=2, rows="sent",
           tag="with scales"),
    sample(DispatchGroups, "f32[in<=9, 3]", ("i32[in<=9, 2]", integers(-2, 5)), groups=5, size=1, tag="of a ragged number of tokens"),
    sample(DispatchGroups, "f32[0, 3]", "i32[0, 2]", groups=3, size=2, tag="of no tokens"),
    *(sample(CombineGroups, f"{dtype}[33, 19]", ("i32[33]", integers(0, 11)), "i32[13, 3]") for dtype in ("f32", "bf16")),
    *(sample(CombineGroups, f"{dtype}[r<=9, 5]", ("i32[r<=9]", integers(0, 4)), "i32[t<=6, 2]", "f32[r<=9, 1]")
      for dtype in ("f32", "bf16")),
    sample(ChooseSlots, ("i32[11, 3]", choices(5)), ("i32[9]", lambda rng, shape: rng.permutation(shape[0]) % 5)),
    sample(ChooseSlots, ("i32[4, 2]", integers(0, 2)), ("i32[5]", lambda rng, shape: rng.permutation(shape[0]) % 2),
           ("i32[1]", integers(0, 9)), tag="from a start"),
    sample(ChooseSlots, "i32[0, 2]", ("i32[3]", constantly(1)), tag="of no tokens"),
    sample(CombineGroups, "f32[0, 3]", "i32[0]", "i32[2, 2]", tag="of no rows"),
]  # fmt: skip

LOSSES = [
    *(sample(CrossEntropy, f"{dtype}[9, 131]", ("i64[9]", labels(131, -100))) for dtype in ("f32", "bf16")),
    sample(CrossEntropy, ("f32[5, 7]", wide), ("i64[5]", labels(7, 0)), ignore=0, tag="that ignores 0"),
    sample(CrossEntropy, "f32[3, 5]", ("i64[3]", constantly(-100)), tag="of no token"),
    *(sample(CrossEntropyBackward, f"{dtype}[9, 131]", ("i64[9]", labels(131, -100)), "f32[]") for dtype in ("f32", "bf16")),
    sample(CrossEntropyBackward, ("f32[5, 7]", wide), ("i64[5]", labels(7, 0)), "f32[]", ignore=0, tag="that ignores 0"),
    sample(CrossEntropyBackward, "f32[3, 5]", ("i64[3]", constantly(-100)), "f32[]", tag="of no token"),
    sample(BalanceLossBackward, "f32[12, 9]", ("i32[12, 3]", choices(9)), "f32[]", sequences=3),
    sample(BalanceLossBackward, "f32[10, 7]", ("i64[10, 2]", choices(7)), "f32[]", sequences=1, score="softmax"),
    sample(BalanceLoss, "f32[12, 9]", ("i32[12, 3]", choices(9)), sequences=3),
    sample(BalanceLoss, "f32[10, 7]", ("i64[10, 2]", choices(7)), sequences=1, score="softmax"),
]

CONTROL = [
    sample(Param, path="w", result_types=result("bf16[3, 5]")),
    sample(Constant, path="table", result_types=result("f32[4, 1]")),
    sample(Literal, values=(0.1, -2.5, 3.0, 1e9), shape=(2, 2), dtype=DType.f32),
    sample(Literal, values=(0.1,), shape=(3, 1, 5), dtype=DType.bf16, tag="that fills"),
    sample(Literal, values=(1000.0, -math.inf), shape=(2,), dtype=DType.f8e4m3, tag="that saturates"),
    sample(Literal, values=(2**62, -1), shape=(2,), dtype=DType.i64),
    sample(Literal, values=(1, 0, 1), shape=(3,), dtype=DType.bool),
    sample(Literal, values=(1,), shape=(2, 0), dtype=DType.i32, tag="of nothing"),
    sample(Literal, values=(), shape=(0,), dtype=DType.i64, tag="of no numbers"),
    sample(Iota, length=9, dtype=DType.i64, start=-4, step=3),
    sample(Iota, length=1000, dtype=DType.bf16, tag="that rounds"),
    sample(Iota, length=0, dtype=DType.f32, tag="of nothing"),
    sample(Call, "f32[2, 3]", callee=Symbol("doubled"), result_types=result("f32[2, 3]"), weights="layers.0"),
    sample(Pack, "f32[2, 3]", "i64[4]"),
    sample(Unpack, "bundle{f32[2, 3], bf16[4]}"),
    sample(Unpack, "bundle{i32[4]}", tag="of one"),
]

POWERS = ScaleRule(floor=1e-4, apply="multiply", pow2="ceil-bits")

QUANTISED = [
    *(sample(Quantize, (f"{dtype}[2, 3, 200]", wide)) for dtype in ("f32", "bf16")),
    sample(Quantize, ("f32[2, 130, 150]", wide), tile=(128, 128), dtype=DType.f8e5m2),
    sample(Quantize, "bf16[3, 70]", dtype=DType.e5m6, rule=ScaleRule(floor=1e-4, pow2="ceil-bits")),
    sample(Quantize, ("f32[3, 70]", constantly(0.0)), tag="of zeros"),
    sample(Quantize, "bf16[23, 9]", ("i32[4]", counts(23)), tile=(4, 1), tag="of groups"),
    sample(Dequantize, "f8e4m3[2, 3, 200]", ("f32[2, 3, 2]", positive)),
    sample(Dequantize, "f8e5m2[130, 150]", ("f32[2, 2]", positive), tile=(128, 128), dtype=DType.f32),
    sample(Dequantize, "f8e4m3[23, 9]", ("f32[9, 9]", positive), ("i32[4]", counts(23)), tile=(4, 1), tag="of groups"),
    *(sample(ScaledMatmul, "f8e4m3[2, 5, 200]", ("f32[2, 5, 2]", positive), "f8e4m3[9, 200]", ("f32[1, 2]", positive), out=out)
      for out in (DType.bf16, DType.f32)),
    *(sample(ScaledMatmul, "f8e5m2[7, 300]", ("f32[7, 3]", positive), "f8e4m3[5, 300]", ("f32[5, 3]", positive), b_tile=(1, 128),
             accumulation=model) for model in (Accumulation("float32"), Accumulation("exact"), Accumulation("tensor-core"))),
    sample(GroupedScaledMatmul, "f8e4m3[23, 200]", ("f32[23, 2]", positive), "f8e4m3[3, 9, 200]", ("f32[3, 1, 2]", positive),
           ("i32[3]", counts(20)), tag="with spare rows"),
    sample(GroupedScaledMatmul, "f8e5m2[23, 20]", ("f32[8, 5]", positive), "f8e4m3[3, 9, 20]", ("f32[3, 1, 1]", positive),
           ("i32[3]", counts(20)), x_tile=(4, 4), out=DType.f32, tag="in tiles of several rows"),
    sample(GroupedScaledMatmul, "f8e4m3[3, 7, 200]", ("f32[3, 7, 2]", positive), "f8e4m3[3, 9, 200]", ("f32[3, 1, 2]", positive),
           ("i32[3]", integers(0, 8)), tag="with rows of its own for each group"),
    *(sample(GroupedScaledMatmulWgrad, "f8e4m3[23, 5]", ("f32[6, 5]", positive), "f8e5m2[23, 9]", ("f32[6, 9]", positive),
             ("i32[3]", counts(20)), a_tile=(7, 1), b_tile=(7, 1), accumulation=model, out=out)
      for model, out in ((Accumulation("float32"), DType.f32), (Accumulation("exact"), DType.bf16), (Accumulation(), DType.bf16))),
    sample(GroupedScaledMatmulWgrad, "f8e4m3[300, 5]", ("f32[4, 5]", positive), "f8e4m3[300, 9]", ("f32[4, 1]", positive),
           ("i32[2]", counts(300)), b_tile=(128, 128), out=DType.bf16, tag="in blocks"),
]  # fmt: skip


def _rows(rows: int | Ragged, *xs: str, tag: str = "") -> Sample:
    every = ("i32[1]", counts(7 if isinstance(rows, Ragged) else rows))
    return sample(AllToAllRows, *xs, every, every, axis="ep", size=1, rows=rows, tag=tag)


def _way(tokens: int, rows: int) -> Domain:
    """The handle of an exchange over nodes whose only rank sends itself `rows` rows of `tokens` tokens."""
    return lambda rng, shape: np.full(shape, rows) if shape == (1,) else rng.integers(0, tokens, shape)


def _on_one_node(cls: type[Op], *xs: Written, tag: str = "", experts: int = 0) -> Sample:
    handle = "bundle{i32[8, 2], i32[to_ranks<=8], i32[1], i32[1]}", _way(8, 6)
    given, more = ((), {"experts": experts}) if experts else ((handle,), {})
    return sample(cls, *xs, *given, axis="ep", size=1, nodes=1, tag=tag, **more)


COLLECTIVE = [
    *(_on_one_node(InternodeDispatch, f"{dtype}[11, 5]", ("i32[11, 3]", choices(8)), experts=8) for dtype in ("f32", "bf16")),
    _on_one_node(InternodeDispatch, "f8e4m3[11, 19]", "f32[11, 1]", ("i32[11, 4]", integers(-1, 6)), experts=6, tag="with scales"),
    *(_on_one_node(InternodeCombine, f"{dtype}[arrived<=8, 5]") for dtype in ("f32", "bf16")),
    *(_on_one_node(InternodeRedispatch, f"{dtype}[8, 5]") for dtype in ("f32", "bf16")),
    _on_one_node(InternodeRedispatch, "f8e4m3[8, 5]", "f32[8, 1]", tag="with scales"),
    *(sample(AllGather, f"{dtype}[3, 1, 7]", axis="tp", size=1, dim=dim) for dtype in ("f32", "bf16", "f8e4m3") for dim in (0, -1)),
    *(sample(ReduceScatter, f"{dtype}[3, 1, 7]", axis="dp", size=1, dim=2) for dtype in ("f32", "bf16", "i32")),
    *(sample(AllReduce, f"{dtype}[2, 1, 7]", axis="dp", size=1, kind=kind) for dtype in ("f32", "bf16", "i64") for kind in ("sum", "max")
      if (dtype, kind) != ("f32", "max")),
    sample(AllReduce, "f32[]", axis="dp", size=1, tag="of one number"),
    sample(AllReduce, ("i32[3]", integers(0, 9)), axis="dp", size=1, kind="max"),
    *(sample(AllToAll, f"{dtype}[4, 3]", axis="ep", size=1) for dtype in ("f32", "bf16", "i32")),
    *(_rows(9, f"{dtype}[9, 5]") for dtype in ("f32", "bf16")),
    _rows(9, "f8e4m3[9, 5]", "f32[9, 1]", tag="with scales"),
    _rows(Ragged("in", 12), "bf16[rows<=9, 5]", tag="of a ragged number of rows"),
    _rows(0, "f32[0, 5]", tag="of no rows"),
    sample(AllToAllRows, "f8e4m3[9, 5]", "f32[9, 1]", ("i32[1]", counts(9)), ("i32[1, 3]", counts(9)), axis="ep", size=1, rows=9,
           tag="into blocks"),
    *(sample(OwnPart, f"{dtype}[3, 1, 7]", axis="tp", size=1, dim=2) for dtype in ("f32", "bf16", "f8e4m3")),
]  # fmt: skip

IN_FLIGHT = [
    *(sample(Done, f"async {type}") for type in ("f32[3, 4]", "bf16[2]", "f8e4m3[3]", "i32[1]")),
]

FUSED = [
    sample(fused.Fused, "f32[2, 3]", callee=Symbol("doubled"), result_types=result("f32[2, 3]")),
    *(sample(fused.ScaledMatmulAdd, "f8e4m3[2, 5, 200]", ("f32[2, 5, 2]", positive), "f8e4m3[9, 200]", ("f32[1, 2]", positive),
             f"{out.name}[2, 5, 9]", out=out) for out in (DType.bf16, DType.f32)),
    sample(fused.GroupedScaledMatmulAdd, "f8e4m3[23, 200]", ("f32[23, 2]", positive), "f8e4m3[3, 9, 200]", ("f32[3, 1, 2]", positive),
           ("i32[3]", counts(20)), "bf16[23, 9]", tag="with spare rows"),
    sample(fused.GroupedScaledMatmulAdd, "f8e4m3[3, 7, 200]", ("f32[3, 7, 2]", positive), "f8e4m3[3, 9, 200]", ("f32[3, 1, 2]", positive),
           ("i32[3]", integers(0, 8)), "bf16[3, 7, 9]", tag="with rows of its own for each group"),
    *(sample(fused.RmsNormBackwardAdd, f"{dtype}[2, 3, 193]", f"{dtype}[193]", f"{dtype}[2, 3, 193]", f"{dtype}[2, 3, 193]", eps=1e-6)
      for dtype in ("f32", "bf16")),
    *(sample(fused.MlaAttention, *_attention(dtype, 4, 2, 5, 9), f"{dtype}[2, 4, 5, 6]", f"{dtype}[2, 2, 9, 6]", mask=None,
             scale=0.3) for dtype in ("f32", "bf16")),
    *(sample(fused.MlaAttentionBackward, *_backward(dtype, 4, 2, 9, 9), f"{dtype}[2, 4, 9, 6]", f"{dtype}[2, 2, 9, 6]", mask=None,
             scale=0.3, causal=True) for dtype in ("f32", "bf16")),
    *(sample(fused.MlaDecode, f"{dtype}[3, 4, 11]", f"{dtype}[3, 9, 2, 17]", f"{dtype}[3, 9, 2, 7]", ("i64[3]", integers(0, 9)),
             f"{dtype}[3, 4, 6]", pages=None, scale=0.3) for dtype in ("f32", "bf16")),
    sample(fused.Joined, "f32[2, 3, 5]", "f32[2, 4, 5]", axis=1),
]  # fmt: skip

SAMPLES: tuple[Sample, ...] = (
    *ELEMENTWISE,
    *SHAPES,
    *REDUCTIONS,
    *PRODUCTS,
    *NORMS,
    *ATTENTION,
    *EXPERTS,
    *LOSSES,
    *QUANTISED,
    *CONTROL,
    *COLLECTIVE,
    *IN_FLIGHT,
    *FUSED,
)


def samples(*classes: type[Op]) -> tuple[Sample, ...]:
    """The samples of these ops, or all."""
    return tuple(s for s in SAMPLES if not classes or s.cls in classes)
