"""Calls that every type rule must refuse, each with the whole of the message that the user gets."""

from __future__ import annotations

from ..ir.core import OPS, Op
from ..ir.ops.attention import Attention, AttentionBackward, AttentionDecode
from ..ir.ops.collective import AllGather, AllReduce, AllToAll, AllToAllRows, Done, OwnPart, ReduceScatter
from ..ir.ops.control import Constant, Iota, Literal, Param, Unpack
from ..ir.ops.elementwise import Abs, Arithmetic, Comparison, Logical, Neg, Not, SwiGLU, SwiGLUBackward, Unary, Where
from ..ir.ops.fused import (
    GroupedScaledMatmulAdd,
    Joined,
    MlaAttention,
    MlaAttentionBackward,
    MlaDecode,
    RmsNormBackwardAdd,
    ScaledMatmulAdd,
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
from ..ir.types import DType
from .sampling import WrongCall, result, wrong


def _family(cls: type[Op]) -> list[type[Op]]:
    return [op for op in OPS.values() if issubclass(op, cls)]


WRONG_CALLS: tuple[WrongCall, ...] = (
    # elementwise
    *(wrong(cls, "i32[3]", message="expected a float tensor, found i32[3]") for cls in _family(Unary)),
    *(wrong(cls, "bool[3]", message="expected numbers, found bool[3]") for cls in (Neg, Abs)),
    *(wrong(cls, "bool[3]", "bool[3]", message="expected numbers, found bool[3] and bool[3]") for cls in _family(Arithmetic)),
    *(wrong(cls, "f32[3]", "bf16[3]", message="dtypes differ: f32[3] and bf16[3]") for cls in _family(Arithmetic)),
    *(wrong(cls, "f32[3, 2]", "f32[3]", message="shapes do not broadcast: [3, 2] and [3]") for cls in _family(Comparison)),
    *(wrong(cls, "bool[3]", "i8[3]", message="expected a bool tensor, found i8[3]") for cls in _family(Logical)),
    wrong(Not, "i8[3]", message="expected a bool tensor, found i8[3]"),
    wrong(Where, "bool[3]", "f32[3]", "i32[3]", message="dtypes differ: f32[3] and i32[3]"),
    wrong(Where, "f32[3]", "f32[3]", "f32[3]", message="expected a bool tensor, found f32[3]"),
    wrong(SwiGLU, "f32[3, 4]", "f32[4, 3]", message="shapes do not broadcast: [3, 4] and [4, 3]"),
    wrong(SwiGLU, "bf16[3, 4]", "bf16[3, 4]", "f32[3]", message="the weight is f32[3], expected f32[3, 1]"),
    wrong(SwiGLUBackward, "f32[3]", "f32[3]", "f32[1]", message="types differ: gate is f32[3], up f32[3] and dy f32[1]"),
    # shape
    wrong(Reshape, "f32[2, 3]", shape=(4,), message="f32[2, 3] has 6 elements, but shape [4] has 4"),
    wrong(Reshape, "f32[rows<=6]", shape=(6,), message="reshape needs a static shape, found f32[rows<=6]"),
    wrong(Transpose, "f32[2, 3]", perm=(0, 0), message="perm [0, 0] does not order the axes of f32[2, 3]"),
    wrong(Broadcast, "f32[3]", shape=(3, 2), message="shapes do not broadcast: [3] and [3, 2]"),
    wrong(Broadcast, "f32[2, 3]", shape=(3,), message="f32[2, 3] does not stretch to [3]"),
    wrong(Slice, "f32[4]", axis=0, start=2, stop=5, message="slice 2:5:1 is outside axis 0 of f32[4]"),
    wrong(Slice, "f32[4]", axis=1, start=0, stop=1, message="axis 1 is outside a tensor of rank 1: f32[4]"),
    wrong(Concat, "f32[2, 3]", "f32[3, 2]", axis=0, message="operands differ outside axis 0: f32[2, 3] and f32[3, 2]"),
    wrong(Pad, "f32[2, 3]", low=(1,), high=(1, 1), message="f32[2, 3] has 2 axes, found 1 and 2"),
    wrong(Pad, "f32[2]", low=(-1,), high=(0,), message="a pad is 0 or more"),
    wrong(Take, "f32[4, 3]", "f32[2]", message="expected an integer tensor, found f32[2]"),
    wrong(Gather, "f32[4, 3]", "i64[5, 1]", axis=1, message="x and indices differ outside axis 1: f32[4, 3] and i64[5, 1]"),
    wrong(Scatter, "f32[4, 3]", "i64[4, 1]", "f32[4, 2]", axis=1, message="updates are f32[4, 2], expected f32[4, 1]"),
    wrong(IndexAdd, "f32[4, 3]", "i64[2]", "f32[3, 3]", message="updates are f32[3, 3], expected f32[2, 3]"),
    wrong(CacheAppend, "f32[2, 5, 3]", "f32[2, 4]", "i64[2]", message="new is f32[2, 4], expected f32[2, 3]"),
    wrong(CacheAppend, "f32[2, 5]", "f32[2]", "i64[3]", message="positions are i64[3], expected one for each of 2 sequences"),
    # reductions
    wrong(Sum, "f32[2, 3]", axes=(0, -2), message="an axis stands twice in [0, -2]"),
    wrong(Sum, "bool[2]", axes=(0,), message="expected numbers, found bool[2]"),
    wrong(Mean, "i32[2]", axes=(0,), message="expected a float tensor, found i32[2]"),
    *(wrong(cls, "f32[2, 0]", axes=(1,), message="axis 1 of f32[2, 0] has no element") for cls in (Max, Min)),
    *(wrong(cls, "f32[2]", axes=(0,), message="expected a bool tensor, found f32[2]") for cls in (Any, All)),
    wrong(ArgMax, "f32[2]", axis=2, message="axis 2 is outside a tensor of rank 1: f32[2]"),
    wrong(CumSum, "bool[2]", axis=0, message="expected numbers, found bool[2]"),
    *(wrong(cls, "i32[2]", axis=0, message="expected a float tensor, found i32[2]") for cls in (Softmax, LogSoftmax)),
    wrong(TopK, "f32[2, 3]", k=4, message="k = 4, but axis 1 of f32[2, 3] has 3"),
    wrong(Sort, "f32[]", message="axis -1 is outside a tensor of rank 0: f32[]"),
    wrong(Histogram, "f32[3]", bins=4, message="expected an integer tensor, found f32[3]"),
    wrong(Histogram, "i32[3]", bins=0, message="bins is 0, expected 1 or more"),
    # products
    wrong(Matmul, "f32[2, 3]", "f32[4, 5]", message="inner dimensions differ: a is f32[2, 3], so k = 3, but b is f32[4, 5], so k = 4"),
    wrong(
        Matmul,
        "f32[2, 3]",
        "f32[3, 5]",
        transpose_b=True,
        message="inner dimensions differ: a is f32[2, 3], so k = 3, but b is f32[3, 5], so k = 5",
    ),
    wrong(Matmul, "f32[2, 3]", "bf16[3, 5]", message="dtypes differ: f32[2, 3] and bf16[3, 5]"),
    wrong(Matmul, "f32[3]", "f32[3, 5]", message="expected matrices, found f32[3] and f32[3, 5]"),
    wrong(GroupedMatmul, "f32[6, 3]", "f32[2, 3, 5]", "i32[3]", message="counts are i32[3], expected one for each of 2 groups"),
    wrong(GroupedMatmulWgrad, "f32[6, 3]", "f32[5, 4]", "i32[3]", message="expected a [R, M] and b [R, N], found f32[6, 3] and f32[5, 4]"),
    # norms and attention
    wrong(RmsNormBackward, "f32[2, 3]", "f32[3]", "bf16[2, 3]", eps=1e-6, message="dy is bf16[2, 3], expected f32[2, 3]"),
    wrong(
        AttentionBackward,
        *("f32[2, 5, 4]", "f32[2, 7, 4]", "f32[2, 7, 3]", "f32[2, 5, 3]", "f32[2, 5, 4]"),
        message="dout is f32[2, 5, 4], expected f32[2, 5, 3]",
    ),
    wrong(RmsNorm, "f32[2, 3]", "f32[2]", eps=1e-6, message="weight is f32[2], expected [3]"),
    wrong(
        Rope,
        *("f32[5, 2, 3]", "f32[5, 1]", "f32[5, 1]"),
        interleaved=True,
        message="x is f32[5, 2, 3], expected [..., S, heads, D] with D even",
    ),
    wrong(
        Rope,
        *("f32[5, 2, 6]", "f32[4, 3]", "f32[4, 3]"),
        interleaved=True,
        message="shapes do not broadcast: [4, 1, 3] and [5, 2, 3]",
    ),
    wrong(Attention, "f32[3, 5, 4]", "f32[2, 5, 4]", "f32[2, 5, 4]", message="3 query heads are not a multiple of 2 key heads"),
    wrong(Attention, "f32[2, 5, 4]", "f32[2, 5, 3]", "f32[2, 5, 3]", message="widths differ: q is f32[2, 5, 4], but k is f32[2, 5, 3]"),
    wrong(
        Attention,
        *("f32[2, 5, 4]", "f32[2, 7, 4]", "f32[2, 7, 4]", "f32[7, 5]"),
        message="shapes do not broadcast: [7, 5] and [2, 5, 7]",
    ),
    wrong(
        Attention,
        *("f32[2, 5, 4]", "f32[2, 7, 4]", "f32[2, 7, 4]", "i32[3]"),
        message="boundaries are i32[3], expected integers [n + 1] and as many queries as keys, found f32[2, 5, 4] and f32[2, 7, 4]",
    ),
    wrong(
        AttentionDecode,
        *("f32[2, 4, 8]", "f32[5, 3, 1, 8]", "f32[5, 3, 1, 8]", "i64[2]", "i32[3, 2]"),
        scale=1.0,
        message="pages are i32[3, 2], expected [2, n], a row for each sequence",
    ),
    wrong(
        AttentionDecode,
        *("f32[2, 4, 3]", "f32[2, 9, 1, 3]", "f32[2, 9, 1, 3]", "i64[3]"),
        scale=1.0,
        message="positions are i64[3], expected one for each of 2 sequences",
    ),
    # experts
    wrong(Route, "bf16[3, 8]", message="logits are bf16[3, 8], expected f32[tokens, experts]"),
    wrong(Route, "f32[3, 8]", "f32[7]", message="bias is f32[7], expected f32[8]"),
    wrong(Route, "f32[3, 8]", groups=3, message="8 experts do not make 3 equal groups"),
    wrong(Route, "f32[3, 8]", groups=4, top_k=3, message="top_k = 3, but 1 of 4 groups hold 2 experts"),
    wrong(Dispatch, "f32[3, 8]", "i32[4, 2]", experts=5, message="expected x [T, H] and ids [T, k], found f32[3, 8] and i32[4, 2]"),
    wrong(
        Combine,
        *("f32[6, 3]", "bundle{i32[5]}", "f32[3, 2]"),
        message="the handle is bundle{i32[5]}, expected bundle{i32[6]}",
    ),
    wrong(Combine, "f32[6, 3]", "bundle{i32[6]}", "f32[3, 3]", message="weights are f32[3, 3], but there are 6 rows"),
    wrong(RouteBackward, "f32[3, 8]", "i32[3, 2]", "f32[3, 8]", message="dweights are f32[3, 8], expected f32[3, 2]"),
    wrong(
        Redispatch,
        *("f32[4, 3]", "bundle{i32[6]}"),
        message="the handle orders 6 rows, which are not the same number for each of 4 tokens",
    ),
    wrong(Redispatch, "f32[4, 3]", "bundle{f32[8]}", message="the handle is bundle{f32[8]}, expected bundle{i32[rows]}"),
    wrong(DispatchGroups, "f32[4, 3]", "i32[4, 2]", groups=0, size=2, message="0 groups of 2 experts, expected 1 or more of each"),
    wrong(
        DispatchGroups,
        *("f32[4, 3]", "i32[5, 2]"),
        groups=2,
        size=2,
        message="expected x [T, H] and ids [T, k], found f32[4, 3] and i32[5, 2]",
    ),
    wrong(ChooseSlots, "i32[4]", "i32[5]", message="expected ids i32[T, k], found i32[4]"),
    wrong(ChooseSlots, "i32[4, 2]", "i32[5]", "i32[2]", message="expected start i32[1], found i32[2]"),
    wrong(CombineGroups, "f32[4, 3]", "i32[5]", "i32[2, 2]", message="tokens are i32[5], expected one for each row of f32[4, 3]"),
    wrong(CombineGroups, "f32[4, 3]", "i32[4]", "i32[2, 2]", "f32[4]", message="weights are f32[4], expected f32[4, 1]"),
    wrong(RowWeights, "f32[3, 2]", "bundle{i32[5]}", message="the handle is bundle{i32[5]}, expected bundle{i32[6]}"),
    wrong(RowWeights, "bf16[3, 2]", "bundle{i32[6]}", message="weights are bf16[3, 2], expected f32[T, k]"),
    wrong(SlotWeights, "f32[6, 2]", "bundle{i32[6]}", slots=2, message="rows are f32[6, 2], expected f32[T*k, 1]"),
    wrong(SlotWeights, "f32[6, 1]", "bundle{i32[6]}", slots=4, message="6 rows are not 4 for each of several tokens"),
    # losses
    wrong(CrossEntropy, "f32[3, 8]", "i64[4]", message="expected logits [T, V] and labels [T], found f32[3, 8] and i64[4]"),
    wrong(BalanceLoss, "f32[6, 8]", "i32[6, 2]", sequences=4, message="6 tokens are not 4 equal sequences"),
    wrong(CrossEntropyBackward, "f32[3, 8]", "i64[3]", "f32[3]", message="dloss is f32[3], expected f32[]"),
    wrong(BalanceLossBackward, "f32[6, 8]", "i32[6, 2]", "bf16[]", sequences=2, message="dloss is bf16[], expected f32[]"),
    # quantisation
    wrong(Quantize, "f32[3, 8]", dtype=DType.bf16, message="expected one of f8e4m3, f8e5m2, e5m6, found bf16"),
    wrong(Quantize, "f32[3, 8]", tile=(0, 4), message="a tile is [rows, columns], both 1 or more, found [0, 4]"),
    wrong(
        Dequantize,
        *("f8e4m3[3, 200]", "f32[3, 1]"),
        message="scales of f8e4m3[3, 200] in tiles of [1, 128] are f32[3, 2], found f32[3, 1]",
    ),
    wrong(
        ScaledMatmul,
        *("f8e4m3[3, 20]", "f32[3, 1]", "f8e4m3[5, 30]", "f32[1, 1]"),
        message="inner dimensions differ: a is f8e4m3[3, 20], so k = 20, but b is f8e4m3[5, 30], so k = 30",
    ),
    wrong(
        GroupedScaledMatmul,
        *("f8e4m3[3, 20]", "f32[3, 1]", "f8e4m3[2, 5, 20]", "f32[2, 1, 1]", "i32[3]"),
        message="counts are i32[3], expected one for each of 2 groups",
    ),
    wrong(
        GroupedScaledMatmul,
        *("f8e4m3[4, 20]", "f32[2, 1]", "f8e4m3[2, 5, 20]", "f32[2, 1, 1]", "i32[2]"),
        x_tile=(2, 128),
        message="scales of f8e4m3[4, 20] in tiles of [2, 128], restarting at each of 2 groups, are f32[4, 1], found f32[2, 1]",
    ),
    wrong(
        GroupedScaledMatmul,
        *("f8e4m3[2, 4, 20]", "f32[2, 3, 1]", "f8e4m3[2, 5, 20]", "f32[2, 1, 1]", "i32[2]"),
        x_tile=(4, 128),
        message="expected x [E, M, K] with 2 groups, in tiles of one row, found f8e4m3[2, 4, 20] in tiles of [4, 128]",
    ),
    wrong(
        GroupedScaledMatmulWgrad,
        *("f8e4m3[300, 3]", "f32[3, 3]", "f8e4m3[300, 5]", "f32[4, 5]", "i32[2]"),
        message="scales of f8e4m3[300, 3] in tiles of [128, 1], restarting at each of 2 groups, are f32[4, 3], found f32[3, 3]",
    ),
    # fused ops
    wrong(RmsNormBackwardAdd, "f32[3, 8]", "f32[8]", "f32[3, 8]", eps=1e-6, message="rms_norm_backward_add needs what is added"),
    wrong(RmsNormBackwardAdd, "f32[3, 8]", "f32[8]", "f32[3, 8]", "f32[8]", eps=1e-6, message="f32[8] is added, expected f32[3, 8]"),
    wrong(
        ScaledMatmulAdd,
        *("f8e4m3[3, 20]", "f32[3, 1]", "f8e4m3[5, 20]", "f32[1, 1]", "f32[3, 5]"),
        message="f32[3, 5] is added, expected bf16[3, 5]",
    ),
    wrong(
        GroupedScaledMatmulAdd,
        *("f8e4m3[6, 20]", "f32[6, 1]", "f8e4m3[2, 5, 20]", "f32[2, 1, 1]", "i32[2]"),
        message="grouped_scaled_matmul_add needs what is added",
    ),
    wrong(
        MlaAttention,
        *("f32[2, 5, 4]", "f32[2, 5, 4]", "f32[2, 5, 3]", "f32[2, 5, 2]", "f32[2, 5, 3]"),
        mask=None,
        message="widths differ: q is f32[2, 5, 6], but k is f32[2, 5, 7]",
    ),
    wrong(MlaAttentionBackward, *["f32[2, 5, 4]"] * 5, message="mla_attention_backward needs q_pe and k_pe"),
    wrong(
        MlaDecode,
        *("f32[2, 4, 3]", "f32[2, 9, 1, 3]", "f32[2, 9, 1, 3]", "i64[2]"),
        scale=1.0,
        message="mla_decode needs q_pe, and its keys are whole",
    ),
    wrong(Joined, "f32[2, 3]", "f32[3, 3]", axis=1, message="operands differ outside axis 1: f32[2, 3] and f32[3, 3]"),
    # collectives
    wrong(AllGather, "f32[3, 4]", axis="tp", size=0, message="size is 0, expected the number of ranks along tp, 1 or more"),
    wrong(AllGather, "f32[rows<=3, 4]", axis="tp", size=2, message="all_gather needs a static shape, found f32[rows<=3, 4]"),
    wrong(AllGather, "f32[3]", axis="tp", size=2, dim=1, message="axis 1 is outside a tensor of rank 1: f32[3]"),
    wrong(ReduceScatter, "f32[3, 4]", axis="dp", size=2, message="dimension 0 of f32[3, 4] does not make 2 equal parts"),
    wrong(ReduceScatter, "bool[4]", axis="dp", size=2, message="expected numbers, found bool[4]"),
    wrong(AllReduce, "bool[4]", axis="dp", size=2, message="expected numbers, found bool[4]"),
    wrong(AllToAll, "f32[3, 4]", axis="ep", size=4, message="f32[3, 4] does not make 4 equal parts along dimension 0"),
    wrong(
        AllToAllRows,
        *("f32[6, 3]", "i32[2]", "i32[3]"),
        **{"axis": "ep", "size": 2, "rows": 6},
        message="expected send and recv of shape [2] or [2, blocks], found i32[2] and i32[3]",
    ),
    wrong(
        AllToAllRows,
        *("f32[6, 3]", "f32[5, 1]", "i32[2]", "i32[2]"),
        **{"axis": "ep", "size": 2, "rows": 6},
        message="expected every x as [R, ...] with the same R, found f32[6, 3] and f32[5, 1]",
    ),
    wrong(
        InternodeDispatch,
        *("f32[4, 3]", "i32[4, 2]"),
        **{"experts": 6, "axis": "ep", "size": 4, "nodes": 2},
        message="6 experts do not make equal parts for 4 ranks",
    ),
    wrong(
        InternodeCombine,
        *("f32[4, 3]", "bundle{i32[4, 2]}"),
        **{"axis": "ep", "size": 4, "nodes": 3},
        message="4 ranks along ep do not make 3 equal nodes",
    ),
    wrong(
        InternodeRedispatch,
        *("f32[4, 3]", "bundle{i32[4, 2]}"),
        **{"axis": "ep", "size": 4, "nodes": 4},
        message="the handle is bundle{i32[4, 2]}, expected 4 fields: ids, tokens, send, recv of each hop",
    ),
    wrong(OwnPart, "f32[3, 4]", axis="tp", size=2, message="dimension 0 of f32[3, 4] does not make 2 equal parts"),
    wrong(Done, message="done needs the results of a started collective"),
    wrong(Done, "f32[3]", message="expected a tensor on its way (async), but %x0 is f32[3]"),
    wrong(Neg, "async f32[3]", message="expected a tensor, but %x0 is async f32[3]"),
    # control
    wrong(Param, path="w", result_types=(), message="a weight is one tensor, found 0 results"),
    wrong(Constant, path="c", result_types=result("f32[1]") * 2, message="a constant is one tensor, found 2 results"),
    wrong(Literal, values=(1, 2), shape=(3,), dtype=DType.i32, message="i32[3] holds 3 numbers, found 2"),
    wrong(Literal, values=(1.5,), shape=(3,), dtype=DType.i32, message="i32 holds whole numbers, found fractions"),
    wrong(Iota, length=-1, dtype=DType.i32, message="length is -1, expected 0 or more"),
    wrong(Unpack, "f32[3]", message="expected a bundle, but %x0 is f32[3]"),
)

CANNOT_FAIL = {
    "cast": "every tensor can be cast",
    "pack": "any values make a bundle",
    "call": "checked against its callee, by the verifier",
    "fused": "checked against its callee, by the verifier",
}
"""Ops whose type rule refuses nothing, and why."""
