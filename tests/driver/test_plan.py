"""`dsc plan`: a step of training against sums by hand, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

import dsc
from dsc.driver.cli import main
from dsc.driver.compile import default_pipeline
from dsc.driver.plan_flops import model_flops
from dsc.driver.plan_inputs import Inputs, own_figures
from dsc.driver.plan_program import STEP, Compiler
from dsc.driver.plan_report import shortfall
from dsc.driver.plan_search import Planner, best_of
from dsc.driver.plan_train import CHUNKS, Setup, Training, held_by
from dsc.hardware.cluster import cluster
from dsc.hardware.streams import simulate as on_streams
from dsc.ir.mesh import Mesh
from dsc.ir.stages import merged
from dsc.models.config import load_config
from dsc.passes.overlap import costing_of
from dsc.schedule.actions import Action, Kind, Overlap
from dsc.schedule.generate import NAMES

TINY = ("deepseek-v3-tiny", "--gpus", 8, "--batch", 64, "--seq", 64)


@cache
def planner(source: str, gpus: int, seq: int, ep: int) -> Planner:
    """Of a model on H800s."""
    return Planner(Compiler(source, "deepseek-v3", seq, lanes=ep), Inputs(cluster("h800"), own_figures(gpus)))


def tiny(mesh: Mesh, schedule: str, chunks: int = 1, batch: int = 64) -> Training:
    """A step of the tiny model."""
    return planner("deepseek-v3-tiny", 8, 64, 4).plan(Setup(mesh, schedule, chunks, batch, 64))


@cache
def published() -> Training:
    """DeepSeek-V3 as its report trained it: 2048 H800, PP16, EP64, ZeRO-1, DualPipe, 15360 sequences of 4096 tokens a step."""
    return planner("deepseek-v3", 2048, 4096, 64).plan(Setup(Mesh(16, 128, 64, 1), "dualpipe", 1, 15360, 4096))


def test_one_stage_runs_its_micro_batches_one_after_the_other() -> None:
    plan = tiny(Mesh(1, 4, 4, 1), "1f1b")
    forward, backward = (plan.stages.run(plan.schedule.rows[0][i]).time for i in (0, 1))
    assert plan.setup.microbatches == 16
    assert plan.timeline.time == pytest.approx(16 * (forward + backward), rel=1e-12)
    assert plan.step == pytest.approx(plan.timeline.time + sum(plan.ends.values()), rel=1e-12)
    assert plan.least <= plan.step


def test_two_stages_of_1f1b_have_the_closed_forms_bubble() -> None:
    """The last stage is never idle between its first micro-batch and its last, or the first is not: (PP-1)(F+B), and two transfers."""
    plan = tiny(Mesh(2, 4, 4, 1), "1f1b")
    rows = plan.schedule.rows
    chunks = [[plan.stages.run(next(s for s in row if s.parts[0].kind is k)).time for k in (Kind.F, Kind.B)] for row in rows]
    first, last = map(sum, chunks)
    hops = 2 * plan.stages.hop
    assert plan.timeline.time >= max(16 * last + first + hops, 16 * first) - 1e-12
    assert plan.timeline.time <= 16 * (max(first, last) + hops) + first + 1e-12


def test_a_pair_is_no_shorter_than_either_stream_and_no_longer_than_its_halves() -> None:
    plan = tiny(Mesh(2, 4, 4, 1), "dualpipe")
    for step in {s for row in plan.schedule.rows for s in row if isinstance(s, Overlap)}:
        run = plan.stages.run(step)
        assert max(run.computing, run.communicating) <= run.time + 1e-15
        assert run.time <= run.computing + run.communicating + run.sends + 1e-15


@pytest.mark.slow
def test_what_is_planned_is_what_is_compiled() -> None:
    """A pair of stages is planned layer by layer; the passes make one function of it, which takes as long and hides as much. What main
    does between layers is fused into stages, and makes less than a thousandth of these. 8 MoE layers of DeepSeek-V3, EP64 over 8 nodes."""
    shape = ("num_hidden_layers=8", "first_k_dense_replace=0", "num_nextn_predict_layers=0")
    own = Planner(Compiler("deepseek-v3", "deepseek-v3", 4096, overrides=shape, lanes=64), Inputs(cluster("h800"), own_figures(128)))
    plan = own.plan(Setup(Mesh(2, 64, 64, 1), "dualpipe", 1, 64 * STEP, 4096))
    first = plan.stages.layers[1][0].name
    source = dsc.trace("deepseek-v3", mode="train", batch=64, seq=4096, overrides=shape)
    quantised = default_pipeline("deepseek-v3", None, "train").replace("autodiff,", "autodiff{split=true},")
    sharded = f'split-stages{{stages=2,at=[{first}]}},shard-experts{{mesh="pp=2,dp=64,ep=64"}}'
    made = dsc.apply(source, f"{quantised},{sharded},recompute,fuse,overlap{{cluster=h800,repeats={STEP}}}")
    costing = costing_of(made, "h800", imbalance=own.inputs["run.imbalance"], repeats=STEP)
    pairs = merged(made)
    assert len(pairs) == 2
    for (forward, *_), name in pairs.items():
        stage = int(forward.removeprefix("stage").removesuffix("_fwd"))
        run = plan.stages.run(Overlap(Action(Kind.F, stage, 0), Action(Kind.B, 1 - stage, 1)))
        times = on_streams(made, costing, made[name])
        print(name, times.total, run.time, times.hidden, run.hidden)
        assert times.total == pytest.approx(sum(part.total for part in run.parts), rel=0.001)
        assert times.hidden == pytest.approx(run.hidden, abs=1e-6)
        assert run.hidden >= 0.9


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command writes, and a picture in it."""
    out = tmp_path_factory.mktemp("plan") / "tiny"
    with pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, TINY), "--mesh", "pp=2,ep=2", "--schedule", "dualpipe", "-o", str(out), "--plot", f"{out}.svg"])
    assert ended.value.code == 0
    return out


def test_parts_of_a_step_add_up(written: Path) -> None:
    found = json.loads((written / "plan.json").read_text())
    assert sum(found["parts"].values()) == pytest.approx(found["step_seconds"])
    assert found["tokens_per_second"] == pytest.approx(64 * 64 / found["step_seconds"])
    total = found["gpu_hours_per_trillion_tokens"]
    assert total["low"] <= total["mid"] <= total["high"]
    for rank in found["memory"]:
        assert rank["total"] == sum(sum(b.values()) for b in rank["buckets"].values()) + rank["activations"] + rank["workspace"]
    swings = [abs(a["at_high"] - a["at_low"]) for a in found["assumptions"]]
    assert swings == sorted(swings, reverse=True)
    assert all(a["source"] and a["low"] <= a["mid"] <= a["high"] for a in found["assumptions"])


def test_the_trace_and_the_picture(written: Path) -> None:
    assert written.with_name("tiny.svg").read_text(encoding="utf-8").startswith("<?xml")
    events = json.loads((written / "timeline.json").read_text())["traceEvents"]
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in (e for e in events if e["ph"] == "X"):
        threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert {pid for pid, _ in threads} >= {0, 1}
    for spans in threads.values():
        assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(sorted(spans))), "one thread does one thing at a time"
    starts, ends = ({e["id"] for e in events if e["ph"] == phase} for phase in "sf")
    assert starts == ends
    assert starts
    assert any(e["ph"] == "C" and e["name"] == "memory, bytes" for e in events)


def test_an_assumption_moves_the_total_as_its_row_says() -> None:
    plan, own = tiny(Mesh(2, 4, 4, 1), "dualpipe"), planner("deepseek-v3-tiny", 8, 64, 4)
    row = next(e for e in own.effects(plan) if e.key == "comm.compute_slowdown")
    given = own.plan(plan.setup, own.inputs.assume([f"{row.key}={row.figure.high}"]), plan.stages.sizes)
    assert row.high == given.gpu_hours > row.low


@pytest.mark.parametrize(("schedule", "pp"), [("dualpipe", 4), ("dualpipev", 2)])
def test_a_placement_that_fits_is_found_where_the_quickest_does_not(schedule: str, pp: int) -> None:
    """One byte less than the placement without a bound needs: another fits. With next to no memory the report says what lacks."""
    own, setup = planner("deepseek-v3-tiny", 8, 64, 4), Setup(Mesh(pp, 8 // pp, 2, 1), schedule, CHUNKS[schedule][0], 64, 64)
    free = own.plan(setup)
    rest = own.inputs.assume(["run.reserved=0"])
    less = own.plan(setup, rest.assume([f"device.chip.memory={free.peak.total - 1}"])).within()
    assert less.fits
    assert less.stages.sizes != free.stages.sizes
    none = own.plan(setup, rest.assume(["device.chip.memory=1e6"])).within()
    rank = none.memory.index(none.peak)
    held = r" and ".join(rf"stage {s} \(\d layers?\)" for s in held_by(none.schedule)[rank])
    most = rf"no placement.* fits: rank {rank} with {held} needs [\d.]+ MB of 1.00 MB \(.* workspace\); what would help: more stages"
    assert re.fullmatch(rf"{most}.*", shortfall(none))
    assert shortfall(free) == ""


def test_the_best_of_all_candidates_is_found_without_simulating_each() -> None:
    """The bound that spares simulations never hides the best."""
    own = planner("deepseek-v3-tiny", 8, 64, 4)
    every = list(own.candidates([Mesh(2, 4, 4, 1), Mesh(1, 8, 4, 1), Mesh(4, 2, 2, 1)], NAMES, 64, 64, 1))
    assert len(every) == 1 + 7 + 6, "16 stages are more than there are layers"
    assert all(c.least <= c.step * (1 + 1e-12) for c in every)
    found = best_of(every, 3)
    assert [c.step for c in found] == sorted(c.step for c in every)[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deepseek-v3-tiny", "--gpus", 0), "--gpus is 0"),
        ((*TINY, "--schedule", "gpipe"), "unknown schedule gpipe, expected auto or one of 1f1b"),
        ((*TINY, "--mesh", "pp=3"), "8 ranks are not a multiple of pp x tp = 3 x 1"),
        ((*TINY, "--assume", "speed=3"), "--assume speed=3: unknown 'speed', expected one of intra.bandwidth"),
        ((*TINY, "--assume", "comm.notify=x"), "--assume comm.notify=x: expected a number of s, found 'x'"),
        ((*TINY, "--cluster", "h900"), "unknown cluster h900; expected a .toml file or one of: h"),
        ((*TINY, "--plot", "plan.pdf"), "plan.pdf: expected a name that ends in .svg or .png"),
        ((*TINY, "--batch", 0), "--batch is 0, expected 1 or more"),
        ((*TINY, "--recompute", "some"), "'some' is not one of 'deepseek', 'none'"),
        ((*TINY, "--mesh", "pp=2,ep=2", "--batch", 6), "no schedule of 1f1b"),
        (("tests/driver/test_plan.py:nothing", "--gpus", 8), "is no model configuration"),
    ],
)
def test_refusals_are_one_line(refused: Callable[..., list[str]], arguments: tuple[object, ...], message: str) -> None:
    assert message in refused("plan", *arguments)[0]


@pytest.mark.slow
def test_operations_of_deepseek_v3_are_the_published_rule() -> None:
    """Per token 6 (61 x MLA + 3 x FFN + 58 x 9 experts + head) + attention; Insights into DeepSeek-V3, table 2: 250 GFLOP."""
    c = load_config("deepseek-v3")
    h, heads = c.hidden_size, c.num_attention_heads
    query, value = 128 + 64, 128
    mla = h * 1536 + 1536 * heads * query + h * (512 + 64) + 512 * heads * 256 + heads * value * h
    expert = 3 * h * 2048
    weights = 6 * (61 * mla + 3 * 3 * h * 18432 + 58 * 9 * expert + c.vocab_size * h)
    square = 3 * 61 * 2 * heads * (query + value) * 4096
    found = model_flops(published().stages.program, 4096, 1)
    assert found.causal == pytest.approx(weights + square / 2, rel=1e-9)
    assert found.full == pytest.approx(weights + square, rel=1e-9)
    assert round(found.causal / 1e9) == 250


@pytest.mark.slow
def test_memory_of_the_published_mesh_is_what_sums_by_hand_give() -> None:
    """Each rank has 4 of 256 experts of every MoE layer of its two stages; the optimiser's state is spread over 2 x 2 copies of them."""
    plan = published()
    expert, layers = 3 * 7168 * 2048, plan.stages.layers
    for rank, memory in enumerate(plan.memory):
        moe = sum("moe_layer" in layer.kind or "mtp" in layer.kind for stage in (rank, 15 - rank) for layer in layers[stage])
        held = memory.buckets["experts"]
        assert held == {"weights": 2 * moe * 4 * expert, "gradients": 4 * moe * 4 * expert, "optimiser": 8 * moe * 4 * expert // 4}
    every = {name: n for layer in plan.stages.program.layers for name, (bucket, n, _) in plan.stages.program.weights(layer).items()}
    once = sum(n * (64 if "mlp.experts" in name else 1) for name, n in every.items())
    assert once == pytest.approx(671_026_419_200 + 11.61e9, rel=1e-4), "671B, and MTP's 11.6B"


@pytest.mark.slow
def test_computation_hides_the_exchanges_of_the_published_chunk() -> None:
    """DeepSeek-V3 report, section 3.2.1: both all-to-alls and the pipeline's transfers can be hidden. At least 90% here."""
    plan = published()
    assert plan.hidden >= 0.9
    assert 0.5 < plan.bubble * plan.timeline.time < 4  # (PP/2-1)(F&B+B-3W) of its chunks is between


def test_rows_that_differ_in_stages_alone_say_so() -> None:
    own = planner("deepseek-v3-tiny", 8, 64, 4)
    setups = [plan.setup for plan in own.candidates([Mesh(2, 4, 4, 1)], NAMES, 64, 64, 1)]
    labels = [f"{setup.mesh}, {setup.order}" for setup in setups]
    assert len(set(labels)) == len(labels) == 7
    assert "zb1p with 2 stages on a rank" in [setup.order for setup in setups]
