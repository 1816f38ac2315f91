"""Collectives on four real processes over gloo: against torch.distributed's own, and bit for bit against the ranks in lockstep.

The pool is started once. What a dying, hanging or failing rank does to the others is tested here as well, on processes of their own.
"""

from __future__ import annotations

import os
import pickle
import pydoc_data.topics
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsc
from dsc import backends
from dsc.backends.arrays import STORAGE, rounded
from dsc.distributed import local
from dsc.driver import train_program
from dsc.driver.curve import read
from dsc.driver.measure import same_bits
from dsc.ir.core import Builder, Module, Value
from dsc.ir.mesh import Mesh, mesh_of, parse_mesh
from dsc.ir.ops.collective import Done, Transfer
from dsc.ir.ops.control import Pack
from dsc.ir.ops.internode import InternodeCombine, InternodeDispatch
from dsc.ir.stages import stages_of
from dsc.ir.types import DType, Tensor
from dsc.ir.verify import verify
from dsc.ir.walk import walk

pytestmark = pytest.mark.slow
RANKS = 4
HERE = Path(__file__).parent
FAILING, NULL, TEXT = str(HERE / "failing_rank.py"), Path("/dev/null"), pydoc_data.topics.__file__
MESHES = [parse_mesh(text) for text in ("dp=2,tp=2,ep=4,node=2", "pp=2,dp=2,ep=2", "dp=4,ep=2,node=2")]


class Pool:
    """Four ranks that wait for cases."""

    def __init__(self, forks: Any, folder: Path) -> None:
        self.ranks = []
        files = [(folder / f"cases{rank}", folder / f"answers{rank}") for rank in range(RANKS)]
        for pipe in (pipe for pair in files for pipe in pair):
            os.mkfifo(pipe)
        started = forks.ranks(RANKS, str(HERE / "gloo_rank.py"), files=files)
        for process, (cases, answers) in zip(started, files, strict=True):
            self.ranks.append((process, cases.open("wb"), answers.open("rb")))

    def run(self, text: str, inputs: Sequence[Sequence[Any]]) -> list[Any]:
        """Each rank's answer."""
        for _, cases, _ in self.ranks:
            pickle.dump((text, inputs), cases)
            cases.flush()
        return [pickle.load(answers) for _, _, answers in self.ranks]

    def close(self) -> None:
        for process, cases, answers in self.ranks:
            pickle.dump(("stop", ()), cases)
            cases.close()
            process.wait(30)
            answers.close()


@pytest.fixture(scope="module")
def pool(forks: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(forks, tmp_path_factory.mktemp("pool"))
    yield made
    made.close()


def numbers(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Finite numbers over 12 binades, zeros among them; or small whole ones."""
    if not DType[dtype].is_float:
        return rng.integers(-9, 9, shape).astype(STORAGE[DType[dtype]])
    return rounded(rng.standard_normal(shape) * np.exp2(rng.integers(-6, 6, shape)) * (rng.random(shape) > 0.1), DType[dtype])


def module(mesh: Mesh, params: dict[str, str], results: list[str], call: str, started: bool = False) -> str:
    record = ", ".join(f"{k}={v}" for k, v in mesh.record().items())
    declared = ", ".join(f"%{name}: {type}" for name, type in params.items())
    made = ", ".join(f"%y{i}: {type}" for i, type in enumerate(results))
    returned = ", ".join(f"%y{i}" for i in range(len(results)))
    head = f"module {{ stage=sharded, mesh={{{record}}} }}\n\nfunc @main({declared}) {{\n"
    if started:
        flying = ", ".join(f"%t{i}: async {type}" for i, type in enumerate(results))
        handed = ", ".join(f"%t{i}" for i in range(len(results)))
        call = f"{call[:-1]}, start=true)  @ main#2 F\n  {made} = done([{handed}])"
        made = flying
    return head + (f"  {made} = {call}  @ main#1 F\n  return {returned}\n}}\n" if call else "  return %x\n}\n")


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[tuple[np.ndarray, ...]]]:
    """A collective along some axis, begun and ended at once or in two ops, and inputs for every rank."""
    mesh = draw(st.sampled_from(MESHES))
    axis = draw(st.sampled_from([axis for axis in mesh.axes if mesh.size(axis) > 1]))
    size = mesh.size(axis)
    kind = draw(st.sampled_from(("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "all_to_all_rows")))
    dtype = draw(st.sampled_from(("f32", "bf16", "f16") if "reduce" in kind else ("f32", "bf16", "f8e4m3", "i32", "i64", "bool")))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    started = draw(st.booleans())
    along = f'axis="{axis}", size={size}'

    def tensor(*shape: int) -> str:
        return f"{dtype}[{', '.join(map(str, shape))}]"

    if kind == "all_to_all_rows":
        width = draw(st.integers(1, 5))
        blocks = draw(st.integers(1, 3))  # of the counts on either side
        counts = rng.integers(0, 4, (mesh.world, mesh.world, blocks))
        counts *= rng.random(counts.shape) < draw(st.sampled_from((0.3, 1.0)))
        grouped = draw(st.tuples(st.booleans(), st.booleans()))
        inputs, most = [], 0
        for rank in range(mesh.world):
            group = mesh.group(axis, rank)
            both = [counts[rank, r] for r in group], [counts[r, rank] for r in group]
            send, recv = (np.array(c if blocked else np.sum(c, 1), np.int32) for c, blocked in zip(both, grouped, strict=True))
            rows = int(send.sum()) + rank % 2  # one that stays behind
            most = max(most, rows, int(recv.sum()))
            inputs.append((numbers(rng, dtype, (rows, width)), numbers(rng, "f32", (rows, 1)), send, recv))
        sides = [f"i32[{size}, {blocks}]" if blocked else f"i32[{size}]" for blocked in grouped]
        params = {"x": f"{dtype}[rows<={most}, {width}]", "s": f"f32[rows<={most}, 1]", "n": sides[0], "m": sides[1]}
        results = [f"{dtype}[got<={most}, {width}]", f"f32[got<={most}, 1]"]
        return module(mesh, params, results, f'{kind}([%x, %s], %n, %m, {along}, rows={{name="got", bound={most}}})', started), inputs
    shape = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    dim = draw(st.integers(-len(shape), len(shape) - 1)) if kind in ("all_gather", "reduce_scatter") else 0
    cut = list(shape)
    shape[dim] *= 1 if kind in ("all_gather", "all_reduce") else size
    cut[dim] *= size if kind == "all_gather" else 1
    result = {"all_gather": cut, "reduce_scatter": cut}.get(kind, shape)
    extra = f", dim={dim}" if kind in ("all_gather", "reduce_scatter") else ""
    extra += ', kind="max"' if kind == "all_reduce" and draw(st.booleans()) else ""
    inputs = [(numbers(rng, dtype, tuple(shape)),) for _ in range(mesh.world)]
    return module(mesh, {"x": tensor(*shape)}, [tensor(*result)], f"{kind}(%x, {along}{extra})", started), inputs


@given(case=cases())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_collectives_agree_with_torch_and_in_both_worlds(pool: Pool, case: tuple[str, list[tuple[np.ndarray, ...]]]) -> None:
    text, inputs = case
    parsed = dsc.parse(text)
    runner = backends.get("numpy")
    in_lockstep = local.run(mesh_of(parsed), lambda rank: runner.program(parsed, None, inputs[rank]))
    for rank, (results, verdict) in enumerate(pool.run(text, inputs)):
        assert not verdict, f"rank {rank}: {verdict}"
        for found, expected in zip(results, in_lockstep[rank], strict=True):
            assert found.shape == expected.shape
            assert same_bits(found, expected), f"rank {rank}: gloo and lockstep differ in {text}"


def over_nodes(mesh: Mesh, started: bool) -> str:
    """Tokens over nodes and back, begun and ended at once or in two ops."""
    b, x, ids = Builder("main"), Value(Tensor(DType.f32, (5, 3)), "x"), Value(Tensor(DType.i32, (5, 3)), "ids")
    b.params += [x, ids]
    way = "ep", mesh.ep, mesh.size("ep.node")

    def done(op: Transfer) -> tuple[Value, ...]:
        made = b.emit(op)
        return b.emit(Done(made.results)).results if started else made.results

    rows, _, *fields = done(InternodeDispatch((x,), ids, 8, *way, start=started))
    handle = b.emit(Pack((ids, *fields))).result
    return str(verify(Module((b.finish(done(InternodeCombine(rows, handle, *way, start=started))),), "sharded", {"mesh": mesh.record()})))


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("mesh", ["dp=2,tp=2,ep=4,node=2", "dp=4,ep=4,node=1", "dp=4,ep=4"])
def test_rows_over_nodes_agree_in_both_worlds(pool: Pool, mesh: str, started: bool) -> None:
    text, rng = over_nodes(parse_mesh(mesh), started), np.random.default_rng(7)
    inputs = [(numbers(rng, "i32", (5, 3)).astype(np.float32), rng.integers(-1, 8, (5, 3), np.int32)) for _ in range(RANKS)]
    parsed, runner = dsc.parse(text), backends.get("numpy")
    in_lockstep = local.run(mesh_of(parsed), lambda rank: runner.program(parsed, None, inputs[rank]))
    for rank, (results, verdict) in enumerate(pool.run(text, inputs)):
        assert not verdict, f"rank {rank}: {verdict}"
        assert same_bits(results[0], in_lockstep[rank][0])


def test_stages_send_to_each_other(pool: Pool) -> None:
    inputs = [(np.full((2, 3), rank, np.float32),) for rank in range(RANKS)]
    answers = pool.run(module(parse_mesh("pp=4,dp=1"), {"x": "f32[2, 3]"}, [], ""), inputs)
    assert [np.unique(results[0]).tolist() for results, _ in answers] == [[4.0]] * RANKS


# ---- a rank that does not live to the end

STEP = """
module {{ stage=sharded, mesh={{dp={ranks}}}, inputs=[["dp"]], results=[["dp"]] }}

func @main(%x: f32[2, 3]) {{
  %a: f32[{rows}, 3] = all_gather(%x, axis="dp", size={ranks})  @ main#1 F
  %b: f32[{rows}, 3] = exp(%a)  @ main#2 F
  %c: f32[2, 3] = reduce_scatter(%b, axis="dp", size={ranks})  @ main#3 F
  return %c
}}
"""


@pytest.fixture
def artifact(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    ranks = request.param
    source = tmp_path / "step.dsc"
    source.write_text(STEP.format(ranks=ranks, rows=2 * ranks))
    dsc.compile(source, tmp_path / "out")
    return tmp_path / "out"


def lost(ranks: int) -> str:
    collective = f'reduce_scatter(f32[{2 * ranks}, 3], axis="dp", size={ranks}, dim=0) at @main main#3'
    return f"rank 0 waited in {collective}"


def torchrun(ranks: int, *arguments: str, limit: float = 400) -> tuple[int, list[str], float]:
    """Exit code, the lines of dsc itself, and seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    path = os.pathsep.join(filter(None, (str(Path(dsc.__file__).parents[1]), os.environ.get("PYTHONPATH"))))  # where this test found it
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    start = time.monotonic()
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=given, timeout=limit, check=False)
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("dsc:")], time.monotonic() - start


@pytest.mark.parametrize("artifact", [3], indirect=True)
def test_a_rank_that_is_killed_ends_the_others(artifact: Path) -> None:
    code, lines, seconds = torchrun(3, str(HERE / "failing_rank.py"), "kill", "1", "run", str(artifact))
    assert code != 0
    assert lines == [f"dsc: error: rank 1 ended; {lost(3)}"]
    assert seconds < 300, "the time-out of ten minutes should not matter here"


@pytest.mark.parametrize("artifact", [2], indirect=True)
def test_a_rank_that_hangs_ends_the_others(artifact: Path, forks: Any, tmp_path: Path) -> None:
    files = [(NULL, NULL, tmp_path / f"errors{rank}") for rank in range(2)]
    first, second = forks.ranks(2, FAILING, "hang", "1", "run", str(artifact), "--timeout", "5", files=files)
    assert first.wait(60) == 2
    assert files[0][-1].read_text() == f"dsc: error: no answer from rank 1 within 5 s; {lost(2)}\n"
    second.kill()


@pytest.mark.parametrize("artifact", [2], indirect=True)
def test_a_rank_that_fails_says_why_and_ends_the_others(artifact: Path, forks: Any, tmp_path: Path) -> None:
    files = [(NULL, NULL, tmp_path / f"errors{rank}") for rank in range(2)]
    started = forks.ranks(2, FAILING, "raise", "1", "run", str(artifact), files=files)
    assert [process.wait(60) for process in started] == [2, 2]
    assert [file.read_text() for *_, file in files] == ["", "dsc: error: rank 1: @main main#2: exp: no room for 7 rows\n"]


def test_a_rank_killed_in_a_training_step_costs_no_more_than_that_step(tmp_path: Path, forks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the second stage, and dies in the backward pass of step 2. The run goes on in one process, as one that was never stopped."""
    sizes = ("num_hidden_layers=2", "hidden_size=48", "n_routed_experts=8", "moe_intermediate_size=24", "intermediate_size=64")
    sets = [part for size in sizes for part in ("--set", size)]
    options = ["--steps", "3", "--batch", "4", "--seq", "8", "--save-every", "1", "--mesh", "pp=2,dp=2,ep=2", "--lr", "2e-3", *sets]
    options += ["--schedule", "zb1p", "--microbatches", "2"]
    asked = ["train", "deepseek-v3-tiny", "--data", TEXT, "-o", str(tmp_path / "killed"), *options]
    order = {"mesh": str(parse_mesh("pp=2,dp=2,ep=2")), "schedule": "zb1p", "microbatches": 2}
    given = {"batch": 4, "seq": 8, "overrides": sizes, **order}
    made = train_program.programs("deepseek-v3-tiny", **given)
    forks.ask("compile", source="deepseek-v3-tiny", **given)
    monkeypatch.setattr("dsc.driver.train.programs", lambda *_, **__: made)

    def in_one_process(out: str, resume: bool = False) -> None:
        more = {**given, "ranks": "local", "steps": 3, "save_every": 1, "learning_rate": 2e-3}
        dsc.train("deepseek-v3-tiny", [TEXT], tmp_path / out, resume=resume, **more)

    functions = [made.step[call.callee] for call in stages_of(made.step).calls[1].values()]
    norms = 2 * sum(op.name == "rms_norm_backward" for func in functions for _, _, op in walk(made.step, func))
    at = f"2@rms_norm_backward:{norms + norms // 2}"
    start = time.monotonic()
    files = [(NULL, NULL, tmp_path / f"errors{rank}") for rank in range(4)]
    ended = [process.wait(200) for process in forks.ranks(4, FAILING, "kill", at, *asked, files=files)]
    assert ended == [2, 2, -signal.SIGKILL, 2]
    lines = [line for *_, file in files for line in file.read_text().splitlines() if line.startswith("dsc: error: ")]
    place = r"(\dRECV_B\d.*|\w+\(.*\) at @.* \S+#\S+)"
    wanted = re.compile(rf"dsc: error: rank 2 ended; rank 0 waited in {place}; the last checkpoint is (\S+)")
    found = [told for line in lines if (told := wanted.fullmatch(line))]
    assert len(found) == 1, lines  # without torchrun, which ends those that are left, they may say of rank 0 that it has ended
    (told,) = found
    assert time.monotonic() - start < 200, "the time-out of ten minutes should not matter here"
    assert Path(told[2]) == tmp_path / "killed" / "checkpoints" / "step-00000001"
    in_one_process("killed", resume=True)
    in_one_process("whole")
    curves = [[{**row, "tokens_per_second": ""} for row in read(tmp_path / out / "loss.csv")] for out in ("killed", "whole")]
    assert len(curves[0]) == 3
    assert curves[0] == curves[1]
    for file in (tmp_path / "whole" / "checkpoints" / "step-00000003").rglob("*.safetensors"):
        same = file.read_bytes() == (tmp_path / "killed" / file.relative_to(tmp_path / "whole")).read_bytes()
        assert same, file.name
