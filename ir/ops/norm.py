"""Normalisation and rotary position embedding."""

from __future__ import annotations

from ..core import Builder, Op, Trait, Value, op
from ..errors import require
from ..types import Tensor, Type
from .control import Literal
from .elementwise import Add, Cast, Mul, Rsqrt, Sub
from .reduce import Mean, Sum
from .rules import broadcast, require_float, show, static, wide_of
from .shape import Concat, Reshape, Slice


@op("rms_norm", Trait.CHEAP, work=4)
class RmsNorm(Op):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, rounded once."""

    x: Value
    weight: Value
    eps: float

    def infer(self) -> tuple[Type, ...]:
        require_float(self.x, self.weight)
        require(self.weight.shape == self.x.shape[-1:], f"weight is {self.weight.type}, expected {show(self.x.shape[-1:])}")
        return (self.x.tensor,)

    def expand(self, b: Builder) -> tuple[Value, ...]:
        x, weight = (b.emit(Cast(v, wide_of(self.x))).result for v in (self.x, self.weight))
        mean = b.emit(Mean(b.emit(Mul(x, x)).result, axes=(-1,), keepdims=True)).result
        eps = b.emit(Literal((self.eps,), (), x.dtype)).result
        scale = b.emit(Rsqrt(b.emit(Add(mean, eps)).result)).result
        normed = b.emit(Mul(b.emit(Mul(x, scale)).result, weight)).result
        return b.emit(Cast(normed, self.x.dtype)).results


@op("rms_norm_backward", work=11)
class RmsNormBackward(Op):
    """The gradients of `rms_norm` by x and by the weight: with r = rsqrt(mean(x^2) + eps), n = x r and g = dy * weight,

    dx = r (g - n mean(g n)), like x, and dweight = sum over all rows of dy n, in float32 (float64 where x is).
    """

    x: Value
    weight: Value
    dy: Value
    eps: float

    def infer(self) -> tuple[Type, ...]:
        normed = RmsNorm(self.x, self.weight, self.eps).result.type
        require(self.dy.type == normed, f"dy is {self.dy.type}, expected {normed}")
        return normed, Tensor(wide_of(self.x), self.weight.shape)

    def expand(self, b: Builder) -> tuple[Value, ...]:
        x, weight, dy = (b.emit(Cast(v, wide_of(self.x))).result for v in (self.x, self.weight, self.dy))
        mean = b.emit(Mean(b.emit(Mul(x, x)).result, axes=(-1,), keepdims=True)).result
        eps = b.emit(Literal((self.eps,), (), x.dtype)).result
        r = b.emit(Rsqrt(b.emit(Add(mean, eps)).result)).result
        n, g = b.emit(Mul(x, r)).result, b.emit(Mul(dy, weight)).result
        along = b.emit(Mean(b.emit(Mul(g, n)).result, axes=(-1,), keepdims=True)).result
        dx = b.emit(Mul(r, b.emit(Sub(g, b.emit(Mul(n, along)).result)).result)).result
        dweight = b.emit(Sum(b.emit(Mul(dy, n)).result, axes=tuple(range(x.tensor.rank - 1)))).result
        return b.emit(Cast(dx, self.x.dtype)).result, b.emit(Cast(dweight, self.results[1].dtype)).result


@op("rope", Trait.CHEAP, Trait.STRIDED, work=3)
class Rope(Op):
    """Pairs of the last axis turned by their position's angle: (a, b) -> (a cos - b sin, b cos + a sin), rounded once.

    x is [..., S, heads, D], cos and sin are f32[..., S, D/2]. Pairs are (2i, 2i + 1) where `interleaved`, as in MLA, else
    (i, i + D/2), as in Llama.
    """

    x: Value
    cos: Value
    sin: Value
    interleaved: bool

    def infer(self) -> tuple[Type, ...]:
        require_float(self.x)
        x = static(self.x, "rope")
        require(len(x) >= 3 and x[-1] % 2 == 0, f"x is {self.x.type}, expected [..., S, heads, D] with D even")
        require(self.cos.type == self.sin.type, f"cos is {self.cos.type}, but sin is {self.sin.type}")
        table = (*self.cos.shape[:-1], 1, *self.cos.shape[-1:])
        fits = self.cos.tensor.rank >= 2 and broadcast(table, (*x[:-1], x[-1] // 2)) == (*x[:-1], x[-1] // 2)
        require(fits, f"cos is {self.cos.type}, expected [S, D/2] for x {self.x.type}")
        return (self.x.tensor,)

    def expand(self, b: Builder) -> tuple[Value, ...]:
        x = static(self.x, "rope")
        half, pairs = x[-1] // 2, (*x[:-1], x[-1] // 2)
        wide = b.emit(Cast(self.x, wide_of(self.x))).result
        step, second = (2, 1) if self.interleaved else (1, half)
        last = len(x) - 1
        even = b.emit(Slice(wide, last, 0, x[-1] if self.interleaved else half, step)).result
        odd = b.emit(Slice(wide, last, second, x[-1], step)).result
        table = tuple(d for d in (*self.cos.shape[:-1], 1, half) if isinstance(d, int))
        cos, sin = (b.emit(Reshape(t, table)).result for t in (self.cos, self.sin))
        first = b.emit(Sub(b.emit(Mul(even, cos)).result, b.emit(Mul(odd, sin)).result)).result
        other = b.emit(Add(b.emit(Mul(odd, cos)).result, b.emit(Mul(even, sin)).result)).result
        if self.interleaved:
            first, other = (b.emit(Reshape(v, (*pairs, 1))).result for v in (first, other))
        turned = b.emit(Concat((first, other), axis=-1)).result
        whole = b.emit(Reshape(turned, x)).result if self.interleaved else turned
        return b.emit(Cast(whole, self.x.dtype)).results
