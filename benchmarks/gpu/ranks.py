"""The Triton backend on several GPUs: what NCCL's transfers take, whether they hide, and that the host waits for none of them.

Layers of a mixture of experts with their experts spread over all ranks run forward on two micro-batches: one after the other, and half a
layer apart as pass overlap orders them; once with collectives on streams of their own, once all on one. Times are medians, a run ends when
its results are there. `host` is when the host has issued everything: while counts of rows have to come to it (all_to_all_rows), it waits
for these alone. The rest of the table is each collective of the program by itself.

    torchrun --nproc-per-node 8 benchmarks/gpu/ranks.py           writes benchmarks/results/ranks-<device>.json
    torchrun --nproc-per-node 2 benchmarks/gpu/ranks.py --dry     on CPUs, over gloo: that it works, no figure means anything
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

import dsc
from dsc.backends.triton import INTERPRET
from dsc.backends.triton.prepared import Prepared
from dsc.backends.triton.run import Executor
from dsc.backends.triton.streams import ONE, Streams, streams_here
from dsc.backends.triton.together import Ask, Together
from dsc.distributed.torch_world import TorchWorld
from dsc.distributed.world import Program, Settle
from dsc.driver.inputs import prepare
from dsc.driver.ranks import RankWeights, inputs_of
from dsc.ir.core import Module
from dsc.ir.mesh import mesh_of
from dsc.models.random_weights import RandomWeights

RESULTS = Path(__file__).resolve().parents[1] / "results"
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
BIG = ("deepseek-v3", 4096, ("num_hidden_layers=3", "first_k_dense_replace=1", f"n_routed_experts={16 * RANKS}", "vocab_size=8192"))
TINY = ("deepseek-v3-tiny", 4, ("num_hidden_layers=2",))


def timed(program: Callable[[], Program[None]], runs: int) -> Program[tuple[float, float]]:
    """Seconds until the host has issued a program, and until its results are there."""
    found = []
    for _ in range(runs + 1):  # the first loads machine code and connects
        yield Settle()
        _synchronize()
        start = time.perf_counter()
        yield from program()
        host = time.perf_counter() - start
        yield Settle()
        _synchronize()
        found.append((host, time.perf_counter() - start))
    return median(host for host, _ in found[1:]), median(whole for _, whole in found[1:])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def prepared(module: Module, rank: int, streams: Streams) -> Prepared:
    weights, inputs = RankWeights(RandomWeights(0), module, "none"), inputs_of(module, prepare(module, None), rank)
    made = Executor(streams=lambda: streams).prepare(module, lambda name, _: weights.get(rank, name), inputs)
    made.take(inputs)
    return made


def collectives(program: Prepared) -> Iterator[tuple[str, int, Callable[[], Program[None]]]]:
    """Each collective once: what it is, the bytes that it brings, and what runs it."""
    seen = set()
    for action in program.actions:
        together = getattr(action.program, "__self__", None) if isinstance(action, Ask) else None
        if isinstance(together, Together) and together.op.signature not in seen and not getattr(together.op, "start", False):
            seen.add(together.op.signature)
            yield together.op.signature, sum(place.nbytes for place in together.places), together.whole


def measure(world: TorchWorld, plain: Module, twice: Module, runs: int) -> Iterator[dict[str, Any]]:
    first = prepared(plain, world.rank, streams_here())

    def one_after_the_other() -> Program[None]:
        yield from first.program()
        yield from first.program()

    host, plain_seconds = world.run(timed(one_after_the_other, runs))
    yield {"what": "one after the other", "host": host, "seconds": plain_seconds}
    for name, streams in (("half a layer apart", streams_here()), ("the same on one stream", ONE)):
        made = prepared(twice, world.rank, streams)
        host, seconds = world.run(timed(made.program, runs))
        yield {"what": name, "host": host, "seconds": seconds, "gain": plain_seconds / seconds}
        del made
    for what, bytes, program in collectives(first):
        host, seconds = world.run(timed(program, runs))
        yield {"what": what, "host": host, "seconds": seconds, "bytes/s": bytes / seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="a tiny model, on CPUs")
    given = parser.parse_args()
    if RANKS < 2 or (INTERPRET and not given.dry):
        print("nothing is measured: it takes 2 GPUs or more, under torchrun; --dry runs it on CPUs with a tiny model")
        return 0
    model, seq, sizes = TINY if given.dry else BIG
    module = dsc.trace(model, batch=2 * RANKS, seq=seq, overrides=sizes)
    plain = dsc.apply(module, f'simplify,shard-experts{{mesh="dp={RANKS},ep={RANKS}"}}')
    twice = dsc.apply(plain, "overlap{microbatches=2}")
    rows = []
    with TorchWorld(mesh_of(plain)) as world:
        for row in measure(world, dsc.apply(plain, "fuse"), dsc.apply(twice, "fuse"), 1 if given.dry else 20):
            rows.append(row)
            if world.rank == 0:
                print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v:24}" for k, v in row.items()), flush=True)
    if world.rank == 0 and not given.dry:
        name = torch.cuda.get_device_name(0)
        file = RESULTS / f"ranks-{name.lower().replace(' ', '-')}.json"
        file.write_text(json.dumps({"device": name, "ranks": RANKS, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
