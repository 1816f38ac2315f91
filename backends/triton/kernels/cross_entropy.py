"""Cross entropy: the mean over counted tokens of log sum e^logits - logits[label], the logits read once as they are stored.

Formula       row by row, in blocks of columns: m' = max(m, max x), s' = s e^(m - m') + sum e^(x - m'); loss = log s - (x[label] - m)
              (online normaliser, arXiv 1805.02867, algorithm 3); then one program takes the mean. 0 / 0 gives NaN
Layout        logits [T, V] row-major, labels [T]; the workspace holds the loss of each token
Accumulation  float32 sums, in the order of the reduction tree within a block, then block by block; e^x within 3 ulp
Compared to   numpy_ref within the bound of `testing.bounds`, whose V roundings of the sum cover the at most 10 of each block of rescaling;
              floor: one read of the logits
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.loss import CrossEntropy
from ....ir.types import DType
from ..arithmetic import exp, widen
from ..jit import device
from ..registry import Launch, Slot, kernel
from ..targets import Target
from ..tiles import power_of_two, warps

BLOCK = 4096


@device
def normalizer(row, columns, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of a row, and the sum of e^(x - largest)."""
    largest, total = float("-inf"), 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.where(column < columns, widen(tl.load(row + column, mask=column < columns, other=0.0), FORMAT), float("-inf"))
        larger = tl.maximum(largest, tl.max(x, axis=0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * exp(largest - shift) + tl.sum(exp(x - shift), axis=0)
        largest = larger
    return largest, total


@triton.jit
def cross_entropy_rows_kernel(LOGITS, LABELS, LOSSES, columns, IGNORE: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = LOGITS + token * columns
    label = tl.load(LABELS + token).to(tl.int64)
    loss = 0.0
    if label != IGNORE:
        largest, total = normalizer(row, columns, FORMAT, BLOCK)
        known = (label >= 0) & (label < columns)
        picked = tl.where(known, widen(tl.load(row + label, mask=known, other=0.0), FORMAT), float("nan"))
        loss = tl.log(total) - (picked - largest)
    tl.store(LOSSES + token, loss)


@triton.jit
def cross_entropy_mean_kernel(LOSSES, LABELS, LOSS, tokens, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    counted = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        total += tl.load(LOSSES + token, mask=token < tokens, other=0.0)
        label = tl.load(LABELS + token, mask=token < tokens, other=IGNORE)
        counted += (label != IGNORE).to(tl.int32)
    tl.store(LOSS, tl.div_rn(tl.sum(total, axis=0), tl.sum(counted, axis=0).to(tl.float32)))


@kernel(CrossEntropy)
def cross_entropy(op: CrossEntropy, target: Target, logits: Slot, labels: Slot, loss: Slot) -> tuple[Launch, ...]:
    (tokens, columns), logits = logits.shape, logits.on(target)
    losses = Slot("workspace", 0, DType.f32, (tokens,), (1,))
    block, mean_block = min(BLOCK, power_of_two(columns)), min(BLOCK, power_of_two(tokens))
    return (
        Launch(
            cross_entropy_rows_kernel,
            grid=(tokens,),
            arguments={"LOGITS": logits, "LABELS": labels, "LOSSES": losses, "columns": columns},
            constants={"IGNORE": op.ignore, "FORMAT": logits.format, "BLOCK": block},
            num_warps=warps(block),
        ),
        Launch(
            cross_entropy_mean_kernel,
            grid=(1,),
            arguments={"LOSSES": losses, "LABELS": labels, "LOSS": loss, "tokens": tokens},
            constants={"IGNORE": op.ignore, "BLOCK": mean_block},
            num_warps=warps(mean_block),
            workspace=(losses,),  # here, because without tokens the other launch is left out
        ),
    )
