"""How long planning takes, CPU seconds of fresh processes, and what each is to take at most.

Replicas of experts placed for the prefill and the decode unit, 58 layers of 256 experts; a step of DualPipe on 16 stages with 120 chunks
generated, checked and simulated; deepseek-v3 compiled for the published meshes; and every mesh of 2048 GPUs planned.

    python benchmarks/planning_speed.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile

PLACE = """
from random import Random
from dsc.passes.placement import balanced
draw = Random(1)
balanced([[draw.lognormvariate(0, 1.0) for _ in range(256)] for _ in range(58)], {replicas}, {ranks}, {nodes})
"""
SIMULATE = """
from dsc.schedule.generate import generate
from dsc.schedule.simulate import Durations, simulate
from dsc.schedule.validate import check
schedule = generate("dualpipe", 16, 120)
check(schedule)
simulate(schedule, Durations(F=1, I=1, W=0.8, overlap=2.5, comm=0.1))
"""
DSC = ("-m", "dsc")
TRAIN = ("--mode", "train", "--recipe", "deepseek-v3")
WORK: dict[str, tuple[tuple[str, ...], float]] = {
    "288 replicas on 32 GPUs": (("-c", PLACE.format(replicas=288, ranks=32, nodes=4)), 1),
    "320 replicas on 320 GPUs": (("-c", PLACE.format(replicas=320, ranks=320, nodes=40)), 1),
    "a step of DualPipe simulated": (("-c", SIMULATE), 1),
    "compile, dp=128,ep=64": ((*DSC, "compile", "deepseek-v3", *TRAIN, "--mesh", "dp=128,ep=64", "-o", "train"), 20),
    "compile, prefill on 32": ((*DSC, "compile", "deepseek-v3", "--mode", "prefill", "--mesh", "dp=32,ep=32", "-o", "prefill"), 20),
    "plan, every mesh of 2048": ((*DSC, "plan", "deepseek-v3", "--gpus", "2048", "--mesh", "auto"), 60),
}


def cpu_seconds(arguments: tuple[str, ...], folder: str) -> float:
    """What a process and its children take, its start and imports too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Print the figures; 1 where a limit is missed."""
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        for name, (arguments, limit) in WORK.items():
            took = cpu_seconds(arguments, folder)
            missed |= took > limit
            print(f"{name:<30} {took:6.2f} s  (at most {limit:g} s)", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
