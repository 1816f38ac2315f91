"""Attention backward: dq, dk and dv by flash style loops; probabilities are computed again, neither they nor scores are ever in memory.

Formula       with P = softmax(q k^T * scale) and D the sum of dout * out over Dv: dS = P (dout v^T - D), dq = scale dS k,
              dk = scale dS^T q, dv = P^T dout (FlashAttention-2, arXiv 2307.08691, section 2.3.2). Two kernels, every sum in one program
              and in one order, so that results do not depend on which program is first (no atomics):
              q   per block of queries over the keys that they see. dq is linear in P, so the online softmax of the forward pass serves,
                  dq being rescaled as its result is; it leaves log2 of the sum of 2^scores, and D. Nothing is kept from the forward pass
              kv  per block of keys over the queries that see them, of all query heads that share them; products are of [keys, queries]
Layout        q [B, Hq, S, Dk], k [B, Hkv, L, Dk], v [B, Hkv, L, Dv], out and dout [B, Hq, S, Dv] and all results of any strides but the
              last, which is 1. Parts of heads that lie apart (MLA) are products of their own, and so are those of a width that is no power
              of two where that is less. The workspace holds two float32 for each query, and of packed documents where each token's lies
Accumulation  as in attention: float32, P and dS multiplied as BF16 parts (`flash.py`); results are rounded once
Compared to   numpy_ref within the bound of `testing.bounds_backward`; floor: seven products of the lower triangle at the matrix rate
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.attention import AttentionBackward
from ....ir.ops.fused import MlaAttentionBackward
from ....ir.types import DType
from ..arithmetic import narrow
from ..jit import device
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two
from .attention import LARGEST, seen_keys
from .flash import (
    LOG2_E,
    backward_tile,
    documents,
    heads_of,
    multiplicand,
    parts_of,
    product,
    product_of_parts,
    strides_of,
    unmasked,
    unsupported,
)


@device
def rows_of(base, token, stride, inside, COUNT: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr):
    """COUNT elements of the rows `token`, as multiplicands; 0 past WIDTH and in rows that are not inside."""
    column = tl.arange(0, COUNT)
    at = base + token.to(tl.int64)[:, None] * stride + column[None, :]
    return multiplicand(tl.load(at, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0), FORMAT)


@device
def visit_keys(start, end, q_head, q_tail, dout, delta, k_base, pe_base, v_base, largest, total, dq_head, dq_tail, query, first_key,
               stop_key, keys, k_token, pe_token, v_token, c, DK: tl.constexpr, PE: tl.constexpr, DV: tl.constexpr, HEAD: tl.constexpr,
               TAIL: tl.constexpr, VALUE: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
               FORMAT: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Running maximum, sum and dq (unnormalised, unscaled) with keys `start` up to `end`; where MASKED, some may be hidden."""
    for first in range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        known = key < keys
        k_head = rows_of(k_base, key, k_token, known, HEAD, DK, FORMAT)
        v = rows_of(v_base, key, v_token, known, VALUE, DV, FORMAT)
        scores = product(q_head, tl.trans(k_head), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        k_tail = k_head
        if TAIL:
            k_tail = rows_of(pe_base, key, pe_token, known, TAIL, PE, FORMAT)
            scores = product(q_tail, tl.trans(k_tail), scores)
        if MASKED:
            seen = known[None, :] & (key[None, :] <= query[:, None]) if CAUSAL else known[None, :]
            if DOCUMENTS:
                seen = seen & (key[None, :] >= first_key[:, None]) & (key[None, :] < stop_key[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        dp = product(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        larger = tl.maximum(largest, tl.max(scores, axis=1) * c)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(tl.fma(scores, c, -shift[:, None]))
        rescale = tl.exp2(largest - shift)
        total = total * rescale + tl.sum(p, axis=1)
        ds = p * (dp - delta[:, None])
        dq_head = product_of_parts(ds, k_head, dq_head * rescale[:, None], FORMAT, PARTS)
        if TAIL:
            dq_tail = product_of_parts(ds, k_tail, dq_tail * rescale[:, None], FORMAT, PARTS)
        largest = larger
    return largest, total, dq_head, dq_tail


@triton.jit
def attention_backward_q_kernel(Q, K, V, OUT, DOUT, DQ, Q_PE, K_PE, DQ_PE, FIRST, STOP, LOG_OF, DELTA_OF, queries, keys, q_batch, q_head,
                                q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token, dout_batch,
                                dout_head, dout_token, q_pe_batch, q_pe_head, q_pe_token, k_pe_batch, k_pe_head, k_pe_token, dq_batch,
                                dq_head, dq_token, dq_pe_batch, dq_pe_head, dq_pe_token, c, scale, HEADS: tl.constexpr,
                                SHARED: tl.constexpr, DK: tl.constexpr, PE: tl.constexpr, FROM: tl.constexpr, DV: tl.constexpr,
                                HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
                                FORMAT: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    at_head = tl.program_id(1).to(tl.int64)
    batch, head = at_head // HEADS, at_head % HEADS
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = query < queries
    q_base = Q + batch * q_batch + head * q_head
    k_base, v_base = K + batch * k_batch + head // SHARED * k_head, V + batch * v_batch + head // SHARED * v_head
    pe_base = K_PE + FROM + batch * k_pe_batch + head // SHARED * k_pe_head
    q = rows_of(q_base, query, q_token, inside, HEAD, DK, FORMAT)
    dq = tl.zeros((BLOCK_M, HEAD), tl.float32)
    rest, dq_rest = q, dq
    if TAIL:
        rest = rows_of(Q_PE + FROM + batch * q_pe_batch + head * q_pe_head, query, q_pe_token, inside, TAIL, PE, FORMAT)
        dq_rest = tl.zeros((BLOCK_M, TAIL), tl.float32)
    dout = rows_of(DOUT + batch * dout_batch + head * dout_head, query, dout_token, inside, VALUE, DV, FORMAT)
    out = rows_of(OUT + batch * out_batch + head * out_head, query, out_token, inside, VALUE, DV, FORMAT)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first_key, stop_key, start, whole, end = seen_keys(FIRST, STOP, block, query, queries, keys, CAUSAL, DOCUMENTS, BLOCK_M, BLOCK_N)
    largest, total, dq, dq_rest = visit_keys(start, whole, q, rest, dout, delta, k_base, pe_base, v_base, largest, total, dq, dq_rest,
                                             query, first_key, stop_key, keys, k_token, k_pe_token, v_token, c, DK, PE, DV, HEAD, TAIL,
                                             VALUE, False, CAUSAL, DOCUMENTS, FORMAT, PARTS, BLOCK_M, BLOCK_N)  # fmt: skip
    largest, total, dq, dq_rest = visit_keys(whole, end, q, rest, dout, delta, k_base, pe_base, v_base, largest, total, dq, dq_rest,
                                             query, first_key, stop_key, keys, k_token, k_pe_token, v_token, c, DK, PE, DV, HEAD, TAIL,
                                             VALUE, True, CAUSAL, DOCUMENTS, FORMAT, PARTS, BLOCK_M, BLOCK_N)  # fmt: skip
    unseen = total == 0.0
    factor = tl.div_rn(scale, tl.where(unseen, 1.0, total))[:, None]
    store(DQ + batch * dq_batch + head * dq_head, query, dq_token, inside, dq * factor, HEAD, DK, FORMAT)
    if TAIL:
        dq_pe = DQ_PE + FROM + batch * dq_pe_batch + head * dq_pe_head
        store(dq_pe, query, dq_pe_token, inside, dq_rest * factor, TAIL, PE, FORMAT)
    row = at_head * queries + query
    tl.store(LOG_OF + row, tl.where(unseen, float("inf"), largest + tl.log2(total)), mask=inside)
    tl.store(DELTA_OF + row, delta, mask=inside)


@device
def store(base, token, stride, inside, x, COUNT: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr):
    """WIDTH of the COUNT elements of x in each of the rows `token`, rounded."""
    column = tl.arange(0, COUNT)
    at = base + token.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, narrow(x, FORMAT), mask=inside[:, None] & (column < WIDTH)[None, :])


@device
def visit_queries(start, end, k_head, k_tail, v, dk_head, dk_tail, dv, q_base, pe_base, dout_base, log_of, delta_of, FIRST, STOP, key,
                  queries, q_token, pe_token, dout_token, c, DK: tl.constexpr, PE: tl.constexpr, DV: tl.constexpr, HEAD: tl.constexpr,
                  TAIL: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, FORMAT: tl.constexpr,
                  PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dk (unscaled) and dv with queries `start` up to `end`."""
    for first in range(start, end, BLOCK_M):
        query = first + tl.arange(0, BLOCK_M)
        inside = query < queries
        q_head = rows_of(q_base, query, q_token, inside, HEAD, DK, FORMAT)
        dout = rows_of(dout_base, query, dout_token, inside, VALUE, DV, FORMAT)
        scores = product(k_head, tl.trans(q_head), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
        q_tail = q_head
        if TAIL:
            q_tail = rows_of(pe_base, query, pe_token, inside, TAIL, PE, FORMAT)
            scores = product(k_tail, tl.trans(q_tail), scores)
        p = tl.exp2(tl.fma(scores, c, -tl.load(log_of + query, mask=inside, other=float("inf"))[None, :]))
        if CAUSAL:
            p = tl.where(key[:, None] <= query[None, :], p, 0.0)
        if DOCUMENTS:
            first_key = tl.load(FIRST + query, mask=inside, other=0)[None, :]
            stop_key = tl.load(STOP + query, mask=inside, other=0)[None, :]
            p = tl.where((key[:, None] >= first_key) & (key[:, None] < stop_key), p, 0.0)
        dv = product_of_parts(p, dout, dv, FORMAT, PARTS)
        dp = product(v, tl.trans(dout), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
        ds = p * (dp - tl.load(delta_of + query, mask=inside, other=0.0)[None, :])
        dk_head = product_of_parts(ds, q_head, dk_head, FORMAT, PARTS)
        if TAIL:
            dk_tail = product_of_parts(ds, q_tail, dk_tail, FORMAT, PARTS)
    return dk_head, dk_tail, dv


@triton.jit
def attention_backward_kv_kernel(Q, K, V, DOUT, DK_OUT, DV_OUT, Q_PE, K_PE, DK_PE, FIRST, STOP, LOG_OF, DELTA_OF, queries, keys, q_batch,
                                 q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, dout_batch, dout_head, dout_token,
                                 q_pe_batch, q_pe_head, q_pe_token, k_pe_batch, k_pe_head, k_pe_token, dk_batch, dk_head, dk_token,
                                 dk_pe_batch, dk_pe_head, dk_pe_token, dv_batch, dv_head, dv_token, c, scale,
                                 HEADS: tl.constexpr, SHARED: tl.constexpr, DK: tl.constexpr, PE: tl.constexpr, FROM: tl.constexpr,
                                 DV: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr,
                                 DOCUMENTS: tl.constexpr, FORMAT: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
                                 BLOCK_N: tl.constexpr):  # fmt: skip
    block, at_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = at_head // (HEADS // SHARED), at_head % (HEADS // SHARED)
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    known = key < keys
    k_base = K + batch * k_batch + kv_head * k_head
    k = rows_of(k_base, key, k_token, known, HEAD, DK, FORMAT)
    dk = tl.zeros((BLOCK_N, HEAD), tl.float32)
    rest, dk_rest = k, dk
    if TAIL:
        rest = rows_of(K_PE + FROM + batch * k_pe_batch + kv_head * k_pe_head, key, k_pe_token, known, TAIL, PE, FORMAT)
        dk_rest = tl.zeros((BLOCK_N, TAIL), tl.float32)
    v = rows_of(V + batch * v_batch + kv_head * v_head, key, v_token, known, VALUE, DV, FORMAT)
    dv = tl.zeros((BLOCK_N, VALUE), tl.float32)
    start, end = block * BLOCK_N // BLOCK_M * BLOCK_M if CAUSAL else 0, queries
    if DOCUMENTS:
        start = tl.maximum(start, tl.min(tl.load(FIRST + key, mask=known, other=keys), axis=0))
        end = tl.max(tl.load(STOP + key, mask=known, other=0), axis=0)
    for i in range(SHARED):
        head = kv_head * SHARED + i
        row = batch * HEADS + head
        q_base, dout_base = Q + batch * q_batch + head * q_head, DOUT + batch * dout_batch + head * dout_head
        pe_base = Q_PE + FROM + batch * q_pe_batch + head * q_pe_head
        log_of, delta_of = LOG_OF + row * queries, DELTA_OF + row * queries
        dk, dk_rest, dv = visit_queries(start, end, k, rest, v, dk, dk_rest, dv, q_base, pe_base, dout_base, log_of, delta_of, FIRST,
                                        STOP, key, queries, q_token, q_pe_token, dout_token, c, DK, PE, DV, HEAD, TAIL, VALUE, CAUSAL,
                                        DOCUMENTS, FORMAT, PARTS, BLOCK_M, BLOCK_N)  # fmt: skip
    store(DK_OUT + batch * dk_batch + kv_head * dk_head, key, dk_token, known, dk * scale, HEAD, DK, FORMAT)
    if TAIL:
        dk_pe = DK_PE + FROM + batch * dk_pe_batch + kv_head * dk_pe_head
        store(dk_pe, key, dk_pe_token, known, dk_rest * scale, TAIL, PE, FORMAT)
    store(DV_OUT + batch * dv_batch + kv_head * dv_head, key, dv_token, known, dv, VALUE, DV, FORMAT)


@kernel(AttentionBackward)
def attention_backward(op: AttentionBackward, target: Target, q: Slot, k: Slot, v: Slot, out: Slot, dout: Slot, mask: Slot | None,
                       dq: Slot, dk: Slot, dv: Slot, q_pe: Slot | None = None, k_pe: Slot | None = None, dq_pe: Slot | None = None,
                       dk_pe: Slot | None = None) -> tuple[Launch, ...] | Declined:  # fmt: skip
    if reason := unmasked(mask) or unsupported(q, k, v, out, dout, q_pe, k_pe):
        return Declined(reason)
    if op.scale <= 0:
        return Declined(f"scale = {op.scale:g}, expected a positive one")
    if len(q.shape) > 4 or max(q.shape[-1], v.shape[-1]) > LARGEST // 2:
        return Declined(f"q {list(q.shape)} and v {list(v.shape)}, expected at most 4 axes and heads of at most {LARGEST // 2}")
    batch, heads, queries, _ = (1, *q.shape)[-4:]
    kv_heads, keys = k.shape[-3], k.shape[-2]
    shared, parts, value = heads // kv_heads, heads_of(q, k, q_pe, k_pe), max(16, power_of_two(v.shape[-1]))
    dq_pe, dk_pe = dq_pe or dq, dk_pe or dk
    log_of, delta_of = (Slot("workspace", i, DType.f32, (batch * heads, queries), (queries, 1)) for i in (0, 1))
    finding, found = documents(mask, keys, 2, absent=q)
    given = {**found, "Q": q, "K": k, "V": v, "DOUT": dout, "LOG_OF": log_of, "DELTA_OF": delta_of}
    given |= {"Q_PE": parts.q_pe, "K_PE": parts.k_pe}
    numbers = {"queries": queries, "keys": keys, "c": op.scale * LOG2_E, "scale": float(op.scale)}
    strides = strides_of(q=q, k=k, v=v, dout=dout, q_pe=parts.q_pe, k_pe=parts.k_pe)
    sizes = {
        **{"HEADS": heads, "SHARED": shared, "DV": v.shape[-1], **parts.constants},
        **{"VALUE": value, "CAUSAL": op.causal, "DOCUMENTS": mask is not None, "FORMAT": q.format},
    }
    by_query, by_key = (backward_tile(parts.width + value, q.dtype, target, by_key=b) for b in (False, True))
    return (
        *finding,
        Launch(
            attention_backward_q_kernel,
            grid=(ceil_div(queries, by_query.m), batch * heads),
            arguments={
                **{**given, **numbers, **strides, **strides_of(out=out, dq=dq, dq_pe=dq_pe)},
                **{"OUT": out, "DQ": dq, "DQ_PE": dq_pe},
            },
            constants={**sizes, "PARTS": parts_of(q.dtype, keys), "BLOCK_M": by_query.m, "BLOCK_N": by_query.n},
            num_warps=by_query.num_warps,
            num_stages=by_query.num_stages,
            fusion=True,
        ),
        Launch(
            attention_backward_kv_kernel,
            grid=(ceil_div(keys, by_key.n), batch * kv_heads),
            arguments={
                **{**given, **numbers, **strides, **strides_of(dk=dk, dk_pe=dk_pe, dv=dv)},
                **{"DK_OUT": dk, "DK_PE": dk_pe, "DV_OUT": dv},
            },
            constants={**sizes, "PARTS": parts_of(q.dtype, queries * shared), "BLOCK_M": by_key.m, "BLOCK_N": by_key.n},
            num_warps=by_key.num_warps,
            num_stages=by_key.num_stages,
            fusion=True,
            workspace=(log_of, delta_of),  # here, because without queries the other launch is left out
        ),
    )


@kernel(MlaAttentionBackward)
def mla_attention_backward(op: MlaAttentionBackward, target: Target, q: Slot, k: Slot, v: Slot, out: Slot, dout: Slot, mask: Slot | None,
                           q_pe: Slot, k_pe: Slot, dq: Slot, dk: Slot, dv: Slot, dq_pe: Slot,
                           dk_pe: Slot) -> tuple[Launch, ...] | Declined:  # fmt: skip
    return attention_backward(op, target, q, k, v, out, dout, mask, dq, dk, dv, q_pe, k_pe, dq_pe, dk_pe)
