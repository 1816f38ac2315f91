"""What many ranks in one process cost: all ranks of an expert-parallel forward pass in lockstep, against one run of the whole batch.

deepseek-v3-tiny (of 64 ranks with 64 experts, and two hops), 64 tokens for each rank, weights at hand. Both run in turn in this process, in
one thread; the least CPU time of all rounds counts. With 8 ranks all together are to take at most 2 times as long as the whole batch.

    python benchmarks/ranks_cost.py [--rounds N] [--json]
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before numpy loads its BLAS

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import cache  # noqa: E402

import dsc  # noqa: E402
from dsc import backends  # noqa: E402
from dsc.distributed import local  # noqa: E402
from dsc.driver.inputs import prepare  # noqa: E402
from dsc.driver.ranks import rank_program, whole_results  # noqa: E402
from dsc.driver.run import open_weights  # noqa: E402
from dsc.ir.mesh import mesh_of  # noqa: E402
from dsc.models.random_weights import RandomWeights  # noqa: E402

TOKENS = 64
AT_MOST = {8: 2.0}
"""The ratio that is to be reached, by the number of ranks."""


def runs(ranks: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The whole batch, and all ranks of ep=`ranks`."""
    experts = [f"n_routed_experts={ranks}"] if ranks > 16 else []
    whole = dsc.apply(dsc.trace("deepseek-v3-tiny", batch=ranks, seq=TOKENS, overrides=experts), "simplify")
    sharded = dsc.apply(whole, f'shard-experts{{mesh="dp={ranks},ep={ranks}"}}')
    runner, inputs = backends.get("numpy"), prepare(whole, None)
    weights = cache(open_weights("random:0", whole, None))
    program, _ = rank_program(sharded, RandomWeights(0), inputs, runner)

    def lockstep() -> object:
        return whole_results(sharded, dict(enumerate(local.run(mesh_of(sharded), program))))

    return lambda: runner.run(whole, weights, inputs), lockstep


def measure(ranks: int, rounds: int) -> dict[str, float]:
    """The least CPU seconds of each, and their ratio."""
    both = runs(ranks)
    best = [float("inf")] * 2
    for number in range(rounds + 1):  # the first reads the weights
        for i, run in enumerate(both):
            start = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - start) if number else best[i]
    return {"ranks": ranks, "unsharded": best[0], "all_ranks": best[1], "ratio": best[1] / best[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="runs of each on 8 ranks; a quarter of them on 64")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    found = [measure(8, options.rounds), measure(64, max(1, options.rounds // 4))]
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{'ranks':>5} {'unsharded':>10} {'all ranks':>10} {'ratio':>6}")
        for row in found:
            goal = f"  (at most {AT_MOST[int(row['ranks'])]:g})" if row["ranks"] in AT_MOST else ""
            print(f"{row['ranks']:5} {row['unsharded']:8.4f} s {row['all_ranks']:8.4f} s {row['ratio']:6.2f}{goal}")
    return int(any(row["ratio"] > AT_MOST.get(int(row["ranks"]), float("inf")) for row in found))


if __name__ == "__main__":
    sys.exit(main())
