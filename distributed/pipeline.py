"""One rank of a pipeline: the calls of its stages for each micro-batch, in the order of a schedule, and what is done once after them.

The rank's program talks to its neighbours along pp where the schedule says so, and inside a stage along the other axes where the stage's
functions do. What a stage keeps of a micro-batch it lets go of when its last reader has it. Sums over micro-batches are made in float32,
or what their type is, in the order in which the rank comes to them; where micro-batches go both ways, those that went down the ranks and
those that went up are added up apart, and then to each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from ..ir.core import Module, Value
from ..ir.errors import DscError, require
from ..ir.mesh import mesh_of
from ..ir.ops.control import Call
from ..ir.stages import BACKWARDS, FORWARD, INPUT, ONCE, WEIGHT, Stages, merged, stages_of
from ..ir.types import Bundle, Type, landed
from ..schedule.actions import Action, Kind, Overlap, Schedule, Step
from ..schedule.simulate import lower, simulate
from ..schedule.validate import check, peer
from .world import Program, Receive, Send

Data: TypeAlias = Any
"""An array, or for a bundle a tuple of such."""

Run: TypeAlias = Callable[[str, Sequence[Data]], Program[tuple[Data, ...]]]
"""Runs a function of the program, by name."""

Key: TypeAlias = tuple[int, int]
"""A result of main and the micro-batch that it is of; 0 for those that stand for all."""

Transfer: TypeAlias = tuple[int, int, list[Value]]
"""The rank along pp that sends, the one that receives, and what."""


@dataclass(frozen=True)
class Pipeline:
    """A staged program of a mesh and a schedule that fits it, checked and with sends and receives."""

    module: Module
    schedule: Schedule

    @cached_property
    def stages(self) -> Stages:
        """The calls of the program."""
        return stages_of(self.module)

    @cached_property
    def joined(self) -> tuple[Value, ...]:
        """The results of main that each micro-batch has for itself."""
        return tuple(v for v in self.module.main.results if v.owner is None or self.stages.home(v)[1] not in ONCE)

    @cached_property
    def entered(self) -> Mapping[str, Module]:
        """The module as a program that runs one of its functions, by the name of that."""
        funcs = self.module.funcs
        return {func.name: self.module.replace(funcs=(func, *(f for f in funcs if f is not func))) for func in funcs}

    def places(self, stage: int) -> list[int]:
        """The ranks along pp that are a home of `stage`, the one for micro-batches that go down first."""
        home = self.schedule.home
        return list(dict.fromkeys(home[stage, reverse] for reverse in (False, True) if (stage, reverse) in home))

    def held(self, place: int) -> tuple[tuple[int, bool], ...]:
        """Stages and directions whose home is the rank at `place` along pp, in order."""
        return tuple(sorted(key for key, rank in self.schedule.home.items() if rank == place))

    def summed(self, stage: int) -> tuple[Value, ...]:
        """What a stage makes of each micro-batch for calls that are made once: it is added up."""
        stages = self.stages
        made = (value for call in stages.calls[stage].values() for value in call.results if stages.at[call][1] not in ONCE)
        return tuple(value for value in made if any(role in ONCE for _, role in stages.readers.get(value, ())))

    def deliveries(self, everywhere: Sequence[Value] = ()) -> Iterator[tuple[Call | None, list[Transfer]]]:
        """The calls that are made once, in order, each with what its ranks are sent for it; then None, with what is wanted `everywhere`.

        A value comes from the nearest rank that has it.
        """
        stages = self.stages
        there = {value: set(self.places(stage)) for stage in range(len(stages)) for value in self.summed(stage)}

        def sent(values: Sequence[Value], targets: Sequence[int]) -> Iterator[Transfer]:
            for target in targets:
                messages: defaultdict[int, list[Value]] = defaultdict(list)
                for value in dict.fromkeys(values):
                    if value.owner is not None and target not in there[value]:
                        messages[min(sorted(there[value]), key=lambda rank: abs(rank - target))].append(value)
                        there[value].add(target)
                yield from ((source, target, message) for source, message in messages.items())

        for op in stages.main.ops:
            assert isinstance(op, Call)
            stage, role = stages.at[op]
            if role in ONCE:
                yield op, list(sent(op.args, self.places(stage)))
                there |= {value: set(self.places(stage)) for value in op.results}
        yield None, list(sent(everywhere, range(self.schedule.ranks)))

    def returned(self, place: int) -> tuple[Key, ...]:
        """The results that the rank at `place` along pp has in the end, in the order of main."""
        mine = {stage for stage, _ in self.held(place)}
        found: list[Key] = []
        for index, value in enumerate(self.module.main.results):
            if value in self.joined:
                last = self.stages.home(value)[0] if value.owner is not None else len(self.stages) - 1
                found += [(index, m) for m in range(self.schedule.microbatches) if last in mine]
            elif self.stages.home(value)[0] in mine:
                found.append((index, 0))
        return tuple(found)


def pipeline(module: Module, schedule: Schedule) -> Pipeline:
    """What ranks follow. `DscError` where the schedule is wrong or is not one of this program; it is lowered where it is not yet."""
    check(schedule)
    stages, mesh, name = stages_of(module), mesh_of(module), schedule.name
    backwards = any(action.kind in (Kind.B, Kind.I) for _, _, action in schedule.actions())
    split = any(action.kind is Kind.I for _, _, action in schedule.actions())
    require(schedule.stages == len(stages), f"{name} is a schedule of {schedule.stages} stages, but the program has {len(stages)}")
    require(schedule.ranks == mesh.pp, f"{name} is a schedule of {schedule.ranks} ranks, but the mesh {mesh} has {mesh.pp} along pp")
    if backwards != stages.backwards:
        has, lacks = ("has a", "has none") if backwards else ("has no", "has one")
        raise DscError(f"{name} {has} backward pass, but the program {lacks}")
    fits = stages.split or not split
    require(fits, f"{name} takes I and W apart, but the program's backward pass is one: autodiff{{split=true}} makes it two")
    made = Pipeline(module, schedule if schedule.lowered else lower(simulate(schedule)))
    for value in made.joined if any(reverse for _, reverse in schedule.home) else ():
        raise DscError(f"{name} sends micro-batches both ways, but each of them has its own part of %{value.name}")
    from .order import check_order  # which runs the programs below

    check_order(made)
    return made


def program(
    plan: Pipeline,
    place: int,
    run: Run,
    inputs: Callable[[int], Sequence[Data]],
    empty: Callable[[Type], Data],
    everywhere: Sequence[int] = (),
) -> Program[dict[Key, Data]]:
    """The program of the rank at `place` along pp, with the results that it has in the end (`Pipeline.returned`).

    `inputs` gives this rank's inputs of main for a micro-batch, `empty` an array of a type for what is received. Results `everywhere`, by
    their number, every rank has in the end.
    """
    return _Rank(plan, place, run, inputs, empty).program(everywhere)


def once(
    plan: Pipeline,
    place: int,
    run: Run,
    have: Mapping[Value, Data],
    empty: Callable[[Type], Data],
    everywhere: Sequence[Value] = (),
) -> Program[dict[Value, Data]]:
    """Make those of main's calls that are made once, in their order, and give what the rank at `place` has in the end.

    `have` is what it has before: parameters of main, those that its stages take, and what they made of micro-batches. What a call takes
    of another stage it is sent, as are values that are wanted `everywhere` (`Pipeline.deliveries`, one list for all ranks).
    """
    found, size = dict(have), plan.schedule.ranks
    for call, transfers in plan.deliveries(everywhere):
        what = f"{'arguments' if call else 'results'} of @{call.callee if call else plan.stages.main.name}"
        for source, target, values in transfers:
            if place == source:
                yield from _send([found[value] for value in values], target, size, what)
            elif place == target:
                received = yield from _receive([value.type for value in values], source, size, what, empty)
                found.update(zip(values, received, strict=True))
        if call and place in plan.places(plan.stages.at[call][0]):
            results = yield from run(str(call.callee), [found[value] for value in call.args])
            found.update(zip(call.results, results, strict=True))
    return found


class _Rank:
    """One rank, and what it holds."""

    def __init__(
        self, plan: Pipeline, place: int, run: Run, inputs: Callable[[int], Sequence[Data]], empty: Callable[[Type], Data]
    ) -> None:
        self.stages = plan.stages
        self.plan, self.place, self.run, self.inputs, self.empty = plan, place, run, inputs, empty
        self.size = plan.schedule.ranks
        self.merged = merged(plan.module)
        self.have: dict[tuple[Value, int], tuple[Data, int]] = {}
        """Of a micro-batch: a value, and how many of its readers are still to come."""
        self.sums: dict[tuple[Value, bool], Data] = {}
        """What is taken once, added up over the micro-batches of a direction."""
        self.totals: dict[Value, Data] = {}
        self.results: dict[Key, Data] = {}

    def program(self, everywhere: Sequence[int] = ()) -> Program[dict[Key, Data]]:
        """Everything, in order."""
        for step in self.plan.schedule.rows[self.place]:
            yield from self.step(step)
        yield from self.both_ways()
        results = self.stages.main.results
        wanted = [results[index] for index in everywhere]
        have = self.totals | dict(zip(self.stages.main.params, self.inputs(0), strict=True))
        made = yield from once(self.plan, self.place, self.run, have, self.empty, wanted)
        self.results |= {(index, 0): made[value] for index, value in enumerate(results) if value in made}
        keys = (*self.plan.returned(self.place), *((index, 0) for index in everywhere))
        return {key: self.results[key] for key in dict.fromkeys(keys)}

    # The schedule

    def step(self, step: Step) -> Program[None]:
        if isinstance(step, Overlap):
            calls = self.stages.calls
            some = [(step.forward, FORWARD), *((step.backward, role) for role in BACKWARDS if role in calls[step.backward.stage])]
            name = self.merged.get(tuple(str(calls[action.stage][role].callee) for action, role in some if role in calls[action.stage]))
            if name is not None:
                yield from self.calls(name, some)
                return
        for action in step.parts:
            match action.kind:
                case Kind.F:
                    yield from self.compute(action, FORWARD)
                case Kind.B:
                    for role in BACKWARDS:
                        yield from self.compute(action, role)
                case Kind.I:
                    yield from self.compute(action, INPUT)
                case Kind.W:
                    yield from self.compute(action, WEIGHT)
                case _:
                    yield from self.transfer(action)

    def compute(self, action: Action, role: str) -> Program[None]:
        """Run what a stage has in a role, if anything."""
        if role in self.stages.calls[action.stage]:
            yield from self.calls(str(self.stages.calls[action.stage][role].callee), [(action, role)])

    def calls(self, name: str, some: Sequence[tuple[Action, str]]) -> Program[None]:
        """Run a function that does what some calls of main do; what one of them hands to another stays inside."""
        calls = [(action, self.stages.calls[action.stage][role]) for action, role in some]
        reads = [(value, action.microbatch) for action, call in calls for value in call.args]
        makes = [(value, action) for action, call in calls for value in call.results]
        made = {(value, action.microbatch) for value, action in makes}
        found = iter((yield from self.run(name, [self.take(*read) for read in reads if read not in made])))
        for value, action in makes:
            self.keep(value, next(found), action)
        for read in reads:
            if read in made:
                self.take(*read)

    def take(self, value: Value, microbatch: int) -> Data:
        """A value that somebody reads."""
        if value.owner is None:
            return self.inputs(microbatch)[self.stages.main.params.index(value)]
        data, readers = self.have.pop((value, microbatch))
        if readers > 1:
            self.have[value, microbatch] = data, readers - 1
        return data

    def keep(self, value: Value, data: Data, action: Action) -> None:
        """Keep what was computed for those who read it."""
        readers = self.stages.readers.get(value, ())
        count = sum(role not in ONCE for _, role in readers)
        if count:
            self.have[value, action.microbatch] = data, count
        if count < len(readers):
            before = self.sums.get((value, action.reverse))
            self.sums[value, action.reverse] = data if before is None else _added(before, data)
        for index, result in enumerate(self.stages.main.results):
            if result is value:
                self.results[index, action.microbatch] = data

    def transfer(self, action: Action) -> Program[None]:
        """Send to a neighbour, or receive from it."""
        stage, m = action.stage, action.microbatch
        forward = action.kind in (Kind.SEND_F, Kind.RECV_F)
        sends = action.kind in (Kind.SEND_F, Kind.SEND_B)
        source = stage if sends else stage - 1 if forward else stage + 1
        values = self.stages.forward(source) if forward else self.stages.backward(source)
        to = source + 1 if forward else source - 1
        other = peer(self.plan.schedule, action)
        if sends:
            found = []
            for value in values:
                for _ in (s for s, role in self.stages.readers[value] if s == to and role not in ONCE):
                    data = self.take(value, m)
                found.append(data)
            yield from _send(found, other, self.size, str(action))
        else:
            received = yield from _receive([v.type for v in values], other, self.size, str(action), self.empty)
            for value, data in zip(values, received, strict=True):
                self.have[value, m] = data, sum(s == to and role not in ONCE for s, role in self.stages.readers[value])

    # After all micro-batches

    def both_ways(self) -> Program[None]:
        """Divide what is averaged, adding up before what the two ranks of a stage have, if it has two."""
        home = self.plan.schedule.home
        for stage in dict.fromkeys(stage for stage, _ in self.plan.held(self.place)):
            ranks = [home.get((stage, reverse)) for reverse in (False, True)]
            values = self.plan.summed(stage)
            mine = [[self.sums.pop((v, reverse), None) for v in values] for reverse in (False, True)]
            if None not in ranks and ranks[0] != ranks[1]:
                own = ranks.index(self.place)
                mine[1 - own] = yield from self.swapped(values, mine[own], ranks[1 - own], f"sums of stage {stage}")  # type: ignore[arg-type]
            for value, down, up in zip(values, *mine, strict=True):
                total = down if up is None else up if down is None else _added(down, up)
                self.totals[value] = _divided(total, value.type, self.plan.schedule.microbatches)

    def swapped(self, values: Sequence[Value], mine: list[Data], other: int, what: str) -> Program[list[Data]]:
        """What the other rank has; the one that comes first along pp sends first."""
        if self.place < other:
            yield from _send(mine, other, self.size, what)
        found = yield from _receive([v.type for v in values], other, self.size, what, self.empty)
        if self.place > other:
            yield from _send(mine, other, self.size, what)
        return list(found)


def _send(some: Sequence[Data], to: int, size: int, what: str) -> Program[None]:
    if some:
        yield Send("pp", size, tuple(leaves(tuple(some))), to, op=what)


def _receive(types: Sequence[Type], source: int, size: int, what: str, empty: Callable[[Type], Data]) -> Program[tuple[Data, ...]]:
    if not types:
        return ()
    like = tuple(map(empty, types))
    arrays = yield Receive("pp", size, tuple(leaves(like)), source, op=what)
    found: tuple[Data, ...] = rebuilt(like, iter(arrays))
    return found


def leaves(data: Data) -> list[Any]:
    """The arrays in it, in order."""
    return [x for field in data for x in leaves(field)] if isinstance(data, tuple) else [data]


def rebuilt(like: Data, arrays: Iterator[Any]) -> Data:
    """The next `arrays` in the form of `like`."""
    return tuple(rebuilt(field, arrays) for field in like) if isinstance(like, tuple) else next(arrays)


def _added(a: Data, b: Data) -> Data:
    if isinstance(a, tuple):
        return tuple(map(_added, a, b))
    return _array(a + b)


def _divided(x: Data, type: Type, count: int) -> Data:
    """Floats are averaged, whole numbers stay sums."""
    there = landed(type)
    if isinstance(there, Bundle):
        return tuple(_divided(field, inner, count) for field, inner in zip(x, there.fields, strict=True))
    return _array(x / count) if there.dtype.is_float and count > 1 else x


def _array(x: Any) -> Any:
    """NumPy makes numbers of arrays without dimensions."""
    return np.asarray(x) if isinstance(x, np.generic) else x
