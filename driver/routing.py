"""Tokens that went to other experts: who they are, and which rows of two runs belong together.

When one token chooses another expert, the rows behind it shift, and comparing row by row would blame ops that did nothing wrong. Rows
are therefore matched by token and expert, and rows that only one run has are left out and counted with their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..backends import Site
from ..ir.core import Func, Module, Op, Value
from ..ir.ops.moe import Combine, Dispatch, Route
from ..ir.types import Tensor

Array = np.ndarray


@dataclass(frozen=True)
class Gate:
    """One execution of a gate: its tokens, and how many chose another set of experts."""

    site: str
    tokens: int
    changed: int


@dataclass
class Tokens:
    """What is known while a second run is compared with a first, op after op."""

    module: Module
    moved: Array | None = None
    """The tokens that some gate so far sent elsewhere."""
    gates: list[Gate] = field(default_factory=list)
    _rows: dict[Site, tuple[Array, Array]] = field(default_factory=dict)
    _values: dict[str, set[Value]] = field(default_factory=dict)

    def see(self, site: Site, op: Op, first: tuple[Any, ...], second: tuple[Any, ...], operands: Mapping[str, Any]) -> None:
        """Note what a gate or a dispatch did in the two runs. `operands` has the ids that each dispatch was given."""
        if isinstance(op, Route):
            changed = (np.sort(first[0], axis=-1) != np.sort(second[0], axis=-1)).any(axis=-1)
            self.gates.append(Gate(str(site), int(changed.size), int(changed.sum())))
            self.moved = changed if self.moved is None or self.moved.shape != changed.shape else self.moved | changed
        elif isinstance(op, Dispatch):
            keys = [_keys(operands[name], handle, op.experts) for name, handle in (("first", first[-1]), ("second", second[-1]))]
            _, left, right = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
            self._rows[replace(site, op="")] = left, right

    def pairs(self, site: Site, op: Op, index: int, first: Array, second: Array) -> tuple[Array, Array]:
        """The rows of result `index` that belong together; all of them where its rows are not those of experts."""
        rows = self._rows.get(replace(site, op=""))
        if rows is None or op.results[index] not in self._expert_rows(site.func):
            return first, second
        return first[rows[0]], second[rows[1]]

    def by_token(self, x: Array) -> Array | None:
        """x with one row for each token, if its leading dimensions are the tokens."""
        if self.moved is None:
            return None
        lead = 1
        for axis, extent in enumerate(x.shape):
            lead *= extent
            if lead == self.moved.size:
                return x.reshape(lead, *x.shape[axis + 1 :])
        return None

    def _expert_rows(self, name: str) -> set[Value]:
        """The values of a function whose rows are those of a dispatch: its own, and what is computed from them row by row."""
        if name not in self._values:
            self._values[name] = _follow(self.module[name])
        return self._values[name]


def _keys(ids: Array, handle: tuple[Array], experts: int) -> Array:
    """A number for each row, the same in two runs where token and expert are."""
    order = handle[0].astype(np.int64)
    return order // ids.shape[1] * experts + ids.reshape(-1)[order]


def _follow(func: Func) -> set[Value]:
    found: set[Value] = set()
    for op in func.ops:
        if isinstance(op, Dispatch):
            found.update(op.results[: len(op.xs)])
        elif not isinstance(op, Combine):
            extents = {v.shape[0] for v in op.operands if v in found}
            found.update(r for r in op.results if isinstance(r.type, Tensor) and r.type.rank and r.shape[0] in extents)
    return found
