"""A program cut into the stages of a pipeline: which calls are a stage, and what passes between them.

A module that was cut says with the attribute `stages` which calls of main, by their ids, are each stage, and what a schedule calls them:

    stages=[{F="stage0.F#1", B="stage0.B#1", end="stage0.end#1"}, {F="stage1.F#1", I="stage1.I#1", W="stage1.W#1", end="stage1.end#1"}]

F is the forward pass, B the backward pass, or I and W its parts for inputs and for weights; a stage lacks what it has nothing to do in.
Main is the sequence of these calls for one micro-batch, and then of the ends: a plain program. A rank of a pipeline runs the calls of its
stages alone, for each micro-batch in the order of a schedule, and `end` once, after all micro-batches: it takes what was added up over
them, gradients and metrics, and is the place for what ranks have to add up among themselves. An optimiser's update is cut likewise, into
calls that are all made once: `squares` of a stage's gradients, their `norm` on the first stage, the `update` of the weights that are at
home on the stage, and the `read` of those that it reads besides (passes/optimizer.py).

What calls hand on, a law of the verifier: F takes inputs of main and what the stage before returns, B and I what the stage's own F and the
B or I of the stage after return, W what I does (or what I would take, where the stage has none). So ranks talk to neighbours only, until
the micro-batches are over: what is done once takes anything. Over micro-batches, floats that ends take are averaged and whole numbers
added; what main returns of anything but an end is joined along dimension 0. The attribute `cut` counts up the inputs of which a
micro-batch takes its own part, along dimension 0: cut=[0, 1].

A function that runs the forward pass of one stage and the backward pass of another as one, their communication under each other's
computation, stands in the attribute `overlapped`: [{forward=@stage0_fwd, backward=@stage1_bwd, as=@both}] with the parameters of the
forward, then those of B, and the results likewise. Of a backward pass in parts, backward is I and weight=@stage1_bwd_weight W, which takes
what I makes inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .core import Func, Module, Op, Value
from .errors import DscError, require
from .ops.control import Call

ATTRIBUTE, CUT, OVERLAPPED = "stages", "cut", "overlapped"
FORWARD, BACKWARD, INPUT, WEIGHT, END = "F", "B", "I", "W", "end"
BACKWARDS = (BACKWARD, INPUT, WEIGHT)
SQUARES, NORM, UPDATE, READ = "squares", "norm", "update", "read"
ONCE = (END, SQUARES, NORM, UPDATE, READ)
"""The roles in which a rank runs a stage once, after all micro-batches."""
ROLES = (FORWARD, *BACKWARDS, *ONCE)


@dataclass(frozen=True)
class Stages:
    """The calls of main by stage and role, and what they hand on."""

    main: Func
    calls: tuple[Mapping[str, Call], ...]

    def __len__(self) -> int:
        return len(self.calls)

    @cached_property
    def at(self) -> Mapping[Op, tuple[int, str]]:
        """Stage and role of each call."""
        return {call: (stage, role) for stage, calls in enumerate(self.calls) for role, call in calls.items()}

    @cached_property
    def readers(self) -> Mapping[Value, tuple[tuple[int, str], ...]]:
        """Stage and role of the calls that take a value."""
        found: dict[Value, tuple[tuple[int, str], ...]] = {}
        for call, place in self.at.items():
            for value in dict.fromkeys(call.operands):
                found[value] = (*found.get(value, ()), place)
        return found

    def home(self, value: Value) -> tuple[int, str]:
        """Stage and role of the call that makes `value`."""
        assert value.owner is not None
        return self.at[value.owner]

    def forward(self, stage: int) -> tuple[Value, ...]:
        """What the stage hands to the next in the forward pass."""
        return self._handed(stage, (FORWARD,), stage + 1, (FORWARD,))

    def backward(self, stage: int) -> tuple[Value, ...]:
        """What the stage hands to the one before in the backward pass."""
        return self._handed(stage, (BACKWARD, INPUT), stage - 1, (BACKWARD, INPUT, WEIGHT))

    def _handed(self, stage: int, makers: Sequence[str], to: int, takers: Sequence[str]) -> tuple[Value, ...]:
        made = [r for role in makers if role in self.calls[stage] for r in self.calls[stage][role].results]
        return tuple(v for v in made if any(s == to and role in takers for s, role in self.readers.get(v, ())))

    @property
    def backwards(self) -> bool:
        """Whether there is a backward pass."""
        return any(role in calls for calls in self.calls for role in BACKWARDS)

    @property
    def split(self) -> bool:
        """Whether the backward pass is in parts for inputs and for weights."""
        return self.backwards and not any(BACKWARD in calls for calls in self.calls)


def stages_of(module: Module) -> Stages:
    """The stages of a module. `DscError` where it has none, or main does not call them as it should."""
    require(is_staged(module), "the program is not cut into stages: split-stages{stages=N} does that")
    main = module.main
    known: dict[str, Call] = {}
    for op in main.ops:
        if not isinstance(op, Call) or op.weights:
            raise DscError(f"@{main.name} calls the functions of its stages and does nothing else, found {op.name} {op.id}")
        known[op.id] = op
    calls: list[dict[str, Call]] = []
    for stage, record in enumerate(module.attributes[ATTRIBUTE]):
        fits = isinstance(record, Mapping) and set(record) <= set(ROLES)
        require(fits, f"stage {stage} is {record}, expected the ids of calls for some of {', '.join(ROLES)}")
        missing = [id for id in record.values() if id not in known]
        require(not missing, f"stage {stage} has a call {', '.join(map(str, missing))}, which @{main.name} lacks, or has for another stage")
        calls.append({role: known.pop(id) for role, id in record.items()})
    require(not known, f"{', '.join(known)} of @{main.name} belong to no stage")
    return Stages(module.main, tuple(calls))


def is_staged(module: Module) -> bool:
    """Whether the program was cut into stages."""
    return ATTRIBUTE in module.attributes


def cut_inputs(module: Module) -> tuple[bool, ...]:
    """Of each input, whether a micro-batch has its own part."""
    every = range(len(module.main.params))
    own = module.attributes.get(CUT, every)
    return tuple(i in own for i in every)


def merged(module: Module) -> Mapping[tuple[str, ...], str]:
    """The function that runs a forward and a backward pass as one, by the names of their functions: F and B, or F, I and W."""
    records: Sequence[Any] = module.attributes.get(OVERLAPPED, ())
    return {tuple(str(r[key]) for key in ("forward", "backward", "weight") if key in r): str(r["as"]) for r in records}


def law(module: Module, func: Func) -> Iterator[tuple[Func | Op, str]]:
    """Main is the calls of the stages, which take from neighbours alone."""
    if func is not module.main or not is_staged(module):
        return
    try:
        stages = stages_of(module)
    except DscError as error:
        yield func, str(error)
        return
    own, count = module.attributes.get(CUT), len(func.params)
    if not isinstance(own, tuple) or not all(type(i) is int and 0 <= i < count for i in own) or list(own) != sorted(set(own)):
        yield func, f"cut is {own}, expected numbers of inputs, each below {count}, in their order"
    for call, (stage, role) in stages.at.items():
        for value in call.operands:
            if value.owner is not None and not _may_take(role, stage, *stages.home(value), stages):
                other, made = stages.home(value)
                yield call, f"{role} of stage {stage} takes %{value.name} of {made} of stage {other}"
    for place, name in merged(module).items():
        missing = [n for n in (*place, name) if n not in module.by_name]
        if missing:
            yield func, f"no function @{missing[0]}, which {OVERLAPPED} names"


def _may_take(role: str, stage: int, home: int, made: str, stages: Stages) -> bool:
    match role:
        case "F":
            return (home, made) == (stage - 1, FORWARD)
        case "B" | "I":
            return (home, made) == (stage, FORWARD) or (home == stage + 1 and made in (BACKWARD, INPUT))
        case "W" if INPUT in stages.calls[stage]:
            return (home, made) == (stage, INPUT)
        case "W":
            return (home, made) == (stage, FORWARD) or (home == stage + 1 and made in (BACKWARD, INPUT))
    return True
