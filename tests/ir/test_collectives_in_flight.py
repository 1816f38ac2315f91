"""Collectives that are started and done: their text, every law about them broken by hand, and how long they keep memory."""

from __future__ import annotations

import pytest

import dsc
from dsc.ir.diagnostics import IRError
from dsc.ir.flight import axes
from dsc.ir.liveness import last_uses, live_bytes
from dsc.ir.timeline import timeline
from dsc.ir.verify import STAGES, stage_index, verify

BODY = """
func @main(%x: f32[4], %s: i32[1], %r: i32[1]) {{
{}
}}
"""
MESH = "module {{ stage={stage}, mesh={{pp=1, dp=1, ep=1, tp=1, node=8}} }}\n"
FLIGHT = """
  %t: async f32[4] = all_to_all(%x, axis="ep", size=1, start=true)  @ a#1 F
  %y: f32[4] = neg(%x)  @ a#2 F
  %z: f32[4] = done([%t])  @ a#3 F
  %w: f32[4] = add(%y, %z)  @ a#4 F
  return %w"""


def text(body: str, stage: str = "scheduled") -> str:
    return MESH.format(stage=stage) + BODY.format(body.strip("\n"))


def faults(body: str, stage: str = "scheduled") -> list[str]:
    with pytest.raises(IRError) as error:
        dsc.parse(text(body, stage))
    return [fault.message for fault in error.value.diagnostics]


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage_index(stage) >= stage_index("sharded")])
def test_what_is_in_flight_is_text(stage: str) -> None:
    module = dsc.parse(text(FLIGHT, stage))
    assert "%t: async f32[4] = all_to_all(%x, axis=" in str(module)
    assert dsc.parse(str(module)) == module
    assert str(dsc.parse(str(module))) == str(module)
    assert module != dsc.parse(text(FLIGHT.replace("async ", "").replace(", start=true", "").replace("done([%t])", "neg(%t)"), stage))


def test_several_results_are_one_flight() -> None:
    body = """
  %t: async f32[n<=4], %u: async f32[n<=4] =
    all_to_all_rows([%x, %x], %s, %r, axis="ep", size=1, rows={name="n", bound=4}, start=true)  @ a#1 F
  %y: f32[n<=4], %z: f32[n<=4] = done([%t, %u])  @ a#2 F
  return %y"""
    start, done = dsc.parse(text(body)).main.ops
    assert [r.type for r in done.results] == [r.coming for r in start.results]
    assert faults(body.replace("%y: f32[n<=4], %z: f32[n<=4] = done([%t, %u])", "%y: f32[n<=4] = done([%u])")) == [
        "all_to_all_rows is started and never done",
        "waits for %u, expected all of one start, in order: %t, %u",
    ]


def test_never_done() -> None:
    assert faults("""
  %t: async f32[4] = all_to_all(%x, axis="ep", size=1, start=true)  @ a#1 F
  return %x""") == ["all_to_all is started and never done"]


def test_done_twice() -> None:
    assert faults(FLIGHT.replace("  return", "  %v: f32[4] = done([%t])  @ a#5 F\n  return")) == ["waits for a#1, which a#3 has waited for"]


def test_done_before_its_start() -> None:
    start, neg, done, *rest = FLIGHT.strip("\n").split("\n")
    assert "%t is not defined before this line" in faults("\n".join([done, start, neg, *rest]))[0]
    module = dsc.parse(text(FLIGHT))
    func = module.main
    swapped = func.ops[2], func.ops[0], func.ops[1], func.ops[3]
    with pytest.raises(IRError, match="%t is used before it is defined"):
        verify(module.replace(funcs=(dsc.ir.core.Func(func.name, func.params, swapped, func.results),)))


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        ("%v: f32[4] = neg(%t)  @ b#1 F", "neg: expected a tensor, but %t is async f32[4]"),
        ("%v: bundle{async f32[4]} = pack([%t])  @ b#1 F", "reads %t, which is on its way: only a done can"),
    ],
)
def test_nothing_else_reads_it(reader: str, message: str) -> None:
    assert message in faults(FLIGHT.replace("  %z", f"  {reader}\n  %z"))


def test_it_crosses_no_function() -> None:
    assert faults(FLIGHT.replace("return %w", "return %w, %t"))[0] == (
        "@main returns %t, which is on its way: a collective is done in the function that starts it"
    )
    module = "func @main(%t: async f32[4]) {\n  %z: f32[4] = done([%t])  @ a#1 F\n  return %z\n}\n"
    with pytest.raises(IRError, match="@main takes %t, which is on its way"):
        dsc.parse(module)


def test_what_sends_nothing_cannot_be_started() -> None:
    assert faults('  %y: f32[4] = own_part(%x, axis="ep", size=1, start=true)  @ a#1 F\n  return %y') == [
        "own_part has no attribute start; it has: axis, size, dim"
    ]


TWO = """
  %t: async f32[4] = all_to_all(%x, axis="ep", size=1, start=true)  @ a#1 F
  %u: async f32[4] = all_gather(%x, axis="{axis}", size=1, start=true)  @ a#2 F
  %z: f32[4] = done([%{first}])  @ a#3 F
  %w: f32[4] = done([%{second}])  @ a#4 F
  return %z, %w"""


def test_an_axis_is_one_stream() -> None:
    """What the ranks of one axis do together ends in the order in which it began; two axes do not wait for one another."""
    dsc.parse(text(TWO.format(axis="ep", first="t", second="u")))
    dsc.parse(text(TWO.format(axis="dp", first="u", second="t")))
    wrong = TWO.format(axis="ep", first="u", second="t")
    assert faults(wrong) == ["ends a#2 before a#1, which began earlier along ep"]
    dsc.parse(text(wrong, "sharded"))  # a law of the stage that is ordered


def test_nothing_overtakes_on_an_axis() -> None:
    now = FLIGHT.replace("%y: f32[4] = neg(%x)", '%y: f32[4] = all_gather(%x, axis="{}", size=1)')
    dsc.parse(text(now.format("dp")))
    assert faults(now.format("ep")) == ["communicates along ep while a#1 is in flight there"]
    called = FLIGHT.replace("%y: f32[4] = neg(%x)", "%y: f32[4] = call(@inner, [%x])")
    inner = 'func @inner(%x: f32[4]) {{\n  %y: f32[4] = all_gather(%x, axis="{}", size=1)  @ b#1 F\n  return %y\n}}\n'
    module = dsc.parse(text(called) + inner.format("dp"))
    assert axes(module, module.main.ops[1]) == {"dp"}
    with pytest.raises(IRError, match="communicates along ep while a#1 is in flight there"):
        dsc.parse(text(called) + inner.format("ep"))


MEMORY = """
  %a: f32[4] = neg(%x)  @ a#1 F
  %t: async f32[4] = all_to_all(%a, axis="ep", size=1, start=true)  @ a#2 F
  %b: f32[4] = neg(%x)  @ a#3 F
  %c: f32[4] = neg(%b)  @ a#4 F
  %z: f32[4] = done([%t])  @ a#5 F
  %w: f32[4] = add(%c, %z)  @ a#6 F
  return %w"""


def test_what_is_sent_lies_in_memory_until_it_is_done() -> None:
    """By hand, in arrays of 16 bytes: a | a t | a t b | a t b c | a t c | t c w; what a done gives lies where the start put it."""
    module = dsc.parse(text(MEMORY))
    assert [[v.name for v in values] for values in last_uses(module.main)] == [[], [], [], ["b"], ["a", "t"], ["c", "z"]]
    assert live_bytes(module, module.main).after == (16, 32, 48, 64, 48, 48)
    assert timeline(module).series("workspace") == [16, 32, 48, 64, 48, 48]
