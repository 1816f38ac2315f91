"""How far tokens go: of the nodes and GPUs that hold experts, how many different ones a token reaches on average.

A copy of a token crosses the network once for each distinct node and a node's links once for each distinct GPU, so these two numbers
are the volume of dispatch and combine. Scores of experts are taken as independent; a trained gate's are not, and reach fewer nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import comb
from random import Random
from typing import Literal

from ..ir.core import Module
from ..ir.errors import require
from ..ir.ops.moe import Dispatch, DispatchGroups, Route

TOKENS = 4096
"""Tokens that a group-limited choice is sampled with: the mean is then within 0.01 nodes."""


@dataclass(frozen=True)
class Routing:
    """Each token goes to `top_k` of `experts`, chosen from the best `top_groups` of `groups` equal groups.

    Groups are scored as in `route`, `top2` or `max`, or drawn at `random`.
    """

    experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1
    score: Literal["top2", "max", "random"] = "top2"

    def __post_init__(self) -> None:
        require(1 <= self.top_k <= self.experts, f"top_k is {self.top_k}, expected 1 to {self.experts}")

    def distinct(self, places: int) -> float:
        """How many of `places`, over which the experts are spread evenly and in order, a token reaches on average.

        Where every group may be chosen it is places * (1 - C(E - E/places, k) / C(E, k)), and likewise within groups drawn at random; else
        sampled with a fixed seed.
        """
        require(places >= 1, f"experts lie in {places} places, expected 1 or more")
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
    random = Random(0)
    reached = sum(len({e * places // routing.experts for e in _chosen(routing, random)}) for _ in range(TOKENS))
    return reached / TOKENS


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
    for func in module.funcs:
        used = {op.ids.owner for op in func.ops if isinstance(op, Dispatch | DispatchGroups)}
        for op in func.ops:
            if isinstance(op, Route) and (op in used or not used):
                return Routing(int(op.logits.shape[1]), op.top_k, op.groups, op.top_groups, op.group_score)  # type: ignore[arg-type]
    return None
