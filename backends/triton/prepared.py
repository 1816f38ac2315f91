"""A program made ready to run again and again: buffers bound, weights where the kernels read them, launches prepared.

`Walk` goes through a plan once and turns every op into actions, functions without arguments, or programs that ask other ranks. Without
an observer they are collected into a `Prepared`, whose run is nothing but those; with one each is done at once, and the observer sees it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...distributed.world import Program, alone
from ...ir.core import Module, Op, Value
from ...ir.errors import DscError, require
from ...ir.ops.collective import Collective, Done, Transfer
from ...ir.ops.control import Constant, Param
from ...ir.types import Bundle, Type
from ...ir.walk import join
from .. import Observer, Site, Weights
from ..arrays import Data, describe, fits
from . import torch_ops
from .launch import Action, Load, Scratch, bind
from .program import Buffer, FunctionPlan, Planned, Step, flat
from .registry import Slot
from .streams import Streams
from .targets import Target
from .tensors import Held, from_numpy, plain, to_numpy
from .together import Ask, Together
from .torch_ops.registry import INTO


@dataclass(eq=False)
class Prepared:
    """A program on inputs of one layout, with its memory: copies of the inputs, weights, one arena. It runs one call at a time.

    inputs, results  where they lie: for who has data on the device already, between calls of `execute`
    actions, labels  what runs, in order, and the op that each belongs to
    scratch          what kernels write down for themselves
    graphed          whether a GPU may replay the whole as one CUDA graph, recorded at the second run
    memory           what else the actions read, kept alive
    weights          by name, where the actions read them
    """

    params: tuple[Value, ...]
    types: tuple[Type, ...]
    inputs: tuple[Held, ...]
    results: tuple[Held, ...]
    actions: list[Action | Ask]
    labels: list[str]
    scratch: Scratch
    graphed: bool
    memory: tuple[Any, ...]
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    graph: Any = None
    runs: int = 0

    def take(self, inputs: Sequence[Data]) -> None:
        """Bring in `inputs`, which have the types of the parameters and the shapes that were prepared for."""
        for param, held, given in zip(self.params, self.inputs, inputs, strict=True):
            copy_in(held, from_numpy(given, param.type))

    def __call__(self, inputs: Sequence[Data]) -> tuple[Data, ...]:
        """The results for `inputs`, on one rank."""
        self.take(inputs)
        self.execute()
        return tuple(to_numpy(held, type) for held, type in zip(self.results, self.types, strict=True))

    def execute(self) -> None:
        """`program` on one rank."""
        alone(self.program())

    def program(self) -> Program[None]:
        """Run on what lies in `inputs`, and leave the results in `results`. On a GPU it ends before they are there."""
        if self.graphed and self.runs == 1:  # the first run has loaded machine code and made the vendor's workspaces
            self._record()
        self.runs += 1
        if self.graph is not None:
            self.graph.replay()
        else:
            yield from self.steps()

    def launch(self) -> None:
        """`steps` on one rank."""
        alone(self.steps())

    def steps(self) -> Program[None]:
        """The actions one after the other. `DscError` names the op whose action failed."""
        self.scratch.use()
        at = 0
        try:
            for at, action in enumerate(self.actions):  # noqa: B007 - read where an action fails
                if isinstance(action, Ask):
                    yield from action.program()
                    self.scratch.use()  # another rank may have computed meanwhile
                else:
                    action()
        except (DscError, RuntimeError, IndexError) as error:
            raise DscError(f"{self.labels[at]}: {error}") from None

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.launch()
        except (DscError, RuntimeError) as error:
            print(f"dsc: no CUDA graph, each kernel is launched by itself: {error}", file=sys.stderr)
            self.graphed = False
        else:
            self.graph = graph


def copy_in(held: Held, given: Held) -> None:
    """The bytes of `given` into `held`, tensor by tensor."""
    for place, tensor in zip(flat(held), flat(given), strict=True):
        plain(place).copy_(plain(tensor), non_blocking=True)


@dataclass(frozen=True)
class Walk:
    """One way through a plan, from its main function down. Offsets are in bytes from the start of the arena."""

    module: Module
    weights: Weights
    observe: Observer | None
    device: torch.device
    target: Target
    load: Load
    scratch: Scratch
    streams: Streams
    arena: torch.Tensor
    poison: bool
    inputs: tuple[Held, ...]
    actions: list[Action | Ask] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    bound: dict[tuple[int, int, tuple[int, ...]], tuple[torch.Tensor, ...]] = field(default_factory=dict)
    """The buffers of a plan as tensors, by where its arena and what it returns lie: the same for every layer of a model."""
    constants: dict[Op, torch.Tensor] = field(default_factory=dict)
    fetched: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights by full name."""
    flights: dict[Op, Together] = field(default_factory=dict)
    """Collectives that are started and not done."""
    runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each function ran with each prefix of weights."""

    def bind(self, plan: FunctionPlan, base: int, returned: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        key = (id(plan), base, returned)
        if key not in self.bound:
            where = {i: base + offset for i, offset in plan.offsets.items()} | dict(zip(plan.returned, returned, strict=True))
            self.bound[key] = tuple(self.tensor(buffer, where[i]) for i, buffer in enumerate(plan.buffers))
        return self.bound[key]

    def tensor(self, buffer: Buffer, offset: int) -> torch.Tensor:
        return self.arena[offset : offset + buffer.bytes].view(buffer.dtype).view(buffer.shape)

    def call(
        self, plan: FunctionPlan, prefix: str, arguments: Sequence[Held], base: int, returned: tuple[int, ...]
    ) -> Program[tuple[Held, ...]]:
        """The results of a function; the arena of its own buffers begins at `base`, those that it returns at `returned`."""
        buffers = self.bind(plan, base, returned)
        self.runs[plan.func.name, prefix] += 1
        run = self.runs[plan.func.name, prefix]
        values: dict[Value, Held] = dict(zip(plan.func.params, arguments, strict=True))
        for index, step in enumerate(plan.steps):
            operands = tuple(values[v] for v in step.op.operands)
            if step.callee is not None:
                inside = join(prefix, step.op.attributes["weights"])
                space, *given = (_offset(buffers[i]) for i in step.workspace)
                results = yield from self.call(step.callee, inside, operands, space, tuple(given))
            else:
                results = yield from self.step(Site(plan.func.name, prefix, step.op.id, run), step, operands, buffers)
            values.update(zip(step.op.results, results, strict=True))
            if self.poison:
                dead = [buffers[i] for i in plan.offsets if plan.buffers[i].stop == index]
                yield from self.do(f"end of {step.op.id}", [partial(x.view(-1).view(torch.uint8).fill_, 0xFF) for x in dead])
        return tuple(values[v] for v in plan.func.results)

    def step(self, site: Site, step: Step, operands: tuple[Held, ...], buffers: tuple[torch.Tensor, ...]) -> Program[tuple[Held, ...]]:
        """The results of one op, as the observer leaves them."""
        label = f"{site}: {step.op.name}"
        with _named(label):
            results, actions = self.prepare(site, step, operands, buffers)
            yield from self.do(label, actions)
        if self.observe is None or (isinstance(step.op, Transfer) and step.op.start):  # what is on its way is seen at its end
            return results
        shown = tuple(to_numpy(x, v.type) for x, v in zip(operands, step.op.operands, strict=True))
        found = tuple(to_numpy(x, v.type) for x, v in zip(results, step.op.results, strict=True))
        replaced = self.observe(site, step.op, shown, found)
        if replaced is None:
            return results
        for value, given in zip(step.op.results, replaced, strict=True):
            require(fits(given, value.type), f"%{value.name}: expected {value.type}, found {describe(given)}")
        return tuple(from_numpy(x, v.type, self.device) for x, v in zip(replaced, step.op.results, strict=True))

    def do(self, label: str, actions: Sequence[Action | Ask]) -> Program[None]:
        """Collect the actions, or do them now where an observer is to see what they did."""
        if self.observe is not None:
            self.scratch.use()
            for action in actions:
                if isinstance(action, Ask):
                    yield from action.program()
                else:
                    action()
        else:
            self.actions.extend(actions)
            self.labels.extend([label] * len(actions))

    def prepare(
        self, site: Site, step: Step, operands: tuple[Held, ...], buffers: tuple[torch.Tensor, ...]
    ) -> tuple[tuple[Held, ...], list[Action | Ask]]:
        """Where the results of an op are going to lie, and what computes them there."""
        if step.how == "source":
            return (self.source(site.weights, step.op),), []
        if step.how == "done":
            assert isinstance(step.op, Done)
            started = step.op.started  # None where it stands by itself
            return operands, [Ask(self.flights.pop(started).done)] if started else []
        if step.how == "view" and not step.results:
            return torch_ops.run(step.op, operands), []
        places = [_placed(planned, buffers) for planned in step.results]
        if step.how == "view" and self.observe is None:  # made in its place; an observer's value lies elsewhere
            return tuple(places), []
        actions: list[Action | Ask] = []
        if step.how == "kernel":
            tensors = list(flat(operands))
            for i, copy in step.copies:
                actions.append(partial(plain(buffers[copy]).copy_, plain(tensors[i])))
                tensors[i] = buffers[copy]
            held = {"operand": tensors, "result": places, "workspace": [buffers[i] for i in step.workspace]}

            def tensor(slot: Slot) -> torch.Tensor:
                return held[slot.kind][slot.index]

            actions += [bind(launch, tensor, self.target, step.op.name, self.load) for launch in step.launches]
            if self.observe is not None and any(tensors[slot.index].stride() != slot.strides for slot in _operand_slots(step)):
                actions = [partial(_run_torch, step.op, operands, places)]  # an observer's value lies otherwise than what was planned for
        elif isinstance(step.op, Collective):
            together = Together(step.op, str(site), operands, tuple(places), self.streams)
            if isinstance(step.op, Transfer) and step.op.start:
                self.flights[step.op] = together
                actions.append(Ask(together.start))
            else:
                actions.append(Ask(together.whole))
        else:
            into = INTO.get(type(step.op))
            at_once = into(step.op, *operands, *places) if into else None
            actions.append(at_once or partial(_run_torch, step.op, operands, places))
        rest = iter(places)
        return tuple(_like(v.type, rest) for v in step.op.results), actions

    def source(self, prefix: str, op: Op) -> torch.Tensor:
        """A weight or a constant, brought to the device at its first use."""
        expected = op.result.tensor
        if isinstance(op, Param):
            name = join(prefix, op.path)
            if name not in self.fetched:
                found = self.weights(name, expected)
                require(fits(found, expected), f"weight {name}: expected {expected}, found {describe(found)}")
                self.fetched[name] = from_numpy(found, expected, self.device)
            return self.fetched[name]
        if op not in self.constants:
            if isinstance(op, Constant):
                require(op.path in self.module.constants, f"the module has no constant {op.path!r}")
                found = self.module.constants[op.path]
                require(fits(found, expected), f"constant {op.path}: expected {expected}, found {describe(found)}")
                self.constants[op] = from_numpy(found, expected, self.device)
            else:
                self.constants[op] = torch_ops.run(op, ())[0].to(self.device)
        return self.constants[op]


def _placed(planned: Planned, buffers: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A result in its buffer."""
    there = planned.meta
    assert isinstance(planned.root, int)
    return buffers[planned.root].as_strided(there.shape, there.stride(), buffers[planned.root].storage_offset() + there.storage_offset())


def _operand_slots(step: Step) -> Iterator[Slot]:
    for launch in step.launches:
        yield from (given for given in launch.arguments.values() if isinstance(given, Slot) and given.kind == "operand")


def _run_torch(op: Op, operands: tuple[Held, ...], places: Sequence[torch.Tensor]) -> None:
    for place, made in zip(places, flat(torch_ops.run(op, operands)), strict=True):
        plain(place).copy_(plain(made))


@contextmanager
def _named(label: str) -> Iterator[None]:
    try:
        yield
    except (DscError, RuntimeError, IndexError) as error:
        raise DscError(f"{label}: {error}") from None


def _offset(buffer: torch.Tensor) -> int:
    """Bytes from the start of the arena; of an empty tensor, too, whose address is 0."""
    return int(buffer.storage_offset()) * buffer.element_size()


def _like(type: Type, places: Iterator[torch.Tensor]) -> Held:
    """The next of `places` for each tensor of a value."""
    return tuple(_like(field, places) for field in type.fields) if isinstance(type, Bundle) else next(places)
