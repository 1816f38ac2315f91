"""Does FP8 train as BF16 does? deepseek-v3-tiny on real text, once for each recipe, from one seed; the curves and how far they are apart.

    bf16                 nothing is quantised: what the others are compared with
    float32              the model in float32: how far apart two runs drift that differ in rounding alone
    deepseek-v3          all of the report's recipe, products accumulated in float32
    block-only           gradients in 128x128 blocks, which diverged in the report's appendix B.2
    hybrid-e4m3-e5m2     gradients in E5M2
    h800-unpromoted      deepseek-v3 on the accumulator of an H800, never promoted to float32; slow to emulate, so it makes fewer steps

The measure is the report's (appendix B.1): curves smoothed by an exponential moving average of 0.9, and the relative difference to that
of bf16, which the report has below 0.25% at 16B parameters and more. The text is CPython's own help topics.

    python benchmarks/fp8_training.py --measure 3     seconds per step of each recipe, and how long the whole would take
    python benchmarks/fp8_training.py                 make every run, or go on with what an earlier call left in build/fp8_training
    python benchmarks/fp8_training.py bf16 deepseek-v3 --steps 200

Writes fp8_training.json and fp8_training.png into benchmarks/results after each run, from all runs of the same settings that are there.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the products are small, and threads that wait for one another slow a busy machine down

import argparse
import json
import pydoc_data.topics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dsc import DscError, backends
from dsc.driver.artifact import versions
from dsc.driver.curve import SMOOTHING, Row, read, smoothed
from dsc.driver.data import Batches, open_text
from dsc.driver.learning_rate import Schedule
from dsc.driver.tokens import ByteTokenizer
from dsc.driver.train import Stepper, train
from dsc.driver.train_program import programs
from dsc.driver.train_state import first_state
from dsc.passes.recipe import RECIPES

ROOT = Path(__file__).parents[1]
RESULTS, RUNS = ROOT / "benchmarks" / "results", ROOT / "build" / "fp8_training"
TEXT = pydoc_data.topics.__file__
MODEL, BATCH, SEQ, RATE, SEED = "deepseek-v3-tiny", 8, 128, 1e-3, 0
COLUMN, CLAIM, BASE, SLOW = "lm_loss", 0.0025, "bf16", "h800-unpromoted"
NAMES = (BASE, "float32", "deepseek-v3", "block-only", "hybrid-e4m3-e5m2", SLOW)


def options(name: str) -> dict[str, Any]:
    """What sets a run apart from that of bf16."""
    if name in (BASE, "float32"):
        return {"overrides": [f"dtype={'bfloat16' if name == BASE else name}"]}
    if name != SLOW:
        return {"recipe": name}
    RUNS.mkdir(parents=True, exist_ok=True)
    file, shipped = RUNS / f"{SLOW}.toml", (RECIPES / "deepseek-v3.toml").read_text(encoding="utf-8")
    file.write_text(shipped.replace('model = "float32"', 'model = "h800"\ninterval = 0'), encoding="utf-8")
    return {"recipe": str(file)}


def measure(names: Sequence[str], count: int, steps: Mapping[str, int]) -> None:
    """Print the seconds of a step, the best of `count` after one that warms up, and of the whole run."""
    total = 0.0
    for name in names:
        made = programs(MODEL, batch=BATCH, seq=SEQ, **options(name))
        stepper, state = Stepper(made, Schedule(steps[name], RATE), backends.get("numpy")), first_state(made, SEED)
        batches, times = Batches([open_text(TEXT)], ByteTokenizer(), BATCH, SEQ, SEED, 0.1), []
        for _ in range(count + 1):
            start = time.perf_counter()
            state, _ = stepper.step(state, batches)
            times.append(time.perf_counter() - start)
        seconds = min(times[1:]) * steps[name]
        total += seconds
        print(f"{name:18} {min(times[1:]):7.2f} s/step  {1 / min(times[1:]):6.2f} steps/s  {steps[name]:5} steps  {seconds / 60:6.1f} min")
    print(f"{'together':18} {total / 60:52.1f} min")


class _Enough(Exception):
    """The run has made the steps that it was to make."""


def run(name: str, steps: int, schedule: int) -> None:
    """Make the run `name`, of whose `schedule` steps the first `steps` are made, or go on with it."""
    start, first = time.perf_counter(), 0

    def on_step(step: int, row: Row) -> None:
        nonlocal first
        first = first or step
        if step % 20 == 0 or step == steps:
            each = (time.perf_counter() - start) / (step - first + 1)
            print(
                f"{name}: step {step} of {steps}, {COLUMN} {float(row[COLUMN]):.4f}, {each * (steps - step) / 60:.1f} min left", flush=True
            )
        if step >= steps:
            raise _Enough

    folder = RUNS / f"{schedule}" / name
    if (folder / "loss.csv").exists() and len(read(folder / "loss.csv")) >= steps:
        return
    with suppress(_Enough):
        train(
            MODEL, [TEXT], folder, steps=schedule, resume=True, batch=BATCH, seq=SEQ, learning_rate=RATE, seed=SEED, save_every=25,
            on_step=on_step, **options(name),
        )  # fmt: skip


def compare(schedule: int) -> dict[str, Any]:
    """The curve of each run that is there, and how far it is from that of bf16."""
    curves = {name: read(file) for name in NAMES if (file := RUNS / f"{schedule}" / name / "loss.csv").exists()}
    base = np.array(smoothed(float(row[COLUMN]) for row in curves[BASE]))
    found: dict[str, Any] = {}
    for name, rows in curves.items():
        values = [float(row[COLUMN]) for row in rows]
        smooth = np.array(smoothed(values))
        count = min(len(smooth), len(base))
        error = smooth[:count] / base[:count] - 1
        late = error[count // 2 :]
        speeds = [float(row["tokens_per_second"]) for row in rows]
        found[name] = {
            "steps": len(rows),
            "last_smoothed": float(smooth[-1]),
            "relative_error_last": float(error[-1]),
            "relative_error_mean_of_second_half": float(late.mean()),
            "relative_error_largest_of_second_half": float(np.abs(late).max()),
            "seconds_per_step": float(BATCH * SEQ / np.median(speeds)),
            "curve": [round(value, 5) for value in values],
        }
    return found


def report(schedule: int) -> None:
    """Write the numbers and the picture, and print a line for each run; nothing as long as there is no curve to compare with."""
    if not (RUNS / f"{schedule}" / BASE / "loss.csv").exists():
        return
    found = compare(schedule)
    RESULTS.mkdir(exist_ok=True)
    head = {
        "model": MODEL, "batch": BATCH, "seq": SEQ, "learning_rate": RATE, "seed": SEED, "scheduled_steps": schedule, "column": COLUMN,
        "smoothing": SMOOTHING, "versions": versions(),
    }  # fmt: skip
    (RESULTS / "fp8_training.json").write_text(json.dumps({**head, "runs": found}, indent=1) + "\n", encoding="utf-8")
    draw(found, RESULTS / "fp8_training.png")
    for name, one in found.items():
        each = [one[f"relative_error_{key}"] for key in ("last", "mean_of_second_half", "largest_of_second_half")]
        last, mean, largest = (f"{value:+.3%}" for value in each)
        verdict = "" if name == BASE else f"  relative error {last} at the end, {mean} on average, at most {largest} in the second half"
        print(f"{name:18} {one['steps']:5} steps  {one['last_smoothed']:.4f}{verdict}")


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Smoothed curves above, relative errors in percent below, the report's claim as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    base = np.array(smoothed(found[BASE]["curve"]))
    for i, (name, one) in enumerate(found.items()):
        smooth = np.array(smoothed(one["curve"]))
        steps = np.arange(1, len(smooth) + 1)
        above.plot(steps, smooth, color=f"C{i}", linewidth=1.2, label=name)
        if name != BASE:
            count = min(len(smooth), len(base))
            below.plot(steps[:count], 100 * (smooth[:count] / base[:count] - 1), color=f"C{i}", linewidth=1)
    below.axhspan(-100 * CLAIM, 100 * CLAIM, color="0.85", zorder=0, label=f"within {CLAIM:.2%}")
    above.set_ylabel(f"{COLUMN}, nats per token (EMA {SMOOTHING:g})")
    below.set_ylabel("relative to bf16, %")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    FigureCanvasAgg(figure).print_png(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="RUN", help=f"which of {', '.join(NAMES)}; default: all")
    parser.add_argument("--steps", type=int, default=1000, help="steps of a run, and of the learning rate's schedule")
    parser.add_argument("--slow-steps", type=int, default=200, help=f"steps of {SLOW}, on the same schedule")
    parser.add_argument("--measure", type=int, metavar="N", help="time N steps of each run and stop")
    given = parser.parse_args()
    names = given.names or NAMES
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"unknown run {unknown[0]}; expected some of {', '.join(NAMES)}")
    steps = {name: min(given.slow_steps, given.steps) if name == SLOW else given.steps for name in NAMES}
    if given.measure:
        measure(names, given.measure, steps)
        return 0
    os.nice(10)
    for name in names:
        try:
            run(name, steps[name], given.steps)
        except DscError as error:  # a run that diverges is a result: its curve ends there
            print(f"{name}: {error}")
        report(given.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
