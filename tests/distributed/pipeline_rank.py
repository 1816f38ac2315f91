"""One rank of a pipeline, for test_pipeline.py: runs every case under one start, and rank 0 writes what came out.

A case is (text of a module, the text of a schedule). The answers are, for each, all results of the program as arrays.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import dsc
from dsc import backends
from dsc.distributed.torch_world import TorchWorld
from dsc.driver.inputs import prepare
from dsc.driver.ranks import rank_program, to_first, whole_results
from dsc.ir.mesh import mesh_of
from dsc.models.random_weights import RandomWeights
from dsc.schedule.actions import parse


def main() -> None:
    cases, answers = (Path(name) for name in sys.argv[1:])
    world: TorchWorld | None = None
    found = []
    for text, order in pickle.loads(cases.read_bytes()):
        module, schedule = dsc.parse(text), parse(order)
        world = world or TorchWorld(mesh_of(module), timeout=60.0)
        world.mesh = mesh_of(module)
        inputs = prepare(module, None, microbatches=schedule.microbatches)
        program, plan = rank_program(module, RandomWeights(0), inputs, backends.get("numpy"), None, schedule, keep=False)
        held = world.run(to_first(program(world.rank), module, plan, world.rank))
        if held:
            found.append(whole_results(module, held))
    if world is not None:
        world.__exit__(None, None, None)
    if found:
        answers.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
