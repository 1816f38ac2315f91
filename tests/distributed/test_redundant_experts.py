"""Programs whose experts have several slots: the same results, each rank with the weights of its own slots, and tokens shared evenly."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.driver.ranks import RankWeights
from dsc.driver.run import open_weights
from dsc.ir.core import Module, Op
from dsc.ir.mesh import mesh_of
from dsc.ir.ops.moe import ChooseSlots, Combine, Dispatch
from dsc.ir.slots import slots_of
from dsc.models.expert_names import parts
from dsc.models.random_weights import RandomWeights
from dsc.models.weights import Wanted
from dsc.passes.manager import apply

STACK = "model.layers.1.mlp.experts"


def place(module: Module, options: str, mesh: str | None = None, dispatch: str = "direct") -> Module:
    """The program with slots, and what one rank of it runs, as its text says it."""
    rest = f',shard-experts{{mesh="{mesh}",dispatch={dispatch}}}' if mesh else ""
    return dsc.parse(str(apply(module, f"place-experts{{{options}}}{rest}")))


def differing(found: Any, expected: Any) -> list[str]:
    assert list(found) == list(expected)
    return [name for name in expected if not np.array_equal(found[name], expected[name])]


@pytest.mark.parametrize(
    ("mode", "passes", "replicas", "mesh"),
    [("forward", "", 20, "ep=4"), ("forward", "quantize-fp8", 24, "dp=4,ep=2"), ("decode", "", 20, "ep=4")],
)
def test_slots_change_no_bit(mode: str, passes: str, replicas: int, mesh: str, program: Any, run_whole: Any, run_ranks: Any) -> None:
    """Neither in the whole program nor on ranks: 5 slots a rank, and 12, for 16 experts."""
    module = program(mode, batch=4, passes=passes)
    ranks = int(mesh.rpartition("ep=")[2])
    expected = run_whole(module)
    assert differing(run_whole(place(module, f"replicas={replicas},ranks={ranks}")), expected) == []
    assert differing(run_ranks(module, place(module, f"replicas={replicas},ranks={ranks}", mesh)), expected) == []


def test_slots_and_heads_on_ranks_change_no_bit(program: Any, run_ranks: Any) -> None:
    """Against the same mesh without slots, as heads on several ranks are added up otherwise than on one."""
    module = program(batch=4, seq=8)
    expected = run_ranks(module, dsc.apply(module, 'shard-experts{mesh="dp=4,tp=2,ep=8",dispatch=direct}'))
    assert differing(run_ranks(module, place(module, "replicas=24,ranks=8", "dp=4,tp=2,ep=8")), expected) == []


def test_two_hops_to_slots(program: Any, run_ranks: Any) -> None:
    """A slot on a node of its own instead of another is another rounding of partial sums: in float32 the results are as near."""
    module = program(batch=4, seq=8, dtype="float32")
    found = run_ranks(module, place(module, "replicas=20,ranks=4", "ep=4,node=2", "two-hop"))
    expected = run_ranks(module, place(module, "replicas=20,ranks=4", "ep=4,node=2"))
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 2.0**-18 * np.abs(value).max()


def test_a_placement_of_dsc_place(program: Any, run_whole: Any, run_ranks: Any, tmp_path: Path) -> None:
    """Each layer by its own slots; what a rank reads of a stack are the experts of its slots, and no others."""
    module = program(batch=4, layers=3)
    rng = np.random.default_rng(0)
    layers = {f"model.layers.{i}": [*rng.permutation(16).tolist(), *rng.integers(0, 16, 4).tolist()] for i in (1, 2)}
    raw = {"format": "dsc-placement", "version": 1, "policy": "balanced", "experts": 16, "gpus": 4, "nodes": 1, "layers": layers}
    file = tmp_path / "placement.json"
    file.write_text(json.dumps(raw))
    sharded = place(module, f'placement="{file}"', "ep=4")
    slots = slots_of(sharded)
    assert slots is not None
    assert {name.removesuffix(".mlp.experts"): list(held) for name, held in slots.held.items()} == layers
    assert differing(run_ranks(module, sharded), run_whole(module)) == []

    read: list[str] = []

    class Noted(RandomWeights):
        def get(self, wanted: Wanted) -> np.ndarray:
            read.extend(part.name for part in parts(wanted.name, wanted.shape, wanted.experts))
            return super().get(wanted)

    found = RankWeights(Noted(0), sharded, keep="none").get(2, f"{STACK}.gate_proj")
    held = layers["model.layers.1"][10:15]
    assert read == [f"{STACK}.{e}.gate_proj.weight" for e in held]
    every = open_weights("random:0", module, None)(f"{STACK}.gate_proj", _weight(module))
    assert np.array_equal(found, every[held])


def _weight(module: Module) -> Any:
    from dsc.ir.walk import weights

    return weights(module)[f"{STACK}.gate_proj"]


def test_slots_of_an_expert_get_as_many_tokens(program: Any, run_ranks: Any) -> None:
    """On each rank the tokens of an expert are shared by its slots, one more or less; ranks start at different ones."""
    module = program(batch=4, seq=16)
    sharded = place(module, "replicas=20,ranks=4", "ep=4")
    held = np.array(next(iter(slots_of(sharded).held.values())))  # type: ignore[union-attr]
    starts, seen = set(), 0

    def observer(rank: int) -> Callable[..., None]:
        def observe(site: Any, op: Op, operands: Sequence[Any], results: Sequence[Any]) -> None:
            nonlocal seen
            if isinstance(op, ChooseSlots):
                ids, _, start = operands
                assert np.array_equal(held[results[0]], ids)
                counts = np.bincount(results[0].ravel(), minlength=len(held))
                for expert in range(16):
                    own = counts[held == expert]
                    assert own.max() - own.min() <= 1
                starts.add(int(start[0]))
                seen += 1

        return observe

    run_ranks(module, sharded, observer)
    assert starts == {0, 1, 2, 3}
    assert seen == 4


def test_counts_are_those_of_experts_again() -> None:
    """What else reads the counts of a dispatch reads them by expert, shared or not."""
    text = """
func @f(%x: f32[4, 2], %ids: i32[4, 2], %weights: f32[4, 2]) {
  %rows: f32[8, 2], %counts: i32[3], %handle: bundle{i32[8]} = dispatch([%x], %ids, experts=3)  @ f#1 F
  %w: f32[3, 2, 2] = param("experts.up_proj")  @ f#2 F
  %y: f32[8, 2] = grouped_matmul(%rows, %w, %counts)  @ f#3 F
  %out: f32[4, 2] = combine(%y, %handle, %weights)  @ f#4 F
  return %out, %counts
}
"""
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((4, 2)).astype(np.float32), rng.random((4, 2)).astype(np.float32)
    ids = np.array([[0, 1], [0, 2], [0, 2], [1, 0]], np.int32)
    module = dsc.parse(text)
    expected = dsc.run(module, inputs=(x, ids, weights), backend="numpy-f64")
    found = dsc.run(place(module, "replicas=6,ranks=3"), inputs=(x, ids, weights), backend="numpy-f64")
    assert found[1].tolist() == [4, 2, 2]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_the_shared_expert_as_a_routed_one(mode: str, program: Any, run_whole: Any, run_ranks: Any) -> None:
    """Every token goes to it with weight 1. One sum is rounded where there were three roundings: in float32 nothing else differs."""
    module = program(mode, batch=8, dtype="float32")
    whole = place(module, "replicas=24,ranks=8,shared=routed")
    dispatches = [op for func in whole.funcs for op in func.ops if isinstance(op, Dispatch)]
    assert all(op.experts == 24 and op.ids.shape[1] == 5 for op in dispatches)
    assert not any("shared_experts" in name for name in dsc_weights(whole))
    expected, found = run_whole(module), run_whole(whole)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 2.0**-18 * np.abs(value).max()
    assert differing(run_ranks(module, place(module, "replicas=24,ranks=8,shared=routed", "ep=8")), found) == []


def dsc_weights(module: Module) -> list[str]:
    from dsc.ir.walk import weights

    return list(weights(module))


def test_a_wrong_expert_in_a_slot_is_seen(program: Any, run_whole: Any) -> None:
    """The tests above compare what could differ: two slots exchanged in the weights alone change the results."""
    module = program(batch=2, seq=8)
    placed = place(module, "replicas=20,ranks=4")
    record = dict(placed.attributes["placement"])
    ((first, second, *rest),) = record["slots"]
    source = RandomWeights(0)
    broken = placed.replace(attributes={**placed.attributes, "placement": {**record, "slots": ((second, first, *rest),)}})
    fetch, wrong = (open_weights("random:0", one, None) for one in (placed, broken))
    from dsc.backends.numpy_ref.run import FLOAT64
    from dsc.driver.inputs import prepare

    (found,) = FLOAT64.run(placed, lambda n, t: (fetch if n.endswith(".slots") else wrong)(n, t), prepare(module, None))
    assert not np.array_equal(found, next(iter(run_whole(module).values())))
    assert source.seed == 0


@pytest.mark.parametrize(
    ("options", "mesh", "message"),
    [
        ("replicas=20,ranks=4", "ep=2", "experts have slots on 4 ranks, found ep=2; ep=4 would fit"),
        ("replicas=20,ranks=3", None, "20 replicas do not make equal shares for 3 GPUs"),
        ("replicas=8,ranks=4", None, "8 replicas cannot hold 16 experts"),
        ("replicas=20", None, "expected placement=FILE, or replicas=N and ranks=N"),
        ("placement=nowhere.json", None, "nowhere.json: No such file or directory"),
    ],
)
def test_what_cannot_be_is_one_line(options: str, mesh: str | None, message: str, program: Any) -> None:
    with pytest.raises(dsc.DscError, match=message) as caught:
        place(program(batch=4), options, mesh)
    assert "\n" not in str(caught.value)


def test_files_for_other_programs_are_one_line(program: Any, tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    raw = {"format": "dsc-placement", "version": 1, "policy": "balanced", "experts": 8, "gpus": 4, "nodes": 1}
    for layers, experts, message in [
        ({"model.layers.1": list(range(8))}, 8, "places 8 experts, the program has 16"),
        ({"model.layers.7": list(range(16))}, 16, r"places no layer \['model.layers.1'\]; it has model.layers.7"),
        ({"model.layers.1": [*range(15), 0]}, 16, r"expert \[15\] of 16 has no slot"),
    ]:
        file.write_text(json.dumps(raw | {"layers": layers, "experts": experts}))
        with pytest.raises(dsc.DscError, match=message):
            place(program(batch=4), f'placement="{file}"')


def test_training_is_refused(program: Any) -> None:
    with pytest.raises(dsc.DscError, match="redundant experts are for inference"):
        place(program("train", batch=2, seq=8), "replicas=20,ranks=4")
    with pytest.raises(dsc.DscError, match="the program has no experts to place"):
        place(dsc.parse("func @f(%x: f32[4, 2]) {\n  %y: f32[4, 2] = neg(%x)  @ f#1 F\n  return %y\n}\n"), "replicas=4,ranks=2")


def test_combine_of_slots_is_what_it_was(program: Any) -> None:
    """The pass changes ids, weights of experts and counts; what leads rows back stays."""
    module = program(batch=2, seq=8)
    before, after = (
        [op.attributes for f in m.funcs for op in f.ops if isinstance(op, Combine)] for m in (module, place(module, "replicas=20,ranks=4"))
    )
    assert before == after
    assert mesh_of(place(module, "replicas=20,ranks=2", "ep=2")).ep == 2
