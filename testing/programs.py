"""Random well-typed programs, for properties such as "this pass keeps the meaning".

    from dsc.testing.programs import programs
    from dsc.testing.sampling import seeded

    @given(programs())
    def test_my_pass_keeps_the_meaning(program):
        module, inputs = program
        before = runner.run(module, seeded, inputs)
        after = runner.run(my_pass(module), seeded, inputs)

Tensors have rank 3 or more until a step takes axes away, extents are 1 or odd and no multiples of 128, and every value is
returned, so nothing can be computed wrongly unseen. Weights have names, and `seeded` gives their values. Magnitudes stay
moderate: only sums and products with weights let them grow, by what they add up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..backends.arrays import Array
from ..ir.core import Builder, Func, Module, Op, Symbol, Value
from ..ir.ops import elementwise as e
from ..ir.ops.control import Call, Literal, Param
from ..ir.ops.linalg import Matmul
from ..ir.ops.norm import RmsNorm
from ..ir.ops.reduce import CumSum, LogSoftmax, Max, Mean, Min, Softmax, Sum
from ..ir.ops.shape import Broadcast, Concat, Pad, Reshape, Slice, Transpose
from ..ir.types import DType, Tensor
from ..ir.verify import verify
from .sampling import draw as draw_array
from .sampling import normal

Draw = Callable[[st.SearchStrategy[Any]], Any]
Step = Callable[[Draw, Builder, Value], "tuple[Op, ...]"]
"""Emits ops that use a float value; none where it does not suit."""

EXTENTS = (1, 2, 3, 5, 7, 33, 131)
MOST_ELEMENTS = 4000
BOUNDED = (e.Tanh, e.Sigmoid, e.Sin, e.Cos)
TAME = (*BOUNDED, e.Neg, e.Abs, e.Relu, e.Silu, e.Floor)


def unary(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """A function that grows nothing."""
    return (b.emit(draw(st.sampled_from(TAME))(x)),)


def roots(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """sqrt or rsqrt or log of 1 + |x|."""
    one = _number(b, x, 1.0)
    shifted = b.emit(e.Add(b.emit(e.Abs(x)).result, one.result))
    return one, shifted, b.emit(draw(st.sampled_from((e.Sqrt, e.Rsqrt, e.Log)))(shifted.result))


def binary(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """x with another value of its shape, or with one that broadcasts."""
    other: Op = b.emit(draw(st.sampled_from(BOUNDED))(x))
    if x.shape and draw(st.booleans()):
        axis = draw(st.integers(0, len(x.shape) - 1))
        other = b.emit(Max(other.result, axes=(axis,), keepdims=True))
    cls = draw(st.sampled_from((e.Add, e.Sub, e.Mul, e.Maximum, e.Minimum, e.SwiGLU)))
    pair = (x, other.result) if draw(st.booleans()) or cls is e.SwiGLU else (other.result, x)
    return other, b.emit(cls(*pair))


def scalar(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """x times a constant, which keeps its own precision."""
    number = _number(b, x, draw(st.sampled_from((0.0, 1.0, -1.0, 0.1, 2.5))), draw(st.sampled_from((DType.f32, x.dtype))))
    return number, b.emit(e.Mul(x, number.result))


def choice(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """x where it is positive, or where it is not, else something else."""
    zero = _number(b, x, 0.0)
    condition: Op = b.emit(draw(st.sampled_from((e.Lt, e.Le, e.Gt, e.Ge, e.Eq, e.Ne)))(x, zero.result))
    if draw(st.booleans()):
        condition = b.emit(e.Not(condition.result))
    other = b.emit(draw(st.sampled_from(BOUNDED))(x))
    return zero, condition, other, b.emit(e.Where(condition.result, x, other.result))


def reduction(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """Over some axes."""
    axes = draw(st.sets(st.integers(0, len(x.shape) - 1), min_size=1)) if x.shape else set()
    return (b.emit(draw(st.sampled_from((Sum, Mean, Max, Min)))(x, axes=tuple(sorted(axes)), keepdims=draw(st.booleans()))),)


def along(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """A scan or a softmax."""
    if not x.shape:
        return ()
    axis = draw(st.integers(-len(x.shape), len(x.shape) - 1))
    return (b.emit(draw(st.sampled_from((CumSum, Softmax, LogSoftmax)))(x, axis=axis)),)


def view(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """Reshape, transpose, slice or broadcast."""
    shape = _static(x)
    match draw(st.sampled_from(("reshape", "transpose", "slice", "broadcast"))):
        case "reshape":
            cut = draw(st.integers(0, len(shape)))
            return (b.emit(Reshape(x, (*shape[:cut], 1, prod(shape[cut:])) if draw(st.booleans()) else (prod(shape),))),)
        case "transpose":
            return (b.emit(Transpose(x, tuple(draw(st.permutations(range(len(shape))))))),)
        case "slice" if shape:
            axis = draw(st.integers(0, len(shape) - 1))
            start = draw(st.integers(0, shape[axis] - 1))
            stop = draw(st.integers(start + 1, shape[axis]))
            return (b.emit(Slice(x, axis, start, stop, draw(st.integers(1, 3)))),)
    return (b.emit(Broadcast(x, (2, *shape))),) if 2 * prod(shape) <= MOST_ELEMENTS else ()


def joined(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """Concatenation or padding."""
    shape = _static(x)
    if not shape or 2 * prod(shape) > MOST_ELEMENTS:
        return ()
    if draw(st.booleans()):
        return (b.emit(Concat((x, x), draw(st.integers(0, len(shape) - 1)))),)
    low, high = (tuple(draw(st.integers(0, 1)) for _ in shape) for _ in range(2))
    padded = prod(lo + d + hi for lo, d, hi in zip(low, shape, high, strict=True))
    return (b.emit(Pad(x, low, high, draw(st.sampled_from((0.0, -1.5))))),) if padded <= MOST_ELEMENTS else ()


def cast(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """To another float dtype and back, so that the program goes on in its own."""
    narrow = b.emit(e.Cast(x, draw(st.sampled_from((DType.bf16, DType.f16, DType.f8e4m3, DType.f32)))))
    return narrow, b.emit(e.Cast(narrow.result, x.dtype))


def product(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """tanh x times its transpose."""
    shape = _static(x)
    if len(shape) < 2 or prod(shape[:-1]) * shape[-2] > MOST_ELEMENTS:
        return ()
    tame = b.emit(e.Tanh(x))
    return tame, b.emit(Matmul(tame.result, tame.result, transpose_b=True))


def linear(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """A linear layer."""
    shape = _static(x)
    if len(shape) < 2:
        return ()
    width = draw(st.sampled_from(EXTENTS[:5]))
    weight = b.emit(Param(f"linear{len(b.ops)}.weight", (Tensor(x.dtype, (width, shape[-1])),)))
    return weight, b.emit(Matmul(x, weight.result, transpose_b=True))


def norm(draw: Draw, b: Builder, x: Value) -> tuple[Op, ...]:
    """RMSNorm."""
    if not x.shape:
        return ()
    weight = b.emit(Param(f"norm{len(b.ops)}.weight", (Tensor(x.dtype, x.shape[-1:]),)))
    return weight, b.emit(RmsNorm(x, weight.result, eps=1e-6))


STEPS: dict[str, Step] = {
    step.__name__: step for step in (unary, roots, binary, scalar, choice, reduction, along, view, joined, cast, product, linear, norm)
}
"""What a program is made of, by name."""


def _number(b: Builder, x: Value, number: float, dtype: DType = DType.f32) -> Literal:
    """A scalar to go with x: of another dtype than x only where x has a shape to be told from it by."""
    return b.emit(Literal((number,), (), dtype if x.shape else x.dtype))


def _static(x: Value) -> tuple[int, ...]:
    return tuple(d for d in x.shape if isinstance(d, int))


@st.composite
def programs(
    draw: Draw,
    *,
    dtypes: Collection[DType] = (DType.f32, DType.bf16),
    steps: Collection[str] = tuple(STEPS),
    most_steps: int = 6,
    calls: bool = True,
) -> tuple[Module, tuple[Array, ...]]:
    """A module and inputs for it.

    `dtypes` are those of its parameters; `steps` names what it may be made of (`STEPS`); with `calls` it may call a second function, each
    time with other weights. Every value that is computed is a result.
    """
    params = draw(st.lists(st.builds(Tensor, st.sampled_from(tuple(dtypes)), _shapes()), min_size=1, max_size=2))
    block = _func(draw, "block", params, steps, most_steps // 2, None) if calls and draw(st.booleans()) else None
    main = _func(draw, "main", params, steps, most_steps, block)
    called = block is not None and any(isinstance(op, Call) for op in main.ops)
    module = verify(Module((main, block) if called and block is not None else (main,)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return module, tuple(draw_array(p, normal, rng) for p in params)


def _shapes() -> st.SearchStrategy[tuple[int, ...]]:
    shapes = st.lists(st.sampled_from(EXTENTS), min_size=3, max_size=4).map(tuple)
    return shapes.filter(lambda shape: prod(shape) <= MOST_ELEMENTS // 2)


def _func(draw: Draw, name: str, params: list[Tensor], steps: Collection[str], most: int, block: Func | None) -> Func:
    b = Builder(name, component=name)
    own = [b.param(f"x{i}", type) for i, type in enumerate(params)]
    values = list(own)
    for count in range(draw(st.integers(1, most))):
        if block is not None and draw(st.integers(0, 3)) == 0:
            types = tuple(r.type for r in block.results)
            made: tuple[Op, ...] = (b.emit(Call(Symbol(block.name), tuple(own), types, weights=f"layers.{count}")),)
        else:
            made = STEPS[draw(st.sampled_from(tuple(steps)))](draw, b, draw(st.sampled_from(values)))
        floats = [r for op in made for r in op.results if r.dtype in {p.dtype for p in params} or r.dtype is DType.f32]
        values += [r for r in floats if not isinstance(r.owner, Literal | Param)]
    results = [r for op in b.ops for r in op.results if not isinstance(op, Param)]
    return b.finish(results or own)
