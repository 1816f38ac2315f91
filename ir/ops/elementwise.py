"""Elementwise ops. Operands broadcast; each is read exactly, computed in float32 and rounded once to the result's dtype."""

from __future__ import annotations

from ..core import Builder, Op, Trait, Value, family, op
from ..errors import require
from ..types import DType, Tensor, Type
from .control import Literal
from .rules import broadcast, elementwise, promote, require_bool, require_float, wide_of

E, C = Trait.ELEMENTWISE, Trait.CHEAP


@op("cast", E, C)
class Cast(Op):
    """x in another dtype: nearest even for floats (FP8 saturates, NaN stays), toward zero from float to int.

    From float to int, what lies beyond the range becomes its nearer end and NaN becomes 0; from int to int the low bits stay.
    """

    x: Value
    dtype: DType

    def infer(self) -> tuple[Type, ...]:
        return (Tensor(self.dtype, self.x.shape),)


@family
class Unary(Op):
    """f(x) of a float tensor."""

    x: Value

    def infer(self) -> tuple[Type, ...]:
        require_float(self.x)
        return (self.x.tensor,)


@family
class Arithmetic(Op):
    """f(a, b) of two numeric tensors."""

    a: Value
    b: Value

    def infer(self) -> tuple[Type, ...]:
        require(promote(self.a, self.b) is not DType.bool, f"expected numbers, found {self.a.type} and {self.b.type}")
        return elementwise(self.a, self.b)


@family
class Comparison(Op):
    """Whether a relation holds between a and b, as bool."""

    a: Value
    b: Value

    def infer(self) -> tuple[Type, ...]:
        return elementwise(self.a, self.b, dtype=DType.bool)


@family
class Logical(Op):
    """f(a, b) of two bool tensors."""

    a: Value
    b: Value

    def infer(self) -> tuple[Type, ...]:
        require_bool(self.a, self.b)
        return elementwise(self.a, self.b)


@op("neg", E, C)
class Neg(Op):
    """-x."""

    x: Value

    def infer(self) -> tuple[Type, ...]:
        require(self.x.dtype is not DType.bool, f"expected numbers, found {self.x.type}")
        return (self.x.tensor,)


@op("abs", E, C)
class Abs(Op):
    """|x|."""

    x: Value

    def infer(self) -> tuple[Type, ...]:
        require(self.x.dtype is not DType.bool, f"expected numbers, found {self.x.type}")
        return (self.x.tensor,)


@op("exp", E, C)
class Exp(Unary):
    """e^x."""


@op("log", E, C)
class Log(Unary):
    """Natural logarithm of x."""


@op("sqrt", E, C)
class Sqrt(Unary):
    """Square root of x."""


@op("rsqrt", E, C)
class Rsqrt(Unary):
    """1 / sqrt(x)."""


@op("sin", E, C)
class Sin(Unary):
    """Sine of x, in radians."""


@op("cos", E, C)
class Cos(Unary):
    """Cosine of x, in radians."""


@op("tanh", E, C)
class Tanh(Unary):
    """Hyperbolic tangent of x."""


@op("erf", E, C)
class Erf(Unary):
    """Error function of x."""


@op("floor", E, C)
class Floor(Unary):
    """The largest whole number not above x."""


@op("sigmoid", E, C)
class Sigmoid(Unary):
    """1 / (1 + e^-x)."""


@op("silu", E, C)
class Silu(Unary):
    """x / (1 + e^-x)."""


@op("relu", E, C)
class Relu(Unary):
    """max(x, 0)."""


@op("add", E, C)
class Add(Arithmetic):
    """a + b."""


@op("sub", E, C)
class Sub(Arithmetic):
    """a - b."""


@op("mul", E, C)
class Mul(Arithmetic):
    """a * b."""


@op("div", E, C)
class Div(Arithmetic):
    """a / b; of integers the quotient rounded down."""


@op("remainder", E, C)
class Remainder(Arithmetic):
    """a - b * floor(a / b): it has the sign of b."""


@op("pow", E, C)
class Pow(Arithmetic):
    """a to the power b; of integers b is 0 or more."""


@op("maximum", E, C)
class Maximum(Arithmetic):
    """The larger of a and b; NaN if either is."""


@op("minimum", E, C)
class Minimum(Arithmetic):
    """The smaller of a and b; NaN if either is."""


@op("eq", E, C)
class Eq(Comparison):
    """a == b."""


@op("ne", E, C)
class Ne(Comparison):
    """a != b."""


@op("lt", E, C)
class Lt(Comparison):
    """a < b."""


@op("le", E, C)
class Le(Comparison):
    """a <= b."""


@op("gt", E, C)
class Gt(Comparison):
    """a > b."""


@op("ge", E, C)
class Ge(Comparison):
    """a >= b."""


@op("and", E, C)
class And(Logical):
    """a and b."""


@op("or", E, C)
class Or(Logical):
    """a or b."""


@op("not", E, C)
class Not(Op):
    """not x."""

    x: Value

    def infer(self) -> tuple[Type, ...]:
        require_bool(self.x)
        return (self.x.tensor,)


@op("where", E, C)
class Where(Op):
    """a where `condition` holds, else b."""

    condition: Value
    a: Value
    b: Value

    def infer(self) -> tuple[Type, ...]:
        require_bool(self.condition)
        dtype = promote(self.a, self.b)
        return (Tensor(dtype, broadcast(self.condition.shape, self.a.shape, self.b.shape)),)


@op("swiglu", E, C)
class SwiGLU(Op):
    """silu(gate) * up * weight, rounded once (DeepSeek-V3 report, section 2.1: the activation of every FFN).

    Gate and up are [..., C]. The weight, 1 where it is left out, is a number for each row, [..., 1] in float32 or wider: that with which an
    expert's output enters its token's sum may as well multiply what its down projection reads.
    """

    gate: Value
    up: Value
    weight: Value | None = None

    def infer(self) -> tuple[Type, ...]:
        require_float(self.gate, self.up)
        (result,) = elementwise(self.gate, self.up)
        if self.weight is not None:
            expected = Tensor(max(DType.f32, result.dtype, key=lambda d: d.bits), (*result.shape[:-1], 1))
            require(result.rank > 0 and self.weight.type == expected, f"the weight is {self.weight.type}, expected {expected}")
        return (result,)


@op("swiglu_backward", E, C)
class SwiGLUBackward(Op):
    """The gradients of `swiglu` by gate and up: with s = sigmoid(gate), dy * up * s * (1 + gate * (1 - s)) and dy * gate * s.

    All three operands have one type, as have both results.
    """

    gate: Value
    up: Value
    dy: Value

    def infer(self) -> tuple[Type, ...]:
        require_float(self.gate)
        same = self.gate.type == self.up.type == self.dy.type
        require(same, f"types differ: gate is {self.gate.type}, up {self.up.type} and dy {self.dy.type}")
        return self.gate.type, self.up.type

    def expand(self, b: Builder) -> tuple[Value, ...]:
        gate, up, dy = (b.emit(Cast(x, wide_of(self.gate))).result for x in (self.gate, self.up, self.dy))
        one = b.emit(Literal((1.0,), (), gate.dtype)).result
        s = b.emit(Sigmoid(gate)).result
        slope = b.emit(Add(b.emit(Mul(gate, b.emit(Sub(one, s)).result)).result, one)).result
        through = b.emit(Mul(b.emit(Mul(dy, up)).result, s)).result
        dgate = b.emit(Mul(through, slope)).result
        dup = b.emit(Mul(dy, b.emit(Mul(gate, s)).result)).result
        return tuple(b.emit(Cast(x, self.gate.dtype)).result for x in (dgate, dup))
