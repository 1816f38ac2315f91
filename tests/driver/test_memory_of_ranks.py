"""What a rank of the published training mesh holds and sends for it, bucket by bucket, against sums by hand.

DeepSeek-V3 with its MTP module has 682,636,487,424 parameters. 59 layers have 256 experts of 3 x 7168 x 2048; EP64 leaves 4 of them on a
rank. All else, 59 x 256 biases of gates aside, is trained on every rank. With ZeRO-1 a parameter is 2 + 4 bytes, and 4 + 2 + 2 over d.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dsc
from dsc.driver.comm import describe_comm, sent
from dsc.driver.memory import weights_by_stage
from dsc.driver.ui import size
from dsc.ir.expected import IMBALANCE, expected_bytes
from dsc.ir.types import DType, Ragged, Tensor

WHOLE = 682_636_487_424
LAYERS, EXPERT = 59, 3 * 7168 * 2048
EXPERTS = LAYERS * 4 * EXPERT
BIASES = LAYERS * 256
REPLICATED = WHOLE - LAYERS * 256 * EXPERT
DP, EDP = 128, 2


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> dsc.Artifact:
    out = tmp_path_factory.mktemp("v3") / "out"
    return dsc.compile("deepseek-v3", out=out, mode="train", recipe="deepseek-v3", mesh="dp=128,ep=64")


@pytest.mark.slow
def test_a_rank_of_the_training_mesh(v3: dsc.Artifact, command: Any) -> None:
    found = command("inspect", v3.path, "--memory", "--json").json["memory"]
    trained = REPLICATED - BIASES
    assert found["buckets"]["tp"] == dict.fromkeys(found["buckets"]["tp"], 0)
    assert found["buckets"]["replicated"] == {
        "parameters": REPLICATED,
        "weight_bytes": 2 * trained + 4 * BIASES,
        "gradient_bytes": 4 * trained,
        "state_parameters": trained // DP,
        "state_bytes": (4 + 2 + 2) * trained // DP,
    }
    assert found["buckets"]["experts"] == {
        "parameters": EXPERTS,
        "weight_bytes": 2 * EXPERTS,
        "gradient_bytes": 4 * EXPERTS,
        "state_parameters": EXPERTS // EDP,
        "state_bytes": (4 + 2 + 2) * EXPERTS // EDP,
    }
    assert REPLICATED + EXPERTS == 27_846_912_768
    assert json.loads((v3.path / "plan" / "memory.json").read_text()) == found
    table = command("inspect", v3.path, "--memory").out
    replicated, experts = (line.split() for line in table.splitlines() if line.startswith(("replicated", "experts")))
    assert replicated[-3:] == ["1/128", *f"{REPLICATED * 6 / 1e9 + trained * 8 / DP / 1e9:.2f} GB".split()]
    assert experts[-3:] == ["1/2", *f"{EXPERTS * (6 + 8 / EDP) / 1e9:.2f} GB".split()]


@pytest.mark.slow
def test_what_gradients_and_weights_cost_to_send(v3: dsc.Artifact) -> None:
    """Gradients go as float32, (n - 1) / n of them; weights come back in BF16, n - 1 parts of them."""
    trained = REPLICATED - BIASES
    sums = {(one.kind, one.axis): 0 for one in sent(v3.module)}
    for one in sent(v3.module):
        sums[one.kind, one.axis] += one.bytes
    assert sums["reduce_scatter", "dp"] == 4 * trained * (DP - 1) // DP
    assert sums["reduce_scatter", "edp"] == 4 * EXPERTS * (EDP - 1) // EDP
    value, text = describe_comm(v3.module, v3.update)
    found = value["update"]
    gathers = [one for one in found["collectives"] if one["kind"] == "all_gather"]
    assert sum(one["bytes"] for one in gathers if one["axis"] == "dp") == 2 * trained * (DP - 1) // DP
    assert sum(one["bytes"] for one in gathers if one["axis"] == "edp") == 2 * EXPERTS * (EDP - 1) // EDP
    others = [one for one in found["collectives"] if one["kind"] != "all_gather"]
    assert len(others) <= 3
    assert sum(one["bytes"] for one in others) <= 8 * len(others)
    assert f"; in the update {size(found['bytes'])}, " in text


@pytest.mark.slow
def test_the_whole_models_parameters_and_a_ranks(v3: dsc.Artifact, command: Any) -> None:
    """A token goes to 8 of 256 experts."""
    found = command("inspect", v3.path, "--params", "--json").json["parameters"]
    assert (found["total"], found["held"]) == (WHOLE, REPLICATED + EXPERTS)
    assert found["active"] == REPLICATED + LAYERS * 8 * EXPERT


@pytest.mark.parametrize("mesh", [None, "dp=2,ep=2", "dp=2,tp=2,ep=4", "dp=8,ep=8,node=4"])
def test_active_parameters_are_the_whole_models(mesh: str | None, command: Any, tmp_path: Path) -> None:
    sharded = ("--mesh", mesh) if mesh else ()
    found = command("compile", "deepseek-v3-tiny", "-o", tmp_path / "out", "--seq", 16, *sharded, "--json").json
    assert (found["parameters"], found["active"]) == (1_249_016, 668_408)
    assert (found["parameters_of_a_rank"] < found["parameters"]) == (mesh is not None)
    table = command("inspect", tmp_path / "out", "--params").out
    assert ("on each rank" in table) == (mesh is not None)


def test_the_buckets_of_heads_split(tmp_path: Path, command: Any) -> None:
    """Projections of heads lie along tp; what they hold is half of what one rank alone would."""
    for name, mesh in (("one", "dp=1"), ("two", "tp=2,ep=2")):
        command("compile", "deepseek-v3-tiny", "-o", tmp_path / name, "--seq", 16, "--mode", "train", "--batch", 2, "--mesh", mesh)
    one, two = (command("inspect", tmp_path / name, "--memory", "--json").json["memory"]["buckets"] for name in ("one", "two"))
    assert two["experts"]["parameters"] * 2 == one["experts"]["parameters"]
    assert two["tp"]["parameters"] > 0
    assert two["tp"]["parameters"] * 2 + two["replicated"]["parameters"] == one["replicated"]["parameters"]


def test_rows_that_ranks_exchange_are_as_many_as_are_expected() -> None:
    """16 tokens on each of 4 ranks go to 2 experts each: 32 rows of 8 bf16, not the 128 that might come."""
    text = """
    module {{ stage=sharded, mesh={{dp=4, ep=4}} }}

    func @f(%x: bf16[32, 8], %n: i32[4]) {{
      %y: bf16[rows<=128, 8] = all_to_all_rows([%x], %n, %n, axis="ep", size=4, rows={{name="rows", bound=128}})  @ f#1 F
      return %y
    }}
    """.replace("{{", "{").replace("}}", "}")
    bytes_of = expected_bytes(dsc.parse(text))
    assert bytes_of(Tensor(DType.bf16, (Ragged("rows", 128), 8))) == -(-32 * IMBALANCE // 1) * 8 * 2
    assert bytes_of(Tensor(DType.bf16, (Ragged("others", 128), 8))) == 128 * 8 * 2


@pytest.mark.slow
def test_a_rank_of_each_stage_of_the_training_mesh(tmp_path: Path, command: Any) -> None:
    """PP16: a dense layer has MLA of 187,105,280 and an FFN of 396,361,728; an MoE layer MLA, a router, 4 experts and a shared one.

    Norms are 2 x 7168 + 1536 + 512 in a layer. The first stage has the embedding, three dense layers and as many MoE layers as were put
    there; the last the output head, the MTP module (2H x H, three norms, a layer) and, for it, the embedding once more.
    """
    expert, attention, norms, embedding = 44_040_192, 187_105_280, 2 * 7168, 926_679_040
    latent = 1536 + 512
    moe = attention + latent + norms + 7168 * 256 + 256 + 5 * expert
    dense = attention + latent + norms + 396_361_728
    passes = "simplify,autodiff,simplify,quantize-fp8{recipe=deepseek-v3},simplify,split-stages{stages=16}"
    passes += ',shard-experts{mesh="pp=16,dp=128,ep=64"}'
    made = dsc.compile("deepseek-v3", tmp_path / "out", mode="train", batch=128, passes=passes)
    found = command("inspect", made.path, "--memory", "--json").json["memory"]
    layers = [len({n for n in names if n.endswith("input_layernorm.weight")}) for names in (set(s) for s in weights_by_stage(made.module))]
    assert sum(layers) == 62
    held = [sum(bucket["parameters"] for bucket in stage["buckets"].values()) for stage in found["stages"]]
    assert held[0] == embedding + 3 * dense + (layers[0] - 3) * moe
    assert held[1:15] == [n * moe for n in layers[1:15]]
    assert held[15] == layers[15] * moe + 2 * embedding + 7168 + (2 * 7168 * 7168 + 3 * 7168)
    assert sum(held) - embedding == REPLICATED + EXPERTS
    for stage, n in zip(found["stages"][1:15], layers[1:15], strict=True):
        trained = n * (moe - 256 - 4 * expert)
        assert stage["buckets"]["replicated"]["state_bytes"] == 8 * trained // DP
        assert stage["buckets"]["experts"]["state_bytes"] == 8 * n * 4 * expert // EDP
        assert stage["together_bytes"] == 6 * (trained + n * 4 * expert) + 4 * n * 256 + 8 * trained // DP + 8 * n * 4 * expert // EDP
    last = found["stages"][15]["buckets"]["replicated"]
    shared = (last["gradient_bytes"] // 4 - last["state_parameters"] * DP) // embedding
    assert shared == 1, "the embedding that MTP reads is accumulated there, and updated on the first stage"
    assert "residuals of a micro-batch" in command("inspect", made.path, "--memory").out
