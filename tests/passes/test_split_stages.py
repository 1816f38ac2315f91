"""A program cut into stages is the same program: bit for bit, whatever it is and wherever it is cut."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsc
from dsc import DscError
from dsc.driver.measure import flat
from dsc.driver.run import array_types
from dsc.hardware.cluster import cluster
from dsc.hardware.cost import seconds
from dsc.ir.core import Builder, Module, Op
from dsc.ir.ops.control import Call, Param
from dsc.ir.ops.elementwise import Add, Exp, Mul, Tanh
from dsc.ir.ops.linalg import Matmul
from dsc.ir.ops.reduce import Mean, Sum
from dsc.ir.ops.shape import Reshape
from dsc.ir.stages import FORWARD, stages_of
from dsc.ir.types import DType, Tensor
from dsc.ir.walk import walk, weights
from dsc.passes.stage_placement import Placement

X = Tensor(DType.f32, (4, 6))
SQUARE = Tensor(DType.f32, (6, 6))


def run(module: Module) -> dict[str, np.ndarray]:
    """Every result by name, of seeded weights and inputs."""
    given = {
        name: np.random.default_rng(list(name.encode())).standard_normal(tensor.shape).astype(np.float32)
        for name, tensor in weights(module).items()
    }
    return dict(zip(array_types(module), flat(dsc.run(module, given)), strict=True))


def assert_same(found: Module, expected: Module) -> None:
    """The same results, by name; the text says all of the program."""
    text = str(found)
    again = dsc.parse(text)
    assert again == found
    assert str(again) == text
    wanted, results = run(expected), run(again)
    assert results.keys() == wanted.keys()
    differing = [name for name, x in wanted.items() if x.tobytes() != results[name].tobytes()]
    assert not differing


@st.composite
def programs(draw: st.DrawFn) -> Module:
    """Values that are read far from where they are made, weights that are read more than once, results from anywhere."""
    b = Builder("main")
    values = [b.param("x", X), b.param("z", X)]
    for _ in range(draw(st.integers(4, 12))):
        a = draw(st.sampled_from(values[-4:] if draw(st.booleans()) else values))
        match draw(st.sampled_from(("weight", "weight", "scale", "add", "mul", "tanh", "exp", "view"))):
            case "weight":
                w = b.emit(Param(f"w{draw(st.integers(0, 3))}.weight", (SQUARE,))).result
                values.append(b.emit(Matmul(a, w, transpose_b=draw(st.booleans()))).result)
            case "scale":
                s = b.emit(Param(f"s{draw(st.integers(0, 1))}", (Tensor(DType.f32, (6,)),))).result
                values.append(b.emit(Mul(a, s)).result)
            case "add":
                values.append(b.emit(Add(a, draw(st.sampled_from(values)))).result)
            case "mul":
                values.append(b.emit(Mul(a, draw(st.sampled_from(values)))).result)
            case "tanh":
                values.append(b.emit(Tanh(a)).result)
            case "exp":
                values.append(b.emit(Exp(b.emit(Tanh(a)).result)).result)
            case "view":
                values.append(b.emit(Reshape(b.emit(Reshape(a, (24,))).result, (4, 6))).result)
    w = b.emit(Param("head.weight", (SQUARE,))).result
    loss = b.emit(Mean(b.emit(Tanh(b.emit(Matmul(values[-1], w)).result)).result, (0, 1))).result
    metrics = [b.emit(Sum(draw(st.sampled_from(values)), (0, 1))).result for _ in range(draw(st.integers(0, 2)))]
    return Module((b.finish([loss, *metrics]),))


@settings(max_examples=60, deadline=None)
@given(module=programs(), passes=st.sampled_from(("", "autodiff", "autodiff{split=true}")), data=st.data())
def test_any_program_keeps_its_meaning(module: Module, passes: str, data: st.DataObject) -> None:
    before = dsc.apply(module, passes)
    count = data.draw(st.integers(1, len(Placement(dsc.apply(before, "simplify"), 1).units)))
    after = dsc.apply(before, f"split-stages{{stages={count}}}")
    assert_same(after, before)
    assert_same(dsc.apply(after, "simplify"), before)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The tiny model by mode, four layers and one of MTP."""
    made: dict[str, Module] = {}

    def make(mode: str) -> Module:
        if mode not in made:
            sizes = {"context": 16} if mode == "decode" else {"seq": 8}
            made[mode] = dsc.trace("deepseek-v3-tiny", mode=mode, batch=2, overrides=["num_hidden_layers=4"], **sizes)
        return made[mode]

    return make


@pytest.mark.parametrize("stages", [1, 3, 6])
@pytest.mark.parametrize(
    ("mode", "passes"),
    [
        ("forward", "simplify"),
        ("decode", "simplify"),
        ("train", "autodiff"),
        ("train", "simplify,autodiff{split=true},simplify,quantize-fp8,simplify"),
    ],
)
def test_models_keep_their_meaning(mode: str, passes: str, stages: int, tiny: Any) -> None:
    before = dsc.apply(tiny(mode), passes)
    after = dsc.apply(before, f"split-stages{{stages={stages}}}")
    names = list(array_types(before))
    found, expected = (dict(zip(array_types(m), flat(dsc.run(m, "random:0")), strict=True)) for m in (after, before))
    assert found.keys() == set(names)
    assert not [name for name in names if found[name].tobytes() != expected[name].tobytes()]
    assert dsc.parse(str(after)) == after


AT = "split-stages{stages=4,at=[model.layers.1,model.layers.3,model.norm]}"


def held(module: Module, stage: int) -> set[str]:
    """The weights that the calls of a stage read."""
    calls = stages_of(module).calls[stage].values()
    return {f"{prefix}.{op.path}" for call in calls for prefix, _, op in walk(module, module[call.callee]) if isinstance(op, Param)}


def test_a_stage_reads_its_own_weights_alone(tiny: Any) -> None:
    """Layers are on one stage each; the embedding is on the first and, for MTP, on the last, which has the head."""
    module = dsc.apply(tiny("train"), f"simplify,autodiff,{AT}")
    stages = [held(module, stage) for stage in range(4)]
    shared = set.union(*(a & b for a, b in combinations(stages, 2)))
    assert shared == {"model.embed_tokens.weight"}
    assert "lm_head.weight" in stages[3]
    returned = [set(group["weights"]) for group in module.attributes["gradients"].values()]
    assert not set.union(*(a & b for a, b in combinations(returned, 2)))
    assert all(own <= has for own, has in zip(returned, stages, strict=True))


def test_neighbours_hand_on_one_tensor_and_metrics(tiny: Any) -> None:
    """Tables of positions and labels are not sent; gradients of activations are added up before they are."""
    stages = stages_of(dsc.apply(tiny("train"), f"simplify,autodiff,{AT}"))
    for stage in range(3):
        up = [v.type for v in stages.forward(stage) if v.tensor.size > 16]
        down = [v.type for v in stages.backward(stage + 1)]
        assert up == down == [Tensor(DType.bf16, (2, 8, 144))]


def test_stages_begin_where_the_option_says(tiny: Any) -> None:
    module = dsc.apply(tiny("forward"), "split-stages{stages=3,at=[model.layers.1,lm_head]}")
    first = [module[calls[FORWARD].callee].ops for calls in stages_of(module).calls]
    assert [next(op.id for op in ops if isinstance(op, Call) and "rotary" not in op.id) for ops in first] == [
        "model.embed_tokens#1",
        "model.layers.1#1",
        "lm_head#1",
    ]


@pytest.mark.parametrize("where", ["", "h800"])
def test_the_dearest_stage_is_as_cheap_as_can_be(where: str, tiny: Any) -> None:
    """Of all cuts in three: by FLOPs, or by what each op takes on a GPU, calls followed."""
    module = tiny("forward")

    def cost(op: Op) -> float:
        if isinstance(op, Call):
            return sum(map(cost, module[op.callee].ops))
        return seconds(op, cluster(where).device) if where else op.flops()

    placed = Placement(module, 3, device=cluster(where).device if where else None)
    costs = list(map(cost, placed.units))

    def dearest(starts: tuple[int, ...]) -> float:
        return max(sum(costs[a:b]) for a, b in pairwise((0, *starts, len(costs))))

    stages = [placed.stage[op] for op in placed.units]
    found = tuple(stages.index(stage) for stage in (1, 2))
    assert dearest(found) == pytest.approx(min(map(dearest, combinations(range(1, len(costs)), 2))))
    made = dsc.apply(module, f"split-stages{{stages=3,cluster={where}}}" if where else "split-stages{stages=3}")
    assert dsc.parse(str(made)) == made


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("split-stages{stages=0}", "stages is 0, expected 1 or more"),
        ("split-stages{stages=99}", "found 99 stages, but @main has 7 ops to make them of"),
        ("split-stages{stages=2,at=[lm_head,shift]}", "at names 2 components, expected the 1 at which further stages begin"),
        ("split-stages{stages=2,at=[model.layers.9]}", "at: no model.layers.9 after the stage before it; @main is model.embed_tokens, "),
        ("split-stages{stages=2},split-stages{stages=2}", "the program is cut into stages already"),
        ("shard-experts{mesh=pp=2}", "is not cut into stages, as split-stages{stages=2} does"),
        ("split-stages{stages=3},shard-experts{mesh=pp=2}", "pp=2 does not divide 3 stages; pp = 1, 3 would fit"),
    ],
)
def test_what_cannot_be_cut_is_said(passes: str, message: str, tiny: Any) -> None:
    with pytest.raises(DscError) as error:
        dsc.apply(tiny("forward"), passes.replace("mesh=pp=2", 'mesh="pp=2"'))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


STAGED = """
module { stage=traced, stages=[{F="stage0.F#1"}, {F="stage1.F#1"}, {F="stage2.F#1"}], cut=[0] }

func @main(%x: f32[4]) {
  %a: f32[4] = call(@twice, [%x])  @ stage0.F#1 F
  %b: f32[4] = call(@twice, [%a])  @ stage1.F#1 F
  %c: f32[4] = call(@twice, [%b])  @ stage2.F#1 F
  return %c
}

func @twice(%x: f32[4]) {
  %y: f32[4] = add(%x, %x)  @ f#1 F
  return %y
}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("call(@twice, [%b])", "call(@twice, [%a])", "F of stage 2 takes %a of F of stage 0"),
        ('{F="stage1.F#1"}, ', "", "stage1.F#1 of @main belong to no stage"),
        ("stage1.F#1", "stage2.F#1", "stage 2 has a call stage2.F#1, which @main lacks, or has for another stage"),
        ('{F="stage0.F#1"}', "{G=1}", "stage 0 is {'G': 1}, expected the ids of calls for some of F, B, I, W, end, "),
        *(
            ("cut=[0]", f"cut={found}", "expected numbers of inputs, each below 1, in their order")
            for found in ("[0, 0]", "[1]", "[true]", "0")
        ),
        ("return %c", "%d: f32[4] = neg(%c)  @ main#1 F\n  return %d", "@main calls the functions of its stages and does nothing else"),
        ("cut=[0]", "cut=[0], overlapped=[{forward=@twice, backward=@twice, as=@g}]", "no function @g, which overlapped names"),
    ],
)
def test_a_law_holds_main_to_its_stages(old: str, new: str, message: str) -> None:
    dsc.parse(STAGED)
    with pytest.raises(DscError) as error:
        dsc.parse(STAGED.replace(old, new, 1) if old != "stage1.F#1" else STAGED.replace(f'"{old}"', f'"{new}"'))
    assert message in str(error.value)


def test_values_pass_through_stages_between() -> None:
    """What skips a stage is handed on by it, for ranks talk to neighbours only."""
    text = """
    func @main(%x: f32[2, 2]) {
      %w: f32[2, 2] = param("w")        @ main#1 F
      %a: f32[2, 2] = matmul(%x, %w)    @ main#2 F
      %b: f32[2, 2] = matmul(%a, %w)    @ main#3 F
      %c: f32[2, 2] = matmul(%b, %w)    @ main#4 F
      %d: f32[2, 2] = add(%a, %c)       @ main#5 F
      return %d
    }
    """
    before = dsc.parse(text)
    after = dsc.apply(before, "split-stages{stages=4}")
    assert [[v.name for v in stages_of(after).forward(stage)] for stage in range(3)] == [["a"], ["a", "b"], ["a", "c"]]
    assert_same(after, before)
