"""The Triton backend: GPU kernels, proven without a GPU in Triton's interpreter and compiled ahead of time for any target.

Whether kernels are compiled or interpreted is decided here, once for the process and before Triton is imported: interpreted where
there is no GPU, unless the environment says otherwise (`TRITON_INTERPRET=0` or `1`). The two exclude each other in one process.
"""

from __future__ import annotations

import os
import sys


def _decide() -> bool:
    given = os.environ.get("TRITON_INTERPRET")
    if given is None:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = given = "1"
    interpret = (given or "0").lower() in ("1", "true", "yes", "on", "y")
    if interpret and "triton" in sys.modules:
        _interpret_library()
    return interpret


def _interpret_library() -> None:
    """Make the functions of Triton's own library interpretable, where another package (torch.export does) imported Triton before.

    They are decorated when Triton is imported, and a compiled one cannot be called from an interpreted kernel. Methods of tensors
    (`x.sum()`) stay as they are: kernels call the functions (`tl.sum(x)`).
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    made: dict[int, InterpretedFunction] = {}
    for holder in (tl, tl.standard, tl.math, tl.random):
        for name, member in list(vars(holder).items()):
            if isinstance(member, JITFunction):
                setattr(holder, name, made.setdefault(id(member), InterpretedFunction(member.fn)))


INTERPRET = _decide()
"""Whether kernels run in Triton's interpreter, on the CPU."""
