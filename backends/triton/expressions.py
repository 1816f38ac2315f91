"""What each op element by element is in a generated kernel: the one place where an op is told to `codegen.py`.

An expression is Triton code over its operands `{0}`, `{1}`, ...: float32 tensors that hold exact values (or bool), or numbers. Its value is
rounded once to the result's dtype by what surrounds it. Functions are those of `arithmetic.py`, whose errors are known, and of Triton.
`{eps}` and the like are attributes of the op.
"""

from __future__ import annotations

from ...ir.core import Op
from ...ir.ops import elementwise as e
from ...ir.ops.norm import RmsNorm
from ...ir.ops.reduce import Max, Mean, Min, Sum

EXPRESSIONS: dict[type[Op], str] = {
    e.Neg: "-({0})",
    e.Abs: "tl.abs({0})",
    e.Exp: "exp({0})",
    e.Log: "tl.log({0})",
    e.Sqrt: "tl.sqrt_rn({0})",
    e.Rsqrt: "tl.div_rn(1.0, tl.sqrt_rn({0}))",
    e.Tanh: "tanh({0})",
    e.Erf: "tl.erf({0})",
    e.Floor: "tl.floor({0})",
    e.Sigmoid: "sigmoid({0})",
    e.Silu: "silu({0})",
    e.Relu: "tl.where({0} <= 0.0, 0.0, {0})",
    e.Add: "{0} + {1}",
    e.Sub: "{0} - {1}",
    e.Mul: "{0} * {1}",
    e.Div: "tl.div_rn({0}, {1})",
    e.Maximum: "larger({0}, {1})",
    e.Minimum: "-larger(-({0}), -({1}))",
    e.Eq: "{0} == {1}",
    e.Ne: "{0} != {1}",
    e.Lt: "{0} < {1}",
    e.Le: "{0} <= {1}",
    e.Gt: "{0} > {1}",
    e.Ge: "{0} >= {1}",
    e.And: "{0} & {1}",
    e.Or: "{0} | {1}",
    e.Not: "~{0}",
    e.Where: "tl.where({0}, {1}, {2})",
    e.SwiGLU: "silu({0}) * {1}",
    e.SwiGLUBackward: "swiglu_backward({0}, {1}, {2})",
}

ALONG_ROWS: dict[type[Op], str] = {
    Sum: "row_sum({0}, inside)",
    Mean: "tl.div_rn(row_sum({0}, inside), COLUMNS * 1.0)",
    Max: "row_max({0}, inside)",
    Min: "-row_max(-({0}), inside)",
    RmsNorm: "rms_norm({0}, {1}, inside, COLUMNS, {eps})",
}
"""Of rows [ROWS, WIDTH], of which `inside` says what is there: one number for each, [ROWS, 1], or rows again."""


def expression(op: Op) -> str | None:
    """What `op` is over its operands, also along rows; None where it is nothing of either."""
    text = EXPRESSIONS.get(type(op)) or ALONG_ROWS.get(type(op))
    return f"{text} * {{2}}" if isinstance(op, e.SwiGLU) and op.weight else text
