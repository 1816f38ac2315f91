"""Which torch function runs which op. A function gets the op and its operands as tensors, and returns the result, or a tuple of them.

- `"wide"`: float operands widened exactly to float32 (float64 where the op has a float64 operand or result); a float result is rounded
  once, afterwards. What a GPU kernel of the op would do.
- `"stored"`: operands and results as they lie in memory; for ops that move elements, and for those that round by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar

import torch

from ....distributed.world import Program, alone
from ....ir.core import Op
from ....ir.ops.collective import Collective
from ....ir.types import Bundle, DType, landed, tensors
from ..tensors import DTYPES, Held, rounded, widen

Function = TypeVar("Function", bound=Callable[..., Any])

TORCH: dict[type[Op], Callable[..., Any]] = {}
"""Every op's function, under `torch_op`. `param`, `constant` and `call` have none: they need the module."""

COLLECTIVES: dict[type[Op], Callable[..., Program[Any]]] = {}
"""The program of each collective on one rank of many: of the op and its operands as stored."""

INTO: dict[type[Op], Callable[..., Callable[[], object] | None]] = {}
"""Of some ops a function of op, operands and the place of the result: what computes it there without memory of its own, or None."""

WAITS: set[type[Op]] = set()
"""Ops whose function reads values of a tensor on the host, and so waits for the GPU: they cannot be part of a CUDA graph."""

_WIDE: set[type[Op]] = set()


def torch_op(*classes: type[Op], operands: Literal["wide", "stored"] = "stored", waits: bool = False) -> Callable[[Function], Function]:
    """Attach the function below to the ops `classes`. A second one for an op raises TypeError."""

    def attach(function: Function) -> Function:
        for cls in classes:
            if cls in TORCH:
                raise TypeError(f"op {cls.name!r} has two torch functions: {TORCH[cls].__qualname__} and {function.__qualname__}")
            TORCH[cls] = function
            if operands == "wide":
                _WIDE.add(cls)
            if waits:
                WAITS.add(cls)
        return function

    return attach


def collective(*classes: type[Collective]) -> Callable[[Function], Function]:
    """Make the program below what `classes` do on one rank. By itself such an op is that of one rank, which is its own partner."""

    def attach(program: Function) -> Function:
        COLLECTIVES.update(dict.fromkeys(classes, program))
        torch_op(*classes)(wraps(program)(lambda op, *operands: alone(program(op, *operands))))
        return program

    return attach


def compute_dtype(op: Op) -> torch.dtype:
    """float64 where an operand or a result is, else float32."""
    every = (t for v in (*op.operands, *op.results) for t in tensors(v.type))
    return torch.float64 if any(t.dtype is DType.f64 for t in every) else torch.float32


def run(op: Op, operands: tuple[Held, ...]) -> tuple[Held, ...]:
    """The results of `op`, in fresh memory or as views of operands."""
    cls = type(op)
    if cls in _WIDE:
        wide = compute_dtype(op)
        operands = tuple(_wide(v, x, wide) for v, x in zip(op.operands, operands, strict=True))
    found = TORCH[cls](op, *operands)
    results = (found,) if len(op.results) == 1 else tuple(found)
    if cls not in _WIDE:
        return results
    return tuple(_stored(v, x) for v, x in zip(op.results, results, strict=True))


def _wide(value: Any, x: Held, dtype: torch.dtype) -> Held:
    return x if isinstance(value.type, Bundle) or not value.dtype.is_float else widen(x, dtype)


def _stored(value: Any, x: Held) -> Held:
    if isinstance(value.type, Bundle):
        return x
    there = landed(value.type)
    assert not isinstance(there, Bundle)
    if there.dtype.is_float and x.dtype in (torch.float32, torch.float64):
        return rounded(x, there.dtype)
    return x.to(DTYPES[there.dtype])
