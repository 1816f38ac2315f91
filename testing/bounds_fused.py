"""How far two implementations of a fused op may lie apart: what its expansion permits, step by step.

Every value within is given the interval of all numbers that a permitted implementation can have there: an op's results over the
intervals of its operands, widened by its own error E (`bounds.py`) and rounded, which is monotonic, so that endpoints stay endpoints.
Most ops rise or fall in each operand while the others stand still, so over a box their extremes lie at its corners; the others say
theirs in `RANGES`. The permitted difference is the width of the result's interval: 0 where all of the way is exact, and more where a
rounding could fall either way. That operands depend on each other is left aside: the width may be larger than it need be, never smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np

from ..backends.arrays import STORAGE, Array, Data, rounded, widen
from ..backends.numpy_ref.run import FLOAT32 as REFERENCE
from ..backends.numpy_ref.run import unrounded
from ..ir.core import Func, Op, Value
from ..ir.ops import elementwise, norm, quant
from ..ir.types import Tensor
from .bounds import EXACT, FLOAT64, Floats, Precision, errors, exact

Interval = tuple[Data, Data]
"""The least and the largest value, in the storage of their dtype; the same object twice where there is one value."""


def enclosed(func: Func, operands: Sequence[Data], precision: Precision) -> tuple[Array | float, ...]:
    """The permitted |difference| of each result of `func`."""
    known: dict[Value, Interval] = {v: (x, x) for v, x in zip(func.params, operands, strict=True)}
    for op in func.ops:
        known.update(zip(op.results, _interval(op, [known[v] for v in op.operands], precision), strict=True))
    return tuple(_width(*known[v]) for v in func.results)


def _width(low: Data, high: Data) -> Array | float:
    if low is high:
        return 0.0
    a, b = (np.asarray(exact(x), np.float64) for x in (low, high))
    if low.dtype == np.bool:
        return np.where(a == b, 0.0, np.inf)
    width = np.where(a == b, 0.0, b - a)
    return np.where(np.isnan(a) & np.isnan(b), 0.0, np.nan_to_num(width, nan=np.inf, posinf=np.inf))


def _interval(op: Op, given: Sequence[Interval], precision: Precision) -> tuple[Interval, ...]:
    sure = all(low is high for low, high in given)
    if sure and type(op) in EXACT:
        return tuple((y, y) for y in REFERENCE.evaluate(op, [low for low, _ in given]))
    if isinstance(op, quant.Quantize):
        return _quantized(op, *given[0], given[1][0] if op.counts else None)
    corners = [unrounded(op, chosen) for chosen in product(*((low,) if low is high else (low, high) for low, high in given))]
    ranges = [(np.min(ys, axis=0), np.max(ys, axis=0)) for ys in (np.stack(each) for each in zip(*corners, strict=True))]
    wide = [(exact(low), exact(high)) for low, high in given]
    if not sure and type(op) in RANGES:
        ranges = RANGES[type(op)](op, *wide)
    es: Sequence[Any] = [0.0] * len(ranges)
    if type(op) not in EXACT:
        largest = [_largest(*ends) for ends in wide]
        es = errors(op, precision, [_largest(*ends) for ends in ranges], largest)
    return tuple(
        (_stored(low - e, v.tensor), _stored(high + e, v.tensor)) for (low, high), e, v in zip(ranges, es, op.results, strict=True)
    )


def _largest(low: Any, high: Any) -> Any:
    """The end of larger magnitude: what errors grow with."""
    return low if low is high else np.where(np.abs(low) > np.abs(high), low, high)


def _stored(x: Any, type: Tensor) -> Array:
    return rounded(np.asarray(x, np.float64), type.dtype) if type.dtype.is_float else np.asarray(x).astype(STORAGE[type.dtype])


# ---- ops that neither rise nor fall throughout

Ends = tuple[Floats, Floats]
RANGES: dict[type[Op], Callable[..., list[Ends]]] = {}


def _times(*factors: Ends) -> Ends:
    low, high = factors[0]
    for a, b in factors[1:]:
        corners = np.stack(np.broadcast_arrays(low * a, low * b, high * a, high * b))
        low, high = corners.min(0), corners.max(0)
    return low, high


def _square(low: Floats, high: Floats) -> Ends:
    a, b = low * low, high * high
    return np.where((low <= 0) & (high >= 0), 0.0, np.minimum(a, b)), np.maximum(a, b)


def _sigmoid(x: Ends) -> Ends:
    low, high = (1 / (1 + np.exp(-end)) for end in x)
    return low, high


LEAST_SILU = (-1.2784645427610738, -0.2784645427610738)
"""Where x / (1 + e^-x) is least, and what it is there: e^x = -x - 1."""


def _silu(x: Ends) -> Ends:
    ends = [np.where(np.isneginf(end), -0.0, end / (1 + np.exp(-end))) for end in x]
    turns = (x[0] <= LEAST_SILU[0]) & (x[1] >= LEAST_SILU[0])
    return np.where(turns, LEAST_SILU[1], np.minimum(*ends)), np.maximum(*ends)


def _wave(function: Callable[[Floats], Floats]) -> Callable[..., list[Ends]]:
    """Sine and cosine change by no more than their operand, and stay within -1 and 1."""

    def range_of(op: Op, x: Ends) -> list[Ends]:
        y, width = function(x[0]), x[1] - x[0]
        return [(np.maximum(y - width, -1.0), np.minimum(y + width, 1.0))]

    return range_of


def _abs(op: Op, x: Ends) -> list[Ends]:
    crosses = (x[0] <= 0) & (x[1] >= 0)
    a, b = np.abs(x[0]), np.abs(x[1])
    return [(np.where(crosses, 0.0, np.minimum(a, b)), np.maximum(a, b))]


def _div(op: Op, a: Ends, b: Ends) -> list[Ends]:
    crosses = (b[0] <= 0) & (b[1] >= 0) & (b[0] < b[1])
    low, high = _times(a, (1 / b[1], 1 / b[0]))
    slack = 2 * FLOAT64.unit * np.maximum(np.abs(low), np.abs(high))
    return [(np.where(crosses, -np.inf, low - slack), np.where(crosses, np.inf, high + slack))]


def _swiglu(op: Op, gate: Ends, up: Ends, *weight: Ends) -> list[Ends]:
    return [_times(_silu(gate), up, *weight)]


def _swiglu_backward(op: Op, gate: Ends, up: Ends, dy: Ends) -> list[Ends]:
    s = _sigmoid(gate)
    low, high = _times(gate, (1 - s[1], 1 - s[0]))
    return [_times((low + 1, high + 1), s, up, dy), _times(gate, s, dy)]


def _rms_norm(op: norm.RmsNorm, x: Ends, weight: Ends) -> list[Ends]:
    low, high = (np.sqrt(end.mean(-1, keepdims=True) + op.eps) for end in _square(*x))
    return [_times(x, (1 / high, 1 / low), weight)]


RANGES |= {elementwise.Sin: _wave(np.sin), elementwise.Cos: _wave(np.cos), elementwise.Abs: _abs, elementwise.Div: _div}
RANGES |= {elementwise.Silu: lambda op, x: [_silu(x)], elementwise.SwiGLU: _swiglu, elementwise.SwiGLUBackward: _swiglu_backward}
RANGES[norm.RmsNorm] = _rms_norm


def _quantized(op: quant.Quantize, low: Array, high: Array, counts: Array | None) -> tuple[Interval, Interval]:
    """A scale rises with the largest magnitude of its tile, a code falls in magnitude as the scale rises.

    The quotient of x and scale is rounded at most three times on its way to the code's format.
    """
    a, b = (widen(end, np.float64) for end in (low, high))
    crosses = (a <= 0) & (b >= 0)
    least = np.where(crosses, 0.0, np.minimum(np.abs(a), np.abs(b)))
    dtype = op.x.dtype
    magnitudes = (rounded(x, dtype) for x in (least, np.maximum(np.abs(a), np.abs(b))))
    ends = [REFERENCE.evaluate(op, [x, *([] if counts is None else [counts])])[1] for x in magnitudes]
    wide = [_spread(op, scales, counts, a.shape) for scales in ends]
    quotients = np.stack([x / np.where(s == 0, 1.0, s) for x in (a, b) for s in wide])
    bottom, top = quotients.min(0), quotients.max(0)
    slack = Precision(2.0**-24, 0.0).gamma(3)
    codes = [np.where(x < 0, x * (1 + sign * slack), x * (1 - sign * slack)) for x, sign in ((bottom, 1), (top, -1))]
    return (rounded(codes[0], op.dtype), rounded(codes[1], op.dtype)), (ends[0], ends[1])


def _spread(op: quant.Quantize, scales: Array, counts: Array | None, shape: tuple[int, ...]) -> Floats:
    """The scale of each element: what codes of one give when they are dequantised."""
    codes = rounded(np.ones(shape), op.dtype)
    values = quant.Dequantize(
        Value(Tensor(op.dtype, op.results[0].shape), "codes"),
        Value(op.results[1].type, "scales"),
        None if counts is None else op.counts,
        op.tile,
        dtype=op.results[1].dtype,
    )
    (found,) = REFERENCE.evaluate(values, [codes, scales, *([] if counts is None else [counts])])
    return widen(found, np.float64)
