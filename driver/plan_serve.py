"""What serving takes on a cluster: prompts read, or tokens made for every sequence, two micro-batches hiding each other's communication.

What is planned is what runs: the program of a rank in mode prefill or decode, sharded, fused, and interleaved with itself by the pass
`overlap`. Its ops cost what they do on the cluster; what follows from weights alone has been done before.

prefill   a copy of a token for each domain, on from there inside; kernels that take SMs from computation
decode    a row for each expert, sent by the network cards alone: no SMs, and nothing that either side would lose

With `accepted`, decoding is speculative (DeepSeek-V3 report, section 5.4.3): a step checks two tokens of each sequence over one cache, and
the MTP module, costed as one more layer with its projection and the head, proposes the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any, Literal

from ..hardware.figures import Figure, spoken
from ..hardware.streams import Times, simulate
from ..hardware.tables import product
from ..ir.core import Module
from ..ir.expected import expected_bytes
from ..ir.mesh import Mesh
from ..ir.ops.collective import RowExchange
from ..ir.slots import slots_of
from ..ir.types import bound
from ..ir.walk import weights
from ..passes.overlap import overlapped
from .plan_inputs import Inputs
from .plan_layers import Program
from .plan_machine import Machine
from .plan_program import Compiler
from .plan_report import Effect, spread
from .ui import count, plural, size, table

Mode = Literal["prefill", "decode"]
SEQUENCES, TOKENS, ACCEPTED = "serve.sequences", "serve.tokens", "serve.accepted"


def serving_inputs(inputs: Inputs, mode: Mode, micro: int | None, seq: int | None, longest: int, speculative: bool) -> Inputs:
    """With what is assumed of serving: the work that there is, unless it is given, and how exchanges run beside computation.

    sequences   of a micro-batch, on each rank along dp      tokens   of a prompt, or of context for each token
    accepted    the share of proposed tokens that are right
    """
    found = replace(inputs, own={**inputs.own, **_work(mode, micro, seq, longest), **(_SPECULATION if speculative else {})})
    for key, figure in _EXCHANGES[mode].items():
        if inputs.figures[key].provenance != "measured":
            found = found.with_figure(key, figure)
    return found


def _work(mode: Mode, micro: int | None, seq: int | None, longest: int) -> dict[str, Figure]:
    """What is served. A number that is given has no range."""
    figures = {
        key: replace(f, mid=min(f.mid, most), low=min(f.low, most), high=min(f.high, most))
        for (key, f), most in zip(_WORK[mode].items(), (inf, longest), strict=True)
    }
    given = {key: number for key, number in ((SEQUENCES, micro), (TOKENS, seq)) if number is not None}
    return figures | {key: Figure(n, n, n, "1", "assumed", "as given") for key, n in given.items()}


_PROFILE = "deepseek-ai/profile-data"
_DAY = "DeepSeek's day 6 of open-infra-index"
_WORK: Mapping[Mode, Mapping[str, Figure]] = {
    "prefill": {
        SEQUENCES: Figure(2, 1, 4, "1", "published", f"{_PROFILE}: 16K tokens on each GPU in two micro-batches; ends: half and twice"),
        TOKENS: Figure(4096, 2048, 8192, "1", "published", f"{_PROFILE}: prompts of 4K; ends: half and twice"),
    },
    "decode": {
        SEQUENCES: Figure(
            64, 44, 128, "1", "published", f"{_PROFILE}: 128 on each GPU; low: 14.8K tokens/s of a node at 21 a user ({_DAY}); high: twice"
        ),
        TOKENS: Figure(4989, 4096, 8192, "1", "published", f"{_DAY}: mean length of the cache; low: {_PROFILE}; high: twice that"),
    },
}
_SPECULATION = {ACCEPTED: Figure(0.875, 0.85, 0.9, "1", "published", "DeepSeek-V3 report, section 5.4.3: 85 to 90% of second tokens")}
_ALONE = "no SMs: DeepEP's kernels for decoding, and the picture of decode in profile-data"
_EXCHANGES: Mapping[Mode, Mapping[str, Figure]] = {
    "prefill": {"comm.sms": Figure(24, 20, 24, "1", "published", "picture of prefill in profile-data (24); report, section 3.2.2 (20)")},
    "decode": {
        "comm.sms": Figure(0, 0, 0, "1", "published", _ALONE),
        "comm.slowdown": Figure(1.0, 1.0, 1.18, "1", "assumed", f"{_ALONE}; high: dispatch in DeepEP issue 184"),
        "comm.compute_slowdown": Figure(1.0, 1.0, 1.081, "1", "assumed", f"{_ALONE}; high: as beside kernels that take SMs"),
        "comm.notify": Figure(25.67e-6, 18.9e-6, 53.5e-6, "s", "published", "what DeepEP's table of decoding on 32 to 256 GPUs leaves"),
    },
}


@dataclass(frozen=True)
class Serving:
    """Two micro-batches on each rank along dp, of `micro` sequences: `tokens` of each are read in prefill, are context in decoding."""

    mode: Mode
    mesh: Mesh
    program: Program
    both: Module
    """The two micro-batches as one program, in its order."""
    machine: Machine
    micro: int
    tokens: int
    accepted: float | None = None

    @cached_property
    def times(self) -> Times:
        """Both micro-batches through all layers."""
        return simulate(self.both, self.machine.costing)

    @cached_property
    def proposing(self) -> float:
        """Seconds of what the MTP module has beside its layer: a projection of two hidden states, and the head once more; of both."""
        if self.accepted is None:
            return 0.0
        rows, hidden = (bound(d) for d in self.both["head"].params[0].shape)
        head = simulate(self.both, self.machine.costing, self.both["head"])
        return 2 * (head.total + self.machine.costs[0].seconds(product("dense", rows, hidden, 2 * hidden, 1)))

    @property
    def time(self) -> float:
        """Seconds of a run."""
        return self.times.total + self.proposing

    @property
    def made(self) -> float:
        """Tokens of a sequence that a run reads or makes."""
        return float(self.tokens) if self.mode == "prefill" else 1.0 + (self.accepted or 0.0)

    @property
    def per_token(self) -> float:
        """Seconds of a run by the tokens that it makes for a sequence: the time per output token (TPOT) in decoding."""
        return self.time if self.mode == "prefill" else self.time / self.made

    @property
    def per_node(self) -> float:
        """Tokens a second of a node."""
        return 2 * self.micro * self.made / self.time / self.mesh.tp * self.mesh.node

    @property
    def bound(self) -> float:
        """Seconds that the exchanges of both micro-batches take one after the other, nothing else in their way: no run is shorter."""
        alone = self.machine.costs[0]
        found = sum(alone.seconds(s.op) for s in self.times.spans if isinstance(s.op, RowExchange))
        return found if self.mode == "prefill" else found / self.made

    @property
    def slots(self) -> int | None:
        """Of experts, on all ranks along ep; None where each expert is held once."""
        found = slots_of(self.both)
        return None if found is None else next(map(len, found.held.values()))

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of a rank: weights, what the program is given (in decoding the caches of both micro-batches), workspace."""
        bytes_of = expected_bytes(self.both)
        given = sum(bytes_of(p.type) for p in self.both.main.params) // (1 if self.accepted is None else 2)
        held = sum(t.bytes for t in weights(self.both).values())
        return {"weights": held, "inputs and caches": given, "workspace": replace(self.program, module=self.both).workspace}


def serve(compiler: Compiler, inputs: Inputs, mode: Mode, mesh: Mesh) -> Serving:
    """A run of two micro-batches, in the order that `overlap` finds for them."""
    own = inputs.own
    accepted = own[ACCEPTED].mid if ACCEPTED in own else None
    micro, tokens = round(inputs[SEQUENCES]), round(inputs[TOKENS])
    compiler = compiler.of(tokens)
    program = compiler.program(mesh, micro * (1 if accepted is None else 2), inputs.cluster)
    machine = _machine(inputs, mesh, program)
    both = overlapped(program.module, machine.costing, microbatches=2).module
    return Serving(mode, mesh, program, both, machine, micro, tokens, accepted)


def _machine(inputs: Inputs, mesh: Mesh, program: Program) -> Machine:
    """With speculation two queries of a sequence read its cache at once."""
    return Machine(inputs, mesh, program, {"repeats": inf, "shared": 2 if ACCEPTED in inputs.own else 1})


def changed(plan: Serving, compiler: Compiler, inputs: Inputs, key: str) -> Serving:
    """The plan with another value of one figure. Other work is another program; else the order of ops stays."""
    if key in (SEQUENCES, TOKENS):
        return serve(compiler, inputs, plan.mode, plan.mesh)
    accepted = inputs[ACCEPTED] if plan.accepted is not None else None
    return replace(plan, machine=_machine(inputs, plan.mesh, plan.program), accepted=accepted)


@dataclass(frozen=True)
class Effects:
    """What each assumption does to the seconds of a token or a run, and to the tokens a second of a node."""

    time: tuple[Effect, ...] = ()
    rate: tuple[Effect, ...] = ()


def effects(mid: Serving, compiler: Compiler, on_step: Callable[[str], None] = lambda step: None) -> Effects:
    """Of every assumption that has a range."""
    time, rate, inputs = [], [], mid.machine.inputs
    for key, figure in inputs.figures.items():
        if figure.low != figure.high and not key.startswith("price") and key not in ("run.available", "run.reserved"):
            low, high = (changed(mid, compiler, inputs.fixed(key, w), key) for w in ("low", "high"))
            time.append(Effect(key, figure, low.per_token, high.per_token))
            rate.append(Effect(key, figure, low.per_node, high.per_node))
            on_step(key)
    return Effects(tuple(time), tuple(rate))


def document(name: str, plan: Serving, found: Effects) -> dict[str, Any]:
    """As JSON."""
    times = plan.times
    low, high = spread(plan.per_token, found.time)
    least, most = spread(plan.per_node, found.rate)
    return {
        "source": name,
        "mode": plan.mode,
        "cluster": plan.machine.inputs.cluster.name,
        "mesh": plan.mesh.record(),
        "sequences_of_a_rank": 2 * plan.micro,
        "tokens": plan.tokens,
        "accepted": plan.accepted,
        "slots": plan.slots,
        "seconds": {"mid": plan.per_token, "low": low, "high": high},
        "run_seconds": plan.time,
        "bound_seconds": plan.bound,
        "tokens_per_second_of_a_node": {"mid": plan.per_node, "low": least, "high": most},
        "compute_seconds": times.computing + plan.proposing,
        "communication_seconds": times.communicating,
        "exposed_seconds": times.exposed,
        "hidden": times.hidden,
        "memory": dict(plan.memory),
        "assumptions": [
            {
                "key": e.key,
                **{k: getattr(e.figure, k) for k in ("low", "mid", "high", "unit", "provenance", "source")},
                "seconds": [e.low, e.high],
                "tokens_per_second_of_a_node": [r.low, r.high],
            }
            for e, r in zip(found.time, found.rate, strict=True)
        ],
    }


def describe(name: str, plan: Serving, found: Effects) -> str:
    """The report."""
    times, mesh, cluster = plan.times, plan.mesh, plan.machine.inputs.cluster
    prefill = plan.mode == "prefill"
    seconds = [spoken(t, "s") for t in (plan.per_token, *spread(plan.per_token, found.time))]
    rates = [count(r) for r in (plan.per_node, *spread(plan.per_node, found.rate))]
    ranges = [f" ({low} to {high})" if found.time else "" for _, low, high in (seconds, rates)]
    memory = plan.memory
    lines = [
        f"{name} on {mesh.world:,} {cluster.name}, {plan.mode}: {mesh}, two micro-batches of {plural(plan.micro, 'sequence')} "
        f"on each rank along dp, {plan.tokens:,} tokens {'' if prefill else 'of context '}each",
        "",
        f"{'prompts read in' if prefill else 'TPOT':<15} {seconds[0]}{ranges[0]}; bound by the exchanges: {spoken(plan.bound, 's')}",
        f"{'throughput':<15} {rates[0]}{ranges[1]} tokens/s on a node of {mesh.node}",
        f"{'streams':<15} computation {spoken(times.computing, 's')}, communication {spoken(times.communicating, 's')}, "
        f"of which {spoken(times.exposed, 's')} shows ({times.hidden:.1%} hidden)",
        f"{'memory':<15} {size(sum(memory.values()))} of {size(plan.machine.capacity)}: "
        + ", ".join(f"{size(v)} {k}" for k, v in memory.items()),
    ]
    if plan.slots is not None:
        lines.append(f"{'experts':<15} {plan.slots} slots on {mesh.ep} ranks")
    if plan.accepted is not None:
        lines.append(
            f"{'speculation':<15} {plan.made:.3f} tokens of a sequence in a step of {spoken(plan.time, 's')}, "
            f"{spoken(plan.proposing, 's')} of it the MTP module's projection and head"
        )
    return "\n".join([*lines, "", _table(plan, found)] if found.time else lines)


def _table(plan: Serving, found: Effects) -> str:
    """Every assumption with its range, and what its ends do to time and to throughput, the strongest first."""
    rows = []
    for e, r in sorted(zip(found.time, found.rate, strict=True), key=lambda both: -both[1].swing()):
        values = [spoken(v, e.figure.unit) for v in (e.figure.low, e.figure.mid, e.figure.high)]
        time, rate = (f"{x.low / mid - 1:+.1%} {x.high / mid - 1:+.1%}" for x, mid in ((e, plan.per_token), (r, plan.per_node)))
        rows.append([e.key, *values, time, rate, e.figure.provenance])
    return table(("assumption", "low", "mid", "high", "time, at low and high", "tokens/s", "known as"), rows)
