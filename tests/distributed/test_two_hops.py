"""Dispatch over nodes: how often a token crosses the network, that one kernel means the two hops bit for bit, and that nothing but the
rounding of its partial sums tells it from dispatch at once.

The oracle of the results is the same mesh with direct dispatch, where each sum of a token's experts is replaced by one that is rounded as
two hops round: for each rank of experts, for each node, at home. Sums run in float64, so that the order within them has no say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.backends.arrays import rounded
from dsc.backends.numpy_ref.run import FLOAT32, FLOAT64
from dsc.distributed import local
from dsc.distributed.world import Abreast, Exchange, Program
from dsc.driver.inputs import prepare
from dsc.driver.ranks import RankWeights, cut
from dsc.ir.core import Builder, Module, Op, Value
from dsc.ir.mesh import Mesh, mesh_of, parse_mesh
from dsc.ir.ops.internode import InternodeDispatch
from dsc.ir.ops.moe import Combine, CombineGroups, Dispatch, DispatchGroups, Route
from dsc.ir.sharding import input_splits
from dsc.ir.types import DType, Tensor
from dsc.models.random_weights import RandomWeights
from dsc.passes.rewrite import rebuild


def shard(module: Module, mesh: str, dispatch: str) -> Module:
    """The program of a rank, as its text says it."""
    return dsc.parse(str(dsc.apply(module, f'shard-experts{{mesh="{mesh}",dispatch={dispatch}}}')))


class Parted:
    """Replaces what `combine` gives on a rank of direct dispatch by a sum that is rounded where two hops round."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.handles: dict[int, tuple[Any, Any]] = {}
        """By identity of the order: the order, which keeps it alive, and the rank along ep of each row's expert."""
        self.replaced = 0

    def observer(self, rank: int) -> Callable[..., Any]:
        def observe(site: Any, op: Op, operands: Sequence[Any], results: Sequence[Any]) -> Any:
            if isinstance(op, Dispatch):
                (order,) = results[-1]
                self.handles[id(order)] = order, np.repeat(np.arange(op.experts), results[-2]) // (op.experts // self.mesh.ep)
            if not isinstance(op, Combine):
                return None
            rows, (order,), weights = operands
            self.replaced += 1
            return (self.total(op, rows, order, weights, self.handles[id(order)][1]),)

        return observe

    def total(self, op: Combine, rows: Any, order: Any, weights: Any, owners: Any) -> Any:
        dtype = op.result.dtype
        wide, k = rows.astype(np.float64), weights.shape[1]
        found = np.zeros((len(weights), rows.shape[1]))
        largest = np.zeros_like(found)
        for t in range(len(weights)):
            nodes: dict[int, Any] = {}
            for owner in sorted(set(owners[order // k == t])):
                own = [r for r in np.flatnonzero(order // k == t) if owners[r] == owner]
                part = rounded(sum(float(weights[t, order[r] % k]) * wide[r] for r in own), dtype).astype(np.float64)
                node = owner * self.mesh.size("ep.node") // self.mesh.ep
                nodes[node] = nodes.get(node, 0.0) + part
                largest[t] += np.abs(part)
            parts = [rounded(nodes[n], dtype).astype(np.float64) for n in sorted(nodes)]
            largest[t] += sum(map(np.abs, parts))
            found[t] = sum(parts)
        result = rounded(found, dtype)
        # With unit u, a rounding of every part of a rank and of a node, and one at the end here and one there: the bound that docs state.
        unit = 2.0**-8 if dtype is DType.bf16 else 2.0**-24
        exact = np.zeros_like(found)
        for r, slot in enumerate(order):
            exact[slot // k] += float(weights[slot // k, slot % k]) * wide[r]
        assert (np.abs(result.astype(np.float64) - exact) <= unit * (1 + 4 * unit) * (largest + np.abs(exact)) * (1 + 1e-9)).all()
        return result


MESHES = ["ep=4,node=2", "ep=4,node=1", "dp=8,ep=4,node=2", "ep=16", "ep=8,node=2"]


def assert_equal_but_for_rounding(module: Module, mesh: str, run_ranks: Any, skipped: str = "nothing") -> None:
    parted = Parted(parse_mesh(mesh))
    found = run_ranks(module, shard(module, mesh, "forwarded"))
    expected = run_ranks(module, shard(module, mesh, "direct"), parted.observer)
    assert parted.replaced
    assert list(found) == list(expected)
    differing = [name for name in expected if skipped not in name and not np.array_equal(found[name], expected[name])]
    assert not differing


@pytest.mark.parametrize(
    ("mode", "passes", "mesh"),
    [
        ("forward", "quantize-fp8", "ep=4,node=2"),
        ("forward", "", "dp=8,ep=4,node=2"),
        pytest.param("train", "weighted-swiglu,quantize-fp8", "ep=4,node=2", marks=pytest.mark.slow),
    ],
)
def test_one_kernel_means_the_two_hops(mode: str, passes: str, mesh: str, program: Any, run_ranks: Any) -> None:
    module = program(mode, batch=parse_mesh(mesh).dp, seq=8, passes=passes)
    one, two = (run_ranks(module, shard(module, mesh, dispatch)) for dispatch in ("forwarded", "two-hop"))
    assert [name for name in one if not np.array_equal(one[name], two[name])] == []


@pytest.mark.parametrize("passes", ["", "quantize-fp8"], ids=["bf16", "fp8"])
@pytest.mark.parametrize("mesh", MESHES)
def test_sums_are_rounded_for_each_rank_and_node(mesh: str, passes: str, program: Any, run_ranks: Any) -> None:
    module = program(batch=parse_mesh(mesh).dp, seq=5, passes=passes)
    assert_equal_but_for_rounding(module, mesh, run_ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "passes"), [("ep=4,node=2", ""), ("dp=4,ep=2,node=1", "weighted-swiglu"), ("dp=2,tp=2,ep=4,node=2", "weighted-swiglu")]
)
def test_losses_and_every_gradient(mesh: str, passes: str, program: Any, run_ranks: Any) -> None:
    assert_equal_but_for_rounding(program("train", batch=4, seq=8, passes=passes), mesh, run_ranks)


@pytest.mark.slow
def test_gradients_in_fp8(program: Any, run_ranks: Any) -> None:
    """Weight gradients of experts are quantised by tiles of 128 rows, and rows of an expert lie in another order: these alone differ."""
    assert_equal_but_for_rounding(
        program("train", batch=4, seq=128, passes="weighted-swiglu,quantize-fp8"), "ep=4,node=2", run_ranks, ".experts."
    )


def test_decoding(program: Any, run_ranks: Any) -> None:
    assert_equal_but_for_rounding(program("decode", batch=4), "ep=4,node=2", run_ranks)


@pytest.mark.slow
def test_recomputing_changes_no_bit(program: Any, run_ranks: Any) -> None:
    """Ids and handles are kept: no row is dispatched by a second decision."""
    module = program("train", batch=4, seq=8)
    sharded = shard(module, "ep=4,node=2", "forwarded")
    after = dsc.apply(sharded, "recompute,simplify")
    assert after != sharded
    routing = [
        sum(isinstance(op, InternodeDispatch | DispatchGroups | Route) for func in m.funcs for op in func.ops) for m in (sharded, after)
    ]
    assert routing[0] == routing[1]
    found, expected = run_ranks(module, after), run_ranks(module, sharded)
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []


class Counted:
    """What each rank hands to others, by where in the program it does: rows by axis, and whether they leave the node."""

    def __init__(self, module: Module) -> None:
        self.module, self.mesh = module, mesh_of(module)
        self.rows: dict[tuple[str, str], Counter[bool]] = {}
        self.ids: dict[tuple[str, int], Any] = {}

    def run(self, unsharded: Module) -> None:
        inputs, weights = prepare(unsharded, None), RankWeights(RandomWeights(0), self.module, keep="all")

        def one(rank: int) -> Program[Any]:
            own = tuple(cut(x, split, self.mesh, rank) for x, split in zip(inputs, input_splits(self.module), strict=True))
            return self.through(rank, FLOAT64.program(self.module, lambda name, _: weights.get(rank, name), own, self.observer(rank)))

        local.run(self.mesh, one)

    def through(self, rank: int, program: Program[Any]) -> Program[Any]:
        """The same program; its requests are looked at on their way to the world."""
        answer: Any = None
        while True:
            try:
                asked = program.send(answer)
            except StopIteration as done:
                return done.value
            if isinstance(asked, Abreast):  # with others it would ask unseen
                answer = None
                continue
            if isinstance(asked, Exchange) and asked.axis in ("ep.node", "ep.local") and asked.messages[0][0].ndim == 2:
                counted = self.rows.setdefault((asked.site, asked.axis), Counter())
                for to, message in zip(self.mesh.group(asked.axis, rank), asked.messages, strict=True):
                    counted[self.mesh.crosses(rank, to)] += len(message[0])
                    if asked.axis == "ep.node":  # the entry has the sender's index in its node
                        assert self.mesh.index("ep.local", rank) == self.mesh.index("ep.local", to)
            answer = yield asked

    def observer(self, rank: int) -> Callable[..., None]:
        def observe(site: Any, op: Op, operands: Sequence[Any], results: Sequence[Any]) -> None:
            if isinstance(op, InternodeDispatch) or (isinstance(op, DispatchGroups) and op.rows == "to_nodes"):
                self.ids[site.weights, rank] = operands[-1]

        return observe

    def copies(self, site: str, axis: str, held: int) -> dict[bool, int]:
        """By hand, from what each token chose: by whether they leave the node, one for each node of its experts, or each rank of a node."""
        found, local = {True: 0, False: 0}, self.mesh.size("ep.local")
        for (name, rank), own in self.ids.items():
            for chosen in own.tolist() if f"({name})" in site else ():
                ranks = {e // held for e in chosen}  # along ep, of which consecutive ones are a node
                nodes, home = {r // local for r in ranks}, self.mesh.index("ep.node", rank)
                found[True] += len(nodes - {home}) if axis == "ep.node" else 0
                found[False] += len(ranks) if axis == "ep.local" else len(nodes & {home})
        return found


@pytest.mark.parametrize("mesh", ["ep=4,node=2", "dp=8,ep=4,node=2", "ep=8,node=2", "ep=4,node=1"])
@pytest.mark.parametrize(
    ("mode", "dispatch"), [("forward", "two-hop"), ("forward", "forwarded"), pytest.param("train", "forwarded", marks=pytest.mark.slow)]
)
def test_copies_of_a_token(mode: str, dispatch: str, mesh: str, program: Any) -> None:
    """Every way to the experts and back takes one row for each (token, node) over the network, one for each (token, rank) inside."""
    module = program(mode, batch=8, seq=4)
    counted = Counted(shard(module, mesh, dispatch))
    counted.run(module)
    assert len(counted.rows) >= (4 if "node=1" not in mesh else 2)  # there and back, along each axis that there is
    for (site, axis), found in counted.rows.items():
        assert {away: found[away] for away in (True, False)} == counted.copies(site, axis, 16 // counted.mesh.ep)


@pytest.mark.parametrize(("groups", "top_groups", "nodes", "ranks"), [(8, 4, 3.954, 7.49), (1, 1, 5.295, 7.676)])
def test_nodes_that_a_token_of_deepseek_v3_reaches(groups: int, top_groups: int, nodes: float, ranks: float) -> None:
    """8 of 256 experts on 8 nodes of 8 ranks: by DeepSeek's rule on independent scores, and without groups, where it is mere counting."""
    tokens = 1 << 14
    scores = np.random.default_rng(3).uniform(1e-6, 1 - 1e-6, (tokens, 256))
    gate = Route(Value(Tensor(DType.f32, scores.shape), "logits"), None, 8, groups=groups, top_groups=top_groups)
    (ids, _) = FLOAT32.evaluate(gate, (np.log(scores / (1 - scores)).astype(np.float32),))
    x = Value(Tensor(DType.bf16, (tokens, 1)), "x")
    for parts, expected in ((8, nodes), (64, ranks)):
        op = DispatchGroups((x,), Value(Tensor(DType.i32, ids.shape), "ids"), parts, 256 // parts)
        counts = FLOAT32.evaluate(op, (np.zeros((tokens, 1), DType_of(DType.bf16)), ids))[-2]
        distinct = [len(set(row)) for row in (ids // (256 // parts)).tolist()]
        assert counts.sum() == sum(distinct)
        assert (
            abs(counts.sum() / tokens - expected) < 4 * np.std(distinct) / tokens**0.5 + 0.005
        )  # 4 standard errors, and the figure's last digit


def DType_of(dtype: DType) -> Any:
    from dsc.backends.arrays import STORAGE

    return STORAGE[dtype]


def _without_weights(op: Op, b: Builder) -> Sequence[Value] | None:
    return b.emit(op.copy(weights=None, id="")).results if isinstance(op, CombineGroups) and op.weights else None


def _for_each_expert(op: Op, b: Builder) -> Sequence[Value] | None:
    """Ids that every rank takes for its own experts'."""
    if isinstance(op, DispatchGroups) and op.rows == "to_ranks":
        return b.emit(op.copy(size=2 * op.size, id="")).results
    return None


@pytest.mark.parametrize("fault", [_without_weights, _for_each_expert])
def test_a_fault_is_seen(fault: Any, program: Any, run_ranks: Any) -> None:
    module = program(batch=4, seq=5)
    sharded = shard(module, "ep=4,node=2", "two-hop")
    broken = sharded.map(lambda func: rebuild(func, fault))
    assert broken != sharded
    expected = run_ranks(module, sharded)
    try:
        found = run_ranks(module, broken)
    except dsc.DscError:
        return
    assert any(not np.allclose(found[name].astype(float), expected[name].astype(float), rtol=0.1, atol=0.1) for name in expected)


@pytest.mark.parametrize(("mode", "mesh", "forwards"), [("forward", "ep=4,node=2", True), ("train", "ep=4,node=2", True),
                                                        ("decode", "ep=4,node=2", False), ("forward", "ep=4", False)])  # fmt: skip
def test_forwarded_where_ep_spans_nodes_but_in_decoding(mode: str, mesh: str, forwards: bool, program: Any) -> None:
    made = dsc.apply(program(mode, batch=4, seq=8), f'shard-experts{{mesh="{mesh}"}}')
    assert any(isinstance(op, InternodeDispatch) for func in made.funcs for op in func.ops) == forwards


def test_two_hops_inside_a_node_say_what_would_fit(program: Any) -> None:
    with pytest.raises(dsc.DscError, match="ep=4 lies within a node of 8 ranks, so no dispatch is two-hop; ep=16 or node=2 would fit"):
        shard(program(batch=4), "ep=4", "two-hop")
