"""What the interpreter does around the ops: inputs, weights, calls, memory, observers, messages."""

from __future__ import annotations

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest

from dsc import DscError, backends
from dsc.backends import Site
from dsc.backends.arrays import Array
from dsc.backends.numpy_ref.registry import reference
from dsc.backends.numpy_ref.run import FLOAT32, FLOAT64
from dsc.ir.core import Module, Op, Value
from dsc.ir.ops.attention import Attention
from dsc.ir.ops.elementwise import Add, Exp
from dsc.ir.ops.linalg import Matmul
from dsc.ir.ops.norm import RmsNorm
from dsc.ir.parser import parse
from dsc.ir.types import DType, Tensor

LAYERS = """
module { stage=traced }

func @main(%x: f32[2, 3]) {
  %a: f32[2, 3] = call(@block, [%x], weights="model.layers.0")
  %b: f32[2, 3] = call(@block, [%a], weights="model.layers.1")
  return %b
}

func @block(%x: f32[2, 3]) {
  %n: f32[3] = param("norm.weight")  @ block#1 F
  %a: f32[2, 3] = rms_norm(%x, %n, eps=1e-06)  @ block#2 F
  %b: f32[2, 3] = call(@mlp, [%a], weights="mlp")  @ block#3 F
  return %b
}

func @mlp(%x: f32[2, 3]) {
  %w: f32[3, 3] = param("up.weight")  @ mlp#1 F
  %h: f32[2, 3] = matmul(%x, %w)  @ mlp#2 F
  return %h
}
"""


def ones(name: str, type: Tensor) -> Array:
    return np.ones(type.shape, np.float32)


def run(text: str, *inputs: Array, weights: backends.Weights = ones, observe: backends.Observer | None = None) -> tuple:
    return FLOAT32.run(parse(f"module {{ stage=traced }}\n{text}" if "module" not in text else text), weights, inputs, observe)


def f32(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_weights_of_called_functions_bear_the_path_of_the_calls() -> None:
    asked: list[tuple[str, str]] = []

    def weights(name: str, type: Tensor) -> Array:
        asked.append((name, str(type)))
        return ones(name, type)

    run(LAYERS, f32(2, 3), weights=weights)
    assert asked == [
        ("model.layers.0.norm.weight", "f32[3]"),
        ("model.layers.0.mlp.up.weight", "f32[3, 3]"),
        ("model.layers.1.norm.weight", "f32[3]"),
        ("model.layers.1.mlp.up.weight", "f32[3, 3]"),
    ]


def test_weights_are_fetched_when_they_are_reached() -> None:
    events: list[str] = []

    def weights(name: str, type: Tensor) -> Array:
        events.append(name)
        return ones(name, type)

    run(LAYERS, f32(2, 3), weights=weights, observe=lambda site, op, operands, results: events.append(op.name))
    assert events[:4] == ["model.layers.0.norm.weight", "param", "rms_norm", "model.layers.0.mlp.up.weight"]


def test_an_observer_sees_every_op_but_calls_with_a_name_of_its_own() -> None:
    seen: list[Site] = []
    run(LAYERS, f32(2, 3), observe=lambda site, op, operands, results: seen.append(site))
    assert len(seen) == len(set(seen)) == 8
    assert seen[3] == Site("mlp", "model.layers.0.mlp", "mlp#2")
    assert str(seen[3]) == "@mlp (model.layers.0.mlp) mlp#2"


def test_what_an_observer_returns_replaces_the_results() -> None:
    def zero(site: Site, op: Op, operands: tuple, results: tuple) -> tuple | None:
        return (np.zeros_like(results[0]),) if isinstance(op, Matmul) else None

    (found,) = run(LAYERS, f32(2, 3), observe=zero)
    assert not found.any()


def test_what_an_observer_returns_is_checked() -> None:
    with pytest.raises(DscError, match=r"@block \(model\.layers\.0\) block#1: param: %n: expected f32\[3\], found f64\[3\]"):
        run(LAYERS, f32(2, 3), observe=lambda site, op, operands, results: tuple(r.astype(np.float64) for r in results))


def test_a_value_is_let_go_at_its_last_use() -> None:
    text = """
func @main(%x: f32[4]) {
  %a: f32[4] = exp(%x)
  %b: f32[4] = neg(%a)
  %c: f32[4] = neg(%b)
  %d: f32[4] = neg(%c)
  return %d
}"""
    alive: list[weakref.ref] = []
    most = 0

    def observe(site: Site, op: Op, operands: tuple, results: tuple) -> None:
        nonlocal most
        most = max(most, sum(r() is not None for r in alive) + 1)
        alive.append(weakref.ref(results[0]))

    gc.disable()
    try:
        run(text, f32(4), observe=observe)
    finally:
        gc.enable()
    assert most == 2, "an operand and a result"


def test_views_move_no_data() -> None:
    text = """
func @main(%x: bf16[4, 6]) {
  %a: bf16[6, 4] = transpose(%x, perm=[1, 0])
  %b: bf16[2, 4] = slice(%a, axis=0, start=1, stop=5, step=2)
  %c: bf16[3, 2, 4] = broadcast(%b, shape=[3, 2, 4])
  %d: bf16[4, 3, 2] = reshape(%x, shape=[4, 3, 2])
  return %c, %d
}"""
    x = f32(4, 6).astype(ml_dtypes.bfloat16)
    assert all(np.shares_memory(x, result) for result in run(text, x))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "@main takes 1 inputs (%x: f32[2, 3]), found 0"),
        ([f32(2, 3), f32(2, 3)], "@main takes 1 inputs (%x: f32[2, 3]), found 2"),
        ([f32(2, 4)], "parameter %x of @main: expected f32[2, 3], found f32[2, 4]"),
        ([f32(6)], "parameter %x of @main: expected f32[2, 3], found f32[6]"),
        ([f32(2, 3).astype(ml_dtypes.bfloat16)], "parameter %x of @main: expected f32[2, 3], found bf16[2, 3]"),
        ([f32(2, 3).astype(complex)], "parameter %x of @main: expected f32[2, 3], found complex128[2, 3]"),
        ([[1.0, 2.0]], "parameter %x of @main: expected f32[2, 3], found a list"),
        ([(f32(2, 3),)], "parameter %x of @main: expected f32[2, 3], found bundle{f32[2, 3]}"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: list, message: str) -> None:
    with pytest.raises(DscError) as error:
        run(LAYERS, *inputs)
    assert str(error.value) == message


def test_a_weight_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DscError) as error:
        run(LAYERS, f32(2, 3), weights=lambda name, type: np.ones(4, np.float32))
    where = "@block (model.layers.0) block#1: param"
    assert str(error.value) == f"{where}: weight model.layers.0.norm.weight: expected f32[3], found f32[4]"


ROWS = "func @main(%x: f32[rows<=4, 2]) { %y: f32[rows<=4, 2] = neg(%x) return %y }"


@pytest.mark.parametrize("rows", [0, 3, 4])
def test_a_ragged_extent_is_what_it_is(rows: int) -> None:
    assert run(ROWS, f32(rows, 2))[0].shape == (rows, 2)


def test_a_ragged_extent_beyond_its_bound_is_refused() -> None:
    with pytest.raises(DscError, match=r"expected f32\[rows<=4, 2\], found f32\[5, 2\]"):
        run(ROWS, f32(5, 2))


@pytest.mark.parametrize(
    ("op", "arrays", "message"),
    [
        ("take(%x, %i)", [[0, 5]], "take: index 5 is outside 0 .. 4"),
        ("take(%x, %i)", [[-1, 0]], "take: index -1 is outside 0 .. 4"),
        ("index_add(%x, %i, %x2)", [[9, 0]], "index_add: index 9 is outside 0 .. 4"),
    ],
)
def test_an_index_out_of_range_is_named(op: str, arrays: list, message: str) -> None:
    shape = "2, 3" if "take" in op else "5, 3"
    text = f"func @main(%x: f32[5, 3], %x2: f32[2, 3], %i: i64[2]) {{ %y: f32[{shape}] = {op} @ embed#1 F return %y }}"
    with pytest.raises(DscError) as error:
        run(text, f32(5, 3), f32(2, 3), np.array(arrays[0]))
    assert str(error.value) == f"@main embed#1: {message}"


def test_counts_that_exceed_the_rows_are_refused() -> None:
    text = """func @main(%x: f32[5, 3], %w: f32[2, 3, 4], %c: i32[2]) {
      %y: f32[5, 4] = grouped_matmul(%x, %w, %c)  @ experts#1 F
      return %y }"""
    for counts, message in (([3, 3], "counts add up to 6 rows, but there are 5"), ([-1, 3], "counts are [-1, 3], expected 0 or more")):
        with pytest.raises(DscError) as error:
            run(text, f32(5, 3), f32(2, 3, 4), np.array(counts, np.int32))
        assert str(error.value) == f"@main experts#1: grouped_matmul: {message}"


def test_a_missing_constant_is_named() -> None:
    text = 'func @main() { %c: f32[2] = constant("table") @ rope#1 F return %c }'
    with pytest.raises(DscError, match=r"@main rope#1: constant: the module has no constant 'table'"):
        run(text)


def test_a_constant_comes_from_the_module() -> None:
    module = parse('module { stage=traced }\nfunc @main() { %c: f32[2] = constant("table") return %c }')
    table = f32(2)
    (found,) = FLOAT32.run(module.replace(constants={"table": table}), ones, ())
    assert found is table


def test_a_nan_is_a_number_like_any_other() -> None:
    (found,) = run("func @main(%x: f32[2]) { %y: f32[2] = log(%x) return %y }", np.array([-1, 0], np.float32))
    np.testing.assert_array_equal(found, [np.nan, -np.inf])


def test_bundles_are_tuples() -> None:
    text = """func @main(%b: bundle{f32[2], i64[1]}) {
      %x: f32[2], %i: i64[1] = unpack(%b)
      %c: bundle{i64[1], f32[2]} = pack([%i, %x])
      return %c }"""
    x, i = f32(2), np.array([7])
    assert run(text, (x, i)) == ((i, x),)
    with pytest.raises(DscError, match=r"expected bundle\{f32\[2\], i64\[1\]\}, found bundle\{f32\[2\], f32\[2\]\}"):
        run(text, (x, x))


def test_a_scalar_keeps_its_precision() -> None:
    text = "func @main(%x: bf16[1]) { %s: f32[] = literal([1.00390625], [], f32) %y: bf16[1] = mul(%x, %s) return %y }"
    x = np.array([1.0078125], ml_dtypes.bfloat16)
    (found,) = run(text, x)
    assert found.astype(np.float64)[0] == 1.015625  # of 1.01175; with the scalar rounded to bf16, to 1, it would stay 1.0078125


def test_float64_is_computed_in_float64_where_the_program_says_so() -> None:
    x = np.array([1.0, 2.0**-40])
    value = Value(Tensor(DType.f64, (2,)), "x")
    (found,) = FLOAT32.evaluate(Add(value, value), (x, x))
    np.testing.assert_array_equal(found, 2 * x)


def test_the_float64_backend_computes_in_float64_and_rounds_once() -> None:
    a = np.array([[1.0, 2.0**-30, -1.0]], np.float32)
    op = Matmul(Value(Tensor(DType.f32, (1, 3)), "a"), Value(Tensor(DType.f32, (3, 1)), "b"))
    ones = np.ones((3, 1), np.float32)
    assert FLOAT64.evaluate(op, (a, ones))[0].tolist() == [[2.0**-30]]


def test_a_row_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 2, 9, 8)).astype(np.float32) for _ in range(3))
    x, weight = rng.standard_normal((7, 129)).astype(np.float32), np.ones(129, np.float32)

    def attend(*xs: Array) -> Array:
        return FLOAT32.evaluate(Attention(*(Value(Tensor(DType.f32, x.shape), "x") for x in xs), causal=True), xs)[0]

    def norm(x: Array) -> Array:
        op = RmsNorm(Value(Tensor(DType.f32, x.shape), "x"), Value(Tensor(DType.f32, weight.shape), "w"), eps=1e-6)
        return FLOAT32.evaluate(op, (x, weight))[0]

    for i in range(3):
        np.testing.assert_array_equal(attend(q, k, v)[i : i + 1], attend(*(t[i : i + 1] for t in (q, k, v))))
        np.testing.assert_array_equal(norm(x)[i : i + 1], norm(x[i : i + 1]))


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsc.backends.numpy_ref import attention

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 37, 8)).astype(np.float32) for _ in range(3))
    op = Attention(*(Value(Tensor(DType.f32, q.shape), "x") for _ in range(3)), causal=True)
    (whole,) = FLOAT64.evaluate(op, (q, k, v))
    monkeypatch.setattr(attention, "SCORES", 4 * 37)
    np.testing.assert_array_equal(FLOAT64.evaluate(op, (q, k, v))[0], whole)


def test_a_second_reference_of_an_op_is_refused() -> None:
    with pytest.raises(TypeError, match=r"op 'exp' has two references: .* and .*another"):

        @reference(Exp)
        def another(op: Exp, x: Array) -> Array:
            return x


def test_calls_and_weights_have_no_meaning_outside_a_module() -> None:
    module = parse(LAYERS)
    for op in (module["mlp"].ops[0], module.main.ops[0]):
        with pytest.raises(DscError, match=f"{op.name} has no meaning outside a module"):
            FLOAT32.evaluate(op, ())


def test_backends_have_names() -> None:
    assert backends.get("numpy") is FLOAT32
    assert backends.get("numpy-f64") is FLOAT64
    assert {"numpy", "numpy-f64"} <= set(backends.names())
    with pytest.raises(DscError, match=r"unknown backend 'nunpy'; known are numpy, numpy-f64"):
        backends.get("nunpy")


def test_the_main_function_is_the_first() -> None:
    module: Module = parse(LAYERS)
    (found,) = FLOAT32.run(module.replace(funcs=module.funcs[::-1]), ones, (f32(2, 3),))
    np.testing.assert_array_equal(found, f32(2, 3) @ np.ones((3, 3), np.float32))
