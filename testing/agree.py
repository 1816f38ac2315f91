"""`assert_backends_agree`: the face for users' own test suites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import backends as registry
from ..backends import Site
from ..backends.arrays import Array, Data, describe, fits, widen
from ..ir.core import Module, Op
from ..ir.errors import DscError, require
from ..ir.ops.control import Constant, Param
from ..ir.ops.fused import Fused, alone
from ..ir.ops.moe import Route
from ..ir.printer import print_op
from ..ir.types import Tensor
from .answers import leaves
from .bounds import bound

Weights = Mapping[str, Any] | Callable[[str, Tensor], Array]


@dataclass(frozen=True)
class MovedToken:
    """A token whose experts differ between two backends, the choice being closer than the rounding error."""

    site: Site
    token: int
    experts: tuple[tuple[int, ...], tuple[int, ...]]
    """What the first and what the second backend chose."""

    def __str__(self) -> str:
        first, second = (" ".join(map(str, ids)) for ids in self.experts)
        return f"{self.site}: token {self.token} goes to experts {first} or {second}"


@dataclass
class Agreement:
    """What was compared."""

    ops: int = 0
    worst: float = 0.0
    """The largest difference as a share of its bound, 0 where all bits agree."""
    worst_at: Site | None = None
    moved: list[MovedToken] = field(default_factory=list)
    """Tokens with other experts. They are no disagreement, but what follows from them differs in an end-to-end comparison."""


def assert_backends_agree(
    module: Module, weights: Weights, inputs: Sequence[Data], backends: tuple[str, str] = ("numpy", "numpy-f64")
) -> Agreement:
    """Run `module` on the first backend, and every op of it on the second with the operands that the first one saw.

    So each op answers for its own error only, and is held to the bound of `dsc.testing.bounds`: what the length of its sums,
    its types and one rounding permit. `weights` maps names to arrays or torch tensors (a `state_dict`), or is a function
    (name, type) -> array; `inputs` are arrays or torch tensors. Raises AssertionError that names the first op beyond its bound and
    the worst element in it; `DscError` where inputs or weights do not fit the program, or a backend is unknown.

    >>> assert_backends_agree(module, weights, inputs, backends=("numpy", "triton"))
    """
    from ..models.state_dict import as_array

    first, second = (registry.get(name) for name in backends)
    agreement = Agreement()

    def compare(site: Site, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...]) -> None:
        if isinstance(op, Param | Constant):
            return
        others = second.evaluate(op, operands) if not isinstance(op, Fused) else second.run(alone(op, module), _no_weights, operands)
        agreement.ops += 1
        _compare(agreement, backends, site, op, bound(op, operands, results, module=module), results, others)

    first.run(module, weights if callable(weights) else _lookup(weights), list(map(as_array, inputs)), compare)
    return agreement


def _no_weights(name: str, type: Tensor) -> Array:
    raise DscError(f"weight {name} of type {type}: a fused op has none")


def _lookup(weights: Mapping[str, Any]) -> Callable[[str, Tensor], Array]:
    from ..models.state_dict import as_array

    def fetch(name: str, type: Tensor) -> Array:
        require(name in weights, f"no weight {name!r}, expected {type}")
        return as_array(weights[name])

    return fetch


def _compare(
    agreement: Agreement,
    names: tuple[str, str],
    site: Site,
    op: Op,
    bounds: Sequence[Array | float],
    results: Sequence[Data],
    others: Sequence[Data],
) -> None:
    for value, other in zip(op.results, others, strict=True):
        if not fits(other, value.type):
            raise AssertionError(f"{site}: {names[1]} gives {describe(other)}, expected {value.type}\n  {print_op(op)}")
    found, expected = leaves(results), leaves(others)
    if isinstance(op, Route):
        moved = np.flatnonzero((found[0] != expected[0]).any(-1) & np.isinf(np.asarray(bounds[0])).any(-1))
        experts = zip(moved, found[0][moved], expected[0][moved], strict=True)
        agreement.moved += [MovedToken(site, int(t), (tuple(a.tolist()), tuple(b.tolist()))) for t, a, b in experts]
    for index, (limit, a, b) in enumerate(zip(bounds, found, expected, strict=True)):
        ratio = share_of_bound(a, b, limit)
        if ratio.size == 0 or ratio.max() <= agreement.worst:
            continue
        at = np.unravel_index(int(ratio.argmax()), ratio.shape)
        agreement.worst, agreement.worst_at = float(ratio[at]), site
        if ratio[at] > 1:
            permitted = np.broadcast_to(limit, ratio.shape)[at]
            place = f"result {index}" * (len(found) > 1) + f"[{', '.join(map(str, at))}]"
            raise AssertionError(
                f"{names[0]} and {names[1]} disagree first at {site}, in {int((ratio > 1).sum())} of {ratio.size} elements\n"
                f"  {print_op(op)}\n"
                f"  worst at {place}: {names[0]} {a[at]!s}, {names[1]} {b[at]!s}, permitted difference {permitted:g}"
            )


def share_of_bound(a: Array, b: Array, limit: Any) -> Array:
    """|a - b| as a share of `limit`, 0 where they are equal or both NaN, infinite where no difference is permitted."""
    if a.dtype.kind in "iub":
        differs = a != b
        return np.where(differs, np.where(np.isinf(limit), 0.0, np.inf), 0.0)
    x, y = (widen(v, np.float64) for v in (a, b))
    with np.errstate(all="ignore"):
        share = np.abs(x - y) / limit
    fine = (x == y) | (np.isnan(x) & np.isnan(y)) | np.isinf(limit)
    return np.where(fine, 0.0, np.nan_to_num(share, nan=np.inf, posinf=np.inf))
