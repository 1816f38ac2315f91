"""Which function writes which op as standard ONNX ops.

A function gets the emitter, the op and its operands as ONNX values and returns the result (a tuple where there are several). How operands
reach it, and what the emitter does for it, is one of four:

- `"wide"`: float operands cast exactly to float32 (float64 where the program says f64). The float results are rounded once, by the emitter.
- `"stored"`: operands in their own types, results as well.
- `"moved"`: for ops that move elements. FP8, which few ops of ONNX may touch, travels as float32; all else as it is.
- `"carried"`: likewise, where runtimes know the op for 32 and 64 bits only: BF16 and FP16 travel as float32, small integers as int32.

An op without a function of its own is written as its `expand`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ...ir.core import OPS, Op
from ...ir.errors import DscError
from ...ir.ops import collective
from ...ir.ops.moe import ChooseSlots, CombineGroups, DispatchGroups

Operands = Literal["wide", "stored", "moved", "carried"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Mapping:
    """How one op is written."""

    function: Callable[..., Any]
    operands: Operands
    stacks: bool = False
    """Whether a stack of experts' matrices may arrive as a `Stack`, one value each, instead of as one tensor."""


@dataclass(frozen=True)
class Missing:
    """Why an op cannot be written in standard ops."""

    reason: str


class Unmapped(DscError):
    """The mapping does not cover this use of an op."""


MAPPINGS: dict[type[Op], Mapping] = {}

GAPS: dict[type[Op], Missing] = {
    cls: Missing("ONNX has no op in which ranks communicate")
    for cls in OPS.values()
    if issubclass(cls, collective.Collective | collective.Done)
} | {
    cls: Missing("it makes or takes rows on their way between ranks, as many as are known at run time only")
    for cls in (DispatchGroups, CombineGroups)
}
GAPS[ChooseSlots] = Missing("experts' slots take turns, which are counted by a stable sort")
"""Ops that are left out, each with its reason."""

WRITTEN_BY_EXPORT = ("param", "constant", "call", "fused", "pack", "unpack")
"""Ops that tie functions and values together: they become inputs, initialisers and calls."""


def onnx(cls: type[Op], operands: Operands = "wide", *, stacks: bool = False) -> Callable[[Function], Function]:
    """Attach the function below to the op `cls`. A second one raises TypeError."""

    def attach(function: Function) -> Function:
        if cls in MAPPINGS:
            raise TypeError(f"op {cls.name!r} is written twice: {MAPPINGS[cls].function.__qualname__} and {function.__qualname__}")
        MAPPINGS[cls] = Mapping(function, operands, stacks)
        return function

    return attach


def reason_against(op: Op) -> str | None:
    """Why `op` cannot be written, whatever its attributes; None where it can."""
    gap = GAPS.get(type(op))
    return gap.reason if gap else None
