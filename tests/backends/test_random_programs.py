"""Random programs: the reference against torch in float64, op by op, and the strategy itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsc import backends
from dsc.backends import Site
from dsc.backends.arrays import fits, rounded, widen
from dsc.ir.core import Module, Op
from dsc.ir.parser import parse
from dsc.ir.types import DType
from dsc.testing import assert_backends_agree
from dsc.testing.bounds import EXACT, FLOAT32, error, exact
from dsc.testing.programs import STEPS, programs
from dsc.testing.sampling import seeded

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

Arrays = tuple[np.ndarray, ...]
Program = tuple[Module, Arrays]

POINTWISE: dict[str, Callable[..., torch.Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "floor", "sigmoid", "relu")
    },
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "where")},
    "silu": F.silu,
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "not": torch.logical_not,
    "rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
}


def by_torch(op: Op, *xs: torch.Tensor) -> torch.Tensor | None:
    """One op on float64 tensors; None for what torch does otherwise."""
    given = op.attributes
    if op.name in POINTWISE:
        return POINTWISE[op.name](*xs)
    match op.name:
        case "sum" | "mean":
            return getattr(torch, op.name)(xs[0], dim=given["axes"], keepdim=given["keepdims"]) if given["axes"] else xs[0]
        case "max" | "min":
            return getattr(torch, f"a{op.name}")(xs[0], dim=given["axes"], keepdim=given["keepdims"]) if given["axes"] else xs[0]
        case "softmax" | "log_softmax" | "cumsum":
            return getattr(torch, op.name)(xs[0], dim=given["axis"])
        case "reshape":
            return xs[0].reshape(given["shape"])
        case "transpose":
            return xs[0].permute(given["perm"])
        case "broadcast":
            return xs[0].expand(given["shape"])
        case "slice":
            return xs[0].index_select(given["axis"], torch.arange(given["start"], given["stop"], given["step"]))
        case "concat":
            return torch.cat(xs, given["axis"])
        case "pad":
            pairs = [p for lo, hi in reversed(list(zip(given["low"], given["high"], strict=True))) for p in (lo, hi)]
            return F.pad(xs[0], pairs, value=given["value"])
        case "cast":
            narrow = {DType.bf16: torch.bfloat16, DType.f16: torch.float16, DType.f32: torch.float32, DType.f8e4m3: torch.float8_e4m3fn}
            single = xs[0].float()  # exact: no program here holds float64
            clamped = single.clamp(-448, 448) if given["dtype"] is DType.f8e4m3 else single
            return clamped.to(narrow[given["dtype"]]).double()
        case "matmul":
            return xs[0] @ (xs[1].mT if given["transpose_b"] else xs[1])
    return None


@few
@given(programs())
def test_the_reference_equals_torch_op_by_op(program: Program) -> None:
    module, inputs = program
    checked = 0

    def compare(site: Site, op: Op, operands: Arrays, results: Arrays) -> None:
        nonlocal checked
        if op.name in ("param", "literal"):
            return
        expected = by_torch(op, *(torch.from_numpy(np.array(exact(x))) for x in operands))
        assert expected is not None, f"{op.name} has no oracle here"
        checked += 1
        y, dtype = expected.numpy(), op.result.dtype
        if dtype is DType.bool:
            np.testing.assert_array_equal(results[0], y, err_msg=str(site))
            return
        e = np.zeros(y.shape) if type(op) in EXACT else error(op, FLOAT32, y, [exact(x) for x in operands])
        low, high = (widen(rounded(np.asarray(edge), dtype), np.float64) for edge in (y - e, y + e))
        x = widen(results[0], np.float64)
        assert ((low <= x) & (x <= high)).all(), f"{site}: {op}"

    backends.get("numpy").run(module, seeded, inputs, compare)
    assert checked


@few
@given(programs())
def test_the_two_interpreters_agree(program: Program) -> None:
    module, inputs = program
    assert_backends_agree(module, seeded, inputs)


@few
@given(programs())
def test_programs_survive_their_text(program: Program) -> None:
    module, _ = program
    assert parse(str(module)) == module


@few
@given(programs())
def test_every_value_of_a_program_is_returned_and_every_input_fits(program: Program) -> None:
    module, inputs = program
    for func in module.funcs:
        computed = {r for op in func.ops if op.name != "param" for r in op.results}
        assert computed <= set(func.results)
    assert all(map(fits, inputs, (p.type for p in module.main.params)))
    results = backends.get("numpy").run(module, seeded, inputs)
    assert all(map(fits, results, (r.type for r in module.main.results)))
    assert all(np.isfinite(widen(r)).all() for r in results if r.dtype.kind not in "iub"), "magnitudes are to stay moderate"


@few
@given(st.data())
def test_programs_are_made_of_what_is_asked_for(data: st.DataObject) -> None:
    steps = data.draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, unique=True))
    module, inputs = data.draw(programs(dtypes=(DType.f32,), steps=steps, calls=False))
    assert len(module.funcs) == 1
    assert {x.dtype for x in inputs} == {np.dtype(np.float32)}
    if "linear" not in steps and "norm" not in steps:
        assert all(op.name != "param" for op in module.main.ops)


def test_the_strategy_reaches_every_step_and_calls_and_high_ranks() -> None:
    names: set[str] = set()
    ranks: set[int] = set()
    extents: set[Any] = set()

    @settings(few, max_examples=300, database=None, derandomize=True)
    @given(programs())
    def collect(program: Program) -> None:
        for func in program[0].funcs:
            names.update(op.name for op in func.ops)
            ranks.update(r.tensor.rank for op in func.ops for r in op.results)
        extents.update(d for p in program[0].main.params for d in p.shape)

    collect()
    assert names >= {
        "call",
        "param",
        "literal",
        "cast",
        "matmul",
        "rms_norm",
        "softmax",
        "cumsum",
        "where",
        "pad",
        "concat",
        "transpose",
        "sum",
    }
    assert ranks >= {0, 1, 2, 3, 4}
    assert extents >= {1, 3, 131}


def test_seeded_weights_depend_on_the_name_and_the_type_alone() -> None:
    from dsc.testing.sampling import tensor

    first, again, other = (seeded(name, tensor("bf16[3, 4]")) for name in ("a.weight", "a.weight", "b.weight"))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
