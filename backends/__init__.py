"""What runs a module: the `Runner` protocol, and the backends by name.

A backend is loaded when it is asked for. One that lives outside dsc registers a `Runner` object in the entry-point group
`dsc.backends` (docs/adding_a_backend.md); what goes wrong in it is told as its fault, in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from ..ir.errors import DscError, require

if TYPE_CHECKING:
    from ..distributed.world import Program
    from ..ir.core import Module, Op, Value
    from ..ir.types import Tensor, Type
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
    """A backend that can execute.

    Beyond `run` and `evaluate` it may have, each by this name:

    - `prepares(module) -> str`: the pipeline that a module should go through before it is run here, such as "fuse"; "" for none.
    - `declines(op) -> str`: why it cannot run an op; "" where it can. The conformance suite lists such ops instead of failing on them.
    - `with_kernels(folder) -> Runner`: the backend that takes machine code from an artifact's `kernels/`.
    - `program(...)`, where it can be one rank of many: see `RankRunner`; and `ResidentRunner`, where its arrays lie on a device.
    """

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


class ResidentRunner(RankRunner, Protocol):
    """A backend whose arrays lie on a device, where the stages of a pipeline leave what they hand on."""

    def resident(
        self, module: Module, weights: Weights, inputs: Sequence[Any], observe: Observer | None = None
    ) -> Program[tuple[Any, ...]]:
        """`program` whose results stay on the device, in memory of their own; inputs may lie there, too."""
        ...

    def empty(self, type: Type) -> Any:
        """Room for a value on the device."""
        ...

    def fetched(self, held: Any, type: Type) -> Data:
        """A result of `resident` on the host."""
        ...


def prepares(runner: Runner, module: Module) -> str:
    """The pipeline that `runner` asks for before it runs `module`; "" for none."""
    asked = getattr(runner, "prepares", None)
    return str(asked(module)) if asked else ""


def declines(runner: Runner, op: Op) -> str:
    """Why `runner` cannot run `op`; "" where it can."""
    asked = getattr(runner, "declines", None)
    return str(asked(op)) if asked else ""


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


def foreign() -> dict[str, list[EntryPoint]]:
    """What other packages register, by name; several under one name is their mistake, which `get` tells."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        known = found.setdefault(point.name, [])
        if point.value not in [other.value for other in known]:  # an editable install may be seen twice
            known.append(point)
    return found


def origin(point: EntryPoint) -> str:
    """Where a backend of another package comes from, for messages: `other_package.module:BACKEND of other-package 1.0`."""
    return f"{point.value}{f' of {point.dist.name} {point.dist.version}' if point.dist else ''}"


def names() -> tuple[str, ...]:
    """Every backend that `get` knows."""
    return (*LOADERS, *sorted(foreign().keys() - LOADERS.keys()))


@cache
def get(name: str) -> Runner:
    """The backend `name`; loads it. `DscError` lists the known ones, or says what is wrong with one of another package."""
    if name in LOADERS:
        return LOADERS[name]()
    found = foreign()
    require(name in found, f"unknown backend {name!r}; known are {', '.join(names())}")
    points = found[name]
    require(len(points) == 1, f"backend {name!r} is registered {len(points)} times: {', '.join(map(origin, points))}")
    try:
        loaded = points[0].load()
    except Exception as error:
        raise DscError(f"backend {name!r} ({origin(points[0])}) does not load: {told(error)}") from error
    missing = [what for what in ("run", "evaluate") if not callable(getattr(loaded, what, None))]
    if missing or isinstance(loaded, type):
        fault = "is a class: register an object" if isinstance(loaded, type) else f"has no {' and no '.join(f'`{m}`' for m in missing)}"
        raise DscError(f"backend {name!r} ({origin(points[0])}) {fault}")
    return Guarded(name, loaded)


def told(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"


@dataclass(frozen=True)
class Guarded:
    """A backend of another package: what it raises is told as its fault, and what it returns is held against the types."""

    name: str
    runner: Runner

    def __getattr__(self, name: str) -> Any:
        """What else it has: `prepares`, `declines`, `program`, ..."""
        return getattr(self.runner, name)

    def run(self, module: Module, weights: Weights, inputs: Sequence[Data], observe: Observer | None = None) -> tuple[Data, ...]:
        """As `Runner.run`."""
        return self._checked(module.main.results, lambda: self.runner.run(module, weights, inputs, observe), "the program")

    def evaluate(self, op: Op, operands: Sequence[Data]) -> tuple[Data, ...]:
        """As `Runner.evaluate`."""
        return self._checked(op.results, lambda: self.runner.evaluate(op, operands), op.name)

    def _checked(self, values: Sequence[Value], compute: Callable[[], tuple[Data, ...]], what: str) -> tuple[Data, ...]:
        from .arrays import describe, fits

        try:
            results = compute()
        except (DscError, AssertionError):  # an observer's, if not a message of its own
            raise
        except Exception as error:
            raise DscError(f"backend {self.name!r} fails: {told(error)}") from error
        if not isinstance(results, tuple) or len(results) != len(values):
            found = f"{len(results)} results" if isinstance(results, tuple) else f"a {type(results).__name__}"
            raise DscError(f"backend {self.name!r}: {what} gives {found}, expected a tuple of {len(values)}")
        for value, result in zip(values, results, strict=True):
            if not fits(result, value.type):
                raise DscError(f"backend {self.name!r}: {what} gives {describe(result)} for %{value.name}, expected {value.type}")
        return results
