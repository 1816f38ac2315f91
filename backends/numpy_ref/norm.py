"""RMSNorm and rotary position embedding."""

from __future__ import annotations

import numpy as np

from ...ir.ops import norm as ops
from ..arrays import Array
from .registry import reference


@reference(ops.RmsNorm)
def rms_norm(op: ops.RmsNorm, x: Array, weight: Array) -> Array:
    scale = np.asarray(np.einsum("...i,...i->...", x, x))
    scale /= x.shape[-1]
    scale += op.eps
    np.sqrt(scale, out=scale)
    result = x * np.divide(1, scale, out=scale)[..., None]
    result *= weight
    return result


@reference(ops.RmsNormBackward)
def rms_norm_backward(op: ops.RmsNormBackward, x: Array, weight: Array, dy: Array) -> tuple[Array, Array]:
    scale = np.asarray(np.einsum("...i,...i->...", x, x))
    scale /= x.shape[-1]
    scale += op.eps
    np.sqrt(scale, out=scale)
    normed = x / scale[..., None]
    dweight = np.einsum("ri,ri->i", *(v.reshape(-1, x.shape[-1]) for v in (dy, normed)))
    dx = dy * weight
    along = np.asarray(np.einsum("...i,...i->...", dx, normed))
    along /= x.shape[-1]
    normed *= along[..., None]
    dx -= normed
    dx /= scale[..., None]
    return dx, dweight


@reference(ops.Rope)
def rope(op: ops.Rope, x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if op.interleaved else (slice(0, half), slice(half, None))
    a, b, cos, sin = x[..., first], x[..., second], cos[..., None, :], sin[..., None, :]
    result = np.empty_like(x)
    np.subtract(a * cos, b * sin, out=result[..., first])
    np.add(b * cos, a * sin, out=result[..., second])
    return result
