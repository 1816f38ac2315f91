"""The kernels of attention's backward pass against numpy_ref, within the derived bound, and against torch.autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from dsc import backends
from dsc.backends.arrays import rounded, widen
from dsc.backends.triton.kernels import attention_backward as backward_file
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.run import Executor, machine
from dsc.driver.measure import same_bits
from dsc.ir.core import Builder, Func, Module, Op, Value
from dsc.ir.errors import DscError
from dsc.ir.ops.attention import Attention, AttentionBackward
from dsc.ir.ops.shape import Slice, Transpose
from dsc.ir.types import DType, Tensor
from dsc.testing.bounds import bound

TRITON, NUMPY, EXACT = Executor(poison=True), backends.get("numpy"), backends.get("numpy-f64")
BF16, F32 = DType.bf16, DType.f32

SHAPES = [  # heads, key heads, queries, keys, widths
    (1, 1, 140, 140, 192, 128),
    (4, 2, 129, 40, 64, 64),
    (2, 1, 5, 200, 40, 24),
    (3, 1, 70, 3, 17, 33),
    (1, 1, 1, 1, 1, 1),
    (1, 1, 33, 40, 128, 256),
]


def normal(dtype: DType, *shape: int, seed: int = 0) -> np.ndarray:
    return rounded(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def how(op: Op) -> tuple[str, str]:
    func = Func("f", tuple(dict.fromkeys(op.operands)), (op,), op.results)
    (step,) = plan_function(Module((func,)), func, [layout_of(p.type) for p in func.params], machine()[0], {}).steps
    return step.how, step.declined


def backward(dtype: DType, heads: int, kv: int, queries: int, keys: int, dk: int, dv: int, causal: bool) -> AttentionBackward:
    shapes = (1, heads, queries, dk), (1, kv, keys, dk), (1, kv, keys, dv), (1, heads, queries, dv), (1, heads, queries, dv)
    return AttentionBackward(*(Value(Tensor(dtype, s), "x") for s in shapes), scale=dk**-0.5, causal=causal)


def operands_of(op: AttentionBackward) -> list[np.ndarray]:
    """Normal q, k, v and dout; out is what attention gives of them, rounded."""
    q, k, v, dout = (normal(x.dtype, *x.shape, seed=i) for i, x in enumerate((op.q, op.k, op.v, op.dout)))  # type: ignore[arg-type]
    return [q, k, v, *EXACT.evaluate(Attention(op.q, op.k, op.v, None, op.scale, op.causal), (q, k, v)), dout]


def excess(op: AttentionBackward, *operands: np.ndarray) -> list[float]:
    """How far beyond the bound dq, dk and dv lie from the reference's, at most; NaN has to be at the same places."""
    assert how(op) == ("kernel", "")
    found, expected, over = TRITON.evaluate(op, operands), NUMPY.evaluate(op, operands), []
    for x, y, permitted in zip(found, expected, bound(op, operands, expected), strict=True):
        x, y = widen(x, np.float64), widen(y, np.float64)
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        over.append(float(np.nan_to_num(np.abs(x - y) - permitted).max(initial=0.0)))
    return over


@pytest.mark.parametrize(
    ("dtype", "causal", "shape"), [(dtype, i % 2 == (dtype is F32), s) for i, s in enumerate(SHAPES) for dtype in (BF16, F32)], ids=str
)
def test_gradients_of_any_shape(dtype: DType, causal: bool, shape: tuple[int, ...]) -> None:
    op = backward(dtype, *shape, causal)
    assert excess(op, *operands_of(op)) == [0, 0, 0]


def test_scores_far_apart_equal_and_no_numbers() -> None:
    """The largest score comes last, so that every block rescales; scores of one size; a query of NaN reaches the keys that it sees."""
    op = backward(BF16, 2, 1, 100, 140, 32, 16, True)
    q, k, v, out, dout = operands_of(op)
    rising = (widen(np.ones_like(k)) * np.arange(140)[:, None] * 0.25).astype(k.dtype)
    assert excess(op, np.abs(q), rising, v, out, dout) == [0, 0, 0]
    assert excess(op, q, np.zeros_like(k), v, out, dout) == [0, 0, 0]
    q[0, 0, 7, 3] = np.nan
    dq, dk, dv = (np.isnan(widen(x)) for x in TRITON.evaluate(op, (q, k, v, out, dout)))
    assert all(x.all() for x in (dq[0, 0, 7], dk[0, 0, :8], dv[0, 0, :8]))
    assert not any(x.any() for x in (np.delete(dq[0], 7, 1), dk[0, 0, 8:, :3], dv[0, 0, 100:]))


@pytest.mark.parametrize(("queries", "keys"), [(3, 0), (0, 3)])
def test_without_keys_or_queries_gradients_are_zero(queries: int, keys: int) -> None:
    op = backward(BF16, 2, 1, queries, keys, 16, 16, False)
    assert not any(widen(x).any() for x in TRITON.evaluate(op, operands_of(op)))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_torch_in_float64(causal: bool) -> None:
    """In float32 the rounding of `out`, which torch does not have, is less than the roundings of the sum that it enters."""
    op = backward(F32, 4, 2, 70, 70, 48, 24, causal)
    q, k, v, out, dout = operands_of(op)
    leaves = [torch.from_numpy(x).double().requires_grad_() for x in (q, k, v)]
    result = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal, scale=op.scale, enable_gqa=True)
    result.backward(torch.from_numpy(dout).double())
    found = TRITON.evaluate(op, (q, k, v, out, dout))
    for x, leaf, permitted in zip(found, leaves, bound(op, (q, k, v, out, dout), found), strict=True):
        assert leaf.grad is not None
        y = leaf.grad.numpy()
        assert (np.abs(x - y) <= permitted + np.spacing(np.abs(y).astype(np.float32))).all()


@pytest.mark.parametrize("faulty", ["parts_of", "LOG2_E"])
def test_the_bound_notices_a_fault(faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """P and dS of one BF16; a scale that is off by 2^-7."""
    fault = {"parts_of": lambda dtype, terms: 1, "LOG2_E": 1.4426950408889634 * (1 + 2.0**-7)}[faulty]
    op = backward(BF16, 1, 1, 150, 150, 192, 128, True)
    monkeypatch.setattr(backward_file, faulty, fault)
    assert all(over > 0 for over in excess(op, *operands_of(op)))


def test_views_are_read_where_they_lie() -> None:
    """[B, S, H, D] as models hold it, transposed; k and v parts of one tensor."""
    b = Builder("main")
    shapes = {"q": (2, 70, 4, 24), "kv": (2, 70, 2, 40), "out": (2, 70, 4, 16), "dout": (2, 70, 4, 16)}
    q, kv, out, dout = (b.param(name, Tensor(BF16, shape)) for name, shape in shapes.items())
    k, v = b.emit(Slice(kv, 3, 0, 24)).result, b.emit(Slice(kv, 3, 24, 40)).result
    heads = [b.emit(Transpose(x, (0, 2, 1, 3))).result for x in (q, k, v, out, dout)]
    op = b.emit(AttentionBackward(*heads, scale=0.2, causal=True))
    module = Module((b.finish(op.results),))
    plan = plan_function(module, module.main, [layout_of(p.type) for p in module.main.params], machine()[0], {})
    assert [(s.how, s.copies) for s in plan.steps][-1] == ("kernel", ())
    inputs = [normal(BF16, *shape) for shape in shapes.values()]
    operands = [x.swapaxes(1, 2) for x in (inputs[0], inputs[1][..., :24], inputs[1][..., 24:], *inputs[2:])]
    found, expected = TRITON.run(module, _none, inputs), NUMPY.evaluate(op, operands)
    for x, y, permitted in zip(found, expected, bound(op, operands, expected), strict=True):
        assert (np.abs(widen(x, np.float64) - widen(y, np.float64)) <= permitted).all()


def _none(name: str, type: Tensor) -> np.ndarray:
    raise DscError(name)


PACKED = [
    ([0, 0, 1, 1, 70, 134, 150], True),  # documents of 0, 1, 0, 69, 64 and 16 tokens
    ([3, 80, 140], False),  # two, and tokens of none before and after
    ([5], False),  # no document
]


@pytest.mark.parametrize(("boundaries", "causal"), PACKED, ids=str)
def test_packed_documents(boundaries: list[int], causal: bool) -> None:
    """Forward and backward, within the bound; each document's bits do not depend on where it lies among the others' numbers."""
    given = np.array(boundaries, np.int32)
    mask = Value(Tensor(DType.i32, given.shape), "mask")
    shapes = (1, 2, 150, 40), (1, 1, 150, 40), (1, 1, 150, 24)
    forward = Attention(*(Value(Tensor(BF16, s), "x") for s in shapes), mask, scale=0.2, causal=causal)
    q, k, v = (normal(BF16, *s, seed=i) for i, s in enumerate(shapes))
    (out,), dout = NUMPY.evaluate(forward, (q, k, v, given)), normal(BF16, 1, 2, 150, 24, seed=3)
    (permitted,), (found,) = bound(forward, (q, k, v, given), (out,)), TRITON.evaluate(forward, (q, k, v, given))
    assert how(forward) == ("kernel", "")
    assert (np.abs(widen(found, np.float64) - widen(out, np.float64)) <= permitted).all()
    op = AttentionBackward(*(Value(x.type, "x") for x in (*forward.operands[:3], *forward.results * 2)), mask, forward.scale, causal)
    operands = (q, k, v, out, dout, given)
    assert excess(op, *operands) == [0, 0, 0]
    spoiled = [x.copy() for x in operands[:5]]
    for x in spoiled:
        x[..., boundaries[-1] :, :] = x[..., : boundaries[0], :] = 100  # what lies in no document
    inside = slice(boundaries[0], boundaries[-1])
    for x, y in zip(TRITON.evaluate(op, (*spoiled, given)), TRITON.evaluate(op, operands), strict=True):
        assert same_bits(x[:, :, inside], y[:, :, inside])


def test_the_bound_notices_a_document_that_ends_late() -> None:
    given = np.array([0, 40, 70], np.int32)
    op = AttentionBackward(*backward(BF16, 1, 1, 70, 70, 16, 16, True).operands, Value(Tensor(DType.i32, (3,)), "mask"), 0.25, True)
    q, k, v, out, dout = operands_of(backward(BF16, 1, 1, 70, 70, 16, 16, True))
    expected = NUMPY.evaluate(op, (q, k, v, out, dout, given))
    found = TRITON.evaluate(op, (q, k, v, out, dout, given + np.array([0, 1, 0], np.int32)))
    for x, y, permitted in zip(found, expected, bound(op, (q, k, v, out, dout, given), expected), strict=True):
        assert (np.abs(widen(x, np.float64) - widen(y, np.float64)) > permitted).any()


def test_the_bits_do_not_depend_on_the_other_heads() -> None:
    """Every sum is one program's: a head alone gives what it gives among others."""
    op = backward(BF16, 4, 2, 100, 90, 48, 32, False)
    operands = operands_of(op)
    alone = backward(BF16, 2, 1, 100, 90, 48, 32, False)
    found = TRITON.evaluate(op, operands)
    part = TRITON.evaluate(alone, [np.ascontiguousarray(x[:, -alone.q.shape[1] if x.shape[1] == 4 else -1 :]) for x in operands])  # type: ignore[operator]
    for x, y in zip(found, part, strict=True):
        assert same_bits(np.ascontiguousarray(x[:, -y.shape[1] :]), y)
