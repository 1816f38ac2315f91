"""RoPE, take and cross entropy against numpy_ref: the first two bit for bit, the loss within its bound, over several blocks of columns."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dsc import backends
from dsc.backends.arrays import STORAGE, rounded, widen
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.run import Executor, machine
from dsc.ir.core import Builder, Func, Module, Op, Value
from dsc.ir.errors import DscError
from dsc.ir.ops.loss import CrossEntropy
from dsc.ir.ops.norm import Rope
from dsc.ir.ops.shape import Slice, Take
from dsc.ir.types import DType, Tensor
from dsc.testing.bounds import bound

TRITON, NUMPY = Executor(poison=True), backends.get("numpy")
BF16, F32, I64 = DType.bf16, DType.f32, DType.i64


def value(dtype: DType, *shape: int) -> Value:
    return Value(Tensor(dtype, shape), "x")


def normal(dtype: DType, *shape: int, seed: int = 0) -> np.ndarray:
    return rounded(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def both(op: Op, *operands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    func = Func("f", tuple(dict.fromkeys(op.operands)), (op,), op.results)
    (step,) = plan_function(Module((func,)), func, [layout_of(p.type) for p in func.params], machine()[0], {}).steps
    assert (step.how, step.declined) == ("kernel", "")
    return TRITON.evaluate(op, operands)[0], NUMPY.evaluate(op, operands)[0]


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found.view(f"u{found.dtype.itemsize}"), expected.view(f"u{expected.dtype.itemsize}"))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", [(2, 5, 3, 64), (7, 1, 10), (1, 1, 1, 2), (2, 130, 1, 66)])
def test_rope_turns_as_the_reference(interleaved: bool, dtype: DType, shape: tuple[int, ...]) -> None:
    tables = (shape[-3], shape[-1] // 2)
    op = Rope(value(dtype, *shape), value(F32, *tables), value(F32, *tables), interleaved)
    same_bits(*both(op, normal(dtype, *shape), normal(F32, *tables, seed=1), normal(F32, *tables, seed=2)))


def _none(name: str, type: Tensor) -> np.ndarray:
    raise DscError(name)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_of_a_part_of_each_head(interleaved: bool) -> None:
    """The last 16 of 40 elements, read where they lie, with one table of a batch for both of its sequences."""
    b = Builder("main")
    x = b.param("x", Tensor(BF16, (2, 9, 3, 40)))
    cos, sin = (b.param(name, Tensor(F32, (1, 9, 8))) for name in ("cos", "sin"))
    part = b.emit(Slice(x, 3, 24, 40)).result
    module = Module((b.finish(b.emit(Rope(part, cos, sin, interleaved)).results),))
    plan = plan_function(module, module.main, [layout_of(p.type) for p in module.main.params], machine()[0], {})
    assert [(s.how, s.copies) for s in plan.steps] == [("view", ()), ("kernel", ())]
    inputs = [normal(BF16, 2, 9, 3, 40), normal(F32, 1, 9, 8, seed=1), normal(F32, 1, 9, 8, seed=2)]
    same_bits(*(runner.run(module, _none, inputs)[0] for runner in (TRITON, NUMPY)))


@pytest.mark.parametrize("dtype", [BF16, DType.f8e4m3, DType.i32, DType.bool])
@pytest.mark.parametrize(("shape", "axis"), [((13, 2100), 0), ((3, 13, 5), 1), ((13,), 0)])
def test_take_moves_elements(dtype: DType, shape: tuple[int, ...], axis: int) -> None:
    x = np.random.default_rng(0).integers(0, 2, shape).astype(STORAGE[dtype])
    indices = np.array([[12, 0, 0], [5, 12, 1]])
    same_bits(*both(Take(value(dtype, *shape), value(I64, 2, 3), axis=axis), x, indices))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (9, 131), (5, 9000), (30, 50)])
def test_cross_entropy_over_several_blocks(dtype: DType, tokens: int, columns: int) -> None:
    """The largest logits come last, so that every block rescales; some tokens do not count."""
    rng = np.random.default_rng(tokens)
    logits = rounded(rng.standard_normal((tokens, columns)) * 5 + np.linspace(-40, 40, columns), dtype)
    labels = rng.integers(0, columns, tokens)
    labels[1::3] = -100
    op = CrossEntropy(value(dtype, tokens, columns), value(I64, tokens))
    found, expected = both(op, logits, labels)
    (permitted,) = bound(op, (logits, labels), (expected,))
    assert abs(float(found) - float(expected)) <= permitted


def test_cross_entropy_of_infinite_logits_and_no_numbers() -> None:
    """A block of -infinity leaves the sum as it is; NaN and infinity spread; without a counted token the mean is none."""
    op = CrossEntropy(value(F32, 2, 9000), value(I64, 2))
    logits = normal(F32, 2, 9000)
    logits[0, :5000] = -np.inf
    labels = np.array([8000, 3])
    found, expected = both(op, logits, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for odd in (np.nan, np.inf):
        spoiled = logits.copy()
        spoiled[1, 8999] = odd
        assert [bool(np.isnan(x)) for x in both(op, spoiled, labels)] == [True, True]
        assert np.isfinite(widen(both(op, spoiled, np.array([8000, -100]))[0]))
    assert [bool(np.isnan(x)) for x in both(op, logits, np.array([-100, -100]))] == [True, True]
