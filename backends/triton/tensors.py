"""Values as torch tensors: their dtypes, the way in from NumPy and back, and the one rounding into each format in plain torch."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

from ...ir.types import Bundle, DType, Tensor, Type, bound, landed
from ..arrays import STORAGE, Data

Held: TypeAlias = Any
"""What a value holds while a program runs: a `torch.Tensor`, or for a bundle a tuple of such."""

DTYPES: dict[DType, torch.dtype] = {
    DType.f64: torch.float64,
    DType.f32: torch.float32,
    DType.f16: torch.float16,
    DType.bf16: torch.bfloat16,
    DType.e5m6: torch.float16,
    DType.f8e4m3: torch.float8_e4m3fn,
    DType.f8e5m2: torch.float8_e5m2,
    DType.e8m0: torch.float8_e8m0fnu,
    DType.i64: torch.int64,
    DType.i32: torch.int32,
    DType.i16: torch.int16,
    DType.i8: torch.int8,
    DType.u8: torch.uint8,
    DType.bool: torch.bool,
}
"""E5M6 is held as float16 values on its grid."""

_OF_USERS = 256
"""The numbers of dtypes that NumPy does not know itself begin here; `isbuiltin` is other than 1 of what was pickled, too."""
_SAME_BITS = {2: (np.dtype(np.int16), torch.int16), 1: (np.dtype(np.uint8), torch.uint8)}


def from_numpy(array: Data | Held, type: Type, device: torch.device | None = None) -> Held:
    """`array` (for a bundle a tuple) on `device`, or where it is; a tensor, too. On the CPU it shares its memory, which must not change."""
    type = landed(type)
    if isinstance(type, Bundle):
        return tuple(from_numpy(a, t, device) for a, t in zip(array, type.fields, strict=True))
    if isinstance(array, torch.Tensor):
        return array if device is None else array.to(device, non_blocking=True)
    target = DTYPES[type.dtype]
    plain = np.ascontiguousarray(array).reshape(array.shape)
    if plain.dtype.num >= _OF_USERS:
        plain = plain.view(_SAME_BITS[plain.dtype.itemsize][0])
    if not plain.flags.writeable:
        plain = _writable_alias(plain)
    made = torch.from_numpy(plain).view(target)
    return made if device is None else made.to(device, non_blocking=True)


def _writable_alias(array: np.ndarray) -> np.ndarray:
    """The same memory without NumPy's read-only mark, which torch would warn of: no kernel writes to its operands."""
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)

    class Alias:
        __array_interface__ = interface
        owner = array

    return np.asarray(Alias())


def to_numpy(tensor: Held, type: Type) -> Data:
    """A copy in host memory, in the storage that `backends.arrays` names."""
    type = landed(type)
    if isinstance(type, Bundle):
        return tuple(to_numpy(t, field) for t, field in zip(tensor, type.fields, strict=True))
    storage = STORAGE[type.dtype]
    host = tensor.detach().to("cpu", copy=True).contiguous()
    if storage.isbuiltin == 1:
        return host.numpy()
    return host.view(_SAME_BITS[storage.itemsize][1]).numpy().view(storage)


def is_held(value: Held, type: Type) -> bool:
    """Whether `value` is what `from_numpy` makes for `type`, a ragged extent being what it is or its bound."""
    type = landed(type)
    if isinstance(type, Bundle):
        return isinstance(value, tuple) and len(value) == len(type.fields) and all(map(is_held, value, type.fields))
    if not isinstance(value, torch.Tensor) or value.dtype != DTYPES[type.dtype] or value.ndim != type.rank:
        return False
    return all(found == d if isinstance(d, int) else found <= d.bound for found, d in zip(value.shape, type.shape, strict=True))


def copied(held: Held) -> Held:
    """The same in memory of its own, on the same device."""
    return tuple(map(copied, held)) if isinstance(held, tuple) else held.clone()


def empty(type: Type, device: torch.device) -> Held:
    """Memory for a value of `type`, ragged dimensions at their bound."""
    type = landed(type)
    if isinstance(type, Bundle):
        return tuple(empty(field, device) for field in type.fields)
    return torch.empty([bound(d) for d in type.shape], dtype=DTYPES[type.dtype], device=device)


def plain(x: torch.Tensor) -> torch.Tensor:
    """The same bytes in a dtype that torch moves: FP8 as uint8."""
    return x.view(torch.uint8) if x.element_size() == 1 and x.dtype.is_floating_point else x


def widen(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The exact values of a float tensor as float32 or float64."""
    if x.dtype == torch.float8_e8m0fnu:
        code = x.view(torch.uint8).to(torch.int32)
        bits = torch.where(code == 0, 0x400000, torch.where(code == 255, 0x7FC00000, code << 23)).to(torch.int32)
        return bits.view(torch.float32).to(dtype)
    return x.to(dtype)


def rounded(x: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Float32 or float64 x in the storage of `dtype`, rounded once as `numerics.formats.round_to` does; FP8 saturates."""
    target = DTYPES[dtype]
    if dtype in (DType.f64, DType.f32):
        return x.to(target)
    if dtype is DType.f16:
        return x.to(target) if x.dtype == torch.float32 else _to_odd(x).to(target)
    if x.dtype == torch.float64:
        x = _to_odd(x)
    if dtype is DType.bf16:
        return x.to(target)
    if dtype is DType.e5m6:
        return _e5m6(x)
    if dtype is DType.e8m0:
        bits = x.clamp(2.0**-127, 2.0**127).view(torch.int32)
        code = torch.where(bits < 0x800000, torch.where(bits > 0x600000, 1, 0), (bits + 0x400000) >> 23)
        return torch.where((x < 0) | x.isnan(), 255, code).to(torch.uint8).view(target)
    largest = 448.0 if dtype is DType.f8e4m3 else 57344.0
    codes = x.clamp(-largest, largest).to(target).view(torch.uint8)
    return torch.where(x.isnan(), 0x7F, codes).to(torch.uint8).view(target)


def _to_odd(x: torch.Tensor) -> torch.Tensor:
    """Float64 as float32, rounded to odd: a second rounding, to a narrower format, then gives what one rounding would have given."""
    nearest = x.to(torch.float32)
    missing = x - nearest.to(torch.float64)
    bits = nearest.view(torch.int32)
    even = ((bits & 1) == 0) & (missing != 0) & ~missing.isnan()
    outward = (missing > 0) == (bits >= 0)
    return torch.where(even, bits + torch.where(outward, 1, -1), bits).to(torch.int32).view(torch.float32)


def _e5m6(x: torch.Tensor) -> torch.Tensor:
    """The float16 patterns of `numerics.formats.E5M6`."""
    pattern = x.view(torch.int32)
    bits = x.abs().clamp(max=65024.0).view(torch.int32)
    exponent = bits >> 23
    significand = (bits & 0x7FFFFF) | 0x800000
    subnormal = significand >> (126 - exponent.clamp(max=113)).clamp(max=24)
    half = torch.where(exponent >= 113, (bits >> 13) - (112 << 10), subnormal)
    code = half >> 4
    code = (code + (((code & 1) + (bits & 0x1FFFF)) > 0x10000)) << 4
    code = torch.where(x.isnan(), 0x7E00, code) | ((pattern >> 16) & 0x8000)
    return code.to(torch.int16).view(torch.float16)


def meta(type: Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of that layout without memory."""
    return torch.empty(shape, dtype=DTYPES[type.dtype], device="meta")
