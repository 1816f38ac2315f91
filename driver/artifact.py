"""The artifact: one relocatable folder that says what was compiled, how, and what each pass did.

    manifest.json           what, with which command and versions, and the list of passes
    ir/00-traced.dsc        the program as traced, then one file per pass, with a .diff where the pass changed something
    ir/update.dsc           of a model in training: the optimiser's program, which takes the gradients that the last of these returns
    constants.safetensors   arrays too large for text, if there are any
    plan/memory.json        weights and peak live bytes by function
    plan/schedule.txt       of a pipeline: what each rank does, in order, with sends and receives; what stands there is what runs
    report.html             all of it as one page

A folder is written beside its place and renamed, so it is complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..ir.core import Module
from ..ir.errors import DscError, faults, require
from ..models.json_file import read_json
from .interrupt import check

SCHEMA = 1
MANIFEST = "manifest.json"
CONSTANTS = "constants.safetensors"
UPDATE = "ir/update.dsc"
MEMORY = "plan/memory.json"
REPORT = "report.html"


class Entry(BaseModel):
    """Base of the manifest's records: unknown keys are refused, so that a newer schema is noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PassRecord(Entry):
    """What one pass did. The first record of a manifest is the tracer's."""

    name: str
    text: str
    seconds: float
    ops: int
    changed: bool
    file: str
    diff: str | None = None
    notes: tuple[str, ...] = ()


class Manifest(Entry):
    """manifest.json."""

    schema_version: int = SCHEMA
    dsc_version: str
    command: tuple[str, ...]
    source: str
    source_kind: str
    source_sha256: str | None
    mode: str
    stage: str
    weights: str
    config: dict[str, Any] | None
    passes: tuple[PassRecord, ...] = Field(min_length=1)
    versions: dict[str, str]

    @property
    def reasons(self) -> dict[str, str]:
        """Why a product was left as it was, by `@function id`, as passes noted it."""
        return dict(line.split(": ", 1) for record in self.passes for line in record.notes if ": " in line)


@dataclass(frozen=True)
class Artifact:
    """A compiled program on disk."""

    path: Path
    manifest: Manifest
    compiled: Module | None = field(default=None, repr=False, compare=False)
    """The program, where it need not be read: it was just compiled."""

    @cached_property
    def module(self) -> Module:
        """The program after the last pass."""
        return self.compiled or self._read(self.manifest.passes[-1])

    @cached_property
    def update(self) -> Module | None:
        """The optimiser's program, of a model in training."""
        from ..ir.parser import parse

        file = self.path / UPDATE
        return parse(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None

    def after(self, name: str) -> Module:
        """The program after the last pass of that name; `traced` is the program before any."""
        return self._read(self._record(name))

    def text_of(self, record: PassRecord) -> str:
        """The program after a step, as it stands on disk."""
        return self._file(record.file).read_text(encoding="utf-8")

    def _record(self, name: str) -> PassRecord:
        found = [p for p in self.manifest.passes if p.name == name]
        require(bool(found), f"{self.path}: no pass {name}; it ran {', '.join(p.name for p in self.manifest.passes)}")
        return found[-1]

    def _read(self, record: PassRecord) -> Module:
        from ..ir.parser import parse

        module = parse(self.text_of(record), str(self.path / record.file))
        return module.replace(constants=self.constants)

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The arrays of constants.safetensors by name, as read-only views of the file."""
        return constants_of(self.path)

    def data_of(self, name: str) -> Any:
        """What a JSON file of the artifact says."""
        return read_json(self._file(name))

    def _file(self, name: str) -> Path:
        file = self.path / name
        require(file.is_file(), f"{file} is missing from the artifact; compile it again")
        return file


def constants_of(folder: Path) -> dict[str, Any]:
    """The constants of the artifact in `folder`, by name; none where it has none."""
    file = folder / CONSTANTS
    if not file.exists():
        return {}
    from ..models.safetensors_file import SafetensorsFile

    return {name: tensor.array() for name, tensor in SafetensorsFile(file).tensors.items()}


def is_artifact(path: Path) -> bool:
    """Whether `path` is a folder with a manifest of ours."""
    try:
        return "dsc_version" in json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def load(path: str | Path) -> Artifact:
    """The artifact at `path`. Raises `DscError` where there is none, or one of another schema.

    >>> made = dsc.compile("deepseek-v3-tiny", out="tiny", seq=16)
    >>> dsc.load("tiny").module == made.module
    True
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        found = "no such folder" if not folder.exists() else "a file" if folder.is_file() else "a folder without manifest.json"
        raise DscError(f"{folder}: expected an artifact made by dsc compile, found {found}")
    raw = read_json(file, object)
    require(isinstance(raw, dict) and "dsc_version" in raw, f"{file}: not a manifest of dsc")
    version = raw.get("schema_version")
    require(version == SCHEMA, f"{file}: schema version {version}, but this dsc reads {SCHEMA}; compile it again")
    try:
        return Artifact(folder, Manifest.model_validate(raw))
    except ValidationError as error:
        raise DscError(f"{file}: {faults(error.errors())}") from None


def check_target(path: Path) -> None:
    """Refuse to overwrite what dsc did not make, before any work is done."""
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not is_artifact(path)):
        kind = "a file" if path.is_file() else "a folder that is not an artifact"
        raise DscError(f"{path} exists and is {kind}; expected a new folder, an empty one or an artifact to replace")
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    require(parent.is_dir(), f"{path} cannot be written: {parent} is a file")
    require(os.access(parent, os.W_OK), f"{path} cannot be written: no permission to write in {parent}")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not."""
    target = path.resolve()
    made = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise DscError(f"{path} cannot be written: {error.strerror}") from None
    old = draft.with_name(draft.name + ".old")
    try:
        yield draft
        check()
        draft.chmod(0o777 & ~_umask())
        if target.exists():
            target.rename(old)
        draft.rename(target)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(draft, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise DscError(f"{path} cannot be written: {error.strerror or error}; nothing was left behind") from None
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file to write beside `file`, which it becomes when the block ends well, and which vanishes when it does not."""
    draft = file.with_name(f".{file.name}.partial")
    try:
        with draft.open("wb") as stream:
            yield stream
        draft.replace(file)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DscError(f"{file} cannot be written: {error.strerror or error}") from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def versions() -> dict[str, str]:
    """Of Python and of the libraries that this process has used."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "numpy", "ml_dtypes", "transformers", "triton"):
        if (module := sys.modules.get(name)) is not None:
            found[name] = str(module.__version__)
    return found
