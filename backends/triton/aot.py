"""Compilation ahead of time: every kernel that a program needs, for any target, on a machine without a GPU.

Jobs run in worker processes, each with a time limit. What is compiled is kept by content: the key is a hash of the kernel's source (with
the functions that it calls), its signature, constants and options, the target and the compiler's version, never of a path.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...ir.core import Module
from ...ir.errors import DscError
from ...ir.ops.fused import Fused
from .program import FunctionPlan, Plans, layout_of, plan_function
from .registry import Launch, Slot
from .targets import Target

TIME_LIMIT = 300.0
"""Seconds that one kernel may take: the largest take about 20 on a laptop's core."""

METADATA = "triton.json"
"""The ending of Triton's description of a binary, which its loader wants beside it."""


@dataclass(frozen=True)
class Job:
    """One kernel for one target, all that its machine code depends on."""

    target: Target
    module: str
    function: str
    source: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    """Arguments known to be multiples of 16: addresses, and the extents that are."""
    options: dict[str, Any]
    ops: tuple[str, ...] = ()
    """The ops that it runs, by name."""

    @property
    def content(self) -> dict[str, Any]:
        """What the key is made of."""
        return {
            "source": self.source,
            "function": self.function,
            "signature": self.signature,
            "constants": self.constants,
            "divisible": self.divisible,
            "options": self.options,
            "target": self.target.name,
            "compiler": compiler(),
            "files": (self.target.assembly, self.target.binary, METADATA),
        }

    @property
    def key(self) -> str:
        """The content's SHA-256."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.function}_{self.key[:8]}"


@dataclass(frozen=True)
class Compiled:
    """What became of a job. `files` lie in the cache; `facts` are entry, shared, num_warps, registers, spill_bytes, matrix."""

    job: Job
    folder: Path
    facts: dict[str, Any] = field(hash=False)
    cached: bool = False


@cache
def compiler() -> str:
    """Triton's version, and the assembler's where the environment names another than the one it ships."""
    text = f"triton {version('triton')}"
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        if path := os.environ.get(variable):
            text += "; " + subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    return text


def jobs(module: Module, targets: Sequence[Target]) -> list[Job]:
    """The kernels that `module` needs on each of `targets`, each once."""
    found: list[Job] = []
    for target in targets:
        plans: Plans = {}
        found += jobs_of(plan_function(module, module.main, [layout_of(p.type) for p in module.main.params], target, plans), target)
    return found


def jobs_of(plan: FunctionPlan, target: Target) -> list[Job]:
    """The kernels of a plan for `target`, each once."""
    found: dict[str, Job] = {}
    for step in plan.all_steps():
        for launch in step.launches:
            job = job_of(launch, target, str(step.op.callee) if isinstance(step.op, Fused) else step.op.name)
            known = found.get(job.key)
            found[job.key] = job if known is None else _also(known, job.ops)
    return list(found.values())


def _also(job: Job, ops: tuple[str, ...]) -> Job:
    return job if set(ops) <= set(job.ops) else Job(**{**vars(job), "ops": (*job.ops, *ops)})


def job_of(launch: Launch, target: Target, op: str, unaligned: Container[str] = ()) -> Job:
    """The machine code that a launch needs. Tensors but `unaligned` ones lie at multiples of 16 bytes, as they do in the arena."""
    kernel = launch.kernel
    signature, divisible = {}, []
    for name in kernel.arg_names:
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        given = launch.arguments[name]
        if isinstance(given, Slot):
            signature[name] = given.pointer
        elif isinstance(given, int):
            signature[name] = "i32" if -(2**31) <= given < 2**31 else "i64"
        else:
            signature[name] = "fp32"
        if (isinstance(given, Slot) and name not in unaligned) or (isinstance(given, int) and given % 16 == 0):
            divisible.append(name)
    function = kernel.fn
    return Job(
        target,
        function.__module__,
        function.__name__,
        _source(function),
        signature,
        dict(launch.constants),
        tuple(divisible),
        launch.options,
        (op,),
    )


@cache
def _source(function: Any) -> str:
    return "\n\n".join(sources(function))


def sources(function: Any) -> list[str]:
    """The text of a kernel and of the functions of dsc that it calls, in the order of first use, and the constants that it reads."""
    texts: dict[str, str] = {}

    def visit(given: Any) -> None:
        plain = getattr(given, "fn", given)
        text = inspect.getsource(plain)
        texts[f"{plain.__module__}.{plain.__name__}"] = text
        for node in ast.walk(ast.parse(text)):
            used = plain.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            inner = getattr(used, "fn", used)
            if inspect.isfunction(inner) and inner.__module__.startswith(__package__) and inner.__name__ != "device":
                if f"{inner.__module__}.{inner.__name__}" not in texts:
                    visit(used)
            elif isinstance(node, ast.Name) and type(used).__name__ == "constexpr" and node.id != "INTERPRET":
                texts[node.id] = f"{node.id} = {used}"

    visit(function)
    return list(texts.values())


def cache_folder() -> Path:
    """Where compiled kernels are kept: `dsc/kernels` under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsc" / "kernels"


def compile_jobs(
    wanted: Sequence[Job],
    *,
    workers: int | None = None,
    limit: float = TIME_LIMIT,
    cache: Path | None = None,
    on_done: Callable[[str], None] = lambda name: None,
) -> list[Compiled]:
    """Compile each job or take it from the cache. `DscError` names the jobs that failed, with the first one's reason.

    `limit` is in seconds for each job; `on_done` is called with each job's name, from any thread.
    """
    store = cache_folder() if cache is None else cache
    store.mkdir(parents=True, exist_ok=True)
    pool = _Pool(limit)
    count = max(1, min(workers or os.cpu_count() or 1, len(wanted)))

    def one(job: Job) -> Compiled | str:
        found = _load(store, job) or pool.compile(store, job)
        on_done(f"{job.target.name} {job.function}")
        return found

    try:
        with ThreadPoolExecutor(count) as threads:
            results = list(threads.map(one, wanted))
    finally:
        pool.close()
    failed = [f"{job.target.name} {job.name}: {r}" for job, r in zip(wanted, results, strict=True) if isinstance(r, str)]
    if failed:
        raise DscError(f"{len(failed)} of {len(wanted)} kernels did not compile; {failed[0]}")
    return [r for r in results if isinstance(r, Compiled)]


def _load(store: Path, job: Job) -> Compiled | None:
    folder = store / job.key
    try:
        return Compiled(job, folder, json.loads((folder / "facts.json").read_text()), cached=True)
    except FileNotFoundError:
        return None


class _Worker:
    """One compiling process."""

    def __init__(self) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="dsc-triton-")
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": self.scratch.name}
        package = __package__.split(".")
        root = str(Path(sys.modules[package[0]].__file__ or "").resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.compile_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
        )

    def ask(self, job: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer to one job; {"error": ...} where the process died or took too long, after which it cannot be asked again."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": self._last_words()}
        if not select.select([self.process.stdout], [], [], limit)[0]:
            return {"error": f"took longer than {limit:g} s"}
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        return answer

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"the compiler ended with exit code {code}{f': {lines[-1]}' if lines else ''}"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()
        self.scratch.cleanup()


class _Pool:
    """Workers, one per thread, started when they are needed."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.local = threading.local()
        self.workers: list[_Worker] = []

    def compile(self, store: Path, job: Job) -> Compiled | str:
        """The job compiled into the cache, or why it could not be."""
        worker: _Worker | None = getattr(self.local, "worker", None)
        if worker is None or worker.process.poll() is not None:
            worker = self.local.worker = _Worker()
            self.workers.append(worker)
        target = job.target
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=store))
        try:
            asked = {
                **{"module": job.module, "function": job.function, "signature": job.signature, "constants": job.constants},
                **{"divisible": job.divisible, "options": job.options, "folder": str(draft)},
                **{"gpu": (target.backend, target.arch, target.warp_size), "endings": (target.assembly, target.binary)},
            }
            facts = worker.ask(asked, self.limit)
            if "error" in facts:
                if worker.process.poll() is None and "took longer" in facts["error"]:
                    worker.process.kill()
                return str(facts["error"])
            (draft / "kernel.py").write_text(job.source, encoding="utf-8")
            (draft / "content.json").write_text(json.dumps(job.content, indent=1))
            (draft / "facts.json").write_text(json.dumps(facts))
            folder = store / job.key
            try:
                draft.rename(folder)
            except OSError:  # another process was first: its files are the same
                if not folder.is_dir():
                    raise
            return Compiled(job, folder, facts)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def write(compiled: Sequence[Compiled], out: Path) -> None:
    """`out/<target>/<name>.{py,ptx,cubin,json,triton.json}` (amdgcn and hsaco for AMD), and `out/<target>/kernels.txt`, their table."""
    for target in dict.fromkeys(c.job.target for c in compiled):
        folder = out / target.name
        folder.mkdir(parents=True, exist_ok=True)
        mine = [c for c in compiled if c.job.target is target]
        for c in mine:
            for ending in ("py", target.assembly, target.binary, METADATA):
                shutil.copyfile(c.folder / f"kernel.{ending}", folder / f"{c.job.name}.{ending}")
            described = {"key": c.job.key, **{k: v for k, v in c.job.content.items() if k != "source"}, "ops": c.job.ops, **c.facts}
            (folder / f"{c.job.name}.json").write_text(json.dumps(described, indent=2) + "\n")
        (folder / "kernels.txt").write_text("\n".join(table(mine)) + "\n")


HEAD = ("kernel", "ops", "warps", "registers", "shared", "spilled", "matrix instructions")


def rows(compiled: Sequence[Compiled]) -> Iterator[tuple[str, ...]]:
    """One line of the table for each kernel: registers per thread, shared memory and spills in bytes."""
    for c in sorted(compiled, key=lambda c: c.job.name):
        f = c.facts
        matrix = ", ".join(f"{count} {name}" for name, count in sorted(f["matrix"].items())) or "-"
        numbers = (str(f[key]) for key in ("num_warps", "registers", "shared", "spill_bytes"))
        yield (c.job.name, ",".join(c.job.ops), *numbers, matrix)


def table(compiled: Sequence[Compiled]) -> Iterator[str]:
    """The table as aligned lines."""
    lines = [HEAD, *rows(compiled)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
