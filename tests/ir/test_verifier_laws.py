"""Each law of the IR, broken by hand: the verifier finds every breach, and all of them at once."""

from __future__ import annotations

import pytest

from dsc.ir.core import Builder, Func, Module, Op, Phase, Symbol, Value
from dsc.ir.diagnostics import IRError
from dsc.ir.errors import DscError
from dsc.ir.gradients import bundles
from dsc.ir.ops.control import Call
from dsc.ir.ops.elementwise import Add, Exp, Neg
from dsc.ir.ops.shape import Broadcast, Reshape
from dsc.ir.parser import parse
from dsc.ir.types import Bundle, DType, Tensor, Type
from dsc.ir.verify import STAGES, stage_index, verify

PAIR = Tensor(DType.f32, (2,))
TRIPLE = Tensor(DType.f32, (3,))


def value(type: Type = PAIR, name: str = "x") -> Value:
    return Value(type, name)


def identity(name: str = "f", type: Type = PAIR) -> Func:
    x = value(type)
    return Func(name, (x,), (), (x,))


def broken(*funcs: Func, stage: str = "traced") -> list[str]:
    """What the verifier says, one line for each breach."""
    with pytest.raises(IRError) as caught:
        verify(Module(funcs, stage))
    assert str(caught.value).split("\n") == [d.message for d in caught.value.diagnostics]
    return [d.message for d in caught.value.diagnostics]


def test_a_sound_module_comes_back() -> None:
    b = Builder("f")
    x = b.param("x", PAIR)
    module = Module((b.finish([b.emit(Neg(x)).result, x], {0: 0}),))
    assert verify(module) is module


def test_function_names_are_unique_names() -> None:
    assert broken(identity("f"), identity("g.h"), identity("f"), identity("")) == [
        "@: the name of a function is letters, digits and _, found @",
        "@f: function @f is defined twice",
        "@g.h: the name of a function is letters, digits and _, found @g.h",
    ]


def calling(name: str, *callees: str) -> Func:
    x = value()
    ops = tuple(Call(Symbol(callee), (x,), (PAIR,)) for callee in callees)
    return Func(name, (x,), ops, (x,))


def test_no_function_calls_itself() -> None:
    found = broken(calling("main", "a"), calling("a", "leaf", "b"), calling("b", "c", "leaf"), calling("c", "a"), identity("leaf"))
    assert found == [
        "@a: @a calls itself: @a -> @b -> @c -> @a",
        "@b: @b calls itself: @b -> @c -> @a -> @b",
        "@c: @c calls itself: @c -> @a -> @b -> @c",
    ]


def test_a_value_is_defined_once_and_before_its_use() -> None:
    x, stranger = value(), value(name="stranger")
    first = Neg(x, names=("a",))
    second = Neg(first.result, names=("b",))
    func = Func("f", (x, x), (second, first, first, Add(stranger, x, names=("c",))), (second.result, stranger))
    assert broken(func) == [
        "@f: %a: f32[2] = neg(%x): stands twice in the function",
        "@f: %b: f32[2] = neg(%a): %a is used before it is defined",
        "@f: %c: f32[2] = add(%stranger, %x): %stranger is used before it is defined",
        "@f: @f has the same parameter twice",
        "@f: @f returns %stranger, which it does not define",
    ]


def test_a_value_of_another_function_is_not_defined() -> None:
    x = value()
    assert broken(Func("f", (x,), (), (x,)), Func("g", (), (), (x,))) == ["@g: @g returns %x, which it does not define"]


def test_ids_are_unique_in_their_function() -> None:
    x = value()
    ops = tuple(Neg(x, id=id) for id in ("f#1", "f#2", "f#1", "f-2#1", "f", "", ""))
    assert broken(Func("f", (x,), ops, ()), Func("g", (x,), (Neg(x, id="f#1"),), ())) == [
        "@f: %neg: f32[2] = neg(%x)  @ f F: an id is component#n, found f",
        "@f: %neg: f32[2] = neg(%x)  @ f#1 F: id f#1 is taken by another op of @f",
        "@f: %neg: f32[2] = neg(%x)  @ f-2#1 F: an id is component#n, found f-2#1",
    ]


def retyped(op: Op, type: Type) -> Op:
    """`op` with the type of its result gone stale, as only direct writing can bring about."""
    op.result.type = type
    return op


def test_types_are_what_the_rules_infer() -> None:
    x, y = value(), value(name="y")
    stale = retyped(Neg(x, names=("a",)), TRIPLE)
    misfit = Add(x, y, names=("b",))
    y.type = TRIPLE
    assert broken(Func("f", (x, y), (stale, misfit), ())) == [
        "@f: %a: f32[3] = neg(%x): has the types f32[3], but its rule gives f32[2]",
        "@f: %b: f32[2] = add(%x, %y): add: shapes do not broadcast: [2] and [3]",
    ]


def test_an_ill_typed_op_cannot_be_made() -> None:
    with pytest.raises(DscError, match=r"^shapes do not broadcast: \[2\] and \[3\]$"):
        Add(value(PAIR), value(TRIPLE))
    with pytest.raises(DscError, match=r"^expected a tensor, but %x is bundle\{\}$"):
        Exp(value(Bundle(())))


@pytest.mark.parametrize("make", [lambda x: Reshape(x, (-1, -2)), lambda x: Broadcast(x, (-3, 2)), lambda x: Tensor(DType.f32, (-1,))])
def test_no_dimension_is_negative(make: object) -> None:
    with pytest.raises(DscError, match="a dimension is 0 or more, found f32"):
        make(value(PAIR))  # type: ignore[operator]


def test_calls_fit_their_function() -> None:
    x, y = value(), value(TRIPLE, "y")
    calls = (
        Call(Symbol("missing"), (x,), (PAIR,), names=("a",)),
        Call(Symbol("g"), (y,), (PAIR,), names=("b",)),
        Call(Symbol("g"), (x, x), (TRIPLE,), names=("c",)),
        Call(Symbol("g"), (x,), (PAIR,), names=("d",)),
    )
    assert broken(Func("f", (x, y), calls, ()), identity("g")) == [
        "@f: %a: f32[2] = call(@missing, [%x]): call: no function @missing; the module has @f, @g",
        "@f: %b: f32[2] = call(@g, [%y]): call: @g has arguments (f32[2]), found (f32[3])",
        "@f: %c: f32[3] = call(@g, [%x, %x]): call: @g has arguments (f32[2]), found (f32[2], f32[2])",
        "@f: %c: f32[3] = call(@g, [%x, %x]): call: @g has results (f32[2]), found (f32[3])",
    ]


def test_updates_give_a_parameter_a_result_of_its_type() -> None:
    x, y = value(), value(TRIPLE, "y")
    assert broken(
        Func("f", (x, y), (), (y, x), {0: 0, 1: 2}), Func("g", (x, y), (), (x,), {0: 0, 1: 0}), Func("h", (x,), (), (x,), {1: 0})
    ) == [
        "@f: %x is f32[2], but its update, result 0, is f32[3]",
        "@f: @f updates parameter 1 with result 2, but has 2 parameters and 2 results, counted from 0",
        "@g: %y is f32[3], but its update, result 0, is f32[2]",
        "@g: two parameters are updated by the same result",
        "@h: @h updates parameter 1 with result 0, but has 1 parameters and 1 results, counted from 0",
    ]


@pytest.mark.parametrize("phase", [Phase.I, Phase.W, Phase.R])
def test_a_traced_program_runs_forward_only(phase: Phase) -> None:
    x = value()
    func = Func("f", (x,), (Neg(x, id="f#1", phase=phase),), ())
    line = f"@f: %neg: f32[2] = neg(%x)  @ f#1 {phase.name}: is in phase {phase.name}, but nothing has been differentiated at stage traced"
    assert broken(func) == [line]
    if phase is not Phase.R:
        verify(Module((func,), "differentiated"))
    for stage in list(STAGES)[3:]:
        verify(Module((func,), stage))


def test_nothing_is_recomputed_before_its_pass() -> None:
    x = value()
    func = Func("f", (x,), (Neg(x, id="f#1", phase=Phase.R),), ())
    line = "@f: %neg: f32[2] = neg(%x)  @ f#1 R: is in phase R, but nothing is recomputed at stage differentiated"
    assert broken(func, stage="differentiated") == [line]


DIFFERENTIATED = """
module {{ stage=differentiated, gradients={{f={{weights=["{weight}"], calls=["{call}"]}}}} }}

func @main(%x: f32[2]) {{
  %loss: f32[] = sum(%x, axes=[0])  @ main#1 F
  %d: bundle{{f32[2]}} = call(@f, [%x], weights="a")  @ main#2 W
  return {results}
}}

func @f(%x: f32[2]) {{
  %w: bf16[{size}] = param("w")  @ f#1 W
  %d: bundle{{f32[2]}} = pack([%x])  @ f#2 W
  return %d
}}
"""


def test_gradients_are_of_the_weights_that_the_module_names() -> None:
    right = {"weight": "w", "call": "a", "results": "%loss, %d", "size": 2}
    module = parse(DIFFERENTIATED.format(**right))
    assert bundles(module) == (("a.w",),)
    for change, message in {
        "size=3": "%d holds the gradients of a.w: expected bundle{f32[3]}, found bundle{f32[2]}",
        "call=b": "%d holds a gradient of b.w, which is no weight of this module",
        "results=": "the module names 1 bundles of gradients, but @main has 0 results",
    }.items():
        key, _, wrong = change.partition("=")
        with pytest.raises(IRError) as caught:
            verify(parse(DIFFERENTIATED.format(**right | {key: wrong})))
        assert [d.message for d in caught.value.diagnostics] == [message]


def test_faults_of_all_laws_are_reported_together() -> None:
    x, stranger = value(), value(name="stranger")
    op = Neg(stranger, id="f#1", phase=Phase.W, names=("a",))
    twin = retyped(Neg(x, id="f#1", names=("b",)), TRIPLE)
    found = broken(Func("f", (x,), (op, twin, Call(Symbol("g"), (), ())), (x,), {0: 3}), identity("h"), identity("h"))
    assert len(found) == 7


def test_the_order_of_stages() -> None:
    assert [stage_index(stage) for stage in STAGES] == list(range(7))
    assert list(STAGES) == ["traced", "differentiated", "quantized", "sharded", "rematerialized", "scheduled", "lowered"]
