"""A cluster as the text of a file that `cluster()` reads back: complete, without a base."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields

from ..ir.quantization import Accumulation
from .cluster import PRICE, Cluster
from .figures import Figure


def described(cluster: Cluster) -> str:
    """TOML. Figures have six digits; those of a table that share a source are signed together."""
    device = cluster.device
    lines = [f"name = {_text(cluster.name)}", f"about = {_text(cluster.about)}", f"node = {cluster.node}"]
    if cluster.features:
        lines.append(f"features = [{', '.join(map(_text, sorted(cluster.features)))}]")
    tables: dict[str, dict[str, Figure]] = {}
    for key, figure in cluster.figures():
        part, _, name = key.rpartition(".")
        tables.setdefault(part, {})[name] = figure
    order = ["intra", "inter", "comm", PRICE.partition(".")[0]]
    for part in order:
        lines += ["", f"[{part}]", *_group(tables.pop(part))]
    lines += ["", "[device]", *(f"{key} = {_text(getattr(device, key))}" for key in ("name", "architecture", "fp8"))]
    for part, group in tables.items():
        units = [f"units = {device.units}"] if part == "device.chip" else []
        lines += ["", f"[{part}]", *units, *_group(group)]
    for name, model in device.accumulations.items():
        source = device.sources[name]
        changed = [
            (f.name, getattr(model, f.name)) for f in fields(Accumulation) if f.default is MISSING or getattr(model, f.name) != f.default
        ]
        given = [f"{key} = {_text(v) if isinstance(v, str) else v}" for key, v in changed]
        lines += ["", f"[device.accumulation.{_text(name)}]", *given, *_signature(source.provenance, source.source)]
    return "\n".join(lines) + "\n"


def _group(figures: Mapping[str, Figure]) -> list[str]:
    (known, source), _ = Counter((f.provenance, f.source) for f in figures.values()).most_common(1)[0]
    lines = []
    for key, figure in figures.items():
        parts = {"mid": figure.mid}
        if figure.low != figure.high:
            parts |= {"low": figure.low, "high": figure.high}
        given = [f"{name} = {_number(value, figure.unit)}" for name, value in parts.items()]
        if (figure.provenance, figure.source) != (known, source):
            given += _signature(figure.provenance, figure.source)
        lines.append(f"{key} = {{ {', '.join(given)} }}" if len(given) > 1 else f"{key} = {given[0].removeprefix('mid = ')}")
    return [*lines, *_signature(known, source)]


def _signature(provenance: str, source: str) -> list[str]:
    return [f"provenance = {_text(provenance)}", f"source = {_text(source)}"]


def _number(value: float, unit: str) -> str:
    return f"{value:.6g}" if unit == "1" else _text(f"{value:.6g} {unit}")


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
