"""Conversion of a checkpoint folder between BF16 and block-scaled FP8, in memory that does not depend on its size.

A reader finds `Conversion`: once made it has checked everything that can be checked without reading data, and `run` writes. What
becomes of each tensor is in `convert_plan`; shards keep their names, and scales lie in the shard of their weight.

DST is worked on in place: each file is written under a passing name and renamed when it is complete and on the disk. While DST has a
`.convert.json`, which says what of, it is unfinished; a second run keeps the shards that it finds there. The index comes after all
other files, config.json after the index.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np

from ..ir.errors import DscError, require
from .checkpoint import CONFIG, INDEX, SINGLE, CheckpointFolder
from .convert_plan import BLOCK, RULE, Form, Task, new_config, plan
from .json_file import read_json
from .safetensors_file import lay_out

__all__ = ["Conversion", "Form", "Summary"]

_STATE, _PARTIAL = ".convert.json", ".convert-*.partial"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class Summary:
    """What a run did: shards written, and kept from an earlier run; bytes of tensors read, of shards written; seconds.

    `left_out` are weights in other files of the source folder, which no index names and which were not taken along.
    """

    shards: int
    kept: int
    bytes_read: int
    bytes_written: int
    seconds: float
    left_out: tuple[str, ...]

    @property
    def megabytes_per_second(self) -> float:
        """Of tensors read, 10^6 bytes."""
        return self.bytes_read / self.seconds / 1e6


@dataclass(frozen=True)
class _Shard:
    """One file to write: its head, the byte at which each result begins, and its size; `read` counts the bytes of its tensors."""

    name: str
    tasks: tuple[Task, ...]
    head: bytes
    starts: Mapping[str, int]
    size: int
    read: int

    @classmethod
    def of(cls, name: str, tasks: tuple[Task, ...]) -> _Shard:
        entries = [entry for task in tasks for entry in task.entries()]
        head, starts = lay_out(entries)
        read = sum(task.tensor.nbytes + (task.scale.nbytes if task.scale else 0) for task in tasks)
        return cls(name, tasks, head, starts, len(head) + sum(entry.nbytes for entry in entries), read)


class Conversion:
    """The conversion of the checkpoint folder `source` to the form `to` ("bf16" or "fp8") as the folder `target`.

    `target` may be absent, empty, or what an interrupted run of the same conversion left. Raises `DscError`, one line for each fault:
    a source that is no checkpoint, already has the form, mixes forms or is quantised in another way; block scales that are missing or
    misshapen; a target that holds something else or lies in the source.
    """

    def __init__(self, source: str | Path, target: str | Path, to: Form) -> None:
        require(to in get_args(Form), f"to {to!r}: expected one of {', '.join(get_args(Form))}")
        self.source, self.target, self.to = Path(source), Path(target), to
        self._folder = CheckpointFolder(self.source)
        require((self.source / CONFIG).exists(), f"{self.source}: has no {CONFIG}, expected a complete checkpoint")
        shards: dict[str, list[Task]] = {}
        for task in plan(self._folder, to):
            shards.setdefault(task.tensor.where, []).append(task)
        self._shards = tuple(_Shard.of(name, tuple(members)) for name, members in sorted(shards.items()))
        inside = self.target.resolve().is_relative_to(self.source.resolve())
        require(not inside, f"{self.target}: lies in the source folder {self.source}, expected a folder outside it")
        self._fingerprint = self._digest()
        self._check_target()

    @property
    def tensors(self) -> int:
        """How many tensors of the source have a part in the result, and so how often `run` calls `on_step`."""
        return sum(len(shard.tasks) for shard in self._shards)

    def run(self, on_step: Callable[[str], None] = lambda name: None) -> Summary:
        """Write the target; `on_step` is told the name of each tensor that is done, or was by an earlier run.

        Raises `DscError` if the target cannot be written, the disk is too small, or a block to be quantised holds an infinity or a NaN.
        An exception of any kind leaves complete shards only, from which the next run goes on.
        """
        start = time.perf_counter()
        try:
            kept = self._prepare()
            for shard in self._shards:
                if shard.name not in kept:
                    self._write_shard(shard, on_step)
                else:
                    for task in shard.tasks:
                        on_step(task.tensor.name)
            left_out = self._copy_others()
            self._finish()
        except OSError as error:
            again = "; once that is mended, the same command goes on from here" if (self.target / _STATE).exists() else ""
            raise DscError(f"{error.filename or self.target}: {error.strerror}{again}") from error
        written = [shard for shard in self._shards if shard.name not in kept]
        read, size = sum(shard.read for shard in written), sum(shard.size for shard in written)
        return Summary(len(written), len(kept), read, size, time.perf_counter() - start, left_out)

    def _digest(self) -> str:
        """What the bytes of the target are a function of, as far as can be told without reading data."""
        files = {name: os.stat(self.source / name) for name in sorted({t.where for t in self._folder.tensors.values()})}
        facts = {
            "rule": f"{RULE} {BLOCK}",
            "config": self._folder.config,
            "files": {name: (stat.st_size, stat.st_mtime_ns) for name, stat in files.items()},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _check_target(self) -> None:
        state = self.target / _STATE
        if state.exists():
            found = read_json(state)
            ours = found.get("fingerprint") == self._fingerprint
            begun = f"of {found.get('source')} to {found.get('to')}" if not ours else ""
            expected = "one of this source as it is now, or a new or empty folder"
            require(ours, f"{self.target}: holds an unfinished conversion {begun}, expected {expected}")
        elif self.target.exists():
            require(self.target.is_dir(), f"{self.target}: is a file, expected a new or empty folder")
            others = set(self.target.iterdir()) - set(self.target.glob(_PARTIAL))
            require(not others, f"{self.target}: exists, expected a new or empty folder or an unfinished conversion of this source")

    def _prepare(self) -> set[str]:
        """Make the target ours, clear away what a killed run was writing, and return the names of the shards that are complete."""
        self.target.mkdir(parents=True, exist_ok=True)
        for partial in self.target.glob(_PARTIAL):
            partial.unlink(missing_ok=True)
        state = {"source": str(self.source.resolve()), "to": self.to, "fingerprint": self._fingerprint}
        self._write_json(self.target / _STATE, state)
        paths = {shard.name: self.target / shard.name for shard in self._shards}
        kept = {shard.name for shard in self._shards if paths[shard.name].exists() and paths[shard.name].stat().st_size == shard.size}
        needed = sum(shard.size for shard in self._shards if shard.name not in kept)
        free = shutil.disk_usage(self.target).free
        require(needed <= free, f"{self.target}: {needed / 1e9:,.2f} GB are still to be written, found {free / 1e9:,.2f} GB free")
        return kept

    def _write_shard(self, shard: _Shard, on_step: Callable[[str], None]) -> None:
        place = dict(shard.starts)
        with self._replacing(self.target / shard.name) as file:
            file.write(shard.head)
            for task in shard.tasks:
                for name, piece in task.pieces():
                    data = piece.reshape(-1).view(np.uint8)
                    file.seek(place[name])
                    file.write(data.data)
                    place[name] += data.nbytes
                on_step(task.tensor.name)

    def _copy_others(self) -> tuple[str, ...]:
        """Copy what belongs to the folder and is not this checkpoint's weights; returns the weights in other files."""
        written = {CONFIG, INDEX, _STATE, *(tensor.where for tensor in self._folder.tensors.values())}
        left_out = []
        for path in sorted(self.source.rglob("*")):
            inside = path.relative_to(self.source)
            hidden = any(part.startswith(".") for part in inside.parts[:-1])
            if not path.is_file() or str(inside) in written or hidden:
                continue
            if path.suffix in _OTHER_WEIGHTS:
                left_out.append(str(inside))
                continue
            (self.target / inside).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "rb") as source, self._replacing(self.target / inside) as file:
                shutil.copyfileobj(source, file)
        return tuple(left_out)

    def _finish(self) -> None:
        if not (self.source / SINGLE).exists():
            names = {name: shard.name for shard in self._shards for name in shard.starts}
            total = sum(shard.size - len(shard.head) for shard in self._shards)
            metadata = read_json(self.source / INDEX).get("metadata")
            metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
            self._write_json(self.target / INDEX, {"metadata": metadata, "weight_map": dict(sorted(names.items()))})
        self._write_json(self.target / CONFIG, new_config(self._folder.config, self.to))
        (self.target / _STATE).unlink(missing_ok=True)

    def _write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        with self._replacing(path) as file:
            file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[BinaryIO]:
        """A file to write that becomes `path` when the block ends, complete and on the disk, and is gone if it fails."""
        partial = self.target / _PARTIAL.replace("*", secrets.token_hex(8))
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
