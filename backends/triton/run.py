"""The executor: runs a module as its plan says, each op as a kernel, a torch function or a view, in one arena.

On a machine without a GPU the kernels run in Triton's interpreter, on tensors in host memory, and otherwise nothing differs. On one rank of
many the run is a program (`distributed/world.py`) that asks the others with tensors where they lie.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...distributed.world import Program, Settle, alone
from ...ir.core import Module, Op
from ...ir.errors import DscError, require
from ...ir.ops.fused import alone as alone_of
from ...ir.types import Tensor, Type
from .. import Observer, Weights
from ..arrays import Array, Data
from ..eager import check_inputs
from . import INTERPRET, torch_ops
from .aot import jobs_of
from .launch import Scratch
from .machine_code import MachineCode
from .memory import aligned
from .prepared import Prepared, Walk
from .program import FunctionPlan, Plans, plan_function, total_bytes
from .streams import Streams, streams_here
from .targets import INTERPRETED, Target, this_gpu
from .tensors import Held, copied, empty, from_numpy, is_held, to_numpy
from .torch_ops.registry import WAITS
from .tuned import tuned_here


@cache
def machine() -> tuple[Target, torch.device]:
    """What kernels are planned for here, and where tensors lie. Says so where they are interpreted."""
    if INTERPRET:
        if os.environ.get("RANK", "0") == "0":
            print("dsc: no GPU: Triton kernels run in its interpreter, on the CPU", file=sys.stderr)
        return INTERPRETED, torch.device("cpu")
    return replace(this_gpu(), tuned=tuned_here()), torch.device("cuda")


@dataclass(frozen=True)
class Executor:
    """The Triton backend.

    poison  overwrite a buffer after its last use, so that a read of dead memory shows
    graphs  on a GPU, replay a prepared program as a CUDA graph from its second run on, where no op waits for the host
    tuned   tiles in place of those chosen by shape, and of those that a file gives (tune.py)
    streams what orders computation and communication, of each program that is prepared
    code    machine code for the GPU
    kept    what has been prepared and does not run, for as long as both the weights and the module are in use elsewhere
    """

    poison: bool = False
    graphs: bool = True
    tuned: Mapping[str, Any] | None = None
    streams: Callable[[], Streams] = streams_here
    code: MachineCode = field(default_factory=MachineCode, compare=False, repr=False)
    plans: WeakKeyDictionary[Module, Plans] = field(default_factory=WeakKeyDictionary, compare=False, repr=False)
    kept: WeakKeyDictionary[Weights, WeakKeyDictionary[Module, dict[Any, list[Prepared]]]] = field(
        default_factory=WeakKeyDictionary, compare=False, repr=False
    )

    def with_kernels(self, folder: Path) -> Executor:
        """An executor that takes machine code from an artifact's `kernels/` where it fits."""
        return replace(self, code=MachineCode(folder))

    def prepares(self, module: Module) -> str:
        """The pipeline to run before: ops that make one kernel are fused, unless that has been done."""
        return "" if module.stage == "lowered" else "fuse"

    def run(self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None) -> tuple[Data, ...]:
        """What the main function gives for `inputs`. `DscError` where an input or a weight is not what the program declares.

        A function `weights` stands for the same arrays as long as it lives: with the same one, the same module and the same shapes again,
        the weights and buffers that are on the device already are used, unless an observer is to see the ops.
        """
        return alone(self.program(module, weights, inputs, observe))

    def program(
        self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None
    ) -> Program[tuple[Data, ...]]:
        """`run` on one rank of many: a program that asks the others where a collective stands."""
        return (yield from self._program(module, weights, inputs, observe, fetch=True))

    def resident(
        self, module: Module, weights: Weights, inputs: Sequence[Held], observe: Observer | None = None
    ) -> Program[tuple[Held, ...]]:
        """`program` that leaves its results on the device, in memory of their own, and takes inputs that lie there."""
        return (yield from self._program(module, weights, inputs, observe, fetch=False))

    def empty(self, type: Type) -> Held:
        """Memory on the device for what `resident` takes."""
        return empty(type, machine()[1])

    def fetched(self, held: Held, type: Type) -> Data:
        """What `resident` returned, on the host."""
        return to_numpy(held, type)

    def _program(
        self, module: Module, weights: Weights, inputs: Sequence[Any], observe: Observer | None, *, fetch: bool
    ) -> Program[tuple[Any, ...]]:
        """The results on the host with `fetch`, else on the device."""
        check_inputs(module.main, inputs, is_held)
        prepared, idle = None, list[Prepared]()
        if observe is not None:
            _, _, results = yield from self._walk(module, weights, inputs, observe)
        else:
            known = self.kept.setdefault(weights, WeakKeyDictionary()).setdefault(module, {})
            idle = known.setdefault(tuple(map(_shape, inputs)), [])
            prepared = idle.pop() if idle else self.prepare(module, weights, inputs)  # ranks in lockstep run one program at a time each
            prepared.take(inputs)
            yield from prepared.program()
            results = prepared.results
        if fetch:
            yield Settle()
        found = tuple(to_numpy(x, v.type) if fetch else copied(x) for x, v in zip(results, module.main.results, strict=True))
        if prepared is not None:
            idle.append(prepared)
        return found

    def prepare(self, module: Module, weights: Weights, inputs: Sequence[Data]) -> Prepared:
        """The module made ready to run on inputs of the shapes of these: kernels compiled, weights and one arena on the device."""
        check_inputs(module.main, inputs, is_held)
        plan, walk, results = alone(self._walk(module, weights, inputs, None))
        waits = any(step.how == "together" or (step.how == "torch" and type(step.op) in WAITS) for step in plan.all_steps())
        return Prepared(
            module.main.params,
            tuple(v.type for v in module.main.results),
            walk.inputs,
            results,
            walk.actions,
            walk.labels,
            walk.scratch,
            self.graphs and not INTERPRET and not waits,
            (walk.arena, *walk.constants.values()),
            walk.fetched,
        )

    def evaluate(self, op: Op, operands: Sequence[Data]) -> tuple[Data, ...]:
        """The results of one op. `DscError` for `param`, `constant` and `call`, which need a module."""
        require(type(op) in torch_ops.TORCH, f"{op.name} has no meaning outside a module")
        return self.run(alone_of(op), no_weights, tuple(dict(zip(op.operands, operands, strict=True)).values()))

    def _walk(
        self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None
    ) -> Program[tuple[FunctionPlan, Walk, tuple[Held, ...]]]:
        """The plan, the way through it, and the results: computed with an observer, else where they are going to lie."""
        target, device = machine()
        if self.tuned is not None:
            target = replace(target, tuned=self.tuned)
        held = tuple(from_numpy(given, param.type, device) for param, given in zip(module.main.params, inputs, strict=True))
        if observe is None:
            held = tuple(map(_own, held))
        plan = plan_function(module, module.main, _metas(held), target, self.plans.setdefault(module, {}))
        if not INTERPRET:
            self.code.obtain(list(jobs_of(plan, target)))
        arena = torch.empty(total_bytes(plan), dtype=torch.uint8, device=device)
        returned, offset = [], plan.bytes
        for i in plan.returned:
            returned.append(offset)
            offset += aligned(plan.buffers[i].bytes)
        scratch = Scratch(device)
        walk = Walk(module, weights, observe, device, target, self.code.load, scratch, self.streams(), arena, self.poison, held)
        return plan, walk, (yield from walk.call(plan, "", held, 0, tuple(returned)))


TRITON = Executor()


def no_weights(name: str, type: Tensor) -> Array:
    raise DscError(f"weight {name} of type {type}: a single op has none")


def _shape(given: Data) -> Any:
    return tuple(map(_shape, given)) if isinstance(given, tuple) else given.shape


def _own(held: Held) -> Held:
    """Memory of the same layout, for the inputs of each run."""
    return tuple(map(_own, held)) if isinstance(held, tuple) else torch.empty_like(held)


def _metas(held: Held) -> Held:
    return tuple(map(_metas, held)) if isinstance(held, tuple) else held.to("meta")
