"""Which residuals to keep within a budget: an integer program, with a row for each point that proves too full.

Binary s_v says that value v of a forward function is kept, r_o that op o runs again in its backward. What backward needs is kept or made
again, s_v + r_owner(v) >= 1, and an op that runs again needs its operands, s_u + r_owner(u) >= r_o: chains pay for every link. The
objective is the time of what runs again. Memory is bounded point by point, and only where it matters: a plan is carried out and laid on a
timeline (`ir/timeline.py`), which is exact; the fullest point of each function becomes a row, and so on until the plan fits.

A row counts what is alive at its point: what no choice changes, each buffer that a kept value holds, and each needed value that is not
kept, from the first op of backward that reads it to the last. That is less than the truth where ops that run again keep each other's
operands alive; then the row has the difference on top, for plans that run at least the same ops again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal

from ..ir.core import Func, Module, Op, Phase, Trait, Value
from ..ir.errors import DscError
from ..ir.timeline import Buffer, Data, Execution, Fields, flat, timeline
from .outline import is_free
from .pairs import Pair, Plan, can_rerun, carried_out, rerun

Cost = Callable[[Pair, Op], float]
"""Seconds that running an op of a pair's forward again takes, in all runs of its backward."""

MOST_ROUNDS = 60
"""Rounds after which the plan found so far is squeezed into the budget instead of improved."""


def cheapest(module: Module, pairs: Sequence[Pair], budget: float, cost: Cost) -> Plan:
    """The plan that costs least among those whose residuals and workspace stay within `budget` bytes.

    Raises `DscError` with the lowest budget for which there is one.
    """
    if max(timeline(module).activations, default=0) <= budget:
        return {}
    search = _Search(module, pairs, cost)
    target = budget
    for round in range(4 * MOST_ROUNDS):
        plan = search.solve(target)
        if plan is None:
            break
        excess = search.learn(plan) - budget
        if excess <= 0:
            return plan
        if round >= MOST_ROUNDS:
            target = min(target, budget) - max(excess, 1e-3 * budget)
    lowest, plan = search.leanest(budget)
    if lowest <= budget:
        return plan
    feasible = f"the lowest budget that is feasible is {rounded_up(lowest)}"
    raise DscError(f"residuals and workspace do not fit into budget-gb={budget / 1e9:g}; {feasible}")


def rounded_up(number: int) -> str:
    """Bytes as 10^9 bytes with five digits, no less than they are."""
    step = Decimal(1).scaleb(max(0, len(str(number)) - 5))
    return f"{(Decimal(number) / step).to_integral_value(ROUND_CEILING) * step / 10**9:f}"


@dataclass
class _Row:
    """Bytes at one point: const + sum of coefficients, to be no more than the budget."""

    const: float
    terms: dict[int, float]


@dataclass
class _Program:
    """Variables with costs and rows lo <= a x <= hi, as HiGHS takes them."""

    cost: list[float] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float]] = field(default_factory=list)
    """(coefficients, lower bound)."""

    def variable(self, cost: float = 0.0, whole: bool = True) -> int:
        self.cost.append(cost)
        self.whole.append(int(whole))
        return len(self.cost) - 1


class _Search:
    """The integer program of one module, and the rows that it has learnt."""

    def __init__(self, module: Module, pairs: Sequence[Pair], cost: Cost) -> None:
        self.module, self.pairs = module, pairs
        self.program = _Program()
        self.kept: dict[tuple[str, Value], int] = {}
        """s, by forward function and value."""
        self.again: dict[tuple[str, Op], int] = {}
        """r, by forward function and op."""
        self.held: dict[frozenset[int], int] = {}
        """For values that may lie in the same buffer: whether any of them is kept."""
        for pair in pairs:
            self._variables(pair, cost)
        self.base = _Base(module, pairs)
        self.base_line = self.base.timeline()
        self.at = {(p.run, p.op.id): i for i, p in enumerate(self.base_line.points)}
        self.rows: list[_Row] = []

    def _variables(self, pair: Pair, cost: Cost) -> None:
        program, name = self.program, pair.forward.name
        waiting, seen = list(pair.needed), set[Value]()
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            owner = value.owner
            if value in pair.needed or owner is None or not is_free(owner):
                self.kept[name, value] = program.variable()
            if owner and can_rerun(owner):
                if (name, owner) not in self.again:
                    self.again[name, owner] = program.variable(cost(pair, owner))
                waiting += owner.operands
        for value in seen:
            if value in pair.needed:
                program.rows.append((self._had(name, value), 1.0))
            if value.owner and (name, value.owner) in self.again:
                mine = self.again[name, value.owner]
                for operand in value.owner.operands:
                    program.rows.append((self._had(name, operand) | {mine: -1.0}, 0.0))

    def _had(self, name: str, value: Value) -> dict[int, float]:
        """The variables of which one has to be 1 for backward to have a value."""
        found = {self.kept[name, value]: 1.0} if (name, value) in self.kept else {}
        if value.owner and (name, value.owner) in self.again:
            found[self.again[name, value.owner]] = 1.0
        return found

    # ---- memory

    def learn(self, plan: Plan) -> int:
        """The true peak of a plan. The fullest point of each function becomes a row."""
        line = timeline(carried_out(self.module, self.pairs, plan))
        series = line.activations
        fullest: dict[str, int] = {}
        for i, point in enumerate(line.points):
            best = fullest.setdefault(point.func.name, i)
            if series[i] > series[best]:
                fullest[point.func.name] = i
        reruns = {pair.backward.name: (pair.forward.name, rerun(pair, plan[pair.forward.name])[0]) for pair in self.pairs}
        for func, i in fullest.items():
            j = i
            while line.points[j].op.phase is Phase.R:
                j += 1
            row = self._row(self.at[line.points[j].run, line.points[j].op.id])
            values = self._assignment(plan)
            missing = series[i] - row.const - sum(c * values[k] for k, c in row.terms.items())
            if missing > 0 and func in reruns:
                name, ops = reruns[func]
                mine = [self.again[name, op] for op in ops]
                row.const += missing * (1 - len(mine))
                for k in mine:
                    row.terms[k] = row.terms.get(k, 0.0) + missing
            self.rows.append(row)
        return max(series)

    def _assignment(self, plan: Plan) -> list[float]:
        values = [0.0] * len(self.program.cost)
        for pair in self.pairs:
            name = pair.forward.name
            for v in plan[name]:
                values[self.kept[name, v]] = 1.0
            for op in rerun(pair, plan[name])[0]:
                values[self.again[name, op]] = 1.0
        for members, variable in self.held.items():
            values[variable] = max(values[m] for m in members)
        return values

    def _row(self, t: int) -> _Row:
        """What is alive at a point of the run without residuals, and what choices add to it."""
        const, terms = 0.0, dict[int, float]()
        for b in self.base_line.buffers:
            if b.kind in ("inputs", "gradients") or b.made > t:
                continue
            if b.dies >= t:
                made_again = self.base.unkept.get(b)
                const += b.bytes
                if made_again:
                    k = self.kept[made_again]
                    terms[k] = terms.get(k, 0.0) - b.bytes
                continue
            holders = frozenset(self.kept[h] for h, end in self.base.holders.get(b, ()) if end >= t and h in self.kept)
            if holders:
                k = self._any(holders)
                terms[k] = terms.get(k, 0.0) + b.bytes
        return _Row(const, terms)

    def _any(self, members: frozenset[int]) -> int:
        if len(members) == 1:
            return next(iter(members))
        if members not in self.held:
            self.held[members] = self.program.variable(whole=False)
            self.program.rows += [({self.held[members]: 1.0, m: -1.0}, 0.0) for m in members]
        return self.held[members]

    # ---- solving

    def solve(self, budget: float) -> Plan | None:
        """The cheapest plan under the rows learnt so far; None where they leave none."""
        scale = max(budget, 1.0)
        rows = [*self.program.rows, *(({k: -c / scale for k, c in row.terms.items()}, (row.const - budget) / scale) for row in self.rows)]
        found = _highs(_scaled(self.program.cost), self.program.whole, rows)
        return None if found is None else self._plan(found)

    def leanest(self, budget: float) -> tuple[int, Plan]:
        """The plan with the lowest peak, and that peak, as far as some rounds of search find it."""
        everything: Plan = {pair.forward.name: rerun(pair, pair.kept)[1] for pair in self.pairs}
        best, plan = self.learn(everything), everything
        for _ in range(MOST_ROUNDS):
            peak = len(self.program.cost)
            scale = float(best)
            rows = [*self.program.rows, *(({k: -c / scale for k, c in r.terms.items()} | {peak: 1.0}, r.const / scale) for r in self.rows)]
            found = _highs([*([0.0] * peak), 1.0], [*self.program.whole, 0], rows)
            if found is None:
                break
            tried = self._plan(found)
            reached = self.learn(tried)
            if reached < best:
                best, plan = reached, tried
            if best <= budget or best <= found[peak] * scale * (1 + 1e-6):
                break
        return best, plan

    def _plan(self, values: Sequence[float]) -> Plan:
        plan: dict[str, Collection[Value]] = {}
        for pair in self.pairs:
            chosen = {v for (name, v), k in self.kept.items() if name == pair.forward.name and values[k] > 0.5}
            plan[pair.forward.name] = rerun(pair, chosen)[1]
        return plan


class _Base(Execution):
    """The run in which residual bundles hold nothing, and each value that backward unpacks has a buffer of its own while it is read."""

    def __init__(self, module: Module, pairs: Sequence[Pair]) -> None:
        super().__init__(module)
        self.packs: set[Op] = {pair.pack for pair in pairs}
        self.unpacks: dict[Op, Pair] = {pair.unpack: pair for pair in pairs}
        self.backward = {pair.backward.name: pair for pair in pairs}
        self.frames: dict[Fields, list[tuple[Value, Data]]] = {}
        """What each bundle could hold: the values of the run of forward that made it."""
        self.holders: dict[Buffer, list[tuple[tuple[str, Value], int]]] = {}
        """Who could hold a buffer, and how long."""
        self.unkept: dict[Buffer, tuple[str, Value]] = {}
        """The buffers of values that are made again."""
        self._unread: set[Buffer] = set()
        self._running: list[list[tuple[Value, Data]]] = []

    def call(self, func: Func, prefix: str, args: Sequence[Data]) -> list[Data]:
        self._running.append(list(zip(func.params, args, strict=True)))
        found = super().call(func, prefix, args)
        self._running.pop()
        if pair := self.backward.get(func.name):
            bundle = args[pair.param]
            for value, data in self.frames[bundle] if isinstance(bundle, Fields) else ():
                for b in flat([data]):
                    self.holders.setdefault(b, []).append(((pair.forward.name, value), len(self.points) - 1))
        return found

    def execute(self, func: Func, prefix: str, op: Op, operands: Sequence[Data]) -> Sequence[Data]:
        now = len(self.points) - 1
        if op in self.packs:
            empty = Fields(())
            self.frames[empty] = self._running[-1]
            return [empty]
        if op in self.unpacks:
            pair = self.unpacks[op]
            fresh = [self.make(v.type, func.name, v.name, now) if v in pair.needed else None for v in pair.kept]
            for v, data in zip(pair.kept, fresh, strict=True):
                self._unread.update(flat([data]))
                self.unkept.update((b, (pair.forward.name, v)) for b in flat([data]))
            return fresh
        if Trait.VIEW not in op.traits:
            for b in flat(operands):
                if b in self._unread:
                    self._unread.discard(b)
                    b.made = now
        found = super().execute(func, prefix, op, operands)
        self._running[-1].extend(zip(op.results, found, strict=True))
        return found


def _scaled(cost: Sequence[float]) -> list[float]:
    """With the largest at 1: the solver's tolerances are absolute."""
    most = max(cost, default=0.0) or 1.0
    return [c / most for c in cost]


def _highs(cost: Sequence[float], whole: Sequence[int], rows: Sequence[tuple[Mapping[int, float], float]]) -> list[float] | None:
    """The x that minimises cost x where each row is at least its bound, 0 <= x <= 1 where whole, else x >= 0. None where there is none."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not cost:
        return [] if all(low <= 0 for _, low in rows) else None
    data = [(i, k, c) for i, (terms, _) in enumerate(rows) for k, c in terms.items()]
    row, column, value = zip(*data, strict=True) if data else ((), (), ())
    matrix = csr_array((value, (row, column)), shape=(len(rows), len(cost)))
    upper = [1.0 if w else float("inf") for w in whole]
    constraint = LinearConstraint(matrix, lb=[low for _, low in rows])
    solved = milp(cost, integrality=whole, bounds=Bounds(0.0, upper), constraints=constraint, options={"time_limit": 10.0})
    return None if solved.x is None else [float(x) for x in solved.x]
