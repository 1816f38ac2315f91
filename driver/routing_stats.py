"""The histogram of `dsc run --routing-stats`, how many tokens each expert got: JSON with a format and a version.

It adds up: a run adds its counts to what the file has. The placement that `dsc place` makes of it passes/place_experts.py reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, model_validator

from ..backends import Site
from ..ir.core import Module, Op, users
from ..ir.errors import DscError, faults, require
from ..ir.ops.moe import Dispatch, Route
from ..ir.types import bound
from ..ir.walk import weights as weights_of
from .artifact import replacing

FORMAT: Final = "dsc-routing-stats"


class Record(BaseModel):
    """Base of the files' records: unknown keys are refused, so that a newer version is noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerStats(Record):
    """One gate: its routing rule, the bytes of one of its experts' weights, and how many tokens chose each expert."""

    top_k: PositiveInt
    groups: PositiveInt
    top_groups: PositiveInt
    expert_bytes: NonNegativeInt
    counts: tuple[NonNegativeInt, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if sum(self.counts) % self.top_k or len(self.counts) % self.groups:
            raise ValueError(f"{sum(self.counts)} choices of {len(self.counts)} experts: expected a multiple of top_k and of groups")
        return self

    @property
    def rule(self) -> dict[str, int]:
        """What two runs of the same model have in common."""
        return self.model_dump(exclude={"counts"}) | {"experts": len(self.counts)}

    @property
    def tokens(self) -> int:
        """How many tokens the gate has seen."""
        return sum(self.counts) // self.top_k


class RoutingStats(Record):
    """The histogram, by the prefix of the layer's weight names."""

    format: Literal["dsc-routing-stats"] = FORMAT
    version: Literal[1] = 1
    layers: dict[str, LayerStats]

    @property
    def rule(self) -> dict[str, int]:
        """The rule that all layers share. `DscError` where they differ."""
        require(bool(self.layers), "the routing histogram has no layers")
        rules = {name: layer.rule for name, layer in self.layers.items()}
        first = next(iter(rules))
        for name, rule in rules.items():
            require(rule == rules[first], f"{name} routes by {rule}, but {first} by {rules[first]}: expected one rule for all layers")
        return rules[first]


def read(file: Path) -> RoutingStats:
    """The histogram in `file`. `DscError` with one line where it is none of this version."""
    wanted = f"expected a routing histogram as dsc run --routing-stats {file.name} writes it"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        form = raw.get("format") if isinstance(raw, dict) else None
        require(form == FORMAT, f"{file}: {wanted}, found {f'one of format {form}' if form else 'other JSON'}")
        return RoutingStats.model_validate(raw)
    except ValidationError as error:
        raise DscError(f"{file}: {faults(error.errors())}") from None
    except ValueError as error:  # of json and of the decoder
        raise DscError(f"{file}: {wanted}, found no JSON: {error}") from None


@dataclass
class Recorder:
    """An observer that counts the choices of every gate of `module`, on top of what `file` already has.

    A gate is a `route` that a dispatch reads: training has others, for its balance loss.
    """

    module: Module
    file: Path

    def __post_init__(self) -> None:
        self._gates = {
            (func.name, op.id)
            for func in self.module.funcs
            for readers in (users(func),)
            for op in func.ops
            if isinstance(op, Route) and any(isinstance(reader, Dispatch) for reader in readers.get(op.results[0], ()))
        }
        require(
            bool(self._gates),
            "--routing-stats counts where gates send tokens, but no route op leads to a dispatch (raise-moe lifts imports)",
        )
        self.earlier = read(self.file).layers if self.file.exists() else {}
        self._found: dict[str, tuple[Route, np.ndarray]] = {}

    def __call__(self, site: Site, op: Op, operands: Any, results: Any) -> None:
        if isinstance(op, Route) and (site.func, site.op) in self._gates:
            experts = op.logits.shape[1]
            assert isinstance(experts, int), "the type rule of route"
            name = site.weights or site.func
            before = self._found[name][1] if name in self._found else 0
            self._found[name] = op, before + np.bincount(np.ravel(results[0]), minlength=experts)

    def save(self) -> None:
        """Write everything counted, earlier runs included. `DscError` where those were of another model."""
        types = weights_of(self.module)
        layers = dict(self.earlier)
        for name, (op, counts) in self._found.items():
            stacks = (t for n, t in types.items() if n.startswith(f"{name}.") and ".experts." in n and t.dtype.is_float)
            expert = sum(stack.bytes // bound(stack.shape[0]) for stack in stacks)
            found = LayerStats(
                top_k=op.top_k,
                groups=op.groups,
                top_groups=op.top_groups,
                expert_bytes=expert,
                counts=tuple(counts.tolist()),
            )
            if before := layers.get(name):
                require(before.rule == found.rule, f"{name} routes by {found.rule}, but the histogram so far by {before.rule}")
                found = found.model_copy(update={"counts": tuple(map(sum, zip(before.counts, found.counts, strict=True)))})
            layers[name] = found
        with replacing(self.file) as stream:
            stream.write(f"{RoutingStats(layers=layers).model_dump_json(indent=1)}\n".encode())
