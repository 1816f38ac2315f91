"""Weights of a program whose experts have slots (ir/slots.py): the expert of each slot from a source that knows experts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..ir.core import Module
from ..ir.slots import SUFFIX, Slots, slots_of
from .expert_names import SHARED, parts
from .weights import NUMPY_DTYPES, Wanted, Weights, part_of


@dataclass(frozen=True)
class PlacedWeights:
    """`source`, asked for slots. `Wanted.experts` are numbers of slots here."""

    source: Weights
    slots: Slots

    def get(self, wanted: Wanted) -> np.ndarray:
        """See `Weights.get`."""
        if (table := self._table(wanted)) is not None:
            return table
        return self.source.get(self._of_experts(wanted))

    def part(self, wanted: Wanted, index: tuple[slice, ...]) -> np.ndarray:
        """See `weights.part_of`: of a stack the experts of some slots alone are read."""
        if (table := self._table(wanted)) is not None:
            return table[index]
        if self.slots.held.get(wanted.name.rpartition(".")[0]) is None or not index:
            return part_of(self.source, wanted, index)
        numbers = range(wanted.shape[0])[index[0]]
        some = replace(wanted, shape=(len(numbers), *wanted.shape[1:]), experts=tuple(numbers))
        return part_of(self.source, self._of_experts(some), (slice(0, len(numbers)), *index[1:]))

    def check(self, wanted: Sequence[Wanted], *, strict: bool = True) -> None:
        """See `Weights.check`."""
        self.source.check([self._of_experts(one) for one in wanted if self._table(one) is None], strict=strict)

    def _table(self, wanted: Wanted) -> np.ndarray | None:
        held = self.slots.held.get(wanted.name.removesuffix(SUFFIX)) if wanted.name.endswith(SUFFIX) else None
        return None if held is None else np.array(held, NUMPY_DTYPES[wanted.dtype])

    def _of_experts(self, wanted: Wanted) -> Wanted:
        held = self.slots.held.get(wanted.name.rpartition(".")[0])
        if held is None or parts(wanted.name, wanted.shape)[0].name == wanted.name:
            return wanted
        numbers = range(wanted.shape[0]) if wanted.experts is None else wanted.experts
        experts = (held[number] for number in numbers)
        return replace(wanted, experts=tuple(SHARED if expert == self.slots.experts else expert for expert in experts))


def placed(source: Weights, module: Module) -> Weights:
    """The weights of `module` from `source`: of its slots, where it has some."""
    slots = slots_of(module)
    return source if slots is None else PlacedWeights(source, slots)
