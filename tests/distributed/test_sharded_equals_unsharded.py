"""What the ranks of a mesh compute together is what one rank computes alone.

Sums run in float64, so that the order in which a rank adds has no say: what ranks do not add up with each other must be equal bit for
bit, and what they do add up may differ by the rounding of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsc
from dsc.ir.core import Builder, Module, Op, Value
from dsc.ir.mesh import Mesh, parse_mesh
from dsc.ir.ops.collective import AllReduce, AllToAll, AllToAllRows, Collective, OwnPart, ReduceScatter
from dsc.ir.ops.control import Pack
from dsc.ir.ops.elementwise import Add
from dsc.ir.ops.linalg import Matmul
from dsc.ir.ops.reduce import Sum
from dsc.passes.rewrite import rebuild

ULP = 2.0**-24


def shard(module: Module, mesh: str) -> Module:
    """The program of a rank, as its text says it; tokens go to their experts directly."""
    return dsc.parse(str(dsc.apply(module, f'shard-experts{{mesh="{mesh}",dispatch=direct}}')))


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert list(found) == list(expected)
    differing = [name for name in expected if not np.array_equal(found[name], expected[name])]
    assert not differing


def batch_of(mesh: str) -> int:
    """A sequence for each data-parallel rank, two where there is one."""
    return max(2, parse_mesh(mesh).dp)


FORWARD = ["dp=2", "ep=2", "ep=8", "dp=4,ep=2", "dp=8,ep=4", "ep=16"]


@pytest.mark.parametrize("passes", ["", "quantize-fp8"], ids=["bf16", "fp8"])
@pytest.mark.parametrize("mesh", FORWARD)
def test_experts_and_sequences_split_change_no_bit(mesh: str, passes: str, program: Any, run_whole: Any, run_ranks: Any) -> None:
    module = program(batch=batch_of(mesh), passes=passes)
    assert_same(run_ranks(module, shard(module, mesh)), run_whole(module))


@settings(max_examples=4)
@given(dp=st.sampled_from([1, 2, 3, 4]), ep=st.sampled_from([1, 2, 4, 8]), each=st.integers(1, 2), seq=st.sampled_from([5, 8]))
def test_any_mesh_that_fits(dp: int, ep: int, each: int, seq: int, program: Any, run_whole: Any, run_ranks: Any) -> None:
    dp = dp if dp % ep == 0 else ep
    module = program(batch=dp * each, seq=seq)
    assert_same(run_ranks(module, shard(module, f"dp={dp},ep={ep}")), run_whole(module))


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_serving_with_caches(mode: str, program: Any, run_whole: Any, run_ranks: Any) -> None:
    """Each rank has the caches, and the last tokens, of its own sequences: ranks exchange nothing but the rows of experts."""
    module = program(mode, batch=4)
    sharded = shard(module, "dp=4,ep=4")
    assert {op.name for f in sharded.funcs for op in f.ops if isinstance(op, Collective)} == {"all_to_all", "all_to_all_rows"}
    assert_same(run_ranks(module, sharded), run_whole(module))


class Parts:
    """What ranks hand to the reductions of main: how large the parts of a sum are, element by element."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.sizes: dict[str, list[Any]] = {}
        """By op, for each index along ep."""

    def observer(self, rank: int) -> Callable[..., None]:
        def observe(site: Any, op: Op, operands: Sequence[Any], results: Sequence[Any]) -> None:
            if site.func == "main" and isinstance(op, Add | AllReduce | ReduceScatter) and operands[0].dtype.kind == "f":
                found = self.sizes.setdefault(op.id, [0.0] * self.mesh.ep)
                found[self.mesh.index("ep", rank)] += sum(np.abs(x.astype(np.float64)) for x in operands)

        return observe

    def bound(self, value: Value) -> Any:
        """Of a result that ranks add up: a rounding of each part, of each partial sum before it, and of the sums, here and unsharded."""
        owner = value.owner
        if not isinstance(owner, AllReduce | ReduceScatter):
            return 0.0
        before = owner.x.owner
        sizes, roundings = (self.sizes[before.id], 6) if isinstance(before, Add) else (self.sizes[owner.id], 3)
        return ULP * roundings * (np.concatenate(sizes) if owner.axis == "edp" else sum(sizes))


def gradients_of(module: Module) -> dict[str, Value]:
    """The value that main packs as the gradient of each weight."""
    from dsc.ir.gradients import bundles

    found = {}
    for names, result in zip(bundles(module), module.main.results[-len(bundles(module)) :], strict=True):
        assert isinstance(result.owner, Pack)
        found |= {f"{name}.grad": value for name, value in zip(names, result.owner.values, strict=True)}
    return found


@pytest.mark.parametrize(
    ("mesh", "passes"), [("ep=2", ""), ("dp=4,ep=2", "weighted-swiglu"), ("dp=4", ""), ("ep=2", "weighted-swiglu,quantize-fp8")]
)
def test_losses_and_every_gradient(mesh: str, passes: str, program: Any, run_whole: Any, run_ranks: Any) -> None:
    """The gradient of an expert that one rank alone holds is a sum on that rank: it is equal, as are counts of tokens."""
    module = program("train", batch=batch_of(mesh), seq=128 if "fp8" in passes else 16, passes=passes)
    sharded, parts = shard(module, mesh), Parts(parse_mesh(mesh))
    found, expected = run_ranks(module, sharded, parts.observer), run_whole(module)
    assert list(found) == list(expected)
    gradients = gradients_of(sharded)
    exact = 0
    for name, value in expected.items():
        # A loss is a mean of means, each rounded, and what is made of it; counts are whole.
        of_loss = 0.0 if value.dtype.kind == "i" else 16 * ULP * float(np.max(np.abs(value)))
        limit = parts.bound(gradients[name]) if name in gradients else of_loss
        difference = np.abs(found[name].astype(np.float64) - value.astype(np.float64))
        assert np.max(difference - limit) <= 0, name
        exact += isinstance(limit, float) and limit == 0.0
    ep, dp = parse_mesh(mesh).ep, parse_mesh(mesh).dp
    assert exact > 1 if ep == dp else exact == 1


@pytest.mark.parametrize(("mesh", "mode"), [("dp=2,tp=2,ep=4", "prefill"), ("tp=4,ep=4", "train"), ("dp=2,tp=2,ep=2", "decode")])
def test_heads_split_differ_by_the_rounding_of_parts(mesh: str, mode: str, program: Any, run_whole: Any, run_ranks: Any) -> None:
    """A product whose sum ranks share is rounded part by part: as if it had an error of a rounding for each part, and one more."""
    module = program(mode, batch=8 if mode == "decode" else 2, dtype="float32")
    found, expected = run_ranks(module, shard(module, mesh)), run_whole(module)
    parts = parse_mesh(mesh).tp + 1
    spread = {name: 0.0 for name in expected}
    for seed in range(3):
        rng = np.random.default_rng(seed)

        def shaken(site: Any, op: Op, operands: Any, results: Any, rng: Any = rng) -> Any:
            if not isinstance(op, Matmul):
                return None
            errors = 1 + rng.choice([-1, 1], results[0].shape) * parts * ULP
            return ((results[0].astype(np.float64) * errors).astype(results[0].dtype),)

        for name, value in run_whole(module, shaken).items():
            spread[name] = max(spread[name], np.abs(value.astype(np.float64) - expected[name]).max())
    for name, value in expected.items():
        assert np.abs(found[name].astype(np.float64) - value).max() <= 2 * spread[name], name


def _without_turning(op: Op, b: Builder) -> Sequence[Value] | None:
    """Rows leave in the order of ranks, though they lie by expert."""
    if isinstance(op, AllToAllRows) and op.send.tensor.rank == 2:
        return b.emit(op.copy(send=b.emit(Sum(op.send, (1,))).result, id="")).results
    return None


def _without_order(op: Op, b: Builder) -> Sequence[Value] | None:
    """Rows stay in the order in which they come, by rank."""
    if isinstance(op, AllToAllRows) and op.recv.tensor.rank == 2:
        return b.emit(op.copy(recv=b.emit(Sum(op.recv, (1,))).result, id="")).results
    return None


def _without_sums(op: Op, b: Builder) -> Sequence[Value] | None:
    return b.emit(OwnPart(op.x, op.axis, op.size, op.dim)).results if isinstance(op, ReduceScatter) else None


def _without_losses(op: Op, b: Builder) -> Sequence[Value] | None:
    return (op.x,) if isinstance(op, AllReduce) and op.x.tensor.rank == 0 else None


def _without_counts(op: Op, b: Builder) -> Sequence[Value] | None:
    return (op.x,) if isinstance(op, AllToAll) else None


@pytest.mark.parametrize("fault", [_without_turning, _without_order, _without_sums, _without_losses, _without_counts])
def test_a_fault_is_seen(fault: Any, program: Any, run_whole: Any, run_ranks: Any) -> None:
    """Rows come back in the order in which they came, gradients and losses are added up, and ranks know what they receive."""
    module = program("train", batch=2, seq=8, layers=2)
    sharded = shard(module, "ep=2")
    broken = sharded.map(lambda func: rebuild(func, fault))
    assert broken != sharded
    expected = run_whole(module)
    try:
        found = run_ranks(module, broken)
    except dsc.DscError:
        return  # ranks that hold the same weight have other gradients, or rows do not fit
    assert any(not np.allclose(found[name], expected[name], rtol=1e-3, atol=0) for name in expected)


@pytest.mark.parametrize("passes", ["simplify", "recompute,simplify"])
def test_passes_that_follow_change_no_bit(passes: str, program: Any, run_ranks: Any) -> None:
    module = program("train", batch=2, seq=8)
    sharded = shard(module, "ep=2")
    after = dsc.apply(sharded, passes)
    assert after != sharded
    assert_same(run_ranks(module, after), run_ranks(module, sharded))


@pytest.mark.parametrize(
    ("mesh", "batch", "message"),
    [
        ("ep=3", 3, "ep=3 does not divide 16 experts; ep = 1, 2, 4, 8, 16 would fit"),
        ("ep=2,tp=3", 2, "tp=3 does not divide 4 heads; tp = 1, 2, 4 would fit"),
        ("dp=4", 6, "a batch of 6 does not divide over dp=4; a batch of 8 would fit"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_would(mesh: str, batch: int, message: str, program: Any) -> None:
    with pytest.raises(dsc.DscError, match=message) as caught:
        shard(program(batch=batch), mesh)
    assert "\n" not in str(caught.value)


def test_a_program_without_experts_says_so() -> None:
    module = dsc.parse("func @f(%x: f32[4, 2]) {\n  %y: f32[4, 2] = neg(%x)  @ f#1 F\n  return %y\n}\n")
    with pytest.raises(dsc.DscError, match="the program has no experts to shard; ep=1 would fit"):
        shard(module, "ep=2")
