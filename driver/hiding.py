"""What of a rank's communication computation hides, function by function, by the costs of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..hardware.figures import spoken
from ..hardware.streams import simulate
from ..ir.core import Module
from ..ir.errors import require
from ..ir.mesh import ATTRIBUTE
from ..ir.walk import communicating
from ..passes.manager import parse_pipeline
from ..passes.overlap import Overlap, costing_of
from .ui import table


def overlap_of(passes: Sequence[str], cluster: str | None) -> Overlap:
    """The pass by which a program was ordered, or as it would be by default; on another `cluster` if one is given."""
    given = [each for each in parse_pipeline(",".join(text for text in passes if text.startswith("overlap"))) if isinstance(each, Overlap)]
    found = given[-1] if given else Overlap()
    return Overlap(cluster or found.cluster, repeats=found.repeats)


def describe_overlap(module: Module, by: Overlap) -> tuple[dict[str, Any], str]:
    """Each function that communicates, what it calls included, on the streams of a rank of `by.cluster`, as JSON and as text."""
    names = communicating(module) if ATTRIBUTE in module.attributes else frozenset()
    require(bool(names), "--overlap: nothing is sent; expected a program of several ranks, as dsc compile --mesh makes it")
    costing = costing_of(module, by.cluster, repeats=by.repeats)
    found: list[dict[str, Any]] = []
    for func in (func for func in module.funcs if func.name in names):
        times = simulate(module, costing, func)
        seconds = {key: getattr(times, key) for key in ("total", "computing", "communicating", "exposed")}
        found.append({"func": func.name, **seconds, "hidden": times.hidden})
    rows = [
        (f"@{one['func']}", *(spoken(one[key], "s") for key in ("total", "computing", "communicating", "exposed")), f"{one['hidden']:.1%}")
        for one in found
    ]
    heads = ("function", "takes", "computation", "communication", "exposed", "hidden")
    return {"cluster": by.cluster, "functions": found}, f"on {by.cluster}, one run of each function\n\n{table(heads, rows)}"
