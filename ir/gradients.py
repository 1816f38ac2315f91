"""Where a differentiated module returns the gradient of which weight.

The last results of its main function are bundles of gradients. The module attribute `gradients` says whose they are, group by group:

    gradients={head={weights=["weight"], calls=["lm_head"]}, layer={weights=["q.weight", "o.weight"], calls=["layers.0", "layers.1"]}}

A group is a function whose calls read weights of the same relative names; each of its calls is one bundle, with a gradient for each name.
So there are three bundles here, and the last holds the gradients of `layers.1.q.weight` and `layers.1.o.weight`. A weight that several
calls read stands with the first of them, and its gradient is the sum. A weight on which the loss does not depend stands nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .core import Func, Module
from .errors import require
from .mesh import ATTRIBUTE as MESH
from .mesh import mesh_of
from .sharding import result_splits, whole, whole_weights
from .types import Bundle, DType, Tensor
from .walk import join

ATTRIBUTE = "gradients"


def bundles(module: Module) -> tuple[tuple[str, ...], ...]:
    """The full names of the weights whose gradients each of the last results holds; empty where nothing was differentiated."""
    groups = module.attributes.get(ATTRIBUTE, {}).values()
    return tuple(tuple(join(call, name) for name in group["weights"]) for group in groups for call in group["calls"])


def by_name(module: Module, results: Sequence[Any]) -> dict[str, Any]:
    """The gradients among what a run returned, by the full name of the weight.

    `results` are all results of the main function, None for those that a rank of a pipeline does not have.
    """
    named = bundles(module)
    require(len(results) == len(module.main.results), f"@{module.main.name} has {len(module.main.results)} results, found {len(results)}")
    given = results[len(results) - len(named) :]
    pairs = ((names, bundle) for names, bundle in zip(named, given, strict=True) if bundle is not None)
    return {name: gradient for names, bundle in pairs for name, gradient in zip(names, bundle, strict=True)}


def law(module: Module, func: Func) -> Iterator[tuple[Func, str]]:
    """The last results of main are the gradients that the module's attribute names, float32 (float64 of a float64 weight).

    On a rank a gradient may be split otherwise than its weight: of both the whole counts.
    """
    named = bundles(module)
    if func is not module.main or not named:
        return
    if len(named) > len(func.results):
        yield func, f"the module names {len(named)} bundles of gradients, but @{func.name} has {len(func.results)} results"
        return
    known, first = whole_weights(module), len(func.results) - len(named)
    splits = result_splits(module)[first:]
    for names, result, split in zip(named, func.results[first:], splits, strict=True):
        if unknown := [name for name in names if name not in known]:
            yield func, f"%{result.name} holds a gradient of {unknown[0]}, which is no weight of this module"
            continue
        wide = (Tensor(DType.f64 if known[n].dtype is DType.f64 else DType.f32, known[n].shape) for n in names)
        expected = Bundle(tuple(wide))
        found = whole(result.type, split, mesh_of(module)) if MESH in module.attributes else result.type
        if found != expected:
            yield func, f"%{result.name} holds the gradients of {', '.join(names)}: expected {expected}, found {found}"
