"""Attention forward: softmax(q k^T * scale) v, causal or not, flash style: the scores are never in memory.

Formula       FlashAttention-2 (arXiv 2307.08691, algorithm 1): per block of queries an online softmax over blocks of keys; blocks that
              causality leaves whole take no mask, those beyond the diagonal are not visited, the longest rows start first. Of packed
              documents only the keys from the first query's document to the last one's are visited
Layout        q [B, Hq, S, Dk], k [B, Hkv, L, Dk], v [B, Hkv, L, Dv] and out of any strides but the last, which is 1. A width that is no
              power of two is two products where that is less (192 = 128 + 64), and so are heads whose two parts lie apart (MLA)
Accumulation  scores, probabilities and sums in float32, the probabilities multiplied as BF16 parts (`flash.py`); out is rounded once
Compared to   numpy_ref within the bound of `testing.bounds`; floor: the operations of the lower triangle at the matrix rate
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.attention import Attention
from ....ir.ops.fused import MlaAttention
from ..arithmetic import narrow
from ..jit import device
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two
from .flash import (
    LOG2_E,
    documents,
    flash_tile,
    heads_of,
    multiplicand,
    online_step,
    parts_of,
    product,
    strides_of,
    unmasked,
    unsupported,
    weighted,
)

LARGEST = 512
"""The widest value head: 64 rows of it in float32 fill half of a multiprocessor's registers."""


@device
def visit(start, end, q_head, q_tail, k_base, pe_base, v_base, largest, total, result, query, first_key, stop_key, keys, k_token, pe_token,
          v_token, c, DK: tl.constexpr, PE: tl.constexpr, DV: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
          MASKED: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, FORMAT: tl.constexpr, PARTS: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, pages=None, k_page=None, v_page=None, PAGE: tl.constexpr = 0):  # fmt: skip
    """The online softmax over keys `start` up to `end`; where MASKED, some may lie beyond the last or be hidden.

    They are rows of k, of its second part and of v one after another or, with PAGE, so many to a page, whose numbers are at `pages`.
    """
    head, value = tl.arange(0, HEAD), tl.arange(0, VALUE)
    for first in range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        known = key < keys
        if PAGE:
            page = tl.load(pages + key // PAGE, mask=known, other=0).to(tl.int64)
            k_row = k_base + page * k_page + key % PAGE * k_token
            pe_row = pe_base + page * k_page + key % PAGE * pe_token
            v_row = v_base + page * v_page + key % PAGE * v_token
        else:
            k_row = k_base + key.to(tl.int64) * k_token
            pe_row = pe_base + key.to(tl.int64) * pe_token
            v_row = v_base + key.to(tl.int64) * v_token
        k = tl.load(k_row[None, :] + head[:, None], mask=known[None, :] & (head < DK)[:, None], other=0.0)
        scores = product(q_head, multiplicand(k, FORMAT), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if TAIL:
            tail = tl.arange(0, TAIL)
            k = tl.load(pe_row[None, :] + tail[:, None], mask=known[None, :] & (tail < PE)[:, None], other=0.0)
            scores = product(q_tail, multiplicand(k, FORMAT), scores)
        if MASKED:
            seen = known[None, :] & (key[None, :] <= query[:, None]) if CAUSAL else known[None, :]
            if DOCUMENTS:
                seen = seen & (key[None, :] >= first_key[:, None]) & (key[None, :] < stop_key[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(v_row[:, None] + value[None, :], mask=known[:, None] & (value < DV)[None, :], other=0.0)
        largest, total, result = online_step(scores, multiplicand(v, FORMAT), largest, total, result, c, FORMAT, PARTS)
    return largest, total, result


@device
def seen_keys(FIRST, STOP, block, query, queries, keys, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """Which keys a block of queries sees, in five numbers.

    For each query the first key of its document and the one behind the last; for the block where to start, a whole number of blocks
    further how far every query sees every key, and where to end.
    """
    first_key, stop_key, start = query, query, 0
    end = tl.minimum(keys, (block + 1) * BLOCK_M) if CAUSAL else keys
    limit = tl.minimum(keys, block * BLOCK_M + 1) if CAUSAL else keys
    if DOCUMENTS:
        first_key = tl.load(FIRST + query, mask=query < queries, other=keys)
        stop_key = tl.load(STOP + query, mask=query < queries, other=0)
        start, end = tl.min(first_key, axis=0), tl.minimum(end, tl.max(stop_key, axis=0))
        # one document for all queries there are: then no key of it is hidden but by causality
        same = tl.max(tl.where(query < queries, first_key, 0), axis=0) == start
        limit = tl.where(same, tl.minimum(limit, end), start)
    whole = start + tl.maximum(limit - start, 0) // BLOCK_N * BLOCK_N
    return first_key, stop_key, start, whole, end


@triton.jit
def attention_kernel(Q, K, V, OUT, Q_PE, K_PE, FIRST, STOP, queries, keys, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch,
                     v_head, v_token, out_batch, out_head, out_token, q_pe_batch, q_pe_head, q_pe_token, k_pe_batch, k_pe_head, k_pe_token,
                     c, HEADS: tl.constexpr, SHARED: tl.constexpr, DK: tl.constexpr, PE: tl.constexpr, FROM: tl.constexpr,
                     DV: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr,
                     DOCUMENTS: tl.constexpr, FORMAT: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    at_head = tl.program_id(1).to(tl.int64)
    batch, q_h = at_head // HEADS, at_head % HEADS
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (query < queries)[:, None]
    q_row = Q + batch * q_batch + q_h * q_head + query.to(tl.int64)[:, None] * q_token
    k_base = K + batch * k_batch + q_h // SHARED * k_head
    pe_base = K_PE + FROM + batch * k_pe_batch + q_h // SHARED * k_pe_head
    v_base = V + batch * v_batch + q_h // SHARED * v_head
    head = tl.arange(0, HEAD)[None, :]
    q = multiplicand(tl.load(q_row + head, mask=inside & (head < DK), other=0.0), FORMAT)
    rest = q
    if TAIL:
        tail = tl.arange(0, TAIL)[None, :]
        pe_row = Q_PE + FROM + batch * q_pe_batch + q_h * q_pe_head + query.to(tl.int64)[:, None] * q_pe_token
        rest = multiplicand(tl.load(pe_row + tail, mask=inside & (tail < PE), other=0.0), FORMAT)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, VALUE), tl.float32)
    first_key, stop_key, start, whole, end = seen_keys(FIRST, STOP, block, query, queries, keys, CAUSAL, DOCUMENTS, BLOCK_M, BLOCK_N)
    largest, total, result = visit(start, whole, q, rest, k_base, pe_base, v_base, largest, total, result, query, first_key, stop_key, keys,
                                   k_token, k_pe_token, v_token, c, DK, PE, DV, HEAD, TAIL, VALUE, False, CAUSAL, DOCUMENTS, FORMAT,
                                   PARTS, BLOCK_M, BLOCK_N)  # fmt: skip
    largest, total, result = visit(whole, end, q, rest, k_base, pe_base, v_base, largest, total, result, query, first_key, stop_key, keys,
                                   k_token, k_pe_token, v_token, c, DK, PE, DV, HEAD, TAIL, VALUE, True, CAUSAL, DOCUMENTS, FORMAT,
                                   PARTS, BLOCK_M, BLOCK_N)  # fmt: skip
    value = tl.arange(0, VALUE)[None, :]
    to = OUT + batch * out_batch + q_h * out_head + query.to(tl.int64)[:, None] * out_token + value
    tl.store(to, narrow(weighted(total, result), FORMAT), mask=inside & (value < DV))


@kernel(Attention)
def attention(op: Attention, target: Target, q: Slot, k: Slot, v: Slot, mask: Slot | None, out: Slot,
              q_pe: Slot | None = None, k_pe: Slot | None = None) -> tuple[Launch, ...] | Declined:  # fmt: skip
    if reason := unmasked(mask) or unsupported(q, k, v, q_pe, k_pe):
        return Declined(reason)
    if op.scale <= 0:
        return Declined(f"scale = {op.scale:g}, expected a positive one")
    if len(q.shape) > 4 or max(q.shape[-1], v.shape[-1]) > LARGEST:
        return Declined(f"q {list(q.shape)} and v {list(v.shape)}, expected at most 4 axes and heads of at most {LARGEST}")
    batch, heads, queries, _ = (1, *q.shape)[-4:]
    keys, parts, value = k.shape[-2], heads_of(q, k, q_pe, k_pe), max(16, power_of_two(v.shape[-1]))
    tile = flash_tile(queries, parts.width, value, q.dtype, target)
    finding, found = documents(mask, keys, 0, absent=q)
    main = Launch(
        attention_kernel,
        grid=(ceil_div(queries, tile.m), batch * heads),
        arguments={
            **{"Q": q, "K": k, "V": v, "OUT": out, "Q_PE": parts.q_pe, "K_PE": parts.k_pe, **found, "queries": queries, "keys": keys},
            **strides_of(q=q, k=k, v=v, out=out, q_pe=parts.q_pe, k_pe=parts.k_pe),
            "c": op.scale * LOG2_E,
        },
        constants={
            **{"HEADS": heads, "SHARED": heads // k.shape[-3], "DV": v.shape[-1], **parts.constants},
            **{"VALUE": value, "CAUSAL": op.causal, "FORMAT": q.format},
            **{"DOCUMENTS": mask is not None, "PARTS": parts_of(q.dtype, keys), "BLOCK_M": tile.m, "BLOCK_N": tile.n},
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fusion=True,
    )
    return *finding, main


@kernel(MlaAttention)
def mla_attention(op: MlaAttention, target: Target, q: Slot, k: Slot, v: Slot, mask: Slot | None, q_pe: Slot, k_pe: Slot,
                  out: Slot) -> tuple[Launch, ...] | Declined:  # fmt: skip
    return attention(op, target, q, k, v, mask, out, q_pe, k_pe)
