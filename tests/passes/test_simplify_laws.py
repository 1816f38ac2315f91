"""simplify keeps the meaning of a program to the bit, and the tests here would notice if it did not.

Programs are those of `dsc.testing.programs`, with the left side of every rule planted among their steps, and near misses of each:
chains of views, casts there and back, numbers that are neutral or nearly so, ops that are doubled or differ in one attribute, dead ones.
Inputs hold signed zeros, infinities, NaN and subnormals. Faults are then put into simplify on purpose, and the laws have to break.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import dsc
from dsc import backends
from dsc.backends.arrays import STORAGE, Array, rounded
from dsc.ir.core import Builder, Func, Module, Op, Value
from dsc.ir.ops import elementwise as e
from dsc.ir.ops.control import Literal, Pack, Param, Unpack
from dsc.ir.ops.reduce import Sum, TopK
from dsc.ir.ops.shape import Broadcast, Concat, Pad, Reshape, Slice, Transpose
from dsc.ir.types import DType, Tensor
from dsc.ir.verify import verify
from dsc.passes import simplify
from dsc.passes.simplify import simplify_func
from dsc.testing.programs import STEPS, programs
from dsc.testing.sampling import seeded

Draw = Callable[[st.SearchStrategy[Any]], Any]


def number(b: Builder, value: float, dtype: DType, shape: tuple[int, ...] = ()) -> Value:
    return b.emit(Literal((value,), shape, dtype)).result


def cast(draw: Draw, b: Builder, x: Value) -> list[Value]:
    """To a format and back, or on to a third one: sometimes without loss."""
    middle = b.emit(e.Cast(x, draw(st.sampled_from([d for d in DType if d is not DType.bool])))).result
    return [
        b.emit(e.Cast(middle, draw(st.sampled_from([x.dtype, DType.bf16, DType.i32, DType.f8e4m3])))).result,
        b.emit(e.Cast(x, x.dtype)).result,
    ]


def reshapes(draw: Draw, b: Builder, x: Value) -> list[Value]:
    flat = b.emit(Reshape(x, (x.tensor.size,))).result
    return [flat, b.emit(Reshape(flat, x.shape)).result]


def transposes(draw: Draw, b: Builder, x: Value) -> list[Value]:
    axes = range(x.tensor.rank)
    first = b.emit(Transpose(x, tuple(draw(st.permutations(axes))))).result
    return [first, b.emit(Transpose(first, tuple(draw(st.permutations(axes))))).result]


def broadcasts(draw: Draw, b: Builder, x: Value) -> list[Value]:
    one = b.emit(Broadcast(x, (1, *x.shape))).result
    return [b.emit(Broadcast(one, (2, *x.shape))).result, b.emit(Broadcast(x, x.shape)).result]


def parts(draw: Draw, b: Builder, x: Value) -> list[Value]:
    """Slices, pads and joins of everything, and of nearly everything."""
    axis = draw(st.integers(0, x.tensor.rank - 1))
    start, step = draw(st.integers(0, 1)), draw(st.integers(1, 2))
    pad = tuple(draw(st.integers(0, 1)) if i == axis else 0 for i in range(x.tensor.rank))
    ops = [Slice(x, axis, min(start, x.shape[axis]), x.shape[axis], step), Pad(x, pad, (0,) * len(pad)), Concat((x,), axis)]
    return [b.emit(op).result for op in ops]


def neutral(draw: Draw, b: Builder, x: Value) -> list[Value]:
    """x with 0.0, -0.0, 1 or something close, on either side."""
    value = number(b, draw(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-20])), draw(st.sampled_from([x.dtype, DType.f32])))
    pair = (x, value) if draw(st.booleans()) else (value, x)
    return [b.emit(draw(st.sampled_from([e.Add, e.Sub, e.Mul, e.Div]))(*pair)).result]


def arithmetic(draw: Draw, b: Builder, x: Value) -> list[Value]:
    """Numbers that fold where that is exact, and what they do to x."""
    dtype = draw(st.sampled_from([DType.f32, DType.bf16, DType.f16, DType.i32, DType.i8]))
    whole = st.integers(-1000, 1000)
    fractions = st.floats(-4, 4) | st.sampled_from([0.1, 0.5, -0.0, 2.0**-140, 3e38, float("inf")])
    values = [draw(whole if dtype.is_int else whole.map(float) | fractions) for _ in "ab"]
    left, right = (number(b, v, dtype, draw(st.sampled_from([(), (1,)]))) for v in values)
    divides = not dtype.is_int or values[1] != 0
    made = b.emit(draw(st.sampled_from([e.Add, e.Sub, e.Mul, *([e.Div] if divides else [])]))(left, right)).result
    return [made, b.emit(e.Cast(made, draw(st.sampled_from([DType.f32, DType.bf16, DType.i32])))).result]


def wheres(draw: Draw, b: Builder, x: Value) -> list[Value]:
    shape = draw(st.sampled_from([(), x.shape[-1:]]))
    count = draw(st.sampled_from([1, max(1, Tensor(DType.bool, shape).size)]))
    condition = b.emit(Literal(tuple(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))), shape, DType.bool)).result
    other = b.emit(e.Neg(x)).result
    return [b.emit(e.Where(condition, x, other)).result, b.emit(e.Where(b.emit(e.Lt(x, other)).result, x, x)).result]


def bundles(draw: Draw, b: Builder, x: Value) -> list[Value]:
    pack = b.emit(Pack((x, b.emit(e.Neg(x)).result))).result
    first, second = b.emit(Unpack(pack)).results
    return [second, first, *b.emit(Unpack(b.emit(Pack((second, first))).result)).results]


def twins(draw: Draw, b: Builder, x: Value) -> list[Value]:
    """The same op twice, and the same but for one attribute; and an op that nothing reads."""
    axis = draw(st.integers(0, x.tensor.rank - 1))
    b.emit(e.Neg(x))
    k = draw(st.integers(1, x.shape[axis])) if x.shape[axis] else 0
    ops: list[Op] = [Sum(x, (axis,)), Sum(x, (axis,)), Sum(x, (axis,), keepdims=True), TopK(x, k, axis), TopK(x, k, axis)]
    width = Tensor(x.dtype, x.shape[-1:])
    ops += [Pad(x, (0,) * x.tensor.rank, (1,) * x.tensor.rank, value=v) for v in (0.0, -0.0, 1.0)]
    ops += [Param(path, (width,)) for path in ("weight", "weight", "bias")]
    return [r for op in ops for r in b.emit(op).results]


PLANTS = (cast, reshapes, transposes, broadcasts, parts, neutral, arithmetic, wheres, bundles, twins)
SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 65504.0, 3.3e38, -57344.0)
LIMIT = 3000


def special(type: Tensor, seed: int) -> Array:
    """Normal numbers, a third of them replaced by what rules trip over; E5M2 gets its infinities, which casts cannot make."""
    rng = np.random.default_rng(seed)
    odd = rng.random(type.shape) < 1 / 3
    numbers = rounded(np.where(odd, rng.choice(SPECIAL, type.shape), rng.standard_normal(type.shape)), type.dtype)
    if type.dtype is DType.f8e5m2:
        numbers = np.where(odd & (rng.random(type.shape) < 0.5), STORAGE[type.dtype].type(np.inf), numbers)
    return numbers


@st.composite
def planted(draw: Draw) -> tuple[Module, tuple[Array, ...]]:
    """A program of ordinary steps and planted ones; every value is returned, and parameters are updated where a result fits."""
    b = Builder("main")
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=3, max_size=4)))
    shape = shape[:1] * len(shape) if draw(st.booleans()) else shape  # a cube: axes in a wrong order keep the type
    dtypes = draw(st.lists(st.sampled_from([DType.f32, DType.bf16, DType.f8e5m2]), min_size=1, max_size=2))
    values = [b.param(f"x{i}", Tensor(dtype, shape)) for i, dtype in enumerate(dtypes)]
    for _ in range(draw(st.integers(1, 6))):
        x = draw(st.sampled_from([v for v in values if v.tensor.rank >= 1]))
        if draw(st.integers(0, 3)) and not (x.dtype is DType.f8e5m2 and x.owner):
            made = draw(st.sampled_from(PLANTS))(draw, b, x)
        elif x.dtype in (DType.f32, DType.bf16):
            made = [r for op in draw(st.sampled_from(list(STEPS.values())))(draw, b, x) for r in op.results]
        else:
            continue
        values += [v for v in made if v.dtype in (DType.f32, DType.bf16, DType.f8e5m2) and v.tensor.size <= LIMIT]
    read = {v for op in b.ops for v in op.operands}
    results = [r for op in b.ops for r in op.results if r in values or r not in read][draw(st.integers(0, 1)) :] or values
    fitting = {p: next((r for r, v in enumerate(results) if v.type == param.type), None) for p, param in enumerate(b.params)}
    updates = {p: r for p, r in list(fitting.items())[:1] if r is not None}
    module = verify(Module((b.finish(results, updates),)))
    seed = draw(st.integers(0, 2**20))
    return module, tuple(special(p.tensor, seed + i) for i, p in enumerate(b.params))


def leaves(found: Any) -> list[Array]:
    return [array for item in found for array in leaves(item)] if isinstance(found, tuple) else [found]


def assert_same_bits(expected: tuple[Any, ...], found: tuple[Any, ...]) -> None:
    for a, b in zip(leaves(expected), leaves(found), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        both = np.isnan(a) & np.isnan(b) if a.dtype.kind in "fV" else np.zeros(a.shape, bool)
        bits = f"u{a.dtype.itemsize}"
        assert np.array_equal(np.where(both, 0, np.ascontiguousarray(a).view(bits)), np.where(both, 0, np.ascontiguousarray(b).view(bits)))


def check(module: Module, inputs: tuple[Array, ...], backend: str = "numpy") -> None:
    after = dsc.apply(module, "simplify")
    assert [r.type for r in after.main.results] == [r.type for r in module.main.results]
    runner = backends.get(backend)
    assert_same_bits(runner.run(module, seeded, inputs), runner.run(after, seeded, inputs))
    assert dsc.apply(after, "simplify") is after
    assert dsc.parse(str(after)) == after
    assert str(dsc.parse(str(after))) == str(after)
    for func in after.funcs:
        before = module[func.name]
        assert (func.params, func.updates) == (before.params, before.updates)
        assert len(func.ops) <= len(before.ops)
        assert {op.id for op in func.ops} <= {op.id for op in before.ops}
        assert simplify_func(func) is func


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(planted(), st.sampled_from(["numpy", "numpy-f64"]))
def test_planted_programs_keep_every_bit(program: tuple[Module, tuple[Array, ...]], backend: str) -> None:
    check(*program, backend)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs())
def test_ordinary_programs_keep_every_bit(program: tuple[Module, tuple[Array, ...]]) -> None:
    check(*program)


# ---- seeded faults


def without_attributes(op: Op) -> Any:
    return op.name, tuple(r.type for r in op.results), op.operands


fold_rule: Any = simplify._fold
drop: Any = simplify.drop_unused


def composed_in_the_wrong_order(op: Op, b: Builder) -> Any:
    match op:
        case Transpose(x=Value(owner=Transpose(x=x, perm=first)), perm=second):
            made = Transpose(x, tuple(second[axis] for axis in first))
            return b.emit(made).results if made.result.type == op.result.type else None
    return fold_rule(op, b)


def where_reads_the_wrong_side(op: Op, b: Builder) -> Any:
    match op:
        case e.Where(condition=Value(owner=Literal(values=(value,))), a=a, b=other) if a.type == other.type == op.result.type:
            return (other if value else a,)
    return fold_rule(op, b)


def all_slices_are_whole(op: Op, b: Builder) -> Any:
    match op:
        case Slice(x=x, start=start) if start > 0 and op.result.shape[op.axis] == 1:
            return b.emit(Slice(x, op.axis, 0, 1)).results
    return fold_rule(op, b)


def dropping_updates(func: Func, *pinned: Any) -> Func:
    updated = set(func.updates.values())
    others = tuple(r for i, r in enumerate(func.results) if i not in updated)
    return drop(replace(func, results=others, updates={}) if updated else func, *pinned)


def mixing_results_up(func: Func, *pinned: Any) -> Func:
    kept = drop(func, *pinned)
    mixed = tuple(next(r for r in kept.results if r.type == result.type) for result in kept.results)
    return kept if mixed == kept.results else replace(kept, results=mixed)


def neutral_whatever_the_sign(op: Op, operand: Value) -> bool:
    wanted = 1 if isinstance(op, e.Mul | e.Div) else 0
    return isinstance(operand.owner, Literal) and set(operand.owner.values) == {wanted}


FAULTS: dict[str, tuple[str, Any]] = {
    "sharing ignores attributes": ("structural_key", without_attributes),
    "permutations are composed in the wrong order": ("_fold", composed_in_the_wrong_order),
    "a known condition picks the other side": ("_fold", where_reads_the_wrong_side),
    "a slice of the last element is taken from the front": ("_fold", all_slices_are_whole),
    "an update's result is dropped": ("drop_unused", dropping_updates),
    "results of one type are mixed up": ("drop_unused", mixing_results_up),
    "0.0 is neutral wherever -0.0 is": ("_is_neutral", neutral_whatever_the_sign),
    "every cast is lossless": ("is_lossless", lambda source, target: True),
    "no format saturates": ("_saturates", lambda dtype: False),
    "a literal is what is written, not what its dtype makes of it": ("holds", lambda value, dtype: True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, *FAULTS[fault])

    @settings(max_examples=400, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(planted())
    def law(program: tuple[Module, tuple[Array, ...]]) -> None:
        check(*program)

    with pytest.raises((AssertionError, dsc.DscError)):
        law()
