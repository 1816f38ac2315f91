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
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from measuring import (
    BF16,
    F8,
    F32,
    I32,
    I64,
    TINY,
    Bench,
    Machine,
    Peer,
    Sizes,
    compiled,
    fill,
    first_line,
    measure,
    of,
    summary,
    tiles,
    value,
    versions,
    yardsticks,
)

from dsc.backends.arrays import STORAGE
from dsc.backends.triton import INTERPRET
from dsc.backends.triton.run import Executor
from dsc.ir.core import Builder, Module, Op, Value
from dsc.ir.ops.attention import Attention, AttentionBackward, AttentionDecode
from dsc.ir.ops.control import Param
from dsc.ir.ops.elementwise import Add, SwiGLU, SwiGLUBackward
from dsc.ir.ops.fused import (
    GroupedScaledMatmulAdd,
    MlaAttention,
    MlaAttentionBackward,
    MlaDecode,
    RmsNormBackwardAdd,
    ScaledMatmulAdd,
)
from dsc.ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad, Matmul
from dsc.ir.ops.loss import CrossEntropy, CrossEntropyBackward
from dsc.ir.ops.moe import Combine, Dispatch, Redispatch, Route, RouteBackward, RowWeights, SlotWeights
from dsc.ir.ops.norm import RmsNorm, RmsNormBackward, Rope
from dsc.ir.ops.quant import Dequantize, GroupedScaledMatmul, GroupedScaledMatmulWgrad, Quantize, ScaledMatmul
from dsc.ir.ops.shape import IndexAdd, Take
from dsc.ir.types import Bundle, DType, Tensor
from dsc.passes.manager import apply

RESULTS = Path(__file__).resolve().parents[1] / "results"


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
