"""Devices by name, from `devices/*.toml`: how fast they are, and how their tensor cores accumulate FP8 products."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from ..ir.attributes import convert, hints_of
from ..ir.errors import DscError, require
from ..ir.quantization import Accumulation

DEVICES = Path(__file__).with_name("devices")

Provenance = Literal["measured", "published", "assumed"]


@dataclass(frozen=True)
class Source:
    """Where a figure is from."""

    provenance: Provenance
    source: str


@dataclass(frozen=True)
class Peak:
    """What a chip can do in a second at best: dense matrix products by the dtype of their operands, all else, and bytes of its memory."""

    bf16: float
    f16: float
    f8: float
    f32: float
    f64: float
    vector: float
    bandwidth: float


@dataclass(frozen=True)
class Device:
    """A chip. `accumulations` has one model per matrix instruction, `fp8` names the one that FP8 products run on."""

    name: str
    architecture: str
    fp8: str
    accumulations: Mapping[str, Accumulation]
    peak: Peak
    sources: Mapping[str, Source]
    """Of each accumulation, by its name, and of `peak`."""


def devices() -> tuple[str, ...]:
    """The names of the devices that dsc ships."""
    return tuple(sorted(file.stem for file in DEVICES.glob("*.toml")))


def device(name: str) -> Device:
    """The device of that name (in any case), or that a .toml file describes. Raises `DscError` with the nearest names."""
    file = Path(name)
    if file.suffix == ".toml":
        return _read(file)
    key = name.lower().replace(" ", "")
    if key not in devices():
        near = ", ".join(get_close_matches(key, devices(), 3)) or ", ".join(devices())
        raise DscError(f"unknown device {name}; expected a .toml file or one of: {near}")
    return _read(DEVICES / f"{key}.toml")


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
def _read(file: Path) -> Device:
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DscError(f"{file}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except tomllib.TOMLDecodeError as error:
        raise DscError(f"{file}: not TOML: {error}") from None
    for key in ("name", "architecture", "fp8"):
        require(isinstance(raw.get(key), str), f'{file}: expected {key} = "...", found {raw.get(key)!r}')
    tables: dict[str, Any] = raw.get("accumulation", {})
    require(raw["fp8"] in tables, f"{file}: fp8 names {raw['fp8']}, but there is no [accumulation.{raw['fp8']}]")
    models = {name: _accumulation(table, f"{file}: accumulation.{name}") for name, table in tables.items()}
    sources = {name: _source(table, f"{file}: accumulation.{name}") for name, table in tables.items()}
    sources["peak"] = _source(raw.get("peak", {}), f"{file}: peak")
    return Device(raw["name"], raw["architecture"], raw["fp8"], models, _peak(raw["peak"], f"{file}: peak"), sources)


def _peak(table: dict[str, Any], where: str) -> Peak:
    for key in hints_of(Peak):
        given = table.get(key)
        require(isinstance(given, int | float) and given > 0, f"{where}: expected {key} = a number per second above 0, found {given!r}")
    return Peak(**{key: float(table[key]) for key in hints_of(Peak)})


def _accumulation(table: dict[str, Any], where: str) -> Accumulation:
    hints = hints_of(Accumulation)
    fields = {key: value for key, value in table.items() if key not in ("provenance", "source")}
    unknown = ", ".join(sorted(set(fields) - set(hints)))
    require(not unknown, f"{where}: unknown key {unknown}; expected some of {', '.join(hints)}, provenance, source")
    try:
        return Accumulation(**{key: convert(hints[key], value) for key, value in fields.items()})
    except DscError as error:
        raise DscError(f"{where}: {error}") from None


def _source(table: dict[str, Any], where: str) -> Source:
    provenance: Any = table.get("provenance")
    require(provenance in get_args(Provenance), f"{where}: provenance is {provenance!r}, expected one of {', '.join(get_args(Provenance))}")
    require(isinstance(table.get("source"), str), f'{where}: expected source = "..."')
    return Source(provenance, table["source"])
