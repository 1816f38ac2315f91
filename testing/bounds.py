"""How far two correct implementations of an op may lie apart, derived from the op, its types and its operands.

Every implementation reads its operands exactly, computes in float32 in some order and rounds once. With y the exact result and E a bound on
the error of the float32 computation, what it returns is round(y + e) for some |e| <= E, and because rounding is monotonic it lies between
round(y - E) and round(y + E). So two of them differ by at most round(y + E) - round(y - E), which is 0 unless a rounding boundary lies
within E of y: a wrong rounding shows as clearly as a wrong sum.

y is the float64 result of the reference. E is one function per op below, in the usual notation (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., sections 2.2 and 3.1): u is the unit roundoff, 2^-24 in float32, and n roundings in a row change a result by a factor
within 1 +- gamma(n), gamma(n) = n u / (1 - n u). A sum of n terms in any order is off by at most gamma(n - 1) times the sum of magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..backends.arrays import Array, Data, rounded, widen
from ..backends.numpy_ref.run import unrounded
from ..ir.core import Module, Op
from ..ir.ops import collective, control, elementwise, fused, internode, linalg, loss, moe, norm, quant, reduce, shape
from ..ir.types import DType, Tensor, tensors

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Precision:
    """What is computed in: the unit roundoff, and the smallest normal number, below which results may be cut to 0."""

    unit: float
    tiny: float

    def gamma(self, roundings: float | Floats) -> Any:
        """Relative error of so many roundings in a row."""
        total = roundings * self.unit
        return total / (1 - total)


FLOAT32 = Precision(2.0**-24, 2.0**-126)
FLOAT64 = Precision(2.0**-53, 2.0**-1022)

LIBRARY = 8
"""Roundings that exp, log, sin, cos, tanh, erf and pow count for: 4 units in the last place. NumPy documents at most 4 for float32,
CUDA's math library at most 2 (at most 4 for pow), torch's SLEEF 1."""
RSQRT = 4
"""Roundings of 1 / sqrt(x): 2 units in the last place, as the instruction of a GPU has; a root and a division make 2."""
SIGMOID = LIBRARY + 2
"""Roundings of 1 / (1 + e^-x): those of e^-x, the sum and the division."""

Error = Callable[..., Any]
ERRORS: dict[type[Op], Error] = {}
"""E of each op that computes: (op, precision, y, *operands), all arrays float64 or integer, gives what broadcasts to y.

Of an op with several results y is the tuple of them, and so is E.
"""

EXACT: set[type[Op]] = {
    *(elementwise.Cast, elementwise.Neg, elementwise.Abs, elementwise.Floor, elementwise.Relu, elementwise.Maximum, elementwise.Minimum),
    *(elementwise.Eq, elementwise.Ne, elementwise.Lt, elementwise.Le, elementwise.Gt, elementwise.Ge),
    *(elementwise.And, elementwise.Or, elementwise.Not, elementwise.Where),
    *(shape.Reshape, shape.Transpose, shape.Broadcast, shape.Slice, shape.Concat, shape.Pad, shape.Take, shape.Gather, shape.Scatter),
    *(shape.CacheAppend, reduce.Max, reduce.Min, reduce.Any, reduce.All, reduce.ArgMax, reduce.TopK, reduce.Sort, reduce.Histogram),
    *(quant.Quantize, quant.Dequantize, moe.Dispatch, moe.Redispatch),
    *(moe.DispatchGroups, moe.ChooseSlots, moe.RowWeights, moe.SlotWeights),
    *(control.Param, control.Constant, control.Literal, control.Iota, control.Pack, control.Unpack),
    *(collective.AllGather, collective.ReduceScatter, collective.AllReduce, collective.AllToAll, collective.AllToAllRows),
    *(collective.OwnPart, collective.Done, internode.InternodeDispatch, internode.InternodeRedispatch),
}
"""Ops that compute nothing that could be rounded differently: two implementations agree bit for bit. Collectives fix the order of sums."""

Function = TypeVar("Function", bound=Error)


def error_of(*classes: type[Op]) -> Callable[[Function], Function]:
    """Declare the function below as E of these ops."""

    def attach(function: Function) -> Function:
        for cls in classes:
            if cls in ERRORS or cls in EXACT:
                raise TypeError(f"op {cls.name!r} has two error bounds")
            ERRORS[cls] = function
        return function

    return attach


def bound(
    op: Op, operands: Sequence[Data], results: Sequence[Data], precision: Precision = FLOAT32, module: Module | None = None
) -> tuple[Array | float, ...]:
    """The permitted |difference| between two implementations of `op` on `operands`, one for each result tensor (those in bundles too).

    0 where they must agree, infinity where nothing can be said: at tokens whose choice of experts is closer than the error. `results` are
    those of one implementation: experts are compared on its choice. A `fused` op needs the `module` that it stands in.
    """
    if type(op) in EXACT:
        return tuple(0.0 for value in op.results for _ in tensors(value.type))
    precision = FLOAT64 if any(t.dtype is DType.f64 for v in (*op.operands, *op.results) for t in tensors(v.type)) else precision
    with np.errstate(all="ignore"):
        if isinstance(op, (fused.Fused, *fused.NAMED, internode.InternodeCombine)) and (func := fused.expansion(op, module)):
            return enclosed(func, operands, precision)
        wide = [exact(x) for x in operands]
        if isinstance(op, moe.Route):
            return _route(op, precision, results, *wide)
        ys = unrounded(op, operands)
        each = zip(op.results, ys, errors(op, precision, ys, wide), strict=True)
        return tuple(permitted(value.tensor, y, e) for value, y, e in each)


def error(op: Op, precision: Precision, y: Floats, operands: Sequence[Any]) -> Floats:
    """E of an op of one result."""
    (e,) = errors(op, precision, (y,), operands)
    return e


def errors(op: Op, precision: Precision, ys: Sequence[Floats], operands: Sequence[Any]) -> tuple[Floats, ...]:
    """E of each result. It covers the error of y too, which is itself computed, in float64."""
    if not op.results[0].dtype.is_float:
        return tuple(np.zeros(np.shape(y)) for y in ys)
    both = Precision(precision.unit + FLOAT64.unit, precision.tiny)
    found = (ERRORS[type(op)](op, both, ys[0], *operands),) if len(ys) == 1 else ERRORS[type(op)](op, both, ys, *operands)
    return tuple(np.broadcast_to(np.asarray(e, np.float64), np.shape(y)) for y, e in zip(ys, found, strict=True))


def permitted(type: Tensor, y: Floats, e: Floats) -> Floats:
    """round(y + e) - round(y - e) in the dtype of `type`; 0 where y is no number or infinite."""
    y, e = np.asarray(y), np.where(np.isfinite(y), e, 0.0)
    if not type.dtype.is_float:
        return np.zeros(y.shape)
    high, low = (widen(rounded(edge, type.dtype), np.float64) for edge in (y + e, y - e))
    return np.where(high == low, 0.0, np.nan_to_num(high - low, nan=0.0, posinf=np.inf))


def exact(x: Data) -> Any:
    """Floats as float64, whole numbers as they are."""
    if isinstance(x, tuple):
        return tuple(map(exact, x))
    return x if x.dtype.kind in "iub" else widen(x, np.float64)


# ---- one rounding


@error_of(elementwise.Add, elementwise.Sub, elementwise.Mul, elementwise.Div, elementwise.Sqrt, elementwise.Remainder)
def correctly_rounded(op: Op, p: Precision, y: Floats, *operands: Floats) -> Any:
    """IEEE operations round once: to a float32 result that is the one rounding, to a narrower one it comes before it."""
    unit = FLOAT64.unit if op.result.dtype in (DType.f32, DType.f64) else p.unit
    return unit * np.abs(y) + (p.tiny * p.unit if unit == p.unit else 0.0)


@error_of(*(getattr(elementwise, name) for name in ("Exp", "Log", "Sin", "Cos", "Tanh", "Erf", "Pow")))
def library(op: Op, p: Precision, y: Floats, *operands: Floats) -> Any:
    return p.gamma(LIBRARY) * np.abs(y) + p.tiny


@error_of(elementwise.Rsqrt)
def rsqrt(op: Op, p: Precision, y: Floats, x: Floats) -> Any:
    return p.gamma(RSQRT) * np.abs(y)


@error_of(elementwise.Sigmoid)
def sigmoid(op: Op, p: Precision, y: Floats, x: Floats) -> Any:
    """e^-x overflows where the result is below the smallest normal number."""
    return p.gamma(SIGMOID) * y + p.tiny


@error_of(elementwise.Silu)
def silu(op: Op, p: Precision, y: Floats, x: Floats) -> Any:
    """sigmoid, and a product."""
    return p.gamma(SIGMOID + 1) * np.abs(y) + p.tiny * (1 + np.abs(x))


@error_of(elementwise.SwiGLU)
def swiglu(op: Op, p: Precision, y: Floats, gate: Floats, up: Floats, *weight: Floats) -> Any:
    """silu, and a product; a second one with a weight."""
    lost = p.tiny * (1 + np.abs(gate)) * (1 + np.abs(up))
    return p.gamma(SIGMOID + 2 + len(weight)) * np.abs(y) + (lost * (1 + np.abs(weight[0])) if weight else lost)


# ---- sums


@error_of(reduce.Sum)
def sum(op: reduce.Sum, p: Precision, y: Floats, x: Floats) -> Any:
    return p.gamma(max(_extent(x, op.axes) - 1, 0)) * np.abs(x).sum(op.axes, keepdims=op.keepdims)


@error_of(reduce.Mean)
def mean(op: reduce.Mean, p: Precision, y: Floats, x: Floats) -> Any:
    """A sum, 1/n, and a product."""
    return p.gamma(_extent(x, op.axes) + 1) * np.abs(x).mean(op.axes, keepdims=op.keepdims)


def _extent(x: Floats, axes: Sequence[int]) -> int:
    return int(np.prod([x.shape[a] for a in axes], dtype=np.int64))


@error_of(reduce.CumSum)
def cumsum(op: reduce.CumSum, p: Precision, y: Floats, x: Floats) -> Any:
    return p.gamma(max(x.shape[op.axis] - 1, 0)) * np.cumsum(np.abs(x), op.axis)


@error_of(linalg.Matmul)
def matmul(op: linalg.Matmul, p: Precision, y: Floats, a: Floats, b: Floats) -> Any:
    """K products and K - 1 sums: gamma(K) |a| |b| (Higham, equation 3.13)."""
    return p.gamma(a.shape[-1]) * np.matmul(np.abs(a), np.abs(b.swapaxes(-1, -2) if op.transpose_b else b))


@error_of(linalg.GroupedMatmul)
def grouped_matmul(op: linalg.GroupedMatmul, p: Precision, y: Floats, x: Floats, w: Floats, counts: Array) -> Any:
    """Like matmul, group by group."""
    (magnitude,) = unrounded(op, (np.abs(x), np.abs(w), counts))
    return p.gamma(x.shape[1]) * magnitude


@error_of(quant.ScaledMatmul, quant.GroupedScaledMatmul)
def scaled_matmul(op: quant.ScaledMatmul | quant.GroupedScaledMatmul, p: Precision, y: Floats, a: Floats, *rest: Array) -> Any:
    """Like matmul, each product with two more roundings for the scales. An accumulator that is modelled bit by bit permits nothing."""
    if op.accumulation.arithmetic != "float32":
        return 0.0
    (magnitude,) = unrounded(op, tuple(map(np.abs, (a, *rest))))
    return p.gamma(a.shape[-1] + 2) * magnitude


@error_of(shape.IndexAdd)
def index_add(op: shape.IndexAdd, p: Precision, y: Floats, x: Floats, indices: Array, updates: Floats) -> Any:
    """Row r sums as many updates as its index stands there."""
    (magnitude,) = unrounded(op, (np.abs(x), indices, np.abs(updates)))
    times = np.bincount(indices, minlength=len(x)).reshape(-1, *[1] * (x.ndim - 1))
    return p.gamma(times.astype(np.float64)) * magnitude


@error_of(moe.Combine)
def combine(op: moe.Combine, p: Precision, y: Floats, rows: Floats, handle: tuple[Array], weights: Floats) -> Any:
    """k products and k - 1 sums."""
    (magnitude,) = unrounded(op, (np.abs(rows), handle, np.abs(weights)))
    return p.gamma(weights.shape[1]) * magnitude


@error_of(moe.CombineGroups)
def combine_groups(
    op: moe.CombineGroups, p: Precision, y: Floats, rows: Floats, tokens: Array, ids: Array, weights: Floats | None = None
) -> Any:
    """A product for each row of a token where there are weights, and one sum fewer than rows."""
    (magnitude,) = unrounded(op, (np.abs(rows), tokens, ids, *(np.abs(w) for w in (weights,) if w is not None)))
    return p.gamma(int(np.bincount(tokens, minlength=1).max())) * magnitude


@error_of(norm.RmsNorm)
def rms_norm(op: norm.RmsNorm, p: Precision, y: Floats, x: Floats, weight: Floats) -> Any:
    """The mean of n squares takes n + 2 roundings, eps one more; the root halves their error. Then the root's own and two products."""
    return p.gamma((x.shape[-1] + 3) / 2 + RSQRT + 2) * np.abs(y)


@error_of(norm.Rope)
def rope(op: norm.Rope, p: Precision, y: Floats, x: Floats, cos: Floats, sin: Floats) -> Any:
    """Two products and a sum: gamma(2) (|a cos| + |b sin|)."""
    forward, backward = (np.abs(unrounded(op, (np.abs(x), np.abs(cos), sign * np.abs(sin)))[0]) for sign in (1, -1))
    return p.gamma(2) * np.maximum(forward, backward)


# ---- softmax and what contains one: its exponents d = x - max x <= 0 are off by u |d|, which e^d turns into a relative error


def softmax_error(p: Precision, x: Floats, axis: int = -1, before: Any = 0.0) -> tuple[Floats, Floats]:
    """softmax(x) along an axis and its relative error, x being off by `before`; a row that is -inf throughout gives 0."""
    top = x.max(axis, keepdims=True, initial=-np.inf)
    d = np.where(np.isneginf(x), 0.0, x - np.where(np.isfinite(top), top, 0.0))
    exponentials = np.where(np.isneginf(x), 0.0, np.exp(d))
    total = exponentials.sum(axis, keepdims=True)
    y = exponentials / np.where(total == 0, 1.0, total)
    each = np.where(y == 0, 0.0, p.unit * np.abs(d) + p.gamma(LIBRARY) + before)
    return y, np.expm1(each + (y * each).sum(axis, keepdims=True) + p.gamma(x.shape[axis] + 1))


@error_of(reduce.Softmax)
def softmax(op: reduce.Softmax, p: Precision, y: Floats, x: Floats) -> Any:
    """Relative: that of each exponential, their weighted mean for the sum, the n - 1 sums, the division."""
    values, relative = softmax_error(p, x, op.axis)
    return values * relative + p.tiny


def _log_sum(p: Precision, x: Floats, axis: int) -> tuple[Floats, Floats, Floats]:
    """x - max x, log sum e^(x - max x), and the absolute error of the latter."""
    d = x - x.max(axis, keepdims=True)
    y, _ = softmax_error(p, x, axis)
    log = np.log(np.exp(d).sum(axis, keepdims=True))
    relative = (y * (p.unit * np.abs(d) + p.gamma(LIBRARY))).sum(axis, keepdims=True) + p.gamma(x.shape[axis])
    return d, log, relative + p.gamma(LIBRARY) * np.abs(log)


@error_of(reduce.LogSoftmax)
def log_softmax(op: reduce.LogSoftmax, p: Precision, y: Floats, x: Floats) -> Any:
    """Two differences and a logarithm, whose absolute error is the relative one of the sum."""
    d, _, e = _log_sum(p, x, op.axis)
    return p.unit * np.abs(d) + e + p.unit * np.abs(y)


@error_of(loss.CrossEntropy)
def cross_entropy(op: loss.CrossEntropy, p: Precision, y: Floats, logits: Floats, labels: Array) -> Any:
    """The mean of log_softmax at the labels, where max x + log sum e^(x - max x) may be formed first."""
    rows = np.flatnonzero(labels != op.ignore)
    x, labels = logits[rows], labels[rows, None]
    d, log, e = _log_sum(p, x, -1)
    picked = np.take_along_axis(d, labels, -1)
    each = np.abs(log - picked)
    formed = np.abs(x.max(-1, keepdims=True) + log) + np.abs(picked) + each
    return (e + p.unit * formed).mean() + p.gamma(len(rows) + 1) * each.mean() if len(rows) else 0.0


# ---- experts


@error_of(loss.BalanceLoss)
def balance_loss(op: loss.BalanceLoss, p: Precision, y: Floats, logits: Floats, ids: Array) -> Any:
    """All terms are positive, so errors stay relative: scores and their sum over E, means over S tokens, E experts and sequences."""
    tokens, experts = logits.shape
    scores = SIGMOID if op.score == "sigmoid" else LIBRARY + experts + 2 + float(np.ptp(logits, axis=-1).max(initial=0))
    return p.gamma(2 * scores + 2 * experts + tokens // op.sequences + op.sequences + 8) * y


def _route(op: moe.Route, p: Precision, results: Sequence[Data], logits: Floats, bias: Floats | None = None) -> tuple[Floats, Floats]:
    """Ids agree where every choice is decided by more than the error; so do weights, up to theirs, given the ids of `results`."""
    p = Precision(p.unit + FLOAT64.unit, p.tiny)
    if op.score == "softmax":
        scores, relative = softmax_error(p, logits)
    else:
        scores, relative = 1 / (1 + np.exp(-logits)), np.full_like(logits, p.gamma(SIGMOID))
    choice, e = scores, relative * scores + p.tiny
    if bias is not None:
        choice = scores + bias
        e = e + p.unit * np.abs(choice)
    close = np.zeros(len(logits), np.bool)
    if op.top_groups < op.groups:
        grouped, errors = (x.reshape(len(x), op.groups, logits.shape[1] // op.groups) for x in (choice, e))
        best = np.sort(grouped, -1)[..., -(2 if op.group_score == "top2" else 1) :]
        best_error = best.shape[-1] * errors.max(-1) + p.unit * np.abs(best).sum(-1)
        close |= _undecided(best.sum(-1), best_error, op.top_groups, ordered=False)
        kept = np.argsort(-best.sum(-1), axis=-1, kind="stable")[:, : op.top_groups]
        outside = np.ones(grouped.shape[:2], np.bool)
        np.put_along_axis(outside, kept, False, 1)
        choice = np.where(outside[..., None], -np.inf, grouped).reshape(choice.shape)
    close |= _undecided(choice, e, op.top_k, ordered=True)
    ids = np.asarray(results[0], np.int64)
    chosen, each = (np.take_along_axis(x, ids, 1) for x in (scores, relative))
    total = chosen.sum(1, keepdims=True) + 1e-20 if op.normalize else np.ones((len(ids), 1))
    weights = chosen / total * op.scale
    roundings = p.gamma(op.top_k + 3)
    e = weights * (each + (each.max(1, keepdims=True) if op.normalize else 0.0) + roundings) + p.tiny * (op.top_k + 1) * op.scale / total
    anything = np.where(close, np.inf, 0.0)[:, None]
    return np.broadcast_to(anything, ids.shape), permitted(op.results[1].tensor, weights, e) + anything


def _undecided(scores: Floats, e: Floats, k: int, *, ordered: bool) -> NDArray[np.bool]:
    """Rows [T, n] in which an error of `e` could change which k are the largest or, where `ordered`, their order."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked, errors = (np.take_along_axis(x, order, -1) for x in (scores, e))
    gaps = ranked[:, :-1] - ranked[:, 1:] <= errors[:, :-1] + errors[:, 1:]
    return np.asarray(gaps[:, (0 if ordered else max(k - 1, 0)) : k].any(-1))


from . import bounds_attention, bounds_backward  # noqa: E402, F401 - they fill ERRORS, by `error_of`
from .bounds_fused import enclosed  # noqa: E402
