"""The programs of a training step: forward and backward, the update that follows, and the average of the weights beside it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..distributed.pipeline import Pipeline, pipeline
from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.gradients import bundles, by_name
from ..ir.mesh import ATTRIBUTE, Mesh, mesh_of, parse_mesh
from ..ir.sharding import Split, axes, result_splits, weight_splits, whole_weights
from ..ir.stages import is_staged, stages_of
from ..ir.types import DType, Tensor
from ..ir.verify import verify
from ..passes.optimizer import STATE, AdamW, Stage, average_module, update_module
from ..passes.shard_experts import spread_program
from ..schedule.actions import Schedule
from .memory import weights_by_stage

GATE = ".e_score_correction_bias"
"""How the names of the gates' correction biases end."""


@dataclass(frozen=True)
class Programs:
    """What a step runs. `step` takes tokens and labels and returns losses, counts and gradients; `ir/gradients.py` says which is whose.

    With a `schedule` both `step` and `update` are cut into stages, and ranks along pp run those that are at home on them.
    """

    step: Module
    update: Module
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    """Every weight that the step reads, whole, in the dtype in which it is read."""
    trained: tuple[str, ...]
    """Those that gradients move, in the order of @update."""
    gates: tuple[str, ...]
    """The biases that the loads of experts move, in the order of @update."""
    adamw: AdamW = field(default_factory=AdamW)
    stages: tuple[Stage, ...] = ()
    """What each stage of a pipeline updates."""
    schedule: Schedule | None = None
    notes: tuple[str, ...] = ()
    """What changes numbers without anybody having asked for it."""

    @property
    def batch(self) -> int:
        """Sequences in a batch, all micro-batches together."""
        return int(self.step.attributes["batch"]) * (self.schedule.microbatches if self.schedule else 1)

    @property
    def seq(self) -> int:
        """Tokens in a sequence."""
        return int(self.step.attributes["seq"])

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of whose ranks these are the programs."""
        return mesh_of(self.step) if ATTRIBUTE in self.step.attributes else Mesh()

    @property
    def layout(self) -> str:
        """The mesh, and what ranks along pp follow: what does not change what is computed, but for the order of sums."""
        return f"{self.mesh}, {self.schedule.name} of {self.schedule.microbatches} micro-batches" if self.schedule else str(self.mesh)

    @cached_property
    def plan(self) -> Pipeline | None:
        """How ranks go through the step, if it is cut into stages."""
        return pipeline(self.step, self.schedule) if self.schedule else None

    @cached_property
    def update_plan(self) -> Pipeline | None:
        """And through the update."""
        return Pipeline(self.update, self.plan.schedule) if self.plan else None

    @cached_property
    def weight_splits(self) -> Mapping[str, Split]:
        """How each weight is split."""
        return weight_splits(self.step)

    @cached_property
    def state_splits(self) -> Mapping[str, Split]:
        """How the gradient of each trained weight and the optimiser's state of it are split."""
        return by_name(self.step, result_splits(self.step))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the step's leading results: the loss, what it is made of, and the experts' counts if there are any."""
        results = self.step.main.results
        return tuple(r.name for r in results[: len(results) - len(bundles(self.step))])

    @cached_property
    def read_at(self) -> tuple[tuple[str, ...], ...]:
        """The weights that are read at each place along pp, in the order of the model."""
        reads = weights_by_stage(self.step) if self.plan else ()
        return self._held(self.weights, [reads[i].keys() | set(stage.weights) for i, stage in enumerate(self.stages)])

    @cached_property
    def kept_at(self) -> tuple[tuple[str, ...], ...]:
        """Those of which the optimiser's state is kept there, in the order of @update."""
        return self._held(self.trained, [set(stage.weights) for stage in self.stages])

    def _held(self, names: Iterable[str], of_stages: Sequence[Collection[str]]) -> tuple[tuple[str, ...], ...]:
        """Which of `names` the stages at each place have."""
        if self.plan is None:
            return (tuple(names),)
        places = [{stage for stage, _ in self.plan.held(place)} for place in range(self.mesh.pp)]
        return tuple(tuple(name for name in names if any(name in of_stages[stage] for stage in held)) for held in places)

    def place(self, rank: int) -> int:
        """Where a rank stands along pp."""
        return self.mesh.index("pp", rank)

    def holders(self, name: str, at: Sequence[Collection[str]]) -> list[int]:
        """The ranks at whose places `at` has a name."""
        stage = self.mesh.size("stage")
        return [rank for place, names in enumerate(at) if name in names for rank in range(place * stage, (place + 1) * stage)]

    @cached_property
    def averages(self) -> tuple[Module, ...]:
        """The average of the weights whose state is kept there, for each place along pp."""
        return tuple(map(self._average, self.kept_at))

    def _average(self, names: Sequence[str]) -> Module:
        made = average_module({name: self.weights[name] for name in names})
        if ATTRIBUTE not in self.step.attributes:
            return made
        wide = [(), *(split for name in names for split in (self.state_splits[name],) * 2)]
        return verify(spread_program(made, self.mesh, wide, {}))


def programs(
    source: str | Path,
    *,
    batch: int | None = None,
    seq: int | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    adamw: AdamW | None = None,
    mesh: str | None = None,
    schedule: str | None = None,
    microbatches: int | None = None,
    chunks: int | None = None,
    recompute: str = "none",
    budget_gb: float | None = None,
) -> Programs:
    """Compile `source`, a model's configuration, for training, on a `mesh` if one is given: then `batch` is that of all its ranks.

    With pp in the mesh, or `microbatches`, the step follows a `schedule`, as in `compile`, and `batch` is that of all micro-batches.

    Raises `DscError` as `compile` does, and for a source without a configuration.
    """
    from ..passes.manager import parse_pipeline, run_pipeline
    from .compile import default_pipeline, read, recompute_pass, tiles_of

    default_pipeline(recipe, None, "train", mesh=mesh)  # an unknown recipe is said before any work
    order, count = None, 1
    if mesh:
        dp = parse_mesh(mesh).dp
        order = _order(mesh, batch, schedule, microbatches, chunks)
        count = order.microbatches if order else 1
        batch, each = batch or count * dp, f"{count} micro-batches over dp={dp}" if order else f"dp={dp}"
        fits = -(-batch // (count * dp)) * count * dp
        require(batch == fits, f"a batch of {batch} does not divide over {each}; a batch of {fits} would fit")
    again = recompute_pass(recompute, budget_gb, "train", order)
    _, module, config = read(source, mode="train", batch=batch and batch // count, seq=seq, overrides=overrides)
    if config is None:
        raise DscError(f"{source} is no model configuration; expected a shipped name (dsc models), a config.json or a checkpoint folder")
    passes = default_pipeline(recipe, config, "train", mesh=mesh, schedule=order, again=again)
    done = run_pipeline(module, parse_pipeline(passes))
    notes = tiles_of(str(line) for record in done.records for line in record.declined)
    return replace(assemble(done.module, config, adamw), schedule=order, notes=tuple(notes))


def _order(mesh: str, batch: int | None, schedule: str | None, microbatches: int | None, chunks: int | None) -> Schedule | None:
    """What ranks along pp follow. If nobody says how many micro-batches there are, as many as usual, or as a given batch makes."""
    from .compile import order_of

    usual = order_of(mesh, "train", schedule, microbatches, chunks)
    if usual is None or batch is None or microbatches is not None or Path(schedule or "").suffix:
        return usual
    most = batch // parse_mesh(mesh).dp
    fits = max((n for n in range(1, usual.microbatches + 1) if most % n == 0 and most), default=usual.microbatches)
    return usual if fits == usual.microbatches else order_of(mesh, "train", schedule, fits, chunks)


def assemble(step: Module, config: Mapping[str, Any], adamw: AdamW | None = None) -> Programs:
    """The programs around a differentiated `step`: on a mesh those of a rank, whose update takes what its step gives."""
    adamw = adamw or AdamW()
    known = whole_weights(step)
    moving = {name for names in bundles(step) for name in names}
    trained = tuple(name for name in known if name in moving)
    require(bool(trained), "the program has no gradients: its pipeline lacks autodiff")
    counts = next((r.tensor for r in step.main.results if r.name == "counts"), None)
    gates = tuple(name for name in known if name.endswith(GATE)) if counts else ()
    moved = {name: known[name] for name in trained}
    gradients = {name: Tensor(DType.f32, tensor.shape) for name, tensor in moved.items()}
    stages = _stages(step, trained, gates) if is_staged(step) else ()
    made = Programs(step, step, config, known, trained, gates, adamw, stages)
    splits = made.state_splits
    alike: dict[frozenset[str], list[str]] = {}
    for name in trained:
        alike.setdefault(frozenset(axes(splits[name])), []).append(name)
    update = update_module(moved, gradients, gates, counts if gates else None, adamw, tuple(alike.values()), stages)
    if ATTRIBUTE not in step.attributes:
        return replace(made, update=update)
    held = made.weight_splits
    state = [split for name in trained for split in (splits[name],) * (1 + len(STATE))]
    inputs = [()] * (len(update.main.params) - len(state) - len(gates)) + state + [()] * len(gates)
    results = {1 + i * (1 + len(STATE)): held[name] for i, name in enumerate(trained)}
    return replace(made, update=verify(spread_program(update, made.mesh, inputs, results)))


def _stages(step: Module, trained: Sequence[str], gates: Sequence[str]) -> tuple[Stage, ...]:
    """What each stage updates: a weight is at home where its gradient is returned, a gate where it is read."""
    stages, first = stages_of(step), len(step.main.results) - len(bundles(step))
    named = zip(bundles(step), step.main.results[first:], strict=True)
    homes = {name: stages.home(value)[0] for names, value in named for name in names}
    found = []
    for stage, reads in enumerate(weights_by_stage(step)):
        own = tuple(name for name in trained if homes[name] == stage)
        found.append(Stage(own, tuple(g for g in gates if g in reads), tuple(n for n in trained if n in reads and homes[n] != stage)))
    return tuple(found)
