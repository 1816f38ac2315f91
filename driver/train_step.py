"""A step of training, on every rank that this process runs: forward, backward, update; and the average of the weights beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from ..backends import Runner, Site
from ..backends.arrays import Array, Data, widen
from ..distributed.pipeline import once
from ..distributed.pipeline import program as along_pp
from ..distributed.world import Gather, Program
from ..ir.core import Module, Op, Trait
from ..ir.errors import DscError
from ..ir.gradients import by_name
from ..ir.sharding import input_splits
from ..ir.types import Tensor
from ..passes.optimizer import STATE
from .data import Batches
from .learning_rate import Schedule
from .measure import flat
from .ranks import cut, empty, inputs_of
from .train_program import Programs
from .train_ranks import Alone, Team, as_program, leads
from .train_state import Held, State

NEVER = np.iinfo(np.int64).max
LONGEST = 400
"""Characters of a verdict that ranks tell one another."""


@dataclass(frozen=True)
class Stepper:
    """Makes steps: from a state and a batch to the next state and its metrics."""

    programs: Programs
    schedule: Schedule
    runner: Runner
    team: Team = field(default_factory=Alone)

    def step(self, state: State, batches: Batches) -> tuple[State, dict[str, Array]]:
        """The state after one more step, and what it measured, by name. Raises `NotFinite` where the loss or a gradient is not finite."""
        tokens, labels, position = batches.next(state.position)
        mine = list(self.team.mine)
        found = self.team.run(lambda rank: self._step(state.held[mine.index(rank)], state.step + 1, (tokens, labels), rank))
        (held, measured), *others = found
        loss, norm = measured[self.programs.metrics[0]], measured["gradient_norm"]
        if not (np.isfinite(loss) and np.isfinite(norm)):
            self._blame(state, (tokens, labels), float(loss), float(norm))
        return State(state.step + 1, position, (held, *(other for other, _ in others))), measured

    def _step(self, held: Held, number: int, batch: Sequence[Array], rank: int) -> Program[tuple[Held, dict[str, Array]]]:
        """What one rank does in step `number`, for the whole `batch`."""
        p = self.programs
        results = yield from self._forward_and_backward(held, batch, rank)
        measured = dict(zip(p.metrics, results, strict=False))
        gradients = by_name(p.step, results)
        rate, speed = self.schedule.learning_rate(number), self.schedule.balance_speed(number)
        scalars = [rate, *p.adamw.corrections(number), *([speed] if p.gates else [])]
        inputs: list[Any] = [np.array(x, np.float32) for x in scalars]
        inputs += [measured["counts"]] if p.gates else []
        for name in p.trained:
            inputs += [gradients.get(name), *held.kept.get(name, [None] * len(STATE))]
        inputs += [held.weights.get(name) for name in p.gates]
        del results, gradients
        norm, *updated = yield from self._update(inputs, rank)
        weights, kept, width = dict(held.weights), {}, 1 + len(STATE)
        for i, name in enumerate(p.trained):
            if name in held.kept:
                weights[name], *rest = updated[i * width : (i + 1) * width]
                kept[name] = tuple(rest)
        others = (*p.gates, *(name for stage in p.stages for name in stage.reads))
        new = zip(others, updated[width * len(p.trained) :], strict=True)
        weights |= {name: value for name, value in new if value is not None}
        return Held(weights, kept), {**measured, "learning_rate": np.float32(rate), "gradient_norm": norm}

    def _forward_and_backward(self, held: Held, batch: Sequence[Array], rank: int, observe: Any = None) -> Program[list[Any]]:
        """The results of the step; of a pipeline None for gradients that are at home on other ranks."""
        step, plan, mesh = self.programs.step, self.programs.plan, self.team.mesh

        def weights(name: str, tensor: Tensor) -> Array:
            return held.weights[name]

        if plan is None:
            mine = [cut(x, split, mesh, rank) for x, split in zip(batch, input_splits(step), strict=True)]
            return list((yield from as_program(self.runner, step, weights, mine, observe)))

        def run(name: str, arguments: Sequence[Data]) -> Program[tuple[Data, ...]]:
            return as_program(self.runner, plan.entered[name], weights, arguments, observe)

        place, metrics = mesh.index("pp", rank), range(len(self.programs.metrics))
        found = yield from along_pp(plan, place, run, lambda m: inputs_of(step, batch, rank, m), empty, metrics)
        return [found.get((index, 0)) for index in range(len(step.main.results))]

    def _update(self, inputs: Sequence[Any], rank: int) -> Program[list[Any]]:
        """The results of the update; of a pipeline None for what is at home on other ranks, but for the norm."""
        update, plan = self.programs.update, self.programs.update_plan
        if plan is None:
            return list((yield from as_program(self.runner, update, _no_weights, inputs)))

        def run(name: str, arguments: Sequence[Data]) -> Program[tuple[Data, ...]]:
            return as_program(self.runner, plan.entered[name], _no_weights, arguments)

        main = update.main
        have = {value: data for value, data in zip(main.params, inputs, strict=True) if data is not None}
        found = yield from once(plan, self.team.mesh.index("pp", rank), run, have, empty, main.results[:1])
        return [found.get(value) for value in main.results]

    def _blame(self, state: State, batch: Sequence[Array], loss: float, norm: float) -> NoReturn:
        """Run the step once more, watching every op, and say which was the first to make something that is not finite."""
        found = f"the loss is {loss:g}" if not np.isfinite(loss) else f"the loss is {loss:g}, but the norm of the gradients {norm:g}"
        mine = list(self.team.mine)

        def watched(rank: int) -> Program[str]:
            watch = _Watch()
            yield from self._forward_and_backward(state.held[mine.index(rank)], batch, rank, watch)
            verdict = np.frombuffer(watch.fault.encode()[:LONGEST].ljust(LONGEST), np.uint8)
            size = self.team.mesh.world
            texts = yield Gather("world", size, np.array(verdict), op="verdicts")
            seen = yield Gather("world", size, np.array([watch.seen if watch.fault else NEVER]), op="verdicts")
            first = min(range(size), key=lambda rank: int(seen[rank][0]))
            text = texts[first].tobytes().decode(errors="ignore").strip()
            return f"{text} on rank {first}" if text and size > 1 else text

        culprit = self.team.run(watched)[0]
        none = "every op of the step gave finite numbers, but the squares of the gradients add up to more than float32 holds"
        said = f"the first op to make a number that is not finite is {culprit}" if culprit else none
        raise NotFinite(f"step {state.step + 1}: {found}; {said}" if leads(self.team) else "")


class NotFinite(DscError):
    """A step whose loss or gradients are NaN or infinite. Every rank raises it; those that do not lead say nothing."""


class _Watch:
    """An observer that finds the first op whose result is not finite although its operands are."""

    def __init__(self) -> None:
        self.seen, self.fault = 0, ""

    def __call__(self, site: Site, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...]) -> None:
        if self.fault:
            return
        self.seen += 1
        constant = Trait.SOURCE in op.traits and op.name != "param"
        if not constant and not _finite(results) and _finite(operands):
            self.fault = f"{op.name} at {site}"


def _finite(values: tuple[Data, ...]) -> bool:
    return all(bool(np.isfinite(widen(x) if x.dtype.isbuiltin != 1 else x).all()) for x in flat(values))


def _no_weights(name: str, tensor: Tensor) -> Array:
    raise KeyError(name)


Values = Mapping[str, Array]


class Average:
    """The moving average of the master weights of each rank, computed by its module in a thread of its own while the next step runs."""

    def __init__(self, modules: Sequence[Module], decay: float, runner: Runner, start: Sequence[Values]) -> None:
        self.modules, self.decay, self.runner = modules, np.array(decay, np.float32), runner
        self._thread = ThreadPoolExecutor(1, "average")
        self._values: Future[list[Values]] = Future()
        self._values.set_result(list(start))

    def update(self, state: State) -> None:
        """Begin to take in the weights after a step. Waits only where the step before is not yet taken in."""
        self._values = self._thread.submit(self._next, self._values.result(), state)

    def _next(self, old: list[Values], state: State) -> list[Values]:
        found: list[Values] = []
        for module, values, held in zip(self.modules, old, state.held, strict=True):
            inputs = [self.decay]
            for name, (master, *_) in held.kept.items():
                inputs += [values[name], master]
            found.append(dict(zip(held.kept, self.runner.run(module, _no_weights, inputs), strict=True)))
        return found

    def values(self) -> list[Values]:
        """The average after the last step that was handed over, of each rank its part."""
        return self._values.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
