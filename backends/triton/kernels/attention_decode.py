"""Attention of one token per sequence over a cache, in one piece or paged: absorbed MLA (Hkv = 1, 576/512) and GQA. Programs share keys.

Formula       split   each part of the keys gives a maximum m, a sum s and a result o = sum 2^(score - m) v, unnormalised
              join    M = max m; out = sum 2^(m - M) o / sum 2^(m - M) s (Flash-Decoding: log-sum-exp of parts)
Layout        q [B, Hq, Dk], k [B, N, Hkv, Dk], v [B, N, Hkv, Dv] of any strides but the last, which is 1, so v may be a view into k,
              and out likewise; the second part of q may be a tensor of its own (MLA); positions [B]. A paged cache is
              k [P, size, Hkv, Dk] and v [P, size, Hkv, Dv], with pages [B, n]. The query heads of one key head are the rows of the products
Accumulation  as in attention: float32, the probabilities multiplied as BF16 parts (`flash.py`); out is rounded once
Compared to   numpy_ref within the bound of `testing.bounds`; floor: one read of the cache up to each position
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.attention import AttentionDecode
from ....ir.ops.fused import MlaDecode
from ....ir.types import DType
from ..arithmetic import narrow
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two
from .attention import LARGEST, visit
from .flash import LOG2_E, flash_tile, heads_of, multiplicand, parts_of, unsupported, weighted

SHORTEST = 128
"""Keys of a part, at least: each part writes and reads a result in float32."""


@triton.jit
def attention_decode_split_kernel(Q, K, V, Q_PE, POSITIONS, PAGES, LARGEST_OF, TOTAL_OF, RESULT_OF, keys, length, q_batch, q_head,
                                  q_pe_batch, q_pe_head, k_batch, k_token, k_head, v_batch, v_token, v_head, row_of_pages, c,
                                  HEADS: tl.constexpr, SHARED: tl.constexpr, TILES: tl.constexpr, DK: tl.constexpr, PE: tl.constexpr,
                                  FROM: tl.constexpr, DV: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
                                  FORMAT: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
                                  BLOCK_N: tl.constexpr):  # fmt: skip
    part, parts = tl.program_id(0), tl.num_programs(0)
    kv_head, tile = tl.program_id(1) // TILES, tl.program_id(1) % TILES
    batch = tl.program_id(2).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < SHARED)[:, None]
    q_h = kv_head * SHARED + row
    q_row = Q + batch * q_batch + q_h[:, None] * q_head
    k_base, v_base, pages = K + kv_head * k_head, V + kv_head * v_head, PAGES
    if PAGE:
        pages += batch * row_of_pages
    else:
        k_base += batch * k_batch
        v_base += batch * v_batch
    head = tl.arange(0, HEAD)[None, :]
    q = multiplicand(tl.load(q_row + head, mask=inside & (head < DK), other=0.0), FORMAT)
    rest = q
    if TAIL:
        tail = tl.arange(0, TAIL)[None, :]
        pe_row = Q_PE + FROM + batch * q_pe_batch + q_h[:, None] * q_pe_head
        rest = multiplicand(tl.load(pe_row + tail, mask=inside & (tail < PE), other=0.0), FORMAT)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, VALUE), tl.float32)
    seen = tl.minimum(tl.load(POSITIONS + batch).to(tl.int64) + 1, keys).to(tl.int32)
    start = part * length
    end = tl.minimum(seen, start + length)
    largest, total, result = visit(start, end, q, rest, k_base, k_base + DK, v_base, largest, total, result, row, row, row, seen, k_token,
                                   k_token, v_token, c, DK, PE, DV, HEAD, TAIL, VALUE, True, False, False, FORMAT, PARTS, BLOCK_M,
                                   BLOCK_N, pages, k_batch, v_batch, PAGE)  # fmt: skip
    at = (batch * HEADS + q_h) * parts + part
    value = tl.arange(0, VALUE)[None, :]
    tl.store(LARGEST_OF + at, largest, mask=row < SHARED)
    tl.store(TOTAL_OF + at, total, mask=row < SHARED)
    tl.store(RESULT_OF + at[:, None] * DV + value, result, mask=inside & (value < DV))


@triton.jit
def attention_decode_join_kernel(LARGEST_OF, TOTAL_OF, RESULT_OF, OUT, parts, out_batch, out_head, HEADS: tl.constexpr, DV: tl.constexpr,
                                 VALUE: tl.constexpr, FORMAT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, WIDTH)
    largest = tl.max(tl.load(LARGEST_OF + row * parts + every, mask=every < parts, other=float("-inf")), axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    value = tl.arange(0, VALUE)[None, :]
    total = tl.zeros((1,), tl.float32)
    result = tl.zeros((1, VALUE), tl.float32)
    for start in range(0, parts, STEP):
        part = start + tl.arange(0, STEP)
        scale = tl.exp2(tl.load(LARGEST_OF + row * parts + part, mask=part < parts, other=float("-inf")) - shift)
        total += tl.sum(scale * tl.load(TOTAL_OF + row * parts + part, mask=part < parts, other=0.0), axis=0)
        inside = (part < parts)[:, None] & (value < DV)
        some = tl.load(RESULT_OF + (row * parts + part)[:, None] * DV + value, mask=inside, other=0.0)
        result += tl.sum(scale[:, None] * some, axis=0)[None, :]
    tl.store(OUT + row // HEADS * out_batch + row % HEADS * out_head + value, narrow(weighted(total, result), FORMAT), mask=value < DV)


@kernel(AttentionDecode)
def attention_decode(op: AttentionDecode, target: Target, q: Slot, k: Slot, v: Slot, positions: Slot, pages: Slot | None, out: Slot,
                     q_pe: Slot | None = None) -> tuple[Launch, ...] | Declined:  # fmt: skip
    (batch, heads, _), dk, (_, size, kv_heads, dv), keys = q.shape, k.shape[-1], v.shape, op.keys
    if op.scale <= 0:
        return Declined(f"scale = {op.scale:g}, expected a positive one")
    if dk > 2 * LARGEST or dv > LARGEST:
        return Declined(f"heads of {dk} and {dv}, expected at most {2 * LARGEST} and {LARGEST}")
    if reason := unsupported(q, k, v, q_pe):
        return Declined(reason)
    if batch and positions.strides != (1,):
        return Declined(f"positions {positions.strides[0]} apart, expected 1")
    if pages is not None and pages.size and pages.strides[1] != 1:
        return Declined(f"pages {pages.strides[1]} apart, expected 1")
    shared, halves, value = heads // kv_heads, heads_of(q, k, q_pe), max(16, power_of_two(dv))
    tile = flash_tile(shared, halves.width, value, q.dtype, target)
    m = min(tile.m, max(16, power_of_two(shared)))
    tiles = ceil_div(shared, m)
    wanted = max(1, ceil_div(2 * target.units, max(1, batch * kv_heads * tiles)))
    length = ceil_div(max(SHORTEST, ceil_div(keys, wanted)), tile.n) * tile.n
    parts = max(1, ceil_div(keys, length))
    rows = batch * heads
    largest, total = (Slot("workspace", i, DType.f32, (rows, parts), (parts, 1)) for i in (0, 1))
    result = Slot("workspace", 2, DType.f32, (rows, parts, dv), (parts * dv, dv, 1))
    partial = {"LARGEST_OF": largest, "TOTAL_OF": total, "RESULT_OF": result}
    strides = {
        **dict(zip(("q_batch", "q_head"), q.strides[:2], strict=True)),
        **dict(zip(("q_pe_batch", "q_pe_head"), halves.q_pe.strides[:2], strict=True)),
        **dict(zip(("k_batch", "k_token", "k_head"), k.strides[:3], strict=True)),
        **dict(zip(("v_batch", "v_token", "v_head"), v.strides[:3], strict=True)),
    }
    split = Launch(
        attention_decode_split_kernel,
        grid=(parts, kv_heads * tiles, batch),
        arguments={
            **{"Q": q, "K": k, "V": v, "Q_PE": halves.q_pe, "POSITIONS": positions, "PAGES": pages or positions, **partial},
            **{"keys": keys, "length": length, **strides},
            **{"row_of_pages": pages.strides[0] if pages else 0, "c": op.scale * LOG2_E},
        },
        constants={
            **{"HEADS": heads, "SHARED": shared, "TILES": tiles, "DV": dv, **halves.constants},
            **{"VALUE": value, "FORMAT": q.format},
            **{"PARTS": parts_of(q.dtype, keys), "PAGE": size if pages else 0, "BLOCK_M": m, "BLOCK_N": tile.n},
        },
        num_warps=tile.num_warps if m == tile.m else 4,
        num_stages=tile.num_stages,
        fusion=True,
        workspace=(largest, total, result),
    )
    join = Launch(
        attention_decode_join_kernel,
        grid=(rows,),
        arguments={**partial, "OUT": out, "parts": parts, "out_batch": out.strides[0], "out_head": out.strides[1]},
        constants={
            "HEADS": heads,
            "DV": dv,
            "VALUE": value,
            "FORMAT": out.format,
            "WIDTH": power_of_two(parts),
            "STEP": min(8, power_of_two(parts)),
        },
    )
    return split, join


@kernel(MlaDecode)
def mla_decode(op: MlaDecode, target: Target, q: Slot, k: Slot, v: Slot, positions: Slot, pages: Slot | None, q_pe: Slot, k_pe: None,
               out: Slot) -> tuple[Launch, ...] | Declined:  # fmt: skip
    return attention_decode(op, target, q, k, v, positions, pages, out, q_pe)
