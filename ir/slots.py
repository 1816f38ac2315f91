"""Slots of experts: a program in which popular experts are held several times says with an attribute which expert is in which slot.

    placement={experts=256, ranks=32, stacks=["model.layers.3.mlp.experts", ...], slots=[[17, 0, 203, ...], ...]}

`slots` has a list for each stack, or one for all of them. Slot s is on the s-th share of the ranks along ep, in order. Where the number of
an expert is `experts`, one beyond the routed ones, the slot holds the shared expert. The weights of a stack are then those of its
slots, S matrices for E experts, and `<stack>.slots`, i32[S], is a weight that no checkpoint has: it is read from the attribute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .core import Module
from .errors import require

ATTRIBUTE = "placement"
SUFFIX = ".slots"
"""What the name of the weight ends with that says which expert each slot holds."""


@dataclass(frozen=True)
class Slots:
    """Which expert each slot of a stack holds, by the stack's full name, for so many experts on so many ranks."""

    experts: int
    ranks: int
    held: Mapping[str, tuple[int, ...]]

    def record(self) -> dict[str, Any]:
        """As a module's attribute."""
        every = list(self.held.values())
        alike = len(set(every)) == 1
        return {"experts": self.experts, "ranks": self.ranks, "stacks": tuple(self.held), "slots": tuple(every[:1] if alike else every)}


def slots_of(module: Module) -> Slots | None:
    """The slots that a module speaks of; None where an expert is held once. `DscError` where the attribute is none of this form."""
    found = module.attributes.get(ATTRIBUTE)
    if found is None:
        return None
    keys = {"experts", "ranks", "stacks", "slots"}
    require(isinstance(found, Mapping) and set(found) == keys, f"the module's placement is {found}, expected a record of {', '.join(keys)}")
    stacks, lists = found["stacks"], found["slots"]
    require(len(lists) in (1, len(stacks)), f"the module's placement has {len(lists)} lists of slots for {len(stacks)} stacks of experts")
    return Slots(found["experts"], found["ranks"], dict(zip(stacks, _each(lists, len(stacks)), strict=True)))


def _each(lists: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
    return [tuple(one) for one in lists] if len(lists) == count else [tuple(lists[0])] * count
