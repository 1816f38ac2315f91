"""Starting a kernel: a `Launch` with the tensors of its slots, on the GPU or in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl

from . import INTERPRET
from .registry import Launch, Slot


def start(launch: Launch, tensor: Callable[[Slot], torch.Tensor]) -> None:
    """Run one launch, with `tensor(slot)` for each of its slots."""
    arguments = {
        name: given if not isinstance(given, Slot) else _address(tensor(given), given) if INTERPRET else _typed(tensor(given), given)
        for name, given in launch.arguments.items()
    }
    if INTERPRET:
        with np.errstate(all="ignore"):
            launch.kernel[launch.grid](**arguments, **launch.constants)
    else:
        launch.kernel[launch.grid](**arguments, **launch.constants, **launch.options)


def _typed(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The tensor in the dtype that the slot's pointer names."""
    return tensor.view(torch.uint8) if slot.pointer == "*u8" and tensor.dtype != torch.uint8 else tensor


def _address(tensor: torch.Tensor, slot: Slot) -> tl.tensor:
    """What the interpreter makes of a tensor. Given a tensor itself it would write all of its storage back, read-only weights too."""
    from triton.runtime.interpreter import TensorHandle

    pointer = tl.str_to_ty(slot.pointer, None)
    return tl.tensor(TensorHandle(np.array([tensor.data_ptr()], np.uint64), pointer), pointer)
