"""Measuring links: all-gathers of several sizes between the processes that torchrun started, fitted by latency and bandwidth."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..hardware.links import gathered, group
from ..ir.mesh import Mesh
from .ranks import started_by_torchrun

if TYPE_CHECKING:
    from ..distributed.world import Program

SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 22)
"""Bytes that each rank contributes."""


@dataclass(frozen=True)
class Leg:
    """A measured link: bytes a second per rank and direction, and seconds before the first byte."""

    bandwidth: float
    latency: float


def measured_links(step: Callable[[str], None], runs: int = 7) -> dict[str, Leg]:
    """`intra` between the ranks of this machine, `inter` between machines, where there are several; nothing without torchrun."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if not started_by_torchrun() or ranks < 2:
        return {}
    from ..distributed.torch_world import TorchWorld

    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    mesh = Mesh(dp=ranks, ep=ranks, node=local)
    axes = {leg: axis for leg, axis in (("intra", "ep.local"), ("inter", "ep.node")) if mesh.size(axis) > 1}
    found = {}
    with TorchWorld(mesh) as world:
        for leg, axis in axes.items():
            step(f"links, {leg}")
            times = world.run(_timed(axis, mesh.size(axis), runs))
            members = group(tuple(range(mesh.size(axis))), mesh.size(axis))
            found[leg] = fitted_leg([(gathered(members, bytes).intra, took) for bytes, took in times], gathered(members, 1).steps)
    return found


def _timed(axis: str, size: int, runs: int) -> Program[list[tuple[int, float]]]:
    from ..distributed.world import Gather

    found = []
    for bytes in SIZES:
        part = np.zeros(bytes, np.uint8)
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            yield Gather(axis, size, part, op=f"all_gather of {bytes} B", site="dsc calibrate")
            times.append(time.perf_counter() - start)
        found.append((bytes, min(times)))
    return found


def fitted_leg(times: Sequence[tuple[float, float]], steps: float) -> Leg:
    """The link whose `steps` latencies and bytes by bandwidth are nearest to (bytes, seconds), in relative squares."""
    rows = np.array([(1 / took, bytes / took) for bytes, took in times])
    start, per_byte = map(float, np.linalg.lstsq(rows, np.ones(len(rows)))[0])
    return Leg(1 / per_byte if per_byte > 0 else float(rows[:, 1].max()), max(0.0, start) / max(1.0, steps))
