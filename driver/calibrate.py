"""Measuring this machine: what its matrix products, memory, attention, kernels along rows, launches and links do, as a cluster file.

On a CPU dsc's reference backend is measured, since it is what runs there; on a GPU torch's kernels. A product's time is fitted by the form
that the cost model has (`hardware/products.py`), so what is written is its coefficients, and each shape's error is said. A time is the
least of several runs: other work on the machine only makes them longer.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from math import exp, log
from pathlib import Path
from typing import Any, Protocol

from ..hardware.cluster import Cluster, cluster
from ..hardware.description import described
from ..hardware.figures import Figure, spoken
from ..hardware.fit import nearest
from ..hardware.kernels import Compute
from ..ir.core import Op, Value
from ..ir.ops.attention import Attention, AttentionBackward
from ..ir.ops.elementwise import Add
from ..ir.ops.linalg import Matmul
from ..ir.ops.norm import RmsNorm
from ..ir.types import DType, Tensor
from .artifact import replacing, versions
from .link_times import Leg, measured_links
from .ui import table

ROUNDS = 5
LIMIT = 45.0
"""Seconds after which no further round is begun, after the first."""
VECTOR = 1 << 18
"""Elements that are added where the rate of units along vectors is measured: as few as a cache holds."""

Step = Callable[[str], None]
Run = Callable[[], Any]


class Bench(Protocol):
    """What can be measured of a machine. All of it is ready at once, so that rounds can be made over it."""

    name: str
    how: str
    """How it takes the time."""
    base: str
    """The cluster that says what is not measured."""
    units: int
    memory: float
    dtypes: tuple[DType, ...]
    sizes: Sizes

    def ready(self, op: Op) -> Run:
        """The op, its operands filled."""
        ...

    def copy(self, bytes: int) -> Run:
        """Copying so many bytes."""
        ...

    def seconds(self, run: Run, least: float) -> float:
        """The time of one run, from runs of `least` seconds in all."""
        ...


@dataclass(frozen=True)
class Sizes:
    """What is measured: products (m, n, k), bytes copied, tokens and heads of attention, tokens and width of a norm."""

    products: tuple[tuple[int, int, int], ...]
    copied: int
    attention: tuple[int, int]
    norm: tuple[int, int]


@dataclass(frozen=True)
class Product:
    """One measured product against the coefficients that were fitted to all."""

    dtype: str
    shape: tuple[int, int, int]
    seconds: float
    predicted: float


@dataclass
class Calibrated:
    """A measured machine."""

    name: str
    when: str
    source: str
    cluster: Cluster
    products: list[Product] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, Figure]:
        """What was measured."""
        return {key: figure for key, figure in self.cluster.figures() if figure.provenance == "measured"}

    def record(self) -> dict[str, Any]:
        """For --json."""
        return {
            "name": self.name,
            "measured": self.when,
            "source": self.source,
            "figures": {key: {"value": figure.mid, "unit": figure.unit} for key, figure in self.figures.items()},
            "products": [vars(p) for p in self.products],
        }

    def text(self) -> str:
        """For a person."""
        rows = [(key, spoken(figure.mid, figure.unit)) for key, figure in self.figures.items()]
        rate = [(2 * p.shape[0] * p.shape[1] * p.shape[2] / p.seconds, p) for p in self.products]
        shapes = [(p.dtype, "x".join(map(str, p.shape)), spoken(r, "FLOP/s"), f"{p.predicted / p.seconds - 1:+.0%}") for r, p in rate]
        head = self.source
        products = table(("products", "m x n x k", "measured", "fit off by"), shapes, left=2)
        return f"{head}\n{products}\n\n{table(('figure', 'measured'), rows)}"

    def write(self, file: Path) -> None:
        """The cluster as a file that `cluster()` reads, written beside its place and renamed."""
        with replacing(file) as stream:
            stream.write(described(self.cluster).encode())


def calibrated(name: str | None, quick: bool, threads: int, step: Step) -> Calibrated:
    """Measure the machine that this process runs on; under torchrun its links too, on all ranks."""
    bench = this_machine(quick, threads)
    return measured(bench, name or bench.name, 0.05 if quick else 0.5, measured_links, step)


def this_machine(quick: bool, threads: int) -> Bench:
    """The GPU if there is one, else the CPU."""
    from .benches import CpuBench, GpuBench, has_gpu

    return GpuBench(quick) if has_gpu() else CpuBench(quick, threads)


def measured(bench: Bench, name: str, least: float, links: Callable[[Step], dict[str, Leg]], step: Step) -> Calibrated:
    """What `bench` shows, on the base of what it does not."""
    when = date.today().isoformat()
    products = [
        (dtype, shape, Matmul(value(dtype, shape[0], shape[2]), value(dtype, shape[1], shape[2]), transpose_b=True))
        for dtype in bench.dtypes
        for shape in bench.sizes.products
    ]
    others = _others(bench)
    times = _times(bench, {op: str(shape) for _, shape, op in products} | {op: key for key, op in others.items()}, least, step)
    values = {"device.peak.bandwidth": 2 * bench.sizes.copied / times[None], "device.chip.memory": bench.memory}
    base = cluster(bench.base)
    base = replace(base, name=name, about=f"measured {when}", device=replace(base.device, name=name, units=bench.units))
    values |= {f"device.peak.{d.name}": max(op.flops() / times[op] for other, _, op in products if other is d) for d in bench.dtypes}
    values |= _launches(others, times)
    values |= _coefficients(base.with_figures(values), [(op, times[op]) for _, _, op in products])
    values |= _shares(base.with_figures(values), others, times)
    measured_legs = links(step)
    for leg, link in measured_legs.items():
        values |= {f"{leg}.bandwidth": link.bandwidth, f"{leg}.latency": link.latency, f"{leg}.efficiency": 1.0}
    how = f"{bench.how}{', links by wall time' if measured_legs else ''}{_busy()}"
    source = f"dsc calibrate, {when}: {bench.name}, {how}, {', '.join(f'{k} {v}' for k, v in versions().items())}"
    made = _signed(base.with_figures(values), values, source)
    cost = Compute(made.device).cost
    return Calibrated(name, when, source, made, [Product(str(d), shape, times[op], cost(op).seconds) for d, shape, op in products])


def _times(bench: Bench, ops: dict[Op, str], least: float, step: Step) -> dict[Op | None, float]:
    """The least time of each op, and under None of a copy, over several rounds: other work on the machine comes and goes."""
    ready: dict[Op | None, tuple[str, Run]] = {None: ("memory", bench.copy(bench.sizes.copied))}
    ready |= {op: (title, bench.ready(op)) for op, title in ops.items()}
    found: dict[Op | None, float] = dict.fromkeys(ready, float("inf"))
    begun = time.monotonic()
    for done in range(ROUNDS):
        if done and (time.monotonic() - begun) * (done + 1) / done > LIMIT:
            break
        for key, (title, run) in ready.items():
            step(title)
            found[key] = min(found[key], bench.seconds(run, least / ROUNDS))
    return found


def _busy() -> str:
    """What else runs here, if it leaves less than the machine."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f" (busy: load {load:.1f})" if load > 1.5 * cores() else ""


def value(dtype: DType, *shape: int) -> Value:
    """An operand."""
    return Value(Tensor(dtype, shape), "x")


def _others(bench: Bench) -> dict[str, Op]:
    """What is measured beside products, by what it shows."""
    dtype, sizes = bench.dtypes[0], bench.sizes
    tokens, heads = sizes.attention
    q, v = value(dtype, 1, heads, tokens, 192), value(dtype, 1, heads, tokens, 128)
    return {
        "launch": Add(value(dtype, 1), value(dtype, 1)),
        "vector": Add(value(dtype, VECTOR), value(dtype, VECTOR)),
        "attention": Attention(q, q, v, causal=True),
        "attention_backward": AttentionBackward(q, q, v, v, v, causal=True),
        "rows": RmsNorm(value(dtype, *sizes.norm), value(dtype, sizes.norm[1]), 1e-6),
    }


def _launches(others: dict[str, Op], times: dict[Op | None, float]) -> dict[str, float]:
    """Launching, and the best rate along vectors that was seen."""
    launch = times[others["launch"]]
    rates = [op.flops() / max(1e-9, times[op] - launch) for op in (others["vector"], others["rows"])]
    return {"device.kernels.launch": launch, "device.peak.vector": max(rates)}


def _coefficients(start: Cluster, times: Sequence[tuple[Op, float]]) -> dict[str, float]:
    """Those that bring the cost of every product nearest to its time."""
    keys = ("device.kernels.matrix", "device.kernels.ramp", "device.kernels.memory")

    def chosen(logs: Sequence[float]) -> dict[str, float]:
        return dict(zip(keys, (min(1.0, exp(logs[0])), exp(logs[1]), min(1.0, exp(logs[2]))), strict=True))

    def loss(logs: Sequence[float]) -> float:
        cost = Compute(start.with_figures(chosen(logs)).device).cost
        return sum(log(cost(op).seconds / took) ** 2 for op, took in times)

    return chosen(nearest(loss, [log(0.9), log(1e-6), log(0.8)], rounds=200))


def _shares(start: Cluster, others: dict[str, Op], times: dict[Op | None, float]) -> dict[str, float]:
    """Of the peaks, what attention and kernels along rows reach."""
    launch = times[others["launch"]]
    compute = Compute(start.with_figures({"device.kernels.attention": 1.0, "device.kernels.attention_backward": 1.0}).device)
    floors = {name: compute.cost(others[name]).seconds for name in ("attention", "attention_backward")}
    floors["rows"] = compute.moved(others["rows"]) / start.device.peak.bandwidth.mid
    return {f"device.kernels.{name}": min(1.0, floor / max(1e-9, times[others[name]] - launch)) for name, floor in floors.items()}


def _signed(made: Cluster, values: dict[str, float], source: str) -> Cluster:
    """The cluster whose measured figures say so. On a CPU what was not measured of FP8 and FP16 is as BF16, since all are widened."""
    signed = {key: replace(figure, provenance="measured", source=source) for key, figure in made.figures() if key in values}
    if made.device.fp8 == "exact":
        as_bf16 = replace(signed["device.peak.bf16"], provenance="assumed", source="as bf16, which is widened as it is")
        signed |= {"device.peak.f8": as_bf16, "device.peak.f16": as_bf16}
    return made.replaced(signed)


def machine_name() -> str:
    """The processor of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
