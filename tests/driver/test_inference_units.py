"""The two units in which DeepSeek-V3 is served (report, section 3.4): what a rank of them holds and sends, against sums by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dsc

EXPERT = 3 * 7168 * 2048
EVERY = 671_026_419_200
"""Parameters of the model: 58 layers have 256 experts and a shared one."""

HEADS = 61 * (1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168)
"""Parameters of the projections of heads, which tp=4 cuts: q_b, kv_b and o."""


@pytest.fixture(scope="module")
def prefill(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """32 GPUs in 4 nodes, 288 slots for 256 experts."""
    out = tmp_path_factory.mktemp("prefill") / "out"
    return dsc.compile("deepseek-v3", out=out, recipe="deepseek-v3", mesh="tp=4,dp=8,ep=32", replicas=288)


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """320 GPUs in 40 nodes, a slot on each: 256 experts, and 64 for redundant and shared ones."""
    out = tmp_path_factory.mktemp("decode") / "out"
    sizes = {"batch": 80 * 128, "context": 4096, "mode": "decode"}
    return dsc.compile("deepseek-v3", out=out, recipe="deepseek-v3", mesh="tp=4,dp=80,ep=320", replicas=320, shared="routed", **sizes)


def held(artifact: Any) -> int:
    from dsc.ir.walk import parameters

    return sum(count.total for count in parameters(artifact.module).values())


def test_parameters_of_a_rank(prefill: Any, decode: Any) -> None:
    """9 slots or one in each of 58 layers, a quarter of the heads' projections, all else whole; in decode the shared one has slots too."""
    routed = 58 * 256 * EXPERT
    others = EVERY - routed - HEADS
    assert held(prefill) == 58 * 9 * EXPERT + HEADS // 4 + others
    assert held(decode) == 58 * EXPERT + HEADS // 4 + others - 58 * EXPERT


def rows_of(artifact: Any, command: Any) -> list[dict[str, Any]]:
    found = command("inspect", artifact.path, "--comm", "--json").json["comm"]["collectives"]
    return [one for one in found if one["kind"].startswith(("all_to_all_rows", "internode"))]


def test_bytes_of_prefill(prefill: Any, command: Any) -> None:
    """4096 tokens on 4 ranks of a sequence. A token reaches at most 4 nodes by at most 8 rows, and 3 of 4 nodes are others."""
    rows = rows_of(prefill, command)
    tokens = 4096 // 4
    widths = [7168 + 7168 // 128 * 4 + 8 * 4, 8 * 4, 2 * 7168]  # codes, scales and ids; weights; results
    copies = {}
    for axis in ("ep.node", "ep.local"):
        legs = [one for one in rows if one["axis"] == axis]
        assert len(legs) == 3 * 58
        copies[axis] = legs[0]["bytes"] / tokens / widths[0]
        for one, width in zip(legs, widths * 58, strict=True):
            assert abs(one["bytes"] - tokens * copies[axis] * width) <= width
            assert abs(one["crossing"] - one["bytes"] * (3 / 4 if axis == "ep.node" else 0)) <= 1
    assert 1 < copies["ep.node"] <= 4 < copies["ep.local"] <= 8


def test_bytes_of_decode(decode: Any, command: Any) -> None:
    """128 tokens on 4 ranks, each to 8 routed experts and the shared one; 312 of 320 ranks are on other nodes."""
    rows = rows_of(decode, command)
    there, back = 32 * 9 * (7168 + 224), 32 * 9 * 14336
    assert [one["bytes"] for one in rows] == [there, back] * 58
    assert [one["crossing"] for one in rows] == [there * 312 // 320, back * 312 // 320] * 58


def test_redundant_experts_of_prefill_stay_on_the_node_of_their_group(prefill: Any) -> None:
    """Report, section 3.4.1: cross-node traffic does not grow. Two of eight groups on each node, eight redundant experts beside."""
    from dsc.ir.slots import slots_of

    slots = slots_of(prefill.module)
    assert slots is not None
    (every,) = set(slots.held.values())
    nodes = [every[72 * n : 72 * (n + 1)] for n in range(4)]
    assert [len({expert // 32 for expert in held}) for held in nodes] == [2] * 4
    assert [len(set(held)) for held in nodes] == [64] * 4


def test_slots_of_decode(decode: Any) -> None:
    """A slot is on one rank; the shared expert, which every token chooses, has as many as even loads give it: about 256 / 8."""
    from dsc.ir.slots import slots_of

    slots = slots_of(decode.module)
    assert slots is not None
    (every,) = set(slots.held.values())
    assert len(every) == 320
    assert set(every) == set(range(257))
    assert 31 <= every.count(256) <= 33


def test_options_that_need_one_another(tmp_path: Path) -> None:
    for options, message in [
        ({"replicas": 20}, "they need --mesh"),
        ({"shared": "routed", "mesh": "ep=2"}, "it needs --replicas or --placement"),
        ({"dispatch": "two-hop"}, "it needs --mesh"),
        ({"replicas": 20, "placement": "x.json", "mesh": "ep=2"}, "expected one of them"),
    ]:
        with pytest.raises(dsc.DscError, match=message):
            dsc.compile("deepseek-v3-tiny", out=tmp_path / "out", **options)
