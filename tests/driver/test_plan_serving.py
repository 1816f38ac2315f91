"""`dsc plan --mode prefill|decode`: the interleaved program of a rank is planned; its exchanges and its head against sums by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from dsc.driver.plan_inputs import Inputs, own_figures
from dsc.driver.plan_program import Compiler
from dsc.driver.plan_serve import Mode, Serving, effects, serve, serving_inputs
from dsc.hardware.cluster import cluster
from dsc.ir.mesh import parse_mesh
from dsc.ir.ops.attention import AttentionDecode
from dsc.ir.ops.collective import RowExchange
from dsc.ir.ops.linalg import Matmul
from dsc.ir.routing import routing_of
from dsc.ir.walk import walk

LAYERS, DENSE = 4, 3
"""Layers, and those of them without experts."""


@cache
def planned(mode: Mode, speculative: bool = False) -> tuple[Serving, Compiler]:
    """Four layers of DeepSeek-V3 on 128 H800, experts on all of them; 4096 tokens."""
    mesh = parse_mesh("ep=128,node=8", 128)
    layers = LAYERS + speculative
    compiler = Compiler("deepseek-v3", "deepseek-v3", None, "", [f"num_hidden_layers={layers}"], mode, lanes=128)
    inputs = serving_inputs(Inputs(cluster("h800"), own_figures(128)), mode, None, 4096, 1 << 17, speculative)
    return serve(compiler, inputs, mode, mesh), compiler


def products_of_the_head(plan: Serving) -> list[int]:
    """Rows of each."""
    return [int(op.a.shape[0]) for _, func, op in walk(plan.both) if func.name == "head" and isinstance(op, Matmul)]


def test_exchanges_of_decoding_by_hand() -> None:
    """A row of FP8 codes with scales for each choice of 64 tokens, a BF16 row back; 120 of 128 ranks are elsewhere. No SMs are taken."""
    plan, _ = planned("decode")
    inputs = plan.machine.inputs
    rows = 64 * 8 * inputs["run.imbalance"] * (128 - 8) / 128
    network = 50e9 * inputs.cluster.inter.efficiency.mid
    by_hand = sum(rows * width / network + 3.7e-6 + 25.67e-6 for width in (7168 + 56 * 4, 2 * 7168))
    assert plan.bound == pytest.approx(2 * (LAYERS - DENSE) * by_hand, rel=1e-6)
    assert products_of_the_head(plan) == [64, 64]
    alone, beside = plan.machine.costs
    for span in plan.times.spans:
        assert span.end - span.start == pytest.approx(alone.seconds(span.op)) == pytest.approx(beside.seconds(span.op))


def test_prefill_computes_the_head_for_last_tokens_alone() -> None:
    """Two prompts of each of two micro-batches."""
    plan, _ = planned("prefill")
    assert products_of_the_head(plan) == [2, 2]
    assert plan.per_node == pytest.approx(8 * 2 * 2 * 4096 / plan.time)
    assert plan.machine.costs[1].taken == 24
    exchanged = [s.op for s in plan.times.spans if isinstance(s.op, RowExchange)]
    assert len(exchanged) == 2 * 3 * (LAYERS - DENSE)  # there, their weights after them, and back
    routing, first = routing_of(plan.both), exchanged[0]
    assert routing is not None
    sent = 2 * 4096 * plan.machine.inputs["run.imbalance"] * routing.distinct(16) * 15 / 16 * (7168 + 56 * 4 + 8 * 4)
    assert plan.machine.costs[1]._legs(first).inter == pytest.approx(sent, rel=1e-4)  # of whole rows


def test_speculation_reads_a_cache_once_for_two_tokens() -> None:
    """DeepSeek-V3 report, section 5.4.3: 1.875 tokens of a step. One more layer, its projection and the head are the MTP module's."""
    plan, _ = planned("decode", True)
    plain, _ = planned("decode")
    op, one = (next(op for _, _, op in walk(p.both) if isinstance(op, AttentionDecode)) for p in (plan, plain))
    assert plan.machine.costs[1].cost(op).flops == 2 * plain.machine.costs[1].cost(one).flops == 2 * 2 * 64 * 128 * 4096 * (576 + 512)
    cache = 64 * 4096 * 576 * 2
    others = 128 * (128 * (576 + 512) * 2 + 8 + 4)
    assert plan.machine.costs[1].cost(op).bytes == cache + others
    assert plan.memory["inputs and caches"] == pytest.approx(plain.memory["inputs and caches"] * 5 / 4, rel=1e-3)
    assert plan.made == 1.875
    assert plan.per_token == plan.time / 1.875
    assert plan.per_node == pytest.approx(8 * 2 * 64 * 1.875 / plan.time)


def test_serving_takes_at_least_what_each_stream_does(command: Callable[..., Any]) -> None:
    """A rank's tokens over the time of its two micro-batches, times the ranks of a node. 17 experts, one shared, on 6 ranks: 18 slots."""
    arguments = ("plan", "deepseek-v3-tiny", "--gpus", 6, "--mode", "decode", "--seq", 64, "--no-tornado", "--shared-expert", "routed")
    found = command(*arguments, "--json").json
    least = max(found["compute_seconds"], found["communication_seconds"])
    assert least <= found["seconds"]["mid"] <= found["compute_seconds"] + found["communication_seconds"]
    assert 0 < found["bound_seconds"] <= found["seconds"]["mid"]
    assert found["tokens_per_second_of_a_node"]["mid"] == pytest.approx(8 * 2 * 64 / found["seconds"]["mid"])
    assert found["slots"] == 18


def test_what_is_given_has_no_range_and_effects_keep_the_order() -> None:
    """More work of a kind takes longer, another figure costs the same ops anew."""
    mesh, given = parse_mesh("ep=8,node=8", 8), Inputs(cluster("h800"), own_figures(8))
    inputs = serving_inputs(given, "decode", None, 64, 1024, False)
    compiler = Compiler("deepseek-v3-tiny", "deepseek-v3", None, "", (), "decode", lanes=8)
    plan = serve(compiler, inputs, "decode", mesh)
    found = effects(plan, compiler)
    time = {e.key: e for e in found.time}
    assert "serve.tokens" not in time, "given"
    assert time["serve.sequences"].low <= plan.per_token <= time["serve.sequences"].high
    assert time["device.kernels.launch"].low < plan.per_token < time["device.kernels.launch"].high
    assert [e.key for e in found.time] == [e.key for e in found.rate]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--replicas", 20), "they need --mode prefill or decode"),
        (("--mode", "prefill", "--speculate"), "--speculate needs --mode decode"),
        (("--mode", "decode", "--mesh", "pp=2,ep=4"), "expected pp=1"),
    ],
)
def test_what_serving_refuses(refused: Callable[..., list[str]], options: tuple[Any, ...], message: str) -> None:
    (line,) = refused("plan", "deepseek-v3-tiny", "--gpus", 8, *options)
    assert message in line
