"""The kernels of the gate and of the way to the experts and back against numpy_ref: choices and permutations exactly, on nasty inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dsc import backends
from dsc.backends.arrays import rounded
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.run import Executor, machine
from dsc.ir.core import Func, Module, Op, Value
from dsc.ir.ops.moe import Combine, Dispatch, Redispatch, Route
from dsc.ir.types import Bundle, DType, Tensor

TRITON, NUMPY = Executor(poison=True), backends.get("numpy")
F32, I32 = DType.f32, DType.i32


def value(dtype: DType, *shape: int) -> Value:
    return Value(Tensor(dtype, shape), "x")


def handle(rows: int) -> Value:
    return Value(Bundle((Tensor(I32, (rows,)),)), "x")


def flat(values: Any) -> Iterator[np.ndarray]:
    for item in values:
        yield from flat(item) if isinstance(item, tuple) else (item,)


def both(op: Op, *operands: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each result by a kernel, and by the reference."""
    func = Func("f", tuple(dict.fromkeys(op.operands)), (op,), op.results)
    (step,) = plan_function(Module((func,)), func, [layout_of(p.type) for p in func.params], machine()[0], {}).steps
    assert (step.how, step.declined) == ("kernel", "")
    return list(zip(flat(TRITON.evaluate(op, operands)), flat(NUMPY.evaluate(op, operands)), strict=True))


def same_bits(op: Op, *operands: Any) -> None:
    for found, expected in both(op, *operands):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found.view(f"u{found.dtype.itemsize}"), expected.view(f"u{expected.dtype.itemsize}"))


def levels(rng: np.random.Generator, tokens: int, experts: int) -> np.ndarray:
    """Logits of eight values far apart: most experts have equals, and no two scores are nearly equal."""
    return (rng.integers(0, 8, (tokens, experts)) * 0.5 - 2).astype(np.float32)


GATES = [
    *(dict(top_k=8, groups=8, top_groups=4, score=score, group_score="top2", scale=2.5) for score in ("sigmoid", "softmax")),
    dict(top_k=6, groups=8, top_groups=3, score="softmax", group_score="max", normalize=False, scale=16),
    dict(top_k=3),
    dict(top_k=5, groups=5, top_groups=5, score="softmax"),
]


@pytest.mark.parametrize("gate", GATES, ids=lambda g: f"{g['top_k']} of {g.get('top_groups', 1)} by {g.get('score', 'sigmoid')}")
@pytest.mark.parametrize("experts", [40, 280, 480])
@pytest.mark.parametrize("biased", [False, True])
def test_equal_scores_are_chosen_by_lower_index(gate: dict[str, Any], experts: int, biased: bool) -> None:
    """Weights then differ by their rounding alone: each score by gamma(E + 13), of softmax, whose exponents are at most 3.5; as much again,

    k + 3 roundings and a little from their sum. Half of this for each of the two.
    """
    rng = np.random.default_rng(experts)
    logits = levels(rng, 9, experts)
    operands = [logits, rng.choice([0.0, 4.0, 16.0], experts).astype(np.float32)][: 1 + biased]
    op = Route(*(value(F32, *x.shape) for x in operands), **gate)
    (ids, expected), (weights, reference) = both(op, *operands)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(weights, reference, rtol=2 * (2 * (experts + 13) + op.top_k + 3) * 2.0**-24, atol=0)


def test_a_single_choice_of_two_groups_of_one_expert() -> None:
    rng = np.random.default_rng(1)
    for group_score in ("top2", "max"):
        op = Route(value(F32, 5, 7), value(F32, 7), top_k=2, groups=7, top_groups=2, group_score=group_score)  # type: ignore[arg-type]
        (ids, expected), _ = both(op, levels(rng, 5, 7), rng.choice([0.0, 8.0], 7).astype(np.float32))
        np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_logits_that_are_no_numbers(score: Any) -> None:
    """A NaN comes before all numbers, and only its own token's weights suffer; infinite logits and biases are as in the reference."""
    logits = levels(np.random.default_rng(2), 7, 24)
    logits[0, [3, 20]] = np.nan
    logits[1, 5] = np.inf
    logits[2, [0, 9]] = -np.inf
    logits[3] = -np.inf
    logits[4] = np.nan
    logits[5] = -0.0
    logits[5, ::2] = 0.0
    bias = np.zeros(24, np.float32)
    bias[[1, 12]] = -np.inf
    for groups, top_groups in ((4, 2), (1, 1)):
        op = Route(value(F32, 7, 24), value(F32, 24), top_k=12, groups=groups, top_groups=top_groups, score=score)
        (ids, expected), (weights, reference) = both(op, logits, bias)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_allclose(weights, reference, rtol=1e-5)


def dispatched(ids: np.ndarray, experts: int, *xs: np.ndarray, dtypes: tuple[DType, ...] = (DType.bf16,)) -> Dispatch:
    return Dispatch(tuple(value(d, *x.shape) for d, x in zip(dtypes, xs, strict=True)), value(I32, *ids.shape), experts)


def choose(pattern: str, tokens: int, k: int, experts: int) -> np.ndarray:
    """ids [tokens, k]: at random; all to the last expert; all to every other; expert by expert in falling order."""
    rng = np.random.default_rng(tokens)
    ids = {
        "random": np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]),
        "one": np.full((tokens, k), experts - 1),
        "sparse": 2 * rng.integers(0, (experts + 1) // 2, (tokens, k)),
        "falling": experts - 1 - np.arange(tokens * k).reshape(tokens, k) * experts // (tokens * k),
    }
    return ids[pattern].astype(np.int32)


@pytest.mark.parametrize("pattern", ["random", "one", "sparse", "falling"])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (33, 3, 7), (100, 8, 257)])
def test_dispatch_sorts_stably(pattern: str, tokens: int, k: int, experts: int) -> None:
    """Codes and their scales travel together; the counts' blocks are crossed, and experts without tokens have no row."""
    rng = np.random.default_rng(3)
    ids = choose(pattern, tokens, k, experts)
    codes, scales = rounded(rng.standard_normal((tokens, 131)), DType.f8e4m3), rng.standard_normal((tokens, 2)).astype(np.float32)
    same_bits(dispatched(ids, experts, codes, scales, dtypes=(DType.f8e4m3, F32)), codes, scales, ids)


def test_dispatch_over_several_steps_of_the_scan() -> None:
    """More than 64 blocks of 64 slots: the scan carries its totals."""
    ids = choose("sparse", 600, 7, 40)
    x = np.arange(600, dtype=np.int32)[:, None]
    same_bits(Dispatch((value(I32, 600, 1),), value(I32, 600, 7), 40), x, ids)


@pytest.mark.parametrize("dtype", [DType.bf16, DType.f32, DType.f8e4m3])
@pytest.mark.parametrize(("tokens", "k", "columns"), [(1, 1, 1), (13, 8, 2100), (70, 3, 65)])
def test_combine_adds_in_the_order_of_slots(dtype: DType, tokens: int, k: int, columns: int) -> None:
    """Bit for bit, which no other order of these additions would be."""
    rng = np.random.default_rng(4)
    rows = rounded(rng.standard_normal((tokens * k, columns)) * np.exp2(rng.integers(-8, 8, (tokens * k, 1))), dtype)
    order = rng.permutation(tokens * k).astype(np.int32)
    weights = rng.uniform(0, 1, (tokens, k)).astype(np.float32)
    op = Combine(value(dtype, *rows.shape), handle(tokens * k), value(F32, tokens, k))
    same_bits(op, rows, (order,), weights)
    if k > 3 and dtype is F32:
        backwards = both(op, rows, (((order // k) * k + k - 1 - order % k).astype(np.int32),), weights[:, ::-1].copy())
        assert (backwards[0][0] != NUMPY.evaluate(op, (rows, (order,), weights))[0]).any()


@pytest.mark.parametrize(("tokens", "k"), [(1, 4), (37, 5), (0, 3)])
def test_redispatch_follows_the_handle(tokens: int, k: int) -> None:
    rng = np.random.default_rng(5)
    order = rng.permutation(tokens * k).astype(np.int32)
    x, scales = rounded(rng.standard_normal((tokens, 129)), DType.bf16), rng.standard_normal((tokens, 3))
    scales = scales.astype(np.float32)
    op = Redispatch((value(DType.bf16, tokens, 129), value(F32, tokens, 3)), handle(tokens * k))
    if tokens:
        same_bits(op, x, scales, (order,))
    assert [r.shape for r in TRITON.evaluate(op, (x, scales, (order,)))] == [v.shape for v in op.results]
