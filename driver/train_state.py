"""The state of a training run, and its checkpoints: folders that Hugging Face's layout describes, with what else a run needs to go on.

    RUN/checkpoints/step-00000200/
      config.json, model.safetensors     the model as it is read, for dsc and for transformers
      tokenizer.json                     how text becomes its tokens
      optimizer.safetensors              master weights and both moments of each weight
      ema/                               the average of the weights, as a model of its own, if one is kept
      state.json                         the step, the position in the data, and what determines the curve

A checkpoint is complete or absent: it is written beside its place and renamed. It is whole whatever the mesh of the run, and a run on any
other goes on from it.
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
from ..ir.sharding import Split, part
from ..ir.types import DType, Tensor
from ..passes.optimizer import STATE
from .data import Position
from .train_program import Programs
from .train_ranks import Part, Team, Whole, leads

SCHEMA = 1
KEPT = 2
"""Checkpoints that a run keeps: the last ones."""


@dataclass(frozen=True)
class Held:
    """What one rank has of a run. Arrays are never written to: a step makes new ones, so any state may be kept or saved at leisure."""

    weights: Mapping[str, Array]
    """Every weight that the rank reads, as the model reads it, the gates' biases among them."""
    kept: Mapping[str, tuple[Array, ...]]
    """Master weight and moments of each weight that the rank updates, in the order of `passes.optimizer.STATE`."""


@dataclass(frozen=True)
class State:
    """A run after `step` steps: what each rank of this process has. On one rank `weights` and `kept` are the whole state."""

    step: int
    position: Position
    held: tuple[Held, ...]

    @property
    def weights(self) -> Mapping[str, Array]:
        return self.held[0].weights

    @property
    def kept(self) -> Mapping[str, tuple[Array, ...]]:
        return self.held[0].kept


def first_state(programs: Programs, seed: int, folder: Path | None = None, ranks: Sequence[int] = (0,)) -> State:
    """Before the first step, of these `ranks`: random weights, or those of the checkpoint in `folder`, of which a rank reads its parts.

    Matrices are normal with the config's `initializer_range` (DeepSeek-V3 itself: 0.006), norms 1 and biases 0. Moments are 0.
    """
    from ..models.checkpoint import CheckpointFolder, RandomWeights
    from ..models.weights import NUMPY_DTYPES, Wanted, part_of

    source: Any = RandomWeights(seed, programs.config["initializer_range"])
    if folder is not None:
        source = CheckpointFolder(folder, programs.config)
        source.check([Wanted(name, t.dtype.name, _shape(t)) for name, t in programs.weights.items()])
    moment = NUMPY_DTYPES[programs.adamw.moments.name]
    held = []
    for rank in ranks:
        weights, kept = {}, {}
        updated = set(programs.kept_at[programs.place(rank)])
        for name in programs.read_at[programs.place(rank)]:
            tensor = programs.weights[name]
            wanted = Wanted(name, "f32", _shape(tensor))
            own = _part(programs, programs.weight_splits[name], tensor, rank)
            weights[name] = rounded(part_of(source, wanted, own), tensor.dtype)
            if name in updated:
                master = np.array(part_of(source, wanted, _part(programs, programs.state_splits[name], tensor, rank)))
                kept[name] = (master, np.zeros(master.shape, moment), np.zeros(master.shape, moment))
        held.append(Held(weights, kept))
    return State(0, Position(), tuple(held))


def _part(programs: Programs, split: Split, tensor: Tensor, rank: int) -> tuple[slice, ...]:
    return part(split, _shape(tensor), programs.mesh, rank)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(d for d in tensor.shape if isinstance(d, int))


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def save(
    run: Path,
    state: State,
    averages: Sequence[Mapping[str, Array]] | None,
    programs: Programs,
    settings: Mapping[str, Any],
    files: Mapping[str, str],
    team: Team,
) -> Path:
    """Write the checkpoint of `state` with the `averages` of the weights and further text `files`; older ones but `KEPT` go.

    Every process of the team calls it; the one that leads writes, a tensor at a time. Raises `DscError` where it cannot be written; then
    nothing is left of it.
    """
    from ..models.checkpoint import save_checkpoint
    from ..models.safetensors_file import stream_safetensors

    weights = Whole(team, {name: _weight(programs, state, name) for name in programs.weights})
    ema = Whole(team, {name: _averaged(programs, state, averages, name) for name in programs.weights} if averages else {})
    optimizer = Whole(team, _state(programs, state))
    target = folder_of(run, state.step)
    if not leads(team):
        for arrays in (weights, ema, optimizer):
            arrays.give()
        return target
    draft = _hidden(target)
    for left in (run / "checkpoints").glob(".*.partial"):  # of a run that was killed
        shutil.rmtree(left)
    try:
        save_checkpoint(draft, weights, programs.config)
        if averages is not None:
            save_checkpoint(draft / "ema", ema, programs.config)
        stream_safetensors(draft / "optimizer.safetensors", {name: part.type for name, part in optimizer.parts.items()}, optimizer)
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


def _weight(programs: Programs, state: State, name: str) -> Part:
    ranks = programs.holders(name, programs.read_at)
    return Part(programs.weights[name], programs.weight_splits[name], ranks, [held.weights.get(name) for held in state.held])


def _averaged(programs: Programs, state: State, averages: Sequence[Mapping[str, Array]], name: str) -> Part:
    """The average of a trained weight in float32; what is not trained as it is."""
    if name not in programs.trained:
        return _weight(programs, state, name)
    return _updated(programs, name, DType.f32, [values.get(name) for values in averages])


def _updated(programs: Programs, name: str, dtype: DType, held: Sequence[Array | None]) -> Part:
    """What ranks that update a weight have of it, in their parts."""
    ranks = programs.holders(name, programs.kept_at)
    return Part(Tensor(dtype, programs.weights[name].shape), programs.state_splits[name], ranks, held)


def _state(programs: Programs, state: State) -> dict[str, Part]:
    """The optimiser's state by the names that it has in a checkpoint, those of wide elements first, as they lie in the file."""
    dtypes = (DType.f32, programs.adamw.moments, programs.adamw.moments)
    found = {}
    for name in programs.trained:
        for i, (what, dtype) in enumerate(zip(STATE, dtypes, strict=True)):
            own = [held.kept[name][i] if name in held.kept else None for held in state.held]
            found[f"{name}.{what}"] = _updated(programs, name, dtype, own)
    return dict(sorted(found.items(), key=lambda item: -item[1].type.dtype.bits))


def _hidden(folder: Path) -> Path:
    """What a checkpoint is called while it is incomplete."""
    return folder.with_name(f".{folder.name}.partial")


def load(
    folder: Path, programs: Programs, settings: Mapping[str, Any], ranks: Sequence[int] = (0,)
) -> tuple[State, list[dict[str, Array]] | None]:
    """The state of `ranks` in a checkpoint, of which a rank reads its parts, and the averages of the weights, if it has one.

    Raises `DscError` where the checkpoint is of another model or of a run with other settings, naming each difference.
    """
    from ..models.checkpoint import CheckpointFolder
    from ..models.json_file import read_json
    from ..models.safetensors_file import SafetensorsFile
    from ..models.weights import Wanted, part_of

    record = read_json(folder / "state.json")
    require(record.get("schema") == SCHEMA, f"{folder / 'state.json'}: schema {record.get('schema')}, but this dsc reads {SCHEMA}")
    differing = differences(read_json(folder / "config.json"), programs.config) + differences(record["settings"], settings)
    require(not differing, "\n".join(f"{folder}: {line}" for line in differing))
    stored = CheckpointFolder(folder)
    wanted = {name: Wanted(name, t.dtype.name, _shape(t)) for name, t in programs.weights.items()}
    stored.check(list(wanted.values()))
    file = SafetensorsFile(folder / "optimizer.safetensors").tensors
    ema = CheckpointFolder(folder / "ema") if (folder / "ema").exists() else None
    held, averages = [], []
    for rank in ranks:
        own, state = (
            {name: _part(programs, splits[name], programs.weights[name], rank) for name in splits}
            for splits in (programs.weight_splits, programs.state_splits)
        )
        updated = programs.kept_at[programs.place(rank)]
        weights = {name: np.array(part_of(stored, wanted[name], own[name])) for name in programs.read_at[programs.place(rank)]}
        kept = {name: tuple(np.array(file[f"{name}.{what}"].array()[state[name]]) for what in STATE) for name in updated}
        held.append(Held(weights, kept))
        if ema:
            wide = {name: Wanted(name, DType.f32.name, wanted[name].shape) for name in updated}
            averages.append({name: np.array(part_of(ema, item, state[name])) for name, item in wide.items()})
    return State(int(record["step"]), Position(**record["position"]), tuple(held)), averages if ema else None


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """A line for each key under which two mappings differ: `num_hidden_layers is 3 there, but 4 was asked for`."""
    keys: Sequence[str] = list(dict.fromkeys([*found, *expected]))
    return [
        f"{key} is {found.get(key)!r} there, but {expected.get(key)!r} was asked for" for key in keys if found.get(key) != expected.get(key)
    ]
