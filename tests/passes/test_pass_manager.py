"""Pipelines as text, what a run records, stages, and who is blamed for what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dsc
from dsc.ir.core import Func, Module, Value
from dsc.ir.ops.elementwise import Exp, Neg
from dsc.ir.types import DType, Tensor
from dsc.passes.manager import PASSES, Pass, Record, bisect, parse_pipeline, register, run_pipeline
from dsc.passes.rewrite import rebuild

MODULE = dsc.parse("func @f(%x: f32[2]) {\n  %y: f32[2] = neg(%x)  @ f#1 F\n  %z: f32[2] = exp(%y)  @ f#2 F\n  return %z\n}")


@dataclass(frozen=True)
class Probe(Pass):
    name: ClassVar[str] = "probe"
    budget_gb: float = 60.0
    recipe: str = "deepseek-v3"
    tile: tuple[int, int] = (1, 128)
    parts: tuple[str, ...] = ()
    dtype: DType | None = None
    mode: Literal["solver", "list"] = "list"
    eager: bool = False

    def __call__(self, module: Module) -> Module:
        return module


@dataclass(frozen=True)
class Needy(Pass):
    name: ClassVar[str] = "needy"
    count: int

    def __call__(self, module: Module) -> Module:
        return module


@dataclass(frozen=True)
class Differentiate(Pass):
    name: ClassVar[str] = "differentiate"
    requires: ClassVar[str] = "traced"
    ensures: ClassVar[str | None] = "differentiated"

    def __call__(self, module: Module) -> Module:
        return module.replace(stage="differentiated")


@dataclass(frozen=True)
class Shard(Pass):
    name: ClassVar[str] = "cut"
    requires: ClassVar[str] = "differentiated.."
    ensures: ClassVar[str | None] = "sharded"

    def __call__(self, module: Module) -> Module:
        return module.replace(stage="sharded")


@dataclass(frozen=True)
class NegToExp(Pass):
    name: ClassVar[str] = "neg-to-exp"

    def __call__(self, module: Module) -> Module:
        for op in module.main.ops:
            if not isinstance(op, Neg):
                self.decline(module.main, op, f"{op.name} is no neg")
        return module.map(lambda f: rebuild(f, lambda op, b: b.emit(Exp(op.x)).results if isinstance(op, Neg) else None))


PROBES = (Probe, Needy, Differentiate, Shard, NegToExp)


@pytest.fixture(autouse=True, scope="module")
def probes() -> Iterator[None]:
    for cls in PROBES:
        register(cls)
    yield
    for cls in PROBES:
        del PASSES[cls.name]


# ---- text


def test_options_are_fields() -> None:
    text = 'probe{budget-gb=80, recipe="a,b", tile=[128, 1], parts=[mlp, 60, "x y"], dtype=bf16, mode=solver, eager=true}'
    (found,) = parse_pipeline(text)
    assert found == Probe(80.0, "a,b", (128, 1), ("mlp", "60", "x y"), DType.bf16, "solver", True)
    assert isinstance(found, Probe)
    assert isinstance(found.budget_gb, float)
    assert str(found) == text.replace("=80", "=80.0").replace(", ", ",")


@pytest.mark.parametrize(
    "text", ["", "  ", "simplify", "simplify,probe,simplify", "probe{recipe=recipes/my-own_v3.1.toml}", "needy{count=-3}"]
)
def test_pipelines_print_back(text: str) -> None:
    assert ",".join(map(str, parse_pipeline(text))) == text.strip()


def test_blanks_do_not_matter() -> None:
    loose, tight = " probe { tile = [ 1 , 2 ] , eager = true } , simplify ", "probe{tile=[1,2],eager=true},simplify"
    assert parse_pipeline(loose) == parse_pipeline(tight)
    assert parse_pipeline("probe{}") == (Probe(),)


@given(
    st.builds(
        Probe,
        st.floats(allow_nan=False),
        st.text(max_size=8),
        st.tuples(st.integers(), st.integers()),
        st.lists(st.text(max_size=4), max_size=3).map(tuple),
        st.none() | st.sampled_from(list(DType)),
        st.sampled_from(["solver", "list"]),
        st.booleans(),
    )
)
def test_every_pass_prints_back(given: Probe) -> None:
    assert parse_pipeline(str(given)) == (given,)
    assert parse_pipeline(f"simplify,{given},simplify")[1] == given


ERRORS = {
    "simplfy": "column 1: unknown pass simplfy; did you mean simplify?",
    "simplify,frobnicate": "column 10: unknown pass frobnicate; known are: ",
    "simplify,": "column 10: expected the name of a pass, found the end",
    ",simplify": "column 1: expected the name of a pass, found ','",
    "simplify simplify": "column 10: found 's', expected ',' and another pass, or the end",
    "simplify}": "column 9: found '}', expected ',' and another pass, or the end",
    "simplify{x=1}": "column 10: unknown option x of simplify; known are: none",
    "probe{budgetgb=1}": "column 7: unknown option budgetgb of probe; did you mean budget-gb?",
    "probe{declined=[]}": "column 7: unknown option declined of probe; known are: budget-gb, recipe, tile, parts, dtype, mode, eager",
    "probe{budget-gb=much}": "column 17: probe: budget-gb: expected a number, found much",
    "probe{budget-gb}": "column 16: expected '=', found '}'",
    "probe{budget-gb=": "column 17: expected a value, found the end",
    "probe{budget-gb=1": "column 18: expected ',', found the end",
    "probe{eager=1}": "column 13: probe: eager: expected true or false, found 1",
    'probe{eager="true"}': 'column 13: probe: eager: expected true or false, found "true"',
    "probe{tile=[1,2,3]}": "column 12: probe: tile: expected a list of 2, found 3",
    "probe{tile=[1,2": "column 16: expected ',', found the end",
    "probe{tile=1}": "column 12: probe: tile: expected a list, found 1",
    "probe{mode=slow}": 'column 12: probe: mode: expected one of "solver", "list", found slow',
    "probe{dtype=fp8}": "column 13: probe: dtype: expected a dtype or none, found fp8",
    'probe{recipe="x}': "column 14: expected a value, found '\"'",
    "probe{eager=true,eager=false}": "column 18: eager is given twice",
    "simplify,needy": "column 10: needy needs count: needy{count=...}",
    "needy{count=1.5}": "column 13: needy: count: expected a whole number, found 1.5",
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_name_the_column(text: str) -> None:
    with pytest.raises(dsc.DscError) as caught:
        parse_pipeline(text)
    assert str(caught.value).startswith(f"pipeline, {ERRORS[text]}")
    assert "\n" not in str(caught.value)


@given(st.text(alphabet='probesimlfy{}[]=,"-12. \\'))
def test_any_text_is_a_pipeline_or_an_error(text: str) -> None:
    try:
        found = parse_pipeline(text)
    except dsc.DscError:
        return
    assert parse_pipeline(",".join(map(str, found))) == found


def test_what_a_pass_says_about_itself_is_checked() -> None:
    with pytest.raises(TypeError, match="pass 'probe' is registered twice: Probe and Probe"):
        register(Probe)

    class Lost(Pass):
        name: ClassVar[str] = "lost"
        requires: ClassVar[str] = "traced..quantised"

    with pytest.raises(TypeError, match="pass 'lost' speaks of a stage 'quantised'; there are traced, "):
        register(Lost)
    with pytest.raises(TypeError, match="Lost does not say what it does"):
        Lost()(MODULE)


# ---- running


def test_records() -> None:
    seen: list[tuple[Record, Module]] = []
    result = run_pipeline(MODULE, parse_pipeline("neg-to-exp,simplify,neg-to-exp"), on_snapshot=lambda r, m: seen.append((r, m)))
    assert [(r.index, r.name, r.options, r.ops_before, r.ops_after, r.changed) for r in result.records] == [
        (1, "neg-to-exp", "neg-to-exp", 2, 2, True),
        (2, "simplify", "simplify", 2, 2, False),
        (3, "neg-to-exp", "neg-to-exp", 2, 2, False),
    ]
    assert [str(d) for r in result.records for d in r.declined] == [
        "@f f#2: exp is no neg",
        "@f f#1: exp is no neg",
        "@f f#2: exp is no neg",
    ]
    assert tuple(r for r, _ in seen) == result.records
    assert seen[-1][1] is result.module
    assert all(0 <= r.seconds < 60 for r in result.records)


def test_a_pass_used_twice_records_each_run_alone() -> None:
    one = NegToExp()
    first, second = run_pipeline(MODULE, [one, one]).records
    assert (len(first.declined), len(second.declined)) == (1, 2)
    assert one == NegToExp()


def test_apply_takes_text_or_passes() -> None:
    assert dsc.apply(MODULE, "neg-to-exp") == dsc.apply(MODULE, [NegToExp()])
    assert dsc.apply(MODULE, "") is MODULE


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("cut", "cut takes a module at the stages from differentiated to quantized, but this one is at stage traced"),
        ("differentiate,differentiate", "differentiate takes a module at stage traced, but this one is at stage differentiated"),
        ("differentiate,cut,cut", "cut takes a module at the stages from differentiated to quantized, but this one is at stage sharded"),
    ],
    ids=["too early", "twice", "too late"],
)
def test_stages_are_kept_in_order(pipeline: str, message: str) -> None:
    with pytest.raises(dsc.DscError) as caught:
        dsc.apply(MODULE, pipeline)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("until", "ran", "stage"),
    [("traced", ["simplify"], "traced"), ("quantized", ["simplify", "differentiate", "probe"], "differentiated"), (None, 5, "sharded")],
)
def test_until_stops_before_a_stage_is_left(until: str | None, ran: object, stage: str) -> None:
    result = run_pipeline(MODULE, parse_pipeline("simplify,differentiate,probe,cut,simplify"), until=until)
    names = [r.name for r in result.records]
    assert names == ran or len(names) == ran
    assert result.module.stage == stage


def test_an_unknown_stage() -> None:
    with pytest.raises(dsc.DscError, match=r"^unknown stage quantised; did you mean quantized\?$"):
        run_pipeline(MODULE, [], until="quantised")


# ---- blame


def returning(module: Module, cls_name: str = "faulty") -> Pass:
    @dataclass(frozen=True)
    class Faulty(Pass):
        name: ClassVar[str] = cls_name

        def __call__(self, _: Module) -> Module:
            return module

    return Faulty()


def test_a_broken_result_is_the_fault_of_the_pass() -> None:
    x = Value(Tensor(DType.f32, (2,)), "x")
    broken = Module((Func("f", (), (), (x,)),))
    with pytest.raises(dsc.DscError) as caught:
        dsc.apply(MODULE, [Probe(), returning(broken), Probe()])
    assert str(caught.value).split("\n") == [
        "faulty has a bug (the program is not at fault): its result breaks the laws of the IR",
        "@f: @f returns %x, which it does not define",
    ]


def test_a_stage_that_is_not_the_promised_one_is_too() -> None:
    with pytest.raises(dsc.DscError, match=r"^faulty has a bug .*: its result is at stage lowered, expected traced$"):
        dsc.apply(MODULE, [returning(MODULE.replace(stage="lowered"))])


def test_a_broken_input_is_not() -> None:
    broken = Module((Func("f", (), (), MODULE.main.results),))
    with pytest.raises(dsc.DscError, match=r"^@f: @f returns %z, which it does not define$"):
        dsc.apply(broken, "simplify")


def test_what_a_pass_refuses_bears_its_name() -> None:
    class Refusing(Pass):
        name: ClassVar[str] = "refusing"

        def __call__(self, module: Module) -> Module:
            raise dsc.DscError("recipe 'mine' has no key tile")

    with pytest.raises(dsc.DscError, match=r"^refusing: recipe 'mine' has no key tile$"):
        dsc.apply(MODULE, [Refusing()])


# ---- bisecting


def means(*names: str) -> Module:
    x = Value(Tensor(DType.f32, (2,)), "x")
    ops = tuple({"neg": Neg, "exp": Exp}[name](x, id=f"f#{i}") for i, name in enumerate(names))
    return Module((Func("f", (x,), ops, tuple(op.result for op in ops)),))


def test_bisect_names_the_first_culprit() -> None:
    start = means("neg")
    passes = [returning(start, "a"), returning(means("neg", "neg"), "b"), returning(means("exp"), "c"), returning(start, "d")]
    asked: list[Module] = []

    def same(module: Module) -> bool:
        asked.append(module)
        return all(op.name == "neg" for op in module.main.ops)

    assert bisect(start, passes, same) == "c"
    assert len(asked) == 3, "before, after b and after c: a changes nothing"
    assert bisect(start, passes[:2], same) is None
    with pytest.raises(dsc.DscError, match="before the first pass"):
        bisect(means("exp"), passes, same)
