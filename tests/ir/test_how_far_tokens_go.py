"""How many nodes and ranks tokens reach, against what the interpreter's gate chooses, and how many rows that makes of each hop."""

from __future__ import annotations

from math import ceil, comb

import numpy as np
import pytest

import dsc
from dsc.backends.numpy_ref.run import FLOAT32
from dsc.ir.core import Value
from dsc.ir.expected import mean_rows
from dsc.ir.ops.moe import ChooseSlots, Route
from dsc.ir.routing import TOKENS, Routing, routing_by_gate, routing_of
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


@pytest.fixture(scope="module")
def whole() -> dsc.Module:
    """One MoE layer of DeepSeek-V3: each rank has 4096 tokens, of which each goes to 8 of 256 experts in 4 of 8 groups."""
    shape = ["num_hidden_layers=1", "first_k_dense_replace=0", "num_nextn_predict_layers=0"]
    return dsc.trace("deepseek-v3", batch=64, seq=4096, overrides=shape)


def test_rows_of_each_hop_follow_the_gate(whole: dsc.Module) -> None:
    """A row for each of 3.954 nodes of 8, then for each of 7.49 ranks of 64, in the end for each of 8 experts; bounds are 8, 64 and 256."""
    made = dsc.apply(whole, 'simplify,shard-experts{mesh="dp=64,ep=64,node=8"}')
    rows = {dim.name: (dim.bound / 4096, mean / 4096) for dim, mean in mean_rows(made).items()}
    for name, most, copies in (("to_nodes", 8, 3.954), ("entered", 8, 3.954), ("to_ranks", 64, 7.49), ("arrived", 64, 7.49)):
        assert rows[name] == (most, pytest.approx(copies, abs=0.01))
    assert rows["rows"] == (256, 8)


def test_rows_follow_the_slots(whole: dsc.Module) -> None:
    made = dsc.apply(whole, 'simplify,place-experts{replicas=320,ranks=64},shard-experts{mesh="dp=64,ep=64,node=8"}')
    routing = routing_of(made)
    assert routing is not None
    assert list(routing_by_gate(made).values()) == [routing]
    assert (len(routing.held), routing.slots, routing.choices) == (320, 320, 8)
    rows = {dim.name: mean for dim, mean in mean_rows(made).items()}
    assert [rows["to_nodes"], rows["to_ranks"]] == [ceil(4096 * routing.distinct(8)), ceil(4096 * routing.distinct(64))]
    assert rows["to_nodes"] < rows["to_ranks"] < rows["rows"] == 4096 * 8
