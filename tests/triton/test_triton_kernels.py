"""The kernels against numpy_ref: bit for bit where the math is exact, else within a derived bound; on nasty values and odd sizes."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dsc import backends
from dsc.backends.arrays import STORAGE, rounded, widen
from dsc.backends.triton import kernels, registry
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.run import Executor, machine
from dsc.backends.triton.targets import TARGETS
from dsc.ir.core import Func, Module, Op, Value
from dsc.ir.ops.elementwise import Relu, SwiGLU
from dsc.ir.ops.norm import RmsNorm
from dsc.ir.ops.quant import Dequantize, Quantize, ScaledMatmul, scale_shape
from dsc.ir.quantization import RULES, Accumulation
from dsc.ir.types import DType, Tensor

TRITON, NUMPY = Executor(poison=True), backends.get("numpy")


def value(dtype: DType, *shape: int) -> Value:
    return Value(Tensor(dtype, shape), "x")


def normal(dtype: DType, *shape: int, seed: int = 0) -> np.ndarray:
    return rounded(np.random.default_rng(seed).standard_normal(shape), dtype)


def how(op: Op) -> tuple[str, str]:
    """Whether a kernel runs the op, and why not."""
    func = Func("f", tuple(dict.fromkeys(op.operands)), (op,), op.results)
    plan = plan_function(Module((func,)), func, [layout_of(p.type) for p in func.params], machine()[0], {})
    return plan.steps[0].how, plan.steps[0].declined


def same_bits(op: Op, *operands: np.ndarray) -> None:
    assert how(op) == ("kernel", "")
    for found, expected in zip(TRITON.evaluate(op, operands), NUMPY.evaluate(op, operands), strict=True):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        bits = f"u{found.dtype.itemsize}"
        differ = found.view(bits) != expected.view(bits)
        if found.dtype.itemsize > 1:
            differ &= ~(np.isnan(widen(found)) & np.isnan(widen(expected)))
        assert not differ.any(), (np.argwhere(differ)[0], found[differ][:4], expected[differ][:4])


def nasty(rows: int, columns: int, dtype: DType, seed: int = 1) -> np.ndarray:
    """Zero rows, magnitudes over 2^-30 to 2^30, ties at the edge of the format, an outlier, an infinity, NaN, subnormals."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-30, 30, (rows, 1)))
    x[0] = 0
    x[1] = -0.0
    x[2] = np.where(np.arange(columns) % 2, 448.0, 432.0)
    x[3, 0] = 3e30
    x[4, -1] = np.inf
    x[5, columns // 2] = np.nan
    x[6] *= 1e-40
    return rounded(x, dtype)


TILES = [(1, 128), (128, 1), (128, 128), (3, 5)]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rule", RULES)
def test_quantise_is_the_reference_to_the_bit(rule: str, tile: tuple[int, int]) -> None:
    dtype = DType.bf16 if tile[0] == 1 else DType.f32
    for codes in (DType.f8e4m3, DType.f8e5m2):
        same_bits(Quantize(value(dtype, 130, 193), tile=tile, dtype=codes, rule=RULES[rule]), nasty(130, 193, dtype))


@pytest.mark.parametrize("shape", [(1, 1), (1, 128), (129, 7), (2, 3, 5), (2, 2, 130, 131), (0, 128)])
@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128)])
def test_quantise_any_shape_to_e5m6_and_fp8(shape: tuple[int, ...], tile: tuple[int, int]) -> None:
    for codes in (DType.e5m6, DType.f8e4m3):
        op = Quantize(value(DType.bf16, *shape), tile=tile, dtype=codes, rule=RULES["tilekernels"])
        if shape[0]:
            same_bits(op, normal(DType.bf16, *shape))
        assert [r.shape for r in TRITON.evaluate(op, [normal(DType.bf16, *shape)])] == [v.shape for v in op.results]


@pytest.mark.parametrize("counts", [[130, 0, 1, 69], [0, 0, 200, 0], [200], [50] * 4])
def test_tiles_restart_at_each_group(counts: list[int]) -> None:
    x, groups = normal(DType.bf16, 200, 70), np.array(counts, np.int32)
    quantize = Quantize(value(DType.bf16, 200, 70), value(DType.i32, len(counts)), tile=(128, 1))
    same_bits(quantize, x, groups)
    codes, scales = NUMPY.evaluate(quantize, [x, groups])
    operands = (value(DType.f8e4m3, *codes.shape), value(DType.f32, *scales.shape), value(DType.i32, len(counts)))
    same_bits(Dequantize(*operands, tile=(128, 1)), codes, scales, groups)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("out", [DType.bf16, DType.f32, DType.f16])
def test_dequantise_every_code(tile: tuple[int, int], out: DType) -> None:
    codes = np.resize(np.arange(256, dtype=np.uint8), (130, 193)).view(STORAGE[DType.f8e4m3])
    scales = normal(DType.f32, *scale_shape((130, 193), tile)) * np.float32(1e3)
    same_bits(Dequantize(value(DType.f8e4m3, 130, 193), value(DType.f32, *scales.shape), tile=tile, dtype=out), codes, scales)


def within_bound(op: Op, bound: np.ndarray, *operands: np.ndarray) -> None:
    """A result and the reference, both within `bound` of the exact one, differ by twice that, and by one rounding of either."""
    (found,), (expected,) = TRITON.evaluate(op, operands), NUMPY.evaluate(op, operands)
    low, high = (widen(rounded(widen(expected, np.float64) + side * 2 * bound, op.result.dtype), np.float64) for side in (-1, 1))
    step = np.abs(widen(expected, np.float64)) * 2.0**-7 if op.result.dtype is DType.bf16 else 0.0
    y = widen(found, np.float64)
    assert ((y >= low - step) & (y <= high + step)).all(), np.abs(y - widen(expected, np.float64)).max()


def matmul_op(m: int, n: int, k: int, b_rows: int, formula: Any, out: DType = DType.f32) -> tuple[Op, tuple[np.ndarray, ...]]:
    """A product whose neighbouring scales differ by up to 2^8: a transposed or shifted grid of scales would show."""
    rng = np.random.default_rng([m, n, k])
    a, b = (rounded(rng.standard_normal(s) * 100, DType.f8e4m3) for s in ((m, k), (n, k)))
    sa, sb = (np.exp2(rng.uniform(-4, 4, scale_shape(c.shape, t))).astype(np.float32) for c, t in ((a, (1, 128)), (b, (b_rows, 128))))
    types = [value(DType.f8e4m3, m, k), value(DType.f32, *sa.shape), value(DType.f8e4m3, n, k), value(DType.f32, *sb.shape)]
    accumulation = Accumulation("float32", formula=formula)
    return ScaledMatmul(*types, b_tile=(b_rows, 128), accumulation=accumulation, out=out), (a, sa, b, sb)


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 128, 128), (65, 129, 127), (3, 576, 300), (130, 40, 513)])
@pytest.mark.parametrize("b_rows", [128, 1])
@pytest.mark.parametrize("formula", ["deepgemm", "cublas", "unfused"])
def test_scaled_matmul_of_any_size(shape: tuple[int, int, int], b_rows: int, formula: str) -> None:
    """Higham 3.13: each side dequantises (2 roundings), multiplies and adds k terms, or adds 128 and promotes: gamma(k + 4) |a| |b|."""
    op, operands = matmul_op(*shape, b_rows, formula)
    assert how(op) == ("kernel", "")
    a, b = (widen(x, np.float64) for x in operands[::2])
    sa = operands[1].astype(np.float64).repeat(128, 1)[:, : shape[2]]
    sb = operands[3].astype(np.float64).repeat(b_rows, 0)[: shape[1]].repeat(128, 1)[:, : shape[2]]
    within_bound(op, (shape[2] + 4) * 2.0**-24 * (np.abs(a * sa) @ np.abs(b * sb).T), *operands)


def test_scaled_matmul_of_small_integers_is_exact() -> None:
    """Where every partial sum is a small integer and scales are powers of two, any order gives the same bits."""
    rng = np.random.default_rng(3)
    a, b = (rounded(rng.integers(-8, 9, s).astype(np.float64), DType.f8e4m3) for s in ((70, 384), (130, 384)))
    sa, sb = (np.exp2(rng.integers(-3, 4, s)).astype(np.float32) for s in ((70, 3), (2, 3)))
    types = [value(DType.f8e4m3, 70, 384), value(DType.f32, 70, 3), value(DType.f8e4m3, 130, 384), value(DType.f32, 2, 3)]
    for out in (DType.f32, DType.bf16):
        same_bits(ScaledMatmul(*types, out=out), a, sa, b, sb)


def test_nan_in_an_operand_reaches_its_row_only() -> None:
    op, (a, sa, b, sb) = matmul_op(70, 130, 200, 128, "deepgemm")
    a[5, 150] = np.nan
    found = TRITON.evaluate(op, (a, sa, b, sb))[0]
    assert np.isnan(found[5]).all()
    assert np.isfinite(np.delete(found, 5, 0)).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"accumulation": Accumulation("exact")}, "exact accumulation"),
        ({"accumulation": Accumulation(interval=0)}, "promotion every 0"),
    ],
)
def test_what_the_kernel_declines_still_runs(change: dict[str, Any], reason: str) -> None:
    op, operands = matmul_op(5, 6, 256, 128, "deepgemm")
    op = op.copy(**change)
    assert how(op)[0] == "torch"
    assert reason in how(op)[1]
    np.testing.assert_allclose(TRITON.evaluate(op, operands)[0], NUMPY.evaluate(op, operands)[0], rtol=1e-2, atol=1.0)


@pytest.mark.parametrize("dtype", [DType.f32, DType.bf16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7168), (2, 5, 576), (1000, 3), (0, 8)])
def test_rms_norm(dtype: DType, shape: tuple[int, ...]) -> None:
    from dsc.testing.bounds import bound

    op = RmsNorm(value(dtype, *shape), value(dtype, shape[-1]), 1e-6)
    operands = (normal(dtype, *shape), normal(dtype, shape[-1], seed=2))
    assert how(op)[1] == ""
    found, expected = TRITON.evaluate(op, operands)[0], NUMPY.evaluate(op, operands)[0]
    (permitted,) = bound(op, operands, (expected,))
    assert (np.abs(widen(found, np.float64) - widen(expected, np.float64)) <= permitted).all()


@pytest.mark.parametrize("dtype", [DType.f32, DType.bf16])
@pytest.mark.parametrize("shape", [(1,), (3, 2048), (2, 5, 577)])
def test_swiglu(dtype: DType, shape: tuple[int, ...]) -> None:
    from dsc.testing.bounds import bound

    op = SwiGLU(value(dtype, *shape), value(dtype, *shape))
    operands = (normal(dtype, *shape) * STORAGE[dtype].type(30), normal(dtype, *shape, seed=2))
    assert how(op) == ("kernel", "")
    found, expected = TRITON.evaluate(op, operands)[0], NUMPY.evaluate(op, operands)[0]
    (permitted,) = bound(op, operands, (expected,))
    assert (np.abs(widen(found, np.float64) - widen(expected, np.float64)) <= permitted).all()


def test_a_second_kernel_for_an_op_is_refused() -> None:
    with pytest.raises(TypeError, match="'rms_norm' has two kernels: rms_norm and "):
        registry.kernel(RmsNorm)(lambda op, target, *slots: registry.Declined(""))


def test_launches_depend_on_nothing_but_op_layout_and_target() -> None:
    op, _ = matmul_op(130, 257, 300, 128, "deepgemm")
    slots = [registry.Slot("operand", i, v.dtype, v.shape, (v.shape[1], 1)) for i, v in enumerate(op.operands)]
    made = registry.Slot("result", 0, DType.f32, (130, 257), (257, 1))
    for target in TARGETS.values():
        assert registry.plan(op, target, tuple(slots), (made,)) == registry.plan(op, target, tuple(slots), (made,))
    assert set(kernels.KERNELS) >= {Quantize, Dequantize, ScaledMatmul, RmsNorm}


def test_float64_is_not_computed_in_float32() -> None:
    assert how(RmsNorm(value(DType.f64, 3, 8), value(DType.f64, 8), 1e-6)) == ("torch", "f64, but kernels compute in float32")
    assert how(SwiGLU(*(value(DType.f64, 3, 8) for _ in range(2))))[0] == "torch"


def test_the_kernel_of_the_guide_is_right(tmp_path: Path) -> None:
    """docs/adding_a_kernel.md, as it stands there."""
    guide = (Path(__file__).parents[2] / "docs" / "adding_a_kernel.md").read_text(encoding="utf-8")
    file = tmp_path / "relu.py"
    file.write_text(guide.split("```python\n")[1].split("```")[0], encoding="utf-8")
    spec = spec_from_file_location(f"{kernels.__name__}.relu_of_the_guide", file)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module_from_spec(spec))
    try:
        for dtype in (DType.f32, DType.bf16, DType.f8e4m3):
            same_bits(Relu(value(dtype, 130, 193)), nasty(130, 193, dtype))
    finally:
        del kernels.KERNELS[Relu]
