"""What the tests of ONNX share: two runtimes that nobody here wrote, onnx.reference and ONNX Runtime, as functions of arrays.

Python's side of ONNX Runtime takes neither BF16 nor FP8, so a model is given float32 inputs and results that it casts: exact both ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import dsc
from dsc.backends.onnx.export import export
from dsc.ir.core import Module
from dsc.ir.walk import weights

onnxruntime.set_default_logger_severity(4)
NARROW = {TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E8M0}
OUTSIDE = " in float32"

Run = Callable[[onnx.ModelProto, Sequence[np.ndarray]], list[np.ndarray]]


def bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float32 for every narrow input and result."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    before, behind = [], []
    for value in (*graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type not in NARROW:
            continue
        inside, outside = value.name, value.name + OUTSIDE
        if value in graph.input:
            keep = {} if tensor.elem_type == TensorProto.BFLOAT16 else {"saturate": 0}
            before.append(helper.make_node("Cast", [outside], [inside], to=tensor.elem_type, **keep))
        else:
            behind.append(helper.make_node("Cast", [inside], [outside], to=TensorProto.FLOAT))
        value.name, tensor.elem_type = outside, TensorProto.FLOAT
    nodes = [*before, *graph.node, *behind]
    del graph.node[:]
    graph.node.extend(nodes)
    return found


def feeds(model: onnx.ModelProto, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    pairs = zip(model.graph.input, arrays, strict=True)
    return {value.name: array if array.dtype.isbuiltin == 1 else array.astype(np.float32) for value, array in pairs}


def by_reference(model: onnx.ModelProto, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    made = bare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow in casts and the like, which NumPy says and ONNX means
        return list(ReferenceEvaluator(made).run(None, feeds(made, arrays)))


def by_ort(model: onnx.ModelProto, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    made = bare(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds(made, arrays)))


RUNTIMES: dict[str, Run] = {"onnx.reference": by_reference, "ONNX Runtime": by_ort}


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def runtimes() -> dict[str, Run]:
    return RUNTIMES


@pytest.fixture
def proto() -> Callable[..., onnx.ModelProto]:
    """`proto(module, profile, ...)`: the exported model, checked in full."""

    def make(module: Module, profile: str = "standard", **options: object) -> onnx.ModelProto:
        model = onnx_ir.serde.serialize_model(export(module, profile, **options))
        onnx.checker.check_model(model, full_check=True)
        return model

    return make


@pytest.fixture
def flat() -> Callable[..., list[np.ndarray]]:
    """The arrays of results, those in bundles too."""

    def arrays(values: Sequence) -> list[np.ndarray]:
        return [x for v in values for x in (arrays(v) if isinstance(v, tuple) else [v])]

    return arrays


@pytest.fixture
def fetched() -> Callable[..., list[np.ndarray]]:
    """The arrays of every weight that a module reads, in the order in which an export takes them."""
    return lambda module, fetch: [fetch(name, tensor) for name, tensor in weights(module).items()]


@cache
def traced(mode: str, seq: int, overrides: tuple[str, ...], passes: str) -> Module:
    size = {"context": seq} if mode == "decode" else {"seq": seq}
    module = dsc.trace("deepseek-v3-tiny", mode=mode, overrides=overrides, **size)
    return dsc.apply(module, passes) if passes else module


@pytest.fixture
def tiny() -> Callable[..., Module]:
    """`tiny(mode, passes)`: a tiny model, traced once."""
    return lambda mode="forward", passes="", seq=16, overrides=(): traced(mode, seq, overrides, passes)
