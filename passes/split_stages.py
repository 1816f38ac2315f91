"""Cut a program into the stages of a pipeline: a function for each stage and phase, which main calls in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..hardware.cluster import cluster
from ..hardware.device import Device
from ..ir.core import Builder, Func, Module, Op, Phase, Symbol, Value
from ..ir.errors import require
from ..ir.gradients import ATTRIBUTE as GRADIENTS
from ..ir.gradients import bundles
from ..ir.ops.control import Call, Pack, Unpack
from ..ir.stages import ATTRIBUTE, BACKWARD, CUT, END, FORWARD, INPUT, WEIGHT
from ..ir.types import Bundle, Tensor, bound
from ..ir.walk import walk
from .manager import Pass, register
from .outline import Packed, outlined
from .simplify import drop_unused, merge_functions
from .stage_placement import Placement


@register
@dataclass(frozen=True)
class SplitStages(Pass):
    """Cut main into the stages of a pipeline, each of functions for its forward and its backward pass.

    Main becomes the calls of these for one micro-batch (`ir/stages.py`). Its forward ops are cut where they stand, so that the dearest
    stage costs as little as can be, backward counted in: by FLOPs, or by seconds on the GPUs of a `cluster`, which count memory traffic;
    `at` says instead which components begin a new stage. What goes back belongs where it came
    from. Values travel between neighbours, through the stages between where they skip some; inputs, and what costs next to nothing and
    follows from inputs and constants alone, every stage has itself. Backward is one function, or one for each phase where autodiff
    made it so. A stage returns the gradients of its weights; those of weights that others read too are added by its `end`.

    Before `split-stages{stages=2}`:

        func @main(%x: f32[4, 8]) {
          %w: f32[8, 8] = param("a.weight")                                       @ main#1 F
          %h: f32[4, 8] = matmul(%x, %w, transpose_b=true)                        @ main#2 F
          %v: f32[8, 8] = param("b.weight")                                       @ main#3 F
          %y: f32[4, 8] = matmul(%h, %v, transpose_b=true)                        @ main#4 F
          return %y
        }

    after:

        module { stage=traced, stages=[{F="stage0.F#1"}, {F="stage1.F#1"}], cut=[0] }

        func @main(%x: f32[4, 8]) {
          %h: f32[4, 8] = call(@stage0_fwd, [%x])                                 @ stage0.F#1 F
          %y: f32[4, 8] = call(@stage1_fwd, [%h])                                 @ stage1.F#1 F
          return %y
        }

        func @stage0_fwd(%x: f32[4, 8]) {
          %w: f32[8, 8] = param("a.weight")                                       @ main#1 F
          %h: f32[4, 8] = matmul(%x, %w, transpose_b=true)                        @ main#2 F
          return %h
        }

        func @stage1_fwd(%h: f32[4, 8]) {
          %v: f32[8, 8] = param("b.weight")                                       @ main#3 F
          %y: f32[4, 8] = matmul(%h, %v, transpose_b=true)                        @ main#4 F
          return %y
        }
    """

    name: ClassVar[str] = "split-stages"
    requires: ClassVar[str] = "..quantized"

    stages: int
    at: tuple[str, ...] = ()
    cluster: str = ""

    def __post_init__(self) -> None:
        require(self.stages >= 1, f"stages is {self.stages}, expected 1 or more")
        require(not (self.at and self.cluster), "at says where stages begin, cluster by what they are balanced: expected one of them")
        self._device()
        n = self.stages - 1
        require(len(self.at) in (0, n), f"at names {len(self.at)} components, expected the {n} at which further stages begin")

    def __call__(self, module: Module) -> Module:
        require(ATTRIBUTE not in module.attributes, "the program is cut into stages already")
        return _Split(module, self.stages, self.at, self._device()).module()

    def _device(self) -> Device | None:
        return cluster(self.cluster).device if self.cluster else None


Key = Hashable
"""What a function takes or gives: a value of the program before, or a name for a bundle or for what it returns at the end."""


@dataclass(frozen=True)
class _Part:
    """One function of a stage, and what its parameters and results are."""

    func: Func
    takes: tuple[Key, ...]
    gives: tuple[Key, ...]


class _Split:
    """One run of the pass."""

    def __init__(self, module: Module, count: int, at: Sequence[str], device: Device | None) -> None:
        self.count = count
        self.before = module.replace(funcs=(_unpacked(module), *module.funcs[1:]))
        self.main = self.before.main
        self.placed = Placement(self.before, count, at, device)
        self.split = not any(_has_both(self.before, op) for op in self.main.ops)
        self.order = {v: i for i, v in enumerate((*self.main.params, *(r for op in self.main.ops for r in op.results)))}
        stages = range(count)
        self.ops = {phase: [self._of(stage, phase) for stage in stages] for phase in (Phase.F, Phase.I, Phase.W)}
        plain = len(self.main.results) - len(bundles(module))
        self.returned: list[list[Value]] = [[] for _ in stages]
        """The results of main but gradients, by the stage that makes them."""
        for value in dict.fromkeys(self.main.results[:plain]):
            self.returned[max(self.placed.homes([value]), default=count - 1)].append(value)
        self.results = self.main.results[:plain]
        self.owned: list[list[str]] = [[] for _ in stages]
        """The weights whose gradients a stage returns: the first of those that read them."""
        for name, parts in self.placed.parts.items():
            self.owned[min(stage for stage, _ in parts)].append(name)
        self.up: list[set[Value]] = [set() for _ in stages]
        """What a stage hands to the next in the forward pass."""
        self.down: list[set[Value]] = [set() for _ in range(count + 1)]
        """What a stage hands to the one before in the backward pass."""
        self.kept: list[set[Value]] = [set() for _ in stages]
        """What the backward pass of a stage has of its forward pass."""
        for stage in stages:
            self._flow(stage)

    def _of(self, stage: int, phase: Phase) -> list[Op]:
        return [op for op in self.main.ops if op.phase is phase and self.placed.stage.get(op) == stage]

    def gradients(self, stage: int) -> dict[int, tuple[Value, ...]]:
        """The parts of gradients that a stage computes, by the stage that returns the sums."""
        found: dict[int, tuple[Value, ...]] = {}
        for owner, names in enumerate(self.owned):
            values = tuple(value for name in names for home, value in self.placed.parts[name] if home == stage)
            found |= {owner: values} if values else {}
        return found

    def _flow(self, stage: int) -> None:
        """Let what a stage needs of others travel to it."""
        for value in self.placed.roots(self.ops[Phase.F][stage], self.returned[stage]):
            if value.owner is not None:
                self._rises(value, stage)
        made = [value for values in self.gradients(stage).values() for value in values]
        for value in self.placed.roots((*self.ops[Phase.I][stage], *self.ops[Phase.W][stage]), made):
            if value.owner is None:
                continue
            home = self.placed.stage[value.owner]
            if value.owner.phase is Phase.F and home <= stage:
                self._rises(value, stage)
                self.kept[stage].add(value)
                continue
            fits = home == stage or (home > stage and value.owner.phase is not Phase.W)
            require(fits, f"%{value.name} of stage {home} is read by the backward pass of stage {stage}: it cannot be cut there")
            if value.owner.phase is Phase.F:
                self.kept[home].add(value)
            for passed in range(stage + 1, home + 1):
                self.down[passed].add(value)

    def _rises(self, value: Value, stage: int) -> None:
        assert value.owner is not None
        forward = value.owner.phase is Phase.F and self.placed.stage[value.owner] <= stage
        require(forward, f"%{value.name} is read by the forward pass of stage {stage}, and made later: it cannot be cut there")
        for passed in range(self.placed.stage[value.owner], stage):
            self.up[passed].add(value)

    # The functions of a stage

    def module(self) -> Module:
        """The staged program."""
        main = _Main(self.main, {v for stage in range(self.count) for v in self.metrics(stage)})
        stages = range(self.count)
        for stage in stages:
            main.call(stage, FORWARD, self.forward(stage), Phase.F)
            main.have.update({("returned", v): main.have[v] for v in self.returned[stage]})
        for stage in reversed(stages):
            for role, part in self.backward(stage):
                main.call(stage, role, part, Phase.W if role == WEIGHT else Phase.I)
        for stage in stages:
            main.call(stage, END, self.end(stage), self.last)
        gradients = {f"stage{stage}": {"weights": tuple(names), "calls": ("",)} for stage, names in enumerate(self.owned) if names}
        batch = self.before.attributes.get("batch")
        attributes = {
            **self.before.attributes,
            **({GRADIENTS: gradients} if gradients else {}),
            ATTRIBUTE: tuple(main.records[stage] for stage in stages),
            CUT: tuple(i for i, param in enumerate(self.main.params) if _has_batch(param, batch)),
        }
        results = [main.have.get(("end", v)) or main.have["returned", v] for v in self.results]
        returned = [main.have["end", stage] for stage, names in enumerate(self.owned) if names]
        func = main.b.finish([*results, *returned], self.main.updates)
        return merge_functions(self.before.replace(funcs=(func, *main.funcs, *self.before.funcs[1:]), attributes=attributes))

    def forward(self, stage: int) -> _Part:
        ops = self.ops[Phase.F][stage]
        up = self.sorted(self.up[stage])
        results = [*up, *(v for v in self.returned[stage] if v not in self.up[stage])]
        given = [*self.inputs(ops, results), *(self.sorted(self.up[stage - 1]) if stage else ())]
        kept = Packed("residuals", self.sorted(self.kept[stage]), Phase.F)
        return self.part(f"stage{stage}_fwd", None, given, ops, results, {("residuals", stage): kept})

    def backward(self, stage: int) -> list[tuple[str, _Part]]:
        """The functions of the backward pass, each with its role."""
        inputs, weights = self.ops[Phase.I][stage], self.ops[Phase.W][stage]
        down, come = self.sorted(self.down[stage]), self.sorted(self.down[stage + 1])
        gradients = {("gradients", stage, o): Packed("gradients", values, Phase.W) for o, values in self.gradients(stage).items()}
        made = [value for bundle in gradients.values() for value in bundle.values]
        kept = ("residuals", stage), Packed("residuals", self.sorted(self.kept[stage]), Phase.I)
        name = f"stage{stage}_bwd"
        found: list[tuple[str, _Part]] = []
        if not self.split:
            both = {*inputs, *weights}
            ops = [op for op in self.main.ops if op in both]
            if ops or down or made:
                given = [*self.inputs(ops, [*down, *made]), *come]
                found.append((BACKWARD, self.part(name, kept, given, ops, down, gradients)))
            return found
        if inputs or down:
            stash = {v for v in self.placed.roots(weights, made) if v.owner is not None and v.owner not in weights}
            carried = ("stash", stage), Packed("stash", self.sorted(stash), Phase.I)
            given = [*self.inputs(inputs, down), *come]
            found.append((INPUT, self.part(f"{name}_input", kept, given, inputs, down, dict([carried]))))
            kept, come = carried, ()
        if weights or made:
            inside = kept[0], replace(kept[1], phase=Phase.W)
            given = [*self.inputs(weights, made), *come]
            found.append((WEIGHT, self.part(f"{name}_weight", inside, given, weights, (), gradients)))
        return found

    def part(
        self,
        name: str,
        inside: tuple[Key, Packed] | None,
        given: Sequence[Value],
        ops: Sequence[Op],
        results: Sequence[Value],
        bundled: Mapping[tuple[Any, ...], Packed],
    ) -> _Part:
        """The function of `ops` that takes what is `inside` a bundle and `given`, and returns `results` and then bundles."""
        packed = {key: bundle for key, bundle in bundled.items() if bundle.values}
        key, held = inside or ("", Packed("", (), Phase.F))
        func = outlined(name, held, given, ops, [*results, *packed.values()], {op: op.phase for op in ops})
        return _Part(func, (*((key,) if held.values else ()), *given), (*results, *packed))

    def end(self, stage: int) -> _Part | None:
        """What a stage returns once: metrics, and its gradients, added up where other stages have a part in them."""
        metrics, names = self.metrics(stage), self.owned[stage]
        if not metrics and not names:
            return None
        b = Builder(f"stage{stage}_end", f"stage{stage}_end", self.last)
        values = {v: b.param(v.name, v.type) for v in metrics}
        results = list(values.values())
        parts = {("gradients", other, stage): got for other in range(stage, self.count) if (got := self.gradients(other).get(stage))}
        bundles = [b.param("gradients", Pack(fields).result.type) for fields in parts.values()]
        if len(bundles) > 1:
            for bundle, fields in zip(bundles, parts.values(), strict=True):
                values.update(zip(fields, b.emit(Unpack(bundle, names=tuple(v.name for v in fields))).results, strict=True))
            for op in (op for name in names for op in self.placed.sums.get(name, ())):
                values.update(zip(op.results, b.emit(op.with_operands(values.__getitem__)).results, strict=True))
            sums = {name: ops[-1].result for name, ops in self.placed.sums.items()}
            fields = tuple(values[sums.get(name) or self.placed.parts[name][0][1]] for name in names)
            bundles = [b.emit(Pack(fields, names=("gradients",))).result]
        gives = (*(("end", v) for v in metrics), *(("end", stage) for _ in bundles))
        return _Part(b.finish([*results, *bundles]), (*(("returned", v) for v in metrics), *parts), gives)

    def metrics(self, stage: int) -> list[Value]:
        """What a stage returns for all micro-batches together; the rest each has for itself."""
        return [v for v in self.returned[stage] if self.placed.parts or not _has_batch(v, self._batch())]

    @property
    def last(self) -> Phase:
        """The phase of the ends."""
        return Phase.W if self.placed.parts else Phase.F

    def _batch(self) -> int:
        """Of how many sequences main's results are, where that can be told."""
        return self.before.attributes.get("batch") or next((bound(p.shape[0]) for p in self.main.params if _has_batch(p, None)), 0)

    def inputs(self, ops: Sequence[Op], values: Sequence[Value]) -> list[Value]:
        """The inputs of main that are needed."""
        found = self.placed.roots(ops, values)
        return [p for p in self.main.params if p in found]

    def sorted(self, values: Iterable[Value]) -> tuple[Value, ...]:
        """In the order in which main makes them."""
        return tuple(sorted(values, key=self.order.__getitem__))


class _Main:
    """The new main: the calls of the stages."""

    def __init__(self, before: Func, named: Collection[Value]) -> None:
        self.named = named
        """What ends return."""
        self.b = Builder(before.name)
        self.b.params = list(before.params)
        self.have: dict[Key, Value] = {param: param for param in before.params}
        self.funcs: list[Func] = []
        self.records: defaultdict[int, dict[str, str]] = defaultdict(dict)

    def call(self, stage: int, role: str, part: _Part | None, phase: Phase) -> None:
        """Call what there is."""
        if part is None:
            return
        self.b.phase, self.b.component = phase, f"stage{stage}.{role}"
        names = tuple(
            (f"stage{stage}_{r.name}" if isinstance(r.type, Bundle) else r.name)
            + ("_part" if role != END and (key in self.named or r.name == "gradients") else "")  # what main returns keeps its name
            for key, r in zip(part.gives, part.func.results, strict=True)
        )
        types = tuple(r.type for r in part.func.results)
        made = self.b.emit(Call(Symbol(part.func.name), tuple(self.have[key] for key in part.takes), types, names=names))
        self.have.update(zip(part.gives, made.results, strict=True))
        self.funcs.append(part.func)
        self.records[stage][role] = made.id


def _unpacked(module: Module) -> Func:
    """Main without what nothing reads, packing each bundle of gradients itself."""
    main, named = module.main, bundles(module)
    ops, results = list(main.ops), list(main.results)
    for i, (weights, bundle) in enumerate(zip(named, results[len(results) - len(named) :], strict=True), len(results) - len(named)):
        if not isinstance(bundle.owner, Pack):
            names = tuple(f"d_{name.replace('.', '_')}" for name in weights)
            unpack = Unpack(bundle, id=f"{main.name}.stages#{2 * i + 1}", phase=Phase.W, names=names)
            pack = Pack(unpack.results, id=f"{main.name}.stages#{2 * i + 2}", phase=Phase.W, names=(bundle.name,))
            ops += [unpack, pack]
            results[i] = pack.result
    return drop_unused(Func(main.name, main.params, tuple(ops), tuple(results), main.updates))


def _has_both(module: Module, op: Op) -> bool:
    """Whether a call is of a backward pass in one function."""
    return op.phase is Phase.I and isinstance(op, Call) and any(inner.phase is Phase.W for _, _, inner in walk(module, module[op.callee]))


def _has_batch(value: Value, batch: int | None) -> bool:
    """Whether the sequences of a micro-batch lie along the first dimension."""
    return isinstance(value.type, Tensor) and value.type.rank > 0 and batch in (None, value.type.shape[0])
