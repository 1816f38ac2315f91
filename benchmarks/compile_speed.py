"""`dsc compile deepseek-v3` against `torch.export` of the same model as `transformers` writes it, both with all 61 layers.

Each run is a process of its own, which first imports everything and exports a two-layer MLP to warm up; neither is counted. Counted
are for dsc the whole command (reading the config, building the modules, tracing, simplifying, quantising to FP8, writing the artifact),
for the other side `torch.export.export` alone: not strict, on the meta device, static shapes, BF16, one sequence of 4,096 tokens. The
best of three runs counts, the sides taking turns. Memory is the largest resident set of the process. To be reached: a quarter of the
time, no more memory, and 61 layers in at most 1.3 times the time of 4.

    python benchmarks/compile_speed.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RUNS = 3
LAYERS, FEW = 61, 4
TIME, MEMORY, DEPTH = 0.25, 1.0, 1.3


def warm_up() -> None:
    """Export a two-layer MLP: torch imports and builds much of itself on the first export of a process."""
    import torch
    from torch import nn

    torch.export.export(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (torch.zeros(2, 8),), strict=False)


def dsc_side(layers: int) -> Callable[[], object]:
    """Imports done, the command as a function."""
    import dsc
    import dsc.driver.compile
    import dsc.models.trace

    folder = tempfile.TemporaryDirectory()

    def run() -> object:
        with folder:
            return dsc.compile("deepseek-v3", Path(folder.name) / "out", recipe="deepseek-v3", overrides=[f"num_hidden_layers={layers}"])

    return run


def transformers_side(layers: int) -> Callable[[], object]:
    """The model built on the meta device, its export as a function."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from dsc.models.config import load_config

    fields = load_config("deepseek-v3", [f"num_hidden_layers={layers}"]).to_dict()
    kept = {key: value for key, value in fields.items() if key not in ("model_type", "quantization_config", "head_dim", "dtype")}
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**kept, use_cache=False)).to(torch.bfloat16).eval()
        tokens = torch.empty(1, 4096, dtype=torch.int64)

    def run() -> object:
        with torch.no_grad():
            return torch.export.export(model, (tokens,), strict=False)

    return run


SIDES = {"dsc": dsc_side, "transformers": transformers_side}


def measure(side: str, layers: int) -> tuple[float, float]:
    """Seconds, and the peak in MB, of one run in a process of its own."""
    command = [sys.executable, __file__, "--side", side, str(layers)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return found["seconds"], found["megabytes"]


def run_side(side: str, layers: int) -> None:
    """What the process of one run does."""
    run = SIDES[side](layers)
    warm_up()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main() -> int:
    """Print the figures; 1 where a limit is missed."""
    cases = (("dsc", LAYERS), ("dsc", FEW), ("transformers", LAYERS))
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(RUNS):
        for case in cases:
            taken[case].append(measure(*case))
    best = {case: (min(s for s, _ in runs), max(mb for _, mb in runs)) for case, runs in taken.items()}
    for (side, layers), (seconds, megabytes) in best.items():
        what = "dsc compile, with FP8" if side == "dsc" else "torch.export of transformers"
        print(f"{what:30} {layers:3} layers  {seconds:7.2f} s  {megabytes:6.0f} MB")
    ours, few, theirs = best.values()
    missed = 0
    for what, ratio, limit in (
        ("time, dsc / torch.export", ours[0] / theirs[0], TIME),
        ("memory, dsc / torch.export", ours[1] / theirs[1], MEMORY),
        (f"time, {LAYERS} layers / {FEW} layers", ours[0] / few[0], DEPTH),
    ):
        missed += ratio > limit
        print(f"{what:30} {ratio:.3f}, at most {limit}: {'missed' if ratio > limit else 'reached'}")
    return 1 if missed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        run_side(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main())
