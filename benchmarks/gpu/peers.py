"""Who else computes a block-scaled product, on the same operands: each function returns what to time, or raises with why it is absent.

Operands as dsc has them: a [M, K] and b [N, K] in E4M3, row-major float32 scales [M, K/128] and [N/128, K/128].
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F

from dsc.backends.triton.tiles import ceil_div  # before Triton: it decides whether kernels are interpreted

# isort: split
import triton
import triton.language as tl

Tensor = torch.Tensor
Run = Callable[[], Tensor]


def cublas(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Run:
    """torch's scaled_mm with block scales: a's [M, K/128] with M contiguous, b's along K padded to four (CUDA 12.9, Hopper)."""
    from torch.nn.functional import ScalingType, scaled_mm

    blocks, steps = b_scales.shape
    padded = b_scales.new_zeros(blocks, -(-steps // 4) * 4)
    padded[:, :steps] = b_scales
    rows, columns = a_scales.t().contiguous().t(), padded.t()
    kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    return lambda: scaled_mm(a, b.t(), rows, kinds[0], columns, kinds[1], output_dtype=torch.bfloat16)


def widened(codes: Tensor, scales: Tensor, height: int) -> Tensor:
    """Codes times scales of tiles [height, 128], in BF16."""
    spread = scales.repeat_interleave(height, 0)[: codes.shape[0]].repeat_interleave(128, 1)[:, : codes.shape[1]]
    return (codes.float() * spread).bfloat16()


def compiled_product(backend: str) -> Callable[..., Run]:
    """torch.compile of the same math: widen, then the vendor's BF16 product."""

    def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
        return widened(a, a_scales, 1) @ widened(b, b_scales, 128).t()

    fast = torch.compile(product, backend=backend)
    return lambda *operands: lambda: fast(*operands)


def bf16(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Run:
    """The vendor's BF16 product of operands widened before."""
    x, y = widened(a, a_scales, 1), widened(b, b_scales, 128).t()
    return lambda: x @ y


@triton.jit
def plain_kernel(A, SA, B, SB, C, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    program, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    width = GROUP * tiles_n
    height = tl.minimum(tiles_m - program // width * GROUP, GROUP)
    row_tile = program // width * GROUP + program % width % height
    column_tile = program % width // height
    i = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)) % m
    j = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N)) % n
    inner = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(k, BLOCK_K)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        at = step * BLOCK_K + inner
        a = tl.load(A + i[:, None] * k + at[None, :], mask=at[None, :] < k, other=0.0)
        b = tl.load(B + j[None, :] * k + at[:, None], mask=at[:, None] < k, other=0.0)
        a_scale, b_scale = tl.load(SA + i * steps + step), tl.load(SB + j // 128 * steps + step)
        accumulator += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
    row, column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(C + row[:, None] * n + column[None, :], accumulator.to(tl.bfloat16), mask=(row < m)[:, None] & (column < n)[None, :])


def plain_triton(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Run:
    """A Triton kernel in the way serving engines write it: pointers, both scales multiplied into each partial sum, tiles of 64 x 128."""
    (m, k), n = a.shape, len(b)
    c = torch.empty(m, n, dtype=torch.bfloat16, device=a.device)
    grid = (ceil_div(m, 64) * ceil_div(n, 128),)

    def run() -> Tensor:
        plain_kernel[grid](a, a_scales, b, b_scales, c, m, n, k, 64, 128, 128, 32, num_warps=4, num_stages=3)
        return c

    return run


def first_of(module: str, *names: str) -> Callable[..., object]:
    """The function of a library under the name that its version has."""
    library = import_module(module)
    for name in names:
        if found := getattr(library, name, None):
            return found  # type: ignore[no-any-return]
    raise ImportError(f"{module} {getattr(library, '__version__', '')} has none of {', '.join(names)}")


def deep_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Run:
    """DeepGEMM's product, its scales laid out beforehand."""
    product = first_of("deep_gemm", "fp8_gemm_nt", "gemm_fp8_fp8_bf16_nt")
    layout = first_of("deep_gemm", "get_mn_major_tma_aligned_tensor", "get_col_major_tma_aligned_tensor")
    rows = layout(a_scales)
    c = torch.empty(len(a), len(b), dtype=torch.bfloat16, device=a.device)

    def run() -> Tensor:
        product((a, rows), (b, b_scales), c)
        return c

    return run


def deep_gemm_grouped(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, counts: Tensor) -> Run:
    """DeepGEMM's product of consecutive groups, whose counts must be multiples of 128."""
    product = first_of("deep_gemm", "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous")
    layout = first_of("deep_gemm", "get_mn_major_tma_aligned_tensor", "get_col_major_tma_aligned_tensor")
    rows = layout(x_scales)
    group = torch.repeat_interleave(torch.arange(len(w), device=x.device, dtype=torch.int32), counts)
    y = torch.empty(len(x), w.shape[1], dtype=torch.bfloat16, device=x.device)

    def run() -> Tensor:
        product((x, rows), (w, w_scales), y, group)
        return y

    return run


def grouped_bf16(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, counts: Tensor) -> Run:
    """torch's grouped product in BF16, of operands widened before."""
    rows = widened(x, x_scales, 1)
    matrices = torch.stack([widened(matrix, scales, 128) for matrix, scales in zip(w, w_scales, strict=True)]).transpose(1, 2)
    offsets = counts.cumsum(0, dtype=torch.int32)
    return lambda: F.grouped_mm(rows, matrices, offs=offsets)


def grouped_plain(x: Tensor, w: Tensor, counts: Tensor) -> Run:
    """torch's grouped product of BF16 operands."""
    offsets = counts.cumsum(0, dtype=torch.int32)
    return lambda: F.grouped_mm(x, w.transpose(1, 2), offs=offsets)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """torch's causal attention."""
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=q.shape[-1] ** -0.5)


def attention_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, gradient: Tensor) -> Run:
    """The backward pass of torch's causal attention alone; its first result is the gradient of q."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    made = attention(q, k, v)()
    return lambda: torch.autograd.grad(made, (q, k, v), gradient, retain_graph=True)  # type: ignore[return-value]


def moe_layer(tokens: int, hidden: int, experts: int, width: int, top_k: int, backend: str, device: torch.device) -> Run:
    """A layer of experts and one shared expert in BF16, torch.compile over grouped products; gate as in DeepSeek-V3 without groups."""

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, shape[-1] ** -0.5)

    x, router = random(tokens, hidden), random(experts, hidden)
    gate, up, down = random(experts, width, hidden), random(experts, width, hidden), random(experts, hidden, width)
    one = random(width, hidden), random(width, hidden), random(hidden, width)

    def layer() -> Tensor:
        weights, ids = torch.sigmoid(x.float() @ router.float().t()).topk(top_k, dim=1)
        weights = weights / weights.sum(1, keepdim=True) * 2.5
        order = ids.flatten().argsort(stable=True)
        offsets = torch.bincount(ids.flatten(), minlength=experts).cumsum(0).to(torch.int32)
        rows = x[order // top_k]
        made = F.silu(F.grouped_mm(rows, gate.transpose(1, 2), offs=offsets)) * F.grouped_mm(rows, up.transpose(1, 2), offs=offsets)
        made = F.grouped_mm(made, down.transpose(1, 2), offs=offsets) * weights.flatten()[order, None].bfloat16()
        routed = torch.zeros_like(x).index_add(0, order // top_k, made)
        return routed + (F.silu(x @ one[0].t()) * (x @ one[1].t())) @ one[2].t()

    return torch.compile(layer, backend=backend)  # type: ignore[no-any-return]
