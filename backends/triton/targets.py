"""What kernels are compiled for, by name: facts of each architecture that a launch depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...ir.errors import DscError, require


@dataclass(frozen=True)
class Target:
    """An architecture.

    fp8           how its matrix instruction takes E4M3: "ocp" as stored | "fnuz" with bias 8 and no -0, so codes stored as OCP count half
                  (CDNA3) | "none": no such instruction
    units         streaming multiprocessors or compute units of the usual part: how many programs run at once
    tuned         a mapping from what a tile is chosen for to the tile, in place of what tiles.py computes; or None (tune.py)
    instructions  what a matrix product of FP8 becomes there, as it stands in PTX or AMD assembly: compiled kernels are checked for it
    """

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    fp8: Literal["ocp", "fnuz", "none"]
    units: int
    instruction: str
    tuned: Any = field(default=None, compare=False)

    @property
    def binary(self) -> str:
        """The ending of a compiled kernel."""
        return "cubin" if self.backend == "cuda" else "hsaco"

    @property
    def assembly(self) -> str:
        """The ending of a kernel's text form."""
        return "ptx" if self.backend == "cuda" else "amdgcn"


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, "none", 108, ""),
        Target("sm_89", "cuda", 89, 32, "ocp", 128, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3"),
        Target("sm_90", "cuda", 90, 32, "ocp", 132, "wgmma.mma_async.sync.aligned.m64"),
        Target("sm_100", "cuda", 100, 32, "ocp", 148, "tcgen05.mma"),
        Target("sm_120", "cuda", 120, 32, "ocp", 170, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3"),
        Target("gfx942", "hip", "gfx942", 64, "fnuz", 304, "v_mfma_f32_"),
        Target("gfx950", "hip", "gfx950", 64, "ocp", 256, "v_mfma_f32_"),
    )
}

INTERPRETED = TARGETS["sm_90"]
"""Whose tiles the interpreter runs with: what is proven there is what Hopper gets."""


def parse_targets(text: str) -> tuple[Target, ...]:
    """`sm_90,gfx942` as targets. `DscError` lists the known ones."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    require(len(names) > 0, f"no target in {text!r}; known are {', '.join(TARGETS)}")
    for name in names:
        require(name in TARGETS, f"unknown target {name!r}; known are {', '.join(TARGETS)}")
    return tuple(TARGETS[name] for name in dict.fromkeys(names))


def require_fp8(targets: Sequence[Target], allow_dequant: bool) -> None:
    """`DscError` for a target without FP8 matrix instructions, unless dequantising kernels were asked for."""
    for target in targets:
        if target.fp8 == "none" and not allow_dequant:
            raise DscError(f"{target.name} has no FP8 matrix instruction; --allow-dequant compiles kernels that widen FP8 to BF16 first")


def this_gpu() -> Target:
    """The target of the GPU of this machine. `DscError` where it is none of the known ones."""
    import torch

    if torch.version.hip:
        name = torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(0)
        name = f"sm_{major}{minor}"
    require(name in TARGETS, f"this GPU is a {name}; known are {', '.join(TARGETS)}")
    return TARGETS[name]
