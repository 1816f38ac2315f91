"""One rank of a pool, for test_torch_world.py: takes cases from standard input and answers each on standard output, both pickled.

A case is (text of a module, the inputs of every rank). The answer is the results under `TorchWorld`, and what is wrong with them by
torch.distributed's own collectives, or with those of the Triton backend beside them.
"""

from __future__ import annotations

import pickle
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import dsc
from dsc import backends
from dsc.backends.arrays import widen
from dsc.distributed.torch_world import TorchWorld
from dsc.distributed.world import Program, Receive, Send
from dsc.ir.mesh import mesh_of
from dsc.ir.ops.collective import AllGather, AllReduce, AllToAll, AllToAllRows, Collective, ReduceScatter
from dsc.ir.ops.internode import InternodeDispatch
from dsc.testing.bounds import FLOAT32, permitted

TRITON: Any = backends.get("triton") if find_spec("triton") else None


def no_weights(name: str, type: Any) -> Any:
    raise AssertionError(name)


GROUPS: dict[tuple[int, ...], Any] = {}


def bits(x: np.ndarray) -> torch.Tensor:
    """Bytes along a new last axis: any dtype, exactly."""
    return torch.from_numpy(np.ascontiguousarray(x)[..., None].view(np.uint8).copy())


def by_rank(counts: np.ndarray) -> np.ndarray:
    """The rows of rank 0, then those of rank 1, ...: counts [size, J] say how many lie in each of J blocks, and so for every rank."""
    blocks = counts.reshape(len(counts), -1).T
    ranks = np.repeat(np.tile(np.arange(len(counts)), len(blocks)), blocks.ravel())
    return np.argsort(ranks, kind="stable")


def verdict(op: Collective, group: Any, operands: list[np.ndarray], results: tuple[np.ndarray, ...]) -> str:
    """What torch.distributed, asked for the same, says otherwise; empty where it agrees."""
    axis, size = op.along()
    x = operands[0]
    match op:
        case AllGather(dim=dim):
            found = [torch.empty_like(bits(x)) for _ in range(size)]
            dist.all_gather(found, bits(x), group=group)
            same = torch.equal(torch.cat(found, dim % x.ndim), bits(results[0]))
        case AllToAll():
            expected = torch.empty_like(bits(x))
            dist.all_to_all_single(expected, bits(x), group=group)
            same = torch.equal(expected, bits(results[0]))
        case AllToAllRows():
            *xs, send, recv = operands
            same, (out, into) = True, (counts.reshape(size, -1).sum(1).tolist() for counts in (send, recv))
            for given, result in zip(xs, results, strict=True):
                expected = torch.empty((sum(into), *bits(given).shape[1:]), dtype=torch.uint8)
                dist.all_to_all_single(expected, bits(given[by_rank(send)]), into, out, group=group)
                same &= torch.equal(expected, bits(result[by_rank(recv)]))
        case AllReduce(kind="max"):
            wide = torch.from_numpy(widen(x, np.float64).copy())
            dist.all_reduce(wide, dist.ReduceOp.MAX, group=group)
            same = np.array_equal(wide.numpy(), widen(results[0], np.float64), equal_nan=True)
        case AllReduce() | ReduceScatter():
            exact, magnitude = (torch.from_numpy(f(widen(x, np.float64)).copy()) for f in (np.asarray, np.abs))
            dist.all_reduce(exact, group=group)
            dist.all_reduce(magnitude, group=group)
            y, m = exact.numpy(), magnitude.numpy()
            if isinstance(op, ReduceScatter):
                index = dist.get_rank(group) if group is not None else 0
                y, m = (np.split(a, size, op.dim)[index] for a in (y, m))
            limit = permitted(op.brought()[0], y, FLOAT32.gamma(size - 1) * m)  # a sum of `size` terms, in any order
            rounded = dsc.backends.arrays.rounded(y, op.brought()[0].dtype)
            same = bool((np.abs(widen(results[0], np.float64) - widen(rounded, np.float64)) <= limit).all())
        case InternodeDispatch(experts=experts):  # and back: whole numbers come once from each rank that has an expert
            ids = operands[-1]
            reached = [len({e * size // experts for e in row if e >= 0}) for row in ids.tolist()]
            same = np.array_equal(results[0], x * np.array(reached, x.dtype)[:, None])
        case _:
            return f"no oracle for {op.name}"
    return "" if same else f"{op.signature} differs from torch.distributed along {axis}"


def beside(expected: tuple[np.ndarray, ...], found: tuple[np.ndarray, ...]) -> str:
    """What differs in the bits of the Triton backend, where a ragged value has all the rows that there is room for."""
    same = all(x.tobytes() == y[: len(x)].tobytes() for x, y in zip(expected, found, strict=True))
    return "" if same else "Triton differs from the reference"


def stages(world: TorchWorld, x: np.ndarray) -> Program[np.ndarray]:
    """x goes down the pipeline, each stage adding 1, and back up."""
    size, index = world.mesh.size("pp"), world.mesh.index("pp", world.rank)
    if index > 0:
        (x,) = yield Receive("pp", size, (x,), index - 1)
    x = x + 1
    if index < size - 1:
        yield Send("pp", size, (x,), index + 1)
        (x,) = yield Receive("pp", size, (x,), index + 1)
    if index > 0:
        yield Send("pp", size, (x,), index - 1)
    return x


def main() -> None:
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    world: TorchWorld | None = None
    while True:
        text, inputs = pickle.load(sys.stdin.buffer)
        if text == "stop":
            break
        module = dsc.parse(text)
        if world is None:
            world = TorchWorld(mesh_of(module), timeout=30.0)
        world.mesh = mesh_of(module)
        if not module.main.ops:
            answer: Any = ((world.run(stages(world, inputs[world.rank][0])),), "")
        else:
            op = module.main.ops[0]
            assert isinstance(op, Collective)
            members = world.mesh.group(op.along()[0], world.rank)
            results = world.run(backends.get("numpy").program(module, None, inputs[world.rank]))
            if members not in GROUPS:
                GROUPS[members] = dist.new_group(list(members), use_local_synchronization=True)
            on_triton = world.run(TRITON.program(module, no_weights, inputs[world.rank])) if TRITON else results
            wrong = verdict(op, GROUPS[members], list(inputs[world.rank]), results)
            answer = (results, wrong or beside(results, on_triton))
        pickle.dump(answer, answers)
        answers.flush()
    if world is not None:
        world.__exit__(None, None, None)


if __name__ == "__main__":
    main()
