"""Training losses."""

from __future__ import annotations

import torch

from ....ir.ops import loss as ops
from .moe import scores_of
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
    length = len(logits) // op.sequences
    scores = scores_of(op, logits)
    scores = scores / scores.sum(-1, keepdim=True)
    mean = scores.reshape(op.sequences, length, -1).mean(1)
    return (frequency(op, logits, ids) * mean).sum(-1).mean()


def frequency(op: ops.BalanceLoss | ops.BalanceLossBackward, logits: Tensor, ids: Tensor) -> Tensor:
    """f [sequences, E]: how often each expert was chosen, 1 where it is the average."""
    tokens, experts = logits.shape
    length = tokens // op.sequences
    sequence = torch.arange(tokens, device=ids.device) // max(1, length)
    slots = (ids.to(torch.int64) + (sequence * experts)[:, None]).reshape(-1)
    ones = torch.ones_like(slots, dtype=logits.dtype)
    chosen = torch.zeros(op.sequences * experts, dtype=logits.dtype, device=ids.device).index_add(0, slots, ones)
    return chosen.reshape(op.sequences, experts) * (experts / max(1, ids.shape[1] * length))


@torch_op(ops.CrossEntropyBackward, operands="wide")
def cross_entropy_backward(op: ops.CrossEntropyBackward, logits: Tensor, labels: Tensor, dloss: Tensor) -> Tensor:
    counted = labels != op.ignore
    chosen = torch.where(counted, labels, 0).to(torch.int64)
    p = torch.softmax(logits, -1)
    p = p.scatter_add(1, chosen[:, None], torch.full_like(p[:, :1], -1.0))
    return torch.where(counted[:, None], p * (dloss / counted.sum().clamp(min=1)), 0.0)


@torch_op(ops.BalanceLossBackward, operands="wide")
def balance_loss_backward(op: ops.BalanceLossBackward, logits: Tensor, ids: Tensor, dloss: Tensor) -> Tensor:
    """By the scores where they are sigmoids; softmax scores add up to 1 already."""
    scores = scores_of(op, logits)
    total = scores.sum(-1, keepdim=True)
    p = scores / total
    each = frequency(op, logits, ids) * (dloss / max(1, len(logits)))
    dp = each.repeat_interleave(len(logits) // op.sequences, 0)
    dp = dp - (dp * p).sum(-1, keepdim=True)
    return dp / total * (scores * (1 - scores)) if op.score == "sigmoid" else dp * p
