"""SwiGLU backward: with s = sigmoid(gate), dgate = dy up s (1 + gate (1 - s)) and dup = dy gate s, element by element.

Layout        gate, up, dy, dgate, dup alike, contiguous
Accumulation  none; float32, the division of the sigmoid IEEE, e^x within 3 ulp; each result is rounded once
Compared to   numpy_ref within the bound of `testing.bounds_backward`; floor: three reads and two writes
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ir.ops.elementwise import SwiGLUBackward
from ..arithmetic import narrow, sigmoid, widen
from ..registry import Launch, Slot, kernel
from ..targets import Target
from ..tiles import ceil_div, warps

BLOCK = 2048


@triton.jit
def swiglu_backward_kernel(G, U, DY, DG, DU, size, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = widen(tl.load(G + at, mask=at < size, other=0.0), FORMAT)
    up = widen(tl.load(U + at, mask=at < size, other=0.0), FORMAT)
    dy = widen(tl.load(DY + at, mask=at < size, other=0.0), FORMAT)
    s = sigmoid(gate)
    tl.store(DG + at, narrow(dy * up * s * (gate * (1.0 - s) + 1.0), FORMAT), mask=at < size)
    tl.store(DU + at, narrow(dy * (gate * s), FORMAT), mask=at < size)


@kernel(SwiGLUBackward)
def swiglu_backward(op: SwiGLUBackward, target: Target, gate: Slot, up: Slot, dy: Slot, dgate: Slot, dup: Slot) -> Launch:
    return Launch(
        swiglu_backward_kernel,
        grid=(ceil_div(gate.size, BLOCK),),
        arguments={"G": gate, "U": up, "DY": dy, "DG": dgate, "DU": dup, "size": gate.size},
        constants={"FORMAT": gate.format, "BLOCK": BLOCK},
        num_warps=warps(BLOCK),
    )
