"""Ops along axes: reductions, scans, softmax, sorting and counting. Sums run in float32."""

from __future__ import annotations

from ..core import Op, Trait, Value, family, op
from ..errors import require
from ..types import DType, Tensor, Type
from .rules import axis_of, reduced, require_bool, require_float, require_int, require_some


@family
class Reduction(Op):
    """f over `axes`, which go away, or stay as 1 with keepdims."""

    x: Value
    axes: tuple[int, ...]
    keepdims: bool = False
    work = 1

    def infer(self) -> tuple[Type, ...]:
        require(self.x.dtype is not DType.bool, f"expected numbers, found {self.x.type}")
        return reduced(self.x, self.axes, self.keepdims, self.x.dtype)


@op("sum")
class Sum(Reduction):
    """Sum over axes."""


@op("mean")
class Mean(Reduction):
    """Arithmetic mean over axes."""

    def infer(self) -> tuple[Type, ...]:
        require_float(self.x)
        return super().infer()


@family
class Extreme(Reduction):
    """One of the elements over axes; there must be some."""

    def infer(self) -> tuple[Type, ...]:
        require_some(self.x, *self.axes)
        return super().infer()


@op("max")
class Max(Extreme):
    """Largest element over axes; NaN if there is one."""


@op("min")
class Min(Extreme):
    """Smallest element over axes; NaN if there is one."""


@family
class Quantified(Op):
    """A truth over `axes`, which go away, or stay as 1 with keepdims."""

    x: Value
    axes: tuple[int, ...]
    keepdims: bool = False

    def infer(self) -> tuple[Type, ...]:
        require_bool(self.x)
        return reduced(self.x, self.axes, self.keepdims, DType.bool)


@op("any")
class Any(Quantified):
    """Whether some element over axes is true."""


@op("all")
class All(Quantified):
    """Whether every element over axes is true."""


@op("argmax")
class ArgMax(Op):
    """Index of the largest element along an axis, the first of equals, as i64."""

    x: Value
    axis: int
    keepdims: bool = False

    def infer(self) -> tuple[Type, ...]:
        require_some(self.x, self.axis)
        return reduced(self.x, (self.axis,), self.keepdims, DType.i64)


@op("cumsum", work=1)
class CumSum(Op):
    """Running sum along an axis."""

    x: Value
    axis: int

    def infer(self) -> tuple[Type, ...]:
        axis_of(self.x, self.axis)
        require(self.x.dtype is not DType.bool, f"expected numbers, found {self.x.type}")
        return (self.x.tensor,)


@family
class Normalized(Op):
    """Exponentials along an axis that add up to 1, rounded once to `out` (the dtype of x unless given)."""

    x: Value
    axis: int
    out: DType | None = None

    def infer(self) -> tuple[Type, ...]:
        require_float(self.x)
        axis_of(self.x, self.axis)
        return (Tensor(self.out or self.x.dtype, self.x.shape),)


@op("softmax", work=5)
class Softmax(Normalized):
    """e^(x - max x) / sum e^(x - max x) along an axis, rounded once to `out` (the dtype of x unless given)."""


@op("log_softmax", work=5)
class LogSoftmax(Normalized):
    """x - max x - log sum e^(x - max x) along an axis, rounded once to `out` (the dtype of x unless given)."""


@op("topk", Trait.ROUTING)
class TopK(Op):
    """The k largest along an axis in descending order, equals by lower index first, and their indices as i64."""

    x: Value
    k: int
    axis: int = -1

    def infer(self) -> tuple[Type, ...]:
        axis = axis_of(self.x, self.axis)
        extent = self.x.shape[axis]
        require(isinstance(extent, int) and 0 <= self.k <= extent, f"k = {self.k}, but axis {axis} of {self.x.type} has {extent}")
        shape = (*self.x.shape[:axis], self.k, *self.x.shape[axis + 1 :])
        return Tensor(self.x.dtype, shape), Tensor(DType.i64, shape)


@op("sort", Trait.ROUTING)
class Sort(Op):
    """x sorted along an axis, equals in their old order, and where each came from as i64."""

    x: Value
    axis: int = -1
    descending: bool = False

    def infer(self) -> tuple[Type, ...]:
        axis_of(self.x, self.axis)
        return self.x.tensor, Tensor(DType.i64, self.x.shape)


@op("histogram")
class Histogram(Op):
    """How often each of 0 .. bins - 1 stands in x, as i32[bins]. Other numbers are not counted."""

    x: Value
    bins: int

    def infer(self) -> tuple[Type, ...]:
        require_int(self.x)
        require(self.bins > 0, f"bins is {self.bins}, expected 1 or more")
        return (Tensor(DType.i32, (self.bins,)),)
