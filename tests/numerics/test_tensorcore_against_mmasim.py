"""The accumulator against the public simulator mmasim, bit for bit, and canaries whose expected bits were taken from it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from dsc.hardware.device import accumulation
from dsc.ir.quantization import Accumulation
from dsc.numerics.tensorcore import fused_dot_add

NUMPY = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
MODELS = ["h800/wgmma", "rtx4090/mma-sync", "b200/tcgen05", "h800/mma-sync"]
ANY_C = ("any bits", "wide C", "no products")
PATTERNS = ["any bits", "finite", "sparse", "subnormal", "positive", "wide C", "no products"]


@pytest.fixture(scope="module")
def simulator() -> ModuleType:
    """mmasim without its FMA module, which it would compile with ninja and a C++ compiler and needs for float64 only."""
    stub = ModuleType("mmasim.arithmetic.fma")
    stub.MMA_FMA = object  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, stub.__name__, stub)
        pytest.importorskip("mmasim", reason="the public simulator mmasim is not installed")
        import mmasim.arithmetic

        patch.setattr(mmasim.arithmetic, "fma", stub, raising=False)
        return pytest.importorskip("mmasim.nv_ptx")


def instruction(simulator: ModuleType, model: str, a: str, b: str) -> Any:
    if model == "h800/wgmma":
        return simulator.WGMMA("Hopper", f"m64n64k32.f32.{a}.{b}")
    if model == "rtx4090/mma-sync":
        return simulator.MMA("Ada Lovelace", f"m16n8k32.f32.{a}.{b}.f32")
    if model == "b200/tcgen05":
        return simulator.TCGen05MMA("Blackwell", f"m64n64k32.kind::f8f6f4.f32.{a}.{b}")
    return simulator.MMA("Hopper", "m16n8k16.f32.f16.f16.f32")


def simulate(simulator: ModuleType, model: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, types: tuple[str, str]) -> np.ndarray:
    """32 products by the simulator. Hopper's mma.sync knows no FP8: the operands are widened to float16 and go in 16 at a time."""
    left, right = (torch.from_numpy(codes).view(TORCH[t]) for codes, t in zip((a, b), types, strict=True))
    operation, out = instruction(simulator, model, *types), torch.from_numpy(c.copy())
    if model != "h800/mma-sync":
        return operation(left, right.T, out).numpy()
    for k in (slice(0, 16), slice(16, 32)):
        out = operation(left[:, k].half(), right[:, k].half().T, out)
    return out.numpy()


def ours(model: Accumulation, a: np.ndarray, b: np.ndarray, c: np.ndarray, types: tuple[str, str]) -> np.ndarray:
    for k in range(0, a.shape[1], model.products):
        nodes = slice(k, k + model.products)
        c = fused_dot_add(a[:, nodes].view(NUMPY[types[0]]), b[:, nodes].view(NUMPY[types[1]]), c, model)
    return c


def operands(pattern: str, shape: tuple[int, int], fmt: str, rng: np.random.Generator) -> np.ndarray:
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    if pattern != "any bits":
        values = codes.view(NUMPY[fmt]).astype(np.float32)
        codes[~np.isfinite(values)] = 0x3A
    if pattern == "sparse":
        codes[rng.random(shape) < 0.9] &= 0x80
    if pattern == "subnormal":
        codes[rng.random(shape) < 0.8] &= 0x87 if fmt == "e4m3" else 0x83
    if pattern == "positive":
        codes &= 0x7F
    if pattern == "no products":
        codes &= 0x80
    return codes


def accumulators(pattern: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    if pattern in ANY_C:
        return rng.integers(0, 2**32, shape, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = rng.standard_normal(shape) * np.exp2(rng.uniform(-20, 20, shape))
    return np.where(rng.random(shape) < 0.2, 0, near).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("types", [("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3"), ("e5m2", "e5m2")], ids="-".join)
def test_bits_equal_the_simulators(simulator: ModuleType, model: str, types: tuple[str, str]) -> None:
    """86,016 outputs of 32 products per case, 1,376,256 in all: every kind of value, arbitrary accumulators, and chains of four."""
    rng = np.random.default_rng([MODELS.index(model), types[0] == "e4m3", types[1] == "e4m3"])
    specials = 0
    for pattern in PATTERNS:
        c = accumulators(pattern, (64, 48), rng)
        for _ in range(4):
            a, b = operands(pattern, (64, 32), types[0], rng), operands(pattern, (48, 32), types[1], rng)
            expected = simulate(simulator, model, a, b, c, types)
            got = ours(accumulation(model), a, b, c, types)
            assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), pattern
            specials += int((~np.isfinite(expected)).sum())
            c = accumulators(pattern, (64, 48), rng) if pattern in ANY_C else expected
    assert specials > 1000


def lanes(*products: tuple[float, float], fmt: str = "e4m3") -> tuple[np.ndarray, np.ndarray]:
    """32 lanes, those not named zero, as codes [1, 32]."""
    values = np.zeros((2, 32), np.float32)
    for i, product in enumerate(products):
        values[:, i] = product
    return values[:1].astype(NUMPY[fmt]).view(np.uint8), values[1:].astype(NUMPY[fmt]).view(np.uint8)


ZERO, INF, NAN = (0.0, 0.0), float("inf"), float("nan")
Canary = tuple[str, str, list[tuple[float, float]], float, tuple[int, int, int, int]]

# name, format, products, C, bits on (Hopper WGMMA, Ada, Blackwell, Hopper mma.sync), from mmasim 2.1.1
CANARIES: list[Canary] = [
    ("just below the quantum", "e4m3", [(256, 256)] + 31 * [(7.5, 1)], 0, (0x47800000, 0x47800000, 0x47807440, 0x47807440)),
    ("at the quantum", "e4m3", [(256, 256)] + 31 * [(8, 1)], 0, (0x47807C00, 0x47807C00, 0x47807C00, 0x47807C00)),
    ("C aligns, at the quantum", "e4m3", [(0.5, 1)], 4096, (0x45800400, 0x45800400, 0x45800400, 0x45800400)),
    ("C aligns, below the quantum", "e4m3", [(0.25, 1)], 4096, (0x45800000, 0x45800000, 0x45800200, 0x45800200)),
    ("truncation, not floor", "e4m3", [(-0.25, 1)], 4096, (0x45800000, 0x45800000, 0x457FFC00, 0x457FFC00)),
    ("a spread that fits", "e4m3", [(448, 1), (7.5, 1)], 0, (0x43E3C000, 0x43E3C000, 0x43E3C000, 0x43E3C000)),
    ("small addends vanish one by one", "e4m3", 31 * [(1, 1)], 65536, (0x47800000, 0x47800000, 0x47800F80, 0x47800F80)),
    (
        "32 in a node or twice 16",
        "e4m3",
        [(256, 256), (-256, 256), *14 * [ZERO], (1, 1)],
        0,
        (0x00000000, 0x3F800000, 0x3F800000, 0x3F800000),
    ),
    ("a carry cuts the result", "e4m3", [*31 * [(256, 256)], (8, 1)], 0, (0x49F80000, 0x49F80000, 0x49F80040, 0x49F80040)),
    ("no products, low bits of C", "e4m3", [], 1 + 0xFFF * 2.0**-23, (0x3F800C00, 0x3F800C00, 0x3F800FFF, 0x3F800FFF)),
    ("no products, subnormal C", "e4m3", [(0, 448)], 1e-38, (0x006CE000, 0x006CE000, 0x006CE3EE, 0x006CE3EE)),
    ("no products, -0", "e4m3", [], -0.0, (0, 0, 0, 0)),
    ("cancellation", "e4m3", [(1, 1), (-1, 1)], 0, (0, 0, 0, 0)),
    ("subnormal operands are not normalised, 13 bits", "e4m3", [(2**-9, -256)], 0.5 + 2**-13, (0, 0, 0x39000000, 0x39000000)),
    ("subnormal operands are not normalised, 25 bits", "e4m3", [(2**-9, -256)], 0.5 + 2**-24, (0, 0, 0, 0x33800000)),
    ("NaN * 0", "e4m3", [(NAN, 0)], 1, 4 * (0x7FFFFFFF,)),
    ("C infinite", "e4m3", [(1, 1)], INF, 4 * (0x7F800000,)),
    ("C negative infinite", "e4m3", [(1, 1)], -INF, 4 * (0xFF800000,)),
    ("infinity * 0", "e5m2", [(INF, 0)], 1, 4 * (0x7FFFFFFF,)),
    ("infinity - infinity", "e5m2", [(INF, 1), (-INF, 1)], 1, 4 * (0x7FFFFFFF,)),
    ("infinity", "e5m2", [(INF, 1), (-1, 1)], 1, 4 * (0x7F800000,)),
    ("no overflow", "e4m3", 32 * [(448, 448)], 3.4e38, (0x7F7FC800, 0x7F7FC800, 0x7F7FC99E, 0x7F7FC99E)),
]


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary[0].replace(" ", "-"))
def test_canary(canary: Canary) -> None:
    _, fmt, products, c, expected = canary
    a, b = lanes(*products, fmt=fmt)
    for name, bits in zip(MODELS, expected, strict=True):
        got = ours(accumulation(name), a, b, np.full((1, 1), c, np.float32), (fmt, fmt))
        assert f"{name} {int(got.view(np.uint32)[0, 0]):08x}" == f"{name} {bits:08x}"


def test_canaries_tell_the_models_apart() -> None:
    """Any two models differ on some canary, and each field of the model matters."""
    columns = list(zip(*(canary[4] for canary in CANARIES), strict=True))
    assert len(set(columns)) == 4
    hopper = accumulation("h800/wgmma")
    for change in (
        {"products": 16},
        {"fraction_bits": 14},
        {"fraction_bits": 12},
        {"result_bits": 23},
        {"result_bits": 12},
        {"operands": "f16"},
    ):
        other = Accumulation(**{**vars(hopper), **change})
        differs = [
            name for name, fmt, products, c, bits in CANARIES
            if int(ours(other, *lanes(*products, fmt=fmt), np.full((1, 1), c, np.float32), (fmt, fmt)).view(np.uint32)[0, 0]) != bits[0]
        ]  # fmt: skip
        assert differs, change


def test_canaries_are_the_simulators(simulator: ModuleType) -> None:
    for name, fmt, products, c, expected in CANARIES:
        a, b = lanes(*products, fmt=fmt)
        for model, bits in zip(MODELS, expected, strict=True):
            got = simulate(simulator, model, a, b, np.full((1, 1), c, np.float32), (fmt, fmt))
            assert int(got.view(np.uint32)[0, 0]) == bits, (name, model)
