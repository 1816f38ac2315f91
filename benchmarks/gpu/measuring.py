"""How the GPU benchmarks measure: sizes, what the machine can do at most, one op beside its peers, and what all rows say."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from dsc.backends.arrays import STORAGE
from dsc.backends.triton import torch_ops
from dsc.backends.triton.prepared import Prepared
from dsc.backends.triton.program import flat, layout_of
from dsc.backends.triton.run import Executor, machine
from dsc.backends.triton.timing import median_seconds
from dsc.backends.triton.torch_ops.fused import by_expansion
from dsc.hardware.cost import MATRIX
from dsc.ir.core import Module, Op, Value
from dsc.ir.ops.fused import (
    Fused,
    alone,
)
from dsc.ir.ops.quant import Quantize
from dsc.ir.types import Bundle, DType, Tensor, Type

BF16, F32, F8, I32, I64 = DType.bf16, DType.f32, DType.f8e4m3, DType.i32, DType.i64
Peer = Callable[..., Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Sizes:
    """What is measured: shapes of DeepSeek-V3, or tiny ones that stand for them."""

    tokens: int = 4096
    hidden: int = 7168
    width: int = 2048
    experts: int = 256
    top_k: int = 8
    groups: int = 8
    heads: int = 128
    vocabulary: int = 129_280
    context: int = 4096
    decoded: int = 128
    rows: tuple[int, ...] = (64, 128, 4096)
    products: tuple[tuple[int, int], ...] = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
    grouped: tuple[tuple[int, int], ...] = ((4, 8192), (8, 4096))
    expert_products: tuple[tuple[int, int], ...] = ((4096, 7168), (7168, 2048))
    copied: int = 1 << 30
    square: int = 8192


TINY = Sizes(8, 256, 128, 4, 2, 2, 2, 300, 16, 2, (2,), ((130, 256),), ((2, 128),), ((128, 256),), 1 << 16, 64)


@dataclass
class Machine:
    """The measured yardsticks: bytes/s, and operations/s of a matrix product by bits of its operands."""

    bandwidth: float
    rates: dict[int, float]


@dataclass
class Bench:
    """What is going on, and the rows found so far."""

    sizes: Sizes
    dry: bool
    device: torch.device = field(default_factory=lambda: machine()[1])
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def backend(self) -> str:
        """Of torch.compile. Compiling takes half a minute on a CPU, which a dry run has no use for."""
        return "eager" if self.dry else "inductor"

    def seconds(self, run: Callable[[], Any]) -> float:
        if self.dry:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        return median_seconds(run)

    def add(
        self, kernel: str, shape: str, who: str, seconds: float | None, floor: float, note: str = "", difference: float | None = None
    ) -> None:
        row = {"kernel": kernel, "shape": shape, "who": who, "seconds": seconds, "floor": floor, "note": note, "difference": difference}
        self.rows.append(row)
        took = f"{seconds * 1e6:12.1f} us {floor / seconds:6.1%} of floor" if seconds else f"{'-':>15}"
        print(f"{kernel:28} {shape:48} {who:22} {took}  {note}{'' if difference is None else f'difference {difference:.1e}'}", flush=True)


def yardsticks(bench: Bench) -> Machine:
    """What a copy and the vendor's products reach here, now."""
    s, device = bench.sizes, bench.device
    half = torch.empty(2, s.copied, dtype=torch.uint8, device=device)
    bandwidth = 2 * s.copied / bench.seconds(lambda: half[0].copy_(half[1]))
    a, b = (torch.randn(s.square, s.square, device=device).bfloat16() for _ in range(2))
    rates = {16: 2 * s.square**3 / bench.seconds(lambda: a @ b)}
    rates[8] = 2 * rates[16]
    try:
        x, y, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device=device)
        rates[8] = 2 * s.square**3 / bench.seconds(lambda: torch._scaled_mm(x, y, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
    except (RuntimeError, ValueError) as error:
        print(f"no tensor-wise FP8 product, so its rate is taken as twice BF16's: {first_line(error)}")
    rates[32] = rates[16] / 16  # float32 never runs on the matrix units here
    print(f"copy {bandwidth / 1e12:.2f} TB/s; products {rates[16] / 1e12:.0f} TFLOP/s in BF16, {rates[8] / 1e12:.0f} in FP8")
    return Machine(bandwidth, rates)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def fill(tensor: torch.Tensor) -> None:
    """Random numbers: normal in 16 bits, FP8 codes of normal numbers, positive float32, which scales are."""
    chunk = max(1, (1 << 28) // max(1, tensor[:1].numel() if tensor.ndim else 1))
    for part in tensor.split(chunk) if tensor.ndim else (tensor,):
        if part.dtype == torch.float32:
            part.uniform_(0.5, 1.5)
        elif part.dtype == torch.bfloat16:
            part.normal_()
        elif part.dtype == torch.float8_e4m3fn:
            numbers = torch.randn(part.shape, device=part.device) * 64
            part.view(torch.uint8).copy_(numbers.clamp(-448, 448).to(part.dtype).view(torch.uint8))


def ready(bench: Bench, op: Op, integers: Callable[[torch.Tensor], torch.Tensor] | None, module: Module | None = None) -> Prepared:
    """The op of a module alone, prepared, its operands filled on the device."""

    def nothing(type: Type) -> Any:
        return tuple(map(nothing, type.fields)) if isinstance(type, Bundle) else np.zeros(tuple(layout_of(type).shape), STORAGE[type.dtype])

    module = alone(op, module)
    prepared = Executor(graphs=False).prepare(module, lambda *_: None, [nothing(p.type) for p in module.main.params])
    for tensor in flat(prepared.inputs):
        if tensor.is_floating_point():
            fill(tensor)
        elif integers:
            tensor.copy_(integers(tensor).to(tensor.dtype))
    return prepared


def measure(
    bench: Bench,
    found: Machine,
    op: Op,
    peers: dict[str, Peer],
    integers: Callable[[torch.Tensor], torch.Tensor] | None = None,
    complete: Callable[..., None] = lambda *operands: None,
    module: Module | None = None,
) -> None:
    """Rows of one op: dsc's kernel, then every peer on the same operands.

    They are random; `integers` gives those of an integer tensor, `complete` writes those that depend on others.
    """
    shape = " ".join("x".join(map(str, t.shape)) for t in flat_types(op))
    name = f"{op.name} {op.tile[0]}x{op.tile[1]}" if isinstance(op, Quantize) else str(op.callee) if isinstance(op, Fused) else op.name
    bits = next(flat_types(op)).dtype.bits
    moved = sum(v.type.bytes for v in dict.fromkeys((*op.operands, *op.results)))
    floor = max(moved / found.bandwidth, op.flops() / found.rates[bits] if isinstance(op, MATRIX) else 0.0)
    prepared = ready(bench, op, integers, module)
    complete(*prepared.inputs)
    bench.add(name, shape, "dsc", bench.seconds(prepared.launch), floor)
    expected = next(iter(flat(prepared.results)))
    for who, peer in peers.items():
        try:
            run = peer(*prepared.inputs)
            made = run()
            bench.add(name, shape, who, bench.seconds(run), floor, difference=distance(made, expected))
        except Exception as error:  # whatever a peer raises is its row
            bench.add(name, shape, who, None, floor, f"absent: {first_line(error)}")


def flat_types(op: Op) -> Iterator[Tensor]:
    return (v.tensor for v in op.operands if isinstance(v.type, Tensor))


def distance(made: torch.Tensor, expected: torch.Tensor) -> float:
    """|made - expected| / |expected|, of codes by what they stand for; of a tuple by its first part."""
    made = made[0] if isinstance(made, tuple) else made
    a, b = made.float().flatten(), expected.float().flatten()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def value(dtype: DType, *shape: int) -> Value:
    return Value(Tensor(dtype, shape), "x")


def of(like: Value) -> tuple[Any, ...]:
    return like.tensor.dtype, *like.tensor.shape


def compiled(bench: Bench, op: Op, module: Module | None = None) -> Peer:
    """torch.compile of the same math, as dsc's stand-in for the kernel has it."""
    torch.compiler.reset()  # it gives up on a function that it has compiled for eight ops
    run = partial(by_expansion, op, module=module) if isinstance(op, Fused) else lambda *operands: torch_ops.run(op, operands)
    fast = torch.compile(run, backend=bench.backend)
    return lambda *operands: lambda: fast(*operands)


def tiles(n: int) -> int:
    return -(-n // 128)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "deep-gemm", "sgl-deep-gemm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """For each kernel and peer, the geometric mean of the peer's time over dsc's: above 1 dsc is faster."""
    times = {(r["kernel"], r["shape"], r["who"]): r["seconds"] for r in rows if r["seconds"]}
    ratios: dict[tuple[str, str], list[float]] = {}
    for (kernel, shape, who), seconds in times.items():
        if ours := times.get((kernel, shape, "dsc")):
            ratios.setdefault((kernel, who), []).append(seconds / ours)
    for (kernel, who), found in ratios.items():
        if who != "dsc":
            yield f"{kernel:28} {who:22} {float(np.exp(np.mean(np.log(found)))):6.2f} times dsc's time over {len(found)} shapes"
