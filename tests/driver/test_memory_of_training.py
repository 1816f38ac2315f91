"""The memory that `dsc inspect --memory` predicts for a training step, against what the reference backend really holds."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc import backends
from dsc.driver.inputs import prepare
from dsc.driver.memory import memory
from dsc.ir.core import Module, Op, Trait
from dsc.ir.timeline import KINDS, timeline
from dsc.models.trace import trace
from dsc.testing.sampling import seeded


class LiveBytes:
    """An observer that counts the bytes of the arrays that are alive after each op, from their making to their end; not weights."""

    def __init__(self) -> None:
        self.now, self.series = 0, list[int]()
        self.known: dict[int, int] = {}
        self.sources: dict[int, np.ndarray] = {}

    def __call__(self, site: Any, op: Op, operands: Any, results: Any) -> None:
        for array in arrays(results):
            while isinstance(array.base, np.ndarray):
                array = array.base
            if Trait.SOURCE in op.traits:
                self.sources[id(array)] = array
            elif id(array) not in self.sources and id(array) not in self.known:
                self.known[id(array)] = array.nbytes
                self.now += array.nbytes
                weakref.finalize(array, self.freed, id(array))
        self.series.append(self.now)

    def freed(self, key: int) -> None:
        self.now -= self.known.pop(key)


def arrays(data: Any) -> Iterator[np.ndarray]:
    for item in data:
        yield from arrays(item) if isinstance(item, tuple) else (item,)


@pytest.fixture(scope="module")
def tiny() -> Module:
    return dsc.apply(trace("deepseek-v3-tiny", mode="train", seq=128), "simplify,autodiff,simplify")


@pytest.mark.parametrize("pipeline", ["", "recompute", "recompute{budget-gb=0.0032}"])
def test_the_peak_is_what_the_executor_holds(tiny: Module, pipeline: str) -> None:
    module = dsc.apply(tiny, pipeline)
    known: dict[str, Any] = {}
    count = LiveBytes()
    inputs = prepare(module, None)
    count.sources.update((id(x), x) for x in inputs)
    results = backends.get("numpy").run(module, lambda n, t: known.setdefault(n, seeded(n, t)), inputs, count)
    predicted = timeline(module).series("residuals", "workspace", "gradients")
    assert len(predicted) == len(count.series)
    assert max(predicted) == pytest.approx(max(count.series), rel=0.03)
    apart = np.abs(np.array(predicted) - count.series) / max(predicted)
    assert apart.max() < 0.05, "at some point the reference copies what could have been a view"
    del results


def test_the_peak_against_the_allocator(tiny: Module) -> None:
    """Roughly: an op's own float32 copies of its operands come on top."""
    known: dict[str, Any] = {}
    inputs = prepare(tiny, None)

    def run() -> None:
        backends.get("numpy").run(tiny, lambda n, t: known.setdefault(n, seeded(n, t)), inputs)

    run()
    tracemalloc.start()
    run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    predicted = timeline(tiny).peak()[0]
    assert predicted <= peak * 1.03
    assert peak <= 2 * predicted


def test_state_of_the_optimiser(tiny: Module) -> None:
    found = memory(tiny)["training"]
    count = found["trained_parameters"]
    assert found["state_bytes"] == {"master": 4 * count, "moments": 4 * count}
    assert found["gradient_bytes"] == 4 * count
    assert sum(r.type.bytes for r in tiny.main.results) == pytest.approx(4 * count, rel=1e-3)
    assert found["activation_peak_bytes"] == max(max(f["residuals"] + f["workspace"] for f in found["functions"].values()), 0)
    assert set(found["peaks"]) == set(KINDS)


def test_the_plot(command: Any, tiny: Module, tmp_path: Path) -> None:
    file = tmp_path / "step.dsc"
    file.write_text(str(tiny))
    found = command("inspect", file, "--memory", "--plot", tmp_path / "memory.png")
    assert "of residuals and workspace at once" in found.out
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
