"""Rewritings of a module. Importing this package fills the table of passes."""

from __future__ import annotations

from . import autodiff, quantize_fp8, raise_moe, recompute, simplify

__all__ = ["autodiff", "quantize_fp8", "raise_moe", "recompute", "simplify"]
