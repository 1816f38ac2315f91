"""Attention, with the scores of one head at a time in memory."""

from __future__ import annotations

import torch

from ....ir.ops import attention as ops
from ..tensors import rounded, widen
from .registry import compute_dtype, torch_op

Tensor = torch.Tensor


@torch_op(ops.Attention)
def attention(op: ops.Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    wide = compute_dtype(op)
    heads, queries, keys = q.shape[-3], q.shape[-2], k.shape[-2]
    shared = heads // k.shape[-3]
    result = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=wide, device=q.device)
    masks = None if mask is None else mask.expand(*q.shape[:-1], keys)
    hidden = torch.ones((queries, keys), dtype=torch.bool, device=q.device).triu(1) if op.causal else None
    for head in range(heads):
        scores = widen(q[..., head, :, :], wide) @ widen(k[..., head // shared, :, :], wide).transpose(-1, -2) * op.scale
        if masks is not None:
            added = masks[..., head, :, :]
            scores = scores.masked_fill(~added, -torch.inf) if added.dtype == torch.bool else scores + widen(added, wide)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        result[..., head, :, :] = weighted(scores, widen(v[..., head // shared, :, :], wide))
    return rounded(result, op.result.dtype)


def weighted(scores: Tensor, v: Tensor) -> Tensor:
    """softmax(scores) v; 0 for a row that is -inf throughout."""
    if not scores.shape[-1]:
        return torch.zeros((*scores.shape[:-1], v.shape[-1]), dtype=v.dtype, device=v.device)
    largest = scores.amax(-1, keepdim=True)
    terms = torch.exp(scores - torch.where(largest == -torch.inf, 0.0, largest))
    total = terms.sum(-1, keepdim=True)
    return terms @ v / torch.where(total == 0, 1.0, total)


@torch_op(ops.AttentionDecode)
def attention_decode(op: ops.AttentionDecode, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    wide = compute_dtype(op)
    batch, heads, _ = q.shape
    kv_heads = k.shape[2]
    grouped = widen(q, wide).reshape(batch, kv_heads, heads // kv_heads, -1)
    scores = torch.einsum("bghd,bngd->bghn", grouped, widen(k, wide)) * op.scale
    unseen = torch.arange(k.shape[1], device=q.device) > positions[:, None]
    scores = scores.masked_fill(unseen[:, None, None, :], -torch.inf)
    result = weighted(scores, widen(v, wide).transpose(1, 2)) if k.shape[1] else torch.zeros_like(grouped[..., : v.shape[-1]])
    return rounded(result.reshape(batch, heads, v.shape[-1]), op.result.dtype)
