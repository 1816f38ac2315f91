"""What ranks in one process do once for all of them: making functions ready, reading weights and cutting them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.backends import eager
from dsc.backends.numpy_ref.run import FLOAT32, FLOAT64, Interpreter
from dsc.distributed import local
from dsc.driver import ranks
from dsc.driver.inputs import prepare
from dsc.driver.run import open_weights
from dsc.ir.core import Module, Op, Trait
from dsc.ir.mesh import mesh_of
from dsc.ir.ops.control import Call, Constant, Param
from dsc.ir.sharding import weight_splits
from dsc.models.random_weights import RandomWeights
from dsc.models.weights import Wanted


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what was done."""
    counts: Counter[str] = Counter()

    def count(where: Any, name: str) -> None:
        before = getattr(where, name)

        def counted(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return before(*args, **options)

        monkeypatch.setattr(where, name, counted)

    count(Interpreter, "prepare")
    count(eager, "last_uses")
    count(ranks, "part")
    return counts


class Reading(RandomWeights):
    """Random weights that say what is read."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__(0)
        self.counts = counts

    def get(self, wanted: Wanted) -> np.ndarray:
        self.counts[wanted.name] += 1
        return super().get(wanted)


def test_a_function_is_made_ready_and_a_weight_read_and_cut_once(done: Counter[str], program: Callable[..., Module]) -> None:
    whole = program(batch=8)
    sharded, read = dsc.apply(whole, 'shard-experts{mesh="dp=8,ep=8"}'), Counter[str]()
    placed, _ = ranks.rank_program(sharded, Reading(read), prepare(whole, None), FLOAT32)
    weights, computed = weight_splits(sharded), sum(map(is_computed, (op for func in sharded.funcs for op in func.ops)))
    done.clear()
    first = local.run(mesh_of(sharded), placed)
    inputs = len(sharded.main.params)
    assert done == {"prepare": computed, "last_uses": len(sharded.funcs), "part": 8 * (len(weights) + inputs)}
    assert read == dict.fromkeys(weights, 1)
    second = local.run(mesh_of(sharded), placed)
    assert done == {"prepare": computed, "last_uses": len(sharded.funcs), "part": 8 * (len(weights) + 2 * inputs)}, (
        "inputs alone are cut again"
    )
    assert read == dict.fromkeys(weights, 1)
    assert all(a[0, 0].tobytes() == b[0, 0].tobytes() for a, b in zip(first, second, strict=True))


def is_computed(op: Op) -> bool:
    """Whether an op needs neither the module nor other ranks."""
    return not isinstance(op, Param | Constant | Call) and Trait.COLLECTIVE not in op.traits


def test_what_is_made_ready_is_of_one_backend_and_one_function(done: Counter[str], program: Callable[..., Module]) -> None:
    """Another backend computes otherwise, and of the same text read twice an observer is to see its own ops."""
    module = program(dtype="float32")
    again, inputs, weights = dsc.parse(str(module)), prepare(module, None), open_weights("random:0", module, None)
    seen: list[Op] = []

    def ran(runner: Interpreter, of: Module) -> tuple[int, Any]:
        before = done["prepare"]
        (found,) = runner.run(of, weights, inputs, lambda site, op, operands, results: seen.append(op))
        return done["prepare"] - before, found

    made, narrow = ran(FLOAT32, module)
    assert made > 0
    assert ran(FLOAT32, module)[0] == 0
    made_wide, wide = ran(FLOAT64, module)
    assert made_wide == made
    assert not bool((wide == narrow).all())
    seen.clear()
    made_again, same = ran(FLOAT32, again)
    assert made_again == made
    assert bool((same == narrow).all())
    assert {id(op) for op in seen} <= {id(op) for func in again.funcs for op in func.ops}
