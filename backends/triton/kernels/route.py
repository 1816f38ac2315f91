"""The gate: scores, biased choice among the best groups, top-k, and the weights of the chosen, in one kernel.

Formula       s = sigmoid(logits) or softmax(logits); experts are chosen by s + bias, weights come from s (DeepSeek-V3 report, equations
              12 to 16); see `ir.ops.moe.Route`
Layout        logits [T, E], bias [E], ids and weights [T, k], all row-major. A program holds whole tokens, experts padded group by group
Accumulation  sums in float32, in the order of the reduction tree; divisions IEEE, e^x within 3 ulp
Compared to   numpy_ref: ids equal wherever scores lie further apart than their error, equal scores by lower index, a NaN before all
              numbers; weights within the bound of `testing.bounds`; floor: one read of the logits
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.moe import Route
from ..arithmetic import bits_of, exp, from_bits, sigmoid
from ..jit import device
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, power_of_two

LARGEST = 4096
"""Experts that one program holds at most, padding included."""

NOTHING = tl.constexpr(-(2**63))
"""Ranks below every expert: what is chosen already, and padding."""
OUTSIDE = tl.constexpr(-(2**31) + 0x7FFFFF)
"""The rank of -infinity."""


@device
def rank_of(x):
    """An int32 that orders as x does: -0 equals 0, and every NaN is above infinity."""
    bits = tl.where(x != x, 0x7FC00000, bits_of(x + 0.0))
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@device
def value_of(rank):
    """The float32 of a rank."""
    return from_bits(tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank))


@device
def placed(rank, place, SIZE: tl.constexpr):
    """An int64 that orders by rank, equals by lower place first."""
    return (rank.to(tl.int64) << 32) | (SIZE - 1 - place).to(tl.int64)


@device
def place_of(best, SIZE: tl.constexpr):
    """The place that `placed` put in."""
    return SIZE - 1 - (best & 0x7FFFFFFF).to(tl.int32)


@device
def in_best_groups(rank, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, EACH: tl.constexpr, PADDED: tl.constexpr,
                   TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr):  # fmt: skip
    """Ranks [ROWS, WIDE * PADDED] with that of -infinity outside each row's TOP_GROUPS best of GROUPS groups of EACH experts."""
    place = tl.arange(0, PADDED)[None, None, :]
    by_group = tl.where(place < EACH, placed(tl.reshape(rank, (ROWS, WIDE, PADDED)), place, PADDED), NOTHING)
    best = tl.max(by_group, axis=2)
    score = value_of((best >> 32).to(tl.int32))
    if TOP2 and EACH > 1:
        second = tl.max(tl.where(by_group == best[:, :, None], NOTHING, by_group), axis=2)
        score = score + value_of((second >> 32).to(tl.int32))
    group = tl.arange(0, WIDE)[None, :]
    rest = tl.where(group < GROUPS, placed(rank_of(score), group, WIDE), NOTHING)
    for _ in range(TOP_GROUPS):
        rest = tl.where(rest == tl.max(rest, axis=1)[:, None], NOTHING, rest)
    kept = tl.broadcast_to((rest == NOTHING)[:, :, None], (ROWS, WIDE, PADDED))
    return tl.where(tl.reshape(kept, (ROWS, WIDE * PADDED)), rank, OUTSIDE)


@triton.jit
def route_kernel(LOGITS, BIAS, IDS, WEIGHTS, tokens, scale,
                 EXPERTS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
                 SOFTMAX: tl.constexpr, BIASED: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr,
                 ROWS: tl.constexpr, WIDE: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    SIZE: tl.constexpr = WIDE * PADDED
    EACH: tl.constexpr = EXPERTS // GROUPS
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, SIZE)[None, :]
    expert = place // PADDED * EACH + place % PADDED
    real = (place // PADDED < GROUPS) & (place % PADDED < EACH)
    logits = tl.load(LOGITS + token * EXPERTS + expert, mask=real & (token < tokens), other=float("-inf") if SOFTMAX else 0.0)
    if SOFTMAX:
        terms = tl.where(real, exp(logits - tl.max(logits, axis=1)[:, None]), 0.0)
        scores = tl.div_rn(terms, tl.broadcast_to(tl.sum(terms, axis=1)[:, None], (ROWS, SIZE)))
    else:
        scores = sigmoid(logits)
    choice = scores
    if BIASED:
        choice = scores + tl.load(BIAS + expert, mask=real, other=0.0)
    rank = rank_of(choice)
    if TOP_GROUPS < GROUPS:
        rank = in_best_groups(rank, ROWS, GROUPS, WIDE, EACH, PADDED, TOP_GROUPS, TOP2)
    rest = tl.where(real, placed(rank, place, SIZE), NOTHING)
    slot = tl.arange(0, SLOTS)[None, :]
    ids = tl.zeros((ROWS, SLOTS), tl.int32)
    weights = tl.zeros((ROWS, SLOTS), tl.float32)
    for i in range(TOP_K):
        chosen = place_of(tl.max(rest, axis=1), SIZE)[:, None]
        here = place == chosen
        weight = tl.sum(tl.where(here, scores, 0.0), axis=1)[:, None]
        rest = tl.where(here, NOTHING, rest)
        ids = tl.where(slot == i, chosen // PADDED * EACH + chosen % PADDED, ids)
        weights = tl.where(slot == i, weight, weights)
    if NORMALIZE:
        total = tl.sum(weights, axis=1)[:, None] + 1e-20
        weights = tl.div_rn(weights, tl.broadcast_to(total, (ROWS, SLOTS)))
    at = token * TOP_K + slot
    inside = (token < tokens) & (slot < TOP_K)
    tl.store(IDS + at, ids, mask=inside)
    tl.store(WEIGHTS + at, weights * scale, mask=inside)


@kernel(Route)
def route(op: Route, target: Target, logits: Slot, bias: Slot | None, ids: Slot, weights: Slot) -> Launch | Declined:
    tokens, experts = logits.shape
    wide, padded = power_of_two(op.groups), power_of_two(experts // op.groups)
    if wide * padded > LARGEST:
        return Declined(f"{experts} experts in {op.groups} groups take {wide * padded} places, expected at most {LARGEST}")
    rows = min(4, max(1, 2048 // (wide * padded)))
    return Launch(
        route_kernel,
        grid=(ceil_div(tokens, rows),),
        arguments={
            **{"LOGITS": logits, "BIAS": logits if bias is None else bias, "IDS": ids, "WEIGHTS": weights},
            **{"tokens": tokens, "scale": float(op.scale)},
        },
        constants={
            **{"EXPERTS": experts, "GROUPS": op.groups, "TOP_GROUPS": op.top_groups, "TOP_K": op.top_k},
            **{"SOFTMAX": op.score == "softmax", "BIASED": bias is not None, "TOP2": op.group_score == "top2"},
            **{"NORMALIZE": op.normalize, "ROWS": rows, "WIDE": wide, "PADDED": padded, "SLOTS": power_of_two(op.top_k)},
        },
        num_warps=rows,
    )
