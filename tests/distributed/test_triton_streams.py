"""What runs on which stream, and what waits for what: no two streams touch the same memory unless an event orders them.

A stand-in for torch.cuda keeps a vector clock for each stream, and a recorder holds what an op reads and writes against what was touched
before: so a wait that is missing is a race that is named, on a machine without a GPU. The streams are those that run on one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

import dsc
from dsc.backends.triton import INTERPRET, run
from dsc.backends.triton.prepared import Walk
from dsc.backends.triton.program import Step, flat
from dsc.backends.triton.run import Executor
from dsc.backends.triton.streams import ONE, SideStreams
from dsc.backends.triton.together import Ask
from dsc.distributed import local
from dsc.driver.inputs import prepare
from dsc.driver.ranks import RankWeights, inputs_of
from dsc.ir.core import Module
from dsc.ir.mesh import mesh_of
from dsc.models.random_weights import RandomWeights

Draw = Callable[[Random], tuple[Module, Module]]
COMPUTE = "compute"


@dataclass(frozen=True)
class Access:
    """What an op did with the bytes from `start` to `stop`, as the `count`th on its stream."""

    label: str
    start: int
    stop: int
    writes: bool
    stream: str
    count: int


class Stream:
    """A vector clock: how much of each stream has run before what this one is given next."""

    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name, self.clock = cuda, name, dict[str, int]()

    def record_event(self) -> dict[str, int]:
        return dict(self.clock)

    def wait_event(self, event: dict[str, int]) -> None:
        if self.cuda.waits != self.cuda.dropped:
            self.clock.update({other: max(count, self.clock.get(other, 0)) for other, count in event.items()})
        self.cuda.waits += 1


class Cuda:
    """Stands for torch.cuda. `dropped`: which wait, counted from 0, does not happen."""

    def __init__(self, dropped: int | None) -> None:
        self.dropped, self.waits, self.current = dropped, 0, Stream(self, COMPUTE)

    def Stream(self, priority: int) -> Stream:
        return Stream(self, "side")

    def current_stream(self) -> Stream:
        return self.current

    def set_stream(self, stream: Stream) -> None:
        self.current = stream


class Recorder(SideStreams):
    """The streams of one rank, on which nothing runs, and what the ops that they are given touch."""

    def __init__(self, dropped: int | None = None) -> None:
        super().__init__(Cuda(dropped))
        self.touched: list[Access] = []
        self.races: list[str] = []
        self.pending: Callable[[], None] | None = None

    @property
    def waits(self) -> int:
        return int(self.cuda.waits)

    def begin(self, axis: str) -> None:
        super().begin(axis)
        self.cuda.current.name = axis

    def end(self) -> Any:
        if self.pending is not None:
            self.pending()
            self.pending = None
        return super().end()

    def touch(self, label: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        """An op that is issued to the current stream."""
        stream, clock = self.cuda.current.name, self.cuda.current.clock
        clock[stream] = count = clock.get(stream, 0) + 1
        mine = [Access(label, *extent(x), w, stream, count) for some, w in ((reads, False), (writes, True)) for x in some]
        for old in self.touched:
            if old.stream == stream or clock.get(old.stream, 0) >= old.count:
                continue
            if any((old.writes or new.writes) and old.start < new.stop and new.start < old.stop for new in mine):
                self.races.append(f"{label} on {stream} does not wait for {old.label} on {old.stream}")
        self.touched += mine


def extent(x: torch.Tensor) -> tuple[int, int]:
    """The bytes between which a tensor lies."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + last * x.element_size()


class Watched(Walk):
    """A walk whose actions tell the recorder what memory they are about."""

    def prepare(self, site: Any, step: Step, operands: Any, buffers: Any) -> Any:
        results, actions = super().prepare(site, step, operands, buffers)
        recorder: Any = self.streams
        roots = [planned.root for planned in step.results]
        writes = [buffers[i] for i in (*roots, *(copy for _, copy in step.copies), *step.workspace)]
        touch = partial(recorder.touch, str(site), list(flat(operands)), writes)
        if step.how in ("kernel", "torch"):
            return results, [touch, *actions]
        if step.how == "together":
            (ask,) = actions
            return results, [Ask(partial(self._expected, touch, ask.program))]
        return results, actions

    def _expected(self, touch: Callable[[], None], program: Any) -> Any:
        recorder: Any = self.streams
        recorder.pending = touch
        return program()


def recorded(module: Module, inputs: Any, monkeypatch: pytest.MonkeyPatch, dropped: int | None = None) -> tuple[Any, list[Recorder]]:
    """The results of every rank, and what its streams saw."""
    recorders: list[Recorder] = []

    def streams() -> Recorder:
        recorders.append(Recorder(dropped))
        return recorders[-1]

    monkeypatch.setattr(run, "Walk", Watched)
    executor = Executor(streams=streams)
    results = local.run(mesh_of(module), lambda rank: executor.program(module, no_weights, inputs(rank)))
    return results, recorders


def no_weights(name: str, type: Any) -> Any:
    raise AssertionError(name)


def squares(rank: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((4, 4)).astype(np.float32) + rank for _ in range(2)]


def same(a: Any, b: Any) -> bool:
    return all(x.tobytes() == y.tobytes() for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


@pytest.fixture
def as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc.backends.triton.kernels.KERNELS", {})
    monkeypatch.setattr("dsc.backends.triton.codegen.lone", lambda op: None)


@given(st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_streams_are_ordered_by_events(drawn: Draw, as_torch: None, monkeypatch: pytest.MonkeyPatch, random: Random) -> None:
    """Of programs in any order: no race, and the bits of one stream and of the plain program."""
    plain, made = drawn(random)
    results, recorders = recorded(made, squares, monkeypatch)
    assert [r.races for r in recorders] == [[]] * len(recorders)
    monkeypatch.setattr(run, "Walk", Walk)
    for module in (plain, made):
        executor = Executor(poison=True)
        inline = local.run(mesh_of(module), lambda rank, m=module, e=executor: e.program(m, no_weights, squares(rank)))
        assert same(inline, results)


FLIGHT = """
module {{ stage=scheduled, mesh={{dp={ranks}, ep={ranks}}} }}

func @main(%x: f32[4, 4]) {{
  %sent: f32[4, 4] = neg(%x)  @ main#1 F
  %flight: async f32[4, 4] = all_to_all(%sent, axis="ep", size={ranks}, start=true)  @ main#2.1 F
  %a: f32[4, 4] = matmul(%x, %x)  @ main#3 F
  %b: f32[4, 4] = matmul(%a, %x)  @ main#4 F
  %come: f32[4, 4] = done([%flight])  @ main#2 F
  %y: f32[4, 4] = add(%b, %come)  @ main#5 F
  return %y
}}
"""


@pytest.mark.parametrize(
    ("dropped", "race"),
    [
        (None, None),
        (0, "@main main#2.1 on ep does not wait for @main main#1 on compute"),
        (1, "@main main#5 on compute does not wait for @main main#2.1 on ep"),
    ],
)
def test_a_wait_that_is_dropped_is_a_race(dropped: int | None, race: str | None, as_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a start for what it sends, and that of a done for what it brings."""
    _, recorders = recorded(dsc.parse(FLIGHT.format(ranks=2)), lambda rank: squares(rank)[:1], monkeypatch, dropped)
    assert [r.waits for r in recorders] == [2, 2]
    assert [r.races for r in recorders] == [[race] if race else []] * 2


def test_memory_that_is_let_go_of_in_flight_is_a_race(as_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were liveness to end with the start, the second product would lie where what is sent does."""
    monkeypatch.setattr("dsc.backends.triton.program.reads", lambda op: op.operands)
    _, recorders = recorded(dsc.parse(FLIGHT.format(ranks=2)), lambda rank: squares(rank)[:1], monkeypatch)
    assert recorders[0].races == ["@main main#3 on compute does not wait for @main main#2.1 on ep"]


def test_a_layer_in_flight(program: Any, as_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's layers with rows of experts in flight, as pass overlap orders them."""
    module = dsc.apply(program(batch=4), 'shard-experts{mesh="dp=2,ep=2"},overlap{microbatches=2}')
    weights, inputs = RankWeights(RandomWeights(0), module, "all"), prepare(module, None)
    recorders: list[Recorder] = []
    monkeypatch.setattr(run, "Walk", Watched)
    executor = Executor(streams=lambda: recorders.append(Recorder()) or recorders[-1])
    local.run(mesh_of(module), lambda r: executor.program(module, lambda n, _: weights.get(r, n), inputs_of(module, inputs, r)))
    assert [r.races for r in recorders] == [[], []]
    assert all(r.waits > 8 for r in recorders)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRET, reason="no GPU: CUDA streams are not to be had")
def test_side_streams_give_the_bits_of_one() -> None:
    """On one rank, which is its own partner: what is on the side streams is ordered as the recorder says."""
    module = dsc.parse(FLIGHT.format(ranks=1))
    one, side = (Executor(graphs=False, streams=lambda s=s: s) for s in (ONE, SideStreams()))
    assert same(*([e.run(module, no_weights, squares(0)[:1])] for e in (one, side)))
