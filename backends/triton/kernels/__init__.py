"""One kernel per file, named after its op. Importing this package registers them all."""

from __future__ import annotations

from ..registry import KERNELS
from . import (
    attention,
    attention_backward,
    attention_decode,
    combine,
    cross_entropy,
    dequantize,
    dispatch,
    grouped_matmul,
    grouped_matmul_wgrad,
    grouped_scaled_matmul,
    grouped_scaled_matmul_wgrad,
    quantize,
    redispatch,
    rms_norm,
    rope,
    route,
    scaled_matmul,
    swiglu,
    take,
)

__all__ = [
    "KERNELS",
    "attention",
    "attention_backward",
    "attention_decode",
    "combine",
    "cross_entropy",
    "dequantize",
    "dispatch",
    "grouped_matmul",
    "grouped_matmul_wgrad",
    "grouped_scaled_matmul",
    "grouped_scaled_matmul_wgrad",
    "quantize",
    "redispatch",
    "rms_norm",
    "rope",
    "route",
    "scaled_matmul",
    "swiglu",
    "take",
]
