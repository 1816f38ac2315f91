"""Every op in plain torch: what runs where an op has no kernel, or its kernel declines. Importing this package fills `TORCH`.

These are honest stand-ins, listed as the facet `torch` by `dsc ops NAME`: they keep a program running on the GPU, and each is one the
kernels and the generated code may replace. Products of plain BF16 matrices stay here for good: the vendor's GEMM is the fast one.
"""

from __future__ import annotations

from . import attention, collective, control, elementwise, fused, linalg, loss, moe, quant, reduce, shape  # noqa: F401 - they fill TORCH
from .registry import TORCH, run

__all__ = ["TORCH", "run"]
