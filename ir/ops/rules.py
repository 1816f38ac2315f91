"""Type rules that several ops share: broadcasting, promotion, axes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from ..core import Value
from ..errors import require
from ..types import Dim, DType, Shape, Tensor

KINDS = ("bool", "int", "float")


def broadcast(*shapes: Shape) -> Shape:
    """The common shape, by NumPy's rule: aligned at the right, a 1 stretches. A ragged dimension only equals itself."""
    result: list[Dim] = []
    for dims in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        wide = {dim for dim in dims if dim != 1}
        require(len(wide) <= 1, f"shapes do not broadcast: {' and '.join(show(s) for s in shapes)}")
        result.append(wide.pop() if wide else 1)
    return tuple(reversed(result))


def promote(*values: Value) -> DType:
    """The dtype of an arithmetic result: operands agree, except that a rank-0 one of no wider kind adapts to the others.

    So a scalar keeps its full precision (`x * 2.5` with x in bf16 does not round 2.5) and never widens the result.
    """
    tensors = [v.tensor for v in values]
    shaped = [t for t in tensors if t.rank] or tensors
    widest = max(shaped, key=lambda t: KINDS.index(t.dtype.kind)).dtype
    for t in tensors:
        adapts = t.rank == 0 and shaped is not tensors and KINDS.index(t.dtype.kind) <= KINDS.index(widest.kind)
        require(t.dtype is widest or adapts, f"dtypes differ: {' and '.join(map(str, tensors))}")
    return widest


def elementwise(*values: Value, dtype: DType | None = None) -> tuple[Tensor]:
    """The result of an op on broadcast operands, of their promoted dtype unless `dtype` is given."""
    promoted = promote(*values)
    return (Tensor(dtype or promoted, broadcast(*(v.shape for v in values))),)


def axis_of(x: Value, axis: int) -> int:
    """`axis` counted from the front."""
    rank = x.tensor.rank
    require(-rank <= axis < rank, f"axis {axis} is outside a tensor of rank {rank}: {x.type}")
    return axis % rank


def axes_of(x: Value, axes: Sequence[int]) -> tuple[int, ...]:
    """`axes` counted from the front, each once, in order."""
    found = sorted(axis_of(x, a) for a in axes)
    require(len(set(found)) == len(found), f"an axis stands twice in {list(axes)}")
    return tuple(found)


def reduced(x: Value, axes: Sequence[int], keepdims: bool, dtype: DType) -> tuple[Tensor]:
    """`x` with `axes` summed away, or kept as 1."""
    gone = axes_of(x, axes)
    kept = tuple(1 if i in gone else d for i, d in enumerate(x.shape) if keepdims or i not in gone)
    return (Tensor(dtype, kept),)


def wide_of(x: Value) -> DType:
    """What is computed in: float32, or float64 where `x` is."""
    return DType.f64 if x.dtype is DType.f64 else DType.f32


def static(x: Value, what: str) -> tuple[int, ...]:
    """The shape of `x` where every dimension must be known."""
    require(x.tensor.is_static, f"{what} needs a static shape, found {x.type}")
    return tuple(d for d in x.shape if isinstance(d, int))


def require_float(*values: Value) -> None:
    for v in values:
        require(v.dtype.is_float, f"expected a float tensor, found {v.type}")


def require_int(*values: Value) -> None:
    for v in values:
        require(v.dtype.is_int, f"expected an integer tensor, found {v.type}")


def require_bool(*values: Value) -> None:
    for v in values:
        require(v.dtype is DType.bool, f"expected a bool tensor, found {v.type}")


def require_some(x: Value, *axes: int) -> None:
    """Each of `axes` has an element."""
    for axis in axes:
        require(x.shape[axis_of(x, axis)] != 0, f"axis {axis} of {x.type} has no element")


def show(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
