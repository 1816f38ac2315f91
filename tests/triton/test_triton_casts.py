"""Casts on the device, bit for bit against numerics/formats.py; and what Triton's interpreter does without them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from dsc.backends.arrays import STORAGE
from dsc.backends.triton import INTERPRET
from dsc.backends.triton.arithmetic import exp, narrow, sigmoid, widen
from dsc.backends.triton.launch import bind
from dsc.backends.triton.machine_code import MachineCode
from dsc.backends.triton.registry import Launch, Slot
from dsc.backends.triton.run import machine
from dsc.backends.triton.targets import INTERPRETED
from dsc.backends.triton.tensors import from_numpy, to_numpy
from dsc.ir.types import DType, Tensor
from dsc.numerics.formats import FORMATS
from dsc.numerics.formats import round_to as reference
from dsc.numerics.formats import widen as decoded

SIZE = 1 << 14


@triton.jit
def narrow_kernel(X, Y, FORMAT: tl.constexpr, SATURATE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(Y + at, narrow(tl.load(X + at), FORMAT, SATURATE))


@triton.jit
def widen_kernel(X, Y, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(Y + at, widen(tl.load(X + at), FORMAT))


@triton.jit
def plain_cast_kernel(X, Y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(Y + at, tl.load(X + at).to(Y.dtype.element_ty))


@triton.jit
def exp_kernel(X, Y, SIGMOID: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(X + at)
    tl.store(Y + at, sigmoid(x) if SIGMOID else exp(x))


def launched(kernel, x: np.ndarray, source: DType, target: DType, grid: int = 1, as_bytes: bool = False, **constants) -> np.ndarray:
    """What an element-wise kernel makes of `x`."""
    _, device = machine()
    given = from_numpy(x, Tensor(source, x.shape), device)
    made = from_numpy(np.zeros(x.shape, STORAGE[target]), Tensor(target, x.shape), device)
    slots = [Slot(kind, 0, dtype, x.shape, (1,), as_bytes) for kind, dtype in (("operand", source), ("result", target))]
    as_float32 = [Slot(s.kind, 0, s.dtype, s.shape, s.strides) if s.dtype is DType.f32 else s for s in slots]
    launch = Launch(kernel, (grid,), dict(zip("XY", as_float32, strict=True)), {**constants, "SIZE": x.size // grid})
    bind(launch, lambda slot: given if slot.kind == "operand" else made, INTERPRETED, "cast", MachineCode().load)()
    return to_numpy(made, Tensor(target, x.shape))


def adversarial(fmt_name: str) -> np.ndarray:
    """Every number of the format, the midpoints between neighbours, one float32 to either side, both signs; extremes; random patterns."""
    fmt = FORMATS[fmt_name]
    bits = np.arange(1 << 16, dtype=np.uint16)
    if fmt_name in ("f8e4m3", "f8e5m2"):
        values = np.arange(256, dtype=np.uint8).view(fmt.dtype).astype(np.float32)
    else:
        values = bits[:: 1 if fmt_name == "e5m6" else 16].view(np.float16 if fmt_name in ("f16", "e5m6") else ml_dtypes.bfloat16)
        values = values.astype(np.float32)
    finite = np.unique(np.abs(values[np.isfinite(values)]))
    edges = np.concatenate([finite, (finite[1:] / 2 + finite[:-1] / 2), [448, 464, 465, 480, 57344, 61439, 61440, 65024, 65520, 3e38]])
    edges = edges.astype(np.float32)
    near = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(0))])
    random = np.random.default_rng(0).integers(0, 1 << 32, SIZE, dtype=np.uint64).astype(np.uint32).view(np.float32)
    special = np.array([0, np.inf, np.nan, 1e-45, 1e-38], np.float32)
    x = np.concatenate([near, -near, random, special, -special]).astype(np.float32)
    return np.concatenate([x, np.zeros(-x.size % SIZE, np.float32)])


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits; any NaN equals any NaN where the format has several (not in FP8, whose NaN is one code)."""
    width = f"u{found.dtype.itemsize}"
    equal = found.view(width) == expected.view(width)
    if found.dtype.itemsize > 1:
        equal |= np.isnan(found.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    assert equal.all(), (found[~equal][:5], expected[~equal][:5])


@pytest.mark.parametrize("name", ["f8e4m3", "f8e5m2", "e5m6", "bf16", "f16", "f32"])
@pytest.mark.parametrize("saturate", [True, False])
def test_narrowing_is_the_reference_cast_to_the_bit(name: str, saturate: bool) -> None:
    x = adversarial(name)
    found = launched(narrow_kernel, x, DType.f32, DType[name], x.size // SIZE, FORMAT=name, SATURATE=saturate)
    same(found, reference(x, FORMATS[name], saturate=saturate))


@pytest.mark.parametrize("name", ["f8e4m3", "f8e5m2"])
@pytest.mark.parametrize("saturate", [True, False])
def test_narrowing_to_bytes_is_the_same(name: str, saturate: bool) -> None:
    x = adversarial(name)
    found = launched(narrow_kernel, x, DType.f32, DType[name], x.size // SIZE, True, FORMAT=f"{name}_bytes", SATURATE=saturate)
    same(found, reference(x, FORMATS[name], saturate=saturate))


@pytest.mark.parametrize("name", ["f8e4m3", "f8e5m2", "e8m0"])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_every_code_widens_to_its_value(name: str, as_bytes: bool) -> None:
    codes = np.arange(256, dtype=np.uint8).view(STORAGE[DType[name]])
    form = f"{name}_bytes" if as_bytes and name != "e8m0" else name
    found = launched(widen_kernel, codes, DType[name], DType.f32, 1, as_bytes, FORMAT=form)
    same(found, decoded(codes))


@pytest.mark.parametrize("name", ["bf16", "f16", "e5m6"])
def test_every_16_bit_pattern_widens_to_its_value(name: str) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(STORAGE[DType[name]])
    same(launched(widen_kernel, values, DType[name], DType.f32, FORMAT=name), decoded(values))


@pytest.mark.skipif(not INTERPRET, reason="about the interpreter")
@pytest.mark.parametrize(
    ("dtype", "inputs", "wrong"),
    [
        (DType.f8e4m3, [7.9, 127.4, 1.0625, 500.0], [4.0, 64.0, 1.125, 256.0]),
        (DType.bf16, [1.00390625 + 2**-10, 2.0**-130], [1.0, 0.0]),
    ],
)
def test_what_the_interpreter_does_without(dtype: DType, inputs: list[float], wrong: list[float]) -> None:
    """Its own casts are wrong. The day this fails Triton is repaired, and the bits need not be computed here any more."""
    x = np.array(inputs, np.float32)
    padded = np.concatenate([x, np.zeros(-x.size % 4, np.float32)])
    found = launched(plain_cast_kernel, padded, DType.f32, dtype)[: x.size].astype(np.float32)
    right = reference(x, FORMATS[dtype.name]).astype(np.float32)
    assert not np.array_equal(found, right)
    np.testing.assert_array_equal(found, np.array(wrong, np.float32))


@pytest.mark.parametrize(("sigmoidal", "ulps"), [(False, 3.0), (True, 4.0)])
def test_exp_and_sigmoid_are_within_their_ulps(sigmoidal: bool, ulps: float) -> None:
    x = np.concatenate([np.linspace(-87, 88, SIZE - 6), [0, -0.0, np.inf, -np.inf, 100, -200]]).astype(np.float32)
    found = launched(exp_kernel, x, DType.f32, DType.f32, SIGMOID=sigmoidal).astype(np.float64)
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-x.astype(np.float64))) if sigmoidal else np.exp(x.astype(np.float64))
        rounded = exact.astype(np.float32)
    normal = np.isfinite(rounded) & (exact > 2.0**-126)
    assert (np.abs(found[normal] - exact[normal]) / np.spacing(rounded[normal])).max() <= ulps
    np.testing.assert_array_equal(found[np.isinf(rounded)], np.inf)
    assert (found[exact < 1e-46] == 0).all()
