"""The derivative of every op: against central differences in float64 on every sample, and against torch.autograd where torch has the op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dsc
from dsc import backends
from dsc.backends.arrays import STORAGE, Array, widen
from dsc.backends.numpy_ref.run import unrounded
from dsc.ir.core import OPS, Builder, Module, Op, Value
from dsc.ir.gradients import by_name
from dsc.ir.ops import attention, elementwise, linalg, loss, moe, norm, quant, reduce, shape
from dsc.ir.ops.control import Param
from dsc.ir.types import DType, Tensor
from dsc.passes.vjp import MISSING, NOT_DIFFERENTIABLE, VJPS, vjp
from dsc.testing.samples import SAMPLES
from dsc.testing.sampling import Operand, Sample, sample

STRAIGHT_THROUGH = (elementwise.Cast, quant.Quantize, quant.Dequantize)
"""Their rule is stated, not derived: rounding has no slope worth following."""

CHECKED = 16
"""Elements of each operand whose difference is taken."""


def promoted(s: Sample) -> Sample:
    """The same sample in float64, where the op's type rule takes it."""
    operands = tuple(
        replace(o, type=Tensor(DType.f64, o.type.shape)) if isinstance(o.type, Tensor) and o.type.dtype.is_float else o for o in s.operands
    )
    wide = replace(s, operands=operands, attributes=s.attributes | ({"out": DType.f64} if "out" in s.attributes else {}))
    try:
        wide.op()
    except dsc.DscError:
        return s
    return wide


def has_slope(s: Sample) -> bool:
    op = s.op()
    return s.cls in VJPS and s.cls not in STRAIGHT_THROUGH and any(map(is_float, op.results)) and any(map(is_float, op.operands))


def is_float(v: Value | Operand) -> bool:
    return isinstance(v.type, Tensor) and v.type.dtype.is_float


DIFFERENTIABLE = list({s.name: s for s in map(promoted, SAMPLES) if has_slope(s)}.values())

CONSTANT = {attention.Attention: (3,), norm.Rope: (1, 2)}
"""Operands that a rule takes for constant: a mask, the angles of a rotation."""


def varied(s: Sample) -> list[int]:
    """The operands that get a gradient."""
    return [i for i, o in enumerate(s.operands) if is_float(o) and i not in CONSTANT.get(s.cls, ())]


def program(s: Sample) -> Module:
    """A loss: the sum of every float result times an input of its type. Varied operands are weights x0, x1, ...; others are inputs."""
    b = Builder("main", component="main")
    weights = varied(s)
    values = [
        b.emit(Param(f"x{i}", (o.type,))).result if i in weights and isinstance(o.type, Tensor) else b.param(f"x{i}", o.type)
        for i, o in enumerate(s.operands)
    ]
    total = None
    for i, r in enumerate(b.emit(s.op(*values)).results):
        if is_float(r):
            factor = b.param(f"c{i}", r.type)
            wide = b.emit(elementwise.Cast(b.emit(elementwise.Mul(r, factor)).result, DType.f64)).result
            part = b.emit(reduce.Sum(wide, axes=tuple(range(r.tensor.rank)))).result
            total = part if total is None else b.emit(elementwise.Add(total, part)).result
    assert total is not None
    return Module((b.finish([total]),))


def factors(op: Op, rng: np.random.Generator) -> list[Array]:
    """What each float result is multiplied by, in numbers that float32 holds."""
    shapes = [[int(d) for d in r.shape] for r in op.results if is_float(r)]
    return [np.asarray(rng.uniform(0.5, 1.5, s) * rng.choice([-1, 1], s), np.float32).astype(np.float64) for s in shapes]


def gradients(s: Sample, arrays: tuple[Any, ...], cotangents: list[Array]) -> dict[int, Array]:
    """By the pass and the interpreter in float64, by operand. An operand without a gradient has none."""
    module = dsc.apply(program(s), "autodiff")
    given = [a for i, a in enumerate(arrays) if i not in varied(s)]
    typed = [c.astype(STORAGE[p.dtype]) for c, p in zip(cotangents, module.main.params[len(given) :], strict=True)]
    results = backends.get("numpy-f64").run(module, lambda name, _: arrays[int(name[1:])], [*given, *typed])
    return {int(name[1:]): widen(g, np.float64) for name, g in by_name(module, results).items()}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("sample", DIFFERENTIABLE, ids=lambda s: s.name)
def test_against_central_differences(sample: Sample) -> None:
    """A step h has an error of order h^2 and of rounding, |f| 2^-52 / h. At a corner, where slopes to both sides differ, none is taken."""
    op, arrays, rng = sample.op(), sample.arrays(), np.random.default_rng(3)
    if any(isinstance(o.type, Tensor) and not o.type.is_static for o in sample.operands):
        pytest.skip("its gradient needs static shapes outside, though the op's own rule does not")
    cotangents = factors(op, rng)
    found = gradients(sample, arrays, cotangents)
    wide = [widen(a, np.float64) if isinstance(a, np.ndarray) and a.dtype.kind not in "iub" else a for a in arrays]

    def terms(values: list[Any]) -> tuple[float, float]:
        results = [y for y, r in zip(unrounded(op, values), op.results, strict=True) if is_float(r)]
        products = [np.asarray(y) * c for y, c in zip(results, cotangents, strict=True)]
        return sum(float(p.sum()) for p in products), sum(float(np.abs(p).sum()) for p in products)

    f0, magnitude = terms(wide)
    if not np.isfinite(f0):
        pytest.skip("it has no finite value here, so no difference")
    single = any(r.dtype is DType.f32 for r in op.results if is_float(r))
    compared = 0
    for i in varied(sample):
        g = found.get(i, np.zeros(wide[i].shape))
        assert g.shape == wide[i].shape
        for at in rng.permutation(wide[i].size)[:CHECKED]:
            h = 1e-6 * max(1.0, abs(float(wide[i].flat[at])))
            sides = []
            for step in (h, -h):
                moved = list(wide)
                moved[i] = wide[i].copy()
                moved[i].flat[at] += step
                sides.append((terms(moved)[0] - f0) / step)
            noise = magnitude * 2.0**-50 / h
            scale = max(1.0, float(np.abs(g[np.isfinite(g)]).max(initial=0)))
            if not np.isfinite(sides).all() or abs(sides[0] - sides[1]) > 1e-3 * scale + 4 * noise:
                continue
            compared += 1
            tolerance = (2.0**-18 if single else 1e-7) * scale + noise
            close = abs((sides[0] + sides[1]) / 2 - g.flat[at]) <= tolerance
            assert close, f"operand {i} at {at}: {sides} by differences, {g.flat[at]} by rule"
    equals = sample.cls is reduce.Sort or sample.tag == "of equals"  # a corner everywhere
    assert compared or equals or not any(np.size(wide[i]) for i in varied(sample)), "no element could be compared"


def test_every_op_has_a_derivative_or_a_reason() -> None:
    tables = (VJPS, NOT_DIFFERENTIABLE, MISSING)
    assert {cls.name for table in tables for cls in table} == OPS.keys()
    assert sum(map(len, tables)) == len(OPS), "an op stands in two tables"
    assert all(reason for table in tables[1:] for reason in table.values())


def test_an_op_has_one_derivative() -> None:
    with pytest.raises(TypeError, match="op 'matmul' has two derivatives"):
        vjp(linalg.Matmul)(lambda op, b, dy: (None, None))
    with pytest.raises(TypeError, match="op 'floor' has two derivatives"):
        vjp(elementwise.Floor)(lambda op, b, dy: (None,))


def test_what_passes_no_gradient_is_constant_or_whole() -> None:
    """An op may be called not differentiable only if its float results do not move with its float operands."""
    for s in (s for s in SAMPLES if s.cls in NOT_DIFFERENTIABLE):
        op = s.op()
        moves = any(map(is_float, op.operands)) and any(map(is_float, op.results))
        assert not moves or s.cls.name in ("floor", "call")


# ---- torch

T = torch.Tensor
E, R, S = elementwise, reduce, shape


def plainly(function: Callable[..., T]) -> Callable[..., T]:
    return lambda op, *xs: function(*xs)


def attend(op: attention.Attention, q: T, k: T, v: T, mask: T | None = None) -> T:
    shared = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(shared, -3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * op.scale
    if mask is not None and not mask.dtype.is_floating_point and mask.dtype != torch.bool:
        document = (torch.arange(scores.shape[-1])[:, None] >= mask).sum(1)
        mask = (document[:, None] == document) & (document > 0) & (document < len(mask))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if op.causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    seen = scores.isfinite().any(-1, keepdim=True)
    return torch.where(seen, scores.masked_fill(~seen, 0).softmax(-1), 0.0) @ v


TORCH: dict[type[Op], Callable[..., Any]] = {
    **{cls: plainly(getattr(torch, cls.name)) for cls in (E.Abs, E.Exp, E.Log, E.Sqrt, E.Rsqrt, E.Sin, E.Cos, E.Tanh, E.Erf, E.Sigmoid)},
    **{cls: plainly(getattr(torch, cls.name)) for cls in (E.Neg, E.Floor, E.Relu, E.Add, E.Sub, E.Mul, E.Div, E.Remainder, E.Pow)},
    **{cls: plainly(getattr(torch, cls.name)) for cls in (E.Maximum, E.Minimum, E.Where)},
    E.Silu: plainly(F.silu),
    E.SwiGLU: plainly(lambda gate, up, weight=1: F.silu(gate) * up * weight),
    S.Reshape: lambda op, x: x.reshape(op.shape),
    S.Transpose: lambda op, x: x.permute(op.perm),
    S.Broadcast: lambda op, x: x.broadcast_to(op.shape),
    S.Concat: lambda op, *xs: torch.cat(xs, op.axis),
    S.Gather: lambda op, x, indices: x.gather(op.axis, indices.long()),
    S.Scatter: lambda op, x, indices, updates: x.scatter(op.axis, indices.long(), updates),
    S.IndexAdd: lambda op, x, indices, updates: x.index_add(0, indices, updates),
    S.Take: lambda op, x, indices: x.index_select(op.axis, indices.reshape(-1)).reshape(
        *x.shape[: op.axis], *indices.shape, *x.shape[op.axis + 1 :]
    ),
    R.Sum: lambda op, x: x.sum(op.axes, keepdim=op.keepdims),
    R.Mean: lambda op, x: x.mean(op.axes, keepdim=op.keepdims),
    R.Max: lambda op, x: x.amax(op.axes, keepdim=op.keepdims),
    R.Min: lambda op, x: x.amin(op.axes, keepdim=op.keepdims),
    R.CumSum: lambda op, x: x.cumsum(op.axis),
    R.Softmax: lambda op, x: x.softmax(op.axis),
    R.LogSoftmax: lambda op, x: x.log_softmax(op.axis),
    R.Sort: lambda op, x: x.sort(dim=op.axis, descending=op.descending, stable=True).values,
    R.TopK: lambda op, x: x.sort(dim=op.axis, descending=True, stable=True).values.narrow(op.axis, 0, op.k),
    linalg.Matmul: lambda op, a, b: a @ (b.transpose(-1, -2) if op.transpose_b else b),
    norm.RmsNorm: lambda op, x, weight: F.rms_norm(x, weight.shape, weight, op.eps),
    attention.Attention: attend,
    loss.CrossEntropy: lambda op, logits, labels: F.cross_entropy(logits, labels, ignore_index=op.ignore),
}

CORNERS = [
    *(sample(cls, ("f64[5, 9]", lambda rng, shape: rng.integers(-1, 2, shape) * 1.0), tag="at its corner") for cls in (E.Abs, E.Relu)),
    *(
        sample(cls, ("f64[5, 9]", lambda rng, shape: rng.integers(0, 3, shape) * 1.0), tag="with equals", axes=(1,))
        for cls in (R.Max, R.Min)
    ),
    *(
        sample(cls, *[("f64[5, 9]", lambda rng, shape: rng.integers(0, 2, shape) * 1.0)] * 2, tag="with equals")
        for cls in (E.Maximum, E.Minimum)
    ),
    sample(E.Pow, ("f64[5]", lambda rng, shape: np.arange(5.0)), ("f64[]", lambda rng, shape: np.asarray(0.0)), tag="to the power 0"),
]
"""Where a function has no derivative, the rule is torch's."""


@pytest.mark.parametrize("sample", [s for s in DIFFERENTIABLE if s.cls in TORCH] + CORNERS, ids=lambda s: s.name)
def test_against_torch(sample: Sample) -> None:
    op, arrays = sample.op(), sample.arrays()
    cotangents = factors(op, np.random.default_rng(3))
    found = gradients(sample, arrays, cotangents)
    leaves = [torch.from_numpy(np.array(a)).requires_grad_(a.dtype.kind == "f") for a in arrays]
    y = TORCH[sample.cls](op, *leaves)
    if y.isnan().any():
        pytest.skip("what reaches a NaN is nobody's law")
    if y.requires_grad and y.numel():
        y.backward(torch.from_numpy(cotangents[0]).reshape(y.shape))
    for i in varied(sample):
        grad = leaves[i].grad
        expected = np.zeros(arrays[i].shape) if grad is None else grad.numpy()
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=1)
        np.testing.assert_allclose(found.get(i, np.zeros(arrays[i].shape)), expected, rtol=1e-12, atol=1e-13 * scale)


# ---- rules that are stated


CASTS = [s for s in SAMPLES if s.cls is elementwise.Cast and is_float(s.operands[0]) and s.attributes["dtype"].is_float]


@pytest.mark.parametrize("sample", CASTS, ids=lambda s: s.name)
def test_a_cast_passes_the_gradient_straight_through(sample: Sample) -> None:
    op = sample.op()
    b = Builder("main")
    x = b.emit(Param("x0", (op.operands[0].type,))).result
    y = b.emit(elementwise.Cast(b.emit(elementwise.Cast(x, op.dtype)).result, DType.f32)).result
    c = b.param("c", y.type)
    total = b.emit(reduce.Sum(b.emit(elementwise.Mul(y, c)).result, axes=tuple(range(y.tensor.rank)))).result
    module = dsc.apply(Module((b.finish([total]),)), "autodiff")
    cotangent = factors(op, np.random.default_rng(0))[0].astype(np.float32)
    (_, (found,)) = backends.get("numpy").run(module, lambda *_: sample.arrays()[0], [cotangent])
    np.testing.assert_array_equal(found, cotangent)


def test_quantising_passes_the_gradient_straight_through() -> None:
    text = """
    func @main(%c: f32[5, 200]) {
      %x: bf16[5, 200] = param("x")                                                            @ main#1 F
      %q: f8e4m3[5, 200], %s: f32[5, 2] = quantize(%x)                                         @ main#2 F
      %y: f32[5, 200] = dequantize(%q, %s, dtype=f32)                                          @ main#3 F
      %z: f32[5, 200] = mul(%y, %c)                                                            @ main#4 F
      %loss: f32[] = sum(%z, axes=[0, 1])                                                      @ main#5 F
      return %loss
    }
    """
    module = dsc.apply(dsc.parse(text), "autodiff")
    c = np.random.default_rng(0).standard_normal((5, 200)).astype(np.float32)
    x = sample(elementwise.Neg, "bf16[5, 200]").arrays()[0]
    (_, (found,)) = backends.get("numpy").run(module, lambda *_: x, [c])
    np.testing.assert_array_equal(found, c)


def test_the_bias_of_the_gate_has_no_gradient_and_no_choice_has() -> None:
    s = next(s for s in SAMPLES if s.cls is moe.Route and s.tag == "V3")
    found = gradients(s, s.arrays(), [c.astype(np.float32) for c in factors(s.op(), np.random.default_rng(0))])
    assert found.keys() == {0}
    ids = s.op() and backends.get("numpy").evaluate(s.op(), s.arrays())[0]
    chosen = np.zeros(found[0].shape, bool)
    np.put_along_axis(chosen, ids.astype(np.int64), True, 1)
    assert (found[0][~chosen] == 0).all()
    assert (found[0][chosen] != 0).all()
