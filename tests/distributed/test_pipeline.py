"""Pipelines, run: losses and gradients are those of the whole program, micro-batch by micro-batch, whatever the schedule and the mesh.

What one stage computes of one micro-batch has the bits that the whole program computes. Sums over micro-batches are made in the order of
the schedule: where that is the order of the micro-batches, gradients are equal bit for bit; elsewhere they differ by the rounding of sums
of the same terms in another order, which the terms bound.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc import DscError, backends
from dsc.distributed import local
from dsc.distributed.pipeline import Pipeline, pipeline
from dsc.driver.inputs import prepare
from dsc.driver.measure import flat
from dsc.driver.pipelining import schedule_of
from dsc.driver.ranks import rank_program, whole_results
from dsc.driver.run import array_types
from dsc.ir.core import Module, Op
from dsc.ir.mesh import mesh_of, parse_mesh
from dsc.ir.ops.collective import AllReduce, ReduceScatter
from dsc.ir.ops.elementwise import Add
from dsc.ir.ops.shape import Reshape
from dsc.ir.stages import stages_of
from dsc.models.random_weights import RandomWeights
from dsc.schedule.actions import Action, Kind, Schedule, parse
from dsc.schedule.generate import generate
from dsc.schedule.simulate import lower, simulate

HERE = Path(__file__).parent
U = 2.0**-24
"""Half an ulp of 1 in float32."""

SUMS = (Add, AllReduce, ReduceScatter)
Results = dict[str, np.ndarray]
Terms = dict[str, np.ndarray]
"""Of each gradient, the sum of the magnitudes of what is added up in main."""


class Remembered(RandomWeights):
    """Made once for all tests."""

    def get(self, wanted: Any) -> np.ndarray:
        if wanted.name not in KEPT:
            KEPT[wanted.name] = super().get(wanted)
        return KEPT[wanted.name]


KEPT: dict[str, np.ndarray] = {}


@cache
def source(mode: str, batch: int, seq: int, layers: int, dense: int = 1) -> Module:
    sizes = {"context": 2 * seq} if mode == "decode" else {"seq": seq}
    changes = [f"num_hidden_layers={layers}", f"first_k_dense_replace={dense}"]
    return dsc.trace("deepseek-v3-tiny", mode=mode, batch=batch, overrides=changes, **sizes)


def program(mode: str = "train", batch: int = 1, seq: int = 4, layers: int = 3, passes: str = "", dense: int = 1) -> Module:
    first = "simplify,autodiff{split=true},simplify" if mode == "train" else "simplify"
    return dsc.apply(source(mode, batch, seq, layers, dense), f"{first},{passes}" if passes else first)


def staged(module: Module, mesh: str, stages: int) -> Module:
    """The program of a rank, as its text says it."""
    return dsc.parse(str(dsc.apply(module, f'split-stages{{stages={stages}}},shard-experts{{mesh="{mesh}"}}')))


def on_ranks(module: Module, inputs: Sequence[Any], schedule: Schedule | None = None, observe: Any = None) -> Results:
    """What all ranks give together."""
    runner = backends.get("numpy")
    placed, _ = rank_program(module, Remembered(0), inputs, runner, observe, schedule)
    held = local.run(mesh_of(module), placed)
    return dict(zip(array_types(module), flat(whole_results(module, dict(enumerate(held)))), strict=True))


def one_by_one(module: Module, count: int) -> tuple[list[Results], Terms]:
    """The results of the program without stages, for each micro-batch, and what sums in main add up."""
    inputs = prepare(dsc.apply(module, "split-stages{stages=1}"), None, microbatches=count)
    sharded = module if module.stage == "sharded" else dsc.apply(module, 'shard-experts{mesh="dp=1"}')
    sizes: defaultdict[str, Any] = defaultdict(float)

    def observe(site: Any, op: Op, operands: Sequence[Any], results: Sequence[Any]) -> None:
        if site.func == "main" and isinstance(op, SUMS):
            sizes[op.id] = sizes[op.id] + sum(np.abs(x.astype(np.float64)) for x in operands)

    each = [on_ranks(sharded, [x[len(x) // count * m :][: len(x) // count] for x in inputs], None, observe) for m in range(count)]
    return each, gradients_terms(sharded, sizes)


def gradients_terms(module: Module, sizes: dict[str, Any]) -> Terms:
    """The terms of the gradients that main adds up itself, by name."""
    from dsc.ir.gradients import bundles

    found: Terms = {}
    for names, result in zip(bundles(module), module.main.results[len(module.main.results) - len(bundles(module)) :], strict=True):
        for name, value in zip(names, getattr(result.owner, "values", ()), strict=False):
            owner = value.owner
            while isinstance(owner, (*SUMS, Reshape)):
                found[f"{name}.grad"] = found.get(f"{name}.grad", 0.0) + sizes[owner.id]
                owner = owner.operands[0].owner
    return found


def order_of(schedule: Schedule) -> list[list[int]]:
    """Micro-batches in the order in which stages add them up, by direction. It is the same for every stage."""
    found: defaultdict[tuple[int, bool, Kind], list[int]] = defaultdict(list)
    weights = {Kind.W, Kind.B}
    for _, _, action in schedule.actions():
        if action.kind in weights:
            found[action.stage, action.reverse, Kind.W].append(action.microbatch)
    orders = {reverse: {tuple(row) for (_, way, _), row in found.items() if way == reverse} for reverse in (False, True)}
    assert all(len(rows) <= 1 for rows in orders.values())
    return [list(row) for rows in orders.values() for row in rows]


def averaged(each: Sequence[Results], orders: Iterable[Sequence[int]]) -> Results:
    """Sums in float32 in these orders, of these sums the sum, divided; whole numbers are not divided."""
    found = {}
    for name, first in each[0].items():
        total = reduce(np.add, [reduce(np.add, [each[m][name] for m in order]) for order in orders])
        found[name] = total if first.dtype.kind == "i" else np.asarray(total / len(each), first.dtype)
    return found


def assert_close(found: Results, expected: Results, terms: Terms, count: int) -> int:
    """Equal but where terms are added in another order: `count` of them. Gives how many results are equal bit for bit."""
    assert found.keys() == expected.keys()
    exact = 0
    for name, value in expected.items():
        if found[name].tobytes() == value.tobytes():
            exact += 1
            continue
        assert name in terms, f"{name} is added up by one rank in the same order, and differs"
        difference = np.abs(found[name].astype(np.float64) - value)
        assert np.all(difference <= 2 * count * U * terms[name]), name
    return exact


def planned(name: str, pp: int, count: int | None = None) -> Schedule:
    return schedule_of(parse_mesh(f"pp={pp}"), "train", name, count)


SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")


@pytest.fixture(scope="module")
def reference() -> tuple[Module, list[Results], Terms]:
    """The program and what it gives for eight micro-batches."""
    module = program()
    return (module, *one_by_one(module, 8))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_give_what_the_program_gives(name: str, reference: tuple[Module, list[Results], Terms]) -> None:
    module, each, terms = reference
    schedule = planned(name, 4, 8)
    made = staged(module, "pp=4", schedule.stages)
    found = on_ranks(made, prepare(made, None, microbatches=8), schedule)
    expected = averaged(each, order_of(schedule))
    shared = {"model.embed_tokens.weight.grad", "lm_head.weight.grad"}
    assert terms.keys() == shared
    assert assert_close(found, expected, {k: v / 8 for k, v in terms.items()}, 2 * 8) >= len(expected) - 2


@pytest.mark.slow
def test_five_schedules_on_sixteen_ranks() -> None:
    """Thirty-two layers, the last two with experts, which take twice as long: as many stages as ranks, or twice as many."""
    module = program(layers=32, seq=2, dense=30)
    each, terms = one_by_one(module, 32)
    for name in SCHEDULES[1:]:
        count = 32 if name.startswith("dualpipe") else 8
        schedule = planned(name, 16, count)
        made = dsc.apply(module, f'split-stages{{stages={schedule.stages}}},shard-experts{{mesh="pp=16"}}')
        found = on_ranks(made, _first(module, count, 32), schedule)
        limits = {k: v / count for k, v in terms.items()}
        assert assert_close(found, averaged(each[:count], order_of(schedule)), limits, 2 * count) >= len(found) - 2, name


def _first(module: Module, count: int, of: int) -> list[Any]:
    """The inputs of the first micro-batches."""
    return [x[: len(x) // of * count] for x in prepare(dsc.apply(module, "split-stages{stages=1}"), None, microbatches=of)]


@pytest.mark.slow
def test_five_schedules_on_four_processes(reference: tuple[Module, list[Results], Terms], forks: Any, tmp_path: Path) -> None:
    """One start of four gloo ranks runs them all; they agree bit for bit with the ranks in lockstep."""
    module = reference[0]
    cases = []
    for name in (*SCHEDULES[1:], "zb1p"):
        wide = name == "zb1p" and len(cases) == 5  # once more, over two stages of two ranks
        schedule = planned(name, 2 if wide else 4, 8 if name.startswith("dualpipe") else 4)
        made = staged(program(batch=2) if wide else module, "pp=2,dp=2,ep=2" if wide else "pp=4", schedule.stages)
        cases.append((made, lower(simulate(schedule))))
    (tmp_path / "cases").write_bytes(pickle.dumps([(str(made), str(schedule)) for made, schedule in cases]))
    started = forks.ranks(4, str(HERE / "pipeline_rank.py"), str(tmp_path / "cases"), str(tmp_path / "answers"))
    assert [process.wait(240) for process in started] == [0] * 4
    answers = pickle.loads((tmp_path / "answers").read_bytes())
    assert len(answers) == len(cases) == 6
    for (made, schedule), answer in zip(cases, answers, strict=True):
        expected = on_ranks(made, prepare(made, None, microbatches=schedule.microbatches), schedule)
        found = dict(zip(array_types(made), flat(answer), strict=True))
        assert not [name for name, x in expected.items() if found[name].tobytes() != x.tobytes()]


MESHES = [
    ("pp=2,dp=2,ep=2", "1f1b", ""),
    ("pp=2,dp=4,ep=2", "dualpipe", ""),
    ("pp=2,dp=2,ep=4,tp=2", "zb1p", ""),
    ("pp=3,dp=2", "1f1b", ""),
    ("pp=2,dp=2,ep=2", "dualpipev", "quantize-fp8"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "name", "passes"), MESHES)
def test_products_with_other_axes(mesh: str, name: str, passes: str) -> None:
    """Against the ranks of one stage that has all of the program: what they add up once, these add up for all micro-batches together."""
    split = parse_mesh(mesh)
    module = program(batch=max(2, split.dp), passes=passes)
    schedule = planned(name, split.pp, 4 if name == "1f1b" else None)
    count = schedule.microbatches
    without = dsc.apply(module, f'shard-experts{{mesh="dp={split.dp},ep={split.ep},tp={split.tp}"}}')
    sizes: defaultdict[str, Any] = defaultdict(float)

    def observe(site: Any, op: Op, operands: Sequence[Any], results: Sequence[Any]) -> None:
        if site.func == "main" and isinstance(op, SUMS) and operands[0].dtype.kind == "f":
            sizes[op.id] = sizes[op.id] + sum(float(np.abs(x.astype(np.float64)).max(initial=0)) for x in operands)

    made = staged(module, mesh, schedule.stages)
    inputs = prepare(made, None, microbatches=count)
    each = [on_ranks(without, [x[len(x) // count * m :][: len(x) // count] for x in inputs], None, observe) for m in range(count)]
    found, expected = on_ranks(made, inputs, schedule), averaged(each, order_of(schedule))
    terms = {k: v / count for k, v in gradients_terms(without, sizes).items()}
    for value in without.main.results:
        if isinstance(value.owner, AllReduce) and value.dtype.is_float:
            terms[value.name] = np.float64(sizes[value.owner.id] / count)
    exact = assert_close(found, expected, terms, 2 * count * split.dp * split.tp)
    assert exact >= 1
    assert np.array_equal(found["counts"], expected["counts"])


@pytest.mark.parametrize(("mode", "mesh", "stages"), [("forward", "pp=2", 4), ("forward", "pp=3,dp=2,ep=2", 3), ("decode", "pp=2,dp=2", 2)])
def test_inference_joins_what_micro_batches_give(mode: str, mesh: str, stages: int) -> None:
    """Forward alone: results, caches among them, lie one after the other, bit for bit those of the program."""
    module = program(mode, batch=2)
    made = staged(module, mesh, stages)
    schedule = generate("forward", stages, 4, stages // parse_mesh(mesh).pp)
    inputs = prepare(made, None, microbatches=4)
    found = on_ranks(made, inputs, schedule)
    each = [flat(dsc.run(module, "random:0", [x[2 * m : 2 * m + 2] for x in inputs])) for m in range(4)]
    for i, (name, x) in enumerate(found.items()):
        assert x.tobytes() == np.concatenate([results[i] for results in each]).tobytes(), name


def test_backward_in_one_function() -> None:
    """Without `split`, B is one call; schedules that take I and W apart say so."""
    module = dsc.apply(source("train", 1, 4, 3), "simplify,autodiff,simplify")
    made = staged(module, "pp=2", 2)
    assert not stages_of(made).split
    each, terms = one_by_one(module, 4)
    found = on_ranks(made, prepare(made, None, microbatches=4), planned("1f1b", 2, 4))
    assert assert_close(found, averaged(each, [range(4)]), {k: v / 4 for k, v in terms.items()}, 8) >= len(found) - 1
    with pytest.raises(DscError, match="zb1p takes I and W apart, but the program's backward pass is one"):
        pipeline(made, planned("zb1p", 2, 4))


# ---- what a rank does


def test_a_rank_reads_the_weights_of_its_stages_alone() -> None:
    read: defaultdict[int, set[str]] = defaultdict(set)

    class Watched(RandomWeights):
        def get(self, wanted: Any) -> np.ndarray:
            read[self.rank].add(wanted.name)
            return super().get(wanted)

    schedule = planned("interleaved", 2, 4)
    made = staged(program(batch=2), "pp=2,dp=2,ep=2", 4)
    programs = []
    for rank in range(4):
        weights = Watched(0)
        weights.rank = rank  # type: ignore[attr-defined]
        placed, _ = rank_program(made, weights, prepare(made, None, microbatches=4), backends.get("numpy"), None, schedule, keep=False)
        programs.append(placed)
    local.run(mesh_of(made), lambda rank: programs[rank](rank))
    layers = {rank: {name.split(".")[2] for name in names if ".layers." in name} for rank, names in read.items()}
    assert layers[0] == layers[1]
    assert layers[2] == layers[3]
    assert layers[0] | layers[2] == {"0", "1", "2", "3"}
    assert not layers[0] & layers[2]


def test_what_is_kept_is_let_go() -> None:
    """In the end nothing is left, and on the way there is what `in_flight` counts: 1F1B keeps at most as many chunks as stages follow."""
    from dsc.distributed import pipeline as subject
    from dsc.driver.ranks import empty, inputs_of
    from dsc.schedule.validate import in_flight

    module = staged(program(), "pp=3", 3)
    plan = pipeline(module, planned("1f1b", 3, 6))
    inputs = prepare(module, None, microbatches=6)
    weights = RandomWeights(0)
    most: dict[int, int] = defaultdict(int)
    ranks: dict[int, Any] = {}

    def placed(rank: int) -> Any:
        def run(name: str, arguments: Sequence[Any]) -> Any:
            func = module[name]
            entered = module.replace(funcs=(func, *(f for f in module.funcs if f is not func)))
            from dsc.driver.run import open_weights

            results = yield from backends.get("numpy").program(entered, open_weights(weights, entered, None, check=False), arguments)
            chunks = {m for value, m in ranks[rank].have if "residuals" in value.name}
            most[rank] = max(most[rank], len(chunks) + name.endswith("_fwd"))
            return results

        ranks[rank] = subject._Rank(plan, rank, run, lambda m: inputs_of(module, inputs, rank, m), empty)
        return ranks[rank].program()

    local.run(mesh_of(module), placed)
    assert [most[rank] for rank in range(3)] == [max(row) for row in in_flight(plan.schedule)] == [3, 2, 1]
    assert not any(rank.have or rank.sums for rank in ranks.values())


def test_a_merged_function_runs_the_pair() -> None:
    """Where the module has a function for a forward and a backward in one, an overlapped pair runs it."""
    module = dsc.apply(source("train", 1, 4, 3), "simplify,autodiff,simplify")
    made = staged(module, "pp=2", 2)
    stages, schedule = stages_of(made), planned("dualpipe", 2, 4)
    forward, backward = stages.calls[0]["F"], stages.calls[1]["B"]
    from dsc.ir.core import Builder, Symbol
    from dsc.ir.ops.control import Call

    b = Builder("both", "both")
    params = [b.param(v.name, v.type) for call in (forward, backward) for v in call.args]
    first = b.emit(Call(forward.callee, tuple(params[: len(forward.args)]), tuple(r.type for r in forward.results))).results
    second = b.emit(Call(backward.callee, tuple(params[len(forward.args) :]), tuple(r.type for r in backward.results))).results
    record = {"forward": forward.callee, "backward": backward.callee, "as": Symbol("both")}
    both = made.replace(funcs=(*made.funcs, b.finish([*first, *second])), attributes={**made.attributes, "overlapped": (record,)})
    both = dsc.parse(str(both))
    seen = []
    inputs = prepare(made, None, microbatches=4)
    plain_schedule = dsc.schedule.actions.parse(str(_without_split(schedule)))
    found = on_ranks(both, inputs, plain_schedule, lambda site, *_: seen.append(site.func))
    assert "token_loss_bwd" in seen
    expected = on_ranks(made, inputs, plain_schedule)
    assert not [name for name, x in expected.items() if found[name].tobytes() != x.tobytes()]


def _without_split(schedule: Schedule) -> Schedule:
    """I and W in one, where I stands."""
    rows = []
    for row in schedule.rows:
        steps = [Action(Kind.B, s.stage, s.microbatch, s.reverse) if isinstance(s, Action) and s.kind is Kind.I else s for s in row]
        rows.append(tuple(s for s in steps if not (isinstance(s, Action) and s.kind is Kind.W)))
    return Schedule(tuple(rows), "dualpipe without split")


# ---- what is wrong is said before anything runs


def _faults() -> dict[str, tuple[Callable[[str], str], str]]:
    return {
        "order": (
            lambda text: text.replace("1RECV_B0,1B0,", "1B0,1RECV_B0,", 1),
            "1RECV_B0 stands after 1B0, which reads what it receives",
        ),
        "ring": (
            lambda text: text.replace("1RECV_B0,1B0,1SEND_B0,1F3,1SEND_F3,", "1F3,1SEND_F3,1RECV_B0,1B0,1SEND_B0,", 1),
            "no send meets its receive",
        ),
        "receive": (
            lambda text: text.replace("2RECV_F2,", "", 1),
            "2F2 on rank 2 reads what 1F2 on rank 1 makes, but rank 2 has no 2RECV_F2",
        ),
        "micro-batch": (lambda text: text.replace("1RECV_F1", "1RECV_F2", 1), "1RECV_F2 stands twice"),
        "backward": (lambda text: text.replace("2B0,", "2B1,", 1), "2B1"),
    }


@pytest.mark.parametrize("fault", list(_faults()))
def test_a_wrong_schedule_is_said_with_its_place(fault: str) -> None:
    change, message = _faults()[fault]
    made = staged(program(), "pp=4", 4)
    text = str(lower(simulate(planned("1f1b", 4, 4))))
    broken = change(text)
    assert broken != text
    with pytest.raises(DscError) as error:
        dsc.run(made, ranks="local", schedule=parse(broken))
    first, *grid = str(error.value).split("\n")
    assert message in first
    assert sum(line.startswith("  rank ") for line in grid) == 4
    assert ">" in "".join(grid)


@pytest.mark.parametrize(
    ("name", "pp", "mode", "message"),
    [
        ("1f1b", 2, "train", "1f1b is a schedule of 2 stages, but the program has 4"),
        ("interleaved", 2, "train", "interleaved is a schedule of 2 ranks, but the mesh pp=4,dp=1,ep=1,tp=1 has 4 along pp"),
        ("forward", 4, "train", "forward has no backward pass, but the program has one"),
        ("1f1b", 4, "forward", "1f1b has a backward pass, but the program has none"),
        ("1f1b", 4, "whole", "the program is not cut into stages: split-stages{stages=N} does that"),
    ],
)
def test_a_schedule_of_another_program(name: str, pp: int, mode: str, message: str) -> None:
    module = program("train" if mode == "whole" else mode)
    made = dsc.apply(module, 'shard-experts{mesh="dp=1"}') if mode == "whole" else staged(module, "pp=4", 4)
    with pytest.raises(DscError) as error:
        pipeline(made, planned(name, pp, 4))
    assert str(error.value) == message


def test_both_ways_and_joined_results_do_not_go_together() -> None:
    made = staged(program("forward"), "pp=2", 2)
    schedule = parse("0F0,1F1@r\n1F0,0F1@r\n")
    with pytest.raises(DscError, match="sends micro-batches both ways, but each of them has its own part of %logits"):
        pipeline(made, schedule)
    assert isinstance(pipeline(made, generate("forward", 2, 2)), Pipeline)
