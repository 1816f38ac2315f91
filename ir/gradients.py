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
from .types import Bundle, DType, Tensor
from .walk import join, weights

ATTRIBUTE = "gradients"


def bundles(module: Module) -> tuple[tuple[str, ...], ...]:
    """The full names of the weights whose gradients each of the last results holds; empty where nothing was differentiated."""
    groups = module.attributes.get(ATTRIBUTE, {}).values()
    return tuple(tuple(join(call, name) for name in group["weights"]) for group in groups for call in group["calls"])


def by_name(module: Module, results: Sequence[Any]) -> dict[str, Any]:
    """The gradients among what a run returned, by the full name of the weight. `results` are all results of the main function."""
    named = bundles(module)
    require(len(results) == len(module.main.results), f"@{module.main.name} has {len(module.main.results)} results, found {len(results)}")
    given = results[len(results) - len(named) :]
    return {name: gradient for names, bundle in zip(named, given, strict=True) for name, gradient in zip(names, bundle, strict=True)}


def law(module: Module, func: Func) -> Iterator[tuple[Func, str]]:
    """The last results of main are the gradients that the module's attribute names, float32 (float64 of a float64 weight)."""
    named = bundles(module)
    if func is not module.main or not named:
        return
    if len(named) > len(func.results):
        yield func, f"the module names {len(named)} bundles of gradients, but @{func.name} has {len(func.results)} results"
        return
    known = weights(module)
    for names, result in zip(named, func.results[len(func.results) - len(named) :], strict=True):
        if unknown := [name for name in names if name not in known]:
            yield func, f"%{result.name} holds a gradient of {unknown[0]}, which is no weight of this module"
            continue
        wide = (Tensor(DType.f64 if known[n].dtype is DType.f64 else DType.f32, known[n].shape) for n in names)
        expected = Bundle(tuple(wide))
        if result.type != expected:
            yield func, f"%{result.name} holds the gradients of {', '.join(names)}: expected {expected}, found {result.type}"
