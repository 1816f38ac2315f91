"""`dsc doctor`: what this machine can do, in a few seconds: each finding is ok, missing (with what gets it) or broken (with what is wrong).

Nothing is installed, nothing is downloaded, and only `compile_targets` writes anything: to the cache of compiled kernels.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from .ui import size

Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `hint` is what to do, where something is to be done."""

    area: str
    name: str
    status: Status
    detail: str
    hint: str = ""
    core: bool = False
    """Whether dsc does not work without it."""


PROBE = """func @main(%x: f32[4, 64], %w: f32[64]) {
  %y: f32[4, 64] = rms_norm(%x, %w, eps=1e-06)  @ main#1 F
  return %y
}
"""
"""A program of one kernel."""

EXTRAS = {
    "triton": "GPU kernels: dsc run --backend triton, dsc compile --target",
    "onnx": "dsc export",
    "plan": "solvers and plots: recompute, calibrate, --plot",
    "hf": "transformers' models, as the tests compare with them",
}
"""The extras of the package, and what each is for."""


def examine(compile_targets: bool = False, on_step: Callable[[str], None] = lambda step: None) -> list[Finding]:
    """Every finding, in the order in which they are shown. With `compile_targets` a kernel is compiled for each target."""
    found: list[Finding] = []
    for look in (_python, _core, _machine, _gpu, _triton, _ranks, _extras, _backends, _cache):
        on_step(look.__name__.strip("_"))
        found += look()
    if compile_targets and find_spec("triton"):
        found += _compiled(on_step)
    return found


def healthy(found: list[Finding]) -> bool:
    """Whether all that dsc cannot do without is there."""
    return all(f.status == "ok" for f in found if f.core)


def _told(error: BaseException) -> str:
    from ..backends import told

    return told(error)


def _python() -> Iterator[Finding]:
    known = (3, 11) <= sys.version_info[:2] <= (3, 13)
    detail = f"{platform.python_version()} ({sys.executable})"
    yield Finding("core", "python", "ok" if known else "broken", detail, "" if known else "dsc needs 3.11, 3.12 or 3.13", core=True)


def _required(extra: str | None) -> list[str]:
    """The requirements of dsc, or of one of its extras, as `name>=1.0`."""
    found = []
    for line in requires("dsc") or []:
        text, _, marker = (part.strip() for part in line.partition(";"))
        if (f'extra == "{extra}"' in marker.replace("'", '"')) if extra else "extra ==" not in marker:
            found.append(text)
    return found


def _name(requirement: str) -> str:
    return requirement.split("[")[0].split("<")[0].split(">")[0].split("=")[0].split("~")[0].strip()


def _installed(name: str) -> str:
    """Its version, "" where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _core() -> Iterator[Finding]:
    yield Finding("core", "dsc", "ok", f"{version('dsc')} ({Path(__file__).resolve().parent.parent})", core=True)
    for requirement in _required(None):
        name = _name(requirement)
        if not (found := _installed(name)):
            yield Finding("core", name, "missing", "not installed", f"pip install '{requirement}'", core=True)
        elif _fits(found, requirement):
            yield Finding("core", name, "ok", found, core=True)
        else:
            yield Finding("core", name, "broken", f"{found}, expected {requirement}", f"pip install '{requirement}'", core=True)


def _fits(found: str, requirement: str) -> bool:
    """Whether a version is within the bounds `>=` and `<` of a requirement, by its numbers."""

    def numbers(text: str) -> list[int]:
        return [int("".join(c for c in part if c.isdigit()) or 0) for part in text.split("+")[0].split(".")[:3]]

    for bound in requirement[len(_name(requirement)) :].split(","):
        if bound.startswith(">=") and numbers(found) < numbers(bound[2:]):
            return False
        if bound.startswith("<") and numbers(found) >= numbers(bound[1:]):
            return False
    return True


def _machine() -> Iterator[Finding]:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    detail = f"{allowed} of {os.cpu_count()}{f', OMP_NUM_THREADS={threads}' if threads else ''} ({platform.machine()})"
    yield Finding("machine", "cpus", "ok", detail)
    total, free = _memory()
    yield Finding("machine", "memory", "ok", f"{size(total)}, {size(free)} free" if total else "unknown")


def _memory() -> tuple[int, int]:
    """Bytes that this process may have, and that are free: of the machine, or of its container where that has less. 0 where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, LookupError, ValueError):
        return 0, 0
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
    except (OSError, ValueError):  # none, or "max"
        return total, free
    return (limit, max(0, limit - used)) if limit < total else (total, free)


def _torch() -> Any:
    """torch, or what its import raises."""
    try:
        import torch
    except Exception as error:
        return error
    return torch


def _gpu() -> Iterator[Finding]:
    torch = _torch()
    if isinstance(torch, Exception):
        yield Finding("core", "torch", "broken", _told(torch), "install torch again", core=True)
        return
    if not torch.cuda.is_available():
        kind = "a build for CPUs" if torch.version.cuda is None and torch.version.hip is None else "no GPU is visible"
        yield Finding("gpu", "gpu", "missing", f"none: torch {torch.__version__} is {kind}" if "build" in kind else f"none: {kind}")
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        from ..backends.triton.targets import TARGETS

        name = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        known = name in TARGETS
        detail = f"{properties.name}, {name}, {size(properties.total_memory)}"
        yield Finding("gpu", f"gpu {i}", "ok" if known else "broken", detail, "" if known else f"known are {', '.join(TARGETS)}")


def _triton() -> Iterator[Finding]:
    if find_spec("triton") is None:
        yield Finding("triton", "triton", "missing", "not installed", "pip install 'dsc[triton]'")
        return
    try:
        import numpy as np

        from .. import backends
        from ..backends.triton import INTERPRET
        from ..ir.parser import parse

        x, w = np.ones((4, 64), np.float32), np.ones(64, np.float32)
        (y,) = backends.get("triton").run(parse(PROBE), lambda name, type: w, (x, w))
        if not bool(np.allclose(y, 1.0, atol=1e-5)):
            raise ArithmeticError(f"rms_norm of ones gives {y.flat[0]}")
    except Exception as error:
        yield Finding("triton", "triton", "broken", f"{_installed('triton')}: {_told(error)}", "pip install -U 'dsc[triton]'")
        return
    how = "in its interpreter, on the CPU" if INTERPRET else "on the GPU"
    yield Finding("triton", "triton", "ok", f"{_installed('triton')}, runs {how}")
    yield from _targets()


def _targets() -> Iterator[Finding]:
    from triton.backends import backends as compilers

    from ..backends.triton.targets import TARGETS

    for kind, package in (("cuda", "nvidia"), ("hip", "amd")):
        names = ", ".join(t.name for t in TARGETS.values() if t.backend == kind)
        if package in compilers:
            yield Finding("triton", f"{package} targets", "ok", f"{names}: no GPU is needed to compile for them")
        else:
            yield Finding("triton", f"{package} targets", "missing", f"{names}: this Triton has no compiler for them")


def _compiled(on_step: Callable[[str], None]) -> Iterator[Finding]:
    from ..backends.triton import aot
    from ..backends.triton.targets import TARGETS
    from ..ir.errors import DscError
    from ..ir.parser import parse

    module = parse(PROBE)
    for target in TARGETS.values():
        on_step(target.name)
        try:
            (made,) = aot.compile_jobs(aot.jobs(module, [target]), workers=1)
        except DscError as error:
            yield Finding("targets", target.name, "broken", str(error).splitlines()[0])
        else:
            yield Finding("targets", target.name, "ok", f"a kernel compiles{' (from the cache)' if made.cached else ''}")


def _ranks() -> Iterator[Finding]:
    torch = _torch()
    if isinstance(torch, Exception):
        return
    import torch.distributed as distributed

    beside = Path(sys.executable).with_name("torchrun")
    found = shutil.which("torchrun") or (str(beside) if beside.exists() else "")
    hint = "" if found else f"{sys.executable} -m torch.distributed.run does the same"
    yield Finding("ranks", "torchrun", "ok" if found else "missing", found or "not on the PATH", hint)
    there = distributed.is_available()
    for name, has in (("gloo", there and distributed.is_gloo_available()), ("nccl", there and distributed.is_nccl_available())):
        use = {"gloo": "ranks on CPUs", "nccl": "ranks on GPUs"}[name]
        yield Finding("ranks", name, "ok" if has else "missing", use if has else f"{use}: not in this build of torch")


def _extras() -> Iterator[Finding]:
    for extra, use in EXTRAS.items():
        packages = {_name(r): r for r in _required(extra)}
        absent = [name for name in packages if not _installed(name)]
        detail = ", ".join(f"{name} {_installed(name)}" for name in packages if name not in absent)
        if absent:
            yield Finding("extras", extra, "missing", f"{use}; without {', '.join(absent)}", f"pip install 'dsc[{extra}]'")
        else:
            yield Finding("extras", extra, "ok", detail)
    found = _installed("onnxruntime")
    hint = "" if found else "pip install onnxruntime"
    yield Finding("extras", "onnxruntime", "ok" if found else "missing", found or "runs what dsc export writes", hint)


def _backends() -> Iterator[Finding]:
    from .. import backends
    from ..ir.errors import DscError

    foreign = backends.foreign()
    for name in backends.names():
        where = ", ".join(map(backends.origin, foreign[name])) if name in foreign and name not in backends.LOADERS else "of dsc"
        try:
            backends.get(name)
        except DscError as error:
            status: Status = "missing" if where == "of dsc" else "broken"
            yield Finding("backends", name, status, str(error).removeprefix(f"backend {name!r} "))
        except Exception as error:
            yield Finding("backends", name, "broken", _told(error))
        else:
            yield Finding("backends", name, "ok", where)
    for name in foreign.keys() & backends.LOADERS.keys():
        yield Finding("backends", name, "broken", f"{', '.join(map(backends.origin, foreign[name]))} takes a name of dsc: it is not used")


def _cache() -> Iterator[Finding]:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsc"
    files = [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        yield Finding("cache", "kernels", "broken", f"{folder} cannot be written", "set XDG_CACHE_HOME to a folder that can")
        return
    detail = (
        f"{folder}: {len(files):,} files, {size(sum(f.stat().st_size for f in files))}; it may be deleted" if files else f"{folder}: empty"
    )
    yield Finding("cache", "kernels", "ok", detail)
