"""The programs of a training step: forward and backward, the update that follows, and the average of the weights beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.gradients import bundles, by_name
from ..ir.mesh import ATTRIBUTE, Mesh, mesh_of, parse_mesh
from ..ir.sharding import Split, axes, result_splits, weight_splits, whole_weights
from ..ir.types import DType, Tensor
from ..ir.verify import verify
from ..passes.optimizer import STATE, AdamW, average_module, update_module
from ..passes.shard_experts import spread_program

GATE = ".e_score_correction_bias"
"""How the names of the gates' correction biases end."""


@dataclass(frozen=True)
class Programs:
    """What a step runs. `step` takes tokens and labels and returns losses, counts and gradients; `ir/gradients.py` says which is whose."""

    step: Module
    update: Module
    average: Module
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    """Every weight that the step reads, whole, in the dtype in which it is read."""
    trained: tuple[str, ...]
    """Those that gradients move, in the order of @update."""
    gates: tuple[str, ...]
    """The biases that the loads of experts move, in the order of @update."""
    adamw: AdamW = field(default_factory=AdamW)

    @property
    def batch(self) -> int:
        """Sequences in a batch."""
        return int(self.step.attributes["batch"])

    @property
    def seq(self) -> int:
        """Tokens in a sequence."""
        return int(self.step.attributes["seq"])

    @property
    def mesh(self) -> Mesh:
        """The mesh of whose ranks these are the programs."""
        return mesh_of(self.step) if ATTRIBUTE in self.step.attributes else Mesh()

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


def programs(
    source: str | Path,
    *,
    batch: int | None = None,
    seq: int | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    adamw: AdamW | None = None,
    mesh: str | None = None,
) -> Programs:
    """Compile `source`, a model's configuration, for training, on a `mesh` if one is given: then `batch` is that of all its ranks.

    Raises `DscError` as `compile` does, and for a source without a configuration.
    """
    from ..passes.manager import apply
    from .compile import default_pipeline, read

    default_pipeline(recipe, None, "train", mesh=mesh)  # an unknown recipe is said before any work
    if mesh:
        one = parse_mesh(mesh).pp == 1
        require(one, f"mesh {mesh}: training goes without a pipeline; pp=1 would fit, and dsc run runs a step of a pipeline")
        batch, dp = batch or parse_mesh(mesh).dp, parse_mesh(mesh).dp
        require(batch % dp == 0, f"a batch of {batch} does not divide over dp={dp}; a batch of {-(-batch // dp) * dp} would fit")
    _, module, config = read(source, mode="train", batch=batch, seq=seq, overrides=overrides)
    if config is None:
        raise DscError(f"{source} is no model configuration; expected a shipped name (dsc models), a config.json or a checkpoint folder")
    return assemble(apply(module, default_pipeline(recipe, config, "train", mesh=mesh)), config, adamw)


def assemble(step: Module, config: Mapping[str, Any], adamw: AdamW | None = None) -> Programs:
    """The programs around a differentiated `step`: on a mesh those of a rank, whose update takes what its step gives."""
    adamw = adamw or AdamW()
    known = whole_weights(step)
    trained = tuple(dict.fromkeys(name for names in bundles(step) for name in names))
    require(bool(trained), "the program has no gradients: its pipeline lacks autodiff")
    counts = next((r.tensor for r in step.main.results if r.name == "counts"), None)
    gates = tuple(name for name in known if name.endswith(GATE)) if counts else ()
    moved = {name: known[name] for name in trained}
    gradients = {name: Tensor(DType.f32, tensor.shape) for name, tensor in moved.items()}
    made = Programs(step, step, average_module(moved), config, known, trained, gates, adamw)
    splits = made.state_splits
    alike: dict[frozenset[str], list[str]] = {}
    for name in trained:
        alike.setdefault(frozenset(axes(splits[name])), []).append(name)
    update = update_module(moved, gradients, gates, counts if gates else None, adamw, tuple(alike.values()))
    if ATTRIBUTE not in step.attributes:
        return replace(made, update=update)
    held = made.weight_splits
    state = [split for name in trained for split in (splits[name],) * (1 + len(STATE))]
    inputs = [()] * (len(update.main.params) - len(state) - len(gates)) + state + [()] * len(gates)
    results = {1 + i * (1 + len(STATE)): held[name] for i, name in enumerate(trained)}
    wide = [(), *(split for name in trained for split in (splits[name],) * 2)]
    return replace(
        made,
        update=verify(spread_program(update, made.mesh, inputs, results)),
        average=verify(spread_program(made.average, made.mesh, wide, {})),
    )
