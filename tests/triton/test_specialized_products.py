"""The block-scaled products that Hopper runs specialised, in the interpreter: tiles of 128 x 128 walked by fewer programs than tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dsc import backends
from dsc.backends.arrays import rounded, widen
from dsc.backends.triton import run, tiles
from dsc.backends.triton.kernels import grouped_scaled_matmul, scaled_matmul
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.run import Executor
from dsc.backends.triton.targets import TARGETS
from dsc.ir.core import Func, Module, Op, Value
from dsc.ir.ops.quant import GroupedScaledMatmul, ScaledMatmul
from dsc.ir.quantization import Accumulation
from dsc.ir.types import DType, Tensor
from dsc.testing.bounds import bound

TRITON, NUMPY = Executor(poison=True), backends.get("numpy")
F8, F32, BF16 = DType.f8e4m3, DType.f32, DType.bf16
TILE = tiles.Gemm(128, 128, 128, 4, 4, specialized=True)


@pytest.fixture(autouse=True)
def _two_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two units, and the specialised tile at any size."""
    monkeypatch.setattr(run, "machine", lambda: (replace(TARGETS["sm_90"], units=2), run.torch.device("cpu")))
    for module in (scaled_matmul, grouped_scaled_matmul):
        monkeypatch.setattr(module, "scaled_gemm", lambda *args, **kwargs: TILE)


def codes(*shape: int, whole: bool) -> np.ndarray:
    rng = np.random.default_rng(shape)
    return rounded(rng.integers(-8, 9, shape).astype(float) if whole else rng.standard_normal(shape) * 100, F8)


def scales(*shape: int, whole: bool) -> np.ndarray:
    """Of `whole` operands sums then need 23 bits: 2^13 of one step, four steps, 2^8 between the largest and the least scale."""
    exponents = np.random.default_rng(shape).uniform(-2 if whole else -4, 2 if whole else 4, shape)
    return np.exp2(np.round(exponents) if whole else exponents).astype(np.float32)


def values(*arrays: np.ndarray) -> list[Value]:
    names = {"float8_e4m3fn": F8, "float32": F32, "int32": DType.i32}
    return [Value(Tensor(names[a.dtype.name], a.shape), f"x{i}") for i, a in enumerate(arrays)]


def tiles_of(n: int) -> int:
    return -(-n // 128)


def dense(m: int, n: int, k: int, whole: bool, **attributes: Any) -> tuple[Op, tuple[np.ndarray, ...]]:
    operands = (
        codes(m, k, whole=whole),
        scales(m, tiles_of(k), whole=whole),
        codes(n, k, whole=whole),
        scales(tiles_of(n), tiles_of(k), whole=whole),
    )
    return ScaledMatmul(*values(*operands), **attributes), operands


def grouped(counts: list[int], n: int, k: int, whole: bool, rows: int = 200, **attributes: Any) -> tuple[Op, tuple[np.ndarray, ...]]:
    groups = len(counts)
    operands = (
        codes(rows, k, whole=whole),
        scales(rows, tiles_of(k), whole=whole),
        codes(groups, n, k, whole=whole),
        scales(groups, tiles_of(n), tiles_of(k), whole=whole),
        np.array(counts, np.int32),
    )
    return GroupedScaledMatmul(*values(*operands), **attributes), operands


def kernels_of(op: Op) -> list[str]:
    func = Func("f", tuple(op.operands), (op,), op.results)
    step = plan_function(Module((func,)), func, [layout_of(p.type) for p in func.params], run.machine()[0], {}).steps[0]
    return [launch.kernel.fn.__name__ for launch in step.launches]


def check(op: Op, operands: tuple[np.ndarray, ...], exact: bool) -> None:
    assert kernels_of(op)[-1].endswith("_specialized_kernel")
    (found,), (expected,) = TRITON.evaluate(op, operands), NUMPY.evaluate(op, operands)
    (permitted,) = bound(op, operands, (expected,))
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert (np.abs(widen(found, np.float64) - widen(expected, np.float64)) <= (0 if exact else permitted)).all()


@pytest.mark.parametrize(
    ("shape", "formula"), [((260, 140, 400), "deepgemm"), ((1, 576, 144), "cublas"), ((128, 128, 128), "unfused")], ids=str
)
def test_dense(shape: tuple[int, int, int], formula: Any) -> None:
    """Edges in every dimension; as exact as the reference where sums are small integers."""
    for whole in (True, False):
        accumulation = Accumulation("float32", formula=formula)
        check(*dense(*shape, whole, accumulation=accumulation, out=F32 if whole else BF16), exact=whole)


@pytest.mark.parametrize("counts", [[70, 0, 110, 1, 15], [0, 200, 0], [0, 0], [200], [0, 129, 71, 0]])
def test_grouped(counts: list[int]) -> None:
    """Groups without rows, one with all of them, rows that no group has."""
    for whole in (True, False):
        check(*grouped(counts, 130, 272, whole, out=F32), exact=whole)


def test_a_wrong_row_is_noticed() -> None:
    """The control: with one scale taken for its neighbour the comparison fails."""
    op, operands = dense(130, 128, 256, True, out=F32)
    swapped = operands[1].copy()
    swapped[[128, 129]] = swapped[[129, 128]]
    (found,), (expected,) = TRITON.evaluate(op, (operands[0], swapped, *operands[2:])), NUMPY.evaluate(op, operands)
    assert (found[:128] == expected[:128]).all()
    assert (found[128] != expected[128]).any()


def test_it_is_chosen_for_large_products_on_hopper_alone() -> None:
    gemm = tiles.scaled_gemm
    hopper = TARGETS["sm_90"]
    assert gemm(4096, 4096, 7168, 128, hopper, scale_rows=128, specialize=True) == TILE
    assert gemm(8192, 7168, 2048, 128, hopper, scale_rows=128, groups=4, specialize=True) == TILE
    for m, k, step, scale_rows, target in [
        (64, 7168, 128, 128, hopper),  # too few rows to fill the machine
        (4096, 7160, 128, 128, hopper),  # rows that no descriptor takes
        (4096, 7168, 64, 128, hopper),  # steps below 128
        (4096, 7168, 128, 1, hopper),  # a scale for each column
        (4096, 7168, 128, 192, hopper),  # two scales in one tile
        (4096, 7168, 128, 128, TARGETS["sm_100"]),
    ]:
        assert not gemm(m, 4096, k, step, target, scale_rows=scale_rows, specialize=True).specialized
    assert not gemm(4096, 4096, 7168, 128, hopper, scale_rows=128).specialized
