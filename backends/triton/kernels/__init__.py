"""One kernel per file, named after its op. Importing this package registers them all."""

from __future__ import annotations

from ..registry import KERNELS
from . import (
    dequantize,
    grouped_matmul,
    grouped_matmul_wgrad,
    grouped_scaled_matmul,
    grouped_scaled_matmul_wgrad,
    quantize,
    rms_norm,
    scaled_matmul,
    swiglu,
)

__all__ = [
    "KERNELS",
    "dequantize",
    "grouped_matmul",
    "grouped_matmul_wgrad",
    "grouped_scaled_matmul",
    "grouped_scaled_matmul_wgrad",
    "quantize",
    "rms_norm",
    "scaled_matmul",
    "swiglu",
]
