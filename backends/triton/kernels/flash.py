"""Device code that the attention kernels share: one step of an online softmax over a block of keys, and products that lose nothing.

Scores are base-2 logarithms times `c` = scale * log2 e, as in FlashAttention-2 (arXiv 2307.08691, section 3.1): e^(scale s - m) is
2^(fma(s, c, -m')), one rounding of the exponent. Probabilities are float32, as the op asks: before the product with V they are taken apart
into BF16 parts, each the rounding of what the ones before leave, so that two leave 2^-18 of them and three 2^-27. So is dS backward.

FlashAttention takes one part, which is fewer products: at 192/128 320 of 448 forward, 1152 of 1664 backward, for each query and key. It is
not offered, because no reference could say what it gives: p is rounded relative to the largest score so far, so tiles decide its bits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ....ir.types import DType
from ..arithmetic import INTERPRET, narrow, widen
from ..jit import device
from ..registry import Launch, Slot
from ..targets import Target
from ..tiles import ceil_div, power_of_two

LOG2_E = 1.4426950408889634
TOKENS = 1024
"""Tokens whose documents one program finds."""


class Width(NamedTuple):
    """The width of a head as the matrix instruction takes it: a power of two, and what is left over, 0 or a smaller one."""

    head: int
    tail: int


def split_width(width: int) -> Width:
    """192 as 128 + 64, 576 as 512 + 64; one padded power of two where that is no more. At least 16, which is the instruction's."""
    whole = max(16, power_of_two(width))
    if whole <= width or whole == 16:
        return Width(whole, 0)
    head = whole // 2
    tail = max(16, power_of_two(width - head))
    return Width(head, tail) if head >= 16 and head + tail < whole else Width(whole, 0)


def parts_of(dtype: DType, keys: int) -> int:
    """BF16 parts of a probability: the 2^-18 that two leave are less than the roundings of a float32 sum over 64 keys or more."""
    return 1 if dtype is DType.f32 else 2 if keys >= 64 else 3


class Heads(NamedTuple):
    """The two parts of a head's queries and keys, however they lie: what a kernel is given of the second, and its constants.

    q_pe, k_pe     where the second parts lie: tensors of their own, or q and k again, from FROM on
    constants      the width of each part as the instruction takes it, HEAD and TAIL (0: there is none), and as it is, DK and PE
    """

    q_pe: Slot
    k_pe: Slot
    constants: dict[str, int]

    @property
    def width(self) -> int:
        """Of both parts, as the instruction takes them."""
        return self.constants["HEAD"] + self.constants["TAIL"]


def heads_of(q: Slot, k: Slot, q_pe: Slot | None = None, k_pe: Slot | None = None) -> Heads:
    """Heads in two tensors each where `q_pe` is given; else in one, cut in two where that is less (`split_width`)."""
    dk = q.shape[-1]
    if q_pe is None:
        head, tail = split_width(dk)
        return Heads(q, k, {"HEAD": head, "TAIL": tail, "DK": min(dk, head), "PE": max(0, dk - head), "FROM": head})
    head, tail = (max(16, power_of_two(x.shape[-1])) for x in (q, q_pe))
    return Heads(q_pe, k_pe or k, {"HEAD": head, "TAIL": tail, "DK": dk, "PE": q_pe.shape[-1], "FROM": 0})


class FlashTile(NamedTuple):
    """Queries and keys of one step."""

    m: int
    n: int
    num_warps: int
    num_stages: int


def flash_tile(queries: int, key_width: int, value_width: int, dtype: DType, target: Target) -> FlashTile:
    """What fits: the result [m, Dv] in registers; q, and k and v of each stage, in shared memory (227 KiB on Hopper, 99 or 64 else)."""
    if dtype is DType.f32:
        return FlashTile(32 if value_width <= 256 else 16, 16, 4, 1)
    roomy = target.name in ("sm_90", "sm_100")
    if roomy and value_width > 256:
        return FlashTile(32, 32, 8, 2)  # below the warp-group instruction, with which Triton 3.7 spills 12 KB of 64 x 32 at 576/512
    m = 128 if roomy and value_width <= 128 and queries > 64 else 64
    wide = key_width + value_width > 512
    if not roomy:
        return FlashTile(32 if wide else 64, 16 if wide else 32, 4, 1 if wide or target.backend == "hip" else 2)
    return FlashTile(m, 32 if wide else 64, 8 if m == 128 or wide else 4, 2)


def backward_tile(width: int, dtype: DType, target: Target, *, by_key: bool) -> FlashTile:
    """Queries and keys of a step of the backward pass, `by_key` where a program holds keys and sees queries.

    By query the result [m, Dk] is in registers, by key there are two, [n, Dk] and [n, Dv]: at 192/128 they take 160 of 255 on eight warps,
    and 32 queries are as many as leave the rest room (Triton 3.7 spills 16 bytes of them on Hopper, and 104 of 64). On Blackwell
    sums lie in tensor memory, and Triton makes a trap of what exceeds it. Wider heads leave the instruction of warp groups.
    """
    if dtype is DType.f32:
        return FlashTile(32, 32, 8, 1)
    if target.name == "sm_90" and width <= 320:
        return FlashTile(32, 128, 8, 2) if by_key else FlashTile(128, 64, 8, 2)
    if target.name == "sm_100" and width <= 320:
        return FlashTile(32, 64, 4, 2) if by_key else FlashTile(128, 32, 8, 2)
    return FlashTile(32, 32, 8 if width > 320 else 4, 1)


def strides_of(**slots: Slot) -> dict[str, int]:
    """`name_batch`, `name_head` and `name_token` of each tensor [B, H, S, D], or of one without a batch."""
    return {
        f"{name}_{axis}": stride
        for name, slot in slots.items()
        for axis, stride in zip(("batch", "head", "token"), (0, *slot.strides)[-4:-1], strict=True)
    }


def unsupported(*slots: Slot | None) -> str:
    """Why these operands do not suit the kernels, or nothing."""
    for slot in filter(None, slots):
        if slot.dtype not in (DType.bf16, DType.f32):
            return f"operands of {slot.dtype.name}, expected bf16 or f32"
        if slot.size and slot.shape[-1] > 1 and slot.strides[-1] != 1:
            return f"a head's elements {slot.strides[-1]} apart, expected 1"
    return ""


@triton.jit
def documents_kernel(BOUNDARIES, FIRST, STOP, tokens, boundaries, TOKENS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.full((TOKENS,), -1, tl.int32)
    stop = tl.full((TOKENS,), -1, tl.int32)
    for i in range(boundaries):
        boundary = tl.load(BOUNDARIES + i).to(tl.int32)
        first = tl.where(boundary <= token, boundary, first)
        stop = tl.where((boundary > token) & (stop < 0), boundary, stop)
    inside = (first >= 0) & (stop >= 0)
    tl.store(FIRST + token, tl.where(inside, first, tokens), mask=token < tokens)
    tl.store(STOP + token, tl.where(inside, stop, 0), mask=token < tokens)


def documents(boundaries: Slot | None, tokens: int, index: int, absent: Slot) -> tuple[tuple[Launch, ...], dict[str, Slot]]:
    """Launches that write down, for each token, the FIRST of its document and the one behind the last, its STOP, and where they lie.

    A token in no document has `tokens` and 0: it neither widens what its block sees nor sees anything. They are workspace `index` and the
    one after it. Without boundaries there is nothing to write, and `absent` stands for both.
    """
    if boundaries is None:
        return (), {"FIRST": absent, "STOP": absent}
    first, stop = (Slot("workspace", index + i, DType.i32, (tokens,), (1,)) for i in (0, 1))
    launch = Launch(
        documents_kernel,
        grid=(ceil_div(tokens, TOKENS),),
        arguments={"BOUNDARIES": boundaries, "FIRST": first, "STOP": stop, "tokens": tokens, "boundaries": boundaries.size},
        constants={"TOKENS": TOKENS},
        workspace=(first, stop),
    )
    return (launch,), {"FIRST": first, "STOP": stop}


def unmasked(mask: Slot | None) -> str:
    """Why the kernels cannot apply a mask, or nothing."""
    if mask is None or (mask.dtype.is_int and mask.strides == (1,)):
        return ""
    return f"a mask {mask.dtype.name}{list(mask.shape)}; expected none, causality, or boundaries of documents one after another"


@device
def multiplicand(x, FORMAT: tl.constexpr):
    """x as the matrix instruction takes it; for the interpreter, which would multiply patterns of BF16, as the numbers that they are."""
    if INTERPRET:
        return widen(x, FORMAT)
    else:
        return x


@device
def product(a, b, accumulator):
    """a b + accumulator in float32; float32 operands are not cut to TF32."""
    return tl.dot(a, b, accumulator, input_precision="ieee")


@device
def product_of_parts(a, b, accumulator, FORMAT: tl.constexpr, PARTS: tl.constexpr):
    """a b + accumulator for a float32 a, taken apart into so many parts of FORMAT."""
    for _ in tl.static_range(PARTS):
        part = narrow(a, FORMAT)
        accumulator = product(multiplicand(part, FORMAT), b, accumulator)
        if PARTS > 1:
            a = a - widen(part, FORMAT)
    return accumulator


@device
def online_step(scores, v, largest, total, result, c, FORMAT: tl.constexpr, PARTS: tl.constexpr):
    """The running maximum [M] (of scores times c), sum [M] and result [M, Dv] with the keys of `scores` [M, N] and `v` [N, Dv]."""
    larger = tl.maximum(largest, tl.max(scores, axis=1) * c)
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    p = tl.exp2(tl.fma(scores, c, -shift[:, None]))
    rescale = tl.exp2(largest - shift)
    total = total * rescale + tl.sum(p, axis=1)
    result = product_of_parts(p, v, result * rescale[:, None], FORMAT, PARTS)
    return larger, total, result


@device
def weighted(total, result):
    """result [M, Dv] over total [M]; 0 where no key was seen."""
    divisor = tl.where(total == 0.0, 1.0, total)
    return tl.div_rn(result, tl.broadcast_to(divisor[:, None], result.shape))
