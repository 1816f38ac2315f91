"""The programs of a training step: forward and backward, the update that follows, and the average of the weights beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.gradients import bundles
from ..ir.types import DType, Tensor
from ..ir.walk import weights as weights_of
from ..passes.optimizer import AdamW, average_module, update_module

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
    """Every weight that the step reads, as it reads it."""
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
) -> Programs:
    """Compile `source`, a model's configuration, for training. Raises `DscError` as `compile` does, and for a source without one."""
    from ..passes.manager import apply
    from .compile import default_pipeline, read

    default_pipeline(recipe, None, "train")  # an unknown recipe is said before any work
    _, module, config = read(source, mode="train", batch=batch, seq=seq, overrides=overrides)
    if config is None:
        raise DscError(f"{source} is no model configuration; expected a shipped name (dsc models), a config.json or a checkpoint folder")
    return assemble(apply(module, default_pipeline(recipe, config, "train")), config, adamw)


def assemble(step: Module, config: Mapping[str, Any], adamw: AdamW | None = None) -> Programs:
    """The programs around a differentiated `step`."""
    adamw = adamw or AdamW()
    known = weights_of(step)
    trained = tuple(dict.fromkeys(name for names in bundles(step) for name in names))
    require(bool(trained), "the program has no gradients: its pipeline lacks autodiff")
    counts = next((r.tensor for r in step.main.results if r.name == "counts"), None)
    gates = tuple(name for name in known if name.endswith(GATE)) if counts else ()
    moved = {name: known[name] for name in trained}
    gradients = {name: Tensor(DType.f32, tensor.shape) for name, tensor in moved.items()}
    update = update_module(moved, gradients, gates, counts if gates else None, adamw)
    return Programs(step, update, average_module(moved), config, known, trained, gates, adamw)
