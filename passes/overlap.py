"""Communication under computation: collectives that are in flight while something else is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from ..hardware.cluster import Cluster, cluster
from ..hardware.cost import Costs
from ..hardware.streams import Costing
from ..ir.core import Func, Module, Symbol, callees_first
from ..ir.errors import require
from ..ir.expected import IMBALANCE, mean_rows
from ..ir.flight import axes
from ..ir.stages import BACKWARDS, FORWARD, OVERLAPPED, is_staged, stages_of
from ..ir.verify import stage_index
from .manager import Pass, register
from .overlapping.chunks import BACKWARD, interleaved, together
from .overlapping.merge import Groups
from .overlapping.schedule import ordered
from .simplify import reached

GB = 10**9


@register
@dataclass(frozen=True)
class Overlap(Pass):
    """Start collectives early, wait for them late, and compute what does not depend on them meanwhile.

    Every function that communicates is put into the quickest order that is found, by what its ops take on `cluster` and with at most
    `memory-gb` of values alive in it (10^9 bytes, those of the caller and weights apart). The orders looked at are the program's own, with
    collectives as they stand and with collectives started where they stand, those of list scheduling by several priorities, every order
    where there are few ops, and for a forward and a backward chunk the published one. So the result is never slower, by the model.

    `repeats` says how often the program runs before weights change: casts of weights, which a step does once, count that much less.

    `microbatches=2` is for inference: main takes and returns twice what it did, for two micro-batches of which one computes while the other
    communicates. In a program that is cut into stages of a pipeline the forward pass of a stage and the backward pass of the one as far
    from the other end, which DualPipe and DualPipeV run side by side, become one function, layer by layer.

    Before `overlap{cluster=h800}`:

        module { stage=sharded, mesh={pp=1, dp=2, ep=2, tp=1, node=8} }

        func @shared_expert(%x: bf16[4096, 7168], %w: bf16[7168, 7168]) {
          %y: bf16[4096, 7168] = all_to_all(%x, axis="ep", size=2)  @ moe#1 F
          %s: bf16[4096, 7168] = matmul(%x, %w)  @ moe#2 F
          %z: bf16[4096, 7168] = add(%y, %s)  @ moe#3 F
          return %z
        }

    after:

        module { stage=scheduled, mesh={pp=1, dp=2, ep=2, tp=1, node=8} }

        func @shared_expert(%x: bf16[4096, 7168], %w: bf16[7168, 7168]) {
          %y: async bf16[4096, 7168] = all_to_all(%x, axis="ep", size=2, start=true)  @ moe#1.1 F
          %s: bf16[4096, 7168] = matmul(%x, %w)  @ moe#2 F
          %y_1: bf16[4096, 7168] = done([%y])  @ moe#1 F
          %z: bf16[4096, 7168] = add(%y_1, %s)  @ moe#3 F
          return %z
        }
    """

    name: ClassVar[str] = "overlap"
    requires: ClassVar[str] = "sharded..lowered"
    ensures: ClassVar[str | None] = "scheduled"
    cluster: str = "h800"
    memory_gb: float | None = None
    microbatches: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        cluster(self.cluster)
        require(self.memory_gb is None or self.memory_gb > 0, f"memory-gb is {self.memory_gb}, expected more than 0")
        require(self.microbatches in (1, 2), f"microbatches is {self.microbatches}, expected 1 or 2")
        require(self.repeats >= 1, f"repeats is {self.repeats}, expected 1 or more")

    def __call__(self, module: Module) -> Module:
        require(self.microbatches == 1 or not is_staged(module), "microbatches=2 is for a program that is not cut into stages")
        cap = inf if self.memory_gb is None else self.memory_gb * GB
        made = overlapped(module, costing_of(module, self.cluster, repeats=self.repeats), cap, self.microbatches)
        for func, over in made.over.items():
            self.decline(made.module[func], made.module[func].ops[0], f"no order was found that keeps under memory-gb, by {over} bytes")
        return made.module


@dataclass(frozen=True)
class Overlapped:
    """A module in its order, and by how many bytes functions are over the cap on memory that no order kept."""

    module: Module
    over: Mapping[str, int]


def overlapped(module: Module, costing: Costing, cap: float = inf, microbatches: int = 1) -> Overlapped:
    """What the pass does, by durations from anywhere: those of the cost model, or measured ones."""
    groups = Groups(module)
    if microbatches == 2:
        module = _doubled(module, groups)
    elif is_staged(module):
        module = _joined(module, groups)
    over: dict[str, int] = {}
    for name in [func.name for func in callees_first(module)]:
        func = module[name]
        tags = groups.parts.get(name)
        backward = {op: tags[op] == BACKWARD for op in func.ops} if tags and BACKWARD in tags.values() else None
        found = ordered(module, func, costing, cap, backward)
        if found.over:
            over[name] = found.over
        if found.func is not func:
            module = module.map(lambda old, func=func, new=found.func: new if old is func else old)  # type: ignore[misc]
    return Overlapped(module.replace(stage=max(module.stage, "scheduled", key=stage_index)), over)


def costing_of(module: Module, where: str | Cluster, **given: Any) -> Costing:
    """What the ops of a program take on a rank of a cluster; of exchanged rows as many count as are expected on the fullest rank, for which
    the others wait. `given` says else (`Costs`)."""
    where = cluster(where) if isinstance(where, str) else where
    more = given.setdefault("imbalance", float(IMBALANCE))
    given = {"rows": {ragged: extent * more for ragged, extent in mean_rows(module).items()}} | given
    return Costing(Costs.of(module, where, **given), Costs.of(module, where, overlap=True, **given))


def _joined(module: Module, groups: Groups) -> Module:
    """A forward and a backward chunk as one function for each stage and the one as far from the other end: a rank of DualPipe and DualPipeV
    has both. The record `overlapped` says which function is which two (ir/stages.py).
    """
    stages = stages_of(module)
    if not stages.backwards:
        return module
    made: list[Func] = []
    records: list[dict[str, Symbol]] = []
    for first, calls in enumerate(stages.calls):
        others = stages.calls[len(stages) - 1 - first]
        forward, back = calls.get(FORWARD), [others[role] for role in BACKWARDS if role in others]
        if forward is None or not back or not all(axes(module, call) for call in (forward, back[0])):
            continue
        name = f"{forward.callee}__{back[0].callee}"
        handed = {at: back[0].results.index(v) for at, v in enumerate(back[-1].args) if v.owner is back[0]}
        made.append(together(groups, name, module[forward.callee], [module[call.callee] for call in back], handed))
        weight = {"weight": back[1].callee} if len(back) > 1 else {}
        records.append({"forward": forward.callee, "backward": back[0].callee, **weight, "as": Symbol(name)})
    if not records:
        return module
    return groups.module.replace(
        funcs=(*groups.module.funcs, *groups.funcs, *made), attributes={**module.attributes, OVERLAPPED: tuple(records)}
    )


def _doubled(module: Module, groups: Groups) -> Module:
    main = interleaved(groups)
    module = groups.module.replace(funcs=(main, *groups.module.funcs[1:], *groups.funcs))
    for key in ("inputs", "results"):
        if key in module.attributes:
            module = module.replace(attributes={**module.attributes, key: module.attributes[key] * 2})
    return reached(module)
