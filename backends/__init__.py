"""What runs a module: the `Runner` protocol, and the backends by name.

A backend is loaded when it is asked for. One that lives outside dsc registers a `Runner` object in the entry-point group
`dsc.backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from ..ir.errors import DscError, require

if TYPE_CHECKING:
    from ..distributed.world import Program
    from ..ir.core import Module, Op
    from ..ir.types import Tensor
    from .arrays import Array, Data

Weights = Callable[[str, "Tensor"], "Array"]
"""Hands over a weight: its full name and the type that the program declares -> the array."""


@dataclass(frozen=True, slots=True)
class Site:
    """Which execution of which op: a function that is called for every layer runs its ops once per call."""

    func: str
    weights: str
    """The prefix of weight names in this call, such as `model.layers.3`; empty in the main function."""
    op: str
    """The op's id."""
    run: int = 1
    """Which run of this function with these weights it is, from 1: an embedding that two parts of a model share runs twice."""

    def __str__(self) -> str:
        call = ", ".join(([self.weights] if self.weights else []) + ([f"run {self.run}"] if self.run > 1 else []))
        return f"@{self.func}{f' ({call})' if call else ''} {self.op}"


Observer = Callable[[Site, "Op", "tuple[Data, ...]", "tuple[Data, ...]"], "tuple[Data, ...] | None"]
"""Called after each op but `call` with its operands and results; what it returns, if anything, replaces the results."""


class Runner(Protocol):
    """A backend that can execute."""

    def run(self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None) -> tuple[Data, ...]:
        """The results of the module's main function. `DscError` where an input or a weight is not of the declared type."""
        ...

    def evaluate(self, op: Op, operands: Sequence[Data]) -> tuple[Data, ...]:
        """The results of one op other than `call`, `param` and `constant`, which need a module."""
        ...


class RankRunner(Runner, Protocol):
    """A backend that can be one rank of many."""

    def program(
        self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None
    ) -> Program[tuple[Data, ...]]:
        """`run` as a program that stops at each collective until the other ranks are there (`distributed/world.py`)."""
        ...


ENTRY_POINTS = "dsc.backends"


def _numpy() -> Runner:
    from .numpy_ref.run import FLOAT32

    return FLOAT32


def _numpy_f64() -> Runner:
    from .numpy_ref.run import FLOAT64

    return FLOAT64


def _triton() -> Runner:
    require(find_spec("triton") is not None, "backend 'triton' needs the package triton: pip install 'dsc[triton]'")
    from .triton.run import TRITON

    return TRITON


LOADERS: dict[str, Callable[[], Runner]] = {"numpy": _numpy, "numpy-f64": _numpy_f64, "triton": _triton}
"""The backends of dsc itself."""


def _foreign() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def names() -> tuple[str, ...]:
    """Every backend that `get` knows."""
    return (*LOADERS, *sorted(_foreign().keys() - LOADERS.keys()))


@cache
def get(name: str) -> Runner:
    """The backend `name`; loads it. `DscError` lists the known ones."""
    if name in LOADERS:
        return LOADERS[name]()
    foreign = _foreign()
    require(name in foreign, f"unknown backend {name!r}; known are {', '.join(names())}")
    found = foreign[name].load()
    if not (callable(getattr(found, "run", None)) and callable(getattr(found, "evaluate", None))):
        raise DscError(f"backend {name!r} is {foreign[name].value}, which has no `run` and `evaluate`")
    runner: Runner = found
    return runner
