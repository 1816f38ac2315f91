"""`dsc train`: the command, and what it shows while a run goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .cli import budget_option, cli, json_option, pipeline_options, recompute_option, resumed
from .curve import Row
from .ui import emit_json, note, plural

EVERY = 10.0
"""Seconds between lines where standard error is no terminal."""


@resumed("the same command with --resume goes on from the last checkpoint")
@cli.command()
@click.argument("source", metavar="SRC")
@click.option("--data", required=True, multiple=True, type=click.Path(path_type=Path), metavar="FILE...", help="Text files to train on.")
@click.argument("more", nargs=-1, type=click.Path(path_type=Path), metavar="")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="RUN", help="Folder of the run.")
@click.option("--steps", required=True, type=int, help="Steps from the beginning of the run to its end.")
@click.option("--recipe", metavar="NAME|FILE.toml", help="Quantise by this recipe (deepseek-v3, ...).")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in RUN; begin where there is none.")
@click.option("--batch", type=int, help="Sequences per step. Default: 1.")
@click.option("--seq", type=int, help="Tokens per sequence. Default: 4096, 64 for a -tiny model.")
@click.option("--lr", "learning_rate", type=float, default=2.2e-4, help="Peak of the learning rate. Default: 2.2e-4.")
@click.option("--seed", type=int, default=0, help="Of the first weights and the order of the data. Default: 0.")
@click.option("--save-every", type=int, default=100, metavar="STEPS", help="Steps between checkpoints. Default: 100.")
@click.option("--ema", type=float, metavar="DECAY", help="Also keep a moving average of the weights.")
@click.option("--fim", type=float, default=0.1, metavar="SHARE", help="Documents with their middle moved to the end. Default: 0.1.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="FILE", help="A tokenizer.json. Default: bytes.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of the model's config.")
@click.option("--backend", default="numpy", help="Who runs it. Default: numpy.")
@click.option("--mesh", metavar="pp=N,dp=N,ep=N,...", help="Train on this mesh of ranks. Default: none; under torchrun dp is their number.")
@pipeline_options
@recompute_option("none")
@budget_option
@click.option("--ranks", type=click.Choice(["local", "torchrun"]), help="Where they run. Default: torchrun where it started us.")
@click.option("--timeout", type=float, default=600.0, metavar="SECONDS", help="How long a rank waits for others. Default: 600.")
@json_option
def train(source: str, data: tuple[Path, ...], more: tuple[Path, ...], out: Path, steps: int, as_json: bool, **options: Any) -> int:
    """Train SRC on text files.

    SRC is a shipped model (dsc models), a config.json or a checkpoint folder, whose weights training goes on from. RUN gets
    loss.csv, loss.png and the last two checkpoints in Hugging Face layout. The same command with --resume goes on with a run
    that was stopped, and gives the curve it would have given, to the bit. With --mesh, sequences, experts and the optimiser's
    state are spread over ranks; a run may go on with another mesh.

    \b
    dsc train deepseek-v3-tiny --data notes.txt more.txt -o run --steps 200 --lr 2e-3
    dsc train deepseek-v3-tiny --data notes.txt -o run8 --steps 200 --lr 2e-3 --recipe deepseek-v3
    dsc train deepseek-v3-tiny --data notes.txt -o run4 --steps 200 --mesh dp=4,ep=2 --ranks local
    dsc train deepseek-v3-tiny --data notes.txt -o runp --steps 200 --batch 8 --mesh pp=2,dp=2,ep=2 --schedule zb1p --ranks local
    torchrun --nproc-per-node 4 -m dsc train deepseek-v3-tiny --data notes.txt -o run4 --steps 200 --mesh ep=2
    """
    from .ranks import is_first, started_by_torchrun
    from .train import train as run

    options["ranks"] = options["ranks"] or ("torchrun" if started_by_torchrun() else None)
    with meter(steps) as step:
        done = run(source, (*data, *more), out, steps=steps, on_step=step, on_note=note, **options)
    if options["ranks"] == "torchrun" and not is_first():
        return 0
    last = done.rows[-1]
    found = {
        "run": str(out),
        "checkpoint": str(done.checkpoint),
        "steps": len(done.rows),
        "steps_now": done.steps,
        "seconds": done.seconds,
        "tokens_per_second": done.tokens_per_second,
        "last": {name: float(value) for name, value in last.items() if name != "step"},
    }
    if as_json:
        emit_json(found)
        return 0
    parts = ", ".join(f"{name.replace('_', ' ')} {float(last[name]):.4f}" for name in last if name.endswith("loss"))
    print(f"step {last['step']}: {parts}")
    print(f"{plural(done.steps, 'step')} in {done.seconds:.1f} s, {done.tokens_per_second:,.0f} tokens/s")
    print(f"{done.checkpoint}: the last checkpoint; the curve is in {out / 'loss.csv'}")
    return 0


@contextmanager
def meter(steps: int) -> Iterator[Callable[[int, Row], None]]:
    """Shows each step on standard error: a bar on a terminal, else a line every ten seconds and one at the end."""
    if not sys.stderr.isatty():
        yield _Lines(steps)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps, shown="")
        yield lambda step, row: bar.update(task, completed=step, shown=_shown(row))


class _Lines:
    def __init__(self, steps: int) -> None:
        self.steps, self.first, self.start, self.last = steps, 0, 0.0, 0.0

    def __call__(self, step: int, row: Row) -> None:
        now = time.monotonic()
        if not self.first:  # the clock begins with the first step, after all that had to be compiled
            self.first, self.start, self.last = step, now, now
        if now - self.last < EVERY and step != self.steps:
            return
        self.last = now
        left = (now - self.start) / max(1, step - self.first) * (self.steps - step)
        note(f"step {step} of {self.steps}: {_shown(row)}, {left:.0f} s left")


def _shown(row: Row) -> str:
    loss = next(value for name, value in row.items() if name.endswith("loss"))
    return f"loss {float(loss):.4f}, {float(row['tokens_per_second']):,.0f} tokens/s"
