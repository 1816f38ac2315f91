"""Which schedule a pipeline of ranks follows: by name, from a file, from the artifact, or what suits the program if nobody says."""

from __future__ import annotations

from pathlib import Path

from ..ir.core import Module
from ..ir.errors import require
from ..ir.mesh import Mesh, mesh_of
from ..ir.stages import stages_of
from ..models.json_file import present
from ..schedule.actions import Kind, Schedule, parse
from ..schedule.generate import NAMES, SIMPLE, generate
from ..schedule.search import search
from ..schedule.simulate import Durations
from ..schedule.validate import check

FILE = "plan/schedule.txt"
"""Where an artifact has its schedule."""
EACH = 2
"""Micro-batches for each stage, unless said: what dualpipe takes at least."""


def schedule_of(mesh: Mesh, mode: str, name: str | None, microbatches: int | None, chunks: int | None = None) -> Schedule:
    """The schedule `name` for the ranks along pp: a published one, `auto`, or a file. It says how many stages there are to be.

    Without a name it is `1f1b` in training, and otherwise `forward`. `DscError` where there is no such schedule.
    """
    for option, number in {"--microbatches": microbatches, "--chunks": chunks}.items():
        require(number is None or number > 0, f"{option} is {number}, expected 1 or more")
    name = name or ("1f1b" if mode == "train" else "forward")
    if name.endswith((".csv", ".txt")):
        return read_schedule(Path(name))
    known = ("auto", *NAMES, *SIMPLE)
    require(name in known, f"unknown schedule {name}, expected a .csv file or one of {', '.join(known)}")
    if name == "auto":
        best = search(mesh.pp, microbatches or EACH * mesh.pp, Durations())[0]
        return generate(best.name, best.stages, microbatches or EACH * mesh.pp, best.chunks)
    each = chunks or (2 if name in ("interleaved", "dualpipev") else 1)
    stages = mesh.pp if name == "dualpipe" else mesh.pp * each
    return generate(name, stages, microbatches or EACH * stages, chunks)


def schedule_for(module: Module, name: str | None = None, microbatches: int | None = None) -> Schedule:
    """The schedule `name` for a staged program of a mesh, which has its number of stages."""
    stages, mesh = stages_of(module), mesh_of(module)
    chunks = len(stages) // mesh.pp
    if name is None:
        name = "forward" if not stages.backwards else "1f1b" if chunks == 1 else "interleaved"
    two = name in ("dualpipe", "dualpipev")
    return schedule_of(mesh, "", name, microbatches, None if two or chunks == 1 else chunks)


def read_schedule(file: Path) -> Schedule:
    """The schedule in a file, checked."""
    found = parse(present(file, "the CSV of a schedule").read_text(encoding="utf-8", errors="replace"), str(file))
    check(found)
    return found


def takes_split(schedule: Schedule) -> bool:
    """Whether it takes the two parts of the backward pass apart."""
    return any(action.kind is Kind.I for _, _, action in schedule.actions())
