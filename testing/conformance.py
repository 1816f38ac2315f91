"""The conformance suite of a backend: every op, whole models and bad input, against `numpy_ref`, within derived bounds.

For a test file of any package:

    from dsc.testing.conformance import Conformance

    class TestMine(Conformance):
        backend = "mine"

`pytest` then runs each sample of each op (`testing/samples.py`) and small models, and ends with a summary: how many ops passed, the largest
difference as a share of its bound, and every op that the backend `declines`, with its reason. Without pytest `check_sample` and
`check_model` do the same, one at a time.

A sample passes when each result lies as near the reference's as two correct implementations can (`testing/bounds.py`): bit for bit where
an op only moves or rounds. In a model each op is handed the reference's operands, so it answers for its own error only; and the results
of the whole are the reference's to the bit once every op's are put in its place: then all is wired as the program says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest

from .. import backends
from ..backends import Runner, Site, Weights
from ..backends.arrays import Array, Data, describe, fits
from ..ir.core import OPS, Builder, Module, Op
from ..ir.errors import DscError
from ..ir.ops.control import Constant, Param
from ..ir.ops.linalg import Matmul
from ..ir.printer import print_op
from ..ir.types import DType, Tensor
from .agree import share_of_bound
from .answers import answer, leaves
from .bounds import bound
from .samples import SAMPLES
from .sampling import Sample, draw, integers, normal, seeded
from .wrong_calls import WRONG_CALLS

MODELS: dict[str, dict[str, Any]] = {
    "forward": {"model": "deepseek-v3-tiny", "seq": 16},
    "forward-fp8": {"model": "deepseek-v3-tiny", "seq": 16, "passes": "simplify,quantize-fp8,simplify"},
    "decode": {"model": "deepseek-v3-tiny", "mode": "decode", "context": 16},
    "train": {"model": "deepseek-v3-tiny", "mode": "train", "seq": 8, "passes": "autodiff,simplify"},
    "train-fp8": {"model": "deepseek-v3-tiny", "mode": "train", "seq": 8, "passes": "autodiff,simplify,quantize-fp8,simplify"},
}
"""The models of the suite, by name: what `dsc.trace` is given, and the passes that follow."""


class Declined(Exception):
    """The backend says that it cannot run this, and why."""


class Disagreement(AssertionError):
    """The backend gives something else than the reference, by more than is permitted."""


@dataclass
class Tally:
    """What was found of one backend."""

    name: str
    ops: dict[str, float] = field(default_factory=dict)
    """By op the largest difference as a share of its bound, over what passed; 0 is equal to the bit."""
    samples: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    declined: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By op the reasons."""
    models: dict[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        """Text of a few lines: what passed, what failed, what is missing."""
        every = sorted({*self.samples, *self.failed, *self.declined})
        passed = [op for op in every if op not in self.failed and op in self.samples]
        lines = [f"{len(passed)} of {len(every)} ops pass, {sum(self.samples.values())} samples; {len(OPS)} ops in all"]
        if self.ops:
            op, worst = max(self.ops.items(), key=lambda item: item[1])
            exact = sum(share == 0 for share in self.ops.values())
            lines.append(f"{exact} ops are equal to the bit; the largest difference is {worst:.2f} of its bound ({op})")
        lines += [f"fails: {op} ({count} samples)" for op, count in sorted(self.failed.items())]
        lines += [f"declines: {op}: {reason}" for op, reasons in sorted(self.declined.items()) for reason in sorted(reasons)]
        lines += [f"model {name}: each op within {share:.2f} of its bound" for name, share in self.models.items()]
        return "\n".join(lines)


def check_sample(runner: Runner, sample: Sample, seed: int = 0) -> float:
    """The largest difference from the reference as a share of its bound.

    The op runs in a module of its own and, where it needs no module, by `evaluate`. Raises `Declined`, or `Disagreement` where a result
    is of another type, an operand was written to, or the difference exceeds the bound.
    """
    if reason := backends.declines(runner, sample.op()):
        raise Declined(reason)
    asked = answer(sample, seed)
    before = [x.tobytes() for x in leaves(asked.operands)]
    found = [runner.run(asked.module, seeded, asked.operands)]
    if not asked.needs_module:
        found.append(runner.evaluate(asked.op, asked.operands))
    if before != [x.tobytes() for x in leaves(asked.operands)]:
        raise Disagreement(f"an operand was written to\n  {print_op(asked.op)}")
    return max(_compare(asked.op, each, asked.results, asked.bounds) for each in found)


def _compare(op: Op, found: Sequence[Data], expected: Sequence[Data], limits: Sequence[Any]) -> float:
    """The largest share of its bound; `Disagreement` where that is above 1."""
    for value, result in zip(op.results, found, strict=True):
        if not fits(result, value.type):
            raise Disagreement(f"gives {describe(result)}, expected {value.type}\n  {print_op(op)}")
    worst = 0.0
    for index, (limit, a, b) in enumerate(zip(limits, leaves(expected), leaves(found), strict=True)):
        if a.shape != b.shape:
            raise Disagreement(f"result {index} has shape {list(b.shape)}, expected {list(a.shape)}\n  {print_op(op)}")
        share = share_of_bound(a, b, limit)
        if share.size and share.max() > 1:
            at = np.unravel_index(int(share.argmax()), share.shape)
            raise Disagreement(
                f"{int((share > 1).sum())} of {share.size} elements are beyond the bound\n  {print_op(op)}\n  worst at result {index}"
                f"[{', '.join(map(str, at))}]: found {b[at]!s}, expected {a[at]!s}, permitted difference "
                f"{np.broadcast_to(limit, share.shape)[at]:g}"
            )
        worst = max(worst, float(share.max(initial=0.0)))
    return worst


def check_model(runner: Runner, module: Module, weights: Weights, inputs: Sequence[Data]) -> float:
    """The largest difference of one op from the reference as a share of its bound, each op on the reference's operands.

    Raises `Disagreement` that names the first op beyond its bound; or where the results of the whole are not the reference's to the bit
    once every op's are put in its place; or where an observer that only looks on changes what comes out.
    """
    reference: dict[str, tuple[Data, ...]] = {}
    worst = 0.0

    def record(site: Site, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...]) -> None:
        reference[str(site)] = results

    def put(site: Site, op: Op, operands: tuple[Data, ...], results: tuple[Data, ...]) -> tuple[Data, ...]:
        nonlocal worst
        if str(site) not in reference:
            raise Disagreement(f"runs {site}, which the program does not")
        expected = reference[str(site)]
        if not isinstance(op, Param | Constant):
            try:
                worst = max(worst, _compare(op, results, expected, bound(op, operands, expected, module=module)))
            except Disagreement as error:
                raise Disagreement(f"{site}: {error}") from None
        return expected

    expected = backends.get("numpy").run(module, weights, inputs, record)
    _same(module, runner.run(module, weights, inputs, put), expected, "with each op's results replaced by the reference's")
    seen = runner.run(module, weights, inputs, lambda *_: None)
    _same(module, runner.run(module, weights, inputs), seen, "without an observer")
    return worst


def _same(module: Module, found: Sequence[Data], expected: Sequence[Data], when: str) -> None:
    for value, a, b in zip(module.main.results, found, expected, strict=True):
        if [x.tobytes() for x in leaves((a,))] != [x.tobytes() for x in leaves((b,))]:
            raise Disagreement(f"result %{value.name} has other bits {when}")


@cache
def model(name: str) -> tuple[Module, Weights, tuple[Data, ...]]:
    """A model of `MODELS` with random weights and inputs."""
    from ..models.checkpoint import open_weights
    from ..models.trace import trace
    from ..models.weights import Wanted
    from ..passes.manager import apply

    given = dict(MODELS[name])
    passes = given.pop("passes", "simplify")
    module = apply(trace(given.pop("model"), **given), passes)
    source, rng = open_weights("random:0"), np.random.default_rng(0)

    def weights(name: str, type: Tensor) -> Array:
        return source.get(Wanted.of(name, type))

    few = integers(0, 8)  # tokens, labels and positions alike
    inputs = tuple(draw(p.tensor, normal if p.dtype.is_float else few, rng) for p in module.main.params)
    return module, weights, inputs


WRONG_RUNS: dict[str, tuple[tuple[Array, ...], Array]] = {
    "too few inputs": ((), np.zeros((3, 2), np.float32)),
    "too many inputs": ((np.zeros((4, 2), np.float32),) * 2, np.zeros((3, 2), np.float32)),
    "an input of another dtype": ((np.zeros((4, 2)),), np.zeros((3, 2), np.float32)),
    "an input of another shape": ((np.zeros((2, 4), np.float32),), np.zeros((3, 2), np.float32)),
    "a weight of another dtype": ((np.zeros((4, 2), np.float32),), np.zeros((3, 2), np.int32)),
    "a weight of another shape": ((np.zeros((4, 2), np.float32),), np.zeros((2, 3), np.float32)),
}
"""Inputs and a weight that do not fit `linear`."""


def linear() -> Module:
    """x[4, 2] times a weight [3, 2], transposed."""
    b = Builder("main", component="main")
    w = b.emit(Param("w", (Tensor(DType.f32, (3, 2)),))).result
    return Module((b.finish(b.emit(Matmul(b.param("x", Tensor(DType.f32, (4, 2))), w, transpose_b=True)).results),))


class Conformance:
    """The suite as a base class for pytest. A class that derives from it names a backend, and may narrow what is run."""

    backend: ClassVar[str | Runner] = "numpy-f64"
    """A name that `dsc.backends` knows, or the `Runner` itself."""
    seeds: ClassVar[int] = 1
    """How often each sample is drawn, each time with other numbers."""
    models: ClassVar[tuple[str, ...]] = tuple(MODELS)
    """Which of `MODELS` are run."""

    @pytest.fixture
    def runner(self) -> Runner:
        return backends.get(self.backend) if isinstance(self.backend, str) else self.backend

    @pytest.fixture
    def tally(self, request: pytest.FixtureRequest) -> Tally:
        """Counts what passes, for all tests of the class; pytest prints it at the end."""
        if type(self) not in _TALLIES:
            _TALLIES[type(self)] = Tally(type(self).__name__)
            request.config.pluginmanager.register(_Summary(_TALLIES[type(self)]))
        return _TALLIES[type(self)]

    @pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
    def test_op(self, runner: Runner, tally: Tally, sample: Sample) -> None:
        op = sample.cls.name
        try:
            worst = max(check_sample(runner, sample, seed) for seed in range(self.seeds))
        except Declined as reason:
            tally.declined[op].add(str(reason))
            pytest.skip(f"declined: {reason}")
        except BaseException:
            tally.failed[op] += 1
            raise
        tally.samples[op] += 1
        tally.ops[op] = max(worst, tally.ops.get(op, 0.0))

    @pytest.mark.parametrize("name", MODELS)
    def test_model(self, runner: Runner, tally: Tally, name: str) -> None:
        if name not in self.models:
            pytest.skip("not among the models of this class")
        module, weights, inputs = model(name)
        if reasons := sorted({reason for func in module.funcs for op in func.ops if (reason := backends.declines(runner, op))}):
            pytest.skip(f"declined: {'; '.join(reasons)}")
        tally.models[name] = check_model(runner, module, weights, inputs)

    @pytest.mark.parametrize("what", WRONG_RUNS)
    def test_wrong_input_is_refused(self, runner: Runner, what: str) -> None:
        """As a `DscError`, whose message a user reads."""
        inputs, weight = WRONG_RUNS[what]
        with pytest.raises(DscError):
            runner.run(linear(), lambda name, type: weight, inputs)

    def test_what_needs_a_module_is_refused_without(self, runner: Runner) -> None:
        for op in (Param("w", (Tensor(DType.f32, (2,)),)), Constant("c", (Tensor(DType.f32, (2,)),))):
            with pytest.raises(DscError):
                runner.evaluate(op, ())

    def test_wrong_calls_are_refused_before(self) -> None:
        """No backend sees an ill-typed op: constructing it raises, with the whole of its message."""
        for call in WRONG_CALLS:
            with pytest.raises(DscError) as error:
                call.make()
            assert str(error.value) == call.message


_TALLIES: dict[type, Tally] = {}


class _Summary:
    """A plugin of one hook."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"conformance: {self.tally.name}")
        terminalreporter.write_line(self.tally.summary())
