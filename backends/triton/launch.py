"""Starting a kernel: a `Launch` bound to the tensors of its slots, on a GPU or in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import triton
import triton.language as tl

from ...ir.errors import DscError
from . import INTERPRET
from .aot import Job, job_of
from .registry import Launch, Slot
from .targets import Target

Action: TypeAlias = Callable[[], object]
"""A part of a run, with all that can be worked out beforehand worked out."""

Load: TypeAlias = "Callable[[Job, Any], Any]"
"""From what a kernel's machine code depends on, and the kernel, to what Triton starts (see machine_code.py)."""


class Scratch:
    """Memory for what kernels write down for themselves, such as tensor descriptors. Launches follow each other: one buffer serves all."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def __call__(self, size: int, alignment: int, stream: int | None) -> torch.Tensor:
        """At least `size` bytes, aligned as every allocation is. It grows at the first run, and stays."""
        if size > len(self.buffer):
            self.buffer = torch.empty(size, dtype=torch.uint8, device=self.buffer.device)
        return self.buffer

    def use(self) -> None:
        """Hand it to the launches that follow."""
        if not INTERPRET:
            triton.set_allocator(self)


def bind(launch: Launch, tensor: Callable[[Slot], torch.Tensor], target: Target, op: str, load: Load) -> Action:
    """What starts `launch` with `tensor(slot)` for each of its slots, whose memory must stay where it is.

    On a GPU the action is one call of Triton's launcher with addresses and numbers: nothing is looked up, specialised or allocated.
    """
    if INTERPRET:
        arguments = {k: _address(tensor(v), v) if isinstance(v, Slot) else v for k, v in launch.arguments.items()}
        return partial(_interpret, launch.kernel[launch.grid], {**arguments, **launch.constants})
    numbers = {name: tensor(given).data_ptr() if isinstance(given, Slot) else given for name, given in launch.arguments.items()}
    unaligned = {name for name, given in launch.arguments.items() if isinstance(given, Slot) and numbers[name] % 16}
    for name in unaligned.intersection(launch.described):
        raise DscError(
            f"{name} lies at {numbers[name]:#x}, expected a multiple of 16 bytes: {launch.kernel.__name__} copies it by descriptor"
        )
    code = load(job_of(launch, target, op, unaligned), launch.kernel)
    values = {**numbers, **launch.constants}
    return partial(code[(*launch.grid, 1, 1)[:3]], *(values[name] for name in launch.kernel.arg_names))


def _interpret(kernel: Callable[..., None], arguments: dict[str, Any]) -> None:
    with np.errstate(all="ignore"):
        kernel(**arguments)


def _address(tensor: torch.Tensor, slot: Slot) -> tl.tensor:
    """What the interpreter makes of a tensor. Given a tensor itself it would write all of its storage back, read-only weights too."""
    from triton.runtime.interpreter import TensorHandle

    pointer = tl.str_to_ty(slot.pointer, None)
    return tl.tensor(TensorHandle(np.array([tensor.data_ptr()], np.uint64), pointer), pointer)
