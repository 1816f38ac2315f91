"""Autodiff on whole programs: random ones against differences, faults that must show, what the functions look like, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import dsc
from dsc import DscError, backends
from dsc.backends.arrays import Array
from dsc.ir.core import Builder, Func, Module, Op, Value
from dsc.ir.core import Phase as OpPhase
from dsc.ir.gradients import bundles, by_name
from dsc.ir.ops.control import Call, Literal, Param
from dsc.ir.ops.elementwise import Add, Cast, Mul
from dsc.ir.ops.linalg import Matmul
from dsc.ir.ops.reduce import Sum
from dsc.ir.ops.shape import Take
from dsc.ir.types import Bundle, DType, Tensor
from dsc.ir.verify import verify
from dsc.ir.walk import weights
from dsc.passes import autodiff
from dsc.passes.vjp import VJPS, Backward
from dsc.testing.programs import STEPS, programs
from dsc.testing.sampling import seeded

EXACT = backends.get("numpy-f64")
PROGRAMS = programs(dtypes=(DType.f64,), steps=[s for s in STEPS if s != "cast"], most_steps=5)
"""A cast's gradient goes straight through its rounding, which no difference shows."""
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


def loss_of(program: tuple[Module, tuple[Array, ...]]) -> tuple[Module, dict[str, Array]]:
    """The program with its inputs as weights, and as its loss the sum of all results, each element times a number of its own."""
    module, inputs = program
    main = module.main
    b = Builder("main", component="loss")
    values: dict[Value, Value] = {p: b.emit(Param(f"in{i}", (p.type,))).result for i, p in enumerate(main.params)}
    for op in main.ops:
        values.update(zip(op.results, b.emit(op.with_operands(lambda v: values.get(v, v))).results, strict=True))
    total = None
    for i, r in enumerate(values.get(r, r) for r in main.results):
        if r.dtype is not DType.f64:
            continue
        factor = b.emit(Param(f"c{i}", (r.type,))).result
        part = b.emit(Sum(b.emit(Mul(r, factor)).result, axes=tuple(range(r.tensor.rank)))).result
        total = part if total is None else b.emit(Add(total, part)).result
    assert total is not None
    return verify(Module((b.finish([total]), *module.funcs[1:]))), {f"in{i}": x for i, x in enumerate(inputs)}


def check(program: tuple[Module, tuple[Array, ...]], pipeline: str) -> None:
    """Gradients against central differences along random directions: one of all weights together, some of a few elements each."""
    module, values = loss_of(program)
    differentiated = dsc.apply(module, pipeline)
    assert dsc.parse(str(differentiated)) == differentiated

    def fetch(name: str, type: Tensor) -> Array:
        if name not in values:
            values[name] = np.asarray(seeded(name, type), np.float64)
        return values[name]

    results = EXACT.run(differentiated, fetch, ())
    found = by_name(differentiated, results)
    for name, g in found.items():
        assert g.shape == values[name].shape
    rng = np.random.default_rng(0)
    compared = 0
    for few in (False, True, True):
        direction = {n: rng.standard_normal(w.shape) * (rng.random(w.shape) < 3 / max(1, w.size) if few else 1) for n, w in values.items()}

        def along(t: float, direction: dict[str, Array] = direction) -> float:
            return float(EXACT.run(module, lambda name, _: np.asarray(values[name] + t * direction[name]), ())[0])

        f0, h = float(results[0]), 2.0**-20
        right, left = (along(h) - f0) / h, (f0 - along(-h)) / h
        expected = sum(float((found[n] * direction[n]).sum()) for n in found)
        size = sum(float(np.abs(found[n] * direction[n]).sum()) for n in found)
        if abs(right - left) > 1e-4 * (size + 1) + 1e-9 * abs(f0):
            continue  # a corner lies between
        compared += 1
        assert abs((right + left) / 2 - expected) <= 1e-6 * (size + 1) + 1e-9 * abs(f0) / h * 1e-3, (right, left, expected)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["autodiff", "autodiff{split=true}"])
def test_gradients_of_random_programs(pipeline: str) -> None:
    @settings(SETTINGS)
    @given(PROGRAMS)
    def holds(program: tuple[Module, tuple[Array, ...]]) -> None:
        check(program, pipeline)

    holds()


# ---- faults


def without_a_transpose(op: Matmul, b: Backward, dy: Value) -> Any:
    """Dgrad that reads a weight the wrong way round, where the shapes permit it."""
    right = VJPS_MATMUL(op, b, dy)
    if op.transpose_b and op.b.shape[-1] == op.b.shape[-2] and b.wants(op.a) and op.b.tensor.rank == 2:
        return b.fit(b.emit(Matmul(dy, op.b, transpose_b=True)).result, op.a), right[1]
    return right


VJPS_MATMUL = VJPS[Matmul]


def first_use_only(walk: Any, value: Value, parts: list[Value]) -> Value | None:
    return TOTAL(walk, value, parts[:1])


def last_call_only(walk: Any, name: str, gradient: Value) -> None:
    walk.weights.setdefault(name, gradient)


def without_a_sum(b: Backward, d: Value, x: Value) -> Value | None:
    lead = d.tensor.rank - x.tensor.rank
    return FIT(b, b.emit(Take(d, b.emit(Literal((0,), (), DType.i64)).result)).result if lead == 1 else d, x)


TOTAL = autodiff._Walk.total
FIT = Backward.fit

FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a transpose forgotten": lambda patch: patch.setitem(VJPS, Matmul, without_a_transpose),
    "the gradient of one of two uses dropped": lambda patch: patch.setattr(autodiff._Walk, "total", first_use_only),
    "the gradient of one of two calls dropped": lambda patch: patch.setattr(autodiff._Walk, "add", last_call_only),
    "a sum over what was stretched forgotten": lambda patch: patch.setattr(Backward, "fit", without_a_sum),
}

SQUARE = """
func @main() {
  %x: f64[5, 4] = param("x")                              @ main#1 F
  %w: f64[4, 4] = param("w")                              @ main#2 F
  %y: f64[5, 4] = matmul(%x, %w, transpose_b=true)        @ main#3 F
  %t: f64[5, 4] = tanh(%y)                                @ main#4 F
  %m: f64[5, 4] = mul(%t, %y)                             @ main#5 F
  %s: f64[5, 4] = call(@shift, [%m], weights="s")         @ main#6 F
  %u: f64[5, 4] = call(@shift, [%s], weights="s")         @ main#7 F
  %p: f64[5, 4] = mul(%u, %s)                             @ main#8 F
  return %p
}

func @shift(%x: f64[5, 4]) {
  %b: f64[4] = param("b")                                 @ shift#1 F
  %y: f64[5, 4] = add(%x, %b)                             @ shift#2 F
  return %y
}
"""
"""What each fault needs to show: a square weight, a value used twice, a weight read twice, one that is stretched."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check((dsc.parse(SQUARE), ()), "autodiff")
    FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, DscError)):
        check((dsc.parse(SQUARE), ()), "autodiff")


@pytest.mark.slow
def test_random_programs_catch_a_dropped_use(monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS["the gradient of one of two uses dropped"](monkeypatch)

    @settings(
        max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True, phases=[Phase.generate]
    )
    @given(PROGRAMS)
    def holds(program: tuple[Module, tuple[Array, ...]]) -> None:
        check(program, "autodiff")

    with pytest.raises(BaseException, match=r"assert|Assertion|Falsifying|failures"):
        holds()


# ---- what comes out


@cache
def traced(*overrides: str) -> Module:
    return dsc.trace("deepseek-v3-tiny", mode="train", overrides=overrides)


def tiny(pipeline: str = "simplify,autodiff", *overrides: str) -> Module:
    return dsc.apply(traced(*overrides), pipeline)


def test_equal_layers_stay_one_function() -> None:
    small = tiny()
    deep = tiny("simplify,autodiff", "num_hidden_layers=9")
    assert [f.name for f in small.funcs] == [f.name for f in deep.funcs]
    for a, b in zip(small.funcs[1:], deep.funcs[1:], strict=True):
        if not a.name.startswith("total_loss"):  # it adds up one balance loss for each layer
            assert a == b
    added = [op for op in deep.main.ops if isinstance(op, Call)]
    assert len(added) - len([op for op in small.main.ops if isinstance(op, Call)]) == 2 * 6
    assert len(deep.main.ops) - len(small.main.ops) == 2 * 6


def test_every_weight_but_the_bias_has_one_gradient() -> None:
    known, module = weights(traced()), tiny("autodiff")
    names = [name for bundle in bundles(module) for name in bundle]
    assert len(set(names)) == len(names)
    assert known.keys() - set(names) == {name for name in known if name.endswith("e_score_correction_bias")}
    for names_of, result in zip(bundles(module), module.main.results[-len(bundles(module)) :], strict=True):
        assert isinstance(result.type, Bundle)
        assert result.type.fields == tuple(Tensor(DType.f32, known[n].shape) for n in names_of)


def test_residuals_are_what_backward_reads_and_cannot_have_for_nothing() -> None:
    module = tiny()
    for name in ("decoder_layer", "training_moe_layer", "mtp_module", "head", "token_loss"):
        forward, backward = module[f"{name}_fwd"], module[f"{name}_bwd"]
        kept = forward.results[-1].owner
        unpack = backward.ops[0]
        assert kept is not None
        assert [v.type for v in kept.operands] == [r.type for r in unpack.results]
        read = {v for op in backward.ops for v in op.operands}
        assert set(unpack.results) <= read, "a residual that backward does not read"
        assert len(set(kept.operands)) == len(kept.operands)
        for value in kept.operands:
            if value.owner is not None:
                assert value.owner.name not in ("param", "literal", "reshape", "slice", "transpose", "broadcast", "iota")
                assert not (isinstance(value.owner, Cast) and value.owner.dtype.bits >= value.owner.x.dtype.bits)
    routed = [v.name for v in module["training_moe_layer_fwd"].results[-1].owner.operands]  # type: ignore[union-attr]
    assert {"ids", "weights", "counts", "handle"} <= set(routed)
    assert routed.count("ids") == 2, "those of the experts and those of the balance loss"
    assert not any(op.name in ("route", "dispatch", "topk") for op in module["training_moe_layer_bwd"].ops)


def test_gradients_of_activations_keep_their_dtype_and_phases_tell_inputs_from_weights() -> None:
    backward = tiny()["decoder_layer_bwd"]
    for op in backward.ops:
        if isinstance(op, Matmul):
            wgrad = op.out is DType.f32
            assert op.result.dtype is (DType.f32 if wgrad else DType.bf16)
            assert op.phase is (OpPhase.W if wgrad else OpPhase.I)
    assert sum(isinstance(op, Matmul) and op.phase is OpPhase.W for op in backward.ops) == 8
    assert sum(isinstance(op, Matmul) and op.phase is OpPhase.I for op in backward.ops) == 8


def test_split_phases_are_two_functions() -> None:
    whole, split = tiny(), tiny("simplify,autodiff{split=true}")
    for name in ("decoder_layer", "training_moe_layer", "mtp_module", "head"):
        first, second = split[f"{name}_bwd_input"], split[f"{name}_bwd_weight"]
        assert {op.phase for op in first.ops} == {OpPhase.I}
        assert {op.phase for op in second.ops} == {OpPhase.W}
        assert first.results[-1].type == second.params[0].type
        assert second.results[0].type == whole[f"{name}_bwd"].results[-1].type
        assert [r.type for r in first.results[:-1]] == [r.type for r in whole[f"{name}_bwd"].results[:-1]]
    assert "embedding_bwd_weight" in split.by_name
    assert "embedding_bwd_input" not in split.by_name
    assert "token_loss_bwd_input" in split.by_name
    tokens = np.random.default_rng(0).integers(0, 320, (1, 64))
    found = [backends.get("numpy").run(m, seeded, (tokens, tokens)) for m in (whole, split)]
    for a, b in zip(*(by_name(m, r).values() for m, r in zip((whole, split), found, strict=True)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_slices_that_cover_a_value_are_joined_not_padded_and_added() -> None:
    backward = tiny()["decoder_layer_bwd"]
    assert not any(op.name == "pad" for op in backward.ops)


@pytest.mark.parametrize("pipeline", ["autodiff", "autodiff{split=true}", "simplify,autodiff,simplify", "autodiff,quantize-fp8"])
def test_every_stage_survives_its_text(pipeline: str) -> None:
    module = tiny(pipeline)
    assert dsc.parse(str(module)) == module
    assert str(dsc.parse(str(module))) == str(module)


def test_a_function_is_differentiated_for_the_inputs_that_matter() -> None:
    """The first call's input depends on no weight, so what goes back through it ends there."""
    module = dsc.apply(dsc.parse("""
    func @main(%x: f32[3, 4]) {
      %a: f32[3, 4] = call(@layer, [%x], weights="a")  @ main#1 F
      %b: f32[3, 4] = call(@layer, [%a], weights="b")  @ main#2 F
      %loss: f32[] = sum(%b, axes=[0, 1])              @ main#3 F
      return %loss
    }
    func @layer(%x: f32[3, 4]) {
      %w: f32[4, 4] = param("w")                       @ layer#1 F
      %y: f32[3, 4] = matmul(%x, %w)                   @ layer#2 F
      return %y
    }
    """), "autodiff")  # fmt: skip
    assert [len(f.results) for f in module.funcs] == [3, 2, 2, 1]
    assert bundles(module) == (("a.w",), ("b.w",))


def test_a_tied_weight_stands_with_its_first_reader() -> None:
    module = dsc.apply(dsc.parse("""
    func @main(%x: f32[3, 4]) {
      %a: f32[3, 4] = call(@first, [%x], weights="m")   @ main#1 F
      %b: f32[3, 4] = call(@second, [%a], weights="m")  @ main#2 F
      %loss: f32[] = sum(%b, axes=[0, 1])               @ main#3 F
      return %loss
    }
    func @first(%x: f32[3, 4]) {
      %w: f32[4, 4] = param("w")                        @ first#1 F
      %y: f32[3, 4] = matmul(%x, %w)                    @ first#2 F
      return %y
    }
    func @second(%x: f32[3, 4]) {
      %w: f32[4, 4] = param("w")                        @ second#1 F
      %v: f32[4] = param("v")                           @ second#2 F
      %y: f32[3, 4] = matmul(%x, %w)                    @ second#3 F
      %z: f32[3, 4] = add(%y, %v)                       @ second#4 F
      return %z
    }
    """), "autodiff")  # fmt: skip
    assert bundles(module) == (("m.w",), ("m.v",))
    x, w = np.arange(12, dtype=np.float32).reshape(3, 4), np.eye(4, dtype=np.float32)
    found = by_name(module, backends.get("numpy").run(module, lambda n, t: w if n == "m.w" else np.ones(4, np.float32), (x,)))
    ones = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(found["m.w"], x.T @ ones + x.T @ ones)
    np.testing.assert_array_equal(found["m.v"], np.full(4, 3, np.float32))


# ---- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'func @main() { %w: bf16[3] = param("w")  @ m#1 F return %w }',
            "autodiff: the first result of @main is to be the loss, a float scalar; found %w: bf16[3]",
        ),
        (
            "func @main(%n: i64[]) { return %n }",
            "autodiff: the first result of @main is to be the loss, a float scalar; found %n: i64[]",
        ),
        ("func @main(%n: i64[]) { return }", "autodiff: the first result of @main is to be the loss, but it returns nothing"),
        ("func @main(%x: f32[]) { return %x }", "autodiff: the loss, %x of @main, depends on no weight"),
        (
            'func @main(%x: f32[2]) { %w: f32[2] = param("w")  @ m#1 F %n: f32[2] = floor(%w)  @ m#2 F '
            "%s: f32[] = sum(%n, axes=[0])  @ m#3 F return %s }",
            "autodiff: the loss, %s of @main, depends on no weight",
        ),
        (
            "module { stage=quantized } func @main(%x: f32[]) { return %x }",
            "autodiff takes a module at stage traced, but this one is at stage quantized",
        ),
        (
            "module { stage=differentiated } func @main(%x: f32[]) { return %x }",
            "autodiff takes a module at stage traced, but this one is at stage differentiated",
        ),
        (
            'func @main(%q: f32[1, 3, 4]) { %m: f32[3, 3] = param("m")  @ m#1 F '
            "%y: f32[1, 3, 4] = attention(%q, %q, %q, mask=%m)  @ m#2 F %s: f32[] = sum(%y, axes=[0, 1, 2])  @ m#3 F return %s }",
            "autodiff: attention m#2: no derivative by the mask, but %m depends on a weight",
        ),
        (
            'func @main(%p: i64[2]) { %q: f32[2, 1, 4] = param("q")  @ m#1 F %k: f32[2, 3, 1, 4] = param("k")  @ m#2 F '
            "%y: f32[2, 1, 4] = attention_decode(%q, %k, %k, %p, scale=1.0)  @ m#3 F "
            "%s: f32[] = sum(%y, axes=[0, 1, 2])  @ m#4 F return %s }",
            "autodiff: attention_decode m#3 of @main has no derivative: decoding is not trained",
        ),
        (
            'func @main() { %w: f32[2] = param("w")  @ m#1 F %b: bundle{f32[2]} = pack([%w])  @ m#2 F %v: f32[2] = unpack(%b)  @ m#3 F '
            "%s: f32[] = sum(%v, axes=[0])  @ m#4 F return %s }",
            "autodiff: unpack m#3 of @main has no derivative: bundles carry handles and residuals, whose gradient is never asked for",
        ),
    ],
)
def test_what_cannot_be_differentiated_is_told_why(text: str, message: str) -> None:
    with pytest.raises(DscError) as error:
        dsc.apply(dsc.parse(text), "autodiff")
    assert str(error.value) == message


def test_gradients_are_found_among_all_results_only() -> None:
    module = tiny()
    with pytest.raises(DscError, match=f"@main has {len(module.main.results)} results, found 1"):
        by_name(module, [1])


def test_inputs_and_metrics_are_left_alone() -> None:
    module = tiny("autodiff")
    before, after = traced().main, module.main
    assert [p.type for p in after.params] == [p.type for p in before.params]
    assert [r.name for r in after.results[: len(before.results)]] == [r.name for r in before.results]
    ops: tuple[Op, ...] = after.ops[: len(before.ops)]
    assert [op.id for op in ops] == [op.id for op in before.ops]
    assert isinstance(module["total_loss"], Func)
