"""Where main hands out its results, gradients in the parts of ZeRO-1 among them (arXiv 1910.02054, section 5.1).

Ranks that hold the same part of a weight, along dp, of experts along edp, get equal parts of its gradient: the sum over them ends scattered
in place of reduced everywhere. A rank keeps the optimiser's state for that part, and the updated weight is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from ...ir.core import Module
from ...ir.gradients import bundles
from ...ir.mesh import Mesh
from ..manager import Declined
from .layout import Layout, Placement, factors, settled, spread


@dataclass
class Handout:
    """Where the results of `module`'s main function are handed out: added up, and spread over dp and tp at most, as inputs are.

    A gradient is where its weight is, and with `zero` in parts.
    """

    module: Module
    mesh: Mesh
    zero: bool
    declined: list[Declined] = field(default_factory=list)
    """The gradients that do not divide: every rank has them whole."""

    def __post_init__(self) -> None:
        names = bundles(self.module)
        first = len(self.module.main.results) - len(names)
        self.names: Mapping[int, Sequence[str]] = dict(enumerate(names, first))

    def __call__(self, result: int, have: Placement) -> Placement:
        if result in self.names:
            assert isinstance(have, tuple)
            return tuple(map(self._part, self.names[result], have)) if self.zero else settled(have)
        whole = settled(have)
        return whole.without({"ep", "edp"}) if isinstance(whole, Layout) else whole

    def _part(self, name: str, have: Placement) -> Placement:
        assert isinstance(have, Layout)
        axis = "edp" if "ep" in have.places() or "edp" in have.partial else "dp"
        whole, size = settled(have), self.mesh.size(axis)
        assert isinstance(whole, Layout)
        found = scattered(whole, axis, size)
        if found is None:
            reason = f"no dimension of {list(whole.shape)} divides over {axis}={size}: each of them keeps all of its state"
            self.declined.append(Declined(self.module.main.name, name, reason))
        return found or whole


def scattered(layout: Layout, axis: str, size: int) -> Layout | None:
    """The first dimension that divides spread over `axis` too, inside of what it is spread over; None where none divides."""
    if size == 1 or axis in layout.places():
        return layout
    for i, dim in enumerate(layout.dims):
        lead = prod(f.size for f in factors(dim) if f.axis)
        if (cut := spread(dim, axis, size, lead)) is not None:
            return replace(layout, dims=(*layout.dims[:i], cut, *layout.dims[i + 1 :]))
    return None
