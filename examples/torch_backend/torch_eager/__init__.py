"""A backend of dsc in plain torch, one op after the other: `dsc run OUT --backend torch-eager`.

`Eager` of dsc walks through a module; what is here is how values are held, and in ops.py and experts.py what one op gives. A float value of
any dtype is held as float32 numbers that lie on its grid (f64 as float64), an integer as int64: every dtype of the IR fits into these
exactly. So an op is computed in float32 and its result is rounded once, which is what `numpy_ref` does as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dsc import DscError
from dsc.backends.arrays import STORAGE, rounded, widen
from dsc.backends.eager import Eager
from dsc.ir.core import Op
from dsc.ir.types import Bundle, DType, Tensor

from . import experts  # noqa: F401 - it fills FUNCTIONS
from .ops import FUNCTIONS

TORCH = {DType.f64: torch.float64, DType.f32: torch.float32, DType.f16: torch.float16, DType.bf16: torch.bfloat16}
WHOLE = {DType.i64: torch.int64, DType.i32: torch.int32, DType.i16: torch.int16, DType.i8: torch.int8, DType.u8: torch.uint8}


def snapped(x: torch.Tensor, dtype: DType) -> torch.Tensor:
    """`x` on the grid of `dtype`, as it is held: floats to nearest even, FP8 saturating; integers keep their low bits."""
    if dtype is DType.bool:
        return x.to(torch.bool)
    if dtype in WHOLE:
        return x.to(torch.int64).to(WHOLE[dtype]).to(torch.int64)
    if dtype in (DType.f64, DType.f32) or (dtype in TORCH and x.dtype == torch.float32):
        return x.to(TORCH[dtype]).to(torch.float64 if dtype is DType.f64 else torch.float32)
    return torch.from_numpy(widen(rounded(x.contiguous().numpy(), dtype)))  # torch has no E5M6, and rounds float64 to BF16 twice


class TorchEager(Eager):
    """`Runner` of the backend."""

    def declines(self, op: Op) -> str:
        """Why an op is not run here, "" if it is: dsc's conformance suite lists it instead of failing."""
        accumulation = getattr(op, "accumulation", None)
        if accumulation and accumulation.arithmetic == "tensor-core":
            return "torch does not say how many bits its sums keep: accumulation as tensor cores do it is left out"
        return ""

    def hold(self, x: np.ndarray, type: Tensor) -> torch.Tensor:
        if type.dtype.is_float:
            x = widen(x, np.float64 if type.dtype is DType.f64 else np.float32)
        return torch.from_numpy(np.array(x, np.int64 if type.dtype.is_int else x.dtype))

    def give(self, x: torch.Tensor, type: Tensor) -> np.ndarray:
        array = x.contiguous().numpy()
        return rounded(array, type.dtype) if type.dtype.is_float else array.astype(STORAGE[type.dtype])

    def compute(self, op: Op, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        if type(op) not in FUNCTIONS:
            return self.expanded(op, operands)  # what the op means in others, where it declares that
        if reason := self.declines(op):
            raise DscError(f"{op.name}: {reason}")
        if any(x.dtype == torch.float64 for x in operands if isinstance(x, torch.Tensor)):
            operands = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in operands)
        found = FUNCTIONS[type(op)](op, *operands)
        results = found if len(op.results) > 1 else (found,)
        return tuple(tuple(x) if isinstance(v.type, Bundle) else snapped(x, v.type.dtype) for x, v in zip(results, op.results, strict=True))


BACKEND = TorchEager()
