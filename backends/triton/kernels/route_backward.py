"""The gate backward: from the gradients of the weights of the chosen experts to those of the logits, in one kernel.

Formula       p the scores of the chosen, S = sum p + 1e-20; dp = scale (dw - sum dw p / S) / S if normalised, else scale dw; ds is dp at
              the chosen and 0 elsewhere; then ds s (1 - s) for sigmoids, s (ds - sum ds s) for softmax
Layout        logits and dlogits [T, E], ids and dweights [T, k], all row-major. A program holds whole tokens
Accumulation  float32, sums over the chosen in the order of slots, over experts in the order of the reduction tree; divisions IEEE
Compared to   numpy_ref within the bound of `testing.bounds_backward`; floor: one read of the logits and one write
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.moe import RouteBackward
from ..arithmetic import exp, sigmoid
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two
from .route import LARGEST


@triton.jit
def route_backward_kernel(LOGITS, IDS, DWEIGHTS, DLOGITS, tokens, scale, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
                          SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens) & (expert < EXPERTS)
    logits = tl.load(LOGITS + token * EXPERTS + expert, mask=inside, other=float("-inf") if SOFTMAX else 0.0)
    if SOFTMAX:
        largest = tl.where(token < tokens, tl.max(logits, axis=1)[:, None], 0.0)
        terms = tl.where(inside, exp(logits - largest), 0.0)
        scores = tl.div_rn(terms, tl.broadcast_to(tl.sum(terms, axis=1)[:, None], (ROWS, WIDTH)))
    else:
        scores = sigmoid(logits)
    total = tl.full((ROWS, 1), 1e-20, tl.float32)
    along = tl.zeros((ROWS, 1), tl.float32)
    if NORMALIZE:
        for slot in range(TOP_K):
            chosen = tl.load(IDS + token * TOP_K + slot, mask=token < tokens, other=-1).to(tl.int32)
            dw = tl.load(DWEIGHTS + token * TOP_K + slot, mask=token < tokens, other=0.0) * scale
            p = tl.sum(tl.where(expert == chosen, scores, 0.0), axis=1)[:, None]
            total += p
            along += dw * p
        along = tl.div_rn(along, total)
    ds = tl.zeros((ROWS, WIDTH), tl.float32)
    for slot in range(TOP_K):
        chosen = tl.load(IDS + token * TOP_K + slot, mask=token < tokens, other=-1).to(tl.int32)
        dp = tl.load(DWEIGHTS + token * TOP_K + slot, mask=token < tokens, other=0.0) * scale
        if NORMALIZE:
            dp = tl.div_rn(dp - along, total)
        ds = tl.where(expert == chosen, dp, ds)
    dlogits = (ds - tl.sum(ds * scores, axis=1)[:, None]) * scores if SOFTMAX else ds * (scores * (1.0 - scores))
    tl.store(DLOGITS + token * EXPERTS + expert, dlogits, mask=inside)


@kernel(RouteBackward)
def route_backward(op: RouteBackward, target: Target, logits: Slot, ids: Slot, dweights: Slot, dlogits: Slot) -> Launch | Declined:
    (tokens, experts), width = logits.shape, power_of_two(logits.shape[1])
    if width > LARGEST:
        return Declined(f"{experts} experts, expected at most {LARGEST}")
    rows = min(4, max(1, 2048 // width))
    return Launch(
        route_backward_kernel,
        grid=(ceil_div(tokens, rows),),
        arguments={
            **{"LOGITS": logits, "IDS": ids, "DWEIGHTS": dweights, "DLOGITS": dlogits},
            **{"tokens": tokens, "scale": float(op.scale)},
        },
        constants={
            **{"EXPERTS": experts, "TOP_K": ids.shape[1], "SOFTMAX": op.score == "softmax", "NORMALIZE": op.normalize},
            **{"ROWS": rows, "WIDTH": width},
        },
        num_warps=rows,
    )
