"""How far two arrays lie apart, in the measures that the field uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends.arrays import widen

Array = np.ndarray


@dataclass(frozen=True)
class Measures:
    """How far b is from a: relative L2 norm of the difference, its largest element, signal to noise in dB, cosine similarity, and
    DeepGEMM's calc_diff, 1 - 2 <a, b> / (<a, a> + <b, b>)."""

    relative_l2: float
    max_error: float
    sqnr_db: float
    cosine: float
    calc_diff: float


SAME = Measures(0.0, 0.0, float("inf"), 1.0, 0.0)


def measure(a: Array, b: Array) -> Measures:
    """Compare two arrays of one shape, in float64. NaN or an infinity in the same place is no difference; elsewhere it makes the
    measures infinite or NaN."""
    x, y = (real(v).ravel() for v in (a, b))
    alike = (x == y) | (np.isnan(x) & np.isnan(y))
    if alike.all():
        return SAME
    with np.errstate(all="ignore"):  # IEEE says it right: nothing over nothing is NaN, noise without a signal is infinite
        error = np.where(alike, 0.0, y - x)
        x, y = (np.where(alike & ~np.isfinite(x), 0.0, v) for v in (x, y))
        signal, noise, other, inner = (np.float64(p @ q) for p, q in ((x, x), (error, error), (y, y), (x, y)))
        return Measures(
            relative_l2=float(np.sqrt(noise / signal)),
            max_error=float(np.abs(error).max()),
            sqnr_db=float(10 * np.log10(signal / noise)),
            cosine=float(inner / np.sqrt(signal * other)),
            calc_diff=float(1 - 2 * inner / (signal + other)),
        )


def real(x: Array) -> Array:
    """The exact values as float64."""
    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype.isbuiltin == 1 else widen(x, np.float64)


def same_bits(a: Array, b: Array) -> bool:
    """Whether dtype, shape and every bit agree."""
    return a.dtype == b.dtype and a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def flat(values: Any) -> list[Array]:
    """The arrays of some values, those within bundles included."""
    return [x for v in values for x in (flat(v) if isinstance(v, tuple) else [v])]
