"""One kernel per file, named after its op. Importing this package registers them all."""

from __future__ import annotations

from ..registry import KERNELS
from . import dequantize, quantize, rms_norm, scaled_matmul, swiglu

__all__ = ["KERNELS", "dequantize", "quantize", "rms_norm", "scaled_matmul", "swiglu"]
