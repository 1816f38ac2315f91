"""Which function computes which op.

A function gets the op and its operands and returns the result (a tuple where there are several). How operands reach it, and what the
interpreter does for it, is one of three:

- `"wide"`: float operands widened exactly to the compute dtype (float32, or float64). The float result is rounded once, by the interpreter.
- `"stored"`: operands as they lie in memory; for ops that move elements.
- `"blocks"`: operands as stored, with the compute dtype before them. The function widens them piece by piece, so that a large operand is
  never held twice; its result is rounded as under `"wide"`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar

from ...distributed.world import Program, alone
from ...ir.core import Op
from ...ir.ops.collective import Collective

Operands = Literal["wide", "stored", "blocks"]
Function = TypeVar("Function", bound=Callable[..., Any])

REFERENCES: dict[type[Op], Callable[..., Any]] = {}
"""Every op's reference. `param`, `constant` and `call` have none: they need the module, and the interpreter runs them itself."""

OPERANDS: dict[type[Op], Operands] = {}
"""How each reference takes its operands."""


def reference(cls: type[Op], operands: Operands = "wide") -> Callable[[Function], Function]:
    """Attach the function below to the op `cls`. A second one raises TypeError."""

    def attach(function: Function) -> Function:
        if cls in REFERENCES:
            raise TypeError(f"op {cls.name!r} has two references: {REFERENCES[cls].__qualname__} and {function.__qualname__}")
        REFERENCES[cls] = function
        OPERANDS[cls] = operands
        return function

    return attach


COLLECTIVES: dict[type[Op], Callable[..., Program[Any]]] = {}
"""The program of each collective on one rank: (op, compute dtype, *operands as stored), results as a reference returns them."""


def collective(*classes: type[Collective]) -> Callable[[Function], Function]:
    """Make the program below what `classes` do on one rank. Their reference is the same program where there is only one."""

    def attach(program: Function) -> Function:
        for cls in classes:
            COLLECTIVES[cls] = program
            reference(cls, operands="blocks")(wraps(program)(lambda op, wide, *operands: alone(program(op, wide, *operands))))
        return program

    return attach
