"""How many nodes and ranks tokens reach, against what the interpreter's gate chooses."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from dsc.backends.numpy_ref.run import FLOAT32
from dsc.ir.core import Value
from dsc.ir.ops.moe import ChooseSlots, Route
from dsc.ir.routing import TOKENS, Routing
from dsc.ir.types import DType, Tensor

SEEN = 8192
TWICE = (*range(64), *range(0, 64, 2))
"""64 experts, of which the even ones have a second slot."""
SHARED = tuple(expert for rank in range(8) for expert in (*range(8 * rank, 8 * rank + 8), 64))
"""8 experts and the shared one on each of 8 ranks."""


def chosen(routing: Routing, score: str) -> np.ndarray:
    """Slots that a gate chooses for tokens whose experts have independent scores: i32[SEEN, choices]."""
    logits = Value(Tensor(DType.f32, (SEEN, routing.experts)), "logits")
    rule = {"groups": routing.groups, "top_groups": routing.top_groups, "group_score": score}
    gate = Route(logits, None, score="sigmoid", top_k=routing.top_k, normalize=True, scale=1.0, **rule)  # type: ignore[arg-type]
    uniform = np.random.default_rng(1).uniform(1e-6, 1 - 1e-6, (SEEN, routing.experts))
    ids = FLOAT32.evaluate(gate, (np.log(uniform / (1 - uniform)).astype(np.float32),))[0]
    if not routing.held:
        return ids
    if routing.experts in routing.held:
        ids = np.concatenate([ids, np.full((SEEN, 1), routing.experts, np.int32)], axis=1)
    slots = np.array(routing.held, np.int32)
    given = Value(Tensor(DType.i32, ids.shape), "ids"), Value(Tensor(DType.i32, slots.shape), "slots")
    return FLOAT32.evaluate(ChooseSlots(*given), (ids, slots))[0]


@pytest.mark.parametrize("held", [(), TWICE, SHARED], ids=["experts", "slots", "shared"])
@pytest.mark.parametrize(("groups", "top_groups", "score"), [(1, 1, "max"), (8, 4, "top2"), (8, 3, "max")])
@pytest.mark.parametrize("places", [2, 8, 24])
def test_a_gate_reaches_as_many_places(places: int, groups: int, top_groups: int, score: str, held: tuple[int, ...]) -> None:
    """Four standard errors of the two samples apart at most."""
    routing = Routing(64, 6, groups, top_groups, score, held)  # type: ignore[arg-type]
    if routing.slots % places:
        places = routing.slots
    reached = np.array([len(set(row)) for row in (chosen(routing, score) // (routing.slots // places)).tolist()])
    error = np.sqrt(reached.var() * (1 / SEEN + 1 / TOKENS))
    assert abs(routing.distinct(places) - reached.mean()) <= 4 * error
    assert routing.distinct(routing.slots) <= routing.choices


def test_a_slot_for_each_expert_is_no_slots() -> None:
    limited = Routing(64, 6, 8, 4)
    assert Routing(64, 6, 8, 4, held=tuple(range(64))).distinct(8) == limited.distinct(8)
    assert Routing(64, 6, held=tuple(range(64))).distinct(8) == pytest.approx(8 * (1 - comb(56, 6) / comb(64, 6)), abs=0.05)
