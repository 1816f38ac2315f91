"""The mesh: how ranks are numbered, which of them form a group along an axis, and which pairs are on different nodes.

A module that was sharded carries its mesh as the attribute `mesh={pp=2, dp=4, ep=4, tp=1, node=8}`; the command line writes it
"pp=2,dp=4,ep=4,tp=1". World = pp x dp x tp ranks, numbered with tp innermost and pp outermost. The expert view lies over the same
ranks: the dp x tp ranks of a pipeline stage are edp x ep as well, ep innermost, so that neighbours in ep are neighbours on a node. Ranks
of a node, `node` of them, are consecutive. These axes have names:

    pp          stages of the pipeline                     dp  tp      the dense view of a stage
    stage       all ranks of a pipeline stage              edp ep      the expert view of a stage
    world       all ranks                                  ep.node ep.local    ep as nodes x ranks in a node, for dispatch over nodes

A rank's index along ep is index(ep.node) * size(ep.local) + index(ep.local). A group along ep.node holds the ranks with one index in their
node, a group along ep.local those of one node. Every axis is a stride and a size: a rank's index along it is (rank // stride) % size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

from .core import Module
from .errors import DscError, require

ATTRIBUTE = "mesh"
NODE = 8
"""Ranks per node unless the mesh says otherwise: that of every published DeepSeek cluster."""


@dataclass(frozen=True)
class Mesh:
    """A mesh that can be: anything else raises `DscError` when it is made, with what would fit."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    tp: int = 1
    node: int = NODE

    def __post_init__(self) -> None:
        for name, extent in self.record().items():
            if not (isinstance(extent, int) and extent >= 1):
                raise DscError(f"mesh: {name} is {extent}, expected a whole number, 1 or more")
        stage = self.dp * self.tp
        if stage % self.ep:
            fits = ", ".join(str(n) for n in _divisors(stage))
            least = _least_dp(self.ep, self.tp)
            raise DscError(
                f"mesh {self}: ep={self.ep} does not divide dp x tp = {self.dp} x {self.tp} = {stage}; ep = {fits} or dp={least} would fit"
            )
        for name, extent in (("ep", self.ep), ("tp", self.tp)):
            if self.world > self.node and extent % self.node and self.node % extent:
                fits = f"{', '.join(str(n) for n in _divisors(self.node))} or a multiple of {self.node}"
                raise DscError(f"mesh {self}: groups of {name}={extent} do not fit nodes of {self.node} ranks; {fits} would")

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.pp * self.dp * self.tp

    @property
    def edp(self) -> int:
        """How often each expert is held: dp x tp / ep."""
        return self.dp * self.tp // self.ep

    @cached_property
    def axes(self) -> Mapping[str, tuple[int, int]]:
        """Stride and size of each axis."""
        stage, local = self.dp * self.tp, min(self.ep, self.node)
        return {
            "pp": (stage, self.pp),
            "dp": (self.tp, self.dp),
            "tp": (1, self.tp),
            "stage": (1, stage),
            "edp": (self.ep, self.edp),
            "ep": (1, self.ep),
            "ep.node": (local, self.ep // local),
            "ep.local": (1, local),
            "world": (1, self.world),
        }

    def _axis(self, axis: str) -> tuple[int, int]:
        if axis not in self.axes:
            raise DscError(f"mesh {self} has no axis {axis}; it has {', '.join(self.axes)}")
        return self.axes[axis]

    def size(self, axis: str) -> int:
        """How many ranks a group along `axis` has. `DscError` where there is no such axis."""
        return self._axis(axis)[1]

    def index(self, axis: str, rank: int) -> int:
        """Where `rank` stands along `axis`."""
        stride, size = self._axis(axis)
        return rank // stride % size

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axis` alone, itself among them, in their order along it."""
        stride, size = self._axis(axis)
        first = rank - rank // stride % size * stride
        return tuple(range(first, first + size * stride, stride))

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Every group along `axis`; each rank is in one."""
        return tuple(dict.fromkeys(self.group(axis, rank) for rank in range(self.world)))

    def crosses(self, a: int, b: int) -> bool:
        """Whether what rank `a` sends to rank `b` leaves the node."""
        return a // self.node != b // self.node

    def record(self) -> dict[str, int]:
        """The mesh as a module's attribute."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        node = f",node={self.node}" if self.node != NODE else ""
        return f"pp={self.pp},dp={self.dp},ep={self.ep},tp={self.tp}{node}"


def parse_mesh(text: str, ranks: int | None = None) -> Mesh:
    """The mesh of "pp=2,dp=4,ep=4,tp=1"; what is left out is 1.

    An omitted dp is filled from the number of ranks, else it is the least that lets ep fit. "node=4" says how many ranks a node has.
    `DscError` where the mesh cannot be, or is not one of `ranks` ranks.
    """
    given: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = (s.strip() for s in part.partition("="))
        require(name in Mesh.__dataclass_fields__, f"mesh {text!r}: unknown {name!r}, expected {', '.join(Mesh.__dataclass_fields__)}")
        require(name not in given, f"mesh {text!r}: {name} stands twice")
        require(re.fullmatch(r"[1-9][0-9]{0,8}", value) is not None, f"mesh {text!r}: {name}={value}, expected a whole number, 1 or more")
        given[name] = int(value)
    if "dp" not in given:
        pp, ep, tp = (given.get(name, 1) for name in ("pp", "ep", "tp"))
        if ranks is not None and ranks % (pp * tp):
            near = _near(ranks, pp * tp)
            raise DscError(f"mesh {text!r}: {ranks} ranks are not a multiple of pp x tp = {pp} x {tp}; {near} ranks would fit")
        given["dp"] = _least_dp(ep, tp) if ranks is None else ranks // (pp * tp)
    made = Mesh(**given)
    if ranks is not None and made.world != ranks:
        pp, dp, tp = made.pp, made.dp, made.tp
        raise DscError(f"mesh {made} is pp x dp x tp = {pp} x {dp} x {tp} = {made.world} ranks, found {ranks}{_instead(made, ranks)}")
    return made


def mesh_of(module: Module) -> Mesh:
    """The mesh that `module` was sharded for. `DscError` where it carries none."""
    found: Any = module.attributes.get(ATTRIBUTE)
    require(found is not None, "the module has no mesh: it was not sharded")
    known = isinstance(found, Mapping) and set(found) <= set(Mesh.__dataclass_fields__)
    require(known, f"the module's mesh is {found}, expected a record of {', '.join(Mesh.__dataclass_fields__)}")
    return Mesh(**found)


def _least_dp(ep: int, tp: int) -> int:
    return ep // gcd(ep, tp)


def _divisors(n: int) -> Iterator[int]:
    return (d for d in range(1, n + 1) if n % d == 0)


def _near(ranks: int, unit: int) -> str:
    below = ranks // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _instead(mesh: Mesh, ranks: int) -> str:
    """The dp that would make it `ranks` ranks, if any."""
    rest = mesh.pp * mesh.tp
    return f"; dp={ranks // rest} would fit" if ranks % rest == 0 and ranks // rest * mesh.tp % mesh.ep == 0 else ""
