"""How a derivative is written: the table of rules, and the builder that a rule emits into.

Arithmetic inside a rule runs in float32 (float64 where the op does) and is rounded once, to the dtype of the gradient. That is the dtype of
the value it belongs to, with two exceptions: gradients of weights are float32, from the product that makes them to the result of the module
(DeepSeek-V3 report, section 3.3.2), and so are those of values in FP8, which are too narrow for one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from ...ir.core import Builder, Func, Op, OpT, Trait, Value
from ...ir.errors import require
from ...ir.ops.control import Literal, Param
from ...ir.ops.elementwise import Add, Cast, Div, Mul, Neg, Sub
from ...ir.ops.reduce import Sum
from ...ir.ops.rules import static
from ...ir.types import DType, Shape

Gradients = Sequence[Value | None]
"""One for each operand of an op, in their order: None where it has none, or nobody wants it."""

Rule = Callable[..., Gradients]
"""(op, builder, dy of each result, None where no gradient reaches it) -> gradients of the operands."""

RuleT = TypeVar("RuleT", bound=Rule)

VJPS: dict[type[Op], Rule] = {}
"""The derivative of each op that has one."""

NOT_DIFFERENTIABLE: dict[type[Op], str] = {}
"""Ops through which no gradient passes, and why that is right."""

MISSING: dict[type[Op], str] = {}
"""Ops whose derivative is not written, and why: differentiating a program that needs it is an error."""


def vjp(*classes: type[Op]) -> Callable[[RuleT], RuleT]:
    """Make the function below the derivative of these ops. A second one raises TypeError."""

    def attach(rule: RuleT) -> RuleT:
        for cls in classes:
            _free(cls)
            VJPS[cls] = rule
        return rule

    return attach


def no_gradient(reason: str, *classes: type[Op]) -> None:
    """No gradient passes through these ops."""
    for cls in classes:
        _free(cls)
        NOT_DIFFERENTIABLE[cls] = reason


def missing(reason: str, *classes: type[Op]) -> None:
    """The derivative of these ops is not written."""
    for cls in classes:
        _free(cls)
        MISSING[cls] = reason


def _free(cls: type[Op]) -> None:
    if cls in VJPS or cls in NOT_DIFFERENTIABLE or cls in MISSING:
        raise TypeError(f"op {cls.name!r} has two derivatives")


NARROW = (DType.bf16, DType.f16)
"""Dtypes below float32 that hold gradients of activations."""


class Backward(Builder):
    """Where the gradient of one function is emitted.

    An op that a rule emits for `mlp#3` is `mlp#3.1`, `mlp#3.2`, ..., past the ids that the function has already.
    """

    def __init__(self, func: Func, varied: Collection[Value]) -> None:
        super().__init__(func.name, component=f"{func.name}.gradients")
        self.origin = ""
        """The id of the op whose gradient is being emitted; empty between ops."""
        self._varied = varied
        self._taken = {op.id for op in func.ops}
        self._weights: set[Value] = set()
        for op in func.ops:
            derived = isinstance(op, Cast) or Trait.VIEW in op.traits
            if isinstance(op, Param) or (derived and self._weights.issuperset(op.operands)):
                self._weights.update(op.results)

    def emit(self, op: OpT) -> OpT:
        if self.origin and not op.id:
            number = self._numbers.get(self.origin, 0) + 1
            while f"{self.origin}.{number}" in self._taken:
                number += 1
            self._numbers[self.origin] = number
            object.__setattr__(op, "id", f"{self.origin}.{number}")  # it has entered no function yet
        return super().emit(op)

    def is_weight(self, x: Value) -> bool:
        """Whether `x` is a weight, or a cast or view of one."""
        return x in self._weights

    def wants(self, x: Value) -> bool:
        """Whether `x` depends on a weight, so that its gradient matters."""
        return x in self._varied

    def dtype(self, x: Value) -> DType:
        """The dtype of the gradient of `x`."""
        if x.dtype is DType.f64 or (x.dtype in NARROW and x not in self._weights):
            return x.dtype
        return DType.f32

    def refuse(self, x: Value | None, op: Op, what: str) -> None:
        """An operand that this derivative takes for constant must not depend on a weight."""
        require(x is None or not self.wants(x), f"{op.name} {op.id}: no derivative by {what}, but %{x and x.name} depends on a weight")

    # ---- what rules are made of

    def cast(self, x: Value, dtype: DType) -> Value:
        """`x` in `dtype`; itself where it is that already."""
        return x if x.dtype is dtype else self.emit(Cast(x, dtype)).result

    def wide(self, x: Value) -> Value:
        """`x` in the dtype that rules compute in."""
        return self.cast(x, DType.f64 if x.dtype is DType.f64 else DType.f32)

    def number(self, value: float, like: Value) -> Value:
        """A scalar that goes with `like`."""
        return self.emit(Literal((value,), (), like.dtype)).result

    def zeros(self, shape: Shape, dtype: DType) -> Value:
        """Zeros of a static shape."""
        return self.emit(Literal((0.0,), tuple(int(d) for d in shape), dtype)).result  # type: ignore[arg-type]

    def mul(self, a: Value, *others: Value) -> Value:
        """The product, from the left."""
        for b in others:
            a = self.emit(Mul(a, b)).result
        return a

    def add(self, a: Value, b: Value) -> Value:
        return self.emit(Add(a, b)).result

    def sub(self, a: Value, b: Value) -> Value:
        return self.emit(Sub(a, b)).result

    def div(self, a: Value, b: Value) -> Value:
        return self.emit(Div(a, b)).result

    def neg(self, a: Value) -> Value:
        return self.emit(Neg(a)).result

    def complement(self, a: Value) -> Value:
        """1 - a."""
        return self.sub(self.number(1.0, a), a)

    def fit(self, d: Value, x: Value) -> Value | None:
        """`d` as the gradient of the operand `x`: summed over what broadcasting stretched, in the right dtype. None where not wanted."""
        if not self.wants(x):
            return None
        dtype, lead = self.dtype(x), d.tensor.rank - x.tensor.rank
        stretched = tuple(i for i, dim in enumerate(x.shape) if dim != d.shape[lead + i])
        if (lead or stretched) and dtype.bits > d.dtype.bits:
            d = self.cast(d, dtype)
        if lead:
            d = self.emit(Sum(d, axes=tuple(range(lead)))).result
        if stretched:
            d = self.emit(Sum(d, axes=stretched, keepdims=True)).result
        return self.cast(d, dtype)


def extents(x: Value) -> tuple[int, ...]:
    """The shape of `x`, which has to be static."""
    return static(x, "this derivative")


def pair(b: Backward, x: Value, y: Value) -> tuple[Value, Value]:
    """Both in the wider of their dtypes, for ops whose operands agree."""
    dtype = max(x.dtype, y.dtype, key=_width)
    return b.cast(x, dtype), b.cast(y, dtype)


def _width(dtype: DType) -> Any:
    return dtype.bits, dtype is DType.bf16
