"""From aten to IR: one rule per torch op (`TABLE`), and the walk over an exported graph that applies them (`outputs_of`)."""

from __future__ import annotations

from . import attention, creation, custom, elementwise, indexing, linalg, norm, reduce, shape
from .graph import outputs_of
from .rules import TABLE, aten

__all__ = [
    "TABLE",
    "aten",
    "attention",
    "creation",
    "custom",
    "elementwise",
    "indexing",
    "linalg",
    "norm",
    "outputs_of",
    "reduce",
    "shape",
]
