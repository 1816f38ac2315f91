"""How functions that kernels call are decorated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

from . import INTERPRET


def device(function: Callable[..., Any]) -> Any:
    """`triton.jit` for a function that is called from kernels only.

    When interpreting, the plain rewritten function: Triton's own wrapper looks through all of `triton.language` at every call, to
    prepare what the kernel that is running has prepared already, which takes most of the time of a kernel made of small functions.
    """
    if not INTERPRET:
        return triton.jit(function)
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function).rewrite()
