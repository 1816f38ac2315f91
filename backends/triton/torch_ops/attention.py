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
    heads, keys = q.shape[-3], k.shape[-2]
    shared = heads // k.shape[-3]
    result = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=wide, device=q.device)
    masks = None if mask is None else _kept(mask, keys).expand(*q.shape[:-1], keys)
    for head in range(heads):
        scores = widen(q[..., head, :, :], wide) @ widen(k[..., head // shared, :, :], wide).transpose(-1, -2) * op.scale
        scores = _masked(scores, None if masks is None else masks[..., head, :, :], op.causal)
        result[..., head, :, :] = weighted(scores, widen(v[..., head // shared, :, :], wide))
    return rounded(result, op.result.dtype)


def weighted(scores: Tensor, v: Tensor) -> Tensor:
    """softmax(scores) v; 0 for a row that is -inf throughout."""
    if not scores.shape[-1]:
        return torch.zeros((*scores.shape[:-1], v.shape[-1]), dtype=v.dtype, device=v.device)
    return _probabilities(scores) @ v


@torch_op(ops.AttentionDecode)
def attention_decode(op: ops.AttentionDecode, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, pages: Tensor | None = None) -> Tensor:
    wide = compute_dtype(op)
    if pages is not None:
        k, v = (x[pages.clamp(0, len(x) - 1).long()].flatten(1, 2) for x in (k, v))
    batch, heads, _ = q.shape
    kv_heads = k.shape[2]
    grouped = widen(q, wide).reshape(batch, kv_heads, heads // kv_heads, -1)
    scores = torch.einsum("bghd,bngd->bghn", grouped, widen(k, wide)) * op.scale
    unseen = torch.arange(k.shape[1], device=q.device) > positions[:, None]
    scores = scores.masked_fill(unseen[:, None, None, :], -torch.inf)
    result = weighted(scores, widen(v, wide).transpose(1, 2)) if k.shape[1] else torch.zeros_like(grouped[..., : v.shape[-1]])
    return rounded(result.reshape(batch, heads, v.shape[-1]), op.result.dtype)


@torch_op(ops.AttentionBackward)
def attention_backward(
    op: ops.AttentionBackward, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = compute_dtype(op)
    heads, keys = q.shape[-3], k.shape[-2]
    shared = heads // k.shape[-3]
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (q, k, v))
    masks = None if mask is None else _kept(mask, keys).expand(*q.shape[:-1], keys)
    for head in range(heads):
        query, key, value = (widen(x[..., h, :, :], wide) for x, h in ((q, head), (k, head // shared), (v, head // shared)))
        result, gradient = (widen(x[..., head, :, :], wide) for x in (out, dout))
        scores = _masked(query @ key.transpose(-1, -2) * op.scale, None if masks is None else masks[..., head, :, :], op.causal)
        p = _probabilities(scores)
        ds = (gradient @ value.transpose(-1, -2) - (gradient * result).sum(-1, keepdim=True)) * p * op.scale
        dq[..., head, :, :] = ds @ key
        dk[..., head // shared, :, :] += ds.transpose(-1, -2) @ query
        dv[..., head // shared, :, :] += p.transpose(-1, -2) @ gradient
    return tuple(rounded(x, value.dtype) for x, value in zip((dq, dk, dv), op.results, strict=True))  # type: ignore[return-value]


def _kept(mask: Tensor, tokens: int) -> Tensor:
    """The mask; of boundaries of documents, which tokens lie in the same one."""
    if mask.dtype == torch.bool or mask.dtype.is_floating_point:
        return mask
    document = torch.searchsorted(mask, torch.arange(tokens, device=mask.device, dtype=mask.dtype), right=True)
    inside = (document > 0) & (document < len(mask))
    return (document[:, None] == document) & inside


def _masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + widen(mask, scores.dtype)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1), -torch.inf)
    return scores


def _probabilities(scores: Tensor) -> Tensor:
    """softmax; 0 for a row that is -inf throughout."""
    largest = scores.amax(-1, keepdim=True)
    terms = torch.exp(scores - torch.where(largest == -torch.inf, 0.0, largest))
    total = terms.sum(-1, keepdim=True)
    return terms / torch.where(total == 0, 1.0, total)
