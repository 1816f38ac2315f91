"""`assert_backends_agree` lets the two interpreters pass and names what a faulty backend gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

import dsc
import dsc.testing
from dsc import DscError, backends
from dsc.backends.numpy_ref.run import FLOAT32
from dsc.ir.core import Module, Op
from dsc.ir.parser import parse
from dsc.testing import assert_backends_agree

LAYER = parse("""
module { stage=traced }

func @main(%x: bf16[9, 16]) {
  %a: bf16[9, 16] = call(@layer, [%x], weights="layers.0")
  %b: bf16[9, 16] = call(@layer, [%a], weights="layers.1")
  return %b
}

func @layer(%x: bf16[9, 16]) {
  %n: bf16[16] = param("norm")  @ norm#1 F
  %h: bf16[9, 16] = rms_norm(%x, %n, eps=1e-06)  @ norm#2 F
  %g: f32[7, 16] = param("gate")  @ gate#1 F
  %wide: f32[9, 16] = cast(%h, dtype=f32)  @ gate#2 F
  %logits: f32[9, 7] = matmul(%wide, %g, transpose_b=true)  @ gate#3 F
  %ids: i32[9, 2], %weights: f32[9, 2] = route(%logits, top_k=2)  @ gate#4 F
  %rows: bf16[18, 16], %counts: i32[7], %handle: bundle{i32[18]} = dispatch([%h], %ids, experts=7)  @ experts#1 F
  %w: bf16[7, 16, 16] = param("experts")  @ experts#2 F
  %made: bf16[18, 16] = grouped_matmul(%rows, %w, %counts, transpose_b=true)  @ experts#3 F
  %y: bf16[9, 16] = combine(%made, %handle, %weights)  @ experts#4 F
  return %y
}
""")

Results = tuple[NDArray, ...]


def weights(name: str, type: object) -> NDArray:
    from dsc.testing.sampling import seeded

    return seeded(name, type)


def inputs(seed: int = 0) -> tuple[NDArray]:
    import ml_dtypes

    return (np.random.default_rng(seed).standard_normal((9, 16)).astype(ml_dtypes.bfloat16),)


class Faulty:
    """The reference, but for one op by name."""

    def __init__(self, name: str, fault: Callable[[Results], Results]) -> None:
        self.name, self.fault = name, fault

    def run(self, *args: object) -> Results:
        return FLOAT32.run(*args)

    def evaluate(self, op: Op, operands: Sequence[NDArray]) -> Results:
        results = FLOAT32.evaluate(op, operands)
        return self.fault(results) if op.name == self.name else results


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Results], Results]], None]:
    """Registers a backend named 'faulty'."""

    def register(name: str, fault: Callable[[Results], Results]) -> None:
        monkeypatch.setitem(backends.LOADERS, "faulty", lambda: Faulty(name, fault))
        backends.get.cache_clear()

    return register


@pytest.fixture(autouse=True)
def _forget_the_faulty_one() -> object:
    yield
    backends.get.cache_clear()


def test_it_is_the_face_of_dsc_testing() -> None:
    assert dsc.testing.assert_backends_agree is assert_backends_agree
    with pytest.raises(AttributeError, match="has no attribute 'assert_backend_agree'"):
        _ = dsc.testing.assert_backend_agree


def test_the_two_interpreters_agree() -> None:
    found = assert_backends_agree(LAYER, weights, inputs())
    assert found.ops == 14
    assert found.worst <= 1
    assert found.moved == []


def test_a_backend_agrees_with_itself_to_the_bit() -> None:
    found = assert_backends_agree(LAYER, weights, inputs(), backends=("numpy", "numpy"))
    assert (found.worst, found.worst_at) == (0, None)


def test_weights_may_be_a_mapping() -> None:
    module = parse('module { stage=traced }\nfunc @main(%x: f32[2]) { %w: f32[2] = param("w") %y: f32[2] = add(%x, %w) return %y }')
    x = np.ones(2, np.float32)
    assert assert_backends_agree(module, {"w": x}, (x,)).ops == 1
    with pytest.raises(DscError, match=r"no weight 'w', expected f32\[2\]"):
        assert_backends_agree(module, {"v": x}, (x,))


def test_the_first_op_that_differs_is_named_with_its_worst_element(faulty: Callable) -> None:
    def fault(results: Results) -> Results:
        wrong = results[0].copy()
        wrong[3, 5] += 1
        wrong[4, 6] += 2
        return (wrong,)

    faulty("grouped_matmul", fault)
    with pytest.raises(AssertionError) as error:
        assert_backends_agree(LAYER, weights, inputs(), backends=("numpy", "faulty"))
    first, line, worst = str(error.value).splitlines()
    assert first == "numpy and faulty disagree first at @layer (layers.0) experts#3, in 2 of 288 elements"
    assert line.strip().startswith("%made: bf16[18, 16] = grouped_matmul(%rows, %w, %counts, transpose_b=true)")
    assert worst.strip().startswith("worst at [")
    assert "permitted difference" in worst


def test_a_difference_of_one_unit_is_found_where_nothing_explains_it(faulty: Callable) -> None:
    """Truncating bf16 where it should round moves results by one unit in the last place at most."""
    faulty("rms_norm", lambda results: ((results[0].view(np.uint16) - 1).view(results[0].dtype),))
    with pytest.raises(AssertionError, match=r"disagree first at @layer \(layers\.0\) norm#2"):
        assert_backends_agree(LAYER, weights, inputs(), backends=("numpy", "faulty"))


def test_a_result_of_another_type_is_named(faulty: Callable) -> None:
    faulty("rms_norm", lambda results: (results[0].astype(np.float32),))
    with pytest.raises(AssertionError, match=r"norm#2: faulty gives f32\[9, 16\], expected bf16\[9, 16\]"):
        assert_backends_agree(LAYER, weights, inputs(), backends=("numpy", "faulty"))


def test_a_nan_in_one_backend_only_is_a_difference(faulty: Callable) -> None:
    faulty("combine", lambda results: (np.full_like(results[0], np.nan),))
    with pytest.raises(AssertionError, match="experts#4, in 144 of 144 elements"):
        assert_backends_agree(LAYER, weights, inputs(), backends=("numpy", "faulty"))


def test_other_experts_for_a_clear_choice_are_a_difference(faulty: Callable) -> None:
    faulty("route", lambda results: (results[0][:, ::-1], results[1][:, ::-1]))
    with pytest.raises(AssertionError, match=r"gate#4, in 18 of 18 elements"):
        assert_backends_agree(LAYER, weights, inputs(), backends=("numpy", "faulty"))


ROUTE = """module {{ stage=traced }}
func @main(%logits: f32[3, 6], %bias: f32[6]) {{
  %ids: i32[3, 2], %weights: f32[3, 2] = route(%logits, bias=%bias, top_k=2{}) @ gate#1 F
  return %ids, %weights
}}"""


@pytest.mark.parametrize(
    ("groups", "moved"),
    [
        ("", "token 1 goes to experts 0 1 or 4 0"),
        (", groups=3, top_groups=2", "token 1 goes to experts 0 1 or 4 0"),
        (', groups=3, top_groups=1, group_score="max"', "token 1 goes to experts 0 1 or 4 5"),
    ],
)
def test_tokens_whose_choice_is_closer_than_rounding_are_reported_apart(groups: str, moved: str) -> None:
    """Beside a score of 1/2 a bias of 2^-26 decides in float64 and is lost in float32, where equals go to the lower index."""
    module: Module = parse(ROUTE.format(groups))
    logits = np.array([[4, 3, 2, 1, 0, -1], [0, 0, 0, 0, 0, 0], [-1, 0, 1, 2, 3, 4]], np.float32)
    bias = np.zeros(6, np.float32)
    bias[4] = 2.0**-26
    found = assert_backends_agree(module, {}, (logits, bias))
    assert list(map(str, found.moved)) == [f"@main gate#1: {moved}"]


def test_inputs_that_do_not_fit_are_the_callers_error() -> None:
    with pytest.raises(DscError, match=r"parameter %x of @main: expected bf16\[9, 16\], found f32\[9, 16\]"):
        assert_backends_agree(LAYER, weights, (np.zeros((9, 16), np.float32),))
    with pytest.raises(DscError, match="unknown backend 'nunpy'"):
        assert_backends_agree(LAYER, weights, inputs(), backends=("numpy", "nunpy"))


def test_torch_tensors_as_weights_and_inputs() -> None:
    """A `state_dict()` and the tensors a module takes, those of dtypes that NumPy lacks too, give what their arrays give."""
    import torch

    def tensor(array: NDArray) -> torch.Tensor:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype.itemsize == 2 else torch.from_numpy(array)

    named: dict[str, torch.Tensor] = {}

    def fetch(name: str, type: object) -> NDArray:
        named[name] = tensor(weights(name, type))
        return weights(name, type)

    expected = assert_backends_agree(LAYER, fetch, inputs())
    assert {str(value.dtype) for value in named.values()} == {"torch.bfloat16", "torch.float32"}
    assert assert_backends_agree(LAYER, named, [tensor(array) for array in inputs()]) == expected


ZEROS = parse("""
module { stage=traced }

func @main(%a: f32[4], %b: f32[4]) {
  %most: f32[4] = maximum(%a, %b)
  %least: f32[4] = minimum(%a, %b)
  %zero: f32[] = literal([-0.0], [], f32)
  %same: f32[4] = maximum(%least, %zero)
  %more: f32[4] = exp(%same)
  return %most, %least, %more
}
""")
SIGNS = np.array([0.0, 0.0, -0.0, -0.0], np.float32), np.array([0.0, -0.0, 0.0, -0.0], np.float32)


@pytest.mark.parametrize("name", ["numpy", "numpy-f64", "triton"])
@pytest.mark.parametrize("passes", ["", "fuse"])
def test_zeros_have_an_order(name: str, passes: str) -> None:
    """0 exceeds -0, whatever the libraries beneath give."""
    most, least, _ = backends.get(name).run(dsc.apply(ZEROS, passes) if passes else ZEROS, weights, SIGNS)
    assert np.signbit(most).tolist() == [False, False, False, True]
    assert np.signbit(least).tolist() == [False, True, True, True]
