"""The weights of a mapping in memory, such as a torch module's `state_dict()`. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.errors import DscError
from .stored_weights import StoredWeights
from .weights import DTYPE_NAMES, NUMPY_DTYPES

_TORCH_NAMES = {dtype.name: name for name, dtype in NUMPY_DTYPES.items()}


@dataclass(frozen=True, eq=False)
class _InMemory:
    """A tensor of a mapping: a NumPy array, or a torch tensor that is asked for its memory only when it is read."""

    name: str
    tensor: Any
    dtype: str
    shape: tuple[int, ...]

    @property
    def where(self) -> str:
        return "memory"

    @property
    def nbytes(self) -> int:
        return int(self.tensor.nbytes)

    def array(self) -> np.ndarray:
        view = self.tensor.view() if isinstance(self.tensor, np.ndarray) else _from_torch(self.tensor, self.name, NUMPY_DTYPES[self.dtype])
        view.flags.writeable = False
        return view

    def release(self, view: np.ndarray) -> None:
        """Nothing: the mapping keeps the memory."""


class StateDict(StoredWeights):
    """The weights of a mapping from names to torch tensors or NumPy arrays; nothing is copied that need not be.

    Raises `DscError` for values that are neither, one line each.
    """

    def __init__(self, mapping: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> None:
        faults = [
            f"weights: {name!r} is of type {type(value).__name__}, expected a torch tensor or a NumPy array"
            for name, value in mapping.items()
            if not isinstance(value, np.ndarray) and not _is_torch(value)
        ]
        if faults:
            raise DscError("\n".join(faults))
        tensors = {name: _InMemory(name, value, _dtype_name(value), tuple(value.shape)) for name, value in mapping.items()}
        super().__init__(tensors, "state dict", config or {})


def _is_torch(value: object) -> bool:
    return type(getattr(value, "dtype", None)).__module__ == "torch" and hasattr(value, "untyped_storage")


def _dtype_name(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return DTYPE_NAMES.get(value.dtype, str(value.dtype))
    name = str(value.dtype).removeprefix("torch.")
    return _TORCH_NAMES.get(name, name)


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor of any of the IR's dtypes as an array that shares its memory, where that is the CPU's."""
    name = _dtype_name(tensor)
    if name not in NUMPY_DTYPES:
        raise DscError(f"found a tensor of {tensor.dtype}, expected one of {', '.join(NUMPY_DTYPES)}")
    return _from_torch(tensor, "tensor", NUMPY_DTYPES[name])


def as_array(given: Any) -> Any:
    """A torch tensor as `to_numpy` has it, anything else as it is."""
    return to_numpy(given) if hasattr(given, "detach") else given


def _from_torch(tensor: Any, name: str, dtype: np.dtype) -> np.ndarray:
    """The tensor's memory as an array; torch exports neither BF16 nor FP8 to NumPy, so these travel as integers of their size."""
    import torch

    if tensor.is_meta:
        raise DscError(f"weights: {name!r} is on the meta device, which holds shapes only; expected a tensor with values")
    tensor = tensor.detach().cpu()
    bits = {1: torch.uint8, 2: torch.int16}.get(dtype.itemsize)
    return (tensor if bits is None else tensor.view(bits)).numpy().view(dtype)
