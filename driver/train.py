"""Training: steps of forward, backward and update until the last, with checkpoints from which a killed run goes on to the bit.

A step is a function of the state before it, so the curve is one of the source, the data, the settings and the seed alone; where it is cut
and resumed leaves no trace. That holds on one machine with the same libraries and threads: another BLAS adds in another order. The files:

    RUN/settings.json     what determines the curve
    RUN/loss.csv          a row for each step
    RUN/loss.png          the curve, drawn when the run ends
    RUN/checkpoints/      see train_state.py
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..backends import Runner, Site
from ..backends.arrays import Array, Data, widen
from ..ir.core import Module, Op, Trait
from ..ir.errors import DscError, require
from ..ir.gradients import by_name
from ..ir.types import Tensor
from ..passes.optimizer import STATE
from . import curve
from .data import Batches, open_text
from .learning_rate import PEAK, Schedule
from .measure import flat
from .tokens import open_tokenizer
from .train_program import Programs, programs
from .train_state import State, checkpoints, differences, first_state, folder_of, load, save

SETTINGS = "settings.json"
DRAFT, LOCK = f".{SETTINGS}.partial", ".lock"
OF_A_BEGINNING = {"checkpoints", DRAFT, LOCK}
"""What a run that was killed at once may have left."""


@dataclass(frozen=True)
class Outcome:
    """A run that has ended: its folder, the checkpoint of its last step, its curve, and what this process added to it."""

    run: Path
    checkpoint: Path
    rows: Sequence[curve.Row]
    steps: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of this process, checkpoints included."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Stepper:
    """Makes steps: from a state and a batch to the next state and its metrics."""

    programs: Programs
    schedule: Schedule
    runner: Runner

    def step(self, state: State, batches: Batches) -> tuple[State, dict[str, Array]]:
        """The state after one more step, and what it measured, by name. Raises `NotFinite` where the loss or a gradient is not finite."""
        p, number = self.programs, state.step + 1
        tokens, labels, position = batches.next(state.position)

        def fetch(name: str, tensor: Tensor) -> Array:
            return state.weights[name]

        results = self.runner.run(p.step, fetch, (tokens, labels))
        measured = dict(zip(p.metrics, results, strict=False))
        gradients = by_name(p.step, results)
        rate, speed = self.schedule.learning_rate(number), self.schedule.balance_speed(number)
        scalars = [rate, *p.adamw.corrections(number), *([speed] if p.gates else [])]
        inputs: list[Array] = [np.array(x, np.float32) for x in scalars]
        inputs += [measured["counts"]] if p.gates else []
        for name in p.trained:
            inputs += [gradients[name], *state.kept[name]]
        norm, *updated = self.runner.run(p.update, _no_weights, (*inputs, *(state.weights[name] for name in p.gates)))
        loss = measured[p.metrics[0]]
        if not (np.isfinite(loss) and np.isfinite(norm)):
            self.blame(state, (tokens, labels), fetch, float(loss), float(norm))
        weights, kept, width = dict(state.weights), {}, 1 + len(STATE)
        for i, name in enumerate(p.trained):
            weights[name], *rest = updated[i * width : (i + 1) * width]
            kept[name] = tuple(rest)
        weights.update(zip(p.gates, updated[width * len(p.trained) :], strict=True))
        return State(number, position, weights, kept), {**measured, "learning_rate": np.float32(rate), "gradient_norm": norm}

    def blame(self, state: State, inputs: tuple[Array, Array], fetch: Callable[[str, Tensor], Array], loss: float, norm: float) -> NoReturn:
        """Run the step once more, watching every op, and say which was the first to make something that is not finite."""
        found = f"the loss is {loss:g}" if not np.isfinite(loss) else f"the loss is {loss:g}, but the norm of the gradients {norm:g}"
        try:
            self.runner.run(self.programs.step, fetch, inputs, _stop_at_fault)
            culprit = "every op of the step gave finite numbers, but the squares of the gradients add up to more than float32 holds"
        except _Fault as fault:
            culprit = f"the first op to make a number that is not finite is {fault}"
        raise NotFinite(f"step {state.step + 1}: {found}; {culprit}")


class NotFinite(DscError):
    """A step whose loss or gradients are NaN or infinite."""


class _Fault(Exception):
    """The first op whose result is not finite although its operands are."""


def _stop_at_fault(site: Site, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...]) -> None:
    constant = Trait.SOURCE in op.traits and op.name != "param"
    if not constant and not _finite(results) and _finite(operands):
        raise _Fault(f"{op.name} at {site}")


def _finite(values: tuple[Data, ...]) -> bool:
    return all(bool(np.isfinite(widen(x) if x.dtype.isbuiltin != 1 else x).all()) for x in flat(values))


def _no_weights(name: str, tensor: Tensor) -> Array:
    raise KeyError(name)


class Average:
    """The moving average of the master weights, computed in a thread of its own while the next step runs."""

    def __init__(self, module: Module, trained: Sequence[str], decay: float, runner: Runner, start: Mapping[str, Array]) -> None:
        self.module, self.trained, self.decay, self.runner = module, trained, np.array(decay, np.float32), runner
        self._thread = ThreadPoolExecutor(1, "average")
        self._values: Future[dict[str, Array]] = Future()
        self._values.set_result(dict(start))

    def update(self, state: State) -> None:
        """Begin to take in the weights after a step. Waits only where the step before is not yet taken in."""
        self._values = self._thread.submit(self._next, self._values.result(), state)

    def _next(self, old: dict[str, Array], state: State) -> dict[str, Array]:
        inputs = [self.decay]
        for name in self.trained:
            inputs += [old[name], state.kept[name][0]]
        return dict(zip(self.trained, self.runner.run(self.module, _no_weights, inputs), strict=True))

    def values(self) -> dict[str, Array]:
        """The average after the last step that was handed over."""
        return self._values.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def train(
    source: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    steps: int,
    recipe: str | None = None,
    resume: bool = False,
    batch: int | None = None,
    seq: int | None = None,
    learning_rate: float = PEAK,
    seed: int = 0,
    save_every: int = 100,
    ema: float | None = None,
    fim: float = 0.1,
    tokenizer: str | Path | None = None,
    overrides: Sequence[str] = (),
    backend: str = "numpy",
    on_step: Callable[[int, curve.Row], None] = lambda step, row: None,
) -> Outcome:
    """Train `source` (as `compile` takes it, if it has a config) on text files and write the run into the folder `out`.

    A checkpoint folder with weights goes on from them; anything else begins with random ones. `recipe` quantises as in `compile`.
    `batch` is sequences per step, `seq` tokens of each (as `trace` has them by default), `learning_rate` the peak of the report's
    schedule, `ema` the decay of an average of the weights, `fim` the share of documents with their middle moved. With `resume` the run
    in `out` goes on from its last checkpoint, or begins where it has none. `on_step` is called after each step with its number and row.

    Raises `DscError` for a fault of the user's; where the run had begun, its state is saved first, and the message says where.

    >>> outcome = dsc.train("deepseek-v3-tiny", ["notes.txt"], "run", steps=20, learning_rate=2e-3)
    """
    from .. import backends

    run, runner = Path(out), backends.get(backend)
    _check_numbers(steps=steps, save_every=save_every, learning_rate=learning_rate)
    require(ema is None or 0 < ema < 1, f"--ema is {ema}, expected a decay between 0 and 1")
    require(len(data) > 0, "there is no data to train on")
    check_target(run, resume)
    files = [open_text(path) for path in data]
    made = programs(source, batch=batch, seq=seq, recipe=recipe, overrides=overrides)
    chosen = open_tokenizer(tokenizer, int(made.config["vocab_size"]), fim)
    batches = Batches(files, chosen, made.batch, made.seq, seed, fim)
    settings = {
        "steps": steps,
        "batch": made.batch,
        "seq": made.seq,
        "learning_rate": learning_rate,
        "seed": seed,
        "recipe": _described(recipe),
        "ema": ema,
        "fim": fim,
        "data": [file.sha256 for file in files],
        "tokenizer": _digest("".join(chosen.files().values()).encode()),
        "backend": backend,
    }
    with _claimed(run, settings, made):
        state, average = _begin(run, made, settings, seed, Path(source))
        return _Loop(run, Stepper(made, Schedule(steps, learning_rate), runner), batches, settings, ema, save_every, on_step).go(
            state, average
        )


@dataclass(frozen=True)
class _Loop:
    run: Path
    stepper: Stepper
    batches: Batches
    settings: Mapping[str, Any]
    ema: float | None
    save_every: int
    on_step: Callable[[int, curve.Row], None]

    def go(self, state: State, average: dict[str, Array] | None) -> Outcome:
        """Step until the end. Whatever stops it before, the state after the last whole step is saved."""
        p, first, began = self.stepper.programs, state.step, time.perf_counter()
        masters = {name: kept[0] for name, kept in state.kept.items()}
        mean = Average(p.average, p.trained, self.ema, self.stepper.runner, average or masters) if self.ema else None
        lines = curve.Curve(self.run / curve.FILE, _columns(p), state.step)
        steps = self.stepper.schedule.steps
        try:
            while state.step < steps:
                start = time.perf_counter()
                state, measured = self.stepper.step(state, self.batches)
                if mean:
                    mean.update(state)
                row = _row(state.step, measured, p.batch * p.seq / (time.perf_counter() - start))
                lines.append(row)
                if state.step % self.save_every == 0 or state.step == steps:
                    self.save(state, mean)
                self.on_step(state.step, row)
        except BaseException as error:
            if state.step > len(lines.rows):  # stopped between a step and its row
                lines.append(_row(state.step, measured, float("nan")))
            kept = self.save(state, mean)
            if isinstance(error, DscError):
                raise DscError(f"{error}; the state after step {state.step} is kept in {kept}") from error
            raise
        finally:
            if mean:
                mean.close()
            if lines.rows:
                curve.draw({"loss": lines.rows}, self.run / curve.PICTURE)
        made = state.step - first
        return Outcome(self.run, folder_of(self.run, state.step), lines.rows, made, made * p.batch * p.seq, time.perf_counter() - began)

    def save(self, state: State, mean: Average | None) -> Path:
        """The checkpoint of `state`, written if it is not there."""
        place = folder_of(self.run, state.step)
        if place.exists():
            return place
        average = mean.values() if mean else None
        return save(self.run, state, average, self.stepper.programs, self.settings, self.batches.tokenizer.files())


def _columns(programs: Programs) -> tuple[str, ...]:
    metrics = [name for name in programs.metrics if name != "counts"]
    uneven = ("max_violation",) if "counts" in programs.metrics else ()
    return ("step", *metrics, "learning_rate", "gradient_norm", *uneven, "tokens_per_second")


def _row(step: int, measured: Mapping[str, Array], speed: float) -> dict[str, str]:
    """A row of the curve, numbers in the fewest digits that say them exactly.

    max_violation is how far the busiest expert of any layer is above the mean, as a share of it (arXiv 2408.15664, equation 4).
    """
    row = {"step": str(step)} | {name: str(value[()]) for name, value in measured.items() if name != "counts"}
    if "counts" in measured:
        loads = measured["counts"].astype(np.float64)
        row["max_violation"] = f"{(loads.max(axis=1) / loads.mean(axis=1) - 1).max():.4f}"
    return row | {"tokens_per_second": f"{speed:.1f}"}


def check_target(run: Path, resume: bool) -> None:
    """Refuse a folder that holds something else, and one that holds a run where nobody said to resume it."""
    require(run.is_dir() or not run.exists(), f"{run} is a file, expected a folder for the run")
    found = {path.name for path in run.iterdir()} if run.exists() else set()
    if found <= OF_A_BEGINNING:
        return
    require((run / SETTINGS).is_file(), f"{run} exists and holds no run; expected a new folder, an empty one or a run to resume")
    require(resume, f"{run} holds a run; --resume goes on with it")


@contextmanager
def _claimed(run: Path, settings: Mapping[str, Any], programs: Programs) -> Iterator[None]:
    """Hold the folder of the run, made if it is not there, against a second process, and hold it to its settings."""
    from ..models.checkpoint import read_json

    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        with (run / LOCK).open("a") as lock:
            _lock(run, lock.fileno())
            file, record = run / SETTINGS, {**settings, "config": dict(programs.config)}
            if file.exists():
                found = read_json(file)
                config = differences(found.pop("config", {}), record["config"])
                differing = [*config, *differences(found, settings)]
                require(not differing, "\n".join(f"{run}: {line}" for line in differing))
            else:
                draft = run / DRAFT
                draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                draft.rename(file)
            yield
    except OSError as error:
        raise DscError(f"{run}: cannot be written: {error.strerror}") from None


def _lock(run: Path, file: int) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DscError(f"{run}: another process is training into it") from None


def _begin(run: Path, programs: Programs, settings: Mapping[str, Any], seed: int, source: Path) -> tuple[State, dict[str, Array] | None]:
    """The last checkpoint, else the state before the first step."""
    if found := checkpoints(run):
        return load(found[-1], programs, settings)
    stored = source.is_dir() and any(source.glob("*.safetensors"))
    return first_state(programs, seed, source if stored else None), None


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        require(value > 0, f"--{name.replace('_', '-')} is {value}, expected more than 0")


def _described(recipe: str | None) -> str | None:
    """A recipe's name; of a file its content too, which may change under the name."""
    return f"{recipe} {_digest(Path(recipe).read_bytes())}" if recipe and recipe.endswith(".toml") else recipe


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
