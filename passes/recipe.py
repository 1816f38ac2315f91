"""Recipes: how a program is quantised, as data. Each key of `recipes/*.toml` is one decision that a user can change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ..hardware.device import accumulation
from ..hardware.figures import read_toml
from ..ir.attributes import convert
from ..ir.errors import DscError, require
from ..ir.quantization import RULES, Accumulation, ScaleRule
from ..ir.types import DType

RECIPES = Path(__file__).with_name("recipes")
FORMATS = (DType.f8e4m3, DType.f8e5m2, DType.e5m6)
WHOLE = (0, 0)
"""The tile of a per-tensor scale."""


@dataclass(frozen=True)
class Quantization:
    """One decision: the format, the tile that shares a scale, and the rule of the scale."""

    format: DType
    tile: tuple[int, int]
    rule: ScaleRule

    def __str__(self) -> str:
        tile = "tensor" if self.tile == WHOLE else "x".join(map(str, self.tile))
        return f"{self.format} {tile}{' pow2' if self.rule.pow2 != 'no' else ''}"


@dataclass(frozen=True)
class Recipe:
    """What is quantised, and how. None: not quantised.

    activation     input of a Linear or expert product, in Fprop; turned 128x1 for Wgrad
    weight         the weight of the same product
    gradient       gradient of its output: in Dgrad, and turned for Wgrad
    dispatch       what is sent to the experts
    cache_*        what forward keeps for backward: inputs of Linears, the attention output, inputs of SwiGLU
    weighted_swiglu    whether routing weights are applied before the down projection, so that its result is not kept (pass weighted-swiglu)
    keep           parts of the names of weights whose product stays as it is
    """

    name: str
    description: str
    keep: tuple[str, ...]
    accumulation: Accumulation
    activation: Quantization | None = None
    weight: Quantization | None = None
    gradient: Quantization | None = None
    dispatch: Quantization | None = None
    cache_linear: Quantization | None = None
    cache_attention: Quantization | None = None
    cache_swiglu: Quantization | None = None
    weighted_swiglu: bool = False


SECTIONS = ("activation", "weight", "gradient", "dispatch", "cache_linear", "cache_attention", "cache_swiglu")


def recipes() -> tuple[str, ...]:
    """The names of the recipes that dsc ships."""
    return tuple(sorted(file.stem for file in RECIPES.glob("*.toml")))


@cache
def recipe(name: str) -> Recipe:
    """The shipped recipe of that name, or one from a .toml file. Raises `DscError` with the nearest names."""
    file = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not name.endswith(".toml"):
        near = ", ".join(get_close_matches(name, recipes(), 2)) or ", ".join(recipes())
        require(name in recipes(), f"unknown recipe {name}; expected a .toml file or one of: {near}")
    raw = read_toml(file)
    try:
        return _recipe(file.stem, raw)
    except DscError as error:
        raise DscError(f"{file}: {error}") from None


def _recipe(name: str, raw: Mapping[str, Any]) -> Recipe:
    known = ("description", "keep", "accumulation", "weighted_swiglu", *SECTIONS)
    _only(raw, known, "the recipe")
    require(isinstance(raw.get("description"), str), 'expected description = "..."')
    keep = convert(tuple[str, ...], list(raw.get("keep", [])))
    chosen = {section: quantization(raw[section], section) for section in SECTIONS if section in raw}
    require(("activation" in chosen) == ("weight" in chosen), "activation and weight are quantised together: one of them is missing")
    weighted = raw.get("weighted_swiglu", False)
    require(isinstance(weighted, bool), f"weighted_swiglu: expected true or false, found {weighted!r}")
    return Recipe(name, raw["description"], keep, _accumulation(raw.get("accumulation", {})), weighted_swiglu=weighted, **chosen)


def quantization(raw: Mapping[str, Any], where: str) -> Quantization:
    """One section: `format`, `tile` ([rows, columns] or "tensor") and `rule` (a preset's name, or a table of its fields)."""
    require(isinstance(raw, Mapping), f"{where}: expected a table, found {raw!r}")
    _only(raw, ("format", "tile", "rule"), where)
    for key in ("format", "tile", "rule"):
        require(key in raw, f"{where}: {key} is missing")
    known = [f.name for f in FORMATS]
    require(raw["format"] in known, f"{where}: format {raw['format']!r}, expected one of {', '.join(known)}")
    tile = WHOLE if raw["tile"] == "tensor" else _tile(raw["tile"], where)
    return Quantization(DType[raw["format"]], tile, _rule(raw["rule"], where))


def _tile(raw: Any, where: str) -> tuple[int, int]:
    try:
        rows, columns = convert(tuple[int, int], raw)
    except DscError as error:
        raise DscError(f'{where}: tile: {error}, or "tensor"') from None
    require(rows > 0 and columns > 0, f"{where}: tile {raw}, expected two numbers of 1 or more")
    return rows, columns


def _rule(raw: Any, where: str) -> ScaleRule:
    if isinstance(raw, str):
        require(raw in RULES, f"{where}: unknown rule {raw!r}, expected one of {', '.join(RULES)}")
        return RULES[raw]
    try:
        found: ScaleRule = convert(ScaleRule, raw)
        return found
    except DscError as error:
        raise DscError(f"{where}: rule: {error}") from None


def _accumulation(raw: Any) -> Accumulation:
    """`model` is float32 or a device's; `interval` and `formula` override it."""
    _only(raw, ("model", "interval", "formula"), "accumulation")
    model = accumulation(str(raw.get("model", "float32")))
    return replace(model, **{key: raw[key] for key in ("interval", "formula") if key in raw})


def _only(raw: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = ", ".join(k for k in raw if k not in known)
    require(not unknown, f"{where} has no key {unknown}; expected some of {', '.join(known)}")
