"""Training losses."""

from __future__ import annotations

import torch

from ....ir.ops import loss as ops
from .registry import torch_op

Tensor = torch.Tensor


@torch_op(ops.CrossEntropy, operands="wide")
def cross_entropy(op: ops.CrossEntropy, logits: Tensor, labels: Tensor) -> Tensor:
    counted = labels != op.ignore
    chosen = torch.where(counted, labels, 0).to(torch.int64)
    losses = -torch.log_softmax(logits, -1).gather(1, chosen[:, None])[:, 0]
    return torch.where(counted, losses, 0.0).sum() / counted.sum()


@torch_op(ops.BalanceLoss, operands="wide")
def balance_loss(op: ops.BalanceLoss, logits: Tensor, ids: Tensor) -> Tensor:
    tokens, experts = logits.shape
    length = tokens // op.sequences
    scores = 1 / (1 + torch.exp(-logits)) if op.score == "sigmoid" else torch.softmax(logits, -1)
    scores = scores / scores.sum(-1, keepdim=True)
    mean = scores.reshape(op.sequences, length, experts).mean(1)
    sequence = torch.arange(tokens, device=ids.device) // max(1, length)
    slots = (ids.to(torch.int64) + (sequence * experts)[:, None]).reshape(-1)
    ones = torch.ones_like(slots, dtype=logits.dtype)
    chosen = torch.zeros(op.sequences * experts, dtype=logits.dtype, device=ids.device).index_add(0, slots, ones)
    frequency = chosen.reshape(op.sequences, experts) * (experts / max(1, ids.shape[1] * length))
    return (frequency * mean).sum(-1).mean()
