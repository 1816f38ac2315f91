"""`dsc compile --target`: machine code of every kernel that a program needs, beside its IR. And `dsc tune`: tiles measured on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..ir.core import Module
from ..ir.errors import require

FOLDER = "kernels"


def parse_targets(text: str, allow_dequant: bool = False) -> tuple[Any, ...]:
    """`sm_90,gfx942` as targets. `DscError` for an unknown one, and for one without FP8 unless `allow_dequant`."""
    require(find_spec("triton") is not None, "--target needs the package triton: pip install 'dsc[triton]'")
    from ..backends.triton import targets

    found = targets.parse_targets(text)
    targets.require_fp8(found, allow_dequant)
    return found


def compile_kernels(
    module: Module, out: Path, targets: Sequence[Any], on_count: Callable[[int], Callable[[str], None]]
) -> list[dict[str, Any]]:
    """Write `out/kernels/<target>/` for each target, and say per target how many kernels there are, how many were cached, how many spill.

    `on_count` is told how many kernels there are, and gives a function to call with the name of each that is done.
    """
    from ..backends.triton import aot

    jobs = aot.jobs(module, targets)
    compiled = aot.compile_jobs(jobs, on_done=on_count(len(jobs)))
    aot.write(compiled, out / FOLDER)
    found = []
    for target in targets:
        mine = [c for c in compiled if c.job.target is target]
        matrix = sorted({name for c in mine for name in c.facts["matrix"]})
        spilled = sum(c.facts["spill_bytes"] > 0 for c in mine)
        cached = sum(c.cached for c in mine)
        found.append({"target": target.name, "kernels": len(mine), "cached": cached, "spilling": spilled, "matrix": matrix})
    return found


def tune_tiles(module: Module, file: Path, on_done: Callable[[str], None] = lambda key: None) -> tuple[str, list[Any]]:
    """Measure the tiles of the program's products on this machine's GPU, add the fastest to `file`; the GPU's name, what was measured.

    `DscError` where there is no GPU.
    """
    require(find_spec("triton") is not None, "dsc tune needs the package triton: pip install 'dsc[triton]'")
    import torch

    require(torch.cuda.is_available(), "dsc tune measures on a GPU, and there is none here; tiles are chosen by shape and device")
    from ..backends.triton import targets, tune, tuned

    device = torch.cuda.get_device_name(0)
    found = tune.tune(module, targets.this_gpu(), tune.time_on_gpu, on_done)
    tuned.write_tiles(file, device, {m.key: m.best for m in found})
    return device, found
