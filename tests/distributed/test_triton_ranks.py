"""The Triton backend as one rank of many: every op of a sharded program within its bound, on each rank, and prepared programs bit for bit.

Collectives by themselves are compared with the reference's, bit for bit, in test_torch_world.py. Most programs here run without kernels,
each op as torch: what is proven is what ranks hand each other and when, in the arena that a prepared program has, and kernels take long in
the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

import dsc
from dsc import backends
from dsc.backends.triton import codegen, kernels
from dsc.backends.triton.run import Executor
from dsc.driver.inputs import prepare
from dsc.driver.pipelining import schedule_for
from dsc.driver.ranks import run_ranks
from dsc.ir.core import Module, Op
from dsc.ir.ops.collective import Collective, Done
from dsc.ir.ops.control import Constant, Param
from dsc.ir.ops.fused import Fused, alone
from dsc.ir.stages import is_staged
from dsc.models.random_weights import RandomWeights
from dsc.testing.agree import share_of_bound
from dsc.testing.bounds import bound

Make = Callable[..., Module]


@pytest.fixture
def as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel runs."""
    monkeypatch.setattr(kernels, "KERNELS", {})
    monkeypatch.setattr(codegen, "lone", lambda op: None)


def leaves(data: Any) -> list[np.ndarray]:
    return [x for field in data for x in leaves(field)] if isinstance(data, tuple) else [data]


def run(module: Module, executor: Executor, observe: Any = None) -> list[np.ndarray]:
    schedule = schedule_for(module, None, 2) if is_staged(module) else None
    inputs = prepare(module, None, microbatches=2 if schedule else 1)
    return leaves(run_ranks(module, RandomWeights(0), inputs, executor, "local", observe, schedule=schedule))


class Compared:
    """An observer that holds each op that a rank computes alone against the reference, on the operands that it had.

    That is done once for each place in the program, on whichever rank comes there first.
    """

    def __init__(self, module: Module) -> None:
        self.module, self.seen, self.asked = module, set[Any](), set[str]()

    def __call__(self, site: Any, op: Op, operands: Sequence[Any], results: Sequence[Any]) -> None:
        if isinstance(op, Collective | Done):
            self.asked.add(op.started.name if isinstance(op, Done) and op.started else op.name)
        if isinstance(op, Param | Constant | Collective | Done) or site in self.seen:
            return
        self.seen.add(site)
        reference = backends.get("numpy")
        expected = reference.run(alone(op, self.module), None, operands) if isinstance(op, Fused) else reference.evaluate(op, operands)
        limits = bound(op, operands, expected, module=self.module)
        for limit, a, b in zip(limits, leaves(tuple(results)), leaves(tuple(expected)), strict=True):
            a = a[: len(b)] if b.ndim else a  # a ragged value has all the rows that there is room for
            share = share_of_bound(a, b, limit)
            assert share.size == 0 or share.max() <= 1, f"{site}: {op.name} is {share.max():.3g} of its bound away"


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def test_ranks_run_kernels() -> None:
    """Two ranks exchange rows of experts, each op in the interpreter."""
    traced = dsc.trace("deepseek-v3-tiny", batch=2, seq=4, overrides=("num_hidden_layers=1", "first_k_dense_replace=0"))
    module = dsc.apply(traced, 'simplify,shard-experts{mesh="ep=2"},fuse')
    watch = Compared(module)
    run(module, Executor(), watch)
    assert len(watch.seen) > 40
    assert {"all_to_all", "all_to_all_rows"} <= watch.asked


PROGRAMS = [
    ("forward", "", 'shard-experts{mesh="tp=2,ep=2"}', {"all_gather", "reduce_scatter", "all_to_all_rows"}),
    ("forward", "quantize-fp8", 'shard-experts{mesh="dp=4,ep=4,node=2"}', {"internode_dispatch", "internode_combine"}),
    ("train", "", 'split-stages{stages=2},shard-experts{mesh="pp=2,dp=2,ep=2"}', {"all_to_all_rows", "reduce_scatter", "all_reduce"}),
]


@pytest.mark.parametrize(("mode", "before", "passes", "collectives"), PROGRAMS, ids=["tp", "forwarded-fp8", "pp"])
def test_each_op_is_within_its_bound_and_a_prepared_program_has_its_bits(
    mode: str, before: str, passes: str, collectives: set[str], program: Make, as_torch: None
) -> None:
    """In the arena of a prepared program memory is used again as soon as it may be, and overwritten before that here."""
    module = dsc.apply(program(mode, batch=4, passes=before), passes)
    watch = Compared(module)
    observed = run(module, Executor(), watch)
    assert len(watch.seen) > 50
    assert collectives <= watch.asked
    assert same(run(module, Executor(poison=True)), observed)
