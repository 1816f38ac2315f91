"""Figures that say where they are from: a middle value with its range, a unit, how it is known and by whom. Read from TOML.

A figure stands in a table of its own, or in a group that shares one source. A number bears its unit, with any decimal prefix:

    [intra]
    bandwidth = "160 GB/s"
    latency = { mid = "3 us", low = "2 us", high = "5 us" }
    provenance = "published"
    source = "DeepSeek-V3 report, section 3.2.2"

    [price]
    hour = { mid = "2 USD/h", low = "1.5 USD/h", high = "3 USD/h", provenance = "assumed", source = "list prices" }

A table's own provenance and source count before those of its group. A number without a range is its own low and high.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, isnan
from pathlib import Path
from typing import Any, Literal, get_args

from ..ir.errors import DscError, require

Provenance = Literal["measured", "published", "assumed"]
PREFIXES = {"": 1.0, "p": 1e-12, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
NUMBER = re.compile(r"([+-]?(?:inf|\d+(?:\.\d*)?(?:e[+-]?\d+)?))\s*(\S*)", re.IGNORECASE)
SIGNED = ("provenance", "source")
RANGE = ("mid", "low", "high")


@dataclass(frozen=True)
class Figure:
    """`mid` lies between `low` and `high`, all three in `unit` without a prefix (B/s, not GB/s). `float(figure)` is the middle."""

    mid: float
    low: float
    high: float
    unit: str
    provenance: Provenance
    source: str

    def __float__(self) -> float:
        return self.mid

    def __str__(self) -> str:
        known = spoken(self.mid, self.unit)
        return known if self.low == self.high else f"{known} ({spoken(self.low, self.unit)} to {spoken(self.high, self.unit)})"

    def at(self, which: Literal["low", "mid", "high"]) -> float:
        """One end of the range, or its middle."""
        return float(getattr(self, which))

    def fixed(self, which: Literal["low", "mid", "high"]) -> Figure:
        """The figure as if it were known to be at one end."""
        value = self.at(which)
        return Figure(value, value, value, self.unit, self.provenance, self.source)


def assumed(value: float, unit: str, source: str = "definition") -> Figure:
    """A figure that nobody measured."""
    return Figure(value, value, value, unit, "assumed", source)


def spoken(value: float, unit: str) -> str:
    """A number of units as people say it: 160 GB/s."""
    if unit in ("1", "USD/h", "GPUs", "SMs"):
        return f"{value:g} {unit}" if unit != "1" else f"{value:g}"
    fits = [(p, s) for p, s in PREFIXES.items() if value and s <= abs(value) < 1000 * s]
    prefix, scale = fits[-1] if fits else ("", 1.0)
    return f"{value / scale:.4g} {prefix}{unit}"


def read_toml(file: Path) -> dict[str, Any]:
    """The tables of a TOML file. `DscError` in one line where it cannot be read or is not TOML."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DscError(f"{file}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except tomllib.TOMLDecodeError as error:
        raise DscError(f"{file}: not TOML: {error}") from None


def provenance(table: Mapping[str, Any], where: str) -> tuple[Provenance, str]:
    """How a table's figures are known, and from where."""
    given: Any = table.get("provenance")
    require(given in get_args(Provenance), f"{where}: provenance is {given!r}, expected one of {', '.join(get_args(Provenance))}")
    source = table.get("source")
    require(isinstance(source, str) and source.strip() != "", f'{where}: expected source = "...", found {source!r}')
    return given, str(source)


def figure(given: Any, unit: str, where: str, group: Mapping[str, Any]) -> Figure:
    """The figure that `given` describes, in `unit`, signed by itself or by the `group` in which it stands."""
    table = given if isinstance(given, Mapping) else {"mid": given}
    unknown = ", ".join(sorted(set(table) - {*RANGE, *SIGNED}))
    require(not unknown, f"{where}: unknown key {unknown}; expected some of {', '.join((*RANGE, *SIGNED))}")
    require("mid" in table, f"{where}: expected mid = a number of {unit}")
    known, source = provenance({key: table.get(key, group.get(key)) for key in SIGNED}, where)
    mid = quantity(table["mid"], unit, where)
    low, high = (quantity(table[key], unit, f"{where}.{key}") if key in table else mid for key in ("low", "high"))
    require(low <= mid <= high, f"{where}: expected low <= mid <= high, found {low:g}, {mid:g} and {high:g} {unit}")
    return Figure(mid, low, high, unit, known, source)


def quantity(given: Any, unit: str, where: str) -> float:
    """`given` ("160 GB/s") as a number of `unit`s, 0 or more; without a unit where `unit` is "1"."""
    if unit == "1":
        plain = isinstance(given, int | float) and not isinstance(given, bool)
        require(plain and not isnan(given) and given >= 0, f"{where}: expected a number, 0 or more, found {given!r}")
        return float(given)
    match = NUMBER.fullmatch(given.strip()) if isinstance(given, str) else None
    example = f'a number of {unit} such as "5 {unit}"'
    require(match is not None, f"{where}: expected {example}, found {given!r}")
    value, found = match.groups()  # type: ignore[union-attr]
    prefix = found.removesuffix(unit)
    require(found.endswith(unit) and prefix in PREFIXES, f"{where}: expected {example}, with or without a prefix, found {given!r}")
    number = float(value) * PREFIXES[prefix]
    require(number >= 0, f"{where}: expected a number, 0 or more, found {given!r}")
    return number


def group(
    table: Any, units: Mapping[str, str], where: str, defaults: Callable[[str], Figure | None] = lambda key: None
) -> dict[str, Figure]:
    """The figures of a table that has the keys of `units` and no others, each in its unit; where one is absent, its default."""
    require(isinstance(table, Mapping), f"{where}: expected a table with {', '.join(units)}, provenance and source")
    unknown = ", ".join(sorted(set(table) - {*units, *SIGNED}))
    require(not unknown, f"{where}: unknown key {unknown}; expected {', '.join((*units, *SIGNED))}")
    found = {}
    for key, unit in units.items():
        if key in table:
            found[key] = figure(table[key], unit, f"{where}.{key}", table)
        elif (default := defaults(key)) is not None:
            found[key] = default
        else:
            raise DscError(f"{where}: expected {key} = a number of {unit}" if unit != "1" else f"{where}: expected {key} = a number")
    return found


def finite(figure: Figure) -> bool:
    """Whether it is neither infinite nor zero: something that a time can be divided by."""
    return isfinite(figure.mid) and figure.mid > 0
