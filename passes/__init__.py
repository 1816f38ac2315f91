"""Rewritings of a module. Importing this package fills the table of passes."""

from __future__ import annotations

from . import (  # noqa: F401 - they fill the table
    autodiff,
    fuse,
    overlap,
    place_experts,
    quantize_fp8,
    raise_moe,
    recompute,
    shard_experts,
    simplify,
    split_stages,
    weighted_swiglu,
)
