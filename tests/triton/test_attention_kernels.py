"""The attention kernels against numpy_ref, within the derived bound: widths of MLA, shared key heads, views, blocks that end anywhere."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dsc import backends
from dsc.backends.arrays import rounded, widen
from dsc.backends.triton.kernels import attention as attention_file
from dsc.backends.triton.kernels.flash import Width, split_width
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.run import Executor, machine
from dsc.driver.measure import same_bits
from dsc.ir.core import Builder, Func, Module, Op, Value
from dsc.ir.errors import DscError
from dsc.ir.ops.attention import Attention, AttentionDecode
from dsc.ir.ops.shape import Slice, Transpose
from dsc.ir.types import DType, Tensor
from dsc.testing.bounds import bound

TRITON, NUMPY = Executor(poison=True), backends.get("numpy")
BF16, F32, I64 = DType.bf16, DType.f32, DType.i64


def value(dtype: DType, *shape: int) -> Value:
    return Value(Tensor(dtype, shape), "x")


def normal(dtype: DType, *shape: int, seed: int = 0) -> np.ndarray:
    return rounded(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def how(op: Op) -> tuple[str, str]:
    func = Func("f", tuple(dict.fromkeys(op.operands)), (op,), op.results)
    (step,) = plan_function(Module((func,)), func, [layout_of(p.type) for p in func.params], machine()[0], {}).steps
    return step.how, step.declined


def excess(op: Op, *operands: np.ndarray) -> float:
    """How far beyond the bound the kernel's result lies from the reference's, at most; NaN has to be at the same places."""
    assert how(op) == ("kernel", "")
    (found,), (expected,) = TRITON.evaluate(op, operands), NUMPY.evaluate(op, operands)
    (permitted,) = bound(op, operands, (expected,))
    x, y = widen(found, np.float64), widen(expected, np.float64)
    np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
    return float(np.nan_to_num(np.abs(x - y) - permitted).max(initial=0.0))


def attention(dtype: DType, heads: int, kv: int, queries: int, keys: int, dk: int, dv: int, causal: bool) -> tuple[Op, list[np.ndarray]]:
    shapes = (1, heads, queries, dk), (1, kv, keys, dk), (1, kv, keys, dv)
    op = Attention(*(value(dtype, *s) for s in shapes), scale=dk**-0.5, causal=causal)
    return op, [normal(dtype, *s, seed=i) for i, s in enumerate(shapes)]


SHAPES = [  # heads, key heads, queries, keys, widths
    (1, 1, 150, 150, 192, 128),
    (2, 1, 129, 70, 64, 64),
    (2, 1, 5, 200, 40, 24),
    (1, 1, 70, 3, 17, 33),
    (1, 1, 1, 1, 1, 1),
    (1, 1, 130, 64, 128, 256),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_attention_of_any_shape(shape: tuple[int, ...], causal: bool, dtype: DType) -> None:
    op, operands = attention(dtype, *shape, causal)
    assert excess(op, *operands) == 0


def test_scores_far_apart_equal_and_no_numbers() -> None:
    """The largest score comes last, so that every block rescales; scores of one size; a NaN and an infinity reach their queries only."""
    op, (q, k, v) = attention(BF16, 2, 1, 140, 140, 32, 16, True)
    rising = (widen(np.ones_like(k)) * np.arange(140)[:, None] * 0.25).astype(k.dtype)
    assert excess(op, np.abs(q), rising, v) == 0
    assert excess(op, q, np.zeros_like(k), v) == 0
    q[0, 0, 7, 3] = np.nan
    q[0, 1, 130, 0] = np.inf
    assert excess(op, q, k, v) == 0


def test_without_keys_the_result_is_zero() -> None:
    op, operands = attention(BF16, 1, 1, 3, 0, 16, 16, False)
    assert not widen(TRITON.evaluate(op, operands)[0]).any()


def test_the_bound_notices_probabilities_of_one_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    op, operands = attention(BF16, 1, 1, 150, 150, 192, 128, True)
    monkeypatch.setattr(attention_file, "parts_of", lambda dtype, keys: 1)
    assert excess(op, *operands) > 0


def test_views_are_read_where_they_lie() -> None:
    """[B, S, H, D] as models hold it, transposed; k and v parts of one tensor."""
    b = Builder("main")
    q, kv = b.param("q", Tensor(BF16, (2, 70, 3, 24))), b.param("kv", Tensor(BF16, (2, 70, 3, 40)))
    k, v = b.emit(Slice(kv, 3, 0, 24)).result, b.emit(Slice(kv, 3, 24, 40)).result
    heads = [b.emit(Transpose(x, (0, 2, 1, 3))).result for x in (q, k, v)]
    module = Module((b.finish(b.emit(Attention(*heads, scale=0.2, causal=True)).results),))
    plan = plan_function(module, module.main, [layout_of(p.type) for p in module.main.params], machine()[0], {})
    assert [(s.how, s.copies) for s in plan.steps][-1] == ("kernel", ())
    inputs = [normal(BF16, *p.type.shape) for p in module.main.params]  # type: ignore[union-attr]
    (found,), (expected,) = (runner.run(module, _none, inputs) for runner in (TRITON, NUMPY))
    np.testing.assert_allclose(widen(found), widen(expected), rtol=2.0**-7, atol=2.0**-12)


def _none(name: str, type: Tensor) -> np.ndarray:
    raise DscError(name)


def test_what_the_kernel_declines() -> None:
    q = value(F32, 1, 4, 8)
    assert (
        how(Attention(q, q, q, value(DType.bool, 4, 4)))[1]
        == "a mask bool[4, 4]; expected none, causality, or boundaries of documents one after another"
    )
    assert how(Attention(q, q, q, scale=-1.0))[1] == "scale = -1, expected a positive one"
    half = value(DType.f16, 1, 4, 8)
    assert how(Attention(half, half, half))[1] == "operands of f16, expected bf16 or f32"


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("heads", "kv", "keys", "dk", "dv"), [(20, 1, 150, 576, 512), (6, 2, 300, 24, 16), (3, 3, 1, 5, 7), (34, 1, 20, 24, 16)]
)
def test_decode_of_any_shape(dtype: DType, heads: int, kv: int, keys: int, dk: int, dv: int) -> None:
    """From one key to all of them, and with none; several parts of the keys, some beyond every position."""
    shapes = (3, heads, dk), (3, keys, kv, dk), (3, keys, kv, dv)
    op = AttentionDecode(*(value(dtype, *s) for s in shapes), value(I64, 3), scale=dk**-0.5)
    positions = np.array([0, keys - 1, -1])
    assert excess(op, *(normal(dtype, *s, seed=i) for i, s in enumerate(shapes)), positions) == 0


def test_decode_does_not_see_what_lies_beyond_the_position() -> None:
    op = AttentionDecode(value(F32, 2, 4, 16), value(F32, 2, 300, 1, 16), value(F32, 2, 300, 1, 8), value(I64, 2), scale=0.25)
    q, k, v = (normal(F32, *x.shape) for x in (op.q, op.k, op.v))
    positions = np.array([130, 5])
    clean = TRITON.evaluate(op, (q, k, v, positions))[0]
    for b, position in enumerate(positions):
        k[b, position + 1 :] = v[b, position + 1 :] = np.nan
    np.testing.assert_array_equal(TRITON.evaluate(op, (q, k, v, positions))[0], clean)


def paged(dtype: DType, size: int, heads: int, kv: int, dk: int, dv: int) -> tuple[AttentionDecode, list[np.ndarray]]:
    """Three sequences over shuffled pages of which some belong to none; entries past a sequence's last page name no page."""
    each, pages, positions = 200 // size + 1, 3 * (200 // size + 1) + 2, np.array([199, 0, size])
    k, v = normal(dtype, pages, size, kv, dk, seed=1), normal(dtype, pages, size, kv, dv, seed=2)
    table = np.random.default_rng(size).permutation(pages)[: 3 * each].reshape(3, each).astype(np.int32)
    table[np.arange(each) > (positions // size)[:, None]] = -(2**31)
    shapes = [value(dtype, 3, heads, dk), value(dtype, *k.shape), value(dtype, *v.shape), value(I64, 3)]
    op = AttentionDecode(*shapes, scale=dk**-0.5, pages=value(DType.i32, 3, each))
    return op, [normal(dtype, 3, heads, dk), k, v, positions, table]


@pytest.mark.parametrize("shape", [(64, 5, 1, 576, 512), (16, 6, 2, 24, 16), (7, 3, 3, 5, 7)], ids=str)
def test_decode_over_a_paged_cache(shape: tuple[int, ...]) -> None:
    """Within the bound, and to the bit what the same cache gives in one piece."""
    op, (q, k, v, positions, table) = paged(BF16, *shape)
    assert excess(op, q, k, v, positions, table) == 0
    whole = [x[np.maximum(table, 0)].reshape(3, -1, *x.shape[2:]) for x in (k, v)]
    contiguous = AttentionDecode(op.q, *(value(BF16, *x.shape) for x in whole), op.positions, scale=op.scale)
    found, expected = TRITON.evaluate(op, (q, k, v, positions, table))[0], TRITON.evaluate(contiguous, (q, *whole, positions))[0]
    assert same_bits(found, expected)


def test_the_bound_notices_a_page_read_twice() -> None:
    op, (q, k, v, positions, table) = paged(BF16, 16, 6, 2, 24, 16)
    (expected,) = NUMPY.evaluate(op, (q, k, v, positions, table))
    (permitted,) = bound(op, (q, k, v, positions, table), (expected,))
    table[0, 12] = table[0, 3]
    (found,) = TRITON.evaluate(op, (q, k, v, positions, table))
    assert (np.abs(widen(found, np.float64) - widen(expected, np.float64)) > permitted).any()


def test_the_values_of_absorbed_mla_are_part_of_its_keys() -> None:
    b = Builder("main")
    q, cache = b.param("q", Tensor(BF16, (2, 16, 96))), b.param("cache", Tensor(BF16, (2, 50, 1, 96)))
    positions = b.param("positions", Tensor(I64, (2,)))
    v = b.emit(Slice(cache, 3, 0, 64)).result
    module = Module((b.finish(b.emit(AttentionDecode(q, cache, v, positions, scale=0.1)).results),))
    plan = plan_function(module, module.main, [layout_of(p.type) for p in module.main.params], machine()[0], {})
    assert [(s.how, s.copies) for s in plan.steps][-1] == ("kernel", ())
    inputs = [normal(BF16, 2, 16, 96), normal(BF16, 2, 50, 1, 96), np.array([49, 20])]
    (found,), (expected,) = (runner.run(module, _none, inputs) for runner in (TRITON, NUMPY))
    op = AttentionDecode(q, cache, value(BF16, 2, 50, 1, 64), positions, scale=0.1)
    (permitted,) = bound(op, [*inputs[:2], inputs[1][..., :64], inputs[2]], (expected,))
    assert (np.abs(widen(found, np.float64) - widen(expected, np.float64)) <= permitted).all()


def test_widths_are_covered_by_as_little_as_the_instruction_allows() -> None:
    assert split_width(192) == Width(128, 64)
    assert split_width(576) == Width(512, 64)
    assert [split_width(w) for w in (1, 16, 17, 100, 128)] == [Width(16, 0), Width(16, 0), Width(32, 0), Width(128, 0), Width(128, 0)]
    for width in range(1, 1025):
        head, tail = split_width(width)
        assert width <= head + tail <= max(16, 1 << (width - 1).bit_length())
