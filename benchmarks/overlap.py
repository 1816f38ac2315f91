"""Overlapped against plain on two ranks: two micro-batches of a mixture of experts, one after the other, and half a layer apart.

Two processes, started as torchrun would, with one thread each, run both programs in turn; the least of all runs counts, so the ratio
depends little on what else the machine does. Over gloo as it is, transfers are memory that the same two cores copy: what can be hidden is
waiting. Over a link that delays transfers by bytes over bandwidth without using the CPU (`distributed/delayed.py`), of a bandwidth at which
a rank communicates as long as it computes, up to half of the time can be. The ratios are to be at least 1.1 and 1.6.

    python benchmarks/overlap.py [--rounds N] [--set KEY=VALUE ...]
"""

from __future__ import annotations

import os
import sys

RANKS = 2
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import argparse  # noqa: E402
import json  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

import dsc  # noqa: E402
from dsc import backends  # noqa: E402
from dsc.distributed import local  # noqa: E402
from dsc.distributed.delayed import Link, SimulatedClock, WallClock, delayed  # noqa: E402
from dsc.distributed.torch_world import TorchWorld  # noqa: E402
from dsc.distributed.world import Gather, Program  # noqa: E402
from dsc.driver.comm import volume  # noqa: E402
from dsc.driver.inputs import prepare  # noqa: E402
from dsc.driver.ranks import RankWeights, cut  # noqa: E402
from dsc.hardware.streams import Costing, simulate  # noqa: E402
from dsc.ir.core import Module, Op  # noqa: E402
from dsc.ir.mesh import mesh_of  # noqa: E402
from dsc.ir.ops.collective import Transfer  # noqa: E402
from dsc.ir.sharding import input_splits  # noqa: E402
from dsc.ir.walk import walk  # noqa: E402
from dsc.models.random_weights import RandomWeights  # noqa: E402
from dsc.passes.overlap import overlapped  # noqa: E402

GLOO = 1e9
"""Bytes a second over loopback, as the order is chosen by."""
GOALS = {"gloo": 1.1, "delayed": 1.6}
SHAPE = {"dtype": "float32", "num_hidden_layers": 16, "first_k_dense_replace": 0, "n_routed_experts": 8, "vocab_size": 320}
SETS = {
    "gloo": SHAPE | {"hidden_size": 1024, "moe_intermediate_size": 64, "num_experts_per_tok": 4},
    "delayed": SHAPE
    | {"hidden_size": 512, "moe_intermediate_size": 768, "num_experts_per_tok": 2, "num_attention_heads": 16, "num_key_value_heads": 16},
}
"""Over gloo experts are small, so that rows weigh against products; over a link they are not, for its bandwidth is chosen."""


def plain_program(settings: dict[str, Any]) -> Module:
    """What a rank runs for one micro-batch."""
    module = dsc.trace("deepseek-v3-tiny", batch=2 * RANKS, seq=64, overrides=[f"{key}={value}" for key, value in settings.items()])
    return dsc.apply(module, f'simplify,shard-experts{{mesh="dp={RANKS},ep={RANKS}"}}')


@dataclass
class Measured:
    """What each op takes here, on the slower rank, and a transfer over a link. Ids of two micro-batches begin with theirs."""

    link: Link
    sent: float
    """Bytes that leave a rank for each byte of `volume`, which counts rows that stay at home as well."""
    known: dict[str, float] = field(default_factory=dict)

    def seconds(self, op: Op) -> float:
        if isinstance(op, Transfer):
            return self.link.seconds(round(self.sent * volume(op)))
        return self.known.get(op.id.removeprefix("mb0.").removeprefix("mb1."), 0.0)

    def stream(self, op: Op) -> Any:
        return "comm" if isinstance(op, Transfer) else "compute"


def durations(plain: Module, bandwidth: float | None) -> Measured:
    """Of each rank's ops in lockstep with the others, and the bandwidth at which transfers take as long in all, unless it is given."""
    runner: Any = backends.get("numpy")
    weights, mesh, inputs = RankWeights(RandomWeights(0), plain, keep="own"), mesh_of(plain), prepare(plain, None)
    found: list[dict[str, float]] = [{} for _ in range(RANKS)]
    clocks = [SimulatedClock() for _ in range(RANKS)]  # over a link of a byte a second
    last = [time.thread_time()]

    def one(rank: int) -> Any:
        def observe(site: Any, op: Op, operands: Any, results: Any) -> None:
            took = time.thread_time() - last[0]
            if not isinstance(op, Transfer):
                found[rank][op.id] = min(took, found[rank].get(op.id, took))
            last[0] = time.thread_time()

        mine = tuple(cut(x, split, mesh, rank) for x, split in zip(inputs, input_splits(plain), strict=True))
        return delayed(runner.program(plain, lambda name, _: weights.get(rank, name), mine, observe), Link(1), clocks[rank])

    runs = 3
    for _ in range(runs):
        local.run(mesh, one)
    known = {id: max(one[id] for one in found) for id in found[0]}
    computing = sum(known.get(op.id, 0.0) for _, _, op in walk(plain))
    sending = max(clock.now() for clock in clocks) / runs
    volumes = sum(volume(op) for _, _, op in walk(plain) if isinstance(op, Transfer))
    return Measured(Link(bandwidth or sending / computing), float(sending / volumes), known)


class Rank:
    """One process."""

    def __init__(self, plain: Module, made: Module, world: TorchWorld) -> None:
        self.plain, self.made, self.world = plain, made, world
        self.runner: Any = backends.get("numpy")
        self.weights = RankWeights(RandomWeights(0), plain, keep="own")
        one = prepare(plain, None)
        both = [one, [np.roll(x, 1, -1) for x in one]]
        mesh, splits = mesh_of(plain), input_splits(plain)
        self.inputs = [[cut(x, split, mesh, world.rank) for x, split in zip(whole, splits, strict=True)] for whole in both]

    def program(self, module: Module, inputs: Sequence[Any]) -> Program[tuple[Any, ...]]:
        return self.runner.program(module, lambda name, _: self.weights.get(self.world.rank, name), inputs)

    def one_by_one(self) -> Program[tuple[Any, ...]]:
        results: tuple[Any, ...] = ()
        for inputs in self.inputs:
            results += yield from self.program(self.plain, inputs)
        return results

    def at_once(self) -> Program[tuple[Any, ...]]:
        return (yield from self.program(self.made, [x for inputs in self.inputs for x in inputs]))

    def seconds(self, program: Program[Any], link: Link | None) -> tuple[float, Any]:
        """Of one run: the longer of both ranks'."""
        self.most(0.0)  # both begin together
        start = time.monotonic()
        found = self.world.run(program if link is None else delayed(program, link, WallClock()))
        return self.most(time.monotonic() - start), found

    def most(self, value: float) -> float:
        """The larger of both ranks' values."""

        def program() -> Program[float]:
            found = yield Gather("world", RANKS, np.array([value]))
            return float(max(x[0] for x in found))

        return self.world.run(program())

    def sends(self) -> float:
        """Bytes that leave a rank in the plain program for both micro-batches: the seconds over a link of a byte a second."""
        clock = SimulatedClock()
        self.world.run(delayed(self.one_by_one(), Link(1), clock))
        return self.most(clock.now())


def rank(delays: bool, folder: Path, rounds: int) -> None:
    """What each process does."""
    plain, made = (dsc.parse((folder / name).read_text()) for name in ("plain.dsc", "made.dsc"))
    with TorchWorld(mesh_of(plain)) as world:
        here = Rank(plain, made, world)
        here.seconds(here.one_by_one(), None)
        computing = min(here.seconds(here.one_by_one(), None)[0] for _ in range(rounds))
        link = Link(here.sends() / computing) if delays else None
        bits: dict[str, list[bytes]] = {}
        times: dict[str, list[float]] = {"plain": [], "overlapped": []}
        for _ in range(rounds):
            for name, program in (("plain", here.one_by_one), ("overlapped", here.at_once)):
                took, found = here.seconds(program(), link)
                times[name].append(took)
                bits[name] = [x.tobytes() for x in found]
            same = all(a == b for a, b in zip(bits["plain"], bits["overlapped"], strict=True))
            assert same, "the overlapped program gives other bits"
        if world.rank == 0:
            least = {name: min(found) for name, found in times.items()}
            print(json.dumps(least | {"ratio": least["plain"] / least["overlapped"], "bandwidth": link and link.bandwidth}))


def measured(kind: str, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """What rank 0 says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = plain_program(settings)
        taken = durations(plain, GLOO if kind == "gloo" else None)
        made = overlapped(plain, Costing(taken, taken), microbatches=2).module
        times = [simulate(m, taken) for m in (plain, made)]
        expected = 2 * times[0].total / times[1].total
        (folder / "plain.dsc").write_text(str(plain))
        (folder / "made.dsc").write_text(str(made))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, __file__, "--rank", kind, name, "--rounds", str(rounds)]
        given = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | given | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(RANKS)
        ]
        said = [process.communicate()[0] for process in ranks]
        if any(process.returncode for process in ranks):
            raise SystemExit("a rank failed")
        found: dict[str, Any] = json.loads(said[0].strip().splitlines()[-1])
        return found | {"expected": expected}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", choices=list(GOALS))
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        rank(given.rank[0] == "delayed", Path(given.rank[1]), given.rounds)
        return 0
    failed = False
    for kind, goal in GOALS.items():
        if given.only in (None, kind):
            settings = SETS[kind] | dict(item.split("=", 1) for item in given.set)
            found = measured(kind, settings, given.rounds)
            over = f"over a link of {found['bandwidth'] / 1e6:.1f} MB/s" if found["bandwidth"] else "over gloo"
            times = f"plain {found['plain'] * 1e3:.0f} ms, overlapped {found['overlapped'] * 1e3:.0f} ms"
            print(f"2 ranks {over}, two micro-batches, best of {given.rounds}: {times}")
            print(f"ratio {found['ratio']:.2f} (at least {goal:g}; {found['expected']:.2f} by what the ops take one by one)")
            failed |= found["ratio"] < goal
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
