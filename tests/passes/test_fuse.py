"""Fusing keeps the meaning to the bit, on programs drawn at random of which some values are returned, and says what it leaves and why."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsc
from dsc import backends
from dsc.backends.arrays import STORAGE
from dsc.driver.measure import same_bits
from dsc.ir.core import Func, Module, Phase, users
from dsc.ir.ops.fused import Fused
from dsc.ir.region import free, member
from dsc.passes.fuse import Fuse
from dsc.passes.manager import run_pipeline
from dsc.testing.programs import programs
from dsc.testing.sampling import seeded

NUMPY = backends.get("numpy")


@st.composite
def partly_returned(draw: st.DrawFn) -> tuple[Module, tuple[np.ndarray, ...]]:
    """A program whose main function returns some of what it computes, in phases drawn at random."""
    module, inputs = draw(programs(most_steps=9))
    kept = draw(st.lists(st.sampled_from(module.main.results), min_size=1, max_size=3, unique=True))
    main = Func(module.main.name, module.main.params, module.main.ops, tuple(kept))
    return module.replace(funcs=(main, *module.funcs[1:])), inputs


@settings(max_examples=150, deadline=None)
@given(partly_returned())
def test_a_fused_program_gives_the_same_bits(program: tuple[Module, tuple[np.ndarray, ...]]) -> None:
    module, inputs = program
    fused = dsc.apply(module, "fuse")
    assert dsc.parse(str(fused)) == fused
    before, after = (NUMPY.run(m, seeded, inputs) for m in (module, fused))
    assert all(map(same_bits, before, after))


@settings(max_examples=60, deadline=None)
@given(partly_returned())
def test_regions_are_whole_and_nothing_runs_twice(program: tuple[Module, tuple[np.ndarray, ...]]) -> None:
    """Every op that is not free stands once, inside a region or outside; each result of a region is read.

    What no region takes keeps its order. Of what one could take, an op that stayed alone may have to wait for a region that waits for
    a later op.
    """
    module, _ = program
    fused = dsc.apply(module, "fuse")
    for func in module.funcs:
        now = fused[func.name]
        inside = [op.id for outer in now.ops if isinstance(outer, Fused) for op in fused[outer.callee].ops if not free(op)]
        outside = [op.id for op in now.ops if not isinstance(op, Fused) and not free(op)]
        assert sorted(inside + outside) == sorted(op.id for op in func.ops if not free(op))
        apart = [op.id for op in now.ops if not isinstance(op, Fused) and not free(op) and member(op) is not None]
        assert apart == [op.id for op in func.ops if op.id in set(apart)]
        read = users(now)
        for op in now.ops:
            if isinstance(op, Fused):
                assert all(v in read or v in now.results for v in op.results)


def test_programs_drawn_are_fused() -> None:
    """The property above is about something: many programs have a region."""
    found: list[bool] = []

    @settings(max_examples=60, deadline=None, database=None)
    @given(partly_returned())
    def count(program: tuple[Module, tuple[np.ndarray, ...]]) -> None:
        found.append(any(isinstance(op, Fused) for func in dsc.apply(program[0], "fuse").funcs for op in func.ops))

    count()
    assert sum(found) > len(found) / 4


CHAIN = """
func @f(%x: f32[4, 8], %y: f32[4, 9], %i: i32[4, 8]) {{
  %a: f32[4, 8] = exp(%x)  @ f#1 F
  {}
  return %z
}}
"""


@pytest.mark.parametrize(
    ("ops", "why"),
    [
        ("%b: f32[8] = sum(%a, axes=[0])  @ f#2 F\n  %z: f32[] = max(%b, axes=[0])  @ f#3 F", None),
        (
            "%b: f32[4] = sum(%a, axes=[1])  @ f#2 F\n  %c: f32[1, 4] = reshape(%b, shape=[1, 4])  @ f#3 F\n"
            "  %z: f32[1] = max(%c, axes=[1])  @ f#4 F",
            "max along rows of [1, 4] beside rows of [4, 8]",
        ),
        (
            "%b: f32[4] = sum(%a, axes=[1])  @ f#2 F\n  %c: f32[4, 1] = reshape(%b, shape=[4, 1])  @ f#3 F\n"
            "  %z: f32[4, 4] = add(%b, %c)  @ f#4 F",
            "add over [4, 4] beside ops over [4, 8]",
        ),
        ("%s: f32[4, 8] = sin(%a)  @ f#2 F\n  %z: f32[4, 8] = neg(%s)  @ f#3 F", None),
    ],
)
def test_what_does_not_fit_in_one_kernel_is_said(ops: str, why: str | None) -> None:
    module = dsc.parse(CHAIN.format(ops))
    rule = Fuse()
    run_pipeline(module, [rule])
    reasons = [str(d) for d in rule.declined]
    assert (reasons == []) if why is None else any(r.endswith(why) for r in reasons), reasons


def test_a_long_region_ends_where_a_kernel_would_have_too_many_tensors() -> None:
    lines = [f"%v{i + 1}: f32[4] = add(%v{i}, %x{i})  @ f#{i + 1} F" for i in range(40)]
    params = ", ".join(f"%x{i}: f32[4]" for i in range(40))
    module = dsc.parse(f"func @f(%v0: f32[4], {params}) {{\n  " + "\n  ".join(lines) + "\n  return %v40\n}\n")
    fused = dsc.apply(module, "fuse")
    regions = [op for op in fused.main.ops if isinstance(op, Fused)]
    assert len(regions) == 3
    assert all(len(op.operands) + len(op.results) <= 16 for op in regions)
    arrays = tuple(np.full(4, i, STORAGE[p.dtype]) for i, p in enumerate(module.main.params))
    assert same_bits(NUMPY.run(fused, seeded, arrays)[0], np.full(4, sum(range(41)), np.float32))


def test_ops_without_ids_are_fused_too() -> None:
    fused = dsc.apply(dsc.parse("func @f(%x: f32[4]) {\n  %y: f32[4] = neg(%x)\n  %z: f32[4] = exp(%y)\n  return %z\n}\n"), "fuse")
    assert [(type(op), op.id) for op in fused.main.ops] == [(Fused, "")]


def test_fused_programs_are_not_differentiated() -> None:
    fused = dsc.apply(dsc.parse(CHAIN.format("%z: f32[4, 8] = neg(%a)  @ f#2 F")), "fuse")
    with pytest.raises(dsc.DscError, match=r"autodiff takes a module .* but this one is at stage lowered"):
        dsc.apply(fused, "autodiff")
    assert [op.phase for op in fused.main.ops] == [Phase.F]
