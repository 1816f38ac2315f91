"""Every op has samples, wrong calls, a reference and an error bound; it returns what its type rule says, and survives its text."""

from __future__ import annotations

import numpy as np
import pytest

import dsc.ir.ops  # noqa: F401 - fills OPS
from dsc import DscError, backends
from dsc.backends.arrays import describe, fits
from dsc.backends.numpy_ref.run import REFERENCES
from dsc.ir.core import OPS
from dsc.ir.ops.fused import NAMED
from dsc.ir.parser import parse
from dsc.ir.verify import verify
from dsc.testing.bounds import ERRORS, EXACT, bound
from dsc.testing.samples import SAMPLES
from dsc.testing.sampling import Sample, WrongCall, seeded
from dsc.testing.wrong_calls import CANNOT_FAIL, WRONG_CALLS

RUN_BY_THE_INTERPRETER = {"param", "constant", "call", "fused"}
"""They need the module, so no single function computes them."""

FLOAT32_ONLY = {"route", "route_backward", "balance_loss", "balance_loss_backward"}
"""The gate and its losses compute in float32 whatever the model's type."""

every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)


def test_every_op_has_a_reference() -> None:
    assert OPS.keys() - {cls.name for cls in REFERENCES} == RUN_BY_THE_INTERPRETER


def test_every_op_has_samples_of_several_kinds() -> None:
    assert OPS.keys() == {s.cls.name for s in SAMPLES}
    computes_floats = {s.cls.name for s in SAMPLES if s.cls in ERRORS} - FLOAT32_ONLY
    with_bf16 = {s.cls.name for s in SAMPLES if any("bf16" in str(r.type) for r in (*s.op().operands, *s.op().results))}
    assert computes_floats - with_bf16 == {"scaled_matmul", "grouped_scaled_matmul"} - with_bf16
    names = [s.name for s in SAMPLES]
    assert len(set(names)) == len(names), "a sample stands twice in the table"


def test_every_op_has_an_error_bound() -> None:
    run_ops = {"call", "fused", "internode_combine", *(cls.name for cls in NAMED)}
    by_hand = {"route", *run_ops}  # route permits experts to differ
    assert OPS.keys() - {cls.name for cls in (*ERRORS, *EXACT)} == by_hand


def test_every_type_rule_refuses_something() -> None:
    assert OPS.keys() - {w.cls.name for w in WRONG_CALLS} == CANNOT_FAIL.keys()


@pytest.mark.parametrize("call", WRONG_CALLS, ids=lambda w: w.name)
def test_a_wrong_call_is_told_what_is_wrong(call: WrongCall) -> None:
    with pytest.raises(DscError) as error:
        call.make()
    assert str(error.value) == call.message


@every_sample
@pytest.mark.parametrize("backend", ["numpy", "numpy-f64"])
def test_the_reference_returns_what_the_type_rule_says(sample: Sample, backend: str) -> None:
    module, arrays = verify(sample.module()), sample.arrays()
    untouched = [np.array(x) for x in arrays if isinstance(x, np.ndarray)]
    results = backends.get(backend).run(module, seeded, arrays)
    for value, result in zip(module.main.results, results, strict=True):
        assert fits(result, value.type), f"expected {value.type}, found {describe(result)}"
    for before, after in zip(untouched, (x for x in arrays if isinstance(x, np.ndarray)), strict=True):
        np.testing.assert_array_equal(before, after, err_msg="an operand was written to")


@every_sample
def test_a_sample_survives_its_text(sample: Sample) -> None:
    module = sample.module()
    text = str(module)
    assert parse(text) == module
    assert str(parse(text)) == text


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.cls.name not in RUN_BY_THE_INTERPRETER], ids=lambda s: s.name)
def test_float32_and_float64_differ_by_no_more_than_the_bound(sample: Sample) -> None:
    for seed in range(3):
        op, arrays = sample.op(), sample.arrays(seed)
        found, expected = (flat(backends.get(name).evaluate(op, arrays)) for name in ("numpy", "numpy-f64"))
        for limit, a, b in zip(bound(op, arrays, found), found, expected, strict=True):
            x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
            with np.errstate(invalid="ignore"):
                fine = (x == y) | (np.isnan(x) & np.isnan(y)) | (np.abs(x - y) <= limit)
            assert fine.all(), f"{x[~fine][:3]} against {y[~fine][:3]}, permitted {np.broadcast_to(limit, x.shape)[~fine][:3]}"


def flat(values: tuple) -> list[np.ndarray]:
    return [x for v in values for x in (flat(v) if isinstance(v, tuple) else [v])]
