"""The executor: runs a module as its plan says, each op as a kernel, a torch function or a view, in one arena.

On a machine without a GPU the kernels run in Triton's interpreter, on tensors in host memory, and otherwise nothing differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from weakref import WeakKeyDictionary

import torch

from ...ir.core import Func, Module, Op, Value
from ...ir.errors import DscError, require
from ...ir.ops.control import Constant, Param
from ...ir.types import Bundle, Tensor, Type
from ...ir.walk import join
from .. import Observer, Site, Weights
from ..arrays import Array, Data, describe, fits
from . import INTERPRET, torch_ops
from .launch import start
from .memory import aligned
from .program import Buffer, FunctionPlan, Plans, Step, flat, plan_function, total_bytes
from .registry import Slot
from .targets import INTERPRETED, Target, this_gpu
from .tensors import Held, from_numpy, to_numpy
from .torch_ops.shape import plain


@cache
def machine() -> tuple[Target, torch.device]:
    """What kernels are planned for here, and where tensors lie. Says so where they are interpreted."""
    if INTERPRET:
        print("dsc: no GPU: Triton kernels run in its interpreter, on the CPU", file=sys.stderr)
        return INTERPRETED, torch.device("cpu")
    return this_gpu(), torch.device("cuda")


@dataclass(frozen=True)
class Executor:
    """The Triton backend. With `poison` a buffer is overwritten after its last use, so that a read of dead memory shows."""

    poison: bool = False
    prepared: WeakKeyDictionary[Module, Plans] = field(default_factory=WeakKeyDictionary, compare=False, repr=False)

    def run(self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None) -> tuple[Data, ...]:
        """What the main function gives for `inputs`. `DscError` where an input or a weight is not what the program declares."""
        main = module.main
        takes = f"@{main.name} takes {len(main.params)} inputs"
        require(len(inputs) == len(main.params), f"{takes} ({', '.join(map(repr, main.params))}), found {len(inputs)}")
        for param, given in zip(main.params, inputs, strict=True):
            require(fits(given, param.type), f"parameter %{param.name} of @{main.name}: expected {param.type}, found {describe(given)}")
        target, device = machine()
        held = tuple(from_numpy(given, param.type, device) for param, given in zip(main.params, inputs, strict=True))
        plan = plan_function(module, main, _metas(held), target, self.prepared.setdefault(module, {}))
        arena = torch.empty(total_bytes(plan), dtype=torch.uint8, device=device)
        returned, offset = [], plan.bytes
        for i in plan.returned:
            returned.append(offset)
            offset += aligned(plan.buffers[i].bytes)
        execution = _Execution(module, weights, observe, device, arena, self.poison)
        results = execution.call(plan, "", held, 0, tuple(returned))
        return tuple(to_numpy(x, v.type) for x, v in zip(results, main.results, strict=True))

    def evaluate(self, op: Op, operands: Sequence[Data]) -> tuple[Data, ...]:
        """The results of one op. `DscError` for `param`, `constant` and `call`, which need a module."""
        require(type(op) in torch_ops.TORCH, f"{op.name} has no meaning outside a module")
        given = dict(zip(op.operands, operands, strict=True))
        module = Module((Func("evaluate", tuple(given), (op,), op.results),))
        return self.run(module, _no_weights, tuple(given.values()))


TRITON = Executor()


def _no_weights(name: str, type: Tensor) -> Array:
    raise DscError(f"weight {name} of type {type}: a single op has none")


def _metas(held: Held) -> Held:
    return tuple(map(_metas, held)) if isinstance(held, tuple) else held.to("meta") if held.is_contiguous() else _strided_meta(held)


def _strided_meta(held: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")


def _offset(buffer: torch.Tensor) -> int:
    """Bytes from the start of the arena; of an empty tensor, too, whose address is 0."""
    return int(buffer.storage_offset()) * buffer.element_size()


@dataclass(frozen=True)
class _Execution:
    """One run of a module. Offsets are in bytes from the start of the arena."""

    module: Module
    weights: Weights
    observe: Observer | None
    device: torch.device
    arena: torch.Tensor
    poison: bool
    bound: dict[tuple[int, int, tuple[int, ...]], tuple[torch.Tensor, ...]] = field(default_factory=dict)
    """The buffers of a plan as tensors, by where its arena and what it returns lie: the same for every layer of a model."""
    constants: dict[Op, torch.Tensor] = field(default_factory=dict)

    def bind(self, plan: FunctionPlan, base: int, returned: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        key = (id(plan), base, returned)
        if key not in self.bound:
            where = {i: base + offset for i, offset in plan.offsets.items()} | dict(zip(plan.returned, returned, strict=True))
            self.bound[key] = tuple(self.tensor(buffer, where[i]) for i, buffer in enumerate(plan.buffers))
        return self.bound[key]

    def tensor(self, buffer: Buffer, offset: int) -> torch.Tensor:
        return self.arena[offset : offset + buffer.bytes].view(buffer.dtype).view(buffer.shape)

    def call(self, plan: FunctionPlan, prefix: str, arguments: Sequence[Held], base: int, returned: tuple[int, ...]) -> tuple[Held, ...]:
        """The results of a function; the arena of its own buffers begins at `base`, those that it returns at `returned`."""
        buffers = self.bind(plan, base, returned)
        values: dict[Value, Held] = dict(zip(plan.func.params, arguments, strict=True))
        for index, step in enumerate(plan.steps):
            operands = tuple(values[v] for v in step.op.operands)
            if step.callee is not None:
                inside = join(prefix, step.op.attributes["weights"])
                space, *given = (_offset(buffers[i]) for i in (*step.workspace, *step.results))
                results = self.call(step.callee, inside, operands, space, tuple(given))
            else:
                results = self.execute(plan, prefix, step, operands, buffers)
            values.update(zip(step.op.results, results, strict=True))
            if self.poison:
                for i in plan.offsets:
                    if plan.buffers[i].stop == index:
                        buffers[i].view(-1).view(torch.uint8).fill_(0xFF)
        return tuple(values[v] for v in plan.func.results)

    def execute(
        self, plan: FunctionPlan, prefix: str, step: Step, operands: tuple[Held, ...], buffers: tuple[torch.Tensor, ...]
    ) -> tuple[Held, ...]:
        """The results of one op, as the observer leaves them."""
        site = Site(plan.func.name, prefix, step.op.id)
        try:
            results = self.compute(prefix, step, operands, buffers)
        except (DscError, RuntimeError, IndexError) as error:
            raise DscError(f"{site}: {step.op.name}: {error}") from None
        if self.observe is None:
            return results
        shown = tuple(to_numpy(x, v.type) for x, v in zip(operands, step.op.operands, strict=True))
        found = tuple(to_numpy(x, v.type) for x, v in zip(results, step.op.results, strict=True))
        replaced = self.observe(site, step.op, shown, found)
        if replaced is None:
            return results
        for value, given in zip(step.op.results, replaced, strict=True):
            require(fits(given, value.type), f"%{value.name}: expected {value.type}, found {describe(given)}")
        return tuple(from_numpy(x, v.type, self.device) for x, v in zip(replaced, step.op.results, strict=True))

    def compute(self, prefix: str, step: Step, operands: tuple[Held, ...], buffers: tuple[torch.Tensor, ...]) -> tuple[Held, ...]:
        if step.how == "source":
            return (self.source(prefix, step.op),)
        if step.how == "view":
            return torch_ops.run(step.op, operands)
        places = [buffers[i] for i in step.results]
        if step.how == "kernel":
            tensors = list(flat(operands))
            for i, copy in step.copies:
                plain(buffers[copy]).copy_(plain(tensors[i]))
                tensors[i] = buffers[copy]
            workspace = [buffers[i] for i in step.workspace]
            held = {"operand": tensors, "result": places, "workspace": workspace}

            def tensor(slot: Slot) -> torch.Tensor:
                return held[slot.kind][slot.index]

            for launch in step.launches:
                start(launch, tensor)
        else:
            for place, made in zip(places, flat(torch_ops.run(step.op, operands)), strict=True):
                plain(place).copy_(plain(made))
        rest = iter(places)
        return tuple(_like(v.type, rest) for v in step.op.results)

    def source(self, prefix: str, op: Op) -> torch.Tensor:
        """A weight, fetched now, or a constant, made at its first use."""
        expected = op.result.tensor
        if isinstance(op, Param):
            name = join(prefix, op.path)
            found = self.weights(name, expected)
            require(fits(found, expected), f"weight {name}: expected {expected}, found {describe(found)}")
            weight: torch.Tensor = from_numpy(found, expected, self.device)
            return weight
        if op not in self.constants:
            if isinstance(op, Constant):
                require(op.path in self.module.constants, f"the module has no constant {op.path!r}")
                found = self.module.constants[op.path]
                require(fits(found, expected), f"constant {op.path}: expected {expected}, found {describe(found)}")
                self.constants[op] = from_numpy(found, expected, self.device)
            else:
                self.constants[op] = torch_ops.run(op, ())[0].to(self.device)
        return self.constants[op]


def _like(type: Type, places: Iterator[torch.Tensor]) -> Held:
    """The next of `places` for each tensor of a value."""
    return tuple(_like(field, places) for field in type.fields) if isinstance(type, Bundle) else next(places)
