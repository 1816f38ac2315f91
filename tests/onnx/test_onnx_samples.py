"""Every op's samples, as ONNX, in both runtimes against the reference: bits where the bound is 0, else within the derived bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented

from dsc import DscError, backends
from dsc.backends.onnx import registry
from dsc.backends.onnx.export import OPAQUE
from dsc.backends.onnx.registry import GAPS, MAPPINGS, WRITTEN_BY_EXPORT, Mapping
from dsc.ir.core import OPS, Builder, Op
from dsc.ir.ops.control import Call
from dsc.ir.ops.elementwise import Cast, Remainder, Silu
from dsc.ir.ops.linalg import GroupedMatmul
from dsc.ir.ops.moe import Dispatch, Route
from dsc.ir.ops.quant import Quantize
from dsc.ir.ops.reduce import TopK
from dsc.ir.types import DType
from dsc.testing.agree import share_of_bound
from dsc.testing.bounds import bound
from dsc.testing.samples import SAMPLES, samples
from dsc.testing.sampling import Sample, seeded

ONLY_HERE = {
    ("onnx.reference", "erf(f64[3, 5])"): "computes erf of float64 in float32",
    ("ONNX Runtime", "erf(f64[3, 5])"): "has no erf of float64",
}
"""What a runtime cannot do though the model is right."""


def refusal(sample: Sample) -> str | None:
    """Why this sample has no mapping."""
    if sample.cls in GAPS:
        return GAPS[sample.cls].reason
    model = sample.attributes.get("accumulation")
    return (
        f"it accumulates as {model.arithmetic!r} says, bit by bit, which no op of ONNX does"
        if model and model.arithmetic != "float32"
        else None
    )


MAPPED = [s for s in SAMPLES if not refusal(s)]
REFUSED = [s for s in SAMPLES if refusal(s)]


def disagreement(sample: Sample, model: onnx.ModelProto, run: Any, flat: Any, fetched: Any) -> float:
    """The largest difference from the reference as a share of its bound."""
    module, arrays = sample.module(), sample.arrays()
    expected = backends.get("numpy").run(module, seeded, arrays)
    op = module.main.ops[0]
    limits = (0.0,) if isinstance(op, Call) else bound(op, arrays, expected, module=module)
    worst = 0.0
    for a, b, limit in zip(flat(expected), run(model, [*flat(arrays), *fetched(module, seeded)]), limits, strict=True):
        assert b.shape == a.shape
        same_type = b if b.dtype == a.dtype else b.astype(a.dtype)
        assert np.array_equal(same_type.astype(b.dtype), b, equal_nan=b.dtype.kind == "f"), "a result is not on the grid of its type"
        worst = max(worst, float(share_of_bound(a, same_type, limit).max(initial=0.0)))
    return worst


@pytest.mark.parametrize("sample", MAPPED, ids=lambda s: s.name)
def test_a_sample_runs_alike_in_both_runtimes(sample: Sample, proto: Any, runtimes: Any, flat: Any, fetched: Any) -> None:
    model = proto(sample.module())
    for name, run in runtimes.items():
        if (name, sample.name) not in ONLY_HERE:
            assert disagreement(sample, model, run, flat, fetched) <= 1, name


@pytest.mark.parametrize(("name", "sample"), ONLY_HERE, ids=" ".join)
def test_what_a_runtime_cannot_do_it_still_cannot(name: str, sample: str, proto: Any, runtimes: Any, flat: Any, fetched: Any) -> None:
    (given,) = (s for s in SAMPLES if s.name == sample)
    try:
        share = disagreement(given, proto(given.module()), runtimes[name], flat, fetched)
    except NotImplemented:
        return
    assert share > 1, f"{name} can do it now: strike it from ONLY_HERE"


@pytest.mark.parametrize("sample", REFUSED, ids=lambda s: s.name)
def test_what_has_no_mapping_is_named_or_left_opaque(sample: Sample, proto: Any) -> None:
    with pytest.raises(DscError) as error:
        proto(sample.module())
    head, *lines = str(error.value).splitlines()
    assert "--opaque" in head
    assert any(line.startswith(f"  {sample.cls.name} (@sample main#") and line.endswith(refusal(sample)) for line in lines)
    *_, node = (n for n in proto(sample.module(), opaque=True).graph.node if n.op_type != "Identity")
    assert (node.domain, node.op_type) == (OPAQUE, sample.cls.name)
    assert {a.name for a in node.attribute} == {k for k, v in sample.op().attributes.items() if v is not None}


def test_every_op_is_written_or_its_absence_has_a_reason() -> None:
    def expands(cls: type[Op]) -> bool:
        b = Builder("probe")
        return samples(cls)[0].op().expand(b) is not None and not any(type(inner) in GAPS for inner in b.ops)

    written = {c.name for c in MAPPINGS} | set(WRITTEN_BY_EXPORT) | {c.name for c in OPS.values() if c not in MAPPINGS and expands(c)}
    missing = {c.name: gap.reason for c, gap in GAPS.items()}
    assert not written & missing.keys()
    assert written | missing.keys() == OPS.keys(), "an op has neither a mapping nor a reason in registry.GAPS"
    assert all(missing.values())


def test_an_op_is_mapped_once() -> None:
    with pytest.raises(TypeError, match="op 'cast' is written twice"):
        registry.onnx(Cast)(lambda g, op, x: x)


ORIGINAL = dict(MAPPINGS)


def higher_index_first(g: Any, op: TopK, x: Any) -> Any:
    """Equals by the higher index first."""
    values, indices = g.TopK(g.Slice(x, [-1], [-(2**31)], [op.axis], [-1]), [op.k], axis=op.axis, outputs=2)
    return values, g.Sub(np.int64(op.x.shape[op.axis] - 1), indices)


def weights_with_bias(g: Any, op: Route, logits: Any, bias: Any = None) -> Any:
    """Weights from the scores that experts were chosen by, bias included: the mistake that V3's gate invites."""
    scores = g.Sigmoid(logits) if bias is None else g.Add(g.Sigmoid(logits), bias)
    values, ids = g.TopK(scores, [op.top_k], axis=-1, outputs=2)
    return g.cast(ids, DType.i32), g.Mul(g.Div(values, g.sum(values, 1)), np.float32(op.scale))


def next_expert(g: Any, op: GroupedMatmul, x: Any, w: Any, counts: Any) -> Any:
    """The counts of the experts turned by one."""
    turned = np.roll(np.arange(op.counts.shape[0]), 1)
    return ORIGINAL[GroupedMatmul].function(g, op, x, w, g.Gather(counts, turned, axis=0))


def rows_turned(g: Any, op: Dispatch, *given: Any) -> Any:
    """Rows from the last to the first."""
    *rows, counts, handle = ORIGINAL[Dispatch].function(g, op, *given)
    return *(g.Slice(r, [-1], [-(2**31)], [0], [-1]) for r in rows), counts, handle


def with_exchanged(cls: type[Op], old: str, new: str) -> Callable[..., Any]:
    """The mapping of an op with one standard op exchanged for another."""

    class Other:
        def __init__(self, g: Any) -> None:
            self.g = g

        def __getattr__(self, name: str) -> Any:
            return getattr(self.g, new if name == old else name)

    return lambda g, op, *operands: ORIGINAL[cls].function(Other(g), op, *operands)


FAULTS: dict[str, tuple[type[Op], Callable[..., Any]]] = {
    "equals by higher index": (TopK, higher_index_first),
    "weights with the bias": (Route, weights_with_bias),
    "multiplied by the scale": (Quantize, with_exchanged(Quantize, "Div", "Mul")),
    "exp exchanged": (Silu, with_exchanged(Silu, "Exp", "Abs")),
    "the sign of a": (Remainder, lambda g, op, a, b: g.Mod(*g.same(op, a, b), fmod=1)),
    "rows of the next expert": (GroupedMatmul, next_expert),
    "rows turned": (Dispatch, rows_turned),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch, proto: Any, runtimes: Any, flat: Any, fetched: Any) -> None:
    cls, function = FAULTS[name]
    old = MAPPINGS[cls]
    monkeypatch.setitem(MAPPINGS, cls, Mapping(function, old.operands, old.stacks))
    found = []
    for sample in (s for s in samples(cls) if s.operands[0].type.dtype in (DType.f32, DType.bf16)):
        found.append(disagreement(sample, proto(sample.module()), runtimes["onnx.reference"], flat, fetched))
    assert max(found) > 1
