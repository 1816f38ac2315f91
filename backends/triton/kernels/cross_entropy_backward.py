"""Cross entropy backward: dlogits = dloss (softmax(logits) - onehot(label)) / n, logits and their gradient as they are stored.

Formula       count  dloss / n, n being how many tokens count
              rows   the largest logit and the sum of a row as `cross_entropy` finds them, then each block of columns once more
Layout        logits and dlogits [T, V] row-major, labels [T]; the workspace holds dloss / n. Nothing is [T, V] in float32
Accumulation  float32 sums, in the order of the reduction tree within a block, then block by block; e^x within 3 ulp, divisions IEEE
Compared to   numpy_ref within the bound of `testing.bounds_backward`; floor: one read of the logits (the second finds them in the cache)
              and one write
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.loss import CrossEntropyBackward
from ....ir.types import DType
from ..arithmetic import exp, narrow, widen
from ..registry import Launch, Slot, kernel
from ..targets import Target
from ..tiles import power_of_two, warps
from .cross_entropy import BLOCK, normalizer


@triton.jit
def cross_entropy_backward_count_kernel(LABELS, DLOSS, EACH, tokens, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    counted = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        counted += (tl.load(LABELS + token, mask=token < tokens, other=IGNORE) != IGNORE).to(tl.int32)
    tl.store(EACH, tl.div_rn(tl.load(DLOSS), tl.maximum(tl.sum(counted, axis=0), 1).to(tl.float32)))


@triton.jit
def cross_entropy_backward_rows_kernel(LOGITS, LABELS, EACH, DLOGITS, columns, IGNORE: tl.constexpr, FORMAT: tl.constexpr,
                                       BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, to = LOGITS + token * columns, DLOGITS + token * columns
    label = tl.load(LABELS + token).to(tl.int64)
    each, largest, total = 0.0, 0.0, 1.0
    if label != IGNORE:
        largest, total = normalizer(row, columns, FORMAT, BLOCK)
        each = tl.where((label >= 0) & (label < columns), tl.load(EACH), float("nan"))
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.zeros((BLOCK,), tl.float32)
        if label != IGNORE:
            x = exp(widen(tl.load(row + column, mask=column < columns, other=0.0), FORMAT) - largest)
            x = (tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + total) - tl.where(column == label, 1.0, 0.0)) * each
        tl.store(to + column, narrow(x, FORMAT), mask=column < columns)


@kernel(CrossEntropyBackward)
def cross_entropy_backward(op: CrossEntropyBackward, target: Target, logits: Slot, labels: Slot, dloss: Slot,
                           dlogits: Slot) -> tuple[Launch, ...]:  # fmt: skip
    (tokens, columns), logits, dlogits = logits.shape, logits.on(target), dlogits.on(target)
    each = Slot("workspace", 0, DType.f32, (1,), (1,))
    block, count_block = min(BLOCK, power_of_two(columns)), min(BLOCK, power_of_two(tokens))
    return (
        Launch(
            cross_entropy_backward_count_kernel,
            grid=(1,),
            arguments={"LABELS": labels, "DLOSS": dloss, "EACH": each, "tokens": tokens},
            constants={"IGNORE": op.ignore, "BLOCK": count_block},
            num_warps=warps(count_block),
            workspace=(each,),
        ),
        Launch(
            cross_entropy_backward_rows_kernel,
            grid=(tokens,),
            arguments={"LOGITS": logits, "LABELS": labels, "EACH": each, "DLOGITS": dlogits, "columns": columns},
            constants={"IGNORE": op.ignore, "FORMAT": logits.format, "BLOCK": block},
            num_warps=warps(block),
        ),
    )
