"""The interface to weights: what a program wants, and a source that has it; the dtypes they come in.

Sources: `checkpoint.CheckpointFolder`, `state_dict.StateDict`, `random_weights.RandomWeights`; `checkpoint.open_weights` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ..ir.errors import DscError, require
from ..ir.types import Tensor, Type, bound
from ..numerics.formats import FORMATS

FLOATS = ("f64", "f32", "f16", "bf16")
FP8 = ("f8e4m3", "f8e5m2")

NUMPY_DTYPES: dict[str, np.dtype] = {
    "f64": np.dtype(np.float64),
    **{name: FORMATS[name].dtype for name in ("f32", "f16", "bf16", *FP8, "e8m0")},
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
"""The dtypes of weights: the IR's name -> NumPy's dtype, whose own name is torch's. E8M0 (powers of two) is a dtype of block scales."""

DTYPE_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class Wanted:
    """A tensor that a program asks for: its name, its dtype in the IR's spelling, its shape.

    For a stack of experts, `experts` are the ones its rows stand for where that is not 0 to shape[0] - 1: a rank that holds
    experts 4 to 7 wants `Wanted("model.layers.3.mlp.experts.gate_proj", "bf16", (4, I, H), experts=(4, 5, 6, 7))`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    experts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, name: str, type: Type) -> Wanted:
        """A weight of a program. `DscError` where its shape is not static."""
        if not isinstance(type, Tensor) or not type.is_static:
            raise DscError(f"weight {name} is {type}, expected a static shape")
        return cls(name, type.dtype.name, tuple(map(bound, type.shape)))

    def __post_init__(self) -> None:
        if self.experts is not None:
            rows = self.shape[0] if self.shape else 0
            require(len(self.experts) == rows, f"{self.name}: {len(self.experts)} experts for a stack of {rows}")


@runtime_checkable
class Weights(Protocol):
    """A source of weights."""

    def get(self, wanted: Wanted) -> np.ndarray:
        """The tensor in the wanted dtype and shape; read-only where it is a view of memory that the source keeps.

        Raises `DscError` where `check` would.
        """

    def check(self, wanted: Sequence[Wanted], *, strict: bool = True) -> None:
        """Raise one `DscError` that lists every tensor that is missing, misshapen, or of a dtype that cannot be converted.

        With `strict`, also every tensor that nobody wants. Reads no data.
        """


def part_of(source: Weights, wanted: Wanted, index: tuple[slice, ...]) -> np.ndarray:
    """`source.get(wanted)[index]`. A source that has `part(wanted, index)` reads no more than that takes."""
    part: Callable[[Wanted, tuple[slice, ...]], np.ndarray] | None = getattr(source, "part", None)
    return source.get(wanted)[index] if part is None else part(wanted, index)


def type_text(dtype: str, shape: Sequence[int]) -> str:
    """A tensor type as the IR spells it: `bf16[4, 5]`."""
    return f"{dtype}[{', '.join(map(str, shape))}]"
