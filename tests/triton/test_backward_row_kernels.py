"""The kernels of gradients that go row by row against numpy_ref within the derived bound, and against torch.autograd in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from dsc import backends
from dsc.backends.arrays import rounded, widen
from dsc.backends.triton import registry
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.registry import Launch
from dsc.backends.triton.run import Executor, machine
from dsc.driver.measure import same_bits
from dsc.ir.core import Func, Module, Op, Value
from dsc.ir.ops.elementwise import SwiGLUBackward
from dsc.ir.ops.loss import CrossEntropyBackward
from dsc.ir.ops.moe import RouteBackward, RowWeights, SlotWeights
from dsc.ir.ops.norm import RmsNormBackward
from dsc.ir.ops.shape import IndexAdd
from dsc.ir.types import Bundle, DType, Tensor
from dsc.testing.bounds import bound

TRITON, NUMPY = Executor(poison=True), backends.get("numpy")
BF16, F32, I32, I64 = DType.bf16, DType.f32, DType.i32, DType.i64
both_dtypes = pytest.mark.parametrize("dtype", [BF16, F32])


def value(dtype: DType, *shape: int) -> Value:
    return Value(Tensor(dtype, shape), "x")


def normal(dtype: DType, *shape: int, seed: int = 0) -> np.ndarray:
    return rounded(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def excess(op: Op, *operands: Any) -> list[float]:
    """How far beyond the bound each result lies from the reference's, at most; NaN has to be at the same places."""
    func = Func("f", tuple(dict.fromkeys(op.operands)), (op,), op.results)
    (step,) = plan_function(Module((func,)), func, [layout_of(p.type) for p in func.params], machine()[0], {}).steps
    assert (step.how, step.declined) == ("kernel", "")
    found, expected, over = TRITON.evaluate(op, operands), NUMPY.evaluate(op, operands), []
    for x, y, permitted in zip(found, expected, bound(op, operands, expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        x, y = widen(x, np.float64), widen(y, np.float64)
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        with np.errstate(invalid="ignore"):
            over.append(float(np.nan_to_num(np.where(x == y, 0.0, np.abs(x - y) - permitted)).max(initial=0.0)))
    return over


def norm_backward(dtype: DType, rows: int, columns: int) -> tuple[Op, tuple[np.ndarray, ...]]:
    op = RmsNormBackward(value(dtype, rows, columns), value(F32, columns), value(dtype, rows, columns), 1e-6)
    return op, (normal(dtype, rows, columns), normal(F32, columns), normal(dtype, rows, columns, seed=1))


def swiglu_backward(dtype: DType) -> tuple[Op, tuple[np.ndarray, ...]]:
    """Gates from far below to far above zero, infinite ones too."""
    gate = rounded(np.linspace(-120, 120, 5000), dtype)
    gate[[0, -1]] = -np.inf, np.inf
    return SwiGLUBackward(*(value(dtype, 5000) for _ in range(3))), (gate, normal(dtype, 5000), normal(dtype, 5000, seed=1))


def row_weights(tokens: int, k: int, back: bool = False) -> tuple[Op, tuple[Any, ...]]:
    rows = tokens * k
    order = np.random.default_rng(rows).permutation(rows).astype(np.int32)
    handle = Value(Bundle((Tensor(I32, (rows,)),)), "handle")
    op = SlotWeights(value(F32, rows, 1), handle, k) if back else RowWeights(value(F32, tokens, k), handle)
    return op, (normal(F32, *op.operands[0].shape), (order,))


def route_backward(tokens: int, experts: int, k: int, **attributes: Any) -> tuple[Op, tuple[np.ndarray, ...]]:
    ids = np.argsort(np.random.default_rng(experts).standard_normal((tokens, experts)), 1)[:, :k].astype(np.int32)
    op = RouteBackward(value(F32, tokens, experts), value(I32, tokens, k), value(F32, tokens, k), **attributes)
    return op, (normal(F32, tokens, experts) * np.float32(4), ids, normal(F32, tokens, k))


def entropy_backward(dtype: DType, tokens: int, columns: int) -> tuple[Op, tuple[np.ndarray, ...]]:
    """The largest logits come last, so that every block rescales; every third token does not count."""
    rng = np.random.default_rng(tokens)
    logits = rounded(rng.standard_normal((tokens, columns)) * 5 + np.linspace(-40, 40, columns), dtype)
    labels = rng.integers(0, columns, tokens)
    labels[1::3] = -100
    op = CrossEntropyBackward(value(dtype, tokens, columns), value(I64, tokens), value(F32))
    return op, (logits, labels, np.array(1024, np.float32))


def index_add(dtype: DType, size: int, rows: int, *rest: int) -> tuple[Op, tuple[np.ndarray, ...]]:
    indices = np.random.default_rng(rows).integers(0, size, rows)
    op = IndexAdd(value(dtype, size, *rest), value(I64, rows), value(dtype, rows, *rest))
    return op, (normal(dtype, size, *rest), indices, normal(dtype, rows, *rest, seed=1))


@pytest.mark.parametrize(
    ("dtype", "rows", "columns"), [(F32, 1, 1), (F32, 300, 5), (BF16, 300, 5), (BF16, 7, 7168), (BF16, 270, 1100), (F32, 0, 9)]
)
def test_rms_norm_backward(dtype: DType, rows: int, columns: int) -> None:
    """Rows of one program and of several, and more than one for some."""
    op, operands = norm_backward(dtype, rows, columns)
    assert excess(op, *operands) == [0, 0]


@both_dtypes
def test_swiglu_backward_of_gates_of_any_size(dtype: DType) -> None:
    op, operands = swiglu_backward(dtype)
    assert excess(op, *operands) == [0, 0]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (37, 8), (700, 3), (0, 4)])
def test_row_weights(tokens: int, k: int, back: bool) -> None:
    op, operands = row_weights(tokens, k, back)
    assert excess(op, *operands) == [0]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 1, 1), (37, 256, 8), (5, 160, 6), (9, 33, 33)])
def test_route_backward(score: str, normalize: bool, tokens: int, experts: int, k: int) -> None:
    op, operands = route_backward(tokens, experts, k, score=score, normalize=normalize, scale=2.5)
    assert excess(op, *operands) == [0]


@both_dtypes
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (9, 131), (5, 9000)])
def test_cross_entropy_backward_over_several_blocks(dtype: DType, tokens: int, columns: int) -> None:
    op, operands = entropy_backward(dtype, tokens, columns)
    assert excess(op, *operands) == [0]


def test_cross_entropy_backward_of_infinite_logits_and_no_numbers() -> None:
    """A block of -infinity has no gradient; a NaN stays in its row, and a row that does not count is 0 whatever it holds."""
    op, (logits, labels, dloss) = entropy_backward(F32, 3, 9000)
    logits[0, :5000] = -np.inf
    logits[1, 8000] = np.nan
    labels[0] = 8000
    assert excess(op, logits, labels, dloss) == [0]
    assert excess(op, logits, np.full_like(labels, -100), dloss) == [0]
    assert excess(op, logits, np.array([8000, 3, 5]), dloss) == [0]


@pytest.mark.parametrize("dtype", [BF16, F32, DType.f16])
@pytest.mark.parametrize("shape", [(5, 300, 7), (40, 50, 2, 1100), (1, 33), (9, 0, 3)])
def test_index_add_keeps_the_order(dtype: DType, shape: tuple[int, ...]) -> None:
    """Many updates of few rows, and few of many: the bits are those of adding one after the other."""
    op, operands = index_add(dtype, *shape)
    assert excess(op, *operands) == [0]
    assert same_bits(TRITON.evaluate(op, operands)[0], NUMPY.evaluate(op, operands)[0])


def by_autograd(function: Callable[..., torch.Tensor], gradient: np.ndarray, *leaves: np.ndarray) -> list[np.ndarray]:
    given = [torch.from_numpy(x).double().requires_grad_() for x in leaves]
    function(*given).backward(torch.from_numpy(gradient).double())
    return [np.asarray(x.grad) for x in given]


def cases() -> Iterator[tuple[Op, tuple[np.ndarray, ...], list[np.ndarray]]]:
    op, (x, w, dy) = norm_backward(F32, 20, 70)
    yield op, (x, w, dy), by_autograd(lambda x, w: torch.nn.functional.rms_norm(x, (70,), w, 1e-6), dy, x, w)
    gate, up, dy = (normal(F32, 500, seed=i) for i in range(3))
    op = SwiGLUBackward(*(value(F32, 500) for _ in range(3)))
    yield op, (gate, up, dy), by_autograd(lambda g, u: torch.nn.functional.silu(g) * u, dy, gate, up)
    op, (logits, labels, dloss) = entropy_backward(F32, 9, 131)
    wanted = by_autograd(lambda x: torch.nn.functional.cross_entropy(x, torch.from_numpy(labels)), dloss, logits)
    yield op, (logits, labels, dloss), wanted
    op, (logits, ids, dweights) = route_backward(13, 24, 6, normalize=True, scale=2.5)

    def weights(logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.sigmoid(logits).gather(1, torch.from_numpy(ids).long())
        return chosen / (chosen.sum(1, keepdim=True) + 1e-20) * 2.5

    yield op, (logits, ids, dweights), by_autograd(weights, dweights, logits)


@pytest.mark.parametrize("case", list(cases()), ids=lambda c: c[0].name)
def test_gradients_are_those_of_torch_in_float64(case: tuple[Op, tuple[np.ndarray, ...], list[np.ndarray]]) -> None:
    op, operands, wanted = case
    found = TRITON.evaluate(op, operands)
    for x, y, permitted in zip(found, wanted, bound(op, operands, found), strict=True):
        assert (np.abs(x - y) <= permitted + np.spacing(np.abs(y).astype(np.float32))).all()


def changed(launch: Launch, *, constants: dict[str, Any] | None = None, **arguments: Any) -> Launch:
    """The launch with what it has of these names replaced."""
    fitting = {k: v for k, v in arguments.items() if k in launch.arguments}
    constants = {k: v for k, v in (constants or {}).items() if k in launch.constants}
    return replace(launch, arguments={**launch.arguments, **fitting}, constants={**launch.constants, **constants})


FAULTS: dict[str, tuple[tuple[Op, tuple[Any, ...]], Callable[[Launch], Launch]]] = {
    "rms_norm_backward: another eps": (norm_backward(F32, 9, 8), lambda launch: changed(launch, eps=0.1)),
    "rms_norm_backward: a program's rows lost": (
        norm_backward(BF16, 9, 1100),
        lambda launch: changed(launch, programs=launch.arguments.get("programs", 1) - 1),  # type: ignore[operator]
    ),
    "slot_weights: as if the order were its inverse": (
        row_weights(9, 2, back=True),
        lambda launch: changed(launch, constants={"BACK": False}),
    ),
    "route_backward: not normalised": (
        route_backward(9, 33, 6, normalize=True),
        lambda launch: changed(launch, constants={"NORMALIZE": False}),
    ),
    "cross_entropy_backward: ignored tokens counted": (
        entropy_backward(BF16, 9, 131),
        lambda launch: launch if "LOGITS" in launch.arguments else changed(launch, constants={"IGNORE": -1}),
    ),
    "cross_entropy_backward: columns past a block left out": (
        entropy_backward(F32, 2, 9000),
        lambda launch: changed(launch, columns=8999) if launch.arguments.get("LOGITS") else launch,
    ),
    "index_add: the last row lost": (index_add(F32, 5, 40, 7), lambda launch: changed(launch, rows=39)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_notices_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (op, operands), change = FAULTS[fault]
    assert not any(excess(op, *operands))
    launcher = registry.KERNELS[type(op)]

    def faulty(*given: Any) -> tuple[Launch, ...]:
        found = launcher(*given)
        return tuple(map(change, (found,) if isinstance(found, Launch) else found))  # type: ignore[arg-type]

    monkeypatch.setitem(registry.KERNELS, type(op), faulty)
    assert any(over > 0 for over in excess(op, *operands))
