"""Recompute: the same results to the bit, within the budget at every point, for no more time than the best plan there is."""

from __future__ import annotations

from functools import cache
from itertools import chain, combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsc
from dsc import DscError, backends
from dsc.driver.measure import same_bits
from dsc.driver.memory import by_stage
from dsc.hardware.cost import seconds
from dsc.hardware.device import device
from dsc.ir.core import Builder, Func, Module, Op, Phase, Symbol, Trait, Value
from dsc.ir.ops.control import Call, Param
from dsc.ir.ops.elementwise import Add, Mul, Silu, SwiGLU, Tanh
from dsc.ir.ops.linalg import Matmul
from dsc.ir.ops.norm import RmsNorm
from dsc.ir.ops.reduce import Mean
from dsc.ir.timeline import timeline
from dsc.ir.types import Bundle, DType, Tensor
from dsc.ir.verify import verify
from dsc.models.trace import trace
from dsc.passes.manager import PASSES
from dsc.passes.pairs import carried_out, pairs, rerun, runs
from dsc.passes.recompute import Recompute
from dsc.testing.sampling import seeded

H800 = device("h800")
SETTINGS = settings(max_examples=25, deadline=None, database=None, derandomize=True)
SHAPE = (8, 16)


def layer(random: Random, steps: int) -> Func:
    """Random ops over one width and some others, so that residuals differ in bytes and in the time that they take to make."""
    b = Builder("layer", "layer")
    x = b.param("x", Tensor(DType.bf16, SHAPE))
    values = [x]
    for i in range(steps):
        a = random.choice(values[-3:])
        match random.randrange(6):
            case 0:
                width = random.choice((4, 16, 64))
                w = b.emit(Param(f"w{i}", (Tensor(DType.bf16, (width, a.shape[1])),))).result
                values.append(b.emit(Matmul(a, w, transpose_b=True)).result)
            case 1:
                w = b.emit(Param(f"g{i}", (Tensor(DType.bf16, a.shape[1:]),))).result
                values.append(b.emit(RmsNorm(a, w, 1e-6)).result)
            case 2:
                values.append(b.emit(Tanh(a)).result)
            case 3:
                values.append(b.emit(Silu(a)).result)
            case k:
                same = [v for v in values if v.type == a.type]
                values.append(b.emit((Mul if k == 4 else SwiGLU)(a, random.choice(same))).result)
    last = values[-1]
    w = b.emit(Param("out", (Tensor(DType.bf16, (SHAPE[1], last.shape[1])),))).result
    return b.finish([b.emit(Add(x, b.emit(Matmul(last, w, transpose_b=True)).result)).result])


def network(random: Random, steps: int, layers: int = 3) -> Module:
    """Layers that are calls of one function or of two, and a loss."""
    kinds = [layer(random, steps)]
    if random.random() < 0.5:
        kinds.append(layer(random, steps // 2))
        kinds[1] = Func("other", kinds[1].params, kinds[1].ops, kinds[1].results)
    b = Builder("main", "main")
    x = b.param("x", Tensor(DType.bf16, SHAPE))
    for i in range(layers):
        kind = kinds[i % len(kinds)]
        x = b.emit(Call(Symbol(kind.name), (x,), (x.type,), weights=f"l{i}")).result
    loss = b.emit(Mean(x, axes=(0, 1))).result
    return dsc.apply(verify(Module((b.finish([loss]), *kinds))), "simplify,autodiff,simplify")


def peak(module: Module) -> int:
    return max(timeline(module).activations)


def cost(module: Module) -> float:
    """Seconds of everything that runs in phase R."""
    return sum(seconds(p.op, H800) for p in timeline(module).points if p.op.phase is Phase.R)


def recomputed(module: Module, budget: float) -> Module:
    return dsc.apply(module, [Recompute(budget_gb=budget / 1e9)])


def same(a: Module, b: Module) -> None:
    """Equal to the bit, in bfloat16 arithmetic as the reference does it."""
    inputs = [np.asarray(seeded("input", p.type)) if p.dtype.is_float else np.zeros(p.shape, np.int64) for p in a.main.params]  # type: ignore[arg-type]
    found = [backends.get("numpy").run(m, seeded, inputs) for m in (a, b)]
    flat = [[leaf for result in results for leaf in leaves(result)] for results in found]
    assert len(flat[0]) == len(flat[1]) > 0
    for x, y in zip(*flat, strict=True):
        assert same_bits(x, y)  # a comparison of the bytes themselves would print their difference: minutes, when it fails


def leaves(data):  # type: ignore[no-untyped-def]
    return [leaf for item in data for leaf in leaves(item)] if isinstance(data, tuple) else [data]


@SETTINGS
@given(st.randoms(use_true_random=False), st.floats(0.3, 1.1))
def test_a_budget_is_never_exceeded_and_nothing_changes(random: Random, share: float) -> None:
    module = network(random, random.randint(2, 9))
    budget = round(peak(module) * share)
    try:
        after = recomputed(module, budget)
    except DscError as error:
        lowest = float(str(error).rsplit(" ", 1)[1]) * 1e9
        assert lowest > budget
        after = recomputed(module, lowest)  # what the message promises
        assert peak(after) <= lowest
    else:
        assert peak(after) <= budget
    same(module, after)
    assert dsc.parse(str(after)) == after
    again = Recompute(budget_gb=peak(after) / 1e9)(after)
    assert again == after


def subsets(values: list[Value]) -> chain[tuple[Value, ...]]:
    return chain.from_iterable(combinations(values, n) for n in range(len(values) + 1))


def every_plan(module: Module) -> list[tuple[int, float]]:
    """Peak and cost of each choice of residuals there is, found by trying them all."""
    (pair,) = pairs(module)
    times = runs(module)[pair.backward.name]
    not_saved = {Trait.VIEW, Trait.SOURCE}
    candidates = [v for v in pair.order if v.owner is None or not_saved.isdisjoint(v.owner.traits)]
    assert len(candidates) <= 12
    seen: dict[tuple[Value, ...], tuple[int, float]] = {}
    for saved in subsets(candidates):
        try:
            ops, used = rerun(pair, saved)
        except DscError:
            continue
        if tuple(used) not in seen:
            plan = carried_out(module, [pair], {pair.forward.name: used})
            seen[tuple(used)] = peak(plan), times * sum(seconds(op, H800) for op in ops)
    return list(seen.values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_no_plan_is_much_better(seed: int) -> None:
    """Against all plans of a network of one kind of layer: at most 2 % slower, and infeasible only where every plan is."""
    random = Random(seed)
    module = network(random, random.randint(3, 7))
    while len(pairs(module)) != 1 or len(pairs(module)[0].kept) < 2:
        module = network(random, random.randint(3, 7))
    plans = every_plan(module)
    most, least = peak(module), min(p for p, _ in plans)
    tried = 0
    for budget in sorted({p for p, _ in plans if p < most})[:: max(1, len(plans) // 40)]:
        best = min(c for p, c in plans if p <= budget)
        found = recomputed(module, budget)
        assert cost(found) <= best * 1.02 + 1e-15, (budget, cost(found), best)
        tried += 1
    assert tried or least == most
    with pytest.raises(DscError, match="lowest budget that is feasible is"):
        recomputed(module, least - 1)


@cache
def traced() -> Module:
    return trace("deepseek-v3-tiny", mode="train", seq=8, overrides=["num_hidden_layers=2"])


@pytest.fixture(scope="module")
def tiny() -> Module:
    return dsc.apply(trace("deepseek-v3-tiny", mode="train", seq=32), "simplify,autodiff,simplify")


def test_deepseeks_list(tiny: Module) -> None:
    """No RMSNorm, up-projection or SwiGLU is kept, nor what they are turned into; routing runs once."""
    after = dsc.apply(tiny, "recompute")
    same(tiny, after)
    dropped = set()
    for before, now in zip(pairs(tiny), pairs(after), strict=True):
        for value in now.kept:
            assert value.owner is None or not isinstance(value.owner, RmsNorm | SwiGLU)
            assert value.owner is None or not value.owner.id.partition("#")[0].endswith(("q_b_proj", "kv_b_proj"))
        dropped |= {v.name for v in before.kept} - {v.name for v in now.kept}
    assert {"input_layernorm", "kv_b_proj", "swiglu"} <= dropped
    again = [op for func in after.funcs for op in func.ops if op.phase is Phase.R]
    assert again
    assert not any(Trait.ROUTING in op.traits or isinstance(op, Call) for op in again)
    assert peak(after) < peak(tiny)
    assert dsc.parse(str(after)) == after
    assert Recompute()(after) == after


def test_a_model_under_budgets(tiny: Module) -> None:
    most = peak(tiny)
    costs = []
    for share in (0.9, 0.8, 0.7):
        after = recomputed(tiny, most * share)
        assert peak(after) <= most * share
        same(tiny, after)
        costs.append(cost(after))
    assert 0 < costs[0] <= costs[1] <= costs[2]


def test_after_quantisation(tiny: Module) -> None:
    module = dsc.apply(tiny, "quantize-fp8,simplify")
    same(module, dsc.apply(module, "recompute"))
    same(module, recomputed(module, 0.8 * peak(module)))


@pytest.mark.parametrize("split", ["", "{split=true}"])
def test_stages_keep_of_their_layers_what_the_layers_keep(split: str) -> None:
    """In bundles within bundles, which main hands on: the same choice as without stages, the same bits, and less for a micro-batch."""
    module = dsc.apply(traced(), f"simplify,autodiff{split},simplify")
    staged = dsc.apply(module, "split-stages{stages=2}")
    after, plain = dsc.apply(staged, "recompute"), dsc.apply(module, "recompute")
    assert dsc.parse(str(after)) == after
    kept = [{pair.forward.name: pair.pack.result.type for pair in pairs(m)} for m in (after, plain)]
    assert kept[0] == kept[1]
    same(staged, after)
    before, now = (sum(found["residual_bytes"] for found in by_stage(m)) for m in (staged, after))
    bundles = [
        sum(v.type.bytes for op in m.main.ops if op.phase is Phase.F for v in op.results if isinstance(v.type, Bundle))
        for m in (module, plain)
    ]
    assert before - now == bundles[0] - bundles[1] > 0


def test_stages_come_first_and_have_no_budget() -> None:
    module = dsc.apply(traced(), "simplify,autodiff")
    with pytest.raises(DscError, match="split-stages takes a module at the stages from traced to quantized, but this one is"):
        dsc.apply(module, "recompute,split-stages{stages=2}")
    with pytest.raises(DscError, match="budget-gb bounds one run of all of @main, but a rank of a pipeline holds several micro-batches"):
        dsc.apply(module, "split-stages{stages=2},recompute{budget-gb=1}")


def test_nothing_is_asked(tiny: Module) -> None:
    assert dsc.apply(tiny, "recompute{policy=none}").funcs == tiny.funcs
    assert recomputed(tiny, peak(tiny)).funcs == tiny.funcs


def test_what_was_chosen_is_said(tiny: Module) -> None:
    """The notes name the ops and the time; they add up to the cost of what runs again."""
    each = Recompute(budget_gb=peak(tiny) * 0.8 / 1e9)
    after = each(tiny)
    notes = [str(n) for n in each.declined]
    assert "residuals and workspace" in notes[-1]
    assert f"for {cost(after) * 1e3:.3g} ms more" in notes[-1]
    assert all("runs again" in note for note in notes[:-1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recompute{budget-gb=0}", "budget-gb is 0.0, expected more than 0"),
        ("recompute{budget-gb=-1}", "expected more than 0"),
        ("recompute{policy=none,device=h80}", "unknown device h80"),
        ("recompute{policy=some}", "policy"),
        ("recompute{budget-gb=lots}", "budget-gb"),
    ],
)
def test_bad_options(text: str, said: str, tiny: Module) -> None:
    with pytest.raises(DscError, match=said) as error:
        dsc.apply(tiny, text)
    assert "\n" not in str(error.value)


def test_a_program_without_a_backward_pass() -> None:
    assert PASSES["recompute"] is Recompute
    with pytest.raises(DscError, match="takes a module at the stages from differentiated to sharded"):
        dsc.apply(dsc.parse("func @f(%x: f32[2]) {\n  return %x\n}\n"), "recompute")


def test_a_fault_shows(tiny: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running an op again from the wrong operands is seen by the comparison above."""
    real = Op.with_operands

    def swapped(op: Op, lookup):  # type: ignore[no-untyped-def]
        new = real(op, lookup)
        return new.copy(gate=new.up, up=new.gate) if isinstance(new, SwiGLU) and new is not op else new

    monkeypatch.setattr(SwiGLU, "with_operands", swapped)
    after = dsc.apply(tiny, "recompute")
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        same(tiny, after)
