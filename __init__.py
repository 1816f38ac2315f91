"""dsc: a compiler for DeepSeek-V3-style mixture-of-experts models."""

from __future__ import annotations

from .ir.errors import DscError

__all__ = ["DscError"]
