"""Normalisation and losses."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ...ir.core import Value
from ...ir.ops.elementwise import Add, Mul, Rsqrt, Sub
from ...ir.ops.loss import CrossEntropy
from ...ir.ops.norm import RmsNorm
from ...ir.ops.reduce import Mean
from ...ir.types import DType
from .rules import Emitter, Number, aten, unsupported
from .shape import permuted, reshaped

_F32_EPS = 2.0**-23


@aten("rms_norm")
def rms_norm(b: Emitter, x: Value, shape: Sequence[int], weight: Value | None = None, eps: Number | None = None) -> Value:
    """Over the last len(shape) axes. Without eps torch takes that of the type it computes in."""
    scale = b.filled(1, shape, x.dtype) if weight is None else weight
    epsilon = eps if eps is not None else 2.0**-52 if x.dtype is DType.f64 else _F32_EPS
    rows = reshaped(b, x, (*x.shape[: x.tensor.rank - len(shape)], prod(shape)))
    made = b.make(RmsNorm(rows, reshaped(b, scale, (prod(shape),)), float(epsilon)))
    return b.cast(reshaped(b, made, b.shape), b.dtype)


@aten("layer_norm")
def layer_norm(
    b: Emitter,
    x: Value,
    shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: Number = 1e-5,
    cudnn_enable: bool = True,
) -> Value:
    """(x - mean) / sqrt(var + eps) * weight + bias (arXiv 1607.06450, section 3), in float32 and rounded once."""
    axes = tuple(range(x.tensor.rank - len(shape), x.tensor.rank))
    wide = b.wide(x)
    centred = b.make(Sub(wide, b.make(Mean(wide, axes=axes, keepdims=True))))
    variance = b.make(Mean(b.make(Mul(centred, centred)), axes=axes, keepdims=True))
    made = b.make(Mul(centred, b.make(Rsqrt(b.make(Add(variance, b.number(eps, wide.dtype)))))))
    if weight is not None:
        made = b.make(Mul(made, b.wide(weight)))
    if bias is not None:
        made = b.make(Add(made, b.wide(bias)))
    return b.cast(made, x.dtype)


@aten("cross_entropy_loss")
def cross_entropy(
    b: Emitter,
    logits: Value,
    labels: Value,
    weight: Value | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Value:
    """The mean over tokens; classes stand on axis 1, or on axis 0 of a single token."""
    if weight is not None or reduction != 1 or label_smoothing or labels.dtype.is_float:
        raise unsupported("this cross_entropy", 'labels of classes, reduction="mean", no weight and no label_smoothing')
    rank = logits.tensor.rank
    last = permuted(b, logits, [0, *range(2, rank), 1]) if rank > 2 else logits
    rows = reshaped(b, last, (labels.tensor.size, last.shape[-1]))
    loss = b.make(CrossEntropy(rows, reshaped(b, labels, (labels.tensor.size,)), ignore_index))
    return b.cast(loss, b.dtype)
