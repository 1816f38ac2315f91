"""What NCCL has been given and may not have brought: a stand-in for its work says when it is there, and no GPU is needed."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import pytest
import torch

from dsc.distributed.torch_world import TorchWorld, _Flight, _Lost
from dsc.distributed.world import Gather, Settle
from dsc.ir.mesh import parse_mesh


class Work:
    """Is there after it has been asked `polls` times."""

    def __init__(self, polls: float, error: Exception | None = None) -> None:
        self.polls, self.error, self.waits = polls, error, 0

    def wait(self) -> None:
        self.waits += 1  # the stream does; the host goes on

    def is_completed(self) -> bool:
        self.polls -= 1
        return self.polls < 0

    def exception(self) -> Exception | None:
        return self.error


@pytest.fixture
def world() -> TorchWorld:
    """One on a GPU, whose connections are nobody's."""
    made = object.__new__(TorchWorld)
    made.mesh, made.rank, made.timeout = parse_mesh("dp=2"), 0, 0.05
    made._device, made._promised, made._told = torch.device("cuda"), deque(), False
    return made


def flight(work: Work, x: Any = None) -> _Flight:
    on_device = torch.empty(1, device="meta") if x is None else x
    return _Flight(Gather("dp", 2, on_device), (0, 1), time.monotonic(), work, lambda: "answer", ())


def test_the_host_goes_on_until_it_settles(world: TorchWorld) -> None:
    works = [Work(3), Work(0), Work(5)]
    assert [world._ended(flight(work)) for work in works] == ["answer"] * 3
    assert [work.waits for work in works] == [1, 1, 1]
    assert len(world._promised) == 3
    world._served(Settle())
    assert not world._promised
    assert all(work.polls < 0 for work in works)


def test_what_came_is_let_go_of_meanwhile(world: TorchWorld) -> None:
    for _ in range(10):
        world._ended(flight(Work(0)))
    assert not world._promised


def test_an_array_of_the_host_is_waited_for(world: TorchWorld) -> None:
    work = Work(3)
    world._ended(flight(work, torch.empty(1)))
    assert work.polls < 0


@pytest.mark.parametrize(
    ("work", "told", "reason"),
    [
        (Work(float("inf")), False, "no answer"),
        (Work(float("inf")), True, "torchrun ends this rank"),
        (Work(2, RuntimeError("NCCL error: remote process exited\nmore")), False, "NCCL error: remote process exited"),
    ],
)
def test_a_partner_that_is_gone_is_found(world: TorchWorld, work: Work, told: bool, reason: str) -> None:
    world._ended(flight(work))
    world._told = told
    with pytest.raises(_Lost, match=reason) as caught:
        world._settle()
    assert caught.value.members == (0, 1)
    assert (caught.value.seconds > 0.05) == (reason == "no answer")
