"""Attention forward: softmax(q k^T * scale) v, causal or not, flash style: the scores are never in memory.

Formula       FlashAttention-2 (arXiv 2307.08691, algorithm 1): per block of queries an online softmax over blocks of keys; blocks that
              causality leaves whole take no mask, those beyond the diagonal are not visited, the longest rows start first
Layout        q [B, Hq, S, Dk], k [B, Hkv, L, Dk], v [B, Hkv, L, Dv] of any strides but the last, which is 1; out row-major. A width that
              is no power of two is two products where that is less (192 = 128 + 64)
Accumulation  scores, probabilities and sums in float32, the probabilities multiplied as BF16 parts (`flash.py`); out is rounded once
Compared to   numpy_ref within the bound of `testing.bounds`; floor: the operations of the lower triangle at the matrix rate
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.attention import Attention
from ..arithmetic import narrow
from ..jit import device
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two
from .flash import LOG2_E, flash_tile, multiplicand, online_step, parts_of, product, split_width, strides_of, unsupported, weighted

LARGEST = 512
"""The widest value head: 64 rows of it in float32 fill half of a multiprocessor's registers."""


@device
def visit(start, end, q_head, q_tail, k_base, v_base, largest, total, result, query, keys, k_token, v_token, c,
          DK: tl.constexpr, DV: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, MASKED: tl.constexpr,
          CAUSAL: tl.constexpr, FORMAT: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The online softmax over keys `start` up to `end`; where MASKED, some may lie beyond the last or be hidden by causality."""
    head, value = tl.arange(0, HEAD), tl.arange(0, VALUE)
    for first in range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        known = key < keys
        k_row = k_base + key.to(tl.int64) * k_token
        k = tl.load(k_row[None, :] + head[:, None], mask=known[None, :] & (head < DK)[:, None], other=0.0)
        scores = product(q_head, multiplicand(k, FORMAT), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if TAIL:
            tail = HEAD + tl.arange(0, TAIL)
            k = tl.load(k_row[None, :] + tail[:, None], mask=known[None, :] & (tail < DK)[:, None], other=0.0)
            scores = product(q_tail, multiplicand(k, FORMAT), scores)
        if MASKED:
            seen = known[None, :] & (key[None, :] <= query[:, None]) if CAUSAL else known[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        v_row = v_base + key.to(tl.int64) * v_token
        v = tl.load(v_row[:, None] + value[None, :], mask=known[:, None] & (value < DV)[None, :], other=0.0)
        largest, total, result = online_step(scores, multiplicand(v, FORMAT), largest, total, result, c, FORMAT, PARTS)
    return largest, total, result


@triton.jit
def attention_kernel(Q, K, V, OUT, queries, keys, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, c,
                     HEADS: tl.constexpr, SHARED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, HEAD: tl.constexpr,
                     TAIL: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr, FORMAT: tl.constexpr, PARTS: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    at_head = tl.program_id(1).to(tl.int64)
    batch, q_h = at_head // HEADS, at_head % HEADS
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (query < queries)[:, None]
    q_row = Q + batch * q_batch + q_h * q_head + query.to(tl.int64)[:, None] * q_token
    k_base = K + batch * k_batch + q_h // SHARED * k_head
    v_base = V + batch * v_batch + q_h // SHARED * v_head
    head = tl.arange(0, HEAD)[None, :]
    q = multiplicand(tl.load(q_row + head, mask=inside & (head < DK), other=0.0), FORMAT)
    rest = q
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)[None, :]
        rest = multiplicand(tl.load(q_row + tail, mask=inside & (tail < DK), other=0.0), FORMAT)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, VALUE), tl.float32)
    end = tl.minimum(keys, (block + 1) * BLOCK_M) if CAUSAL else keys
    whole = (tl.minimum(keys, block * BLOCK_M + 1) if CAUSAL else keys) // BLOCK_N * BLOCK_N
    largest, total, result = visit(0, whole, q, rest, k_base, v_base, largest, total, result, query, keys, k_token, v_token, c, DK, DV,
                                   HEAD, TAIL, VALUE, False, CAUSAL, FORMAT, PARTS, BLOCK_M, BLOCK_N)  # fmt: skip
    largest, total, result = visit(whole, end, q, rest, k_base, v_base, largest, total, result, query, keys, k_token, v_token, c, DK, DV,
                                   HEAD, TAIL, VALUE, True, CAUSAL, FORMAT, PARTS, BLOCK_M, BLOCK_N)  # fmt: skip
    value = tl.arange(0, VALUE)[None, :]
    to = OUT + (at_head * queries + query)[:, None] * DV + value
    tl.store(to, narrow(weighted(total, result), FORMAT), mask=inside & (value < DV))


@kernel(Attention, strided=True)
def attention(op: Attention, target: Target, q: Slot, k: Slot, v: Slot, mask: Slot | None, out: Slot) -> Launch | Declined:
    if mask is not None:
        return Declined("a mask; expected none, or causality")
    if op.scale <= 0:
        return Declined(f"scale = {op.scale:g}, expected a positive one")
    if len(q.shape) > 4 or max(q.shape[-1], v.shape[-1]) > LARGEST:
        return Declined(f"q {list(q.shape)} and v {list(v.shape)}, expected at most 4 axes and heads of at most {LARGEST}")
    if reason := unsupported(q, k, v):
        return Declined(reason)
    batch, heads, queries, _ = (1, *q.shape)[-4:]
    keys, width, value = k.shape[-2], split_width(q.shape[-1]), max(16, power_of_two(v.shape[-1]))
    tile = flash_tile(queries, sum(width), value, q.dtype, target)
    return Launch(
        attention_kernel,
        grid=(ceil_div(queries, tile.m), batch * heads),
        arguments={
            "Q": q,
            "K": k,
            "V": v,
            "OUT": out,
            "queries": queries,
            "keys": keys,
            **strides_of(q=q, k=k, v=v),
            "c": op.scale * LOG2_E,
        },
        constants={
            **{"HEADS": heads, "SHARED": heads // k.shape[-3], "DK": q.shape[-1], "DV": v.shape[-1]},
            **{"HEAD": width.head, "TAIL": width.tail, "VALUE": value, "CAUSAL": op.causal, "FORMAT": q.format},
            **{"PARTS": parts_of(q.dtype, keys), "BLOCK_M": tile.m, "BLOCK_N": tile.n},
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fusion=True,
    )
