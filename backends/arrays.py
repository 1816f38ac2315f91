"""How values lie in memory on the host, shared by every backend: a tensor is a NumPy array, a bundle a tuple of values.

A reader finds which NumPy dtype holds which element type, the exact widening and the one rounding between them, the check of a value
against its type, and the unit in the last place.
"""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..ir.types import Bundle, DType, Tensor, Type, landed
from ..numerics import formats

Array = NDArray[Any]
Data: TypeAlias = Any
"""What a value holds at run time: an `Array`, or for a bundle a tuple of such."""

STORAGE: dict[DType, np.dtype[Any]] = {
    dtype: formats.FORMATS[dtype.name].dtype if dtype.name in formats.FORMATS else np.dtype(np.bool if dtype is DType.bool else name)
    for dtype, name in zip(
        DType,
        ("float64", "", "", "", "", "", "", "", "int64", "int32", "int16", "int8", "uint8", ""),
        strict=True,
    )
}
"""The NumPy dtype of each element type. E5M6 is held as float16 values on its grid, bool as one byte."""


def widen(x: Array, dtype: DTypeLike = np.float32) -> Array:
    """The exact values of a float array as float32 or float64; `x` itself where it is that already."""
    return x if x.dtype == dtype else formats.widen(x, dtype)


def rounded(x: Array, dtype: DType) -> Array:
    """A float array in the storage of `dtype`, rounded once to nearest even; FP8 saturates. `x` itself where nothing changes."""
    storage = STORAGE[dtype]
    if x.dtype == storage and dtype is not DType.e5m6:
        return x
    if dtype is DType.f64 or (dtype is DType.f32 and x.dtype != np.float64):
        return formats.widen(x, storage)
    return formats.round_to(x, formats.FORMATS[dtype.name])


def fits(value: object, type: Type) -> bool:
    """Whether `value` is of `type`: the dtype, the rank, every extent; a ragged one up to its bound."""
    if not isinstance(type, Tensor):
        type = landed(type)
    if isinstance(type, Bundle):
        same = isinstance(value, tuple) and len(value) == len(type.fields)
        return same and all(map(fits, cast(tuple[object, ...], value), type.fields))
    if not isinstance(value, np.ndarray) or value.dtype != STORAGE[type.dtype]:
        return False
    if value.shape == type.shape:
        return True
    return value.ndim == type.rank and all(
        [found == dim if isinstance(dim, int) else found <= dim.bound for found, dim in zip(value.shape, type.shape, strict=True)]
    )


def describe(value: object) -> str:
    """What `value` is, as a type is written: `bf16[4, 7168]`."""
    if isinstance(value, tuple):
        return f"bundle{{{', '.join(map(describe, value))}}}"
    if not isinstance(value, np.ndarray):
        return f"a {type(value).__name__}"
    names = [dtype for dtype, storage in STORAGE.items() if storage == value.dtype and dtype is not DType.e5m6]
    return str(Tensor(names[0], value.shape)) if names else f"{value.dtype}[{', '.join(map(str, value.shape))}]"
