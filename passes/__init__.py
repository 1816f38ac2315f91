"""Rewritings of a module. Importing this package fills the table of passes."""

from __future__ import annotations

from . import simplify

__all__ = ["simplify"]
