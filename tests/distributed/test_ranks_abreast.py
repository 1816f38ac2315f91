"""Ranks of one process that run the same program op by op, all of them at once: the same bits, the same errors, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import dsc
from dsc import DscError
from dsc.backends.numpy_ref.run import FLOAT32
from dsc.distributed import local
from dsc.distributed.world import Abreast, Gather, Placed, Program, alone
from dsc.driver.inputs import prepare
from dsc.driver.ranks import RankWeights, inputs_of
from dsc.ir.core import Module
from dsc.ir.mesh import mesh_of, parse_mesh
from dsc.models.random_weights import RandomWeights

SUM = """
module {{ stage=sharded, mesh={{dp=4}} }}

func @main(%x: f32[2]) {{
  %i: i64[2] = iota(2, i64)  @ main#1 F
  %n: i64[2] = mul(%i, %i)  @ main#2 F
  %t: f32[2] = take(%x, %n)  @ main#3 F
  %y: f32[2] = {op}  @ main#4 F
  %z: f32[2] = mul(%y, %t)  @ main#5 F
  return %z
}}
"""
ADDED = dsc.parse(SUM.format(op='all_reduce(%x, axis="dp", size=4)'))
TWICE = dsc.parse(SUM.format(op="add(%x, %x)"))
MESH = parse_mesh("dp=4")


def by_itself(program: Program[Any]) -> Program[Any]:
    """The same program on a rank that never goes with others."""
    answer = None
    while True:
        try:
            asked = program.send(answer)
        except StopIteration as done:
            return done.value
        answer = None if isinstance(asked, Abreast) else (yield asked)


def placed(modules: Mapping[int, Module], observe: Any = None) -> Placed[Any]:
    """Rank r runs `modules[r]` on [r, 2]."""
    return lambda rank: FLOAT32.program(modules[rank], lambda name, type: None, (np.array([rank, 2], np.float32),), observe)  # type: ignore


@pytest.mark.parametrize(
    ("mode", "passes"),
    [("forward", 'shard-experts{mesh="dp=4,ep=2,tp=2"}'), ("train", 'shard-experts{mesh="dp=4,ep=4,node=2",dispatch=two-hop}')],
)
def test_all_ranks_at_once_give_the_bits_of_each_by_itself(mode: str, passes: str, program: Callable[..., Module]) -> None:
    whole = program(mode, batch=4, dtype="bfloat16")
    module = dsc.apply(whole, passes)
    weights, given = RankWeights(RandomWeights(0), module, keep="all"), prepare(whole, None)

    def one(rank: int) -> Program[tuple[Any, ...]]:
        return FLOAT32.program(module, lambda name, _: weights.get(rank, name), inputs_of(module, given, rank))

    at_once, apart = (local.run(mesh_of(module), ranks) for ranks in (one, lambda rank: by_itself(one(rank))))
    same = [bits(a) == bits(b) for a, b in zip(at_once, apart, strict=True)]
    assert all(same), same


def bits(data: Any) -> Any:
    return [bits(x) for x in data] if isinstance(data, tuple) else (data.shape, data.dtype, data.tobytes())


def test_an_op_runs_on_every_rank_before_the_next() -> None:
    seen: list[tuple[str, float]] = []
    results = local.run(
        MESH, placed(dict.fromkeys(range(4), ADDED), lambda site, op, _, results: seen.append((op.name, float(results[0][0]))))
    )
    assert [name for name, _ in seen] == [name for name in ("iota", "mul", "take", "all_reduce", "mul") for _ in range(4)]
    assert [x for name, x in seen if name == "take"] == [0.0, 1.0, 2.0, 3.0], "in the order of the ranks"
    assert [x.tolist() for (x,) in results] == [[0.0, 16.0], [6.0, 16.0], [12.0, 16.0], [18.0, 16.0]]


def test_what_depends_on_no_rank_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, computed = dsc.parse(str(ADDED)), list[str]()
    before = type(FLOAT32).prepare

    def prepared(self: Any, op: Any) -> Any:
        compute = before(self, op)
        return lambda operands: (computed.append(op.name), compute(operands))[1]

    monkeypatch.setattr(type(FLOAT32), "prepare", prepared)
    local.run(MESH, placed(dict.fromkeys(range(4), module)))
    assert computed == ["iota", "mul", *["take"] * 4, *["mul"] * 4]


def test_ranks_that_run_different_programs_run_them_by_themselves() -> None:
    found = local.run(MESH, placed({0: TWICE, 1: TWICE, 2: dsc.parse(str(TWICE)), 3: TWICE}))
    assert [x.tolist() for (x,) in found] == [[0.0, 8.0], [2.0, 8.0], [8.0, 8.0], [18.0, 8.0]]


def test_nobody_waits_for_a_rank_that_comes_later_or_never() -> None:
    """Ranks 1 to 3 run before rank 0 does, which is the first to ask and waits for them."""
    inner = placed(dict.fromkeys(range(4), TWICE))

    def program(rank: int) -> Program[Any]:
        if rank == 0:
            yield Gather("dp", 4, np.zeros(1))
            return (yield from inner(rank))
        found = yield from inner(rank)
        yield Gather("dp", 4, np.zeros(1))
        return found

    assert [x.tolist() for (x,) in local.run(MESH, program)] == [[0.0, 8.0], [2.0, 8.0], [8.0, 8.0], [18.0, 8.0]]


def test_a_rank_that_never_comes_is_told_of() -> None:
    def program(rank: int) -> Program[Any]:
        return (yield from placed({rank: ADDED})(rank)) if rank else None

    with pytest.raises(
        DscError, match=r"^3 of 4 ranks wait for ever:\n  rank 0        finished\n  ranks 1 to 3  all_reduce.*, for rank 0$"
    ):
        local.run(MESH, program)


@pytest.mark.parametrize(
    ("run", "expected"),
    [(local.run, "rank 2: @main main#3: take: two\nrank 2: is too many"), (None, "@main main#3: take: two\nis too many")],
)
def test_an_error_names_the_op_and_the_rank_if_there_are_several(run: Any, expected: str) -> None:
    def failing(site: Any, op: Any, operands: Any, results: Any) -> None:
        if op.name == "take" and results[0][0] == 2.0:
            raise DscError("two\nis too many")

    program = placed(dict.fromkeys(range(4), TWICE), failing)
    with pytest.raises(DscError) as error:
        run(MESH, program) if run else alone(program(2))
    assert str(error.value) == expected
