"""The derived bounds let no seeded fault pass, and the rounding of the reference is explained by them to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dsc import backends
from dsc.backends.arrays import Array, rounded, widen
from dsc.backends.numpy_ref.run import unrounded
from dsc.ir.core import Builder, Module, Op
from dsc.ir.ops import attention, elementwise, linalg, loss, moe, norm, reduce, shape
from dsc.ir.types import DType
from dsc.testing.bounds import ERRORS, FLOAT32, bound, errors, exact
from dsc.testing.samples import SAMPLES, samples
from dsc.testing.sampling import Sample


def truncated(y: Array) -> Array:
    """To bf16 by dropping bits, as Triton's interpreter does."""
    return widen((np.asarray(y, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32), np.float64)


def bf16(y: Array) -> Array:
    return widen(rounded(np.asarray(y, np.float64), DType.bf16), np.float64)


def f32(y: Array) -> Array:
    return np.asarray(y, np.float32).astype(np.float64)


def added_up(terms: Array, rounding: Callable[[Array], Array]) -> Array:
    """Terms along the last axis, the running sum rounded at each step."""
    total = np.zeros(terms.shape[:-1])
    for i in range(terms.shape[-1]):
        total = rounding(total + terms[..., i])
    return total


def softmaxed(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def attend(scale: float, later: int = 0, causal: bool = False) -> Callable[..., Array]:
    def faulty(op: attention.Attention, q: Array, k: Array, v: Array) -> Array:
        k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.swapaxes(-1, -2) * scale
        if causal:
            scores = np.where(np.tril(np.ones(scores.shape[-2:]), later) > 0, scores, -np.inf)
        return softmaxed(scores) @ v

    return faulty


def lost_duplicates(op: shape.IndexAdd, x: Array, indices: Array, updates: Array) -> Array:
    result = x.copy()
    result[indices] += updates
    return result


def halves_as_pairs(op: norm.Rope, x: Array, cos: Array, sin: Array) -> Array:
    (found,) = unrounded(norm.Rope(op.x, op.cos, op.sin, not op.interleaved), (x, cos, sin))
    return found


def rms(x: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def one_row_late(op: linalg.GroupedMatmul, x: Array, w: Array, counts: Array) -> Array:
    late = np.array(counts)
    late[0] += 1
    late[-1] -= 1
    return unrounded(op, (x, w, late))[0]


def of_counted(op: loss.CrossEntropy, logits: Array, labels: Array) -> Array:
    """The mean over all tokens, ignored ones too."""
    (mean,) = unrounded(op, (logits, labels))
    return mean * (labels != op.ignore).mean()


def bias_in_the_weights(op: moe.Route, logits: Array, bias: Array) -> tuple[Array, Array]:
    ids, _ = unrounded(op, (logits, bias))
    scores = np.take_along_axis(1 / (1 + np.exp(-logits)) + bias, ids, 1)
    return ids, scores / scores.sum(1, keepdims=True) * op.scale


def of(cls: type[Op], dtype: str, tag: str = "", **attributes: Any) -> Sample:
    """The first sample of `cls` of that dtype and kind."""
    return next(
        s
        for s in samples(cls)
        if str(s.op().result.dtype if len(s.op().results) == 1 else "") in (dtype, "")
        and tag in s.tag
        and all(s.attributes.get(k) == v for k, v in attributes.items())
    )


FAULTS: dict[str, tuple[Sample, Callable[..., Any]]] = {
    "matmul: the last term dropped": (
        of(linalg.Matmul, "f32"),
        lambda op, a, b: a[..., :-1] @ b[..., :-1, :],
    ),
    "matmul: rounding by dropping bits": (of(linalg.Matmul, "bf16"), lambda op, a, b: truncated(a @ b)),
    "matmul: sums in bf16": (
        of(linalg.Matmul, "bf16"),
        lambda op, a, b: added_up(a[..., None, :] * b.swapaxes(-1, -2)[..., None, :, :], bf16),
    ),
    "matmul: operands rounded to bf16": (of(linalg.Matmul, "f32"), lambda op, a, b: bf16(a) @ bf16(b)),
    "grouped_matmul: a row in the wrong group": (of(linalg.GroupedMatmul, "bf16"), one_row_late),
    "grouped_matmul: rounding by dropping bits": (
        of(linalg.GroupedMatmul, "bf16"),
        lambda op, *xs: truncated(unrounded(op, xs)[0]),
    ),
    "attention: no scale": (of(attention.Attention, "bf16"), attend(1.0)),
    "attention: one key too many": (of(attention.Attention, "bf16", causal=True), attend(0.3, 1, causal=True)),
    "attention: one key too few": (of(attention.Attention, "f32", causal=True), attend(0.3, -1, causal=True)),
    "attention: probabilities rounded to bf16": (
        of(attention.Attention, "f32"),
        lambda op, q, k, v: bf16(softmaxed(q @ np.repeat(k, 2, 1).swapaxes(-1, -2) * op.scale)) @ np.repeat(v, 2, 1),
    ),
    "rms_norm: no weight": (of(norm.RmsNorm, "bf16"), lambda op, x, weight: rms(x, op.eps)),
    "rms_norm: rounded before the weight": (of(norm.RmsNorm, "bf16"), lambda op, x, weight: bf16(rms(x, op.eps)) * weight),
    "rms_norm: one element too few in the mean": (
        of(norm.RmsNorm, "f32"),
        lambda op, x, w: rms(x, op.eps) * w * (1 - 1 / x.shape[-1]) ** 0.5,
    ),
    "rope: halves for pairs": (of(norm.Rope, "f32"), halves_as_pairs),
    "rope: turned the other way": (of(norm.Rope, "bf16"), lambda op, x, cos, sin: unrounded(op, (x, cos, -sin))[0]),
    "swiglu: rounded between": (
        of(elementwise.SwiGLU, "bf16"),
        lambda op, gate, up: bf16(gate / (1 + np.exp(-gate))) * up,
    ),
    "add: rounding by dropping bits": (of(elementwise.Add, "bf16"), lambda op, a, b: truncated(a + b)),
    "mul: a scalar rounded first": (of(elementwise.Mul, "bf16", "by a scalar"), lambda op, a, b: a * bf16(b)),
    "exp: of an argument rounded to bf16": (of(elementwise.Exp, "f32"), lambda op, x: np.exp(bf16(x))),
    "div: by an approximate reciprocal": (of(elementwise.Div, "f32"), lambda op, a, b: f32(a * f32(1 / b))),
    "sum: in bf16": (of(reduce.Sum, "bf16"), lambda op, x: added_up(x, bf16)[..., None]),
    "mean: over one too many": (of(reduce.Mean, "f32"), lambda op, x: x.sum(-1, keepdims=True) / (x.shape[-1] + 1)),
    "cumsum: without the element itself": (of(reduce.CumSum, "f32"), lambda op, x: np.cumsum(x, 1) - x),
    "softmax: along another axis": (of(reduce.Softmax, "f32"), lambda op, x: softmaxed(x, 0)),
    "softmax: exponentials in bf16": (of(reduce.Softmax, "bf16"), lambda op, x: softmaxed(bf16(x - x.max(-1, keepdims=True)))),
    "index_add: duplicates lost": (of(shape.IndexAdd, "bf16"), lost_duplicates),
    "combine: a slot dropped": (
        of(moe.Combine, "f32"),
        lambda op, rows, handle, w: unrounded(op, (rows, handle, w * (np.arange(w.shape[1]) < w.shape[1] - 1)))[0],
    ),
    "combine: weights of the wrong slots": (
        of(moe.Combine, "bf16"),
        lambda op, rows, handle, w: unrounded(op, (rows, handle, w[:, ::-1]))[0],
    ),
    "cross_entropy: ignored tokens counted": (of(loss.CrossEntropy, "f32"), of_counted),
    "balance_loss: one sequence for all": (
        of(loss.BalanceLoss, "f32"),
        lambda op, logits, ids: unrounded(loss.BalanceLoss(op.logits, op.ids, 1), (logits, ids))[0],
    ),
    "route: the bias in the weights": (of(moe.Route, "", "V3"), bias_in_the_weights),
    "attention_backward: without the sum of dout * out": (
        of(attention.AttentionBackward, "bf16"),
        lambda op, q, k, v, out, dout: unrounded(op, (q, k, v, 0 * out, dout)),
    ),
    "attention_backward: no scale on dk": (
        of(attention.AttentionBackward, "f32", causal=True),
        lambda op, *xs: tuple(g / (op.scale if i == 1 else 1) for i, g in enumerate(unrounded(op, xs))),
    ),
    "rms_norm_backward: without the mean": (
        of(norm.RmsNormBackward, "bf16"),
        lambda op, x, w, dy: (dy * w / np.sqrt((x * x).mean(-1, keepdims=True) + op.eps), unrounded(op, (x, w, dy))[1]),
    ),
    "rms_norm_backward: a row too few in dweight": (
        of(norm.RmsNormBackward, "f32"),
        lambda op, x, w, dy: (unrounded(op, (x, w, dy))[0], unrounded(op, (x, w, dy * (np.arange(dy.shape[1]) > 0)[:, None]))[1]),
    ),
    "swiglu_backward: the slope of a sigmoid": (
        of(elementwise.SwiGLUBackward, "bf16"),
        lambda op, gate, up, dy: (dy * up / (1 + np.exp(-gate)), unrounded(op, (gate, up, dy))[1]),
    ),
    "grouped_matmul_wgrad: a row in the wrong group": (of(linalg.GroupedMatmulWgrad, "f32"), one_row_late),
    "cross_entropy_backward: the mean over ignored tokens too": (
        of(loss.CrossEntropyBackward, "bf16"),
        lambda op, logits, labels, dloss: unrounded(op, (logits, labels, dloss * (labels != op.ignore).mean()))[0],
    ),
    "route_backward: normalisation taken for constant": (
        of(moe.RouteBackward, "f32", normalize=True),
        lambda op, logits, ids, dweights: unrounded(moe.RouteBackward(op.logits, op.ids, op.dweights, op.score, False, op.scale),
                                                    (logits, ids, dweights))[0],
    ),
    "balance_loss_backward: one sequence for all": (
        of(loss.BalanceLossBackward, "f32"),
        lambda op, *xs: unrounded(loss.BalanceLossBackward(op.logits, op.ids, op.dloss, 1), xs)[0],
    ),
    "swiglu: the next row's weight": (
        of(elementwise.SwiGLU, "bf16", "with weights"),
        lambda op, gate, up, w: unrounded(op, (gate, up, np.roll(w, 1, 0))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_exceeds_the_bound(fault: str) -> None:
    sample, faulty = FAULTS[fault]
    op, arrays = sample.op(), sample.arrays()
    results = backends.get("numpy").evaluate(op, arrays)
    with np.errstate(all="ignore"):
        wrong = faulty(op, *map(exact, arrays))
    wrong = wrong if isinstance(wrong, tuple) else (wrong,)
    exceeded = 0
    for value, limit, right, y in zip(op.results, bound(op, arrays, results), results, wrong, strict=True):
        stored = rounded(np.asarray(y, np.float64), value.dtype) if value.dtype.is_float else y
        exceeded += int((np.abs(np.asarray(stored, np.float64) - np.asarray(right, np.float64)) > limit).sum())
    assert exceeded, "the bound would let this fault pass"


COMPUTED = [s for s in SAMPLES if s.cls in ERRORS and s.op().results[0].dtype.is_float]


@pytest.mark.parametrize("sample", [s for s in COMPUTED if s.op().results[0].dtype is DType.bf16], ids=lambda s: s.name)
def test_bf16_results_are_float64_ones_rounded_once(sample: Sample) -> None:
    """Except where a boundary of rounding lies within the error of float32 sums; that error is small against a unit of bf16."""
    op, arrays = sample.op(), sample.arrays()
    ys = unrounded(op, arrays)
    limits = errors(op, FLOAT32, ys, [exact(x) for x in arrays])
    for value, found, y, e in zip(op.results, backends.get("numpy").evaluate(op, arrays), ys, limits, strict=True):
        if value.dtype is not DType.bf16:
            continue
        differs = widen(found, np.float64) != widen(rounded(y, DType.bf16), np.float64)
        low, high = (widen(rounded(edge, DType.bf16), np.float64) for edge in (y - e, y + e))
        assert not (differs & (low == high)).any()
        assert (low == high).mean() > 0.5, "the bound explains every difference, so this test shows nothing"


@pytest.mark.parametrize("sample", [s for s in COMPUTED if s.op().expand(Builder("f")) is not None], ids=lambda s: s.name)
def test_what_an_op_expands_to_computes_the_same(sample: Sample) -> None:
    b = Builder("expanded")
    params = [b.param(f"x{i}", o.type) for i, o in enumerate(sample.operands)]
    module = Module((b.finish(sample.op(*params).expand(b)),))
    arrays = sample.arrays()
    results = backends.get("numpy").run(module, no_weights, arrays)
    expected = backends.get("numpy").evaluate(sample.op(), arrays)
    for limit, x, y in zip(bound(sample.op(), arrays, expected), results, expected, strict=True):
        assert (np.abs(widen(x, np.float64) - widen(y, np.float64)) <= limit).all()


def no_weights(name: str, type: Any) -> Array:
    raise AssertionError(f"no weight was expected, {name} was asked for")


def test_some_ops_expand() -> None:
    assert {s.cls for s in COMPUTED if s.op().expand(Builder("f")) is not None} >= {norm.RmsNorm, norm.Rope}
