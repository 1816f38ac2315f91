"""Published tables of kernels and exchanges, and what the cost model says of each of their rows.

The tables are data, `tables/*.toml`, each with its source. They are about components: no time of a step and no GPU-hours are among them.
`fit.py` takes the coefficients of the H800 from some of them; a row is predicted by the same code that costs an op of a program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..ir.core import Op, Phase, Value
from ..ir.ops.attention import Attention, AttentionBackward
from ..ir.ops.quant import GroupedScaledMatmul, ScaledMatmul, scale_shape
from ..ir.routing import Routing
from ..ir.types import DType, Tensor
from .cluster import Cluster
from .figures import provenance, read_toml
from .kernels import Compute
from .links import Group, exchanged, forwarded
from .links import seconds as transfer

TABLES = Path(__file__).with_name("tables")


@dataclass(frozen=True)
class Entry:
    """One row of a table: what was published, and what is predicted, in `unit`."""

    table: str
    label: str
    unit: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted time by published time, minus 1; a rate that is too high is a time that is too short."""
        slow = self.predicted / self.published if self.unit == "us" else self.published / self.predicted
        return slow - 1


@cache
def table(name: str) -> Mapping[str, Any]:
    """A published table: `products.deepgemm`."""
    file, _, key = name.partition(".")
    path = TABLES / f"{file}.toml"
    found: Mapping[str, Any] = read_toml(path)[key]
    provenance(found, f"{path}: {key}")
    return found


def entries(cluster: Cluster) -> Iterator[Entry]:
    """Every row of every table."""
    for of in (
        products,
        later_products,
        beside_products,
        wgrads,
        attentions,
        decodes,
        norms,
        casts,
        dispatches,
        low_latency,
        beside_exchanges,
    ):
        yield from of(cluster)


def product(layout: str, m: int, n: int, k: int, groups: int, phase: Phase = Phase.F) -> Op:
    """The op of a row: `groups` products [m, k] x [k, n] in FP8."""
    weight = (128, 128) if phase is Phase.F else (1, 128)
    out = DType.bf16 if phase is Phase.F else DType.f32
    if layout == "dense":
        return ScaledMatmul(*_codes(m, k), *_codes(n, k, tile=weight), b_tile=weight, out=out, phase=phase)
    x = _codes(groups, m, k) if layout == "masked" else _codes(groups * m, k)
    return GroupedScaledMatmul(*x, *_codes(groups, n, k, tile=(128, 128)), Value(Tensor(DType.i32, (groups,)), "counts"))


def _codes(*shape: int, tile: tuple[int, int] = (1, 128)) -> tuple[Value, Value]:
    return Value(Tensor(DType.f8e4m3, shape), "x"), Value(Tensor(DType.f32, scale_shape(shape, tile)), "s")


@cache
def _ops(name: str) -> tuple[tuple[Mapping[str, Any], Op], ...]:
    """The rows of a table of products with their ops."""
    path, _, part = name.partition(":")
    found = table(path)
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found[part or "rows"]]
    phase = Phase.W if part == "wgrad" else Phase.F

    def made(row: Mapping[str, Any]) -> Op:
        layout = row.get("layout", "dense" if row["groups"] == 1 else "contiguous")
        return product(layout, row["m"], row["n"], row["k"], row["groups"], phase)

    return tuple((row, made(row)) for row in rows)


def products(cluster: Cluster, column: str = "tflops") -> Iterator[Entry]:
    """DeepGEMM alone."""
    compute = Compute(cluster.device)
    for row, op in _ops("products.deepgemm"):
        name = f"{row['layout']} {row['groups']} x [{row['m']}, {row['n']}, {row['k']}]"
        title = "DeepGEMM" if column == "tflops" else "DeepGEMM, later"
        yield Entry(title, name, "TFLOP/s", row[column], op.flops() / compute.cost(op).seconds / 1e12)


def later_products(cluster: Cluster) -> Iterator[Entry]:
    """DeepGEMM alone, a month after its release."""
    yield from products(cluster, "later")


def beside(cluster: Cluster, name: str) -> tuple[Compute, float]:
    """Computing on the units that a table's kernels had beside communication, and how much slower that is."""
    return Compute(cluster.device, table(name)["units"]), cluster.comm.compute_slowdown.mid


def beside_products(cluster: Cluster, part: str = "forward") -> Iterator[Entry]:
    """Products of the training profile."""
    compute, slowdown = beside(cluster, "products.profile")
    for row, op in _ops(f"products.profile:{part}"):
        took = compute.cost(op).seconds * slowdown
        yield Entry("profile: products" if part == "forward" else "profile: wgrad", row["layer"], "us", row["microseconds"], took * 1e6)


def wgrads(cluster: Cluster) -> Iterator[Entry]:
    """Weight gradients of the training profile."""
    yield from beside_products(cluster, "wgrad")


def attentions(cluster: Cluster) -> Iterator[Entry]:
    """Attention of the training profile."""
    compute, slowdown = beside(cluster, "kernels.attention")
    for name, tokens, heads, key, value, took in table("kernels.attention")["rows"]:
        q, v = (Value(Tensor(DType.bf16, (1, heads, tokens, width)), "x") for width in (key, value))
        op: Op = Attention(q, q, v, causal=True) if name == "forward" else AttentionBackward(q, q, v, v, v, causal=True)
        yield Entry("profile: attention", name, "us", took, compute.cost(op).seconds * slowdown * 1e6)


def decodes(cluster: Cluster) -> Iterator[Entry]:
    """FlashMLA at either end of its roofline."""
    peak, kernels = cluster.device.peak, cluster.device.kernels
    ends = {"memory": peak.bandwidth.mid * kernels.cache.mid / 1e9, "matrix": peak.bf16.mid * kernels.decode.mid / 1e12}
    for bound, rate, unit in table("kernels.decode")["rows"]:
        yield Entry("FlashMLA", f"bound by {bound}", unit, rate, ends[bound])


def norms(cluster: Cluster) -> Iterator[Entry]:
    """RMSNorm of the training profile, all of its kernels."""
    found = table("kernels.norms")
    per_token = sum(found["widths"]) * sum(per for _, per, _ in found["rows"])
    yield _along_rows(cluster, "profile: RMSNorm", f"{sum(row[2] for row in found['rows'])} kernels", found, per_token)


def casts(cluster: Cluster) -> Iterator[Entry]:
    """Casts and turns of the training profile. No coefficient is taken from them, since their bytes are counted by the recipe."""
    found = table("kernels.casts")
    per_token = sum(elements * per for _, elements, per in found["rows"])
    yield _along_rows(cluster, "profile: FP8 casts", "276 kernels", found, per_token)


def _along_rows(cluster: Cluster, title: str, label: str, found: Mapping[str, Any], bytes_per_token: float) -> Entry:
    moved = found["tokens"] * found["layers"] * bytes_per_token
    reached = cluster.device.peak.bandwidth.mid * cluster.device.kernels.rows.mid
    took = moved / reached * cluster.comm.compute_slowdown.mid
    return Entry(title, label, "us", found["microseconds"], took * 1e6)


def logical_bytes(tokens: float, nodes: float, row: float) -> float:
    """What DeepEP's tests call the bytes of an exchange: a copy of each token for each distinct node, its own among them."""
    return tokens * nodes * row


ROWS = {"fp8": 7168 * (1 + 4 / 128), "bf16": 7168 * 2.0}
"""Bytes of a row of 7168: FP8 codes with a float32 scale for each 128, or BF16."""


def dispatches(cluster: Cluster) -> Iterator[Entry]:
    """DeepEP's kernels for training and prefill: logical GB/s over the network, or over NVLink on one node."""
    found = table("exchange.normal")
    for row in (dict(zip(found["columns"], row, strict=True)) for row in found["rows"]):
        ranks = Group(max(1, row["ranks"] // 8), min(8, row["ranks"]))
        groups = ranks.nodes
        routing = Routing(found["experts"], found["top_k"], groups, min(found["top_groups"], groups), "max")
        places = ranks.size if row["link"] == "intra" else ranks.nodes
        for column, precision in (("dispatch_later", "fp8"), ("combine_later", "bf16")):
            took, _ = transfer(cluster, forwarded(routing, ranks, found["tokens"], ROWS[precision]))
            rate = logical_bytes(found["tokens"], routing.distinct(places), ROWS[precision]) / took / 1e9
            yield Entry("DeepEP", f"{column.removesuffix('_later')} on {ranks.size} ranks", "GB/s", row[column], rate)


def low_latency(cluster: Cluster) -> Iterator[Entry]:
    """DeepEP's kernels for decoding."""
    found = table("exchange.low-latency")
    for row in (dict(zip(found["columns"], row, strict=True)) for row in found["rows"]):
        ranks = Group(max(1, row["ranks"] // 8), min(8, row["ranks"]))
        for kind in ("dispatch", "combine"):
            moving, _ = transfer(cluster, exchanged(ranks, found["selections"] * found[f"{kind}_bytes"]))
            took = moving + cluster.comm.notify.mid
            yield Entry("DeepEP, low latency", f"{kind} on {ranks.size} ranks", "us", row[kind], took * 1e6)


def beside_exchanges(cluster: Cluster) -> Iterator[Entry]:
    """Exchanges of the training profile."""
    routing = Routing(256, 8, 8, 4, "random")
    for kernel, precision, took in table("exchange.beside")["rows"]:
        alone, _ = transfer(cluster, forwarded(routing, Group(8, 8), 4096, ROWS[precision]))
        yield Entry("profile: exchanges", kernel, "us", took, alone * cluster.comm.slowdown.mid * 1e6)
