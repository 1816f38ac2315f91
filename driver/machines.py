"""What `dsc devices` shows: clusters with the source of every figure, and published tables against the cost model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from ..hardware.cluster import Cluster, cluster, clusters
from ..hardware.device import device, devices
from ..hardware.figures import Figure
from ..hardware.tables import Entry, entries
from .ui import table

Described = tuple[Any, str]


def describe_clusters() -> Described:
    """The shipped clusters, and the devices that no cluster has."""
    found = [(name, cluster(name)) for name in clusters()]
    value = [_summary(name, c) for name, c in found]
    head = ("cluster", "what it is", "device", "domain", "FP8", "memory", "inside", "between", "price")
    rows = []
    for name, c in found:
        figures = (c.device.peak.f8, c.device.peak.bandwidth, c.intra.bandwidth, c.inter.bandwidth, c.price)
        rows.append((name, c.about, c.device.name, f"{c.node}", *map(_short, figures)))
    others = [name for name in devices() if device(name).name not in {c.device.name for _, c in found}]
    text = table(head, rows, left=3)
    return value, f"{text}\ndevices without a cluster: {', '.join(others)}" if others else text


def _summary(name: str, c: Cluster) -> dict[str, Any]:
    known = [figure.provenance for _, figure in c.figures()]
    return {
        "name": name,
        "title": c.name,
        "about": c.about,
        "device": c.device.name,
        "domain": c.node,
        "features": sorted(c.features),
        "provenance": {kind: known.count(kind) for kind in ("measured", "published", "assumed")},
    }


def describe_cluster(name: str) -> Described:
    """One cluster: every figure with its range and source."""
    c = cluster(name)
    figures = list(c.figures())
    value = _summary(name, c) | {"figures": {key: _record(figure) for key, figure in figures}}
    sources: dict[tuple[str, str], int] = {}
    for _, figure in figures:
        sources.setdefault((figure.provenance, figure.source), len(sources) + 1)
    rows = [(key, str(figure), figure.provenance, f"[{sources[figure.provenance, figure.source]}]") for key, figure in figures]
    asked = f"; follows {', '.join(sorted(c.features))}" if c.features else ""
    head = f"{c.name}: {c.about or c.device.name}; {c.node} GPUs in a domain, {c.device.units} units in a GPU{asked}"
    notes = "\n".join(f"[{number}] {source}" for (_, source), number in sources.items())
    return value, f"{head}\n{table(('figure', 'value (range)', 'known', 'source'), rows, left=4)}\n{notes}"


def _record(figure: Figure) -> dict[str, Any]:
    return {key: getattr(figure, key) for key in ("mid", "low", "high", "unit", "provenance", "source")}


def _short(figure: Figure) -> str:
    return str(figure).partition(" (")[0]


def describe_tables(name: str) -> Described:
    """Each row of the published tables, and the errors of each table."""
    c = cluster(name)
    found = [(title, list(rows)) for title, rows in groupby(entries(c), key=lambda entry: entry.table)]
    value = {
        "cluster": c.name,
        "tables": [{"table": title, "errors": _errors(rows), "rows": [_row(entry) for entry in rows]} for title, rows in found],
    }
    return value, "\n\n".join(_tables(c, found))


def _row(entry: Entry) -> dict[str, Any]:
    return {key: getattr(entry, key) for key in ("label", "unit", "published", "predicted", "error")}


def _errors(rows: list[Entry]) -> dict[str, float]:
    sizes = [abs(entry.error) for entry in rows]
    return {"mean": sum(sizes) / len(sizes), "largest": max(sizes)}


def _tables(c: Cluster, found: list[tuple[str, list[Entry]]]) -> Iterator[str]:
    for title, rows in found:
        cells = [(e.label, f"{e.published:,.0f} {e.unit}", f"{e.predicted:,.0f} {e.unit}", f"{e.error:+.1%}") for e in rows]
        yield table((title, "published", "predicted", "time off by"), cells)
    summary = [(title, str(len(rows)), *(f"{e:.1%}" for e in _errors(rows).values())) for title, rows in found]
    yield table((f"on {c.name}", "rows", "mean error", "largest"), summary)
