"""Running a compiled program: weights and inputs in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.core import Module
from ..ir.errors import DscError
from ..ir.types import Tensor
from ..ir.walk import weights as weights_of
from .artifact import Artifact
from .inputs import Inputs, prepare

Fetch = Callable[[str, Tensor], np.ndarray]


def run(
    program: Module | Artifact,
    weights: Any = None,
    inputs: Inputs = None,
    backend: str = "numpy",
    observe: Any = None,
) -> tuple[np.ndarray, ...]:
    """The results of `program`'s first function, in order.

    `weights` is a mapping of names to arrays or tensors (a `state_dict`), a checkpoint folder, or `random:SEED`; without it the
    artifact's own, else `random:0`. `inputs` is a tuple in the order of the parameters, a mapping by name, or an .npz file;
    without it seeded ones. `observe` sees every op that runs (see `dsc.backends`).

    >>> logits, = dsc.run(dsc.trace("deepseek-v3-tiny", seq=16), weights="random:0")
    """
    from .. import backends

    runner = backends.get(backend)
    module, spec, config = unpack(program, weights)
    return runner.run(module, open_weights(spec, module, config), prepare(module, inputs), observe)


def unpack(program: Module | Artifact, weights: Any = None) -> tuple[Module, Any, Mapping[str, Any] | None]:
    """The program, the weights it should take, and its model's config."""
    if isinstance(program, Module):
        return program, "random:0" if weights is None else weights, None
    default = "random:0" if program.manifest.weights == "none" else program.manifest.weights
    return program.module, default if weights is None else weights, program.manifest.config


def open_weights(spec: Any, module: Module, config: Mapping[str, Any] | None, *, check: bool = True) -> Fetch:
    """A function from a weight's name and type to its array. Raises `DscError` with every tensor that does not fit the program."""
    from ..models import checkpoint
    from ..models.weights import Wanted

    source = checkpoint.open_weights(spec, config=config)

    def wanted(name: str, tensor: Tensor) -> Wanted:
        if not tensor.is_static:
            raise DscError(f"weight {name} is {tensor}, expected a static shape")
        return Wanted(name, tensor.dtype.name, tuple(d for d in tensor.shape if isinstance(d, int)))

    if check:
        source.check([wanted(name, tensor) for name, tensor in weights_of(module).items()])
    return lambda name, tensor: source.get(wanted(name, tensor))


def save(file: Path, names: list[str], arrays: tuple[np.ndarray, ...]) -> None:
    """Write arrays by name as .npz, beside and renamed. BF16 and FP8, which NumPy's files do not know, are widened exactly to float32."""
    from ..numerics.formats import widen

    known = {
        name: array if array.dtype.kind in "fiub" and array.dtype.isbuiltin else widen(array)
        for name, array in zip(names, arrays, strict=True)
    }
    draft = file.with_name(f".{file.name}.partial")
    try:
        with draft.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **known)
        draft.replace(file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise DscError(f"{file}: cannot be written: {error.strerror}") from None


def result_names(module: Module) -> list[str]:
    """A name for each result of @main: the value's, made unique."""
    from ..ir.printer import Names

    names, seen = Names(), set[Any]()
    found: list[str] = []
    for value in module.main.results:
        found.append(names.define(value)[1:] if value not in seen else f"{names[value][1:]}_again_{len(found)}")
        seen.add(value)
    return found


def summarise(array: np.ndarray) -> dict[str, Any]:
    """What a person wants to know of an array at a glance."""
    from ..numerics.formats import widen

    real = array.astype(np.float64) if array.dtype.isbuiltin == 1 else widen(array).astype(np.float64)
    finite = real[np.isfinite(real)]
    stats = {"min": finite.min(), "max": finite.max(), "mean": finite.mean(), "std": finite.std()} if finite.size else {}
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "not_finite": int(real.size - finite.size),
        **{k: float(v) for k, v in stats.items()},
    }
