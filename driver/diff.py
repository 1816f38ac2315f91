"""Where two programs, or two backends, begin to differ: op by op, aligned by id, tokens with other experts apart.

Two artifacts are *the same* when every op that both have gives the same bits, or differs by less than the tolerance asked
for. Two backends are the same when each op, given the first backend's operands, stays within the bound that its sums
and roundings allow (`dsc.testing.bounds`): the local difference. The accumulated one is reported beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..ir.core import Module, Op
from ..ir.errors import require
from ..ir.ops.moe import Route
from .artifact import Artifact
from .inputs import Inputs, prepare
from .run import open_weights, unpack

Array = Any


@dataclass(frozen=True)
class Measures:
    """How far b is from a: relative L2 norm of the difference, its largest element, SQNR in dB, cosine similarity and
    DeepGEMM's calc_diff, 1 - 2 <a, b> / (<a, a> + <b, b>)."""

    relative_l2: float
    max_error: float
    sqnr_db: float
    cosine: float
    calc_diff: float


@dataclass(frozen=True)
class OpDiff:
    """One op that both runs have. `site` is the prefix of its weights' names and its id."""

    site: str
    op: str
    type: str
    equal: bool
    accumulated: Measures
    other_tokens: Measures | None = None
    """Of the tokens that went to the same experts in both runs so far, where some did not."""
    bound_ratio: float | None = None
    """Two backends: the largest local difference over its bound; above 1 the op disagrees."""


@dataclass(frozen=True)
class Routing:
    """Tokens that chose other experts, at one gate."""

    site: str
    tokens: int
    changed: int


@dataclass(frozen=True)
class Report:
    """What `dsc diff` prints."""

    a: str
    b: str
    same: bool
    criterion: str
    first: str | None
    """The first op that is not the same."""
    worst: str | None
    """The op with the largest relative L2 difference."""
    ops: tuple[OpDiff, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    routing: tuple[Routing, ...] = ()
    outputs: tuple[OpDiff, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinities and NaN as text."""
        return _plain(asdict(self))


def diff(
    a: Module | Artifact,
    b: Module | Artifact | None = None,
    *,
    backends: Sequence[str] = ("numpy",),
    weights: Any = None,
    inputs: Inputs = None,
    tolerance: float = 0.0,
    on_step: Callable[[str], None] = lambda step: None,
) -> Report:
    """Run two programs, or one under two backends, on the same weights and inputs, and compare them op by op.

    `tolerance` is the relative L2 difference that still counts as the same between two programs.

    >>> dsc.diff(dsc.trace("deepseek-v3-tiny"), backends=("numpy", "numpy-f64")).same
    True
    """
    from .. import backends as registry

    require(len(backends) in (1, 2), f"expected one or two backends, found {len(backends)}")
    two_backends = len(backends) == 2 and backends[0] != backends[1]
    require(b is None or b == a or not two_backends, "two artifacts and two backends at once: which of the two differs could not be told")
    b = a if b is None else b
    first, second = (registry.get(name) for name in (backends[0], backends[-1]))
    recorded: dict[str, tuple[Op, tuple[Array, ...]]] = {}
    module_a, spec_a, config_a = unpack(a, weights)
    module_b, spec_b, config_b = unpack(b, weights)
    given = prepare(module_a, inputs)
    ratios: dict[str, float] = {}

    def record(site: Any, op: Op, operands: Sequence[Array], results: tuple[Array, ...]) -> None:
        recorded[str(site)] = op, results
        if two_backends and op.operands:
            ratios[str(site)] = _bound_ratio(op, operands, results, second.evaluate(op, operands))
        on_step(str(site))

    out_a = first.run(module_a, open_weights(spec_a, module_a, config_a), given, record)
    compared: list[OpDiff] = []
    routing: list[Routing] = []
    only_in_b: list[str] = []
    moved: np.ndarray | None = None

    def compare(site: Any, op: Op, operands: Sequence[Array], results: tuple[Array, ...]) -> None:
        nonlocal moved
        on_step(str(site))
        if str(site) not in recorded:
            only_in_b.append(str(site))
            return
        _, results_a = recorded.pop(str(site))
        tensors = [_flat(r) for r in (results_a, results)]
        if [x.shape for x in tensors[0]] != [x.shape for x in tensors[1]]:
            only_in_b.append(str(site))
            return
        if isinstance(op, Route):
            changed = (np.sort(results_a[0], axis=-1) != np.sort(results[0], axis=-1)).any(axis=-1)
            routing.append(Routing(str(site), int(changed.size), int(changed.sum())))
            moved = changed if moved is None or moved.shape != changed.shape else moved | changed
        compared.append(_compare(str(site), op.name, op, tensors[0], tensors[1], moved, ratios.get(str(site))))

    out_b = second.run(module_b, open_weights(spec_b, module_b, config_b), prepare(module_b, given if inputs is None else inputs), compare)
    outputs = tuple(
        _compare(value.name, "result", None, _flat((x,)), _flat((y,)), moved, None)
        for value, x, y in zip(module_a.main.results, out_a, out_b, strict=False)
        if x is not None and np.shape(x) == np.shape(y)
    )

    def differs(entry: OpDiff) -> bool:
        if two_backends:
            return entry.bound_ratio is not None and not entry.bound_ratio <= 1
        return not entry.equal and not entry.accumulated.relative_l2 <= tolerance

    different = [entry.site for entry in compared if differs(entry)]
    unequal = [entry for entry in compared if not entry.equal]
    nothing_shared = not compared and bool(recorded or only_in_b)
    shapes_differ = len(outputs) != len(out_a) or len(out_a) != len(out_b)
    criterion = "local difference within its bound" if two_backends else f"relative L2 <= {tolerance:g}" if tolerance else "equal bits"
    return Report(
        a=_label(a, backends[0]),
        b=_label(b, backends[-1]),
        same=not different and not nothing_shared and not shapes_differ and not (not two_backends and any(map(differs, outputs))),
        criterion=criterion,
        first=different[0] if different else None,
        worst=max(unequal, key=lambda e: _rank(e.accumulated.relative_l2)).site if unequal else None,
        ops=tuple(compared),
        only_in_a=tuple(recorded),
        only_in_b=tuple(only_in_b),
        routing=tuple(routing),
        outputs=outputs,
    )


def measure(a: Array, b: Array) -> Measures:
    """Compare two arrays of one shape. NaN in the same place is no difference; elsewhere everything is NaN."""
    x, y = (np.asarray(v, dtype=np.float64).ravel() for v in (a, b))
    alike = (x == y) | (np.isnan(x) & np.isnan(y))
    if alike.all():
        return Measures(0.0, 0.0, math.inf, 1.0, 0.0)
    with np.errstate(all="ignore"):  # IEEE says it right: nothing over nothing is NaN, noise without a signal is infinite
        error = np.where(alike, 0.0, y - x)
        x, y = (np.where(alike & ~np.isfinite(x), 0.0, v) for v in (x, y))
        signal, noise, other, inner = (np.float64(p @ q) for p, q in ((x, x), (error, error), (y, y), (x, y)))
        return Measures(
            relative_l2=float(np.sqrt(noise / signal)),
            max_error=float(np.abs(error).max()),
            sqnr_db=float(10 * np.log10(signal / noise)),
            cosine=float(inner / np.sqrt(signal * other)),
            calc_diff=float(1 - 2 * inner / (signal + other)),
        )


def _compare(site: str, name: str, op: Op | None, a: list[Array], b: list[Array], moved: np.ndarray | None, ratio: float | None) -> OpDiff:
    equal = all(_bits_equal(x, y) for x, y in zip(a, b, strict=True))
    pairs = [(_real(x), _real(y)) for x, y in zip(a, b, strict=True)]
    joined = [np.concatenate([p[side].ravel() for p in pairs]) if pairs else np.zeros(0) for side in (0, 1)]
    rest = None
    if moved is not None and moved.any() and len(pairs) == 1 and not equal:
        rows = _by_token(pairs[0][0], moved.size), _by_token(pairs[0][1], moved.size)
        if rows[0] is not None and rows[1] is not None:
            rest = measure(rows[0][~moved], rows[1][~moved])
    kind = str(op.results[0].type) if op else _type(a)
    return OpDiff(site, name, kind, equal, measure(*joined), rest, ratio)


def _by_token(x: np.ndarray, tokens: int) -> np.ndarray | None:
    """x with one row per token, if its leading dimensions are the tokens."""
    lead = 1
    for axis, extent in enumerate(x.shape):
        lead *= extent
        if lead == tokens:
            return x.reshape(tokens, *x.shape[axis + 1 :])
    return None


def _bound_ratio(op: Op, operands: Sequence[Array], results: tuple[Array, ...], others: tuple[Array, ...]) -> float:
    from ..testing.bounds import bound

    worst = 0.0
    permitted = bound(op, operands, results)
    for limit, x, y in zip(permitted, _flat(results), _flat(others), strict=True):
        if _bits_equal(x, y):
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.abs(_real(x) - _real(y)) / np.broadcast_to(np.asarray(limit, dtype=np.float64), np.shape(x))
            ratio = np.where(_real(x) == _real(y), 0.0, ratio)
        worst = max(worst, float(np.nan_to_num(ratio, nan=np.inf).max(initial=0.0)))
    return worst


def _flat(values: Any) -> list[Array]:
    """Arrays, those within bundles included."""
    return [x for v in values for x in (_flat(v) if isinstance(v, tuple) else [v])]


def _real(x: Array) -> np.ndarray:
    from ..numerics.formats import widen

    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype.isbuiltin == 1 else widen(x).astype(np.float64)


def _bits_equal(x: Array, y: Array) -> bool:
    return bool(x.dtype == y.dtype and x.shape == y.shape and np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes())


def _type(arrays: list[Array]) -> str:
    names = {"bfloat16": "bf16", "float32": "f32", "float64": "f64", "float16": "f16"}
    return ", ".join(f"{names.get(x.dtype.name, x.dtype.name)}{list(x.shape)}" for x in arrays)


def _label(program: Module | Artifact, backend: str) -> str:
    return f"{program.path if isinstance(program, Artifact) else program.attributes.get('model', '@' + program.main.name)} ({backend})"


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
