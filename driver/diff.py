"""Where two programs, or two backends, begin to differ: op by op, aligned by id, tokens with other experts apart.

Each op is measured twice. The *accumulated* difference is that of two free runs. For the *local* one every aligned op of the second run
is handed the first run's results, so that only what the op itself does differently is left.

Two programs are *the same* when every op that both have gives the same bits, or differs by no more than the tolerance asked for.
Two backends are the same when every op's local difference stays within the bound that its sums and roundings allow
(`dsc.testing.bounds`).

A program of many ranks has other ops than that of one, and each rank has a part of every value. Where there is one, all ranks of each run
in this process, and the whole results are compared, gradients among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..backends import Site
from ..backends.arrays import Data, rounded
from ..ir.core import Module, Op
from ..ir.errors import DscError, require
from ..ir.mesh import ATTRIBUTE, mesh_of
from ..ir.ops.moe import Dispatch, Route
from ..ir.ops.quant import Quantize
from ..ir.types import Tensor, bound
from ..models.weights import DTYPE_NAMES
from .align import align
from .artifact import Artifact
from .inputs import Inputs, prepare, whole_inputs
from .measure import Measures, flat, measure, real, same_bits
from .quantstats import QuantizationStats, stats_of
from .ranks import Ranks
from .routing import Gate, Tokens
from .run import Fetch, array_types, chosen_schedule, open_weights, own_weights, run, unpack
from .ui import plural

Step = Callable[[str], None]


@dataclass(frozen=True)
class OpDiff:
    """One op that both runs have. `site` says where it ran: function, prefix of its weights' names, id."""

    site: str
    op: str
    type: str
    equal: bool
    accumulated: Measures
    same_experts: Measures | None = None
    """Accumulated, over the tokens that no gate sent elsewhere, where some were."""
    local: Measures | None = None
    bound_ratio: float | None = None
    """Two backends: the largest local difference over its bound; above 1 the op disagrees."""


@dataclass(frozen=True)
class Report:
    """What `dsc diff` prints. Of programs of many ranks `ops` are their results."""

    a: str
    b: str
    same: bool
    criterion: str
    first: str | None
    """The first op that is not the same."""
    worst: str | None
    """The op with the largest local relative L2 difference."""
    ops: tuple[OpDiff, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    routing: tuple[Gate, ...] = ()
    quantization: tuple[QuantizationStats, ...] = ()
    outputs: tuple[OpDiff, ...] = ()
    outputs_forced: tuple[OpDiff, ...] = ()
    """The results where b is made to route as a did; empty where the two route alike anyway."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinities and NaN as text."""
        found: dict[str, Any] = _plain(asdict(self))
        return found


@dataclass(frozen=True)
class _Side:
    """One of the two programs, ready to run."""

    label: str
    module: Module
    runner: Any
    weights: Fetch
    inputs: tuple[np.ndarray, ...]

    def run(self, observe: Any) -> list[np.ndarray]:
        return flat(self.runner.run(self.module, self.weights, self.inputs, observe))


Entry = tuple[Op, tuple[Data, ...], tuple[Data, ...]]
"""An op, its operands and its results."""


class _Record:
    """What the first program did, to be looked up from the second."""

    def __init__(self, a: Module, b: Module, on_step: Step) -> None:
        self.ids = align(a, b)
        self.module = b
        self.on_step = on_step
        self.entries: dict[str, Entry] = {}

    def observe(self, site: Site, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...]) -> None:
        self.on_step(str(site))
        self.entries[str(site)] = op, operands, results

    def find(self, site: Site) -> tuple[str, Entry | None]:
        """The first program's name for a site of the second, and what ran there."""
        name = str(replace(site, op=self.ids.get((site.func, site.op), site.op)))
        return name, self.entries.get(name) if (site.func, site.op) in self.ids else None

    def match(self, site: Site, results: tuple[Data, ...]) -> Entry | None:
        """What ran there, if its results have the shapes of `results`."""
        _, found = self.find(site)
        if found is None or len(found[2]) != len(results):
            return None
        shapes = ([np.shape(x) for x in flat(side)] for side in (found[2], results))
        return found if next(shapes) == next(shapes) else None


def diff(
    a: Module | Artifact,
    b: Module | Artifact | None = None,
    *,
    backends: Sequence[str] = ("numpy",),
    weights: Any = None,
    inputs: Inputs = None,
    tolerance: float = 0.0,
    on_step: Step = lambda step: None,
) -> Report:
    """Run two programs, or one under two backends, on the same weights and inputs, and compare them op by op.

    Where a program is that of many ranks, all of them run, and results are compared in place of ops. `tolerance` is the relative L2
    difference that still counts as the same between two programs.

    >>> dsc.diff(dsc.trace("deepseek-v3-tiny"), backends=("numpy", "numpy-f64")).same
    True
    """
    require(len(backends) in (1, 2), f"expected one or two backends, found {len(backends)}")
    two_backends = len(backends) == 2 and backends[0] != backends[1]
    require(b is None or b == a or not two_backends, "two artifacts and two backends at once: which of them differ could not be told")
    require(tolerance >= 0, f"the tolerance is {tolerance}, expected a relative L2 difference of 0 or more")
    require(not (two_backends and tolerance), "a tolerance is for two programs: two backends are held to the bound of each op")
    b = a if b is None else b
    given = own_weights([a, b]) if weights is None else [weights, weights]
    _check_inputs(a, b)
    if _world(a) * _world(b) > 1:
        require(not two_backends, f"{_name(a)} runs on {_world(a)} ranks, whose ops are not compared: expected one backend")
        return _by_results((a, b), backends[0], given, inputs, tolerance, on_step)
    first = _side(a, backends[0], given[0], inputs)
    second = _side(b, backends[-1], given[1], first.inputs if inputs is None else inputs)
    recorded = _Record(first.module, second.module, on_step)
    out_a = first.run(recorded.observe)
    free = _Free(recorded, Tokens(second.module), on_step)
    out_b = second.run(free.observe)
    local = _Forced(recorded, two_backends, on_step)
    if any(not entry.equal for entry in free.found):
        second.run(local.observe)
    ops = tuple(replace(e, local=local.local.get(e.site), bound_ratio=local.ratio.get(e.site)) for e in free.found)
    outputs = _outputs(first.module, out_a, out_b, free.tokens)
    forced: tuple[OpDiff, ...] = ()
    if any(gate.changed for gate in free.tokens.gates):
        forced = _outputs(first.module, out_a, second.run(_routed_as(recorded)), None)

    def differs(entry: OpDiff) -> bool:
        if two_backends:
            return entry.bound_ratio is not None and not entry.bound_ratio <= 1
        return not entry.equal and not entry.accumulated.relative_l2 <= tolerance

    different = [entry.site for entry in ops if differs(entry)]
    worst = max((e for e in ops if e.local and not e.equal), key=lambda e: _rank(e.local), default=None)
    comparable = len(outputs) == len(out_a) == len(out_b) and bool(ops)
    return Report(
        a=first.label,
        b=second.label,
        same=comparable and not different and (two_backends or not any(map(differs, outputs))),
        criterion="local difference within its bound" if two_backends else _criterion(tolerance),
        first=different[0] if different else None,
        worst=worst.site if worst else None,
        ops=ops,
        only_in_a=tuple(site for site in recorded.entries if site not in free.seen),
        only_in_b=tuple(free.only_in_b),
        routing=tuple(free.tokens.gates),
        quantization=tuple(free.quantization),
        outputs=outputs,
        outputs_forced=forced,
    )


def _check_inputs(a: Module | Artifact, b: Module | Artifact) -> None:
    """Refuse two programs that cannot be given the same inputs."""
    modules = [unpack(program)[0] for program in (a, b)]
    times = [order.microbatches if _world(p) > 1 and (order := chosen_schedule(p)) else 1 for p in (a, b)]
    taken = [whole_inputs(module, n) for module, n in zip(modules, times, strict=True)]
    if [t.shape for t in taken[0]] == [t.shape for t in taken[1]]:
        return
    said = [", ".join(f"{p.name}: {t}" for p, t in zip(m.main.params, found, strict=True)) for m, found in zip(modules, taken, strict=True)]
    hint = ""
    if [t.shape[1:] for t in taken[0]] == [t.shape[1:] for t in taken[1]] and all(t.rank for t in taken[0]):
        rows = [bound(found[0].shape[0]) for found in taken]
        few = rows.index(min(rows))
        hint = f", as with {_name((a, b)[few])} compiled with --batch {max(rows) // times[few]}" if max(rows) % times[few] == 0 else ""
    raise DscError(f"{_name(a)} takes ({said[0]}), but {_name(b)} takes ({said[1]}): expected the same inputs{hint}")


def _name(program: Module | Artifact) -> str:
    module = unpack(program)[0]
    return str(program.path) if isinstance(program, Artifact) else str(module.attributes.get("model", f"@{module.main.name}"))


def _world(program: Module | Artifact) -> int:
    """How many ranks run it."""
    module = unpack(program)[0]
    return mesh_of(module).world if ATTRIBUTE in module.attributes else 1


def _by_results(
    programs: Sequence[Module | Artifact], backend: str, weights: Sequence[Any], inputs: Inputs, tolerance: float, on_step: Step
) -> Report:
    """Two programs, at least one of many ranks, by what they return."""
    found: list[dict[str, np.ndarray]] = []
    for program, spec in zip(programs, weights, strict=True):
        ranks: Ranks | None = "local" if _world(program) > 1 else None
        results = flat(run(program, spec, inputs, backend, lambda site, *_: on_step(str(site)), ranks))
        found.append(dict(zip(array_types(unpack(program)[0]), results, strict=True)))
    a, b = found
    both = [name for name in a if name in b and a[name].shape == b[name].shape]
    entries = tuple(_op_diff(n, "result", _type_of(a[n]), same_bits(a[n], b[n]), [(a[n], b[n])], None) for n in both)
    different = [e for e in entries if not e.equal and not e.accumulated.relative_l2 <= tolerance]
    only = [tuple(name for name in side if name not in both) for side in found]
    on = [f"{plural(n, 'rank')}, " if n > 1 else "" for n in map(_world, programs)]
    worst = max((e for e in entries if not e.equal), key=lambda e: _rank(e.accumulated), default=None)
    return Report(
        a=f"{_name(programs[0])} ({on[0]}{backend})",
        b=f"{_name(programs[1])} ({on[1]}{backend})",
        same=not different and bool(entries) and not any(only),
        criterion=_criterion(tolerance),
        first=different[0].site if different else None,
        worst=worst.site if worst else None,
        ops=entries,
        only_in_a=only[0],
        only_in_b=only[1],
    )


def _type_of(x: np.ndarray) -> str:
    return f"{DTYPE_NAMES[x.dtype]}{list(x.shape)}"


def _criterion(tolerance: float) -> str:
    return f"relative L2 <= {tolerance:g}" if tolerance else "equal bits"


def _side(program: Module | Artifact, backend: str, weights: Any, inputs: Inputs) -> _Side:
    from .. import backends

    module, spec, config = unpack(program, weights)
    label = f"{_name(program)} ({backend})"
    return _Side(label, module, backends.get(backend), open_weights(spec, module, config), prepare(module, inputs))


@dataclass
class _Free:
    """Compares a free run of the second program with the record of the first, op after op."""

    recorded: _Record
    tokens: Tokens
    on_step: Step
    found: list[OpDiff] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    only_in_b: list[str] = field(default_factory=list)
    quantization: list[QuantizationStats] = field(default_factory=list)

    def observe(self, site: Site, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...]) -> None:
        self.on_step(str(site))
        if isinstance(op, Quantize):
            self.quantization.append(stats_of(str(site), op, operands[0], results[0], results[1]))
        name, known = self.recorded.find(site)
        if known and isinstance(op, Route | Dispatch) and type(known[0]) is type(op):
            self.tokens.see(site, op, known[2], results, {"first": known[1][-1], "second": operands[-1]})
        match = self.recorded.match(site, results)
        if match is None:
            self.only_in_b.append(str(site))
            return
        self.seen.add(name)
        results_a = match[2]
        pairs = [
            self.tokens.pairs(site, op, i, x, y)
            for i, (x, y) in enumerate(zip(flat(results_a), flat(results), strict=True))
            if i < len(op.results)
        ]
        equal = all(map(same_bits, flat(results_a), flat(results)))
        self.found.append(_op_diff(name, op.name, str(op.results[0].type) if op.results else "", equal, pairs, self.tokens))


@dataclass
class _Forced:
    """Hands the first program's results to the second, op after op, after measuring what each op did with them."""

    recorded: _Record
    bounded: bool
    on_step: Step
    local: dict[str, Measures] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)

    def observe(self, site: Site, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...]) -> tuple[Data, ...] | None:
        self.on_step(str(site))
        name, _ = self.recorded.find(site)
        match = self.recorded.match(site, results)
        if match is None:
            return None
        _, operands_a, results_a = match
        joined = [np.concatenate([real(x).ravel() for x in flat(side)]) for side in (results_a, results)]
        self.local[name] = measure(*joined)
        if self.bounded and op.operands:
            self.ratio[name] = _bound_ratio(self.recorded.module, op, operands_a, results_a, results)
        return tuple(_as(v.type, x) for v, x in zip(op.results, results_a, strict=True))


def _routed_as(recorded: _Record) -> Any:
    def observe(site: Site, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...]) -> tuple[Data, ...] | None:
        match = recorded.match(site, results) if isinstance(op, Route) else None
        return None if match is None else match[2]

    return observe


def _as(type: Any, x: Data) -> Data:
    """A result of the first program in the dtype that the second has there."""
    return rounded(real(x), type.dtype) if isinstance(type, Tensor) and type.dtype.is_float else x


def _outputs(module: Module, a: list[np.ndarray], b: list[np.ndarray], tokens: Tokens | None) -> tuple[OpDiff, ...]:
    return tuple(
        _op_diff(name, "result", str(type), same_bits(x, y), [(x, y)], tokens)
        for (name, type), x, y in zip(array_types(module).items(), a, b, strict=False)
        if x.shape == y.shape
    )


def _op_diff(site: str, name: str, kind: str, equal: bool, pairs: list[tuple[np.ndarray, np.ndarray]], tokens: Tokens | None) -> OpDiff:
    joined = [np.concatenate([real(p[side]).ravel() for p in pairs]) if pairs else np.zeros(0) for side in (0, 1)]
    rest = None
    if tokens and tokens.moved is not None and tokens.moved.any() and len(pairs) == 1 and not equal:
        rows = [tokens.by_token(x) for x in pairs[0]]
        if rows[0] is not None and rows[1] is not None:
            rest = measure(rows[0][~tokens.moved], rows[1][~tokens.moved])
    return OpDiff(site, name, kind, equal, measure(*joined), rest)


def _bound_ratio(module: Module, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...], others: tuple[Data, ...]) -> float:
    from ..testing.agree import share_of_bound
    from ..testing.bounds import bound

    limits = bound(op, operands, results, module=module)
    return max(
        (float(share_of_bound(*each).max(initial=0.0)) for each in zip(flat(results), flat(others), limits, strict=True)), default=0.0
    )


def _rank(measures: Measures | None) -> float:
    value = 0.0 if measures is None else measures.relative_l2
    return math.inf if math.isnan(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
