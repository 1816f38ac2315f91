"""What `dsc calibrate` measures with: dsc's reference backend on a CPU, torch on a GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import backends
from ..ir.core import Op, Value
from ..ir.errors import DscError
from ..ir.ops.attention import Attention, AttentionBackward
from ..ir.ops.elementwise import Add
from ..ir.ops.linalg import Matmul
from ..ir.ops.norm import RmsNorm
from ..ir.types import DType
from .calibrate import Run, Sizes, machine_name


def has_gpu() -> bool:
    """Whether torch finds a GPU. It is not asked where it is not needed: importing it takes seconds."""
    if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
        return False
    import torch

    return torch.cuda.is_available()


class CpuBench:
    """dsc's reference backend. One thread is timed by what it computes, several by the clock on the wall."""

    base = "cpu"
    units = 1
    dtypes: tuple[DType, ...] = (DType.f32, DType.f64, DType.bf16)

    def __init__(self, quick: bool, threads: int = 1) -> None:
        self.name = machine_name()
        self.how = f"wall time with {threads} threads" if threads > 1 else "CPU time of one thread"
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        self.runner = backends.get("numpy")
        squares = ((256, 256, 256), (512, 512, 512)) if quick else ((128, 512, 512), (256, 256, 256), (512, 512, 512), (1024, 1024, 1024))
        wide = ((64, 1024, 1024),) if quick else ((16, 2048, 2048), (64, 2048, 2048), (512, 2048, 2048))
        self.sizes = Sizes(
            squares + wide, 1 << 26 if quick else 1 << 28, (256, 2) if quick else (512, 4), (256, 1024) if quick else (1024, 4096)
        )

    def ready(self, op: Op) -> Run:
        from ..backends.arrays import rounded

        random = np.random.default_rng(0)
        filled: dict[Value, Any] = {}
        for v in op.operands:
            if v not in filled:
                numbers = random.standard_normal(tuple(d if isinstance(d, int) else d.bound for d in v.shape))
                filled[v] = rounded(numbers, v.dtype)
        return lambda: self.runner.evaluate(op, [filled[v] for v in op.operands])

    def copy(self, bytes: int) -> Run:
        source, target = np.ones(bytes, np.uint8), np.zeros(bytes, np.uint8)
        return lambda: np.copyto(target, source)

    def seconds(self, run: Run, least: float) -> float:
        return least_seconds(run, least, self.clock)


class GpuBench:
    """torch, on the GPU or wherever `device` says."""

    base = "h100"
    how = "CUDA events, the L2 cache overwritten between runs"

    def __init__(self, quick: bool, device: str = "cuda") -> None:
        import torch

        self.torch, self.device = torch, torch.device(device)
        self.name, self.units, self.memory = machine_name(), 1, 1e9
        self.dtypes: tuple[DType, ...] = (DType.bf16, DType.f32)
        products = [(64, 7168, 2048), (4096, 7168, 2048), (4096, 4096, 7168)]
        products += [] if quick else [(128, 4096, 7168), (4096, 24576, 1536), (4096, 2112, 7168), (8192, 8192, 8192)]
        self.sizes = Sizes(tuple(products), 1 << 30, (4096, 128), (4096, 7168))
        if self.device.type == "cuda":
            found = torch.cuda.get_device_properties(self.device)
            self.name, self.units, self.memory = str(found.name), int(found.multi_processor_count), float(found.total_memory)

    def ready(self, op: Op) -> Run:
        from ..models.aten.rules import TORCH

        torch = self.torch
        filled = {v: torch.randn(v.shape, device=self.device, dtype=TORCH[v.dtype]) for v in dict.fromkeys(op.operands)}
        given = [filled[v] for v in op.operands]
        attend = torch.nn.functional.scaled_dot_product_attention
        match op:
            case Matmul():
                return lambda: given[0] @ given[1].mT
            case Add():
                return lambda: given[0] + given[1]
            case RmsNorm():
                return lambda: torch.nn.functional.rms_norm(given[0], given[0].shape[-1:], given[1], op.eps)
            case Attention():
                return lambda: attend(*given[:3], is_causal=True)
            case AttentionBackward():
                q, k, v = (x.clone().requires_grad_() for x in given[:3])
                out = attend(q, k, v, is_causal=True)
                return lambda: torch.autograd.grad(out, (q, k, v), given[4], retain_graph=True)
        raise DscError(f"dsc calibrate has no {op.name} in torch")

    def copy(self, bytes: int) -> Run:
        torch = self.torch
        source, target = (torch.ones(bytes, dtype=torch.uint8, device=self.device) for _ in range(2))
        return lambda: target.copy_(source)

    def seconds(self, run: Run, least: float) -> float:
        if self.device.type != "cuda":
            return least_seconds(run, least)
        from ..backends.triton.timing import median_seconds

        return median_seconds(run)


def least_seconds(run: Run, least: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """The least time of a run, of three at least and `least` seconds in all, after one to warm up."""
    run()
    best, spent, runs = float("inf"), 0.0, 0
    while spent < least or runs < 3:
        start = clock()
        run()
        took = clock() - start
        best, spent, runs = min(best, took), spent + took, runs + 1
    return best
