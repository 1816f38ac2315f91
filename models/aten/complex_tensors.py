"""Complex tensors, which DeepSeek-V2's rotary embedding uses: two real values of the IR side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.core import Value
from ...ir.errors import require
from ...ir.ops.elementwise import Add, Cos, Mul, Neg, Sin, Sub
from ...ir.ops.shape import Concat
from .rules import TABLE as REAL
from .rules import Complex, Emitter, unify
from .shape import RESHAPES, reshaped, sliced

TABLE: dict[str, Callable[..., Any]] = {}
"""Rules of the ops that make, take or mix complex tensors."""

_PARTWISE = {f"aten.{name}" if "." in name else f"aten.{name}.default" for name in RESHAPES} | {
    "aten.expand.default",
    "aten.transpose.int",
    "aten.permute.default",
    "aten.slice.Tensor",
    "aten.select.int",
    "aten.index.Tensor",
    "aten.index_select.default",
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.alias.default",
    "aten.detach.default",
}
_CASTS = ("aten.to.", "aten._to_copy.")


def apply(b: Emitter, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the op yields: by its complex rule where a complex tensor takes part, else by its ordinary one."""
    if not any(isinstance(arg, Complex) for arg in args) and name not in TABLE:
        return REAL[name](b, *args, **kwargs)
    if name.startswith(_CASTS) and b.out.is_complex():
        return args[0]
    if name in _PARTWISE:
        whole: Complex = args[0]
        return Complex(REAL[name](b, whole.re, *args[1:], **kwargs), REAL[name](b, whole.im, *args[1:], **kwargs))
    require(name in TABLE or name == "aten.mul.Tensor", "complex numbers are not supported here")
    return (TABLE.get(name) or _mul)(b, *args, **kwargs)


def _complex(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        TABLE[f"aten.{name}.default"] = rule
        return rule

    return register


@_complex("polar")
def polar(b: Emitter, size: Value, angle: Value) -> Complex:
    return Complex(b.make(Mul(size, b.make(Cos(angle)))), b.make(Mul(size, b.make(Sin(angle)))))


@_complex("complex")
def complex_(b: Emitter, re: Value, im: Value) -> Complex:
    return Complex(re, im)


@_complex("view_as_complex")
def view_as_complex(b: Emitter, x: Value) -> Complex:
    re, im = (reshaped(b, sliced(b, x, -1, i, i + 1), b.shape) for i in (0, 1))
    return Complex(re, im)


@_complex("view_as_real")
def view_as_real(b: Emitter, x: Complex) -> Value:
    shape = (*b.shape[:-1], 1)
    return b.make(Concat((reshaped(b, x.re, shape), reshaped(b, x.im, shape)), len(shape) - 1))


@_complex("real")
def real(b: Emitter, x: Complex) -> Value:
    return x.re


@_complex("imag")
def imag(b: Emitter, x: Complex) -> Value:
    return x.im


@_complex("_conj")
def conjugate(b: Emitter, x: Complex) -> Complex:
    return Complex(x.re, b.make(Neg(x.im)))


def _mul(b: Emitter, x: Any, y: Any) -> Complex:
    """(a + bi)(c + di) = ac - bd + (ad + bc)i; a real factor scales both parts."""

    def times(p: Any, q: Any) -> Value:
        return b.make(Mul(*unify(b, p, q)))

    if not isinstance(x, Complex):
        x, y = y, x
    if not isinstance(y, Complex):
        return Complex(times(x.re, y), times(x.im, y))
    re = b.make(Sub(times(x.re, y.re), times(x.im, y.im)))
    return Complex(re, b.make(Add(times(x.re, y.im), times(x.im, y.re))))
