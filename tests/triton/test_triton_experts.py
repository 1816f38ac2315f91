"""Products of rows with the matrix of their group, and their weight gradients, against numpy_ref: every way that rows fall into groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from dsc import backends
from dsc.backends.arrays import rounded, widen
from dsc.backends.triton import registry
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.run import Executor, machine
from dsc.backends.triton.targets import TARGETS
from dsc.driver.measure import same_bits as same_array
from dsc.ir.core import Func, Module, Op, Value
from dsc.ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad
from dsc.ir.ops.quant import GroupedScaledMatmul, GroupedScaledMatmulWgrad, Quantize, ScaledMatmul, scale_shape
from dsc.ir.quantization import RULES, Accumulation
from dsc.ir.types import DType, Tensor
from dsc.testing.bounds import bound

TRITON, NUMPY = Executor(poison=True), backends.get("numpy")
F8, F32, BF16 = DType.f8e4m3, DType.f32, DType.bf16
ROWS = 150
COUNTS = {
    "uneven": [70, 0, 1, 64, 15],
    "the first and last empty": [0, 0, 129, 21, 0],
    "one has all": [0, 150, 0, 0, 0],
    "spare rows": [65, 3, 0, 0, 60],
    "all spare": [0] * 5,
    "one group": [150],
}
every_grouping = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def operands_of(*arrays: np.ndarray) -> tuple[Value, ...]:
    names = {"float8_e4m3fn": F8, "float8_e5m2": DType.f8e5m2, "float32": F32, "bfloat16": BF16, "float16": DType.f16, "int32": DType.i32}
    return tuple(Value(Tensor(names[a.dtype.name], a.shape), f"x{i}") for i, a in enumerate(arrays))


def plan_of(op: Op) -> Any:
    func = Func("f", tuple(dict.fromkeys(op.operands)), (op,), op.results)
    return plan_function(Module((func,)), func, [layout_of(p.type) for p in func.params], machine()[0], {}).steps[0]


def agrees(op: Op, operands: tuple[np.ndarray, ...], given: tuple[np.ndarray, ...] | None = None) -> bool:
    """Whether the kernel's result on `given`, else on the operands, is the reference's on the operands within the derived bound."""
    step = plan_of(op)
    assert (step.how, step.declined) == ("kernel", "")
    (found,), (expected,) = TRITON.evaluate(op, given or operands), NUMPY.evaluate(op, operands)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    (permitted,) = bound(op, operands, (expected,))
    x, y = widen(found, np.float64), widen(expected, np.float64)
    with np.errstate(invalid="ignore"):
        return bool(((x == y) | (np.isnan(x) & np.isnan(y)) | (np.abs(x - y) <= permitted)).all())


def same_bits(op: Op, *operands: np.ndarray) -> None:
    assert plan_of(op).how == "kernel"
    (found,), (expected,) = TRITON.evaluate(op, operands), NUMPY.evaluate(op, operands)
    np.testing.assert_array_equal(found.view(f"u{found.dtype.itemsize}"), expected.view(f"u{expected.dtype.itemsize}"))


def normal(dtype: DType, *shape: int) -> np.ndarray:
    return rounded(np.random.default_rng(shape).standard_normal(shape) * (100 if dtype is F8 else 1), dtype)


def integers(dtype: DType, *shape: int) -> np.ndarray:
    """Small whole numbers: every sum of products of them is exact, in any order."""
    return rounded(np.random.default_rng(shape).integers(-8, 9, shape).astype(np.float64), dtype)


def scales(*shape: int, whole: bool = False) -> np.ndarray:
    """Scales that differ by up to 2^8 from one tile to the next; powers of two if `whole`."""
    exponents = np.random.default_rng(shape).uniform(-4, 4, shape)
    return np.exp2(np.round(exponents) if whole else exponents).astype(np.float32)


def scaled(counts: list[int], n: int, k: int, w_rows: int = 128, exact: bool = False, **attributes: Any) -> tuple[Op, tuple[Any, ...]]:
    """A grouped block-scaled product of ROWS rows."""
    draw, groups = integers if exact else normal, len(counts)
    x, w = draw(F8, ROWS, k), draw(F8, groups, n, k)
    sx, sw = (scales(*scale_shape(c.shape, t), whole=exact) for c, t in ((x, (1, 128)), (w, (w_rows, 128))))
    operands = (x, sx, w, sw, np.array(counts, np.int32))
    return GroupedScaledMatmul(*operands_of(*operands), w_tile=(w_rows, 128), **attributes), operands


@every_grouping
def test_scaled_rows_times_the_matrix_of_their_group(counts: list[int]) -> None:
    formulas: Any = ("deepgemm", "cublas", "unfused")
    for formula, n, k, w_rows in zip(formulas, (129, 40, 9), (130, 127, 300), (128, 1, 64), strict=True):
        op, operands = scaled(counts, n, k, w_rows, accumulation=Accumulation("float32", formula=formula), out=F32)
        assert agrees(op, operands)


@every_grouping
def test_scaled_products_of_small_integers_are_exact(counts: list[int]) -> None:
    """Any order gives the same bits where every partial sum is a small integer and scales are powers of two; spare rows are +0."""
    op, operands = scaled(counts, 40, 140, exact=True)
    same_bits(op, *operands)


def masked(counts: list[int], each: int, n: int, k: int, **attributes: Any) -> tuple[Op, tuple[Any, ...]]:
    """A product in which every group has `each` rows of its own; those past its count are no numbers, and are never read."""
    x, w = normal(F8, len(counts), each, k), normal(F8, len(counts), n, k)
    sx, sw = scales(len(counts), each, -(-k // 128)), scales(len(counts), -(-n // 128), -(-k // 128))
    for e, count in enumerate(counts):
        x[e, count:], sx[e, count:] = np.nan, np.nan
    operands = (x, sx, w, sw, np.array(counts, np.int32))
    return GroupedScaledMatmul(*operands_of(*operands), **attributes), operands


@pytest.mark.parametrize(("counts", "each"), [([70, 0, 1, 64, 65], 70), ([0, 0], 5), ([3], 200), ([1, 0], 1)], ids=str)
def test_scaled_rows_of_groups_that_have_their_own(counts: list[int], each: int) -> None:
    """Within the bound, 0 past each count, and to the bit what the same rows give one after another."""
    for formula, n, k in (("deepgemm", 130, 200), ("cublas", 9, 128)):
        op, operands = masked(counts, each, n, k, accumulation=Accumulation("float32", formula=formula))  # type: ignore[arg-type]
        assert agrees(op, operands)
        found = TRITON.evaluate(op, operands)[0]
        kept = np.arange(each) < operands[-1][:, None]
        assert not widen(found)[~kept].any()
        rows = (operands[0][kept], operands[1][kept], *operands[2:])
        joined = GroupedScaledMatmul(*operands_of(*rows), accumulation=op.accumulation)
        assert same_array(found[kept], TRITON.evaluate(joined, rows)[0])


def test_the_bound_notices_a_row_too_few_of_a_group() -> None:
    op, operands = masked([70, 0, 3], 70, 130, 200)
    assert agrees(op, operands)
    assert not agrees(op, operands, (*operands[:-1], operands[-1] - np.array([1, 0, 0], np.int32)))


def wgrad(counts: list[int], m: int, n: int, rule: str = "deepgemm", tile: int = 128, x: Any = None) -> tuple[Op, tuple[Any, ...]]:
    """The FP8 weight gradient of operands that the reference quantised, tiles restarting at each group."""
    rows = sum(counts)
    groups, parts = np.array(counts, np.int32), []
    for array in (normal(BF16, rows, m) if x is None else x, normal(BF16, rows, n + 1)[:, :n]):
        array = np.ascontiguousarray(array)
        quantize = Quantize(*operands_of(array, groups), tile=(tile, 1), rule=RULES[rule])
        parts += NUMPY.evaluate(quantize, (array, groups))
    accumulation = Accumulation("float32")
    op = GroupedScaledMatmulWgrad(*operands_of(*parts, groups), a_tile=(tile, 1), b_tile=(tile, 1), accumulation=accumulation)
    return op, (*parts, groups)


@pytest.mark.parametrize("counts", [[130, 0, 1, 128], [0, 0, 259, 0], [7], [0, 0]], ids=str)
def test_scaled_weight_gradient_of_each_group(counts: list[int]) -> None:
    for m, n, tile in ((5, 9, 128), (65, 129, 128), (6, 64, 32)):
        op, operands = wgrad(counts, m, n, tile=tile)
        assert agrees(op, operands)
        assert not TRITON.evaluate(op, operands)[0][np.array(counts) == 0].any()


@pytest.mark.parametrize(
    ("tiles", "formula"),
    [
        (((128, 1), (128, 1)), "deepgemm"),
        (((128, 128), (128, 1)), "cublas"),
        (((128, 1), (128, 128)), "cublas"),
        (((128, 4), (128, 64)), "unfused"),
    ],
)
def test_scaled_weight_gradient_of_small_integers_is_exact(tiles: Any, formula: Any) -> None:
    """With spare rows, whose codes and scales are never read."""
    counts = np.array([129, 0, 20, 64], np.int32)
    a, b = integers(F8, 250, 9), integers(F8, 250, 140)
    sa, sb = (scales(*scale_shape(x.shape, tile, len(counts)), whole=True) for x, tile in zip((a, b), tiles, strict=True))
    a[213:], b[213:], sa[4:], sb[4:] = np.nan, np.nan, np.nan, np.nan
    operands = (a, sa, b, sb, counts)
    attributes = {"a_tile": tiles[0], "b_tile": tiles[1], "accumulation": Accumulation("float32", formula=formula)}
    same_bits(GroupedScaledMatmulWgrad(*operands_of(*operands), **attributes), *operands)


@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_dense_weight_gradient_is_a_scaled_matmul(tokens: int) -> None:
    """Both operands in tiles of 128 tokens, turned to be K-major, float32 out (DeepSeek-V3 report, section 3.3.2); one group alike."""
    op, (a, sa, b, sb, counts) = wgrad([tokens], 70, 130)
    used = -(-tokens // 128)
    turned = tuple(np.ascontiguousarray(x.T) for x in (a, sa[:used], b, sb[:used]))
    dense = ScaledMatmul(*operands_of(*turned), b_tile=(1, 128), accumulation=Accumulation("float32"), out=F32)
    assert agrees(dense, turned)
    assert agrees(op, (a, sa, b, sb, counts))


PLAIN = [(BF16, normal), (DType.f16, integers), (F32, normal)]


@every_grouping
@pytest.mark.parametrize("transpose_b", [False, True])
def test_rows_times_the_matrix_of_their_group(counts: list[int], transpose_b: bool) -> None:
    for (dtype, draw), (n, k) in zip(PLAIN, ((130, 72), (40, 65), (8, 40)), strict=True):
        shape = (n, k) if transpose_b else (k, n)
        operands = (draw(dtype, ROWS, k), draw(dtype, len(counts), *shape), np.array(counts, np.int32))
        op = GroupedMatmul(*operands_of(*operands), transpose_b=transpose_b)
        if draw is integers:
            same_bits(op, *operands)
        else:
            assert agrees(op, operands)


@every_grouping
def test_weight_gradient_of_each_group(counts: list[int]) -> None:
    for (dtype, draw), (m, n) in zip(PLAIN, ((72, 129), (40, 65), (8, 40)), strict=True):
        operands = (draw(dtype, ROWS, m), draw(dtype, ROWS, n), np.array(counts, np.int32))
        op = GroupedMatmulWgrad(*operands_of(*operands), out=BF16 if draw is integers else F32)
        if draw is integers:
            same_bits(op, *operands)
        else:
            assert agrees(op, operands)


def test_large_tiles() -> None:
    """Those that many long groups get on Hopper, where tiny shapes do not."""
    counts = np.array([400, 199], np.int32)
    x, w = integers(F8, 600, 48), integers(F8, 2, 1500, 48)
    operands = (x, scales(600, 1, whole=True), w, scales(2, 12, 1, whole=True), counts)
    op = GroupedScaledMatmul(*operands_of(*operands))
    assert plan_of(op).launches[0].constants["BLOCK_M"] == 128
    same_bits(op, *operands)
    plain = (integers(BF16, 600, 32), integers(BF16, 2, 32, 3000), counts)
    other = GroupedMatmul(*operands_of(*plain))
    assert (plan_of(other).launches[0].constants["BLOCK_M"], plan_of(other).launches[0].constants["BLOCK_N"]) == (128, 256)
    same_bits(other, *plain)


def test_nan_stays_where_it_belongs() -> None:
    """In its row; in the columns of its group; nowhere, where its group has no rows or its row no group."""
    counts = [70, 0, 60]
    op, (x, sx, w, sw, groups) = scaled(counts, 130, 200, out=F32)
    x[5, 150], x[140], w[1], w[2, 7, 3] = np.nan, np.nan, np.nan, np.nan
    expected = np.zeros((ROWS, 130), bool)
    expected[5], expected[70:130, 7] = True, True
    np.testing.assert_array_equal(np.isnan(TRITON.evaluate(op, (x, sx, w, sw, groups))[0]), expected)
    dequantised = (widen(x).astype(np.float32), widen(w).astype(np.float32), groups)
    plain = GroupedMatmul(*operands_of(*dequantised), transpose_b=True)
    np.testing.assert_array_equal(np.isnan(TRITON.evaluate(plain, dequantised)[0]), expected)


def test_nan_of_a_row_reaches_the_gradient_of_its_group_only() -> None:
    counts = [130, 0, 60]
    op, (a, sa, b, sb, groups) = wgrad(counts, 10, 20)
    a[129, 4], b[130, 6] = np.nan, np.nan
    expected = np.zeros((3, 10, 20), bool)
    expected[0, 4], expected[2, :, 6] = True, True
    np.testing.assert_array_equal(np.isnan(TRITON.evaluate(op, (a, sa, b, sb, groups))[0]), expected)
    plain = (widen(a).astype(np.float32), widen(b).astype(np.float32), groups)
    np.testing.assert_array_equal(np.isnan(TRITON.evaluate(GroupedMatmulWgrad(*operands_of(*plain)), plain)[0]), expected)


@pytest.mark.parametrize("rule", ["deepgemm", "transformer-engine"])
def test_zero_tiles_and_the_edge_of_the_format(rule: str) -> None:
    """Zeros, the largest code and the tie below it, an outlier, magnitudes over 2^40, gradients near 1e-9; as they are quantised."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((190, 70)) * np.exp2(rng.integers(-20, 20, (1, 70)))
    x[:130, 0], x[:, 1], x[:, 2], x[5, 3], x[:, 4] = 0, -0.0, np.where(np.arange(190) % 2, 448.0, 432.0), 3e30, 1e-9 * x[:, 4]
    assert agrees(*wgrad([130, 0, 60], 70, 20, rule, x=rounded(x, BF16)))
    rows = np.ascontiguousarray(rounded(x, BF16).T)
    codes, row_scales = NUMPY.evaluate(Quantize(*operands_of(rows), rule=RULES[rule]), (rows,))
    operands = (codes, row_scales, normal(F8, 3, 40, 190), scales(3, 1, 2), np.array([1, 0, 69], np.int32))
    assert agrees(GroupedScaledMatmul(*operands_of(*operands), out=F32), operands)


def test_the_bound_notices_faults() -> None:
    """Scales of another group, of another tile or transposed, a row that moved to the next group, and a last element that was not added."""
    op, (x, sx, w, sw, counts) = scaled(COUNTS["uneven"], 130, 140, out=F32)
    assert agrees(op, (x, sx, w, sw, counts))
    moved, cut = np.array([69, 1, 1, 64, 15], np.int32), x.copy()
    cut[:, -1] = 0
    faults = [(x, sx, w, np.roll(sw, 1, axis), counts) for axis in range(3)]
    faults += [(x, np.roll(sx, 1, axis), w, sw, counts) for axis in range(2)]
    faults += [(x, sx, w, sw, moved), (cut, sx, w, sw, counts)]
    assert [agrees(op, (x, sx, w, sw, counts), fault) for fault in faults] == [False] * 7
    gradient, (a, sa, b, sb, groups) = wgrad([130, 0, 1, 128], 5, 9)
    cut = a.copy()
    cut[-1] = 0
    others = [(a, np.roll(sa, 1, 0), b, sb, groups), (a, sa, b, np.roll(sb, 1, 1), groups), (cut, sa, b, sb, groups)]
    assert [agrees(gradient, (a, sa, b, sb, groups), fault) for fault in others] == [False] * 3


def test_counts_beyond_the_rows_touch_no_other_memory() -> None:
    """Nobody on the host reads the counts, so none are refused: they are cut to the rows."""
    op, (x, sx, w, sw, _) = scaled([0] * 3, 40, 128, out=F32)
    for wrong, cut in (([100, 100, 7], [100, 50, 0]), ([-5, 10, 2**31 - 1], [0, 10, 140])):
        (found,), (expected,) = (TRITON.evaluate(op, (x, sx, w, sw, np.array(c, np.int32))) for c in (wrong, cut))
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(0, 200))
def test_there_are_programs_for_every_tile(counts: list[int], spare: int) -> None:
    """The grid depends on no count, and suffices for all: of a group's tiles all but the last are full."""
    rows, groups = sum(counts) + spare, len(counts)
    for op in (
        GroupedScaledMatmul(*(Value(Tensor(d, s), "x") for d, s in (
            (F8, (rows, 256)), (F32, (rows, 2)), (F8, (groups, 40, 256)), (F32, (groups, 1, 2)), (DType.i32, (groups,))))),
        GroupedMatmul(*(Value(Tensor(d, s), "x") for d, s in ((BF16, (rows, 256)), (BF16, (groups, 256, 40)), (DType.i32, (groups,))))),
    ):  # fmt: skip
        slots = [registry.Slot("operand", i, v.dtype, v.shape, ()) for i, v in enumerate(op.operands)]
        made = registry.Slot("result", 0, op.result.dtype, op.result.shape, ())
        for target in TARGETS.values():
            launches = registry.plan(op, target, tuple(slots), (made,))
            assert not isinstance(launches, registry.Declined)
            height = launches[0].constants["BLOCK_M"] if launches else 1
            needed = sum(-(-count // height) for count in (*counts, spare))
            assert needed <= (launches[0].arguments["row_tiles"] if launches else 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"accumulation": Accumulation("exact")}, "exact accumulation"),
        ({"accumulation": Accumulation(interval=0)}, "promotion every 0 elements of K, expected every 128"),
    ],
)
def test_what_the_kernels_decline_still_runs(change: dict[str, Any], reason: str) -> None:
    for op, operands in (scaled([70, 0, 60], 9, 130), wgrad([130, 0, 60], 5, 6)):
        changed = op.copy(**change)
        assert plan_of(changed).how == "torch"
        assert reason in plan_of(changed).declined
        found, expected = TRITON.evaluate(changed, operands)[0], NUMPY.evaluate(changed, operands)[0]
        np.testing.assert_allclose(widen(found), widen(expected), rtol=1e-2, atol=1e-2 * np.abs(widen(expected)).max())
