"""Programs on all ranks of a mesh, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.backends.numpy_ref.run import FLOAT64
from dsc.distributed import local
from dsc.driver.inputs import prepare
from dsc.driver.run import array_types, open_weights
from dsc.ir.core import Module
from dsc.ir.mesh import mesh_of
from dsc.ir.sharding import Split, axes_of, input_splits, part, result_splits, weight_splits, whole

Run = Callable[..., dict[str, Any]]


@cache
def _source(mode: str, batch: int, seq: int, dtype: str, layers: int) -> Module:
    sizes = {"context": 2 * seq} if mode == "decode" else {"seq": seq}
    changes = (f"dtype={dtype}", f"num_hidden_layers={layers}")
    return dsc.trace("deepseek-v3-tiny", mode=mode, batch=batch, overrides=changes, **sizes)


@pytest.fixture(scope="session")
def program() -> Callable[..., Module]:
    """The tiny model: mode, batch, positions, dtype, and passes before sharding."""

    def make(mode: str = "forward", batch: int = 2, seq: int = 16, dtype: str = "bfloat16", passes: str = "", layers: int = 2) -> Module:
        first = "simplify,autodiff,simplify" if mode == "train" else "simplify"
        return dsc.apply(_source(mode, batch, seq, dtype, layers), f"{first},{passes}" if passes else first)

    return make


@pytest.fixture(scope="session")
def run_whole() -> Run:
    """What the unsharded program gives, by name, its sums in float64."""

    def run(module: Module, observe: Any = None) -> dict[str, Any]:
        return named(module, FLOAT64.run(module, open_weights("random:0", module, None), prepare(module, None), observe))

    return run


@pytest.fixture(scope="session")
def run_ranks() -> Run:
    """What all ranks of the sharded program give together, on the inputs of the unsharded one; they must agree on what they share."""

    def run(whole_module: Module, module: Module, observe: Callable[[int], Any] = lambda rank: None) -> dict[str, Any]:
        mesh, inputs, fetch = mesh_of(module), prepare(whole_module, None), open_weights("random:0", whole_module, None)
        splits = weight_splits(module)

        def weights(rank: int) -> Callable[[str, Any], Any]:
            def get(name: str, tensor: Any) -> Any:
                full = fetch(name, whole(tensor, splits[name], mesh))  # type: ignore[arg-type]
                return np.ascontiguousarray(full[part(splits[name], full.shape, mesh, rank)])

            return get

        def own(rank: int) -> list[Any]:
            return [np.ascontiguousarray(x[part(s, x.shape, mesh, rank)]) for x, s in zip(inputs, input_splits(module), strict=True)]

        results = local.run(mesh, lambda rank: FLOAT64.program(module, weights(rank), own(rank), observe(rank)))
        together = (assembled([r[i] for r in results], split, module) for i, split in enumerate(result_splits(module)))
        return named(module, tuple(together))

    return run


def assembled(parts: Sequence[Any], split: Split, module: Module) -> Any:
    """The whole of which every rank has a part. AssertionError where two ranks differ in what both hold."""
    if isinstance(parts[0], tuple):
        return tuple(assembled([p[i] for p in parts], s, module) for i, s in enumerate(split))
    mesh = mesh_of(module)
    shape = [d * int(np.prod([mesh.size(a) for a in axes_of(split, i)])) for i, d in enumerate(parts[0].shape)]
    found, filled = np.zeros(shape, parts[0].dtype), np.zeros(shape, np.bool)
    for rank, own in enumerate(parts):
        at = part(split, shape, mesh, rank)
        same = not filled[at].any() or np.array_equal(found[at], own, equal_nan=own.dtype.kind == "f")
        assert same, f"rank {rank} has another value than the ranks that hold the same part"
        found[at], filled[at] = own, True
    assert filled.all(), "no rank has some part of a result"
    return found


def named(module: Module, results: tuple[Any, ...]) -> dict[str, Any]:
    """Every array of the results by name, those in bundles too."""
    return dict(zip(array_types(module), _flat(results), strict=True))


def _flat(values: Any) -> list[Any]:
    return [leaf for value in values for leaf in _flat(value)] if isinstance(values, tuple) else [values]
