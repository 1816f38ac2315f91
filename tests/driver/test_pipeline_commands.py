"""A pipeline from the command line: compiled, run by the schedule that stands in the artifact, and what its ranks send."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.driver.measure import flat


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in training, over two stages of two ranks."""
    made = tmp_path_factory.mktemp("pipeline") / "out"
    dsc.compile("deepseek-v3-tiny", out=made, mode="train", seq=4, mesh="pp=2,dp=2,ep=2", schedule="zb1p", microbatches=4)
    return made


def test_what_is_compiled_runs(out: Path, command: Any) -> None:
    found = command("run", out, "--ranks", "local", "--json").json
    assert found["ranks"] == 4
    one = dsc.load(out).module.attributes
    assert one["batch"] == 2
    assert found["results"]["counts"]["shape"] == [3, 16]
    tokens, top_k, layers = 4 * 2 * 4, 4, 3  # of all micro-batches: they are added up
    assert found["results"]["counts"]["mean"] == tokens * layers * top_k / (3 * 16)
    other = command("run", out, "--ranks", "local", "--schedule", "dualpipe", "--json").json
    assert other["results"]["loss"]["mean"] == pytest.approx(found["results"]["loss"]["mean"], rel=1e-6)


def test_the_artifact_says_the_schedule(out: Path, tmp_path: Path, refused: Any) -> None:
    """What stands there runs, and what is wrong in it is said with its place."""
    text = (out / "plan" / "schedule.txt").read_text()
    assert text.startswith("0F0,0SEND_F0,")
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "plan" / "schedule.txt").write_text(text.replace("1RECV_F1,", "", 1))
    said = "\n".join(refused("run", copy, "--ranks", "local"))
    assert "1F1 on rank 1 reads what 0F1 on rank 0 makes, but rank 1 has no 1RECV_F1" in said
    assert "  rank 0  " in said
    assert ">1F1<" in said
    swapped = text.replace("1I0,", "1I1,", 1)
    (copy / "plan" / "schedule.txt").write_text(swapped)
    assert "1I1 stands before its 1F1" in "\n".join(refused("run", copy, "--ranks", "local"))


def test_what_stages_send(out: Path, command: Any) -> None:
    """A sequence of 4 tokens of 144 in BF16, up and down; what of the losses and counts comes from the first stage goes up with it."""
    found = command("inspect", out, "--comm", "--json").json["comm"]
    sends = {one["func"]: one["bytes"] for one in found["collectives"] if one["kind"] == "send"}
    hidden = 4 * 144 * 2
    assert sends["stage1_bwd_input"] == hidden
    layers = sum("layers.1" in name or "layers.2" in name for name in dsc.load(out).module.attributes["gradients"]["stage0"]["weights"]) > 0
    assert hidden < sends["stage0_fwd"] <= hidden + layers * 2 * (4 + 16 * 4)
    assert found["microbatches"] == 4
    assert found["bytes"] == found["microbatch"]["bytes"] + found["end"]["bytes"]
    reduced = [one for one in found["collectives"] if one["kind"] == "reduce_scatter"]
    assert {one["func"] for one in reduced} == {"stage0_end", "stage1_end"}, "gradients are added up once, after the micro-batches"
    assert "for a micro-batch" in command("inspect", out, "--comm").out


def test_inference_is_a_pipeline_too(tmp_path: Path) -> None:
    made = dsc.compile("deepseek-v3-tiny", out=tmp_path / "out", seq=4, mesh="pp=3", microbatches=5)
    assert (made.path / "plan" / "schedule.txt").read_text().splitlines()[0].count("F") == 2 * 5
    (logits,) = dsc.run(made, ranks="local")
    assert logits.shape == (5, 4, 320)
    whole = dsc.apply(dsc.trace("deepseek-v3-tiny", seq=4), "simplify")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 320, (5, 4))
    (logits,) = dsc.run(made, inputs=[tokens], ranks="local")
    each = [flat(dsc.run(whole, inputs=[tokens[m : m + 1]]))[0] for m in range(5)]
    assert logits.tobytes() == np.concatenate(each).tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--schedule", "1f1b"), "--schedule, --microbatches and --chunks are for a pipeline: they need --mesh pp=2 or more"),
        (("--mesh", "pp=2", "--schedule", "zb9"), "unknown schedule zb9, expected a .csv file or one of auto, 1f1b, "),
        (("--mesh", "pp=3", "--schedule", "dualpipe"), "--stages is 3, but dualpipe takes an even number"),
        (("--mesh", "pp=2", "--schedule", "missing.csv"), "missing.csv: no such file"),
    ],
)
def test_what_cannot_be_a_pipeline_is_said_before_any_work(options: tuple[str, ...], message: str, tmp_path: Path, refused: Any) -> None:
    said = "\n".join(refused("compile", "deepseek-v3-tiny", "-o", tmp_path / "out", "--mode", "train", *options))
    assert message in said
    assert not (tmp_path / "out").exists()


def test_a_schedule_needs_a_pipeline(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "f.dsc").write_text("func @f(%x: f32[2]) {\n  return %x\n}\n")
    dsc.compile(tmp_path / "f.dsc", out=tmp_path / "out")
    assert "a schedule is for all ranks of a pipeline" in "\n".join(refused("run", tmp_path / "out", "--schedule", "1f1b"))


def test_a_rank_holds_the_parameters_of_its_stage(command: Any, tmp_path: Path) -> None:
    """The 1,161,216 of experts lie on two ranks, and both stages read the embedding: the prediction of the token after the next as well."""
    options = ("deepseek-v3-tiny", "-o", tmp_path / "out", "--mode", "train", "--seq", 4, "--mesh", "pp=2,dp=2,ep=2")
    found = command("compile", *options, "--json").json
    assert "parameters_of_a_rank" not in found
    first, last = found["parameters_of_a_rank_by_stage"]
    assert first + last == 1_775_184 - 1_161_216 // 2 + 320 * 144
    lines = command("inspect", tmp_path / "out", "--memory").out.splitlines()
    assert lines[0].endswith(" of stage 1, the fullest of 2"), "whose weights these are"
    assert lines[3].startswith("on each rank of stage 1 ")
    stages = command("inspect", tmp_path / "out", "--memory", "--json").json["memory"]["stages"]
    assert [sum(b["parameters"] for b in one["buckets"].values()) for one in stages] == [first, last]
    said = command("compile", *options).out.splitlines()[0]
    assert "1.78 M parameters (524.99 K to 715.66 K of each stage on a rank, 904.27 K active per token)" in said
    shown = command("inspect", tmp_path / "out", "--params")
    assert "on a rank, all stages" in shown.out
    assert shown.out.splitlines()[-1].endswith("; 524.99 K to 715.66 K of each stage on a rank")
    assert "524.99 K to 715.66 K of each stage on a rank" in (tmp_path / "out" / "report.html").read_text()
