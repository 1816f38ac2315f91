"""One training step of deepseek-v3-tiny: the NumPy reference against torch eager, and what quantising by a recipe costs on top.

A step is forward, backward, clipping and AdamW, on four sequences of 256 tokens. torch runs the module that dsc traces, in float32, with
torch.optim.AdamW; the backward of that module's expert ops runs their forward once more. Both run in this process, from the same weights
and with the same number of threads; the best of five steps counts, all taking turns. Prints the times and two ratios: float32 against
torch is to be at most 3, the recipe deepseek-v3 with float32 accumulation, on the model in bf16, at most 4 times float32. See
reference_speed.py for the variables that slow OpenBLAS down.

    python benchmarks/train_speed.py [BATCH SEQ]
"""

from __future__ import annotations

import os

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))))
os.environ.setdefault("OPENBLAS_NUM_THREADS", str(THREADS))

import pydoc_data.topics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import torch  # noqa: E402

from dsc import backends  # noqa: E402
from dsc.driver.data import Batches, Position, open_text  # noqa: E402
from dsc.driver.learning_rate import Schedule  # noqa: E402
from dsc.driver.tokens import ByteTokenizer  # noqa: E402
from dsc.driver.train import Stepper  # noqa: E402
from dsc.driver.train_program import Programs, programs  # noqa: E402
from dsc.driver.train_state import first_state  # noqa: E402
from dsc.models.build import build  # noqa: E402
from dsc.models.config import load_config  # noqa: E402

MODEL, SEED, RUNS = "deepseek-v3-tiny", 0, 5
TORCH_AT_MOST, RECIPE_AT_MOST = 3.0, 4.0


def ours(made: Programs, batches: Batches) -> Callable[[], float]:
    """A function that makes the next step and returns its loss."""
    stepper, state = Stepper(made, Schedule(1000), backends.get("numpy")), first_state(made, SEED)

    def step() -> float:
        nonlocal state
        state, measured = stepper.step(state, batches)
        return float(measured["loss"])

    return step


def theirs(made: Programs, batches: Batches) -> Callable[[], float]:
    """The same step in torch eager."""
    schedule, at, number = Schedule(1000), Position(), 0
    model = build(load_config(dict(made.config)), "train", "cpu")
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in first_state(made, SEED).weights.items()})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> float:
        nonlocal at, number
        tokens, labels, at = batches.next(at)
        number += 1
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(number)
        optimizer.zero_grad()
        loss = model(torch.from_numpy(tokens), torch.from_numpy(labels))[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> int:
    torch.set_num_threads(THREADS)
    batch, seq = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (4, 256)
    batches = Batches([open_text(pydoc_data.topics.__file__)], ByteTokenizer(), batch, seq)
    float32 = programs(MODEL, batch=batch, seq=seq, overrides=["dtype=float32"])
    rivals = {
        f"torch {torch.__version__} eager, float32": theirs(float32, batches),
        "dsc numpy, float32": ours(float32, batches),
        "dsc numpy, bf16": ours(programs(MODEL, batch=batch, seq=seq), batches),
        "dsc numpy, recipe deepseek-v3": ours(programs(MODEL, batch=batch, seq=seq, recipe="deepseek-v3"), batches),
    }
    times: dict[str, list[float]] = {name: [] for name in rivals}
    first: dict[str, float] = {}
    for _ in range(RUNS):
        for name, step in rivals.items():
            start = time.perf_counter()
            loss = step()
            times[name].append(time.perf_counter() - start)
            first.setdefault(name, loss)
    best = {name: min(seconds) for name, seconds in times.items()}
    peer, plain, _, quantized = best.values()
    error = abs(first["dsc numpy, float32"] / next(iter(first.values())) - 1)
    print(f"a training step of {MODEL}, {batch} sequences of {seq} tokens, {THREADS} threads, best of {RUNS}")
    for name, seconds in best.items():
        print(f"{name:34} {seconds * 1e3:8.1f} ms  {batch * seq / seconds:8,.0f} tokens/s  {seconds / peer:5.2f} x  loss {first[name]:.6f}")
    print(f"float32 against torch {plain / peer:.2f} (at most {TORCH_AT_MOST:g}), first losses apart by {error:.1e}")
    print(f"the recipe against float32 {quantized / plain:.2f} (at most {RECIPE_AT_MOST:g})")
    return int(plain > TORCH_AT_MOST * peer or quantized > RECIPE_AT_MOST * plain or error > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
