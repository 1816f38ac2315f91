"""The operations that a mixture-of-experts model needs and aten lacks, as torch custom ops in the namespace `dsc`.

Each is declared once by its signature, with an implementation in plain torch (any device, any float type) and the shape rule
that meta tensors and `torch.export` use. Gradients are those of the implementation. Exported programs keep the ops whole.
All arithmetic is in float32 and every result is rounded once to its type.

Letters in shapes: B sequences, S positions, T tokens, H width, E experts, k experts per token, R = T*k expert rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Implementation = Callable[..., Any]


def _op(shapes: Implementation) -> Callable[[Implementation], Implementation]:
    """Register the decorated function as `dsc::<its name>`; `shapes` computes empty results of the right type and shape."""

    def register(implementation: Implementation) -> Implementation:
        name = f"dsc::{implementation.__name__}"
        custom = torch.library.custom_op(name, implementation, mutates_args=())
        custom.register_fake(shapes)
        custom.register_autograd(_gradient_of(implementation), setup_context=_save_inputs)
        return custom

    return register


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.constants = [None if tensor else value for value, tensor in zip(inputs, ctx.is_tensor, strict=True)]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def _gradient_of(implementation: Implementation) -> Callable[..., Any]:
    """The backward of an op: differentiate its implementation, run again on the saved inputs."""

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved).detach() if tensor else value for value, tensor in zip(ctx.constants, ctx.is_tensor, strict=True)]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for index in wanted:
                inputs[index].requires_grad_()
            outputs = implementation(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(y, dy) for y, dy in zip(outputs, gradients, strict=True) if y.requires_grad and dy is not None]
            results: list[Tensor | None] = [None] * len(inputs)
            if pairs:
                ys, dys = zip(*pairs, strict=True)
                found = torch.autograd.grad(ys, [inputs[index] for index in wanted], dys, allow_unused=True)
                for index, gradient in zip(wanted, found, strict=True):
                    results[index] = gradient
        return tuple(results)

    return backward


@_op(lambda x, cos, sin, interleaved: torch.empty_like(x))
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of elements by the angle of their position (RoFormer, arXiv 2104.09864, eq. 34).

    x [..., S, heads, D]; cos, sin float32 [S, D/2] or [B, S, D/2] -> like x. Pair i is (2i, 2i+1) if `interleaved`, else
    (i, i + D/2).
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    wide = x.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    result = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return result.to(x.dtype, copy=True)


def _scores(logits: Tensor, score: str) -> Tensor:
    return logits.sigmoid() if score == "sigmoid" else logits.softmax(dim=-1)


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the last axis, largest first, ties to the lower index (torch.topk leaves ties open)."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


@_op(
    lambda logits, bias, top_k, *rest: (
        logits.new_empty((logits.shape[0], top_k), dtype=torch.int32),
        logits.new_empty((logits.shape[0], top_k)),
    )
)
def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token (DeepSeek-V3 report, eq. 12-16; group limit: section 2.1.2, "node-limited").

    logits float32 [T, E], bias float32 [E] or None -> ids int32 [T, k], best first, ties to the lower index, and weights
    float32 [T, k]. Experts are chosen by score + bias inside the `top_groups` of `groups` equal groups with the best sum of
    two ("top2") or best single ("max") biased score. Weights are the scores without bias, divided by their sum + 1e-20 if
    `normalize`, times `scale`.
    """
    scores = _scores(logits, score)
    choice = scores.detach() if bias is None else scores.detach() + bias
    if groups > 1:
        grouped = choice.unflatten(-1, (groups, -1))  # (T, groups, E / groups)
        best = grouped.sort(dim=-1, descending=True).values[..., : 2 if group_score == "top2" else 1].sum(dim=-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, _largest(best, top_groups), True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = _largest(choice, top_k)
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids.int(), weights * scale


@_op(
    lambda x, ids, experts: (
        x.new_empty((ids.numel(), x.shape[1])),
        ids.new_empty((experts,)),
        ids.new_empty((ids.numel(),)),
    )
)
def dispatch(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token once for every expert it chose, sorted by expert.

    x [T, H], ids int32 [T, k] -> rows [T*k, H], counts int32 [experts] (rows of each expert) and order int32 [T*k]: row r is
    token order[r] // k in its slot order[r] % k. Rows of one expert stay in order of (token, slot).
    """
    flat = ids.flatten()
    order = flat.sort(stable=True).indices
    counts = flat.new_zeros(experts).scatter_add(0, flat.long(), torch.ones_like(flat))
    return x[order // ids.shape[1]], counts, order.int()


@_op(lambda rows, order, weights: rows.new_empty((weights.shape[0], rows.shape[1])))
def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's expert rows: the inverse of `dispatch`.

    rows [T*k, H], order int32 [T*k] as `dispatch` gave it, weights float32 [T, k] -> [T, H]: the sum over slots of
    weights[t, slot] * rows[r] with order[r] = t*k + slot.
    """
    by_slot = rows.float()[order.argsort()].unflatten(0, tuple(weights.shape))  # (T, k, H)
    return (by_slot * weights.float().unsqueeze(-1)).sum(dim=1).to(rows.dtype)


@_op(lambda x, w, counts: x.new_empty((x.shape[0], w.shape[1])))
def grouped_matmul(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """Multiply each expert's rows with that expert's weights.

    x [R, K], w [E, N, K], counts int32 [E] with sum R -> [R, N]: row r times the transpose of the weights of its expert.
    """
    groups = x.split(counts.tolist())
    return torch.cat([F.linear(rows.float(), weight.float()) for rows, weight in zip(groups, w, strict=True)]).to(x.dtype)


@_op(lambda gate, up: torch.empty_like(gate))
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element (arXiv 2002.05202, eq. 6). gate, up [...] -> [...]."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@_op(lambda cache, new, positions: torch.empty_like(cache))
def cache_append(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """The cache with one more position of each sequence filled in.

    cache [B, N, ...], new [B, ...], positions int64 [B] in [0, N) -> the cache with [b, positions[b]] = new[b].
    """
    return cache.index_put((torch.arange(cache.shape[0], device=cache.device), positions), new)


@_op(lambda q, k, v, positions, scale: q.new_empty((*q.shape[:2], v.shape[3])))
def attention_decode(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Attention of one new token per sequence over that sequence's cache.

    q [B, heads, Dk], k [B, N, kv heads, Dk], v [B, N, kv heads, Dv], positions int64 [B] -> [B, heads, Dv]. Cache entry j is
    visible if j <= positions[b]. Consecutive heads / kv heads query heads share a key head.
    """
    grouped = q.float().unflatten(1, (k.shape[2], -1))  # (B, kv heads, heads per kv head, Dk)
    logits = torch.einsum("bhgd,bnhd->bhgn", grouped, k.float()) * scale
    visible = torch.arange(k.shape[1], device=k.device) <= positions.unsqueeze(1)  # (B, N)
    probabilities = logits.masked_fill(~visible[:, None, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhgn,bnhd->bhgd", probabilities, v.float()).flatten(1, 2).to(q.dtype)


@_op(lambda logits, ids, sequences, score: logits.new_empty(()))
def balance_loss(logits: Tensor, ids: Tensor, sequences: int, score: str) -> Tensor:
    """The sequence-wise balance loss without its weight alpha (DeepSeek-V3 report, eq. 17-20), averaged over sequences.

    logits float32 [sequences*S, E], ids [sequences*S, k] -> float32 scalar: sum over experts of f_i P_i, where f_i is the
    share of the sequence's tokens that chose expert i, times E / k, and P_i the mean over its tokens of the score of i
    divided by the sum of the token's scores. Perfect balance gives 1.
    """
    experts = logits.shape[1]
    scores = _scores(logits, score)
    share = (scores / scores.sum(dim=-1, keepdim=True)).unflatten(0, (sequences, -1)).mean(dim=1)  # (sequences, E)
    chosen = ids.long().view(sequences, -1)  # (sequences, S*k)
    counts = torch.zeros_like(share).scatter_add(1, chosen, torch.ones_like(chosen, dtype=share.dtype))
    frequency = counts * (experts / chosen.shape[1])  # E / (k S) times the count
    return (frequency * share).sum(dim=1).mean()
