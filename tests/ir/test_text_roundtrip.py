"""What prints parses, to the same module and to the same text: attributes of every kind, names that collide, all types, all ops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsc.ir.attributes import convert
from dsc.ir.core import OPS, Builder, Func, Module, Op, Phase, Symbol, Value, op
from dsc.ir.diagnostics import IRError
from dsc.ir.ops.control import Literal as LiteralOp
from dsc.ir.ops.control import Param
from dsc.ir.ops.elementwise import Neg
from dsc.ir.ops.shape import Pad
from dsc.ir.parser import parse
from dsc.ir.types import Bundle, DType, Ragged, Tensor, Type
from dsc.ir.verify import STAGES, verify
from dsc.testing.samples import SAMPLES, Sample

DECLARED = set(OPS)  # before this file declares an op of its own


def assert_round_trip(module: Module) -> None:
    text = str(module)
    again = parse(text.encode().decode())
    assert again == module
    assert str(again) == text


def module_of(*ops: Op, params: tuple[Value, ...] = ()) -> Module:
    return verify(Module((Func("f", params, ops, tuple(r for o in ops for r in o.results)),)))


words = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
texts = st.text(max_size=12) | st.sampled_from(
    ['"', "\\", "\n\t\0", "\x7f\x85\u2028", "\ud800", "é𝄞", "// no comment", "%x = {", "none", ""]
)
floats = st.floats() | st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 0.0, 1e-45, 5e-324, 1e300, 448.0, 1e16, 2.0**53])
dtypes = st.sampled_from(list(DType))
extents = st.integers(0, 10**6) | st.builds(Ragged, words, st.integers(0, 10**6))
tensors = st.builds(Tensor, dtypes, st.lists(extents, max_size=4).map(tuple))
types: st.SearchStrategy[Type] = st.recursive(
    tensors, lambda inner: st.builds(Bundle, st.lists(inner, max_size=3).map(tuple)), max_leaves=6
)


# ---- attributes


@dataclass(frozen=True)
class Rule:
    name: str
    scale: float = 0.0
    tiles: tuple[tuple[int, int], ...] = ()
    mode: Literal["floor", "ceil"] | None = None


@pytest.fixture(scope="module")
def probe() -> Iterator[type[Op]]:
    """An op with an attribute of every kind."""

    @op("probe_of_attributes")
    class Probe(Op):
        text: str
        number: float
        whole: int
        x: Value
        mask: Value | None = None
        more: tuple[Value, ...] = ()
        both: tuple[int | float, ...] = ()
        flag: bool = True
        dtype: DType | None = None
        word: Literal["amax", "none", "true", "f32"] = "amax"
        zero: float = 0.0
        callee: Symbol = Symbol("f")
        rule: Rule | None = None
        rules: tuple[Rule, ...] = (Rule("a"),)

        def infer(self) -> tuple[Type, ...]:
            return (self.x.type,)

    yield Probe
    del OPS["probe_of_attributes"]


rules = st.builds(
    Rule, texts, floats, st.lists(st.tuples(st.integers(), st.integers()), max_size=2).map(tuple), st.sampled_from(["floor", "ceil", None])
)


@given(data=st.data())
def test_attributes_of_every_kind(probe: type[Op], data: st.DataObject) -> None:
    x = Value(Tensor(DType.f32, (2,)), "x")
    values = st.lists(st.just(x), max_size=2).map(tuple)
    chosen = {
        "text": texts, "number": floats, "whole": st.integers(-(10**30), 10**30), "mask": st.sampled_from([None, x]), "more": values,
        "both": st.lists(st.integers() | floats, max_size=3).map(tuple), "flag": st.booleans(), "dtype": st.none() | dtypes,
        "word": st.sampled_from(["amax", "none", "true", "f32"]), "zero": st.sampled_from([0.0, -0.0, math.nan, 1.0]),
        "callee": words.filter(lambda w: w != "f").map(Symbol), "rule": st.none() | rules, "rules": st.lists(rules, max_size=2).map(tuple),
    }  # fmt: skip
    op = probe(x=x, **{name: data.draw(strategy, name) for name, strategy in chosen.items()})
    text = str(Func("f", (x,), (op,), op.results))
    module = parse(text.encode().decode())
    assert str(module.main) == text
    assert module.main == Func("f", (x,), (op,), op.results)


@pytest.mark.parametrize(
    ("hint", "given", "message"),
    [
        (Rule, {"name": "a", "scal": 1}, "unknown key scal; Rule has mode, name, scale, tiles"),
        (Rule, {"scale": 1}, "Rule needs name"),
        (Rule, {"name": "a", "tiles": [[1]]}, "expected a list of 2, found 1"),
        (Rule | None, [1], "expected Rule or none, found [1]"),
        (tuple[int, int], "ab", 'expected a list, found "ab"'),
    ],
)
def test_attributes_that_do_not_fit(hint: Any, given: Any, message: str) -> None:
    with pytest.raises(IRError.__bases__[0]) as caught:
        convert(hint, given)
    assert str(caught.value) == message


@given(floats, floats)
@example(-0.0, -0.0)
@example(math.nan, 1e-45)
def test_floats_keep_every_bit(a: float, b: float) -> None:
    x = Value(Tensor(DType.f32, (1,)), "x")
    module = module_of(LiteralOp((a, b), (2,), DType.f64), Pad(x, (0,), (1,), value=a), params=(x,))
    assert_round_trip(module)
    literal, pad = parse(str(module)).main.ops
    assert isinstance(literal, LiteralOp)
    assert isinstance(pad, Pad)
    for found, expected in zip((*literal.values, pad.value), (a, b, a), strict=True):
        assert isinstance(found, float)
        assert found.hex() == expected.hex()  # float.hex says nan for any NaN


@given(texts)
def test_strings(text: str) -> None:
    module = module_of(Param(text, (Tensor(DType.f32, ()),)))
    assert_round_trip(module)
    assert "\n" not in str(module.main.ops[0])


free = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | words.map(Symbol),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(list(STAGES)), st.dictionaries(words.filter(lambda w: w != "stage"), free, max_size=4))
def test_module_attributes(stage: str, attributes: dict[str, Any]) -> None:
    assert_round_trip(Module((Func("f", (), (), ()),), stage, attributes))


# ---- names and types


@given(st.lists(st.text(max_size=4) | st.sampled_from(["h", "h_1", "h_1_1", "h_2", "", "é", "a.b", "a b"]), min_size=1, max_size=12))
def test_names_that_collide(hints: list[str]) -> None:
    b = Builder("f")
    x = b.param(hints[0], Tensor(DType.f32, (2,)))
    values = [x]
    for hint in hints[1:]:
        values.append(b.emit(Neg(values[-1], names=(hint,))).result)
    module = Module((b.finish(values),))
    assert_round_trip(module)
    lines = str(module.main).split("\n")[1:-3]
    assert len({line.split(":")[0] for line in lines}) == len(lines)


@given(st.lists(types, max_size=4))
def test_types(given: list[Type]) -> None:
    params = tuple(Value(t, f"p{i}") for i, t in enumerate(given))
    results = tuple(Param("w", (t,)) for t in given if isinstance(t, Tensor))
    assert_round_trip(verify(Module((Func("f", params, results, (*params, *(r.result for r in results))),))))


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("id", ["", "f#1", "model.layers.3_x#12.4.1", "_#0"])
def test_places(phase: Phase, id: str) -> None:
    x = Value(Tensor(DType.f32, ()), "x")
    module = Module((Func("f", (x,), (Neg(x, id=id, phase=phase if id else Phase.F),), ()),), stage="lowered")
    assert_round_trip(verify(module))


def test_updates_and_empty_functions() -> None:
    text = (
        "module { stage=differentiated, mesh={dp=2, ep=8} }\n\n"
        "func @step(%cache: f32[2], %state: bundle{f32[], bundle{}}, %x: f32[2]) updates {%cache=1, %state=0} {\n"
        "  return %state, %x\n}\n\nfunc @nothing() {\n  return\n}\n"
    )
    module = parse(text)
    assert str(module) == text
    assert module["step"].updates == {0: 1, 1: 0}
    assert module.attributes == {"mesh": {"dp": 2, "ep": 8}}


def test_layout_and_comments_do_not_matter() -> None:
    loose = '// head\nfunc @f(%x:f32[ 2 ,3 ])  {%y :f32[ 2, 3 ]=neg ( %x )@f#1  F // why "not"\n\r\n return%y }'
    tight = "func @f(%x: f32[2, 3]) {\n  %y: f32[2, 3] = neg(%x)  @ f#1 F\n  return %y\n}\n"
    assert parse(loose) == parse(tight)
    assert str(parse(loose).main) == tight


# ---- every op


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_every_op(sample: Sample) -> None:
    assert_round_trip(verify(sample.module()))


def test_every_op_has_a_sample() -> None:
    assert {sample.cls.name for sample in SAMPLES} == DECLARED
