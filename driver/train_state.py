"""The state of a training run, and its checkpoints: folders that Hugging Face's layout describes, with what else a run needs to go on.

    RUN/checkpoints/step-00000200/
      config.json, model.safetensors     the model as it is read, for dsc and for transformers
      tokenizer.json                     how text becomes its tokens
      optimizer.safetensors              master weights and both moments of each weight
      ema/                               the average of the weights, as a model of its own, if one is kept
      state.json                         the step, the position in the data, and what determines the curve

A checkpoint is complete or absent: it is written beside its place and renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.arrays import Array, rounded
from ..ir.errors import DscError, require
from ..ir.types import DType, Tensor
from ..passes.optimizer import STATE
from .data import Position
from .train_program import Programs

SCHEMA = 1
KEPT = 2
"""Checkpoints that a run keeps: the last ones."""


@dataclass(frozen=True)
class State:
    """A run after `step` steps. Arrays are never written to: a step makes new ones, so any state may be kept or saved at leisure."""

    step: int
    position: Position
    weights: Mapping[str, Array]
    """Every weight as the model reads it, the gates' biases among them."""
    kept: Mapping[str, tuple[Array, ...]]
    """Master weight and moments of each trained weight, in the order of `passes.optimizer.STATE`."""


def first_state(programs: Programs, seed: int, folder: Path | None = None) -> State:
    """Before the first step: random weights, or those of the checkpoint in `folder`.

    Matrices are normal with the config's `initializer_range` (DeepSeek-V3 itself: 0.006), norms 1 and biases 0. Moments are 0.
    """
    from ..models.checkpoint import CheckpointFolder, RandomWeights
    from ..models.weights import NUMPY_DTYPES, Wanted

    source: Any = RandomWeights(seed, programs.config["initializer_range"])
    if folder is not None:
        source = CheckpointFolder(folder, programs.config)
        source.check([Wanted(name, t.dtype.name, _shape(t)) for name, t in programs.weights.items()])
    moment = NUMPY_DTYPES[programs.adamw.moments.name]
    weights, kept = {}, {}
    for name, tensor in programs.weights.items():
        wide = source.get(Wanted(name, "f32", _shape(tensor)))
        weights[name] = rounded(wide, tensor.dtype)
        if name in programs.trained:
            kept[name] = (wide, np.zeros(wide.shape, moment), np.zeros(wide.shape, moment))
    return State(0, Position(), weights, kept)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(d for d in tensor.shape if isinstance(d, int))


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def save(
    run: Path, state: State, average: Mapping[str, Array] | None, programs: Programs, settings: Mapping[str, Any], files: Mapping[str, str]
) -> Path:
    """Write the checkpoint of `state` with the `average` of the weights and further text `files`; older ones but `KEPT` go.

    Raises `DscError` where it cannot be written; then nothing is left of it.
    """
    from ..models.checkpoint import save_checkpoint
    from ..models.safetensors_file import write_safetensors

    target = folder_of(run, state.step)
    draft = _hidden(target)
    for left in (run / "checkpoints").glob(".*.partial"):  # of a run that was killed
        shutil.rmtree(left)
    try:
        save_checkpoint(draft, state.weights, programs.config)
        if average is not None:
            whole = {name: average.get(name, array) for name, array in state.weights.items()}
            save_checkpoint(draft / "ema", whole, programs.config)
        named = {f"{name}.{what}": a for name, arrays in state.kept.items() for what, a in zip(STATE, arrays, strict=True)}
        write_safetensors(draft / "optimizer.safetensors", named)
        for name, text in files.items():
            (draft / name).write_text(text, encoding="utf-8")
        record = {"schema": SCHEMA, "step": state.step, "position": asdict(state.position), "settings": settings}
        (draft / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        draft.rename(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise DscError(f"{target}: cannot be written: {error.strerror}") from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old.rename(_hidden(old)))
    return target


def _hidden(folder: Path) -> Path:
    """What a checkpoint is called while it is incomplete."""
    return folder.with_name(f".{folder.name}.partial")


def load(folder: Path, programs: Programs, settings: Mapping[str, Any]) -> tuple[State, dict[str, Array] | None]:
    """The state in a checkpoint and the average of the weights, if it has one.

    Raises `DscError` where the checkpoint is of another model or of a run with other settings, naming each difference.
    """
    from ..models.checkpoint import CheckpointFolder, read_json
    from ..models.safetensors_file import SafetensorsFile
    from ..models.weights import Wanted

    record = read_json(folder / "state.json")
    require(record.get("schema") == SCHEMA, f"{folder / 'state.json'}: schema {record.get('schema')}, but this dsc reads {SCHEMA}")
    differing = differences(read_json(folder / "config.json"), programs.config) + differences(record["settings"], settings)
    require(not differing, "\n".join(f"{folder}: {line}" for line in differing))
    stored = CheckpointFolder(folder)
    wanted = {name: Wanted(name, t.dtype.name, _shape(t)) for name, t in programs.weights.items()}
    stored.check(list(wanted.values()))
    file = SafetensorsFile(folder / "optimizer.safetensors").tensors
    kept = {name: tuple(np.array(file[f"{name}.{what}"].array()) for what in STATE) for name in programs.trained}
    weights = {name: np.array(stored.get(item)) for name, item in wanted.items()}
    average = None
    if (folder / "ema").exists():
        ema = CheckpointFolder(folder / "ema")
        average = {name: np.array(ema.get(Wanted(name, DType.f32.name, wanted[name].shape))) for name in programs.trained}
    return State(int(record["step"]), Position(**record["position"]), weights, kept), average


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """A line for each key under which two mappings differ: `num_hidden_layers is 3 there, but 4 was asked for`."""
    keys: Sequence[str] = list(dict.fromkeys([*found, *expected]))
    return [
        f"{key} is {found.get(key)!r} there, but {expected.get(key)!r} was asked for" for key in keys if found.get(key) != expected.get(key)
    ]
