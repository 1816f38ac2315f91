"""What is quantised, and why the rest is not: a row for every matrix product of a program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ir.core import Module, Op, Value
from ..ir.ops.control import Param
from ..ir.ops.linalg import GroupedMatmul, Matmul
from ..ir.ops.moe import Dispatch
from ..ir.ops.quant import GroupedScaledMatmul, Quantize, ScaledMatmul
from ..ir.quantization import RULES, Accumulation, ScaleRule
from .ui import table


def describe_quantization(module: Module, reasons: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The table, as JSON and as text. `reasons` says for `@function id` why a product stayed as it was."""
    rows = [row for func in module.funcs for op in func.ops if (row := _row(func.name, op, reasons))]
    quantised = sum(row["quantised"] for row in rows)
    head = ("function", "product", "weight", "activation", "weight format", "accumulation", "why not")
    cells = [[str(row[key]) for key in ("func", "op", "weight", "activation", "weight_format", "accumulation", "reason")] for row in rows]
    text = f"{table(head, cells, left=len(head))}\n\n{quantised} of {len(rows)} matrix products are quantised"
    return {"products": rows, "quantised": quantised}, text


def _row(func: str, op: Op, reasons: Mapping[str, str]) -> dict[str, Any] | None:
    match op:
        case ScaledMatmul(a=x, b=w, a_tile=x_tile, b_tile=w_tile) | GroupedScaledMatmul(x=x, w=w, x_tile=x_tile, w_tile=w_tile):
            return _cells(func, op, w, _format(x, x_tile), _format(w, w_tile), _accumulation(op.accumulation), "")
        case Matmul(a=x, b=w) | GroupedMatmul(x=x, w=w):
            return _cells(func, op, w, str(x.dtype), str(w.dtype), "float32", reasons.get(f"@{func} {op.id}", ""))
    return None


def _cells(func: str, op: Op, w: Value, activation: str, weight: str, accumulation: str, reason: str) -> dict[str, Any]:
    return {
        "func": f"@{func}",
        "op": op.id,
        "weight": _weight(w),
        "activation": activation,
        "weight_format": weight,
        "accumulation": accumulation,
        "quantised": isinstance(op, ScaledMatmul | GroupedScaledMatmul),
        "reason": reason,
    }


def _weight(value: Value) -> str:
    """The name of the weight behind an operand; `-` where it is computed."""
    while value.owner is not None and not isinstance(value.owner, Param):
        if len(value.owner.operands) != 1:
            return "-"
        (value,) = value.owner.operands
    return value.owner.path if isinstance(value.owner, Param) else "-"


def _format(codes: Value, tile: tuple[int, int]) -> str:
    text = f"{codes.dtype} {tile[0]}x{tile[1]}"
    match codes.owner:
        case Quantize(rule=rule):
            return f"{text} {_rule(rule)}"
        case Dispatch(xs=(Value(owner=Quantize(rule=rule)), *_)):
            return f"{text} {_rule(rule)}, before dispatch"
        case Param():
            return f"{text} as stored"
    return text


def _rule(rule: ScaleRule) -> str:
    return next((name for name, known in RULES.items() if known == rule), "own rule")


def _accumulation(model: Accumulation) -> str:
    if model.arithmetic != "tensor-core":
        return model.arithmetic
    promoted = f"promoted every {model.interval} ({model.formula})" if model.interval else "never promoted"
    return f"{model.products} products, {model.fraction_bits} bits, {promoted}"
