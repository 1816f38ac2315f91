"""Training on meshes: the curve of one rank, checkpoints that fit any mesh, and what a rank reads of them.

Sums run in float64 here. Then ranks and one rank differ by the rounding of the parts that ranks add up, in losses and in gradients. How far
that carries is measured, not guessed: runs of one rank whose gradients are off by as much, in seeded directions, go apart from the exact
one, and ranks may be twice as far away as they have been.
"""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc import DscError
from dsc.backends.numpy_ref.run import FLOAT64
from dsc.driver import compile, train_program
from dsc.driver.curve import read
from dsc.driver.memory import training
from dsc.driver.train import Outcome, train
from dsc.driver.train_program import Programs
from dsc.driver.train_ranks import Lockstep
from dsc.driver.train_state import checkpoints, folder_of, load, save
from dsc.ir.core import Builder, Module, Op
from dsc.ir.gradients import bundles
from dsc.ir.ops.control import Literal
from dsc.ir.ops.elementwise import Add
from dsc.ir.ops.shape import Concat
from dsc.models.checkpoint import save_checkpoint
from dsc.models.safetensors_file import SafetensorsFile
from dsc.passes.rewrite import Rule, rebuild

TEXT = pydoc_data.topics.__file__
SMALL = ("num_hidden_layers=2", "hidden_size=48", "n_routed_experts=8", "moe_intermediate_size=24", "intermediate_size=64")
ULP = 2.0**-24
COLUMNS = ("loss", "gradient_norm")
Train = Callable[..., Outcome]


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Programs]:
    """`train_program.programs`, each program made once, and each model traced once."""
    traced = cache(compile.read)

    @cache
    def made(source: str | Path, **options: Any) -> Programs:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compile, "read", traced)
            return train_program.programs(source, **options)

    return made


@pytest.fixture
def short(compiled: Callable[..., Programs], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Train:
    """`short("run", mesh="dp=4")`: train a small model into tmp_path / "run", on all ranks in this process."""
    monkeypatch.setattr("dsc.driver.train.programs", compiled)
    monkeypatch.setattr("dsc.driver.curve.draw", lambda *_: None)  # a third of the time of a run of a few steps

    def run(out: str = "run", mesh: str | None = None, **options: Any) -> Outcome:
        given: dict[str, Any] = {"steps": 4, "batch": 4, "seq": 8, "learning_rate": 2e-3, "overrides": SMALL, "backend": "numpy-f64"}
        given |= options
        ranks = "local" if mesh else None
        source, data = given.pop("source", "deepseek-v3-tiny"), given.pop("data", (TEXT,))
        return train(source, data, tmp_path / out, mesh=mesh, ranks=ranks, **given)

    return run


def curve(run: Path) -> np.ndarray:
    """float64 [steps, columns]."""
    return np.array([[float(row[name]) for name in COLUMNS] for row in read(run / "loss.csv")])


def shaken(monkeypatch: pytest.MonkeyPatch, seed: int, parts: int) -> None:
    """Make every gradient of the runs that follow off by a rounding for each part and one for their sum."""
    rng, exact = np.random.default_rng(seed), FLOAT64.program

    def shake(gradient: np.ndarray) -> np.ndarray:
        return (gradient * (1 + rng.choice([-1, 1], gradient.shape) * (parts + 1) * ULP)).astype(gradient.dtype)

    def program(self: Any, module: Any, *rest: Any) -> Any:
        results = yield from exact(module, *rest)
        count = len(bundles(module))
        if not count:
            return results
        off = [tuple(map(shake, bundle)) for bundle in results[-count:]]
        return (*results[:-count], *off)

    monkeypatch.setattr(type(FLOAT64), "program", program)


def assert_as_near_as_shaken_runs(found: Outcome, whole: Outcome, short: Train, monkeypatch: Any, **options: Any) -> None:
    """At each step at most twice as far from `whole` as the worst of three shaken runs has been by then, but for a rounding of losses."""
    expected, farthest = curve(whole.run), np.zeros_like(curve(whole.run))
    for seed in range(3):
        run = whole.run.with_name(f"shaken {seed}")
        if not run.exists():
            with monkeypatch.context() as patch:
                shaken(patch, seed, 4)
                short(run.name, **options)
        farthest = np.maximum(farthest, np.abs(curve(run) - expected))
    bound = 16 * ULP * expected + 2 * np.maximum.accumulate(farthest)
    assert (bound[:, 0] < 1e-2 * expected[:, 0]).all(), "a bound as large as the loss says nothing"
    assert (np.abs(curve(found.run) - expected) <= bound).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("dp=4", {"overrides": (*SMALL, "dtype=float32")}),
        ("dp=4,ep=2", {"ema": 0.75}),
        ("dp=2,ep=2", {"recipe": "deepseek-v3", "seq": 128, "batch": 2, "steps": 3}),
    ],
)
def test_the_curve_is_that_of_one_rank(short: Train, monkeypatch: pytest.MonkeyPatch, mesh: str, options: dict[str, Any]) -> None:
    """In FP8 too, where each expert is on one rank: tiles along the rows of an expert begin anew on each that holds it."""
    whole, found = short("one", **options), short("many", mesh, **options)
    assert_as_near_as_shaken_runs(found, whole, short, monkeypatch, **options)


@pytest.mark.slow
def test_a_checkpoint_is_the_same_from_any_mesh(short: Train, compiled: Callable[..., Programs], tmp_path: Path) -> None:
    """What one rank wrote, read on all ranks of a mesh and written again, has the bytes that it had: no part is lost or moved."""
    first = short("one", steps=1, ema=0.5)
    settings = json.loads((first.checkpoint / "state.json").read_text())["settings"]
    for mesh in ("dp=4,ep=2", "dp=2,tp=2,ep=4", "pp=2,dp=2,ep=2"):
        made = compiled("deepseek-v3-tiny", batch=4, seq=8, recipe=None, overrides=SMALL, mesh=str(dsc.ir.mesh.parse_mesh(mesh)))
        team = Lockstep(made.mesh)
        state, averages = load(first.checkpoint, made, settings, team.mine)
        assert len(state.held) == made.mesh.world
        run = tmp_path / mesh
        (run / "checkpoints").mkdir(parents=True)
        saved = save(run, state, averages, made, settings, {}, team)
        for file in saved.rglob("*.safetensors"):
            same = file.read_bytes() == (first.checkpoint / file.relative_to(saved)).read_bytes()
            assert same, f"{mesh}: {file.name}"
        elements = sum(x.size for kept in state.held[0].kept.values() for x in kept[:1])
        whole = sum(t.size for name, t in made.weights.items() if name in made.trained)
        assert elements <= whole / 2 * 1.01, "a rank keeps the state of its parts alone"


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(short: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """dp=4, then dp=2 with ep=2, then one rank, stopped in between: the curve of the run that was never cut."""
    whole, run, said = short("whole", steps=6), tmp_path / "run", list[str]()

    class Stop(Exception):
        pass

    def stop(at: int) -> Callable[..., None]:
        def on_step(step: int, row: Any) -> None:
            if step == at:
                raise Stop

        return on_step

    for mesh, until in (("dp=4", 2), ("dp=2,ep=2", 4)):
        with pytest.raises(Stop):
            short("run", mesh, steps=6, resume=True, batch=None if until == 4 else 4, on_step=stop(until), on_note=said.append)
        assert checkpoints(run)[-1] == folder_of(run, until)
    found = short("run", steps=6, resume=True, batch=None, on_note=said.append)
    assert said == [
        f"{run}: goes on with mesh pp=1,dp=2,ep=2,tp=1, was pp=1,dp=4,ep=1,tp=1: sums are added up in another order",
        f"{run}: goes on with mesh pp=1,dp=1,ep=1,tp=1, was pp=1,dp=2,ep=2,tp=1: sums are added up in another order",
    ]
    assert_as_near_as_shaken_runs(found, whole, short, monkeypatch, steps=6)
    assert json.loads((run / "settings.json").read_text())["mesh"] == "pp=1,dp=1,ep=1,tp=1"


@pytest.mark.slow
def test_a_number_that_is_not_finite_is_traced_to_its_rank(short: Train, tmp_path: Path) -> None:
    """The experts that rank 1 alone holds have a NaN each."""
    first = short("first", steps=1)
    weights = {name: np.array(tensor.array()) for name, tensor in SafetensorsFile(first.checkpoint / "model.safetensors").tensors.items()}
    for expert in range(4, 8):
        weights[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"][3, 5] = np.nan
    save_checkpoint(tmp_path / "damaged", weights, json.loads((first.checkpoint / "config.json").read_text()))
    with pytest.raises(DscError) as error:
        short("run", "dp=2,ep=2", source=tmp_path / "damaged", overrides=())
    kept = tmp_path / "run" / "checkpoints" / "step-00000000"
    first_op = "param at @training_moe_layer_fwd (model.layers.1) mlp.experts#4 on rank 1"
    said = (
        f"step 1: the loss is nan; the first op to make a number that is not finite is {first_op}; the state after step 0 is kept in {kept}"
    )
    assert str(error.value) == said
    assert kept.is_dir()


def files(run: Outcome) -> dict[str, bytes]:
    """The tensors of the last checkpoint."""
    return {str(file.relative_to(run.checkpoint)): file.read_bytes() for file in run.checkpoint.rglob("*.safetensors")}


def differing(one: Outcome, other: Outcome) -> list[str]:
    """The files of the last checkpoints, and columns of the curves, that are not the same to the bit."""
    a, b = files(one), files(other)
    assert a.keys() == b.keys()
    rows = zip(read(one.run / "loss.csv"), read(other.run / "loss.csv"), strict=True)
    columns = {name for x, y in rows for name in x if name != "tokens_per_second" and x[name] != y[name]}
    return [*(name for name in a if a[name] != b[name]), *sorted(columns)]


ONE = {"schedule": "gpipe", "microbatches": 1}
"""One micro-batch: then every sum is made in the order of a mesh without pp."""


@pytest.mark.parametrize(
    ("mesh", "options", "piped"),
    [
        ("dp=2,ep=2", {"steps": 3, "ema": 0.5}, {}),
        pytest.param("dp=2,tp=2,ep=2", {"steps": 2, "recipe": "deepseek-v3"}, {"recompute": "deepseek"}, marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_updates_as_a_mesh_without_it(short: Train, mesh: str, options: dict[str, Any], piped: dict[str, Any]) -> None:
    """Bit for bit: gradients of what both stages read, the norm of all, gates, weights, state and averages, and what is run again."""
    whole = short("dp", mesh, **options)
    assert differing(short("piped", f"pp=2,{mesh}", **options, **piped, **ONE), whole) == []


@pytest.mark.slow
def test_micro_batches_in_fp8(short: Train) -> None:
    """Of a V of four stages on two ranks and of one rank that accumulates: their tiles are the same, and those of a whole batch are others.

    The loss is a mean of four numbers; of the gradients those of the embedding, which two stages read, are added up in another order.
    """
    orders: tuple[tuple[str, dict[str, Any]], ...] = (("dp=1", {}), ("pp=2", {"schedule": "dualpipev"}), ("dp=1", {"microbatches": 1}))
    fp8 = {"steps": 1, "recipe": "deepseek-v3"}
    one, piped, whole = (curve(short(f"{i}", mesh, **fp8, **{"microbatches": 4, **order}).run)[0] for i, (mesh, order) in enumerate(orders))
    assert (np.abs(piped - one) <= [4 * ULP * one[0], 16 * ULP * one[1]]).all()
    assert abs(whole[1] - one[1]) > 64 * ULP * one[1], "if batches in other tiles were as near, this would say nothing"


def test_running_again_takes_memory_and_no_bit(short: Train, compiled: Callable[..., Programs]) -> None:
    """By the report's list, and within a budget between what that leaves and the least that there is."""

    def most(**options: Any) -> int:
        step = compiled("deepseek-v3-tiny", batch=4, seq=8, recipe=None, overrides=SMALL, mesh=None, **options).step
        return int(training(step)["activation_peak_bytes"])

    everything, whole = most(), short("whole", steps=2)
    limit = int(0.8 * everything)
    for bound, option in {everything - 1: {"recompute": "deepseek"}, limit: {"budget_gb": limit / 1e9}}.items():
        assert differing(short(f"{bound}", steps=2, **option), whole) == []
        assert most(**option) <= bound


def test_a_pipeline_goes_on_without_one_and_back(short: Train, tmp_path: Path) -> None:
    """Two stages, then one rank, then two stages: the curve and the checkpoint of one rank that was never stopped."""
    said: list[str] = []
    for steps, mesh in ((1, "pp=2"), (2, None), (3, "pp=2")):
        record = tmp_path / "run" / "settings.json"
        if record.exists():  # the length of a run is a setting: here it is cut where it would have been stopped
            record.write_text(record.read_text().replace(f'"steps": {steps - 1}', f'"steps": {steps}'))
            state = checkpoints(tmp_path / "run")[-1] / "state.json"
            state.write_text(state.read_text().replace(f'"steps": {steps - 1}', f'"steps": {steps}'))
        found = short("run", mesh, steps=steps, resume=steps > 1, on_note=said.append, **(ONE if mesh else {}))
    assert [line.partition("goes on with mesh ")[2] for line in said] == [
        "pp=1,dp=1,ep=1,tp=1, was pp=2,dp=1,ep=1,tp=1, gpipe of 1 micro-batches: sums are added up in another order",
        "pp=2,dp=1,ep=1,tp=1, gpipe of 1 micro-batches, was pp=1,dp=1,ep=1,tp=1: sums are added up in another order",
    ]
    assert differing(found, short("one", steps=3)) == []


def test_micro_batches_and_schedules(short: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages on both ranks, with backward in two parts; four stages on two ranks; one stage, whose gradients are accumulated."""
    whole = short("one", steps=2)
    cases: dict[str, dict[str, Any]] = {
        "pp=2": {"schedule": "dualpipe"},
        "pp=2,tp=1": {"schedule": "interleaved"},
        "dp=1": {"microbatches": 4},
    }
    for mesh, order in cases.items():
        found = short(mesh, mesh, steps=2, **order)
        assert_as_near_as_shaken_runs(found, whole, short, monkeypatch, steps=2)


@pytest.mark.parametrize("fault", ["the sum of a gradient", "the norm of a stage", "a new value"])
def test_an_update_that_lacks_something_is_found(short: Train, compiled: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """What the second stage has to say of the embedding, its part of the norm, and the embedding that it reads next."""

    def without_sum(op: Op, b: Builder) -> Any:
        return [op.operands[0]] if isinstance(op, Add) else None

    def without_others(op: Op, b: Builder) -> Any:
        none = [b.emit(Literal((0.0,), rows.shape, rows.dtype)).result for rows in op.operands[1:]]
        return [b.emit(Concat((op.operands[0], *none), 0)).result] if isinstance(op, Concat) else None

    def without(module: Module, name: str, rule: Rule) -> Module:
        assert rebuild(module[name], rule) is not module[name]
        return module.map(lambda func: rebuild(func, rule) if func.name == name else func)

    def wrong(*arguments: Any, **options: Any) -> Programs:
        made = compiled(*arguments, **options)
        if fault == "the sum of a gradient":
            return replace(made, step=without(made.step, "stage0_end", without_sum))
        if fault == "the norm of a stage":
            return replace(made, update=without(made.update, "stage0_norm", without_others))
        first, last = made.stages
        assert last.reads == ("model.embed_tokens.weight",)
        return replace(made, stages=(first, replace(last, reads=("nobody's",))))

    steps = 2 if fault == "a new value" else 1
    whole = short("one", steps=steps)
    monkeypatch.setattr("dsc.driver.train.programs", wrong)
    assert differing(short("wrong", "pp=2", steps=steps, **ONE), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "dp=4"}, "mesh pp=1,dp=4,ep=1,tp=1 is 4 ranks: give --ranks local"),
        ({"mesh": "dp=3", "ranks": "local"}, "a batch of 4 does not divide over dp=3; a batch of 6 would fit"),
        (
            {"mesh": "pp=2,dp=2", "ranks": "local", "microbatches": 4},
            "a batch of 4 does not divide over 4 micro-batches over dp=2; a batch of 8 would fit",
        ),
        ({"mesh": "pp=2", "ranks": "local", "schedule": "dualpipe", "microbatches": 2}, "--microbatches is 2, but dualpipe takes"),
        ({"mesh": "dp=4,ep=3", "ranks": "local"}, "mesh pp=1,dp=4,ep=3,tp=1: ep=3 does not divide dp x tp"),
        ({"mesh": "dp=2", "ranks": "local", "timeout": 0.0}, "--timeout is 0.0, expected more than 0"),
        (
            {"mesh": "pp=2", "ranks": "local", "budget_gb": 1.0},
            "--budget-gb bounds one micro-batch, but a rank of a pipeline holds several",
        ),
        ({"mesh": "pp=2", "ranks": "local", "schedule": "forward"}, "schedule forward has no backward pass, but training has"),
        ({"budget_gb": 0.0}, "--budget-gb is 0.0, expected more than 0"),
        (
            {"budget_gb": 1.0, "recompute": "deepseek"},
            "--recompute deepseek is a list, --budget-gb chooses by itself: expected one of them",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DscError) as error:
        train("deepseek-v3-tiny", [TEXT], tmp_path / "run", steps=2, batch=4, seq=8, overrides=SMALL, **options)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "run").exists()


def test_the_command(short: Train, command: Any, tmp_path: Path) -> None:
    """`short` is here for the programs that it has compiled already."""
    sets = [part for override in SMALL for part in ("--set", override)]
    asked = ["train", "deepseek-v3-tiny", "--data", TEXT, "-o", tmp_path / "run", "--steps", 2, "--batch", 4, "--seq", 8, *sets]
    order = ("--schedule", "gpipe", "--microbatches", "1")
    done = command(*asked, "--mesh", "pp=2,dp=2,ep=2", *order, "--ranks", "local", "--backend", "numpy-f64")
    assert done.code == 0, done.err
    assert done.out.startswith("step 2: loss ")
    again = command(*asked, "--resume", "--backend", "numpy-f64")
    assert "goes on with mesh pp=1,dp=1,ep=1,tp=1, was pp=2,dp=2,ep=2,tp=1, gpipe of 1 micro-batches" in again.err
