"""Every op that torch has, against torch in float64 on the same numbers: both interpreters must lie within their derived error of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsc import backends
from dsc.backends.arrays import STORAGE, Array, rounded, widen
from dsc.backends.numpy_ref.run import unrounded
from dsc.ir.core import Op, Value
from dsc.ir.ops import attention, elementwise, linalg, loss, norm, reduce, shape
from dsc.ir.types import DType, Tensor
from dsc.testing.bounds import ERRORS, FLOAT32, FLOAT64, error, exact
from dsc.testing.samples import SAMPLES
from dsc.testing.sampling import Sample

T = torch.Tensor


def pointwise(function: Callable[..., T]) -> Callable[..., T]:
    return lambda op, *xs: function(*xs)


def over_axes(function: Callable[..., T]) -> Callable[..., T]:
    return lambda op, x: function(x, dim=op.axes, keepdim=op.keepdims)


def pow(op: Op, a: T, b: T) -> T:
    return torch.pow(a, b)


def div(op: Op, a: T, b: T) -> T:
    return a / b if a.is_floating_point() or b.is_floating_point() else torch.div(a, b, rounding_mode="floor")


def pad(op: shape.Pad, x: T) -> T:
    pairs = [p for lo, hi in reversed(list(zip(op.low, op.high, strict=True))) for p in (lo, hi)]
    return F.pad(x, pairs, value=op.value)


def take(op: shape.Take, x: T, indices: T) -> T:
    flat = x.index_select(op.axis, indices.reshape(-1))
    return flat.reshape(*x.shape[: op.axis], *indices.shape, *x.shape[op.axis + 1 :])


def topk(op: reduce.TopK, x: T) -> tuple[T, T]:
    values, order = x.sort(dim=op.axis, descending=True, stable=True)
    return values.narrow(op.axis, 0, op.k), order.narrow(op.axis, 0, op.k)


def histogram(op: reduce.Histogram, x: T) -> T:
    return torch.bincount(x[(x >= 0) & (x < op.bins)], minlength=op.bins)


def cache_append(op: Op, cache: T, new: T, positions: T) -> T:
    return cache.index_put((torch.arange(len(new)), positions), new)


def rope(op: norm.Rope, x: T, cos: T, sin: T) -> T:
    """As a product of complex numbers: (a + ib) e^(i angle)."""
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if op.interleaved else x.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin).unsqueeze(-2)
    back = torch.view_as_real(turned)
    return (back if op.interleaved else back.transpose(-1, -2)).flatten(-2)


def attend(op: attention.Attention, q: T, k: T, v: T, mask: T | None = None) -> T:
    if mask is not None and mask.dtype in (torch.int32, torch.int64):
        blocks = [torch.ones(b - a, b - a, dtype=torch.bool) for a, b in itertools.pairwise(mask.tolist())]
        open_ = torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.bool)
        open_[mask[0] : mask[-1], mask[0] : mask[-1]] = torch.block_diag(*blocks)
        mask = open_
    if op.causal:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        mask = seen if mask is None else seen & mask
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=op.scale, enable_gqa=q.shape[-3] != k.shape[-3])
    return found if mask is None or mask.dtype != torch.bool else found.masked_fill(~mask.expand(*mask.shape).any(-1, keepdim=True), 0.0)


ORACLES: dict[type[Op], Callable[..., Any]] = {
    elementwise.Neg: pointwise(torch.neg),
    elementwise.Abs: pointwise(torch.abs),
    elementwise.Exp: pointwise(torch.exp),
    elementwise.Log: pointwise(torch.log),
    elementwise.Sqrt: pointwise(torch.sqrt),
    elementwise.Rsqrt: pointwise(torch.rsqrt),
    elementwise.Sin: pointwise(torch.sin),
    elementwise.Cos: pointwise(torch.cos),
    elementwise.Tanh: pointwise(torch.tanh),
    elementwise.Erf: pointwise(torch.erf),
    elementwise.Floor: pointwise(torch.floor),
    elementwise.Sigmoid: pointwise(torch.sigmoid),
    elementwise.Silu: pointwise(F.silu),
    elementwise.Relu: pointwise(F.relu),
    elementwise.Add: pointwise(torch.add),
    elementwise.Sub: pointwise(torch.sub),
    elementwise.Mul: pointwise(torch.mul),
    elementwise.Div: div,
    elementwise.Remainder: pointwise(torch.remainder),
    elementwise.Pow: pow,
    elementwise.Maximum: pointwise(torch.maximum),
    elementwise.Minimum: pointwise(torch.minimum),
    elementwise.Eq: pointwise(torch.eq),
    elementwise.Ne: pointwise(torch.ne),
    elementwise.Lt: pointwise(torch.lt),
    elementwise.Le: pointwise(torch.le),
    elementwise.Gt: pointwise(torch.gt),
    elementwise.Ge: pointwise(torch.ge),
    elementwise.And: pointwise(torch.logical_and),
    elementwise.Or: pointwise(torch.logical_or),
    elementwise.Not: pointwise(torch.logical_not),
    elementwise.Where: pointwise(torch.where),
    elementwise.SwiGLU: lambda op, gate, up, weight=1: F.silu(gate) * up * weight,
    shape.Reshape: lambda op, x: x.reshape(op.shape),
    shape.Transpose: lambda op, x: x.permute(op.perm),
    shape.Broadcast: lambda op, x: x.expand(op.shape),
    shape.Slice: lambda op, x: x.index_select(op.axis, torch.arange(op.start, op.stop, op.step)),
    shape.Concat: lambda op, *xs: torch.cat(xs, op.axis),
    shape.Pad: pad,
    shape.Take: take,
    shape.Gather: lambda op, x, indices: torch.gather(x, op.axis, indices),
    shape.Scatter: lambda op, x, indices, updates: torch.scatter(x, op.axis, indices, updates),
    shape.IndexAdd: lambda op, x, indices, updates: x.index_add(0, indices, updates),
    shape.CacheAppend: cache_append,
    reduce.Sum: over_axes(torch.sum),
    reduce.Mean: over_axes(torch.mean),
    reduce.Max: over_axes(torch.amax),
    reduce.Min: over_axes(torch.amin),
    reduce.Any: over_axes(torch.any),
    reduce.All: over_axes(torch.all),
    reduce.ArgMax: lambda op, x: x.argmax(op.axis, keepdim=op.keepdims),
    reduce.CumSum: lambda op, x: x.cumsum(op.axis),
    reduce.Softmax: lambda op, x: x.softmax(op.axis),
    reduce.LogSoftmax: lambda op, x: x.log_softmax(op.axis),
    reduce.TopK: topk,
    reduce.Sort: lambda op, x: x.sort(dim=op.axis, descending=op.descending, stable=True),
    reduce.Histogram: histogram,
    linalg.Matmul: lambda op, a, b: torch.matmul(a, b.mT if op.transpose_b else b),
    norm.RmsNorm: lambda op, x, weight: F.rms_norm(x, weight.shape, weight, op.eps),
    norm.Rope: rope,
    attention.Attention: attend,
    loss.CrossEntropy: lambda op, logits, labels: F.cross_entropy(logits, labels, ignore_index=op.ignore),
}


def tensor(x: Array) -> T:
    """The same numbers: floats as float64, whole numbers as int64."""
    if x.dtype == np.bool:
        return torch.from_numpy(x.copy())
    return torch.from_numpy(x.astype(np.int64) if x.dtype.kind in "iu" else widen(x, np.float64).copy())


COVERED = [s for s in SAMPLES if s.cls in ORACLES]


@pytest.mark.parametrize("sample", COVERED, ids=lambda s: s.name)
def test_torch_finds_the_same(sample: Sample) -> None:
    for seed in range(3):
        op, arrays = sample.op(), sample.arrays(seed)
        expected = ORACLES[sample.cls](op, *map(tensor, arrays))
        expected = [t.numpy() for t in (expected if isinstance(expected, tuple) else (expected,))]
        wide = [exact(x) for x in arrays]
        computed = sample.cls in ERRORS and op.result.dtype.is_float
        for value, y, narrow, double in zip(
            op.results, expected, backends.get("numpy").evaluate(op, arrays), backends.get("numpy-f64").evaluate(op, arrays), strict=True
        ):
            assert narrow.shape == y.shape
            if not computed:
                as_stored = rounded(y, value.dtype) if value.dtype.is_float else y.astype(narrow.dtype)
                np.testing.assert_array_equal(widen_all(narrow), widen_all(as_stored))
                np.testing.assert_array_equal(widen_all(double), widen_all(as_stored))
                continue
            single = FLOAT64 if value.dtype is DType.f64 else FLOAT32
            inside(narrow, y, error(op, single, y, wide), value.dtype)
            inside(double, y, error(op, FLOAT64, y, wide), value.dtype)
            (own,) = unrounded(op, arrays)
            np.testing.assert_allclose(own, y, rtol=1e-12, atol=1e-12 * np.abs(np.nan_to_num(y, posinf=0, neginf=0)).max(initial=1e-300))


def widen_all(x: Array) -> Array:
    return x if x.dtype.kind in "iub" else widen(x, np.float64)


def inside(found: Array, y: Array, e: Array, dtype: DType) -> None:
    """What correct rounding of some number within `e` of `y` gives."""
    e = np.where(np.isfinite(y), e, 0.0)
    low, high = (widen(rounded(np.asarray(edge), dtype), np.float64) for edge in (y - e, y + e))
    x = widen(found, np.float64)
    fine = ((low <= x) & (x <= high)) | (np.isnan(x) & np.isnan(y))
    assert fine.all(), f"{x[~fine][:3]} is not between {low[~fine][:3]} and {high[~fine][:3]}"


TORCH_DTYPES = {
    DType.f32: torch.float32,
    DType.bf16: torch.bfloat16,
    DType.f16: torch.float16,
    DType.f64: torch.float64,
    DType.i8: torch.int8,
    DType.i16: torch.int16,
    DType.i32: torch.int32,
    DType.i64: torch.int64,
    DType.u8: torch.uint8,
    DType.bool: torch.bool,
    DType.f8e4m3: torch.float8_e4m3fn,
    DType.f8e5m2: torch.float8_e5m2,
}


def cast_by_torch(sample: Sample) -> bool:
    """Left to the tests of numerics: formats that torch lacks, numbers beyond the range of ints, and float64 to what torch rounds twice."""
    source, target = sample.operands[0].type.dtype, sample.attributes["dtype"]
    twice = source is DType.f64 and target in (DType.bf16, DType.f16, DType.f8e4m3, DType.f8e5m2)
    return source in TORCH_DTYPES and target in TORCH_DTYPES and not twice and target is not DType.i8


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.cls is elementwise.Cast and cast_by_torch(s)], ids=lambda s: s.name)
def test_torch_casts_alike(sample: Sample) -> None:
    (x,), op = sample.arrays(), sample.op()
    expected = tensor(x).to(TORCH_DTYPES[op.x.dtype])
    if op.dtype in (DType.f8e4m3, DType.f8e5m2):
        largest = torch.finfo(TORCH_DTYPES[op.dtype]).max
        expected = expected.clamp(-largest, largest)  # torch saturates from 2.12 on only
    expected = expected.to(TORCH_DTYPES[op.dtype])
    wide = expected.to(torch.float64 if expected.is_floating_point() else torch.int64).numpy()
    (found,) = backends.get("numpy").evaluate(op, (x,))
    np.testing.assert_array_equal(widen_all(found), wide)


@pytest.mark.parametrize(
    ("dtype", "numbers", "expected"),
    [
        ("i8", [1e9, -1e9, np.nan, 127.9, -128.9, 128.0], [127, -128, 0, 127, -128, 127]),
        ("i32", [2.0**31, -(2.0**31), -(2.0**31) - 256, np.inf], [2**31 - 1, -(2**31), -(2**31), 2**31 - 1]),
        ("i64", [2.0**63, -(2.0**63), -np.inf, 2.0**62], [2**63 - 1, -(2**63), -(2**63), 2**62]),
        ("u8", [-1.0, 255.5, 256.0, 3.7], [0, 255, 255, 3]),
    ],
)
def test_floats_beyond_the_range_of_ints_become_its_end(dtype: str, numbers: list[float], expected: list[int]) -> None:
    for source in (DType.f32, DType.f64):
        x = np.array(numbers, STORAGE[source])
        op = elementwise.Cast(Value(Tensor(source, x.shape), "x"), DType[dtype])
        (found,) = backends.get("numpy").evaluate(op, (x,))
        assert found.tolist() == expected
