"""Every Triton kernel on this machine's GPU: against its floor, and beside others that compute the same in the same run.

The floor is what the machine was measured to do a moment before: bytes read and written once, over the bandwidth of a copy of 2 GiB; or
operations over the rate of the vendor's product of 8192^3 in BF16, and tensor-wise FP8. A time is the median of 30 runs, each after the L2
cache was overwritten. Shapes are those of DeepSeek-V3, products those of DeepGEMM's published tables. Operands are random: constants draw
less power and run faster. What is absent has a row that says why. `difference` is the relative distance of a result to dsc's.

    python benchmarks/gpu/all.py                 all of it; prints a table, writes benchmarks/results/gpu-<device>.json
    python benchmarks/gpu/all.py --only products,experts,rows,attention,layer
    python benchmarks/gpu/all.py --dry           tiny shapes on the CPU, in Triton's interpreter: that it works, no figure means anything
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch

from dsc.backends.arrays import STORAGE
from dsc.backends.triton import INTERPRET, torch_ops
from dsc.backends.triton.prepared import Prepared
from dsc.backends.triton.program import flat, layout_of
from dsc.backends.triton.run import Executor, machine
from dsc.backends.triton.timing import median_seconds
from dsc.backends.triton.torch_ops.fused import by_expansion
from dsc.hardware.cost import MATRIX
from dsc.ir.core import Builder, Module, Op, Value
from dsc.ir.ops.attention import Attention, AttentionBackward, AttentionDecode
from dsc.ir.ops.control import Param
from dsc.ir.ops.elementwise import Add, SwiGLU, SwiGLUBackward
from dsc.ir.ops.fused import (
    Fused,
    GroupedScaledMatmulAdd,
    MlaAttention,
    MlaAttentionBackward,
    MlaDecode,
    RmsNormBackwardAdd,
    ScaledMatmulAdd,
    alone,
)
from dsc.ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad, Matmul
from dsc.ir.ops.loss import CrossEntropy, CrossEntropyBackward
from dsc.ir.ops.moe import Combine, Dispatch, Redispatch, Route, RouteBackward, RowWeights, SlotWeights
from dsc.ir.ops.norm import RmsNorm, RmsNormBackward, Rope
from dsc.ir.ops.quant import Dequantize, GroupedScaledMatmul, GroupedScaledMatmulWgrad, Quantize, ScaledMatmul
from dsc.ir.ops.shape import IndexAdd, Take
from dsc.ir.types import Bundle, DType, Tensor, Type
from dsc.passes.manager import apply

RESULTS = Path(__file__).resolve().parents[1] / "results"
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


def products(bench: Bench, found: Machine) -> None:
    """Forward and Dgrad shapes of Linear layers, and their Wgrad."""
    others: dict[str, Peer] = {
        **{"torch scaled_mm": peers.cublas, "torch.compile": peers.compiled_product(bench.backend), "torch bf16": peers.bf16},
        **{"plain Triton": peers.plain_triton, "DeepGEMM": peers.deep_gemm},
    }
    for n, k in bench.sizes.products:
        for m in bench.sizes.rows:
            op = ScaledMatmul(value(F8, m, k), value(F32, m, tiles(k)), value(F8, n, k), value(F32, tiles(n), tiles(k)))
            measure(bench, found, op, others)
            added = ScaledMatmulAdd(op.a, op.a_scales, op.b, op.b_scales, added=value(BF16, m, n))
            measure(bench, found, added, {"torch.compile": compiled(bench, added)})
        t = bench.sizes.tokens
        wgrad = ScaledMatmul(value(F8, n, t), value(F32, n, tiles(t)), value(F8, k, t), value(F32, k, tiles(t)), b_tile=(1, 128), out=F32)
        measure(bench, found, wgrad, {})


def experts(bench: Bench, found: Machine) -> None:
    """Products of consecutive groups: forward, Wgrad, and BF16."""
    for groups, each in bench.sizes.grouped:
        for n, k in bench.sizes.expert_products:
            rows = groups * each

            def counts(tensor: torch.Tensor, each: int = each) -> torch.Tensor:
                return torch.full_like(tensor, each)

            x, w = (value(F8, rows, k), value(F32, rows, tiles(k))), (value(F8, groups, n, k), value(F32, groups, tiles(n), tiles(k)))
            number = value(I32, groups)
            others: dict[str, Peer] = {"torch grouped_mm bf16": peers.grouped_bf16, "DeepGEMM": peers.deep_gemm_grouped}
            measure(bench, found, GroupedScaledMatmul(*x, *w, number), others, counts)
            measure(bench, found, GroupedScaledMatmulAdd(*x, *w, number, added=value(BF16, rows, n)), {}, counts)
            column_tiles = tiles(rows) + groups
            dy, turned = (value(F8, rows, n), value(F32, column_tiles, n)), (value(F8, rows, k), value(F32, column_tiles, k))
            measure(bench, found, GroupedScaledMatmulWgrad(*dy, *turned, number), {}, counts)
            plain = (value(BF16, rows, k), value(BF16, groups, n, k), number)
            measure(bench, found, GroupedMatmul(*plain, transpose_b=True), {"torch grouped_mm": peers.grouped_plain}, counts)
            measure(bench, found, GroupedMatmulWgrad(value(BF16, rows, n), plain[0], number), {}, counts)


def rows(bench: Bench, found: Machine) -> None:
    """What works on rows, tiles and elements: bound by bandwidth."""
    s = bench.sizes
    x, sent = value(BF16, s.tokens, s.hidden), s.tokens * s.top_k
    handle = Value(Bundle((Tensor(I32, (sent,)),)), "handle")

    def below(limit: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: torch.randint(limit, tensor.shape, device=tensor.device)

    def chosen(tensor: torch.Tensor) -> torch.Tensor:
        return torch.rand(tensor.shape[0], s.experts, device=tensor.device).topk(s.top_k).indices

    def order(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randperm(len(tensor), device=tensor.device)

    codes, scales = value(F8, s.tokens, s.hidden), value(F32, s.tokens, tiles(s.hidden))
    weight, x_gradient = value(BF16, s.hidden), value(BF16, s.tokens, s.hidden)
    gate, up = value(BF16, s.tokens, s.width), value(BF16, s.tokens, s.width)
    fused = Builder("fused")
    weighted = SwiGLU(value(BF16, sent, s.width), value(BF16, sent, s.width), value(F32, sent, 1))
    for y in (RmsNorm(x, weight, 1e-6), SwiGLU(gate, up), weighted):
        fused.params += dict.fromkeys(y.operands)
        fused.emit(Quantize(fused.emit(y).result))
    made = apply(Module((fused.finish([r for op in fused.ops if isinstance(op, Quantize) for r in op.results]),)), "fuse")
    cases: list[tuple[Op, Any]] = [
        (Quantize(x), None),
        (Quantize(x, tile=(128, 1)), None),
        (Quantize(value(BF16, s.hidden, s.hidden), tile=(128, 128)), None),
        (Dequantize(codes, scales), None),
        (RmsNorm(x, weight, 1e-6), None),
        (SwiGLU(gate, up), None),
        (Rope(value(BF16, 1, s.tokens, s.heads, 64), value(F32, s.tokens, 32), value(F32, s.tokens, 32), interleaved=True), None),
        (Route(value(F32, s.tokens, s.experts), value(F32, s.experts), top_k=s.top_k, groups=s.groups, top_groups=s.groups // 2), None),
        (Dispatch((x,), value(I32, s.tokens, s.top_k), s.experts), chosen),
        (Combine(value(BF16, sent, s.hidden), handle, value(F32, s.tokens, s.top_k)), order),
        (Redispatch((x,), handle), order),
        (Take(value(BF16, s.vocabulary, s.hidden), value(I64, s.tokens)), below(s.vocabulary)),
        (CrossEntropy(value(BF16, s.tokens, s.vocabulary), value(I64, s.tokens)), below(s.vocabulary)),
        *((op, None) for op in made.main.ops),
        (RmsNormBackward(x, weight, x_gradient, 1e-6), None),
        (RmsNormBackwardAdd(x, weight, x_gradient, 1e-6, added=value(BF16, s.tokens, s.hidden)), None),
        (SwiGLUBackward(gate, up, value(BF16, s.tokens, s.width)), None),
        (RouteBackward(value(F32, s.tokens, s.experts), value(I32, s.tokens, s.top_k), value(F32, s.tokens, s.top_k)), chosen),
        (RowWeights(value(F32, s.tokens, s.top_k), handle), order),
        (SlotWeights(value(F32, sent, 1), handle, s.top_k), order),
        (CrossEntropyBackward(value(BF16, s.tokens, s.vocabulary), value(I64, s.tokens), value(F32)), below(s.vocabulary)),
        (IndexAdd(value(F32, s.vocabulary, s.hidden), value(I64, s.tokens), value(F32, s.tokens, s.hidden)), below(s.vocabulary)),
    ]
    for op, integers in cases:
        measure(bench, found, op, {"torch.compile": compiled(bench, op, made)}, integers, module=made)


def attention(bench: Bench, found: Machine) -> None:
    """Attention of MLA: 192 and 128 wide heads, causal, in one piece and in two parts; and absorbed decoding over a latent cache."""
    s = bench.sizes
    q, k, v = (value(BF16, 1, s.heads, s.tokens, width) for width in (192, 192, 128))
    parts: Any = {"q_pe": value(BF16, 1, s.heads, s.tokens, 64), "k_pe": value(BF16, 1, s.heads, s.tokens, 64)}
    options: Any = {"scale": 192**-0.5, "causal": True}

    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The operands with heads in one piece, as torch wants them."""
        *given, q_pe, k_pe = rest if q.shape[-1] < 192 else (*rest, q[..., :0], k[..., :0])
        return torch.cat((q, q_pe), -1), torch.cat((k, k_pe), -1), v, *given

    def forward(*operands: torch.Tensor) -> None:
        q, k, v, out, _ = whole(*operands)
        out.copy_(peers.attention(q, k, v)())

    def forward_peer(*operands: torch.Tensor) -> Callable[[], torch.Tensor]:
        return peers.attention(*whole(*operands))

    def backward_peer(*operands: torch.Tensor) -> Callable[[], torch.Tensor]:
        run = peers.attention_backward(*whole(*operands))
        return lambda: run()[0][..., : operands[0].shape[-1]]

    apart = (value(*of(v)), value(*of(v)), v)
    for op in (Attention(q, k, v, **options), MlaAttention(*apart, **options, **parts)):
        measure(bench, found, op, {"torch sdpa": forward_peer})
    gradient = (value(*of(v)), value(*of(v)))
    for op in (AttentionBackward(q, k, v, *gradient, **options), MlaAttentionBackward(*apart, *gradient, **options, **parts)):
        measure(bench, found, op, {"torch sdpa": backward_peer}, complete=forward)
    cache = [value(BF16, s.decoded, s.context, 1, width) for width in (576, 512)]
    queries = [value(BF16, s.decoded, s.heads, width) for width in (576, 512, 64)]
    positions = value(I64, s.decoded)
    for op in (
        AttentionDecode(queries[0], *cache, positions, 192**-0.5),
        MlaDecode(queries[1], *cache, positions, 192**-0.5, q_pe=queries[2]),
    ):
        measure(bench, found, op, {"torch.compile": compiled(bench, op)}, lambda tensor: torch.full_like(tensor, s.context - 1))


def layer_program(s: Sizes) -> Module:
    """A layer of experts and one shared expert, its gate as in DeepSeek-V3."""
    b = Builder("moe")
    x = b.param("x", Tensor(BF16, (s.tokens, s.hidden)))

    def weight(path: str, *shape: int, dtype: DType = BF16) -> Value:
        return b.emit(Param(path, (Tensor(dtype, shape),))).result

    logits = b.emit(Matmul(x, weight("mlp.gate.weight", s.experts, s.hidden), transpose_b=True, out=F32)).result
    ids, weights = b.emit(Route(logits, top_k=s.top_k, groups=s.groups, top_groups=max(1, s.groups // 2), scale=2.5)).results
    sent, counts, handle = b.emit(Dispatch((x,), ids, experts=s.experts)).results

    def grouped(x: Value, path: str, *shape: int) -> Value:
        return b.emit(GroupedMatmul(x, weight(path, s.experts, *shape), counts, transpose_b=True)).result

    gate, up = (grouped(sent, f"experts.{name}", s.width, s.hidden) for name in ("gate", "up"))
    made = grouped(b.emit(SwiGLU(gate, up)).result, "experts.down", s.hidden, s.width)
    routed = b.emit(Combine(made, handle, weights)).result
    gate, up = (b.emit(Matmul(x, weight(f"shared.{name}", s.width, s.hidden), transpose_b=True)).result for name in ("gate", "up"))
    shared = b.emit(Matmul(b.emit(SwiGLU(gate, up)).result, weight("shared.down", s.hidden, s.width), transpose_b=True)).result
    return Module((b.finish([b.emit(Add(routed, shared)).result]),))


def layer(bench: Bench, found: Machine) -> None:
    """One MoE layer forward, whole, as a CUDA graph: in FP8 with stored weights, in BF16, and torch.compile over grouped products."""
    s = bench.sizes
    shape = f"{s.tokens} tokens, {s.experts} experts"
    per_token = 6 * s.hidden * s.width * (s.top_k + 1)
    weights = 3 * s.hidden * s.width * (s.experts + 1)
    plain = layer_program(s)
    for name, program, bits in (("fp8", apply(plain, "simplify,quantize-fp8{stored=true}"), 8), ("bf16", plain, 16)):
        floor = max(s.tokens * per_token / found.rates[bits], weights * bits / 8 / found.bandwidth)

        def zeros(path: str, type: Tensor) -> np.ndarray:
            return np.zeros(type.shape, STORAGE[type.dtype])

        prepared = Executor().prepare(program, zeros, [np.zeros((s.tokens, s.hidden), STORAGE[BF16])])
        for tensor in (*prepared.inputs, *prepared.weights.values()):
            fill(tensor)
        for tensor in prepared.weights.values():  # products stay near 1, and so does the gate: experts get about equal shares
            if tensor.dtype == torch.float32:
                tensor.fill_(s.hidden**-0.5 / 64)
            elif tensor.dtype == torch.bfloat16:
                tensor.mul_(tensor.shape[-1] ** -0.5)
        bench.add("moe layer", shape, f"dsc {name}", bench.seconds(prepared.execute), floor)
        del prepared
    floor = max(s.tokens * per_token / found.rates[16], weights * 2 / found.bandwidth)
    try:
        run = peers.moe_layer(s.tokens, s.hidden, s.experts, s.width, s.top_k, bench.backend, bench.device)
        bench.add("moe layer", shape, "torch.compile bf16", bench.seconds(run), floor)
    except Exception as error:  # whatever a peer raises is its row
        bench.add("moe layer", shape, "torch.compile bf16", None, floor, f"absent: {first_line(error)}")


SECTIONS = {"products": products, "experts": experts, "rows": rows, "attention": attention, "layer": layer}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, in the interpreter")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="SECTION,...", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="instead of benchmarks/results/gpu-<device>.json")
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - SECTIONS.keys():
        parser.error(f"unknown section {', '.join(sorted(unknown))}; known are {', '.join(SECTIONS)}")
    if INTERPRET and not given.dry:
        print("no GPU here: nothing is measured; --dry runs all of it on the CPU with tiny shapes")
        return 0
    torch.manual_seed(0)
    bench = Bench(TINY if given.dry else Sizes(), given.dry)
    found = yardsticks(bench)
    for name in given.only.split(","):
        SECTIONS[name](bench, found)
    print("\n".join(("", *summary(bench.rows))))
    name = torch.cuda.get_device_name(0) if not INTERPRET else "interpreter"
    file = given.out or (None if given.dry else RESULTS / f"gpu-{name.lower().replace(' ', '-')}.json")
    if file:
        document = {"device": name, "date": str(date.today()), "dry": given.dry, "versions": versions(), **vars(found), "rows": bench.rows}
        file.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
