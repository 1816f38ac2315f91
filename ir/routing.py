"""How far tokens go: of the nodes and GPUs that hold experts, how many different ones a token reaches on average.

A copy of a token crosses the network once for each distinct node and a node's links once for each distinct GPU, so these two numbers
are the volume of dispatch and combine. Scores of experts are taken as independent; a trained gate's are not, and reach fewer nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import comb
from random import Random
from typing import Literal

from .core import Func, Module, Value
from .errors import require
from .ops.internode import InternodeDispatch
from .ops.moe import Dispatch, DispatchGroups, Route
from .slots import slots_of
from .types import Tensor
from .walk import join, walk

TOKENS = 4096
"""Tokens that a group-limited choice is sampled with: the mean is then within 0.01 nodes."""


@dataclass(frozen=True)
class Routing:
    """Each token goes to `top_k` of `experts`, chosen from the best `top_groups` of `groups` equal groups.

    Groups are scored as in `route`, `top2` or `max`, or drawn at `random`. `held` is the expert of each slot where popular ones have
    several (`slots.py`), else empty; where one is `experts`, all tokens go to a shared expert as well.
    """

    experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1
    score: Literal["top2", "max", "random"] = "top2"
    held: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(1 <= self.top_k <= self.experts, f"top_k is {self.top_k}, expected 1 to {self.experts}")

    @property
    def slots(self) -> int:
        """What tokens go to: an expert each, or what holds them several times."""
        return len(self.held) or self.experts

    @property
    def choices(self) -> int:
        """How many slots a token goes to."""
        return self.top_k + (self.experts in self.held)

    def distinct(self, places: int) -> float:
        """How many of `places`, over which the experts or their slots are spread evenly and in order, a token reaches on average.

        Where every group may be chosen it is places * (1 - C(E - E/places, k) / C(E, k)), and likewise within groups drawn at random; else,
        and of slots, sampled with a fixed seed.
        """
        require(places >= 1, f"experts lie in {places} places, expected 1 or more")
        if self.held:
            return _sampled(self, places)
        if self.top_groups >= self.groups:
            return spread(self.experts, self.top_k, places)
        if self.score == "random" and places % self.groups == 0:
            kept = self.top_groups * places // self.groups
            return spread(self.experts * self.top_groups // self.groups, self.top_k, kept)
        return _sampled(self, places)


def spread(experts: int, top_k: int, places: int) -> float:
    """Distinct places of `top_k` experts drawn without repetition from all."""
    share = experts / places
    if share < 1:
        return float(min(top_k, places)) if top_k == 1 else spread(experts, top_k, experts)
    held = experts - int(share) if share == int(share) else experts - share
    if isinstance(held, int):
        return places * (1 - comb(held, top_k) / comb(experts, top_k))
    missed = 1.0
    for i in range(top_k):
        missed *= max(0.0, held - i) / (experts - i)
    return places * (1 - missed)


@cache
def _sampled(routing: Routing, places: int) -> float:
    tokens = _tokens(replace(routing, held=()))
    reached = sum(
        len({slot * places // routing.slots for slot in slots}) for slots in (_taken(routing, tokens) if routing.held else tokens)
    )
    return reached / TOKENS


@cache
def _tokens(routing: Routing) -> Sequence[Sequence[int]]:
    """The experts of each token of the sample."""
    random = Random(0)
    return [list(_chosen(routing, random)) for _ in range(TOKENS)]


def _taken(routing: Routing, tokens: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
    """The slots of each token: those of an expert take turns, as `choose_slots` has it."""
    places: dict[int, list[int]] = {}
    for slot, expert in enumerate(routing.held):
        places.setdefault(expert, []).append(slot)
    shared = [routing.experts] if routing.experts in places else []
    turns: Counter[int] = Counter()
    for chosen in tokens:
        yield [places[expert][turns[expert] % len(places[expert])] for expert in (*chosen, *shared)]
        turns.update((*chosen, *shared))


def _chosen(routing: Routing, random: Random) -> Iterator[int]:
    """The experts of one token: of each group its scores from the best on, as far as they are wanted."""
    size = routing.experts // routing.groups
    wanted = min(size, routing.top_k)
    best = [_descending(random, size, wanted) for _ in range(routing.groups)]
    named = {"top2": 2, "max": 1, "random": 0}[routing.score]
    drawn = [sum(scores[:named]) or random.random() for scores in best]
    kept = sorted(range(routing.groups), key=lambda g: -drawn[g])[: routing.top_groups]
    ranked = sorted(((score, g) for g in kept for score in best[g]), reverse=True)[: routing.top_k]
    for g in kept:
        count = sum(1 for _, other in ranked if other == g)
        yield from (g * size + i for i in random.sample(range(size), count))


def _descending(random: Random, size: int, wanted: int) -> list[float]:
    """The `wanted` largest of `size` uniform numbers: the largest is U^(1/size), the next that times U^(1/(size-1)), ..."""
    found, top = [], 1.0
    for left in range(size, size - wanted, -1):
        top *= random.random() ** (1 / left)
        found.append(top)
    return found


def routing_of(module: Module) -> Routing | None:
    """How the tokens of a module are routed: by its first `route` whose experts are dispatched to; None where there is none."""
    slots = slots_of(module)
    held = next(iter(slots.held.values()), ()) if slots else ()
    for func in module.funcs:
        used = _gates(func)
        for op in func.ops:
            if isinstance(op, Route) and (op in used or not used):
                return _routing(op, held)
    return None


def _gates(func: Func) -> set[Route]:
    """The gates whose choices are dispatched, as they are or as slots, alone or with the shared expert's."""
    ahead = [op.ids for op in func.ops if isinstance(op, Dispatch | DispatchGroups | InternodeDispatch)]
    found, seen = set[Route](), set[Value]()
    while ahead:
        value = ahead.pop()
        if isinstance(value.owner, Route):
            found.add(value.owner)
        elif value.owner and value not in seen:
            seen.add(value)
            ahead += (v for v in value.owner.operands if isinstance(v.type, Tensor) and not v.tensor.dtype.is_float)
    return found


def routing_by_gate(module: Module) -> dict[str, Routing]:
    """How the tokens of a module are routed, by the prefix of each gate's weights."""
    slots = slots_of(module)
    by_stack = slots.held if slots else {}
    found = {}
    for prefix, _, op in walk(module):
        if isinstance(op, Route):
            found[prefix] = _routing(op, next((held for stack, held in by_stack.items() if stack.startswith(join(prefix, ""))), ()))
    return found


def _routing(op: Route, held: tuple[int, ...]) -> Routing:
    return Routing(int(op.logits.shape[1]), op.top_k, op.groups, op.top_groups, op.group_score, held)  # type: ignore[arg-type]
