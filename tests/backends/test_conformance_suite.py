"""The conformance suite catches a backend that is wrong: in one op, in its types, in how a program is put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dsc.backends.arrays import STORAGE
from dsc.backends.eager import Compute
from dsc.backends.numpy_ref.run import FLOAT32, Interpreter
from dsc.ir.core import Op
from dsc.ir.parser import parse
from dsc.ir.types import DType
from dsc.testing.conformance import Declined, Disagreement, Tally, check_model, check_sample
from dsc.testing.samples import SAMPLES
from dsc.testing.sampling import Sample, seeded


class Faulty(Interpreter):
    """The reference but for what `fault` makes of an op, its operands and its results."""

    def __init__(self, fault: Callable[[Op, tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]]) -> None:
        super().__init__(STORAGE[DType.f32])
        object.__setattr__(self, "fault", fault)

    def prepare(self, op: Op) -> Compute:
        computed = super().prepare(op)
        return lambda operands: self.fault(op, operands, computed(operands))  # type: ignore[attr-defined]


def of(name: str, contains: str = "") -> Sample:
    return next(s for s in SAMPLES if s.cls.name == name and contains in s.name)


@pytest.mark.parametrize("sample", [of("matmul", "bf16"), of("quantize"), of("dispatch"), of("call"), of("param")], ids=lambda s: s.name)
def test_the_reference_agrees_with_itself(sample: Sample) -> None:
    assert check_sample(FLOAT32, sample) == 0


def test_one_unit_in_the_last_place_of_an_exact_op_is_found() -> None:
    def fault(op: Op, operands: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Any, ...]:
        codes = results[0].copy()
        codes.view(np.uint8)[1, 2, 150] ^= 1
        return codes, *results[1:]

    with pytest.raises(Disagreement, match=r"1 of 1200 elements .*\n.*quantize.*\n  worst at result 0\[1, 2, 150\]: found .* difference 0"):
        check_sample(Faulty(fault), of("quantize", "f32[2, 3, 200]"))


def test_a_sum_that_leaves_out_a_term_is_found() -> None:
    def fault(op: Op, operands: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Any, ...]:
        return FLOAT32.compute(op, (operands[0][..., :-1], operands[1][..., :-1, :]))

    with pytest.raises(Disagreement, match="are beyond the bound"):
        check_sample(Faulty(fault), of("matmul", "bf16[2, 1, 5, 131]"))


def test_an_operand_that_is_written_to_is_found() -> None:
    def fault(op: Op, operands: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Any, ...]:
        operands[0][...] = 0
        return results

    with pytest.raises(Disagreement, match="an operand was written to"):
        check_sample(Faulty(fault), of("relu"))


def test_another_type_is_found() -> None:
    def fault(op: Op, operands: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Any, ...]:
        return (results[0].astype(np.float64),)

    with pytest.raises(Disagreement, match=r"gives f64\[2, 1, 131\], expected f32\[2, 1, 131\]"):
        check_sample(Faulty(fault), of("relu"))


def test_what_is_declined_is_said() -> None:
    class Small(Interpreter):
        def declines(self, op: Op) -> str:
            return "no transcendental functions" if op.name == "exp" else ""

    with pytest.raises(Declined, match="no transcendental functions"):
        check_sample(Small(STORAGE[DType.f32]), of("exp"))


PROGRAM = parse("""module { stage=traced }
func @main(%x: f32[4, 8]) {
  %a: f32[4, 8] = call(@layer, [%x], weights="layers.0")
  %b: f32[4, 8] = call(@layer, [%a], weights="layers.1")
  return %b
}
func @layer(%x: f32[4, 8]) {
  %w: f32[8, 8] = param("w")  @ layer#1 F
  %y: f32[4, 8] = matmul(%x, %w)  @ layer#2 F
  return %y
}
""")
X = (np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32),)


def test_a_model_of_the_reference() -> None:
    assert check_model(FLOAT32, PROGRAM, seeded, X) == 0


def test_an_op_in_a_model_is_named() -> None:
    def fault(op: Op, operands: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Any, ...]:
        return (results[0] * 1.0001,) if op.name == "matmul" else results

    with pytest.raises(Disagreement, match=r"^@layer \(layers\.0\) layer#2: 32 of 32 elements are beyond the bound"):
        check_model(Faulty(fault), PROGRAM, seeded, X)


class Wrong:
    """A backend whose ops are right."""

    evaluate = FLOAT32.evaluate


def test_a_backend_that_ignores_observers_is_found() -> None:
    near = Faulty(lambda op, operands, results: (np.nextafter(results[0], np.float32(9)),) if op.name == "matmul" else results)

    class Ignores(Wrong):
        def run(self, module: Any, weights: Any, inputs: Any, observe: Any = None) -> Any:
            return near.run(module, weights, inputs)

    with pytest.raises(Disagreement, match="result %b has other bits with each op's results replaced by the reference's"):
        check_model(Ignores(), PROGRAM, seeded, X)


def test_a_backend_that_unobserved_gives_every_layer_the_same_weights_is_found() -> None:
    class Same(Wrong):
        def run(self, module: Any, weights: Any, inputs: Any, observe: Any = None) -> Any:
            return FLOAT32.run(module, weights if observe else lambda name, type: weights("layers.0.w", type), inputs, observe)

    with pytest.raises(Disagreement, match="result %b has other bits without an observer"):
        check_model(Same(), PROGRAM, seeded, X)


def test_the_summary() -> None:
    tally = Tally("T")
    tally.samples |= {"exp": 3, "log": 2}
    tally.ops |= {"exp": 0.25, "log": 0.0}
    tally.failed["log"] += 1
    tally.declined["route"] |= {"no gate"}
    tally.models["forward"] = 0.5
    assert tally.summary().splitlines()[0].startswith("1 of 3 ops pass, 5 samples; ")
    assert tally.summary().splitlines()[1:] == [
        "1 ops are equal to the bit; the largest difference is 0.25 of its bound (exp)",
        "fails: log (1 samples)",
        "declines: route: no gate",
        "model forward: each op within 0.50 of its bound",
    ]


@pytest.mark.slow
def test_three_lines_in_another_package(tmp_path: Any) -> None:
    """As another package has it, in a process of its own: its backend has no log_softmax and gets neg wrong."""
    import subprocess
    import sys

    (tmp_path / "test_mine.py").write_text("""
from dsc.backends.eager import Compute
from dsc.backends.numpy_ref.run import FLOAT32
from dsc.testing.conformance import Conformance

class Mine:
    run = FLOAT32.run
    def evaluate(self, op, operands):
        found = FLOAT32.evaluate(op, operands)
        return tuple(-x for x in found) if op.name == "neg" else found
    def declines(self, op):
        return "no logarithm" if op.name == "log_softmax" else ""

class TestMine(Conformance):
    backend = Mine()
""")
    given = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "neg or log_softmax", "--tb=no", str(tmp_path)]
    done = subprocess.run(given, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "conformance: TestMine" in done.stdout
    assert "0 of 2 ops pass, 0 samples" in done.stdout
    assert "fails: neg (" in done.stdout
    assert "declines: log_softmax: no logarithm" in done.stdout
