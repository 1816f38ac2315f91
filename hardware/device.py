"""Devices by name, from `devices/*.toml`: how fast they are, and how their tensor cores accumulate FP8 products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ..ir.attributes import convert, hints_of
from ..ir.errors import DscError, require
from ..ir.quantization import Accumulation
from .figures import Figure, Provenance, group, provenance, read_toml

DEVICES = Path(__file__).with_name("devices")


@dataclass(frozen=True)
class Source:
    """Where a figure is from."""

    provenance: Provenance
    source: str


@dataclass(frozen=True)
class Peak:
    """What a chip can do at best: dense matrix products by the dtype of their operands, all else, and bytes of its memory."""

    bf16: Figure
    f16: Figure
    f8: Figure
    f32: Figure
    f64: Figure
    vector: Figure
    bandwidth: Figure


PEAK = {"bandwidth": "B/s"} | {f.name: "FLOP/s" for f in fields(Peak) if f.name != "bandwidth"}


@dataclass(frozen=True)
class Kernels:
    """What kernels make of a chip. The coefficients of `cost.py`, which says how they enter.

    matrix     share of the peak inside the loop over K               promotion  s to promote one element of a sum on one unit
    feed       B/s that come into one unit                            ramp       s per tile: the pipeline fills, the result is written
    memory     share of the bandwidth that products reach             wgrad      time of an FP8 weight gradient by that of a product
    attention, attention_backward, decode   shares of the peak         cache      share of the bandwidth at which decoding reads its cache
    rows       share of the bandwidth of all other kernels             launch     s between two kernels of a stream
    """

    matrix: Figure
    promotion: Figure
    feed: Figure
    ramp: Figure
    memory: Figure
    wgrad: Figure
    attention: Figure
    attention_backward: Figure
    decode: Figure
    cache: Figure
    rows: Figure
    launch: Figure


KERNELS = {f.name: {"promotion": "s", "ramp": "s", "launch": "s", "feed": "B/s"}.get(f.name, "1") for f in fields(Kernels)}


@dataclass(frozen=True)
class Device:
    """A chip. `accumulations` has one model per matrix instruction, `fp8` names the one that FP8 products run on."""

    name: str
    architecture: str
    fp8: str
    accumulations: Mapping[str, Accumulation]
    peak: Peak
    units: int
    """Streaming multiprocessors, or what does their work: a kernel's tiles are dealt out to them."""
    memory: Figure
    """Bytes of its memory."""
    kernels: Kernels
    sources: Mapping[str, Source]
    """Of each accumulation, by its name, and of `peak`."""


def devices() -> tuple[str, ...]:
    """The names of the devices that dsc ships."""
    return tuple(sorted(file.stem for file in DEVICES.glob("*.toml")))


def device(name: str) -> Device:
    """The device of that name (in any case), or that a .toml file describes. Raises `DscError` with the nearest names."""
    return read_device(find(name, DEVICES, "device"))


def find(name: str, folder: Path, what: str) -> Path:
    """The file of that name in any case: one of `folder`, or a .toml file of the user's. Raises `DscError` with the nearest names."""
    file = Path(name)
    if file.suffix == ".toml":
        return file
    known = {f.stem: f for f in sorted(folder.glob("*.toml"))}
    key = name.lower().replace(" ", "-")
    found = known.get(key) or known.get(key.replace("-", ""))
    if found is None:
        near = ", ".join(get_close_matches(key, known, 5, 0.5) or known)  # h801 is half h800-all
        raise DscError(f"unknown {what} {name}; expected a .toml file or one of: {near} (dsc devices lists all)")
    return found


def accumulation(name: str) -> Accumulation:
    """How sums are formed: `float32`, a device (`h800`: its FP8 instruction), or one instruction of it (`h800/mma-sync`)."""
    if name == "float32":
        return Accumulation("float32")
    chip, _, instruction = name.partition("/")
    found = device(chip)
    instruction = instruction or found.fp8
    known = ", ".join(found.accumulations)
    require(instruction in found.accumulations, f"{found.name} has no instruction {instruction}; it has {known}")
    return found.accumulations[instruction]


@cache
def read_device(file: Path) -> Device:
    """The device that a file describes."""
    return parse_device(read_toml(file), str(file))


def parse_device(raw: Mapping[str, Any], where: str) -> Device:
    """The device that tables describe; `where` stands before what is wrong with them."""
    for key in ("name", "architecture", "fp8"):
        require(isinstance(raw.get(key), str), f'{where}: expected {key} = "...", found {raw.get(key)!r}')
    known = {"name", "architecture", "fp8", "accumulation", "peak", "chip", "kernels"}
    unknown = ", ".join(sorted(set(raw) - known))
    require(not unknown, f"{where}: unknown key {unknown}; expected {', '.join(sorted(known))}")
    tables: dict[str, Any] = raw.get("accumulation", {})
    require(raw["fp8"] in tables, f"{where}: fp8 names {raw['fp8']}, but there is no [accumulation.{raw['fp8']}]")
    models = {name: _accumulation(table, f"{where}: accumulation.{name}") for name, table in tables.items()}
    sources = {name: Source(*provenance(table, f"{where}: accumulation.{name}")) for name, table in tables.items()}
    peak, chip = raw.get("peak"), group(raw.get("chip"), {"units": "1", "memory": "B"}, f"{where}: chip")
    sources["peak"] = Source(*provenance(peak if isinstance(peak, Mapping) else {}, f"{where}: peak"))
    units = chip["units"].mid
    require(units >= 1 and units == int(units), f"{where}: chip.units: expected a whole number, 1 or more, found {units:g}")
    rates = Peak(**group(peak, PEAK, f"{where}: peak"))
    for name in PEAK:
        require(getattr(rates, name).low > 0, f"{where}: peak.{name}: expected more than 0")
    kernels = _kernels(raw.get("kernels"), rates, int(units), where)
    return Device(raw["name"], raw["architecture"], raw["fp8"], models, rates, int(units), chip["memory"], kernels, sources)


def _kernels(given: Any, peak: Peak, units: int, where: str) -> Kernels:
    """Coefficients of the device's own, or those of another, then assumed: what a unit is fed and promotes grows as its peaks do."""
    if isinstance(given, str):
        other = device(given)
        per = other.units / units
        grown = {
            "feed": per * peak.f8.mid / other.peak.f8.mid,
            "promotion": other.peak.vector.mid / (per * peak.vector.mid),
        }
        return Kernels(**{key: _taken(getattr(other.kernels, key), grown.get(key, 1.0), other.name) for key in KERNELS})
    require(isinstance(given, Mapping), f'{where}: expected a table kernels, or kernels = "h800" for those of another device')
    found = group(given, KERNELS, f"{where}: kernels")
    for key, unit in KERNELS.items():
        share = unit == "1" and key != "wgrad"
        fits = unit != "1" or (found[key].low > 0 and (not share or found[key].high <= 1))
        require(fits, f"{where}: kernels.{key}: expected {'a share above 0, at most 1' if share else 'more than 0'}, found {found[key]}")
    return Kernels(**found)


def _taken(figure: Figure, factor: float, name: str) -> Figure:
    low, mid, high = (figure.low * factor, figure.mid * factor, figure.high * factor)
    scaled = "" if factor == 1 else " in proportion to its peaks"
    return Figure(mid, low, high, figure.unit, "assumed", f"as on {name}{scaled}: {figure.source}")


def _accumulation(table: dict[str, Any], where: str) -> Accumulation:
    hints = hints_of(Accumulation)
    given = {key: value for key, value in table.items() if key not in ("provenance", "source")}
    unknown = ", ".join(sorted(set(given) - set(hints)))
    require(not unknown, f"{where}: unknown key {unknown}; expected some of {', '.join(hints)}, provenance, source")
    try:
        return Accumulation(**{key: convert(hints[key], value) for key, value in given.items()})
    except DscError as error:
        raise DscError(f"{where}: {error}") from None
