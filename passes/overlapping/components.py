"""The components of a layer: attention, dispatch, MLP and combine, in the backward pass the two that compute in an input and a weight part.

They are told by what depends on what, not by names. An exchange of rows that experts' products depend on brings rows in: dispatch in the
forward pass, the gradient of combine in the backward pass; what ranks first tell each other about it belongs to it. One that depends on
them, or on an exchange that brings rows in, takes rows out. What the former need comes before, what depends on the former and what depends
on neither (a shared expert) belongs to the MLP, and the rest comes after. Weight gradients of the MLP are those that do not wait for the
exchange out; what is run again belongs to its first reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...ir.core import Op, Phase
from ...ir.ops.collective import RowExchange
from ...ir.ops.linalg import GroupedMatmul
from ...ir.ops.quant import GroupedScaledMatmul
from .tasks import Task

Component = Literal["attention", "dispatch", "mlp", "combine"]
Part = Literal["F", "B", "W"]
PRODUCTS = (GroupedMatmul, GroupedScaledMatmul)


@dataclass(frozen=True)
class Block:
    """A component and the part of the training step that it is of: F, B for the gradients of inputs, W for those of weights."""

    component: Component
    part: Part

    def __str__(self) -> str:
        return f"{self.component}({self.part})"


def blocks(tasks: Sequence[Task], parts: Mapping[Op, bool]) -> list[Block] | None:
    """The block of each task; `parts` says which ops are of the backward chunk. None where no rows are exchanged for experts."""
    found: list[Block | None] = [None] * len(tasks)
    for backward in (False, True):
        chunk = [i for i, task in enumerate(tasks) if parts[task.op] is backward]
        if chunk and not _assign(tasks, chunk, backward, found):
            return None
    return [block for block in found if block is not None]


def _assign(tasks: Sequence[Task], chunk: Sequence[int], backward: bool, found: list[Block | None]) -> bool:
    inside = set(chunk)
    behind = _closure(tasks, chunk, inside)
    products = {i for i in chunk if isinstance(tasks[i].op, PRODUCTS) and tasks[i].op.phase is not Phase.W}
    exchanges = [i for i in chunk if isinstance(tasks[i].op, RowExchange)]
    bringing = {i for i in exchanges if any(i in behind[p] for p in products)}
    taking = {i for i in exchanges if i not in bringing}
    if not bringing or not taking:
        return False
    part: Part = "B" if backward else "F"
    first: Component = "combine" if backward else "dispatch"
    last: Component = "dispatch" if backward else "combine"
    needed = set().union(*(behind[i] for i in bringing))  # by what brings rows in
    axis = tasks[min(bringing)].op.attributes["axis"].split(".")[0]
    told = {i for i in needed if tasks[i].sends and tasks[i].op.attributes["axis"].split(".")[0] == axis}
    readers = {j: i for i in reversed(chunk) for j in tasks[i].after}
    for i in reversed(chunk):
        after_in, after_out = not bringing.isdisjoint(behind[i]), not taking.isdisjoint(behind[i])
        if tasks[i].op.phase is Phase.W:
            found[i] = Block("attention" if after_out else "mlp", "W")
        elif tasks[i].op.phase is Phase.R and i in readers:
            found[i] = found[readers[i]]
        elif i in bringing or i in told or (i in needed and (after_in or not told.isdisjoint(behind[i]))):
            found[i] = Block(first, part)
        elif i in taking:
            found[i] = Block(last, part)
        elif after_out:
            found[i] = Block("attention" if backward else "combine", part)
        elif after_in or i not in needed:
            found[i] = Block("mlp", part)
        else:
            found[i] = Block("mlp" if backward else "attention", part)
    return True


def _closure(tasks: Sequence[Task], chunk: Sequence[int], inside: set[int]) -> dict[int, set[int]]:
    """All that each task depends on, within its chunk."""
    behind: dict[int, set[int]] = {}
    for i in chunk:
        behind[i] = set()
        for j in tasks[i].after:
            if j in inside:
                behind[i] |= {j} | behind[j]
    return behind


PUBLISHED = (
    Block("combine", "B"),
    Block("attention", "F"),
    Block("dispatch", "F"),
    Block("mlp", "B"),
    Block("dispatch", "B"),
    Block("mlp", "W"),
    Block("mlp", "F"),
    Block("combine", "F"),
    Block("attention", "B"),
    Block("attention", "W"),
)
"""The order of a forward and a backward chunk of one layer (deepseek-ai/profile-data, train.json): each exchange where it begins.

    comm:  combine(B)  | dispatch(F) -> dispatch(B)    | combine(F)
    comp:  attn(F)     | mlp(B) -> mlp(W) -> mlp(F)    | attn(B) -> attn(W)
"""


def published(tasks: Sequence[Task], found: Sequence[Block]) -> tuple[int, ...]:
    """The published order: block by block, each with what it needs that none before it had. What waits for the last exchange is last."""
    order: list[int] = []
    taken: set[int] = set()

    def take(i: int) -> None:
        if i not in taken:
            taken.add(i)
            for j in tasks[i].after:
                take(j)
            order.append(i)

    for block in PUBLISHED:
        for i, other in enumerate(found):
            if other == block and (tasks[i].sends or block.component in ("attention", "mlp")):
                take(i)
    for i in range(len(tasks)):
        take(i)
    return tuple(order)
