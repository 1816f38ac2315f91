"""A link between ranks and their world: when transfers end, by hand, and what an overlapped program gains, by clocks that are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import dsc
from dsc import backends
from dsc.distributed import local
from dsc.distributed.delayed import Link, SimulatedClock, WallClock, delayed
from dsc.distributed.world import Exchange, Gather, Index, Program, Receive, Send, Start, Wait, alone
from dsc.driver.comm import volume
from dsc.driver.inputs import prepare
from dsc.driver.ranks import RankWeights, cut
from dsc.hardware.streams import Costing, simulate
from dsc.ir.core import Module, Op
from dsc.ir.mesh import mesh_of, parse_mesh
from dsc.ir.ops.collective import Transfer
from dsc.ir.sharding import input_splits
from dsc.ir.walk import walk
from dsc.models.random_weights import RandomWeights
from dsc.passes.overlap import overlapped

X = np.zeros(100, np.uint8)
LINK = Link(bandwidth=50.0, latency=1.0)
"""100 bytes take 3 seconds."""


def run(mesh: str, program: Callable[[int, SimulatedClock], Program[Any]]) -> tuple[list[Any], list[float]]:
    """The results of every rank and what time it is there."""
    parsed = parse_mesh(mesh)
    clocks = [SimulatedClock() for _ in range(parsed.world)]
    return local.run(parsed, lambda rank: delayed(program(rank, clocks[rank]), LINK, clocks[rank])), [c.now() for c in clocks]


def test_a_transfer_begins_when_the_last_has_come() -> None:
    def program(rank: int, clock: SimulatedClock) -> Program[Any]:
        clock.advance(10.0 * rank)
        found = yield Exchange("ep", 2, ((X + rank,), (X + rank,)), (((100,),), ((100,),)))
        return [int(x[0]) for (x,) in found]

    assert run("dp=2,ep=2", program) == ([[0, 1], [0, 1]], [13.0, 13.0])


def test_computing_goes_on_beside_it() -> None:
    def program(rank: int, clock: SimulatedClock) -> Program[Any]:
        ticket = yield Start(Gather("ep", 2, X))
        clock.advance(2.0 + 2 * rank)
        return len((yield Wait(ticket)))

    assert run("dp=2,ep=2", program) == ([2, 2], [3.0, 4.0])


def test_an_axis_carries_one_after_the_other_and_two_axes_at_once() -> None:
    def program(rank: int, clock: SimulatedClock, axes: tuple[str, str]) -> Program[Any]:
        first = yield Start(Gather(axes[0], 2, X))
        second = yield Start(Gather(axes[1], 2, X))
        yield Wait(first)
        yield Wait(second)

    assert run("dp=2,tp=2", lambda rank, clock: program(rank, clock, ("dp", "dp")))[1] == [6.0] * 4
    assert run("dp=2,tp=2", lambda rank, clock: program(rank, clock, ("dp", "tp")))[1] == [3.0] * 4


def test_the_fuller_direction_counts_and_a_rank_sends_itself_nothing() -> None:
    def program(rank: int, clock: SimulatedClock) -> Program[Any]:
        other = X[:0] if rank else X
        messages = ((X,), (other,)) if rank == 0 else ((other,), (X,))  # each keeps 100 bytes, rank 0 sends 100, rank 1 nothing
        shapes = (((100,),), ((0,),)) if rank == 0 else (((100,),), ((100,),))
        yield Exchange("ep", 2, messages, shapes)

    assert run("dp=2,ep=2", program)[1] == [3.0, 3.0]


def test_one_rank_to_another() -> None:
    def program(rank: int, clock: SimulatedClock) -> Program[Any]:
        if rank == 0:
            clock.advance(5.0)
            return (yield Send("pp", 2, (X, X), 1))
        assert (yield Index("pp", 2)) == 1
        found = yield Receive("pp", 2, (X, X), 0)
        return [x.shape for x in found]

    found, times = run("pp=2", program)
    assert found == [None, [(100,), (100,)]]
    assert times[1] == 5.0 + 1.0 + 4.0


def test_nothing_is_sent_by_one_rank_alone() -> None:
    def program() -> Program[Any]:
        return (yield Gather("tp", 1, X))

    clock = SimulatedClock()
    assert len(alone(delayed(program(), LINK, clock))) == 1
    assert clock.now() == 0.0


def test_the_clock_on_the_wall_waits() -> None:
    clock = WallClock()
    moment = clock.now() + 0.02
    clock.wait_until(moment)
    assert clock.now() >= moment
    clock.wait_until(moment)


class Even:
    """An op of some FLOPs takes a second for each, and transfers take as long in all as computing does."""

    def __init__(self, module: Module) -> None:
        ops = [op for _, _, op in walk(module)]
        self.computing = float(sum(op.flops() for op in ops if not isinstance(op, Transfer)))
        self.link = Link(sum(int(volume(op)) for op in ops if isinstance(op, Transfer)) / self.computing)

    def seconds(self, op: Op) -> float:
        return self.link.seconds(int(volume(op))) if isinstance(op, Transfer) else float(op.flops())

    def stream(self, op: Op) -> Any:
        return "comm" if isinstance(op, Transfer) else "compute"


@pytest.mark.slow
def test_two_micro_batches_hide_their_communication() -> None:
    """At equal lengths of computation and communication the overlapped program is at least 1.6 times as fast, and the bits are the same.

    Clocks go on by the FLOPs of ops and by the bytes that a rank really sends. Experts are not chosen evenly: the link is made for these.
    """
    shape = ("num_hidden_layers=10", "first_k_dense_replace=0", "n_shared_experts=3", "moe_intermediate_size=48", "dtype=float32")
    plain = dsc.apply(dsc.trace("deepseek-v3-tiny", batch=4, seq=32, overrides=shape), 'simplify,shard-experts{mesh="dp=2,ep=2"}')
    even = Even(plain)
    made = overlapped(plain, Costing(even, even), microbatches=2).module
    assert 2 * simulate(plain, even).total / simulate(made, even).total >= 1.6
    weights, mesh = RankWeights(RandomWeights(0), plain, keep="all"), mesh_of(plain)
    one = prepare(plain, None)
    other = [np.roll(x, 1, -1) for x in one]

    def timed(module: Module, inputs: list[Any]) -> tuple[list[tuple[Any, ...]], float]:
        clocks = [SimulatedClock() for _ in range(mesh.world)]

        def program(rank: int) -> Program[Any]:
            def took(site: Any, op: Op, operands: Any, results: Any) -> None:
                if even.stream(op) == "compute":
                    clocks[rank].advance(even.seconds(op))

            mine = [cut(x, split, mesh, rank) for x, split in zip(inputs, input_splits(module), strict=True)]
            runner: Any = backends.get("numpy")
            return delayed(runner.program(module, lambda name, _: weights.get(rank, name), mine, took), even.link, clocks[rank])

        return local.run(mesh, program), max(clock.now() for clock in clocks)

    communicating = timed(plain, one)[1] - even.computing
    even.link = Link(even.link.bandwidth * communicating / even.computing)
    made = overlapped(plain, Costing(even, even), microbatches=2).module
    first, second, both = (timed(*given) for given in ((plain, one), (plain, other), (made, [*one, *other])))
    assert all(
        a[0].tobytes() == c[0].tobytes() and b[0].tobytes() == c[1].tobytes() for a, b, c in zip(first[0], second[0], both[0], strict=True)
    )
    assert (first[1] + second[1]) / both[1] >= 1.6
