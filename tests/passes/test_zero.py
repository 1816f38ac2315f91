"""ZeRO-1: which part of each gradient a rank gets, and that the ranks' updates together are the update of one rank that has all.

The sharded update runs after the sharded step, so that its inputs are what a rank really has. Sums run in float64: all that differs is the
rounding of the norm, which scales every gradient, where gradients are clipped; without clipping nothing may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.backends.numpy_ref.run import FLOAT64
from dsc.distributed import local
from dsc.driver.measure import flat
from dsc.driver.ranks import assembled, cut
from dsc.driver.train_program import Programs, assemble
from dsc.ir.core import Module
from dsc.ir.diagnostics import IRError
from dsc.ir.gradients import bundles
from dsc.ir.mesh import parse_mesh
from dsc.ir.ops.collective import AllGather, AllReduce, Collective, ReduceScatter
from dsc.ir.sharding import axes, input_splits, result_splits, weight_splits, whole
from dsc.ir.stages import NORM, READ, SQUARES, UPDATE, stages_of
from dsc.ir.types import DType, Tensor
from dsc.ir.walk import walk
from dsc.passes.manager import parse_pipeline, run_pipeline
from dsc.passes.optimizer import STATE, AdamW
from dsc.testing.sampling import seeded

MESHES = ["dp=4", "dp=4,ep=2", "dp=2,tp=2,ep=2", "dp=2,tp=2,ep=4", "dp=3,ep=1", "dp=6,ep=2"]


@cache
def step() -> Module:
    changes = ("num_hidden_layers=2", "hidden_size=48", "n_routed_experts=8", "moe_intermediate_size=24", "intermediate_size=64")
    module = dsc.trace("deepseek-v3-tiny", mode="train", batch=12, seq=4, overrides=changes)
    return dsc.apply(module, "simplify,autodiff,simplify")


@cache
def programs(mesh: str = "", zero: int = 1, adamw: AdamW | None = None) -> Programs:
    """Those of a rank."""
    if not mesh:
        return assemble(step(), {}, adamw)
    made = assemble(dsc.apply(step(), f'shard-experts{{mesh="{mesh}",zero={zero}}}'), {}, adamw)
    for module in (made.update, *made.averages):
        assert dsc.parse(str(module)) == module
    return made


def reductions(module: Module) -> list[Collective]:
    """The collectives at the end of main, metrics apart."""
    return [
        op for op in module.main.ops if isinstance(op, AllReduce | ReduceScatter) and op.result.tensor.rank and op.result.dtype.is_float
    ]


@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_end_scattered_over_the_ranks_that_share_a_weight(mesh: str) -> None:
    made, sizes = programs(mesh), parse_mesh(mesh)
    held = weight_splits(made.step)
    for name, split in made.state_splits.items():
        kind = "edp" if ".experts." in name and ".shared_experts." not in name else "dp"
        added = set(axes(split)) - set(axes(held[name]))
        extents = [d for d in made.weights[name].shape if isinstance(d, int)]
        fits = any(d % (sizes.size(kind) * max(1, sizes.size("tp" if kind == "dp" else "ep"))) == 0 for d in extents)
        assert kind in added or sizes.size(kind) == 1 or not fits, name
        assert added <= {kind, "tp"}, name
    assert any(isinstance(op, ReduceScatter) for op in reductions(made.step))
    reduced = programs(mesh, zero=0)
    assert not any(isinstance(op, ReduceScatter) and op.axis in ("dp", "edp") for op in reductions(reduced.step))
    assert all({"dp", "edp"}.isdisjoint(axes(split)) for split in reduced.state_splits.values())


def test_what_does_not_divide_is_cut_elsewhere_or_stays_whole() -> None:
    """Over 5 ranks: 10 x 4 is cut along its rows, 4 x 10 along its columns, 4 x 4 and 4 not at all."""
    text = """func @main(%x: f32[5, 4]) {
      %a: f32[10, 4] = param("a")  @ main#1 F
      %b: f32[4, 10] = param("b")  @ main#2 F
      %c: f32[4, 4] = param("c")  @ main#3 F
      %d: f32[4] = param("d")  @ main#4 F
      %p: f32[5, 10] = matmul(%x, %a, transpose_b=true)  @ main#5 F
      %q: f32[5, 4] = matmul(%p, %b, transpose_b=true)  @ main#6 F
      %r: f32[5, 4] = matmul(%q, %c)  @ main#7 F
      %s: f32[5, 4] = mul(%r, %d)  @ main#8 F
      %loss: f32[] = mean(%s, axes=[0, 1])  @ main#9 F
      return %loss
    }"""
    done = run_pipeline(dsc.parse(text), parse_pipeline('autodiff,shard-experts{mesh="dp=5"}'))
    made = assemble(done.module, {})
    assert made.state_splits == {"a": ("dp",), "b": ("", "dp"), "c": (), "d": ()}
    assert [str(line) for line in done.records[-1].declined] == [
        "@main c: no dimension of [4, 4] divides over dp=5: each of them keeps all of its state",
        "@main d: no dimension of [4] divides over dp=5: each of them keeps all of its state",
    ]
    same_as_one_rank(assemble(dsc.apply(dsc.parse(text), "autodiff"), {}), made)


def stepped(made: Programs, rounds: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last of some updates, by result name, from whole results put together: gradients are seeded, counts too."""
    update, mesh = made.update, made.mesh
    names = ["norm", *(f"{name}.{what}" for name in made.trained for what in ("weight", *STATE)), *made.gates]
    names += [f"{name} of stage {i}" for i, stage in enumerate(made.stages) for name in stage.reads]
    values = {p.name: seeded(p.name, t) for p, t in zip(update.main.params, whole_types(made), strict=True)}
    values |= {name: np.abs(x) for name, x in values.items() if name.endswith("variance")}
    scalars = (3e-3, *made.adamw.corrections(1), 1e-3)
    values |= {name: np.array(value, np.float32) for name, value in zip(list(values)[: 4 if made.gates else 3], scalars, strict=False)}
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        given = list(values.values())
        if mesh.world == 1:
            results = FLOAT64.run(update, no_weights, given)
        else:
            splits = input_splits(update)

            def one(rank: int, given: Sequence[Any] = given, splits: Any = splits) -> Any:
                return FLOAT64.program(update, no_weights, tuple(cut(x, s, mesh, rank) for x, s in zip(given, splits, strict=True)))

            results = assembled(update, local.run(mesh, one))
        found.append(dict(zip(names, flat(results), strict=True)))
        params = [p.name for p in update.main.params]
        values |= {params[p]: results[r] for p, r in update.main.updates.items()}
    return found[0], found[-1]


def whole_types(made: Programs) -> list[Tensor]:
    types = [p.tensor for p in made.update.main.params]
    return [whole(t, s, made.mesh) for t, s in zip(types, input_splits(made.update), strict=True)]  # type: ignore[misc]


def no_weights(name: str, tensor: Tensor) -> np.ndarray:
    raise AssertionError(f"the optimiser reads no weight, but asks for {name}")


def same_as_one_rank(alone: Programs, made: Programs) -> None:
    """Every result of two updates, bit for bit; the norm to the rounding of its parts."""
    for one, many in zip(stepped(alone), stepped(made), strict=True):
        assert list(one) == list(many)
        parts = 2 + made.mesh.world  # a rounding for each rank's sum, of their sum and of the root
        assert float(many.pop("norm")) == pytest.approx(float(one.pop("norm")), rel=parts * 2.0**-24)
        differing = [name for name in one if not np.array_equal(one[name], many[name])]
        assert not differing


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_ranks_update_what_one_rank_would(mesh: str, zero: int) -> None:
    """Gradients are not clipped, so that no norm scales them."""
    free = AdamW(clip=float("inf"))
    same_as_one_rank(programs(adamw=free), programs(mesh, zero, free))


def test_a_clipped_update_differs_by_the_rounding_of_the_norm() -> None:
    one, _ = stepped(programs())
    many, _ = stepped(programs("dp=4,ep=2"))
    assert float(one["norm"]) > 1
    for name, expected in one.items():
        found, limit = many[name].astype(np.float64), 16 * 2.0**-24 if expected.dtype == np.float32 else 2.0**-7
        assert np.abs(found - expected.astype(np.float64)).max() <= limit * np.abs(expected.astype(np.float64)).max(), name


def test_the_update_by_stages_runs_from_top_to_bottom_too() -> None:
    """Calls of the stages' functions, in a module that prints and parses; a rank that runs it all gets what one rank would."""
    free = AdamW(clip=float("inf"))
    made = assemble(dsc.apply(step(), 'split-stages{stages=2},shard-experts{mesh="pp=2,dp=2,ep=2"}'), {}, free)
    assert dsc.parse(str(made.update)) == made.update
    assert [list(calls) for calls in stages_of(made.update).calls] == [[SQUARES, NORM, UPDATE], [SQUARES, UPDATE, READ]]
    assert made.stages[1].reads == ("model.embed_tokens.weight",)
    assert sorted(name for stage in made.stages for name in stage.weights) == sorted(made.trained)
    for one, many in zip(stepped(programs(adamw=free)), stepped(made), strict=True):
        copy = many.pop("model.embed_tokens.weight of stage 1")
        assert np.array_equal(copy, one["model.embed_tokens.weight.weight"])
        assert float(many.pop("norm")) == pytest.approx(float(one.pop("norm")), rel=6 * 2.0**-24)
        assert not [name for name in one if not np.array_equal(one[name], many[name])]


def test_updates_name_what_is_replaced() -> None:
    made = programs("dp=4,ep=2")
    main = made.update.main
    assert len(main.updates) == 3 * len(made.trained) + len(made.gates)
    for param, result in main.updates.items():
        assert main.params[param].type == main.results[result].type
        assert input_splits(made.update)[param] == result_splits(made.update)[result]


def test_weights_are_gathered_in_the_dtype_in_which_they_are_read() -> None:
    made = programs("dp=4,ep=2")
    gathers = [op for _, _, op in walk(made.update) if isinstance(op, AllGather)]
    assert len(gathers) == len(made.trained)
    wide = sum(made.weights[name].dtype is DType.f32 for name in made.trained)
    assert sum(op.x.dtype is DType.f32 for op in gathers) == wide
    norms = [op for _, _, op in walk(made.update) if isinstance(op, AllReduce)]
    assert [op.x.type for op in norms] == [Tensor(DType.f32, ())] * len(norms), "the norm alone is added up, number by number"
    assert 1 <= len(norms) <= 3


def test_a_gradient_has_to_be_as_large_as_its_weight() -> None:
    """A law of the stage: of both the whole is compared."""
    made = programs("dp=4,ep=2").step
    assert len(bundles(made)) > 0
    wrong = str(made).replace('[["dp"]]', "[[]]", 1)
    with pytest.raises(IRError, match=r"holds the gradients of model.embed_tokens.weight: expected bundle\{f32\[320, 48\]\}, found"):
        dsc.parse(wrong)


def test_mapping_of_states() -> None:
    """Every trained weight has a state, and nothing else."""
    made = programs("dp=2,tp=2,ep=2")
    splits: Mapping[str, Any] = made.state_splits
    assert set(splits) == set(made.trained)
