"""SwiGLU: y = silu(gate) * up, element by element.

Layout        gate, up, y alike, contiguous
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
def swiglu_kernel(G, U, Y, size, GATE: tl.constexpr, UP: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = widen(tl.load(G + at, mask=at < size, other=0.0), GATE)
    up = widen(tl.load(U + at, mask=at < size, other=0.0), UP)
    tl.store(Y + at, narrow(silu(gate) * up, FORMAT), mask=at < size)


@kernel(SwiGLU)
def swiglu(op: SwiGLU, target: Target, gate: Slot, up: Slot, y: Slot) -> Launch | Declined:
    if not gate.shape == up.shape == y.shape:
        return Declined(f"operands of shapes {list(gate.shape)} and {list(up.shape)}, expected equal ones")
    return Launch(
        swiglu_kernel,
        grid=(ceil_div(y.size, BLOCK),),
        arguments={"G": gate, "U": up, "Y": y, "size": y.size},
        constants={"GATE": gate.format, "UP": up.format, "FORMAT": y.format, "BLOCK": BLOCK},
        num_warps=warps(BLOCK),
    )
