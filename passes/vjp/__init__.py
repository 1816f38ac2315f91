"""The derivative of every op, one file per family, under the names of `ir/ops`. Importing this package fills the table.

A vector-Jacobian product (VJP) is given an op and the gradients dy of its results, and emits the gradients of its operands. It is linear in
dy. Each rule says its formula; y is the op's result, and dx the gradient of its operand x.
"""

from __future__ import annotations

from . import attention, collective, control, elementwise, linalg, loss, moe, norm, quant, reduce, shape  # noqa: F401 - they fill VJPS
from .rules import MISSING, NOT_DIFFERENTIABLE, VJPS, Backward, Gradients, vjp

__all__ = ["MISSING", "NOT_DIFFERENTIABLE", "VJPS", "Backward", "Gradients", "vjp"]
