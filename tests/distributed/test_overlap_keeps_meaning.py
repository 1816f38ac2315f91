"""Overlapped programs on many ranks give what they gave before, bit for bit; what is no other order of them is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsc
from dsc import backends
from dsc.distributed import local
from dsc.driver.inputs import prepare
from dsc.driver.ranks import RankWeights, cut
from dsc.hardware.streams import simulate
from dsc.ir.core import Builder, Func, Module, Op, Symbol, Value
from dsc.ir.diagnostics import IRError
from dsc.ir.flight import differences
from dsc.ir.liveness import live_bytes
from dsc.ir.mesh import mesh_of
from dsc.ir.ops.collective import AllToAll, Done, Transfer
from dsc.ir.ops.control import Call
from dsc.ir.ops.elementwise import Add, Neg
from dsc.ir.ops.linalg import Matmul
from dsc.ir.sharding import input_splits
from dsc.ir.types import DType, Tensor
from dsc.ir.verify import verify
from dsc.models.random_weights import RandomWeights
from dsc.passes.manager import run_pipeline
from dsc.passes.overlap import Overlap, costing_of
from dsc.passes.overlapping.chunks import BACKWARD, together
from dsc.passes.overlapping.merge import Groups
from dsc.passes.overlapping.schedule import ordered

Make = Callable[..., Module]
Draw = Callable[[Random], tuple[Module, Module]]


QUICK = """
name = "quick"
base = "h800"
[comm]
sms = 0
slowdown = 1
compute_slowdown = 1
provenance = "assumed"
source = "neither stream slows the other: what can run side by side pays"
"""


@pytest.fixture(scope="module")
def overlap(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pass on a cluster where every overlap pays, however small the program."""
    file = tmp_path_factory.mktemp("cluster") / "quick.toml"
    file.write_text(QUICK)
    return f"overlap{{cluster={file}}}"


def leaves(data: Iterable[Any]) -> list[bytes]:
    return [b for x in data for b in (leaves(x) if isinstance(x, tuple) else [x.tobytes()])]


def run(module: Module, inputs: Sequence[np.ndarray]) -> list[bytes]:
    """The bits of every result on every rank, for whole inputs."""
    mesh, weights, runner = mesh_of(module), RankWeights(RandomWeights(0), module, keep="all"), backends.get("numpy")
    splits = input_splits(module)

    def one(rank: int) -> Any:
        mine = tuple(cut(x, split, mesh, rank) for x, split in zip(inputs, splits, strict=True))
        return runner.program(module, lambda name, _: weights.get(rank, name), mine)

    return [b for results in local.run(mesh, one) for b in leaves(results)]


def in_flight(module: Module) -> int:
    return sum(isinstance(op, Done) for func in module.funcs for op in func.ops)


def same(a: list[bytes], b: list[bytes]) -> bool:
    return len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))


FP8 = "quantize-fp8{recipe=deepseek-v3}"


@pytest.mark.parametrize(
    ("mode", "passes", "mesh"),
    [
        ("forward", "", "ep=4,node=2"),
        pytest.param("forward", FP8, "dp=2,ep=2,tp=2", marks=pytest.mark.slow),
        ("train", "", "dp=4,ep=2"),
        pytest.param("train", FP8, "dp=2,ep=2", marks=pytest.mark.slow),
        pytest.param("decode", "", "dp=2,ep=2", marks=pytest.mark.slow),
    ],
)
def test_another_order_gives_the_same_bits(program: Make, overlap: str, mode: str, passes: str, mesh: str) -> None:
    module = program(mode, batch=4, passes=passes)
    inputs = prepare(module, None)
    plain = dsc.apply(module, f'shard-experts{{mesh="{mesh}"}}')
    made = dsc.apply(plain, overlap)
    assert made.stage == "scheduled"
    assert dsc.parse(str(made)) == made
    if mode != "decode":
        assert in_flight(made)
    assert same(run(plain, inputs), run(made, inputs))


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_two_micro_batches_are_two_runs(program: Make, overlap: str, mode: str) -> None:
    module = program(mode, batch=4, layers=4)
    plain = dsc.apply(module, 'shard-experts{mesh="dp=2,ep=2"}')
    made = dsc.apply(plain, overlap.replace("}", ",microbatches=2}"))
    assert dsc.parse(str(made)) == made
    assert len(made.main.params) == 2 * len(plain.main.params)
    one = prepare(module, None)
    rng = np.random.default_rng(1)
    other = [rng.permutation(x.reshape(-1)).reshape(x.shape) if x.ndim else x for x in one]
    apart = [run(plain, inputs) for inputs in (one, other)]
    ranks, count = mesh_of(plain).world, len(plain.main.results)
    expected = [b for rank in range(ranks) for found in apart for b in found[rank * count : (rank + 1) * count]]
    assert same(run(made, [*one, *other]), expected)
    shared = [func for func in made.funcs if func.name.endswith("_overlapped_1")]
    calls = [op for op in made.main.ops if isinstance(op, Call) and shared and op.callee == shared[0].name]
    assert len(calls) == 2  # the middle layers are one function, on weights of two layers each
    assert all(";" in call.weights for call in calls)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["", "{split=true}"])
def test_a_forward_and_a_backward_chunk_are_two_runs(overlap: str, split: str) -> None:
    """Layer 1 runs forward on one micro-batch while layer 2 runs backward on another."""
    source = dsc.apply(dsc.trace("deepseek-v3-tiny", mode="train", batch=2, seq=16), f"simplify,autodiff{split},simplify")
    module = dsc.apply(source, 'shard-experts{mesh="dp=2,ep=2"}')
    forward = module["training_moe_layer_fwd"]
    backward = [
        module[name]
        for name in ("training_moe_layer_bwd_input", "training_moe_layer_bwd_weight", "training_moe_layer_bwd")
        if name in module.by_name
    ]
    stage_f = caller("stage_f", forward, "model.layers.1")
    stage_b = [caller(f"stage_b{i}", func, "model.layers.2") for i, func in enumerate(backward)]
    with_stages = module.replace(funcs=(*module.funcs, stage_f, *stage_b))
    groups = Groups(with_stages)
    both = together(groups, "both", stage_f, stage_b, {0: len(stage_b[0].results) - 1})
    merged = groups.module.replace(funcs=(*groups.module.funcs, *groups.funcs, both))
    (group,) = groups.funcs
    tags = groups.parts[group.name]
    found = ordered(
        merged, group, costing_of(merged, overlap[len("overlap{cluster=") : -1]), backward={op: tags[op] == BACKWARD for op in group.ops}
    )
    assert any(isinstance(op, Done) for op in found.func.ops)
    merged = merged.map(lambda func: found.func if func is group else func)
    attributes = {k: v for k, v in module.attributes.items() if k == "mesh"}

    def main(in_one: bool) -> Module:
        b = Builder("main")
        given = [b.param(p.name, p.type) for p in forward.params]
        other = [b.param(f"{p.name}_other", p.type) for p in forward.params]
        first = call(b, stage_f, given)
        gradients = [b.param(p.name, p.type) for p in backward[0].params[1:]]
        args = [first[-1], *gradients]
        if in_one:
            results = call(b, both, [*other, *args])
        else:
            results = list(call(b, stage_f, other))
            for func in stage_b:
                made = call(b, func, args)
                results += made
                args = [made[-1]]
        func = b.finish(results)
        return verify(
            merged.replace(funcs=(func, *merged.funcs[1:]), attributes=attributes | {"inputs": ((),) * len(func.params)}, stage="scheduled")
        )

    plain, made = main(False), main(True)
    assert dsc.parse(str(made)) == made
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(p.tensor.shape).astype(np.float32) for p in plain.main.params]
    inputs = [dsc.backends.arrays.rounded(x, p.tensor.dtype) for x, p in zip(arrays, plain.main.params, strict=True)]
    assert same(run(plain, inputs), run(made, inputs))


def caller(name: str, func: Func, weights: str) -> Func:
    """A function that calls another for the weights of one layer."""
    b = Builder(name, name)
    params = [b.param(p.name, p.type) for p in func.params]
    made = b.emit(Call(Symbol(func.name), tuple(params), tuple(r.type for r in func.results), weights))
    if func.name.endswith("weight"):
        made = b.ops[0] = made.copy(phase=dsc.ir.core.Phase.W)
    return b.finish(made.results)


def call(b: Builder, func: Func, args: Sequence[Value]) -> tuple[Value, ...]:
    return b.emit(Call(Symbol(func.name), tuple(args), tuple(r.type for r in func.results))).results


# ---- random programs

SQUARE = Tensor(DType.f32, (4, 4))


@given(st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_random_programs_in_random_orders(drawn: Draw, random: Random) -> None:
    """Any order of list scheduling is a program that the verifier takes, of the same bits, and of the time that the tasks say."""
    module, made = drawn(random)
    verify(made)
    assert not list(differences(module.main, made.main))
    assert dsc.parse(str(made)) == made
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((4, 4)).astype(np.float32) for _ in range(2)]
    runner = backends.get("numpy")
    found = [local.run(mesh_of(m), lambda rank, m=m: runner.program(m, None, [x + rank for x in inputs])) for m in (module, made)]
    assert same(leaves(found[0]), leaves(found[1]))


def test_the_random_programs_are_worth_it(drawn: Draw) -> None:
    assert sum(in_flight(drawn(Random(seed))[1]) for seed in range(40)) > 40


# ---- memory


def test_memory_stays_under_the_cap(program: Make, overlap: str) -> None:
    plain = dsc.apply(program("train", batch=4), 'shard-experts{mesh="dp=2,ep=2"}')
    free = dsc.apply(plain, overlap)
    name = max((f.name for f in plain.funcs), key=lambda n: live_bytes(free, free[n]).peak - live_bytes(plain, plain[n]).peak)
    least, most = (live_bytes(m, m[name]).peak for m in (plain, free))
    cap = (least + most) // 2 if most > least else most
    made = dsc.apply(plain, overlap.replace("}", f",memory-gb={cap / 1e9!r}}}"))
    assert live_bytes(made, made[name]).peak <= cap


def test_a_cap_that_cannot_be_held_is_told(program: Make) -> None:
    plain = dsc.apply(program("train", batch=4), 'shard-experts{mesh="dp=2,ep=2"}')
    (record,) = run_pipeline(plain, [Overlap(memory_gb=1e-6)]).records
    assert any("no order was found" in str(declined) for declined in record.declined)


# ---- seeded faults


@pytest.fixture
def overlapped(program: Make, overlap: str) -> tuple[Func, Module]:
    plain = dsc.apply(program("train", batch=4), 'shard-experts{mesh="dp=2,ep=2"}')
    made = dsc.apply(plain, overlap)
    name = next(f.name for f in made.funcs if f.name.endswith("_fwd") and any(isinstance(op, Done) for op in f.ops))
    return plain[name], made.replace(
        funcs=(made[name], *(f for f in made.funcs if f.name != name)), attributes={"mesh": made.attributes["mesh"]}
    )


def changed(module: Module, ops: list[Op]) -> Module:
    func = module.main
    return module.replace(funcs=(Func(func.name, func.params, tuple(ops), func.results), *module.funcs[1:]))


def test_a_done_before_its_start_is_caught(overlapped: tuple[Func, Module]) -> None:
    ops = list(overlapped[1].main.ops)
    done = next(i for i, op in enumerate(ops) if isinstance(op, Done))
    start = ops.index(ops[done].started)  # type: ignore[attr-defined]
    ops[start], ops[done] = ops[done], ops[start]
    with pytest.raises(IRError, match="is used before it is defined"):
        verify(changed(overlapped[1], ops))


def test_a_broken_dependence_is_caught(overlapped: tuple[Func, Module]) -> None:
    """An op before what it reads is caught by the verifier, one that reads something else of its type by comparing with the program."""
    plain, module = overlapped
    ops = list(module.main.ops)
    at = next(i for i, op in enumerate(ops) if op.operands and op.operands[0].owner in ops)
    owner = ops.index(ops[at].operands[0].owner)  # type: ignore[arg-type]
    moved = [*ops[:owner], ops[at], *ops[owner:at], *ops[at + 1 :]]
    with pytest.raises(IRError, match="is used before it is defined"):
        verify(changed(module, moved))
    assert not list(differences(plain, module.main))
    at, one, other = next(
        (i, v, w) for i, op in enumerate(ops) if isinstance(op, Add) for v in op.operands for w in (r for o in ops[:i] for r in o.results)
        if w.type == v.type and w is not v
    )  # fmt: skip
    wrong = ops[at].with_operands(lambda v: other if v is one else v)
    new = dict(zip(ops[at].results, wrong.results, strict=True))
    rest = []
    for op in ops[at + 1 :]:
        made = op.with_operands(lambda v: new.get(v, v))
        new.update(zip(op.results, made.results, strict=True))
        rest.append(made)
    func = Func(module.main.name, module.main.params, (*ops[:at], wrong, *rest), tuple(new.get(v, v) for v in module.main.results))
    verify(module.replace(funcs=(func, *module.funcs[1:])))
    assert any(line.startswith(f"{ops[at].id} was ") for line in differences(plain, func))


def test_a_lost_and_a_repeated_op_are_caught(overlapped: tuple[Func, Module]) -> None:
    plain, module = overlapped
    func = module.main
    spare = Neg(next(p for p in func.params if isinstance(p.type, Tensor) and p.dtype.is_float), id="more#1")
    assert list(differences(plain, Func(func.name, func.params, (*func.ops, spare), func.results))) == ["more#1 is new"]
    assert list(differences(func, Func(func.name, func.params, (), func.params[:1])))[-1].startswith("return was ")
    assert f"{func.ops[0].id} is missing" in differences(func, Func(func.name, func.params, func.ops[1:], func.results))


def test_ends_of_one_axis_in_another_order_are_caught() -> None:
    """What is in flight along an axis ends in the order in which it began; the other order is another program."""
    b = Builder("main", "main")
    x = b.param("x", SQUARE)
    first, second = (b.emit(AllToAll(x, "ep", 2, start=True)) for _ in range(2))
    ends = [Done(second.results, id="main#8"), Done(first.results, id="main#9")]
    mesh = {"mesh": {"pp": 1, "dp": 2, "ep": 2, "tp": 1, "node": 8}}
    right = Func("main", (x,), (first, second, *reversed(ends)), tuple(e.result for e in ends))
    verify(Module((right,), "scheduled", mesh))
    with pytest.raises(IRError, match="ends main#2 before main#1, which began earlier along ep"):
        verify(Module((Func("main", (x,), (first, second, *ends), right.results),), "scheduled", mesh))


# ---- what is hidden


def test_exposed_communication_by_hand() -> None:
    """neg 2 s | a2a 5 s beside matmul 3 s | add 1 s: the thread waits 2 s for what is in flight, and these are exposed."""

    class Given:
        def seconds(self, op: Op) -> float:
            return {"neg": 2.0, "all_to_all": 5.0, "matmul": 3.0, "add": 1.0}[op.name]

        def stream(self, op: Op) -> Any:
            return "comm" if isinstance(op, Transfer) else "compute"

    b = Builder("main", "main")
    x = b.param("x", SQUARE)
    n = b.emit(Neg(x)).result
    flight = b.emit(AllToAll(n, "ep", 2, start=True))
    y = b.emit(Matmul(x, x)).result
    z = b.emit(Done(flight.results)).result
    func = b.finish([b.emit(Add(y, z)).result])
    times = simulate(Module((func,)), Given())
    assert (times.total, times.busy("compute"), times.busy("comm")) == (8.0, 6.0, 5.0)
    assert times.exposed == 2.0
    assert times.hidden == 0.6
    assert [(s.op.name, s.start, s.end) for s in times.spans] == [("neg", 0, 2), ("all_to_all", 2, 7), ("matmul", 2, 5), ("add", 7, 8)]
