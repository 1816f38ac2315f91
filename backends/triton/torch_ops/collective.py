"""Collectives in torch, on tensors that stay where they are: what a rank sends, and what it makes of what comes.

Reductions add up in the order of the ranks, in float32, and round once. Each is a program that asks the other ranks
(`distributed/world.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ....distributed.world import Exchange, Gather, Index, Program, Settle
from ....ir.errors import require
from ....ir.ops import collective as ops
from ....ir.ops.internode import Internode, InternodeCombine, InternodeDispatch, InternodeRedispatch
from ...eager import hop_by_hop
from ...rows import by_rank, rows_of_each
from ..tensors import Held, plain, rounded, widen
from .elementwise import larger
from .registry import COLLECTIVES, collective, compute_dtype, run, torch_op

Tensor = torch.Tensor


def _concat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat([plain(x) for x in parts], dim).view(parts[0].dtype)


def _to(order: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if order is None else torch.from_numpy(order).to(device)


@torch_op(ops.Done)
def done(op: ops.Done, *xs: Tensor) -> Any:
    return xs if len(xs) > 1 else xs[0]


@collective(ops.AllGather)
def all_gather(op: ops.AllGather, x: Tensor) -> Program[Tensor]:
    return _concat((yield Gather(op.axis, op.size, x)), op.dim)


@collective(ops.ReduceScatter)
def reduce_scatter(op: ops.ReduceScatter, x: Tensor) -> Program[Tensor]:
    return (yield from _reduced(op, plain(x).chunk(op.size, op.dim), x.dtype))


@collective(ops.AllReduce)
def all_reduce(op: ops.AllReduce, x: Tensor) -> Program[Tensor]:
    """Each rank reduces one of `size` equal parts, the last filled up with zeros, and gathers the others'."""
    flat = plain(x).new_zeros(-(-x.numel() // op.size) * op.size)
    flat[: x.numel()] = plain(x).reshape(-1)
    total = yield from _reduced(op, flat.chunk(op.size), x.dtype)
    return _concat((yield Gather(op.axis, op.size, total)))[: x.numel()].reshape(x.shape)


def _reduced(op: ops.ReduceScatter | ops.AllReduce, parts: Sequence[Tensor], dtype: torch.dtype) -> Program[Tensor]:
    """The sum, or the largest, of what all ranks have in this rank's place."""
    messages = tuple((part.contiguous().view(dtype),) for part in parts)
    found = yield Exchange(op.axis, op.size, messages, ((tuple(parts[0].shape),),) * op.size)
    together = larger if isinstance(op, ops.AllReduce) and op.kind == "max" else torch.add
    terms = [widen(x, compute_dtype(op)) if op.x.dtype.is_float else x for (x,) in found]
    total = terms[0]
    for x in terms[1:]:
        total = together(total, x)
    return rounded(total, op.x.dtype) if op.x.dtype.is_float else total


@collective(ops.OwnPart)
def own_part(op: ops.OwnPart, x: Tensor) -> Program[Tensor]:
    index = yield Index(op.axis, op.size)
    return plain(x).chunk(op.size, op.dim)[index].contiguous().view(x.dtype)


@collective(ops.AllToAll)
def all_to_all(op: ops.AllToAll, x: Tensor) -> Program[Tensor]:
    parts = plain(x).chunk(op.size)
    found = yield Exchange(op.axis, op.size, tuple((part.view(x.dtype),) for part in parts), ((tuple(parts[0].shape),),) * op.size)
    return _concat([part for (part,) in found])


@collective(ops.AllToAllRows)
def all_to_all_rows(op: ops.AllToAllRows, *operands: Tensor) -> Program[Any]:
    """A result has all the rows that `rows` has room for, those that did not arrive zero: here a ragged value always has its bound's.

    How many rows go where the host has to know, and so it waits for the counts: no library takes them from the device.
    """
    *xs, given, taken = operands
    if given.is_cuda:
        yield Settle()
    given, taken = given.cpu(), taken.cpu()
    send, recv = given.tolist(), taken.tolist()
    leaving, coming = int(given.sum()), int(taken.sum())
    room = op.rows if isinstance(op.rows, int) else op.rows.bound
    require(bool((given >= 0).all() and (taken >= 0).all()), f"send is {send} and recv {recv}, expected no negative number")
    require(leaving <= len(xs[0]), f"send is {send}, {leaving} rows in all, but there are {len(xs[0])}")
    require(coming <= room, f"{coming} rows arrive, but there is room for {room}: {op.rows}")
    require(coming == room or not isinstance(op.rows, int), f"{coming} rows arrive, expected {room}")
    leave, come = rows_of_each(given.numpy()), rows_of_each(taken.numpy())
    sorting, sorted_by = (_to(by_rank(counts.numpy()), xs[0].device) for counts in (given, taken))
    messages = zip(*[(x[:leaving] if sorting is None else plain(x)[sorting].view(x.dtype)).split(leave) for x in xs], strict=True)
    shapes = tuple(tuple((count, *x.shape[1:]) for x in xs) for count in come)
    found = yield Exchange(op.axis, op.size, tuple(messages), shapes)
    results = []
    for parts in zip(*found, strict=True):
        result = plain(parts[0]).new_zeros((room, *parts[0].shape[1:]))
        if sorted_by is None:
            torch.cat([plain(part) for part in parts], out=result[:coming])
        else:
            result[sorted_by] = plain(_concat(parts))
        results.append(result.view(parts[0].dtype))
    return tuple(results) if len(results) > 1 else results[0]


@collective(InternodeDispatch, InternodeCombine, InternodeRedispatch)
def over_nodes(op: Internode, *operands: Held) -> Program[Any]:
    """An exchange over nodes, hop by hop."""
    return hop_by_hop(op, operands, run, lambda inner, *given: COLLECTIVES[type(inner)](inner, *given))
