"""Running a compiled program: weights and inputs in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.core import Module
from ..ir.errors import require
from ..ir.gradients import bundles
from ..ir.mesh import ATTRIBUTE, mesh_of
from ..ir.stages import is_staged
from ..ir.types import Bundle, Tensor, Type, landed
from ..ir.walk import weights as weights_of
from ..schedule.actions import Schedule
from .artifact import Artifact, replacing
from .inputs import Inputs, prepare
from .kernels import FOLDER as KERNELS
from .pipelining import FILE, read_schedule, schedule_for
from .ranks import TIMEOUT, Ranks, run_ranks
from .ui import note

Fetch = Callable[[str, Tensor], np.ndarray]


def run(
    program: Module | Artifact,
    weights: Any = None,
    inputs: Inputs = None,
    backend: str = "numpy",
    observe: Any = None,
    ranks: Ranks | None = None,
    timeout: float = TIMEOUT,
    schedule: Schedule | str | None = None,
    microbatches: int | None = None,
) -> tuple[np.ndarray, ...]:
    """The results of `program`'s first function, in order.

    `weights` is a mapping of names to arrays or tensors (a `state_dict`), a checkpoint folder, or `random:SEED`; without it the
    artifact's own, else `random:0`. `inputs` is a tuple in the order of the parameters, a mapping by name, or an .npz file;
    without it seeded ones. `observe` sees every op that runs (see `dsc.backends`). A backend may ask for passes first: Triton runs the
    program as `fuse` makes it. A sharded program runs on all `ranks` of its mesh, "local", in this process, or "torchrun", where this
    process is one of them and rank 0 alone has the results; inputs and results are whole. A program that is cut into stages runs for all
    micro-batches of a `schedule`, by default its own: inputs are those of all of them, one after the other.

    >>> logits, = dsc.run(dsc.trace("deepseek-v3-tiny", seq=16), weights="random:0")
    """
    from .. import backends
    from ..models.checkpoint import open_weights as weights_source

    require(timeout > 0, f"--timeout is {timeout:g}, expected more than 0")
    runner = backends.get(backend)
    if isinstance(program, Artifact) and (with_kernels := getattr(runner, "with_kernels", None)):
        runner = with_kernels(program.path / KERNELS)
    module, spec, config = unpack(program, weights)
    if pipeline := backends.prepares(runner, module):
        from ..passes.manager import apply

        module = apply(module, pipeline)
    if ranks is not None:
        order = chosen_schedule(program, schedule, microbatches)
        given = prepare(module, inputs, microbatches=order.microbatches if order else 1)
        return run_ranks(module, weights_source(spec, config=config), given, runner, ranks, observe, timeout, order)
    require(schedule is None and microbatches is None, "a schedule is for all ranks of a pipeline: run it on them")
    count = mesh_of(module).world if ATTRIBUTE in module.attributes else 1
    require(count == 1, f'the program is that of one of {count} ranks: run it with --ranks local (ranks="local"), or under torchrun')
    return runner.run(module, open_weights(spec, module, config), prepare(module, inputs), observe)


def chosen_schedule(program: Module | Artifact, schedule: Schedule | str | None = None, microbatches: int | None = None) -> Schedule | None:
    """The schedule that ranks follow: the one given, or the program's own; None where it is not cut into stages."""
    module = program.module if isinstance(program, Artifact) else program
    if not is_staged(module):
        require(schedule is None and microbatches is None, "a schedule is for a program that is cut into stages, as --mesh pp=2 does")
        return None
    if schedule is not None and not isinstance(schedule, str):
        return schedule
    if schedule is None and microbatches is None and isinstance(program, Artifact) and (own := program.path / FILE).is_file():
        return read_schedule(own)
    return schedule_for(module, schedule, microbatches)


def unpack(program: Module | Artifact, weights: Any = None) -> tuple[Module, Any, Mapping[str, Any] | None]:
    """The program, the weights it should take, and its model's config."""
    known = isinstance(program, Module | Artifact)
    require(
        known, f"cannot run a {type(program).__name__}: expected a module (dsc.trace, dsc.parse) or an artifact (dsc.compile, dsc.load)"
    )
    if isinstance(program, Module):
        return program, "random:0" if weights is None else weights, None
    (own,) = own_weights([program])
    return program.module, own if weights is None else weights, program.manifest.config


def own_weights(programs: Sequence[Module | Artifact]) -> list[str]:
    """The weights that each program runs on if it is given none: its own, else those of one beside it that has some, else `random:0`."""
    recorded = [p.manifest.weights if isinstance(p, Artifact) else "none" for p in programs]
    fallback = next((found for found in recorded if found != "none"), "random:0")
    return [fallback if found == "none" else found for found in recorded]


def open_weights(spec: Any, module: Module, config: Mapping[str, Any] | None, *, check: bool = True) -> Fetch:
    """A function from a weight's name and type to its array. Raises `DscError` with every tensor that does not fit the program."""
    from ..models import checkpoint
    from ..models.placed import placed
    from ..models.weights import Wanted

    source = placed(checkpoint.open_weights(spec, config=config), module)

    if check:
        source.check([Wanted.of(name, tensor) for name, tensor in weights_of(module).items()])
    return lambda name, tensor: source.get(Wanted.of(name, tensor))


def check_writable(file: Path) -> None:
    """Refuse what `save` could not write, before any work is done."""
    require(not file.is_dir(), f"{file} is a folder, expected a file to write")
    require(file.parent.is_dir(), f"{file} cannot be written: there is no folder {file.parent}")


def save(file: Path, names: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
    """Write arrays by name as .npz, beside and renamed. BF16 and FP8, which NumPy's files do not know, are widened exactly to float32."""
    from ..numerics.formats import widen

    known = {
        name: array if array.dtype.kind in "fiub" and array.dtype.isbuiltin else widen(array)
        for name, array in zip(names, arrays, strict=True)
    }
    with replacing(file) as stream:
        np.savez(stream, allow_pickle=False, **known)


def result_names(module: Module) -> list[str]:
    """The name of each result of @main, as the program's text has it; a value returned once more has its place added."""
    from ..ir.printer import Names

    names = Names()
    for value in (*module.main.params, *(result for op in module.main.ops for result in op.results)):
        names.define(value)
    found: list[str] = []
    for i, value in enumerate(module.main.results):
        name = names[value][1:]
        found.append(name if name not in found else f"{name}.{i}")
    return found


GRADIENT = ".grad"
"""What the name of a gradient ends with, after that of its weight."""


def array_types(module: Module) -> dict[str, Tensor]:
    """Every array that a run returns, by name, in order, with its type: those in bundles too, a gradient as `<weight>.grad`."""
    names, gradients = result_names(module), bundles(module)
    plain = len(names) - len(gradients)
    found: dict[str, Tensor] = {}

    def add(name: str, type: Type) -> None:
        type = landed(type)
        if isinstance(type, Tensor):
            found[name] = type
        else:
            for i, field in enumerate(type.fields):
                add(f"{name}.{i}", field)

    for name, value in zip(names[:plain], module.main.results, strict=False):
        add(name, value.type)
    for weights, value in zip(gradients, module.main.results[plain:], strict=True):
        assert isinstance(value.type, Bundle)
        for weight, field in zip(weights, value.type.fields, strict=True):
            add(f"{weight}{GRADIENT}", field)
    return found


def norm(arrays: Sequence[np.ndarray]) -> float:
    """The Euclidean norm of all of them together."""
    from .measure import real

    return float(np.sqrt(sum(float(np.square(real(x)).sum()) for x in arrays)))


def summarise(array: np.ndarray) -> dict[str, Any]:
    """What a person wants to know of an array at a glance."""
    from ..models.weights import DTYPE_NAMES
    from .measure import real as exact

    real = exact(array)
    finite = real[np.isfinite(real)]
    stats = {"min": finite.min(), "max": finite.max(), "mean": finite.mean(), "std": finite.std()} if finite.size else {}
    return {
        "shape": list(array.shape),
        "dtype": DTYPE_NAMES[array.dtype],
        "not_finite": int(real.size - finite.size),
        **{k: float(v) for k, v in stats.items()},
    }


def say_defaults(programs: Sequence[Any], weights: str | None, inputs: str | None) -> None:
    """What was taken for lack of anything else; said at the end, so that an error stands alone."""
    taken = [] if weights else [f"weights {' and '.join(dict.fromkeys(own_weights(programs)))}"]
    taken += [] if inputs else ["seeded inputs"]
    if taken:
        note(f"dsc: took {' and '.join(taken)}")


def same_results(module: Module) -> Callable[[Module], bool]:
    """A test for later modules: do they give the values that `module` gives, on weights random:0 and seeded inputs?"""
    from .measure import SAME, flat, measure

    inputs = prepare(module, None)
    expected = flat(run(module, inputs=inputs))

    def same(other: Module) -> bool:
        found = flat(run(other, inputs=inputs))
        alike = (x.shape == y.shape and measure(x, y) == SAME for x, y in zip(expected, found, strict=False))
        return len(expected) == len(found) and all(alike)

    return same
