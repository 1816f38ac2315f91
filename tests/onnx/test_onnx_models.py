"""Tiny models as ONNX in every profile and both runtimes; and each of their ops alone, on the reference's operands, within its bound."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir
import pytest
from onnx import helper

from dsc import backends
from dsc.backends import Site
from dsc.backends.onnx.export import OPSET, OPSETS, PROFILES, Stored, export
from dsc.driver.inputs import prepare
from dsc.driver.run import open_weights
from dsc.ir.core import Op
from dsc.ir.ops.control import Pack, Param, Unpack
from dsc.ir.ops.fused import alone
from dsc.ir.types import Tensor
from dsc.ir.walk import join
from dsc.testing.agree import share_of_bound
from dsc.testing.bounds import bound

DOMAINS = {"standard": {"ai.dsc"}, "ort": {""}, "compact": {"ai.dsc.model", "ai.dsc"}}
FP8 = "quantize-fp8{recipe=deepseek-v3}"
PROGRAMS: dict[str, dict[str, Any]] = {
    "forward in BF16": {},
    "forward in float32": {"overrides": ("torch_dtype=float32",)},
    "decoding": {"mode": "decode"},
    "forward in FP8": {"passes": FP8},
    "training, forward": {"mode": "train"},
}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The L2 norm of the difference, relative to that of `expected`."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_tiny_model_runs_end_to_end(
    program: str,
    profile: str,
    tiny: Any,
    proto: Any,
    runtimes: Any,
    flat: Any,
    fetched: Any,
) -> None:
    module = tiny(**PROGRAMS[program])
    fetch, inputs = open_weights("random:1", module, None), prepare(module, None)
    expected = flat(backends.get("numpy").run(module, fetch, inputs))
    assert all(np.linalg.norm(np.asarray(x, np.float64)) > 0 for x in expected[:1])
    model = proto(module, profile)
    assert {node.domain for node in model.graph.node} <= {"standard": {"ai.dsc"}, "ort": {""}, "compact": {"ai.dsc.model", "ai.dsc"}}[
        profile
    ]
    for name, run in runtimes.items():
        errors = [relative(a, b) for a, b in zip(run(model, [*inputs, *fetched(module, fetch)]), expected, strict=True)]
        print(f"{program}, {profile}, {name}: relative L2 {max(errors):.2g}")
        assert max(errors) <= 1e-2, f"{name}: {errors}"


@pytest.mark.parametrize("opset", [v for v in OPSETS if v != OPSET])
def test_other_opsets_compute_the_same(opset: int, tiny: Any, proto: Any, runtimes: Any, fetched: Any) -> None:
    module = tiny(passes=FP8)
    fetch, inputs = open_weights("random:1", module, None), prepare(module, None)
    (expected,) = backends.get("numpy").run(module, fetch, inputs)
    model = proto(module, "ort", opset=opset)
    assert {o.version for o in model.opset_import if not o.domain} == {opset}
    for run in runtimes.values():
        assert relative(run(model, [*inputs, *fetched(module, fetch)])[0], expected) <= 1e-2


def test_every_op_of_the_fp8_model_is_within_its_bound_on_the_references_operands(tiny: Any, proto: Any, runtimes: Any, flat: Any) -> None:
    module = tiny(passes=FP8)
    models: dict[str, onnx.ModelProto] = {}
    worst, ops = 0.0, 0

    def compare(site: Site, op: Op, operands: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        nonlocal worst, ops
        if isinstance(op, Param | Pack | Unpack) or not op.operands:
            return
        single = alone(op, module)
        text = str(single).replace(op.id, "op")
        given = list(dict(zip(op.operands, operands, strict=True)).values())
        if text not in models:
            models[text] = proto(single)
        found = runtimes["ONNX Runtime"](models[text], flat(given))
        for a, b, limit in zip(flat(results), found, bound(op, operands, results), strict=True):
            share = float(share_of_bound(a, b.astype(a.dtype), limit).max(initial=0.0))
            assert share <= 1, f"{site}: {op.name} is off by {share} times its bound"
            worst = max(worst, share)
        ops += 1

    backends.get("numpy").run(module, open_weights("random:1", module, None), prepare(module, None), compare)
    assert ops > 100
    assert 0 < worst <= 1


def test_the_fp8_model_in_ort_reports_rerounded_values_and_changed_experts(tiny: Any, runtimes: Any, fetched: Any) -> None:
    """Every value in between is made a result: how many round otherwise, and whether a token changes its experts."""
    module = tiny(passes=FP8, seq=64)
    fetch, inputs = open_weights("random:1", module, None), prepare(module, None)
    seen: dict[str, tuple[Op, Any]] = {}

    def note(site: Site, op: Op, operands: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        if len(results) >= 1 and not isinstance(results[0], tuple):
            seen[join(site.weights, site.op) + ("" if len(results) == 1 else ".0")] = op, results[0]

    (expected,) = backends.get("numpy").run(module, fetch, inputs, note)
    model = onnx_ir.serde.serialize_model(export(module, "ort"))
    typed = {v.name: v for v in model.graph.value_info}
    names = [name for name in seen if name in typed and name not in {v.name for v in model.graph.input}]
    for name in names:
        tensor = typed[name].type.tensor_type
        model.graph.output.append(helper.make_tensor_value_info(name, tensor.elem_type, [d.dim_value for d in tensor.shape.dim]))
    logits, *others = runtimes["ONNX Runtime"](model, [*inputs, *fetched(module, fetch)])
    assert len(names) > 100
    rerounded = values = experts = 0
    for name, found in zip(names, others, strict=True):
        op, array = seen[name]
        differ = np.asarray(found != np.asarray(array, found.dtype))
        if op.name == "route":
            experts += int(differ.any(-1).sum())
        elif array.dtype.itemsize < 4:
            rerounded, values = rerounded + int(differ.sum()), values + differ.size
    error = relative(logits, expected)
    print(f"{rerounded} of {values} values rounded otherwise, {experts} tokens with other experts, relative L2 {error:.2g}")
    assert 0 < rerounded < values / 10, "either nothing was compared, or the two do not compute the same"
    assert experts == 0
    assert error <= 1e-2


def test_what_is_named_can_be_followed_to_the_program(tiny: Any, proto: Any) -> None:
    module = tiny(passes=FP8)
    model = proto(module, metadata={"ai.dsc.passes": "quantize-fp8"})
    about = {p.key: p.value for p in model.metadata_props}
    assert about["ai.dsc.stage"] == "quantized"
    assert about["ai.dsc.passes"] == "quantize-fp8"
    ids = {op.id for func in module.funcs for op in func.ops}
    for node in model.graph.node:
        found = {p.key: p.value for p in node.metadata_props}
        assert found["ai.dsc.op"] in ids
        assert found["ai.dsc.phase"] == "F"
        assert found["ai.dsc.module"].startswith(("model.", "lm_head"))
    typed = {v.name for v in (*model.graph.value_info, *model.graph.output)}
    assert {name for node in model.graph.node for name in node.output} <= typed, "a value has no type, which inference does not find"


def test_compact_is_a_node_for_each_call_and_a_function_for_each_kind_of_layer(tiny: Any, proto: Any) -> None:
    module = tiny()
    model = proto(module, "compact")
    assert [n.op_type for n in model.graph.node] == [op.callee for op in module.main.ops]
    functions = {f.name for f in model.functions if f.domain == "ai.dsc.model"}
    assert functions == {f.name for f in module.funcs[1:]}


def each_expert_apart(name: str, tensor: Tensor) -> list[Stored]:
    """Weights in a file where each expert has a place of its own."""
    shape = tuple(d for d in tensor.shape if isinstance(d, int))
    count, each = (shape[0], shape[1:]) if ".experts." in name else (1, shape)
    size = tensor.bytes // count
    return [Stored(f"{name}.{i}", PurePosixPath("weights.bin"), i * size, size, each) for i in range(count)]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_expert_can_be_reached_from_the_results(profile: str, tiny: Any) -> None:
    module = tiny(passes=FP8)
    model = onnx_ir.serde.serialize_model(export(module, profile, place=each_expert_apart))
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    reached: set[str] = set()
    todo = [v.name for v in model.graph.output]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += list(makers[name].input) if name in makers else []
    experts = {i.name for i in model.graph.initializer if ".experts." in i.name}
    assert len(experts) == 2 * 3 * 16
    assert {i.name for i in model.graph.initializer} <= reached
