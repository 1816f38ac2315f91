"""SwiGLU: y = silu(gate) * up, element by element, times the weight of the row where there is one.

Layout        gate, up, y alike, contiguous; a float32 weight for each `columns` elements
Accumulation  none; float32, the division of silu IEEE, e^x within 3 ulp; y is rounded once
Compared to   numpy_ref within the bound of `testing.bounds`; floor: two reads and one write
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.elementwise import SwiGLU
from ..arithmetic import narrow, silu, widen
from ..registry import Declined, Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, warps

BLOCK = 2048


@triton.jit
def swiglu_kernel(G, U, WEIGHTS, Y, size, columns, GATE: tl.constexpr, UP: tl.constexpr, FORMAT: tl.constexpr, WEIGHTED: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = widen(tl.load(G + at, mask=at < size, other=0.0), GATE)
    up = widen(tl.load(U + at, mask=at < size, other=0.0), UP)
    y = silu(gate) * up
    if WEIGHTED:
        y = y * tl.load(WEIGHTS + at // columns, mask=at < size, other=0.0)
    tl.store(Y + at, narrow(y, FORMAT), mask=at < size)


@kernel(SwiGLU)
def swiglu(op: SwiGLU, target: Target, gate: Slot, up: Slot, weight: Slot | None, y: Slot) -> Launch | Declined:
    if not gate.shape == up.shape == y.shape:
        return Declined(f"operands of shapes {list(gate.shape)} and {list(up.shape)}, expected equal ones")
    return Launch(
        swiglu_kernel,
        grid=(ceil_div(y.size, BLOCK),),
        arguments={"G": gate, "U": up, "WEIGHTS": weight or gate, "Y": y, "size": y.size, "columns": max(1, *y.shape[-1:])},
        constants={"GATE": gate.format, "UP": up.format, "FORMAT": y.format, "WEIGHTED": op.weight is not None, "BLOCK": BLOCK},
        num_warps=warps(BLOCK),
    )
