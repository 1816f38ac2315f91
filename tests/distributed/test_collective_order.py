"""Ranks of different stages must come to what they do together in the same order, and at times at which nobody waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

import dsc
from dsc.distributed.pipeline import pipeline
from dsc.driver.pipelining import schedule_for
from dsc.ir.core import Module

SUM, LARGEST, WHOLE = (
    '%{0}: f32[2] = all_reduce(%x, axis="world", size=4)  @ {1}#1 F',
    '%{0}: f32[2] = all_reduce(%x, axis="world", size=4, kind="max")  @ {1}#2 F',
    '%{0}: f32[4] = all_gather(%x, axis="pp", size=2)  @ {1}#3 F',
)
WITHIN = '%{0}: f32[4] = all_gather(%x, axis="dp", size=2)  @ {1}#4 F'


def function(name: str, ops: tuple[str, ...]) -> str:
    lines = "".join(f"  {op.format(f'y{i}', name)}\n" for i, op in enumerate(ops))
    return f"func @{name}(%x: f32[2]) {{\n{lines}  %z: f32[2] = neg(%x)  @ {name}#9 F\n  return %z\n}}\n"


def staged(**asked: tuple[str, ...]) -> Module:
    """Two stages on two ranks each, with the collectives that are asked in the forward passes and ends of each."""
    text = """
module { stage=sharded, mesh={pp=2, dp=2}, stages=[{F="main#1", end="main#3"}, {F="main#2", end="main#4"}], cut=[0] }

func @main(%x: f32[2]) {
  %a: f32[2] = call(@first, [%x])  @ main#1 F
  %b: f32[2] = call(@second, [%a])  @ main#2 F
  %c: f32[2] = call(@first_end, [%a])  @ main#3 F
  %d: f32[2] = call(@second_end, [%b])  @ main#4 F
  return %c, %d
}
"""
    names = ("first", "second", "first_end", "second_end")
    return dsc.parse("\n".join([text, *(function(name, asked.get(name, ())) for name in names)]))


def planned(module: Module) -> None:
    pipeline(module, schedule_for(module, "forward", 2))


def test_the_same_order_is_right() -> None:
    """What lies between, within a stage, does not matter."""
    planned(staged(first_end=(SUM, WITHIN, WHOLE, LARGEST), second_end=(SUM, WHOLE, LARGEST)))


def test_a_wrong_order_names_ranks_and_ops() -> None:
    with pytest.raises(dsc.DscError) as caught:
        planned(staged(first_end=(WHOLE, SUM, LARGEST), second_end=(WHOLE, LARGEST, SUM)))
    assert str(caught.value).splitlines() == [
        "collective 1 along world is not the same on all ranks:",
        '  ranks 0, 1  all_reduce(f32[2], axis="world", size=4, kind="sum") at @first_end first_end#1',
        '  ranks 2, 3  all_reduce(f32[2], axis="world", size=4, kind="max") at @second_end second_end#2',
    ]


def test_a_collective_that_one_stage_lacks() -> None:
    with pytest.raises(dsc.DscError) as caught:
        planned(staged(first_end=(WHOLE,), second_end=(WHOLE, WHOLE.replace("#3", "#5"))))
    assert str(caught.value).splitlines() == [
        "collective 2 along pp is not the same on all ranks:",
        "  rank 0  nothing more",
        '  rank 2  all_gather(f32[2], axis="pp", size=2, dim=0) at @second_end second_end#5',
    ]


def test_axes_that_wait_for_each_other() -> None:
    """Along each axis the order is the same."""
    with pytest.raises(dsc.DscError, match="of the ranks along pp 2 of 2 ranks wait for ever"):
        planned(staged(first_end=(SUM, WHOLE), second_end=(WHOLE, SUM)))


def test_what_waits_for_a_send_that_waits_for_it() -> None:
    """Both stages sum in their forward pass, but the second begins when the first has ended."""
    with pytest.raises(dsc.DscError) as caught:
        planned(staged(first=(SUM,), second=(SUM,)))
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        "forward and what stages do together do not fit; of the ranks along pp 2 of 2 ranks wait for ever:",
        'rank 0  all_reduce(f32[2], axis="world", size=4, kind="sum") at @first first#1, for rank 1',
        "rank 1  1RECV_F0 from 0, for rank 0",
    ]


def test_it_is_found_when_the_program_is_compiled(tmp_path: Path) -> None:
    module = staged(first_end=(SUM, LARGEST), second_end=(LARGEST, SUM))
    file = tmp_path / "staged.dsc"
    file.write_text(str(module))
    with pytest.raises(dsc.DscError, match="collective 1 along world is not the same on all ranks"):
        dsc.compile(file, tmp_path / "out", passes="")
