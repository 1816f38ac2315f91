"""Training: steps of forward, backward and update until the last, with checkpoints from which a killed run goes on to the bit.

A step is a function of the state before it, so the curve is one of the source, the data, the settings and the seed alone; where it is cut
and resumed leaves no trace. That holds on one machine with the same libraries and threads, and on one mesh: another BLAS, and other ranks,
add in another order. On many ranks the process of rank 0 writes the files:

    RUN/settings.json     what determines the curve, and the mesh on which the run goes on
    RUN/loss.csv          a row for each step
    RUN/loss.png          the curve, drawn when the run ends
    RUN/checkpoints/      see train_state.py
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.arrays import Array
from ..ir.errors import DscError, require
from ..ir.mesh import Mesh, parse_mesh
from . import curve
from .data import Batches, open_text
from .learning_rate import PEAK, Schedule
from .ranks import TIMEOUT, Ranks, is_first
from .tokens import open_tokenizer
from .train_program import Programs, programs
from .train_ranks import Apart, agreed, check_team, leads, open_team, said_once
from .train_state import State, checkpoints, differences, first_state, folder_of, load, save
from .train_step import Average, NotFinite, Stepper, Values

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
    mesh: str | None = None,
    schedule: str | None = None,
    microbatches: int | None = None,
    chunks: int | None = None,
    recompute: str = "none",
    budget_gb: float | None = None,
    ranks: Ranks | None = None,
    timeout: float = TIMEOUT,
    on_step: Callable[[int, curve.Row], None] = lambda step, row: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Train `source` (as `compile` takes it, if it has a config) on text files and write the run into the folder `out`.

    A checkpoint folder with weights goes on from them; anything else begins with random ones. `recipe` quantises as in `compile`.
    `batch` is sequences per step, `seq` tokens of each (as `trace` has them by default), `learning_rate` the peak of the report's
    schedule, `ema` the decay of an average of the weights, `fim` the share of documents with their middle moved. With `resume` the run
    in `out` goes on from its last checkpoint, or begins where it has none. `on_step` is called after each step with its number and row.

    With a `mesh` ("dp=2,ep=2") the run is that of its `ranks`: "local", all in this process, or "torchrun", where this is one of them, dp
    is filled from their number if it is left out, and a rank waits `timeout` seconds for the others. `batch` counts the sequences of all
    ranks, by default one for each along dp. A run may go on with another mesh, or on one rank; `on_note` is told of such a change. Under
    torchrun rank 0 alone has rows, and calls. With pp in the mesh a step is that of a pipeline, `schedule`, `microbatches` and `chunks` are
    as in `compile`, and `batch` is that of all micro-batches. Without pp, `microbatches` accumulate gradients. What `recompute` and
    `budget_gb` keep from backward, as in `compile`, changes no bit of the curve: a run may go on with another choice.

    Raises `DscError` for a fault of the user's; where the run had begun, its state is saved first, and the message says where. Where ranks
    are lost, what they had is lost since the last checkpoint.

    >>> outcome = dsc.train("deepseek-v3-tiny", ["notes.txt"], "run", steps=20, learning_rate=2e-3)
    """
    from .. import backends

    run = Path(out)
    with said_once(ranks):
        runner = backends.get(backend)
        _check_numbers(steps=steps, save_every=save_every, lr=learning_rate, timeout=timeout)
        require(ema is None or 0 < ema < 1, f"--ema is {ema}, expected a decay between 0 and 1")
        require(len(data) > 0, "there is no data to train on")
        over = parse_mesh(mesh or "", int(os.environ.get("WORLD_SIZE", "0")) if ranks == "torchrun" else None)
        check_team(over, ranks, runner, backend)
        if ranks != "torchrun" or is_first():
            check_target(run, resume)
        if resume and batch is None:
            batch = _recorded(run).get("batch")
        files = [open_text(path) for path in data]
        order = {"schedule": schedule, "microbatches": microbatches, "chunks": chunks}
        chosen = {**order, "recompute": recompute, "budget_gb": budget_gb}
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value not in (None, "none")}
        on_mesh = str(over) if over.world > 1 or order.keys() & given.keys() else None
        made = programs(source, batch=batch, seq=seq, recipe=recipe, overrides=overrides, mesh=on_mesh, **given)
        reader = open_tokenizer(tokenizer, int(made.config["vocab_size"]), fim)
        batches = Batches(files, reader, made.batch, made.seq, seed, fim)
        for line in made.notes if ranks != "torchrun" or is_first() else ():
            on_note(f"dsc: {line}")
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
        "tokenizer": _digest("".join(reader.files().values()).encode()),
        "backend": backend,
    }
    with open_team(over, ranks, timeout) as team, _claimed(run, settings, made, on_note) if leads(team) else nullcontext():
        step = agreed(team, _last(run) if leads(team) else 0)
        stored = Path(source) if Path(source).is_dir() and any(Path(source).glob("*.safetensors")) else None
        state, averages = (
            (first_state(made, seed, stored, team.mine), None) if step < 0 else load(folder_of(run, step), made, settings, team.mine)
        )
        stepper = Stepper(made, Schedule(steps, learning_rate), runner, team)
        return _Loop(run, stepper, batches, settings, ema, save_every, on_step).go(state, averages)


def _last(run: Path) -> int:
    """The step of the last checkpoint; -1 where there is none."""
    return max((int(folder.name.removeprefix("step-")) for folder in checkpoints(run)), default=-1)


@dataclass(frozen=True)
class _Loop:
    run: Path
    stepper: Stepper
    batches: Batches
    settings: Mapping[str, Any]
    ema: float | None
    save_every: int
    on_step: Callable[[int, curve.Row], None]

    def go(self, state: State, averages: Sequence[Values] | None) -> Outcome:
        """Step until the end. Whatever stops it before, the state after the last whole step is saved, unless other processes are gone."""
        p, first, began = self.stepper.programs, state.step, time.perf_counter()
        masters = [{name: kept[0] for name, kept in held.kept.items()} for held in state.held]
        modules = [p.averages[p.place(rank)] for rank in self.stepper.team.mine] if self.ema else []
        mean = Average(modules, self.ema, self.stepper.runner, averages or masters) if self.ema else None
        lines = curve.Curve(self.run / curve.FILE, _columns(p), state.step) if leads(self.stepper.team) else None
        steps = self.stepper.schedule.steps
        try:
            while state.step < steps:
                start = time.perf_counter()
                state, measured = self.stepper.step(state, self.batches)
                if mean:
                    mean.update(state)
                row = _row(state.step, measured, p.batch * p.seq / (time.perf_counter() - start))
                if lines:
                    lines.append(row)
                if state.step % self.save_every == 0 or state.step == steps:
                    self.save(state, mean)
                if lines:
                    self.on_step(state.step, row)
        except BaseException as error:
            if lines and state.step > len(lines.rows):  # stopped between a step and its row
                lines.append(_row(state.step, measured, float("nan")))
            kept = self._saved_after(error, state, mean)
            if isinstance(error, DscError) and str(error) and kept:
                raise DscError(f"{error}; {kept}") from error
            raise
        finally:
            if mean:
                mean.close()
            if lines and lines.rows:
                curve.draw({"loss": lines.rows}, self.run / curve.PICTURE)
        made, rows = state.step - first, lines.rows if lines else ()
        return Outcome(self.run, folder_of(self.run, state.step), rows, made, made * p.batch * p.seq, time.perf_counter() - began)

    def _saved_after(self, error: BaseException, state: State, mean: Average | None) -> str:
        """Save the state if it can be: ranks in other processes are there only where all of them met the error. Says what there is."""
        if not isinstance(self.stepper.team, Apart) or isinstance(error, NotFinite):
            return f"the state after step {state.step} is kept in {self.save(state, mean)}"
        found = checkpoints(self.run)
        return f"the last checkpoint is {found[-1]}" if found else ""

    def save(self, state: State, mean: Average | None) -> Path:
        """The checkpoint of `state`, written if it is not there."""
        team, place = self.stepper.team, folder_of(self.run, state.step)
        if agreed(team, place.exists()):
            return place
        average = mean.values() if mean else None
        return save(self.run, state, average, self.stepper.programs, self.settings, self.batches.tokenizer.files(), team)


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


def _recorded(run: Path) -> dict[str, Any]:
    """The settings of the run, if there is one."""
    from ..models.json_file import read_json

    return read_json(run / SETTINGS) if (run / SETTINGS).is_file() else {}


@contextmanager
def _claimed(run: Path, settings: Mapping[str, Any], programs: Programs, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder of the run, made if it is not there, against a second process, and hold it to its settings; the mesh may change."""
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        with (run / LOCK).open("a") as lock:
            _lock(run, lock.fileno())
            found, mesh = _recorded(run), programs.layout
            before = found.pop("mesh", str(Mesh())) if found else mesh
            if found:
                config = differences(found.pop("config", {}), programs.config)
                differing = [*config, *differences(found, settings)]
                further = "".join(f"; or begin another run with {last}: dsc train {last} -o ..." for last in checkpoints(run)[-1:])
                hint = f"  --resume goes on with a run as it was begun: leave these settings as they are there{further}"
                require(not differing, "\n".join([*(f"{run}: {line}" for line in differing), hint]))
            if not found or before != mesh:
                draft = run / DRAFT
                record = {**settings, "mesh": mesh, "config": dict(programs.config)}
                draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                draft.rename(run / SETTINGS)
            if before != mesh:
                note(f"{run}: goes on with mesh {mesh}, was {before}: sums are added up in another order")
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


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        require(value > 0, f"--{name.replace('_', '-')} is {value}, expected more than 0")


def _described(recipe: str | None) -> str | None:
    """A recipe's name; of a file its content too, which may change under the name."""
    return f"{recipe} {_digest(Path(recipe).read_bytes())}" if recipe and recipe.endswith(".toml") else recipe


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
