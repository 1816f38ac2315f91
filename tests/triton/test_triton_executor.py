"""Every op runs, a whole model runs, in one arena where nothing alive is overwritten; what users are told when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dsc import backends
from dsc.backends.arrays import STORAGE, rounded, widen
from dsc.backends.triton.memory import Lifetime, lower_bound
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.run import Executor
from dsc.backends.triton.targets import TARGETS
from dsc.backends.triton.torch_ops import TORCH
from dsc.driver.inputs import prepare
from dsc.driver.run import open_weights
from dsc.ir.core import OPS, Builder, Func, Module, Symbol
from dsc.ir.errors import DscError
from dsc.ir.ops.collective import AllToAllRows
from dsc.ir.ops.control import Call, Constant, Literal, Pack, Param, Unpack
from dsc.ir.ops.elementwise import Add, Mul
from dsc.ir.ops.fused import Fused
from dsc.ir.ops.internode import InternodeDispatch, InternodeRedispatch
from dsc.ir.ops.moe import DispatchGroups
from dsc.ir.ops.norm import RmsNorm, Rope
from dsc.ir.ops.shape import Broadcast, Gather, Reshape, Slice, Transpose
from dsc.ir.types import Bundle, DType, Tensor
from dsc.models.trace import trace
from dsc.passes.manager import parse_pipeline, run_pipeline
from dsc.testing import assert_backends_agree
from dsc.testing.bounds import bound
from dsc.testing.samples import SAMPLES
from dsc.testing.sampling import Sample, seeded

POISONED, NUMPY = Executor(poison=True), backends.get("numpy")
F32 = DType.f32


def flat(values: Any) -> Iterator[np.ndarray]:
    for value in values:
        yield from flat(value) if isinstance(value, tuple) else (value,)


RAGGED = (AllToAllRows, DispatchGroups, InternodeDispatch, InternodeRedispatch)
"""Ops that say how many rows there are."""


def test_every_op_has_a_torch_function() -> None:
    assert set(OPS.values()) - set(TORCH) == {Param, Constant, Call, Fused}
    assert set(TORCH) <= set(OPS.values())


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_every_sample_is_within_its_bound(sample: Sample) -> None:
    operands = sample.arrays()
    if sample.cls in (Param, Constant, Call, Fused):
        found, expected = (runner.run(sample.module(), seeded, operands) for runner in (POISONED, NUMPY))
        permitted: Any = [0.0] * len(expected)
    else:
        op = sample.op()
        found, expected = POISONED.evaluate(op, operands), NUMPY.evaluate(op, operands)
        permitted = bound(op, operands, expected)
    for a, b, limit in zip(flat(found), flat(expected), permitted, strict=True):
        assert a.dtype == b.dtype
        if sample.cls in (
            AllToAllRows,
            DispatchGroups,
            InternodeDispatch,
            InternodeRedispatch,
        ):  # a ragged value has its bound's rows here; the rest is zero, or no expert
            assert len(b) <= len(a)
            rest = a[len(b) :]
            assert not widen(rest).any() or bool((rest == -1).all())
            a = a[: len(b)]
        assert a.shape == b.shape
        x, y = (v.astype(np.float64) if v.dtype.kind in "iub" else widen(v, np.float64) for v in (a, b))
        with np.errstate(invalid="ignore"):
            assert ((x == y) | (np.isnan(x) & np.isnan(y)) | (np.abs(x - y) <= limit)).all()


@pytest.fixture(scope="module", params=["simplify", "simplify,quantize-fp8"])
def model(request: pytest.FixtureRequest) -> Module:
    return run_pipeline(trace("deepseek-v3-tiny", seq=16), parse_pipeline(request.param)).module


@pytest.mark.slow
def test_a_model_agrees_op_by_op(model: Module) -> None:
    assert_backends_agree(model, open_weights("random:0", model, None), prepare(model, None), ("numpy", "triton"))


@pytest.mark.slow
def test_a_model_reads_no_dead_memory(model: Module) -> None:
    """With every buffer overwritten after its last use the bits stay the same."""
    weights, inputs = open_weights("random:0", model, None), prepare(model, None)
    plain, poisoned = Executor().run(model, weights, inputs), POISONED.run(model, weights, inputs)
    for a, b in zip(plain, poisoned, strict=True):
        np.testing.assert_array_equal(a.view(f"u{a.dtype.itemsize}"), b.view(f"u{b.dtype.itemsize}"))


def test_the_arena_of_a_model_is_near_the_lower_bound(model: Module) -> None:
    plans: Any = {}
    plan_function(model, model.main, [layout_of(p.type) for p in model.main.params], TARGETS["sm_90"], plans)
    assert len(plans) == len(model.funcs)
    for plan in plans.values():
        lifetimes = [Lifetime(plan.buffers[i].bytes, plan.buffers[i].start, plan.buffers[i].stop) for i in plan.offsets]
        assert lower_bound(lifetimes) <= plan.bytes <= 1.1 * lower_bound(lifetimes)


def with_views_and_bundles() -> Module:
    """A called function returns a bundle of a view of its own buffer and of a view of its argument; the caller calls it twice."""
    inner = Builder("inner")
    x = inner.param("x", Tensor(F32, (4, 6)))
    w = inner.emit(Param("w", (Tensor(F32, (6,)),))).result
    normed = inner.emit(RmsNorm(x, w, 1e-6)).result
    turned = inner.emit(Transpose(normed, (1, 0))).result
    part = inner.emit(Slice(x, 1, 1, 5, 2)).result
    packed = inner.emit(Pack((turned, part))).result
    main = Builder("main")
    y = main.param("y", Tensor(F32, (4, 6)))
    bundle = Bundle((Tensor(F32, (6, 4)), Tensor(F32, (4, 2))))
    first = main.emit(Call("inner", (y,), (bundle,), "layers.0")).result
    a, b = main.emit(Unpack(first)).results
    back = main.emit(Reshape(main.emit(Transpose(a, (1, 0))).result, (4, 6))).result
    copied = main.emit(Reshape(a, (4, 6))).result  # a is a transposed view: this one moves elements
    second = main.emit(Call("inner", (main.emit(Add(back, copied)).result,), (bundle,), "layers.1")).result
    c, d = main.emit(Unpack(second)).results
    two = main.emit(Literal((2.0,), (), F32)).result
    results = [first, main.emit(Mul(c, two)).result, d, b, y]
    return Module((main.finish(results), inner.finish([packed])))


def test_calls_views_and_bundles() -> None:
    module = with_views_and_bundles()
    weights = {f"layers.{i}.w": np.random.default_rng(i).standard_normal(6).astype(np.float32) for i in range(2)}
    y = np.random.default_rng(5).standard_normal((4, 6)).astype(np.float32)
    fetched: list[str] = []

    def fetch(name: str, type: Tensor) -> np.ndarray:
        fetched.append(name)
        return weights[name]

    found, expected = (runner.run(module, fetch, (y,)) for runner in (POISONED, NUMPY))
    for a, b in zip(flat(found), flat(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert fetched == ["layers.0.w", "layers.1.w"] * 2


def test_a_read_only_weight_is_left_alone() -> None:
    b = Builder("main")
    x = b.param("x", Tensor(F32, (3, 8)))
    w = b.emit(Param("w", (Tensor(F32, (8,)),))).result
    module = Module((b.finish(b.emit(RmsNorm(x, w, 1e-6)).results),))
    weight = np.ones(8, np.float32)
    weight.setflags(write=False)
    POISONED.run(module, lambda name, type: weight, (np.ones((3, 8), np.float32),))
    np.testing.assert_array_equal(weight, 1)


def test_an_observer_sees_every_op_and_may_replace_results() -> None:
    module = with_views_and_bundles()
    seen: list[str] = []

    def observe(site: backends.Site, op: Any, operands: Any, results: Any) -> Any:
        seen.append(str(site))
        return (np.full_like(results[0], 3.0),) if op.name == "mul" else None

    y = np.ones((4, 6), np.float32)
    found = POISONED.run(module, seeded, (y,), observe)
    expected: list[str] = []
    NUMPY.run(module, seeded, (y,), lambda site, *rest: expected.append(str(site)))
    assert seen == expected
    np.testing.assert_array_equal(found[1], 3.0)


def test_a_replaced_view_is_read_as_what_it_was_replaced_by() -> None:
    """Launches are planned for the strides of the view; what an observer hands over for it has strides of its own."""
    b = Builder("main")
    x, angles = b.param("x", Tensor(F32, (1, 6, 2, 24))), b.param("angles", Tensor(F32, (6, 4)))
    part = b.emit(Slice(x, 3, 16, 24)).result
    one = b.emit(Slice(x, 2, 0, 1)).result
    same = b.emit(Broadcast(one, (1, 6, 2, 24))).result
    module = Module((b.finish((b.emit(Rope(part, angles, angles, interleaved=True)).result, b.emit(Add(same, x)).result)),))
    rng = np.random.default_rng(0)
    inputs = tuple(rng.standard_normal(p.shape).astype(np.float32) for p in module.main.params)
    values = {v: rng.standard_normal(v.shape).astype(np.float32) for v in (part, same)}

    def observe(site: backends.Site, op: Any, operands: Any, results: Any) -> Any:
        return (values[op.result],) if op.results[0] in values else None

    found, expected = (runner.run(module, seeded, inputs, observe) for runner in (POISONED, NUMPY))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[1], expected[1])


def test_a_function_that_runs_twice_has_two_sites() -> None:
    """As in the reference: an embedding that two parts of a model share runs twice with the same weights."""
    b, inner = Builder("main"), Builder("twice")
    y = inner.param("y", Tensor(F32, (2,)))
    twice = inner.finish(inner.emit(Add(y, y)).results)
    x = b.param("x", Tensor(F32, (2,)))
    first = b.emit(Call(Symbol("twice"), (x,), (x.type,))).result
    module = Module((b.finish(b.emit(Call(Symbol("twice"), (first,), (x.type,))).results), twice))
    seen: dict[Any, list[str]] = {POISONED: [], NUMPY: []}
    for runner, sites in seen.items():
        runner.run(module, seeded, (np.ones(2, np.float32),), lambda site, *rest, sites=sites: sites.append(str(site)))
    assert seen[POISONED] == seen[NUMPY]
    assert len(set(seen[NUMPY])) == 2


def test_errors_name_the_op_and_what_was_found() -> None:
    b = Builder("main")
    x, ids = b.param("x", Tensor(F32, (3, 8))), b.param("ids", Tensor(DType.i32, (2, 8)))
    module = Module((b.finish(b.emit(Gather(x, ids, axis=0)).results),))  # no kernel of its own: torch says what is wrong
    arrays = np.ones((3, 8), np.float32), np.full((2, 8), 7, np.int32)
    with pytest.raises(DscError, match=r"@main main#1: gather: .*out of (range|bounds)"):
        POISONED.run(module, seeded, arrays)
    with pytest.raises(DscError, match=r"parameter %ids of @main: expected i32\[2, 8\], found i64\[2, 8\]"):
        POISONED.run(module, seeded, (arrays[0], np.zeros((2, 8), np.int64)))
    with pytest.raises(DscError, match="call has no meaning outside a module"):
        POISONED.evaluate(Call("f", (x,), (x.type,)), [arrays[0]])
    weightless = Builder("main")
    only = Func("main", (), (w := weightless.emit(Param("w", (Tensor(F32, (2,)),))),), w.results)
    with pytest.raises(DscError, match=r"weight w: expected f32\[2\], found bf16\[2\]"):
        POISONED.run(Module((only,)), lambda name, type: rounded(np.zeros(2), DType.bf16), ())


def test_it_interprets_where_another_package_imported_triton_before() -> None:
    """As torch.export does. And says in one line that there is no GPU."""
    script = (
        "import triton, numpy as np, dsc\n"
        "from dsc import backends\n"
        "from dsc.ir.core import Value\n"
        "from dsc.ir.ops.norm import RmsNorm\n"
        "from dsc.ir.types import DType, Tensor\n"
        "op = RmsNorm(Value(Tensor(DType.f32, (2, 4)), 'x'), Value(Tensor(DType.f32, (4,)), 'w'), 0.0)\n"
        "print(backends.get('triton').evaluate(op, [np.full((2, 4), 3, np.float32), np.ones(4, np.float32)])[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str([[1.0] * 4] * 2), done.stderr
    assert done.stderr in ("", "dsc: no GPU: Triton kernels run in its interpreter, on the CPU\n")


def test_storage_of_every_dtype_goes_in_and_out() -> None:
    for dtype in DType:
        b = Builder("main")
        x = b.param("x", Tensor(dtype, (3, 4)))
        module = Module((b.finish([b.emit(Transpose(x, (1, 0))).result]),))
        array = np.arange(12).reshape(3, 4).astype(STORAGE[dtype]) if dtype is not DType.e8m0 else np.ones((3, 4)).astype(STORAGE[dtype])
        (found,) = POISONED.run(module, seeded, (array,))
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found.astype(np.float32), array.T.astype(np.float32))
