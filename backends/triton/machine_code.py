"""Machine code for a GPU that is here: from an artifact's `kernels/` or the cache where it lies there by its content key, else compiled.

What runs is thus what `dsc compile --target` writes and its tests disassemble: the same signature, alignment and options. Triton's own
just-in-time path specialises on the values of arguments as well, and looks at each of them at every launch; here a kernel is loaded once,
as `triton.compile` loads what lies in its own cache, and Triton's launcher is called directly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .aot import METADATA, Job, compile_jobs
from .compile_worker import ast_source


@dataclass
class MachineCode:
    """Loaded kernels by content key. `folder` is `kernels/` of an artifact: what is there and fits is not compiled again."""

    folder: Path | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    files: dict[str, tuple[Path, Path]] = field(default_factory=dict)
    """Triton's description and the binary of each key that was found or compiled."""

    def obtain(self, jobs: Sequence[Job]) -> None:
        """Find or compile the files of each job, in parallel processes. `DscError` names what does not compile."""
        missing = {job.key: job for job in jobs if job.key not in self.files and not self._in_artifact(job)}
        for made in compile_jobs(list(missing.values())):
            folder = made.folder
            self.files[made.job.key] = (folder / f"kernel.{METADATA}", folder / f"kernel.{made.job.target.binary}")

    def load(self, job: Job, kernel: Any) -> Any:
        """The `triton.compiler.CompiledKernel` of a job of `kernel`, obtained now if it was not before."""
        if job.key not in self.loaded:
            from triton.compiler.compiler import CompiledKernel

            self.obtain([job])
            group = {file.name: str(file) for file in self.files[job.key]}
            self.loaded[job.key] = CompiledKernel(ast_source(kernel, job.signature, job.constants, job.divisible), group, job.key)
        return self.loaded[job.key]

    def _in_artifact(self, job: Job) -> bool:
        if self.folder is None:
            return False
        stem = self.folder / job.target.name / job.name
        description, metadata, binary = (stem.with_name(f"{job.name}.{end}") for end in ("json", METADATA, job.target.binary))
        if not (description.is_file() and json.loads(description.read_text())["key"] == job.key and metadata.is_file()):
            return False
        self.files[job.key] = (metadata, binary)
        return True
