"""Checkpoints in Hugging Face's layout, and `open_weights`, which turns whatever a user names into weights.

A checkpoint is a folder with `config.json` and either `model.safetensors` or several shards, `model-00001-of-00163.safetensors`
and so on, with `model.safetensors.index.json`, which says where each tensor is.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..ir.errors import DscError, require
from .expert_names import parts
from .json_file import read_json
from .random_weights import RandomWeights
from .safetensors_file import FileTensor, SafetensorsFile, write_safetensors
from .state_dict import StateDict
from .stored_weights import StoredWeights
from .weights import DTYPE_NAMES, Wanted, Weights, type_text

__all__ = ["CheckpointFolder", "RandomWeights", "StateDict", "Wanted", "Weights", "open_weights", "save_checkpoint"]

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


class Place(NamedTuple):
    """Where a tensor of `shape` begins in a file, in bytes; `name` is what the disk calls it, an expert by its own, `dtype` what it is."""

    name: str
    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str


class CheckpointFolder(StoredWeights):
    """The weights of a checkpoint folder. Opening reads headers only; tensors come from memory maps, converted in slices.

    `config` overrides fields of the folder's config.json, which may be absent. `tensors` maps each on-disk name to its file,
    dtype, shape, and place in the file. Raises `DscError`, one line for each fault: no safetensors here, a shard that is absent,
    truncated or corrupt, a tensor that the index promises and its shard lacks.
    """

    tensors: Mapping[str, FileTensor]

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        require(self.folder.is_dir(), f"{self.folder}: no such folder, expected a checkpoint with {SINGLE} or {INDEX}")
        path = self.folder / CONFIG
        self.config: dict[str, Any] = read_json(path) if path.exists() else {}
        tensors = self._single() if (self.folder / SINGLE).exists() else self._sharded()
        super().__init__(tensors, f"checkpoint {self.folder}", {**self.config, **(config or {})})

    def places(self, wanted: Wanted) -> list[Place]:
        """Where the bytes of `wanted` lie: in one place, or one for each matrix of a stack.

        They are of the wanted dtype, or in one place of another float of 16 or 32 bits, which the place says: a cast makes the one of
        the other. Raises `DscError` where `check` would, and where the tensor would have to be converted otherwise.
        """
        copies, problems = self._plan(wanted)
        self._report(problems)
        found = []
        for tensor, part in ((self.tensors[copy.source.tensor.name], copy.source.part) for copy in copies):
            stored, expected = type_text(tensor.dtype, part.shape), f"{wanted.name}: expected {type_text(wanted.dtype, part.shape)}"
            castable = len(copies) == 1 and {tensor.dtype, wanted.dtype} <= {"f32", "f16", "bf16"}
            fine = castable or tensor.dtype == wanted.dtype
            require(fine, f"{expected} as the program reads it, found {stored} in {tensor.where}")
            found.append(Place(part.name, tensor.file.path, tensor.start + _offset(tensor, part.index), part.shape, tensor.dtype))
        return found

    def _single(self) -> dict[str, FileTensor]:
        return SafetensorsFile(self.folder / SINGLE).tensors

    def _sharded(self) -> dict[str, FileTensor]:
        path = self.folder / INDEX
        if not path.exists():
            pickled = sorted(file.name for file in self.folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
            found = f"found only {', '.join(pickled)}, pickles, which are not read" if pickled else "found neither"
            raise DscError(f"{self.folder}: expected {SINGLE} or {INDEX}, {found}")
        weight_map: Any = read_json(path).get("weight_map")
        require(
            isinstance(weight_map, dict) and all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()),
            f"{path}: expected a weight_map from tensor names to file names in the same folder",
        )
        faults: list[str] = []
        shards: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(weight_map.values())):
            try:
                shards[shard] = SafetensorsFile(self.folder / shard)
            except DscError as error:
                faults.append(str(error) if (self.folder / shard).exists() else f"{self.folder / shard}: absent, though {INDEX} names it")
        for name, shard in weight_map.items():
            if shard in shards and name not in shards[shard].tensors:
                faults.append(f"{self.folder / shard}: lacks {name!r}, which {INDEX} places there")
        if faults:
            raise DscError("\n".join(faults))
        unlisted = {name: tensor for shard in shards.values() for name, tensor in shard.tensors.items()}
        return unlisted | {name: shards[shard].tensors[name] for name, shard in weight_map.items()}


def open_weights(spec: str | Path | Mapping[str, Any] | Weights, *, config: Mapping[str, Any] | None = None) -> Weights:
    """The weights that `spec` names: `random:SEED`, a checkpoint folder, a mapping from names to tensors, or weights already open.

    `config` is the program's config.json; for a folder it overrides the folder's own. Raises `DscError` for anything else.
    """
    if isinstance(spec, str) and (match := re.fullmatch(r"random:(\d+)", spec)):
        return RandomWeights(int(match[1]))
    if isinstance(spec, str | Path) and Path(spec).is_dir():
        return CheckpointFolder(spec, config)
    if isinstance(spec, Mapping):
        return StateDict(spec, config)
    if isinstance(spec, Weights):
        return spec
    found = repr(str(spec)) if isinstance(spec, str | Path) else f"an object of type {type(spec).__name__}"
    raise DscError(f"weights: found {found}, expected random:SEED, a checkpoint folder, or a mapping such as model.state_dict()")


def _offset(tensor: FileTensor, index: tuple[int | slice, ...]) -> int:
    """How many bytes into `tensor` its part `tensor[index]` begins, which is whole rows of it."""
    stride, offset = tensor.nbytes, 0
    for at, extent in zip(index, tensor.shape, strict=False):
        stride //= extent
        offset += stride * (at.start if isinstance(at, slice) else at)
    return offset


def save_checkpoint(folder: str | Path, weights: Mapping[str, np.ndarray], config: Mapping[str, Any], shard_bytes: float = 5e9) -> None:
    """Write `weights` and `config` as a new checkpoint folder: stacked experts one by one, a new shard when one would pass `shard_bytes`.

    Each value of `weights` is looked up once, in order, and held until its shard is written. Everything is written into
    a folder beside the target, which is renamed at the end: the target is complete or absent. Raises `DscError` if the
    target exists and is not an empty folder, if it cannot be written, for two tensors of one on-disk name, and for a dtype that
    checkpoints lack.
    """
    target = Path(folder)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        require(not target.exists() or (target.is_dir() and not any(target.iterdir())), f"{target}: exists, expected a new or empty folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        try:
            _write_shards(beside, weights, shard_bytes)
            (beside / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
            beside.replace(target)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    except OSError as error:
        raise DscError(f"{target}: cannot be written: {error.strerror}") from error


def _write_shards(folder: Path, weights: Mapping[str, np.ndarray], shard_bytes: float) -> None:
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(weights, shard_bytes):
        write_safetensors(folder / f"{len(shards)}", shard)
        shards.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
    if len(shards) == 1:
        (folder / "0").rename(folder / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(weights: Mapping[str, np.ndarray], shard_bytes: float) -> Iterator[dict[str, np.ndarray]]:
    """The on-disk tensors of `weights`, as many at a time as fit into `shard_bytes`, at least one."""
    seen: set[str] = set()
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in weights.items():
        require(array.dtype in DTYPE_NAMES, f"{name}: found dtype {array.dtype}, expected one of {', '.join(DTYPE_NAMES.values())}")
        for part in parts(name, array.shape):
            require(part.name not in seen, f"{name}: {part.name} has been written before, from another tensor")
            seen.add(part.name)
            if shard and size + array[part.index].nbytes > shard_bytes:
                yield shard
                shard, size = {}, 0
            shard[part.name] = array[(*part.index, ...)]
            size += shard[part.name].nbytes
    yield shard
