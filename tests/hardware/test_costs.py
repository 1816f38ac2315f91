"""Costs of ops: what moves nothing is free, nothing is faster than the peaks, more work takes longer, and exchanges add up."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsc
from dsc.hardware.cluster import cluster
from dsc.hardware.cost import Costs, seconds
from dsc.hardware.links import Group, exchanged, forwarded, gathered, reduced
from dsc.ir.core import Builder, Module, Op, Phase, Value
from dsc.ir.mesh import parse_mesh
from dsc.ir.ops.attention import Attention, AttentionDecode
from dsc.ir.ops.collective import AllGather, AllReduce, AllToAll, AllToAllRows, OwnPart, ReduceScatter
from dsc.ir.ops.control import Pack
from dsc.ir.ops.internode import InternodeCombine, InternodeDispatch
from dsc.ir.ops.linalg import Matmul
from dsc.ir.ops.moe import Route
from dsc.ir.ops.norm import RmsNorm
from dsc.ir.ops.quant import Dequantize, Quantize, ScaledMatmul
from dsc.ir.ops.shape import Broadcast, CacheAppend, Concat, Gather, Reshape, Slice, Take, Transpose
from dsc.ir.routing import Routing
from dsc.ir.types import DType, Ragged, Tensor
from dsc.ir.walk import parameters
from dsc.passes.overlap import costing_of

SETTINGS = settings(max_examples=60, deadline=None, database=None, derandomize=True)
H800 = cluster("h800")
SIZES = st.integers(1, 40_000)


def value(dtype: DType, *shape: int | Ragged) -> Value:
    return Value(Tensor(dtype, shape), "x")


def fp8_product(m: int, n: int, k: int, phase: Phase = Phase.F) -> ScaledMatmul:
    a, b = (Quantize(value(DType.bf16, rows, k), tile=tile) for rows, tile in ((m, (1, 128)), (n, (128, 128))))
    return ScaledMatmul(*a.results, *b.results, phase=phase)


def ops(m: int, n: int, k: int) -> list[Op]:
    a, b = value(DType.bf16, m, k), value(DType.bf16, n, k)
    q = value(DType.bf16, 1, 4, m, 192)
    attention = Attention(q, q, value(DType.bf16, 1, 4, m, 128), causal=True)
    return [Matmul(a, b, transpose_b=True), fp8_product(m, n, k), RmsNorm(a, value(DType.bf16, k), 1e-6), Quantize(a), attention]


@SETTINGS
@given(SIZES, SIZES, SIZES)
def test_nothing_is_faster_than_the_peaks(m: int, n: int, k: int) -> None:
    peak = H800.device.peak
    for op in ops(m, n, k):
        moved = sum(v.type.bytes for v in dict.fromkeys((*op.operands, *op.results)))
        least = max(op.flops() / peak.f8.mid, moved / peak.bandwidth.mid)
        for costs in (Costs(H800), Costs(H800, overlap=True)):
            assert costs.seconds(op) >= least * (1 - 1e-12)
        assert seconds(op, H800.device) >= least * (1 - 1e-12)


@SETTINGS
@given(SIZES, SIZES, SIZES, st.integers(1, 4), st.integers(0, 2))
def test_more_work_takes_no_less_time(m: int, n: int, k: int, factor: int, which: int) -> None:
    larger = [m, n, k]
    larger[which] *= factor
    for small, large in zip(ops(m, n, k), ops(*larger), strict=True):
        assert Costs(H800).seconds(large) >= Costs(H800).seconds(small) * (1 - 1e-12), small
        assert Costs(H800, overlap=True).seconds(small) >= Costs(H800).seconds(small) * (1 - 1e-12)


def test_what_moves_nothing_is_free() -> None:
    x = value(DType.bf16, 16, 8)
    for op in (Reshape(x, (8, 16)), Transpose(x, (1, 0)), OwnPart(x, "ep", 4)):
        assert Costs(H800).seconds(op) == 0
    codes = value(DType.f8e4m3, 4096, 7168)
    turned = Transpose(codes, (1, 0))
    assert Costs(H800).cost(turned).bytes == 2 * 4096 * 7168
    assert Costs(cluster("h800-transposed-reads")).seconds(turned) == 0


def test_what_an_op_reads_is_what_lies_in_memory() -> None:
    """Rows that are taken, the place that is written, an original however often it is stretched, and a value once with its parts."""
    ids, positions = value(DType.i64, 64), value(DType.i64, 64)
    assert Costs(H800).cost(Take(value(DType.bf16, 129280, 7168), ids)).bytes == 2 * 64 * 7168 * 2 + 64 * 8
    last = Broadcast(Reshape(positions, (64, 1, 1)).result, (64, 1, 7168)).result
    assert Costs(H800).cost(Gather(value(DType.bf16, 64, 4096, 7168), last, 1)).bytes == 2 * 64 * 7168 * 2 + 64 * 8
    cache = CacheAppend(value(DType.bf16, 64, 4096, 576), value(DType.bf16, 64, 576), positions)
    assert Costs(H800).cost(cache).bytes == 2 * 64 * 576 * 2 + 64 * 8
    one = value(DType.bf16, 4096, 1, 64)
    key = Concat((value(DType.bf16, 4096, 128, 128), Broadcast(one, (4096, 128, 64)).result), 2)
    assert Costs(H800).cost(key).bytes == 4096 * 2 * (128 * 128 + 64 + 128 * 192)
    twice = Concat((Reshape(one, (4096, 64)).result, Reshape(one, (4096, 64)).result), 1)
    assert Costs(H800).cost(twice).bytes == 4096 * 2 * (64 + 128)


@pytest.mark.parametrize(("heads", "bound"), [(16, "memory"), (128, "matrix")])
def test_decoding_reads_the_latents_once_and_reaches_what_flashmla_does(heads: int, bound: str) -> None:
    """H800: 3000 GB/s where few heads read a cache, 580 and 660 TFLOP/s where 128 do (FlashMLA, README and docs/20250422)."""
    q = value(DType.bf16, 64, heads, 576)
    keys = Reshape(value(DType.bf16, 64, 4096, 576), (64, 4096, 1, 576)).result
    op = AttentionDecode(q, keys, Slice(keys, 3, 0, 512).result, value(DType.i64, 64), 0.1)
    cost = Costs(H800).cost(op)
    took = cost.seconds - H800.launch.mid
    assert cost.bytes == 64 * (4096 * 576 * 2 + heads * (576 + 512) * 2 + 8)
    assert cost.flops == 2 * 64 * heads * 4096 * (576 + 512)
    assert cost.bound == bound
    if bound == "memory":
        assert cost.bytes / took == pytest.approx(3000e9, rel=1e-3)
    else:
        assert 580e12 <= cost.flops / took <= 660e12


def test_distinct_places_by_hand_and_by_deepseeks_rule() -> None:
    """5.295 of 8 nodes and 7.676 of 64 GPUs where any expert may be chosen; 3.954 and 7.49 by the sum of a group's two best."""
    free, limited = Routing(256, 8), Routing(256, 8, 8, 4)
    assert free.distinct(8) == pytest.approx(8 * (1 - comb(224, 8) / comb(256, 8)))
    assert free.distinct(8) == pytest.approx(5.295, abs=5e-4)
    assert free.distinct(64) == pytest.approx(7.676, abs=5e-4)
    assert limited.distinct(8) == pytest.approx(3.954, abs=0.01)  # three standard errors of the sample
    assert limited.distinct(64) == pytest.approx(7.49, abs=0.03)
    assert limited.distinct(1) == 1
    assert Routing(256, 8).distinct(256) == pytest.approx(8)


def test_bytes_of_collectives_by_hand() -> None:
    """Two nodes of four ranks: what leaves a rank over the network and inside its node."""
    ranks = Group(2, 4)
    assert (gathered(ranks, 10).inter, gathered(ranks, 10).intra) == (10, 60)
    assert (reduced(ranks, 80).inter, reduced(ranks, 80).intra) == (20, 120)
    assert (exchanged(ranks, 80).inter, exchanged(ranks, 80).intra) == (40, 30)
    legs = forwarded(Routing(256, 8), Group(8, 8), 4096, 7392)
    assert legs.inter == pytest.approx(4096 * 7392 * 8 * (1 - comb(224, 8) / comb(256, 8)) * 7 / 8)


def test_an_exchange_of_rows_costs_what_is_expected_not_the_bound() -> None:
    """A row for each expert: seven eighths of them leave the node, whoever of the same node another expert has."""
    mesh = parse_mesh("dp=64,ep=64")
    counts = value(DType.i32, 64)
    rows = Ragged("rows", 1 << 20)
    there = AllToAllRows((value(DType.f8e4m3, 32768, 7168), value(DType.f32, 32768, 56)), counts, counts, "ep", 64, rows)
    back = AllToAllRows((value(DType.bf16, rows, 7168),), counts, counts, "ep", 64, 32768)
    costs = Costs(H800, mesh)
    assert costs.cost(there).sent == pytest.approx(32768 * 7392 * 63 / 64)
    assert costs.cost(back).sent == pytest.approx(32768 * 14336 * 63 / 64)
    network = H800.inter.bandwidth.mid * H800.inter.efficiency.mid
    assert costs.seconds(there) == pytest.approx(32768 * 7392 * 7 / 8 / network + H800.inter.latency.mid + H800.comm.notify.mid)
    assert Costs(H800, mesh, imbalance=1.5).cost(there).sent == pytest.approx(1.5 * costs.cost(there).sent)
    expected = Costs(H800, mesh, imbalance=1.5, rows={rows: 1.5 * 32768})
    assert expected.cost(back).sent == pytest.approx(1.5 * costs.cost(back).sent)
    assert costs.cost(there).bound == "network"
    assert costs.stream(there) == "inter"


def over_nodes() -> tuple[Module, list[InternodeDispatch | InternodeCombine]]:
    """4096 tokens of 7168 in FP8 with scales to 256 experts on 64 ranks of 8 nodes, and back in BF16, chosen by DeepSeek-V3's gate."""
    b = Builder("main")
    logits, codes, scales = (b.param("x", Tensor(d, (4096, n))) for d, n in ((DType.f32, 256), (DType.f8e4m3, 7168), (DType.f32, 56)))
    ids = b.emit(Route(logits, None, 8, groups=8, top_groups=4)).results[0]
    there = b.emit(InternodeDispatch((codes, scales), ids, 256, "ep", 64, 8))
    handle = b.emit(Pack((ids, *there.results[3:]))).result
    rows = b.emit(Dequantize(*there.results[:2], tile=(1, 128))).result
    back = b.emit(InternodeCombine(rows, handle, "ep", 64, 8))
    return Module((b.finish(back.results),), "sharded", {"mesh": parse_mesh("dp=64,ep=64").record()}), [there, back]


def test_an_exchange_over_nodes_takes_what_deepeps_kernel_takes() -> None:
    """Bytes by hand: a copy for each of 3.954 nodes and 7.49 ranks, of which seven eighths leave a GPU; the longer link counts."""
    module, ops = over_nodes()
    costs = costing_of(module, H800, imbalance=1.0).alone
    routing = Routing(256, 8, 8, 4)
    network, inside = (link.bandwidth.mid * link.efficiency.mid for link in (H800.inter, H800.intra))
    for op, row in zip(ops, (7392, 14336), strict=True):
        told = 4 * 8 if isinstance(op, InternodeDispatch) else 0  # ids of the row's choice
        legs = forwarded(routing, Group(8, 8), 4096, row + told)
        assert costs.cost(op).sent == pytest.approx(legs.inter + legs.intra, rel=1e-4)  # whole rows
        assert legs.inter / network > legs.intra / inside
        assert costs.seconds(op) == pytest.approx(legs.inter / network + H800.inter.latency.mid + H800.comm.notify.mid, rel=1e-4)
        assert costs.stream(op) == "inter"
    twice = costing_of(module, H800, imbalance=2.0).alone
    assert twice.cost(ops[0]).sent == pytest.approx(2 * costs.cost(ops[0]).sent)


@SETTINGS
@given(st.integers(1, 1 << 16), st.sampled_from([1, 2, 4, 8, 16, 64]), st.integers(2, 4))
def test_collectives_are_monotone_and_never_faster_than_the_links(length: int, ranks: int, factor: int) -> None:
    def collectives(n: int) -> list[Op]:
        x = value(DType.bf16, ranks * n)
        args = ("world", ranks)
        return [AllGather(x, *args), ReduceScatter(x, *args), AllReduce(x, *args), AllToAll(x, *args)]

    costs = Costs(H800)
    for small, large in zip(collectives(length), collectives(length * factor), strict=True):
        assert costs.seconds(small) <= costs.seconds(large)
        found = costs.cost(large)
        assert found.seconds >= found.sent / (H800.intra.bandwidth.mid + H800.inter.bandwidth.mid)
        assert (found.seconds > 0) is (ranks > 1)


def test_communication_takes_units_and_both_sides_slow_down() -> None:
    op = fp8_product(4096, 24576, 1536)
    alone, beside = Costs(H800), Costs(H800, overlap=True)
    assert beside.taken == 20
    assert beside.seconds(op) > 1.1 * alone.seconds(op)
    free = Costs(cluster("h800-co-processor"), overlap=True)
    assert free.taken == 0
    assert free.seconds(op) == alone.seconds(op)


def test_each_recommendation_saves_where_it_says() -> None:
    """DeepSeek-V3 report, section 3.5: what each overlay of the H800 changes, and what it leaves."""
    tiled, cast = fp8_product(4096, 7168, 16384), Quantize(value(DType.bf16, 4096, 7168))
    scale = value(DType.f32, 1, 1)
    single = ScaledMatmul(
        value(DType.f8e4m3, 4096, 16384), scale, value(DType.f8e4m3, 7168, 16384), scale, a_tile=(4096, 16384), b_tile=(7168, 16384)
    )

    def took(name: str, op: Op) -> float:
        return Costs(cluster(name)).seconds(op)

    assert took("h800-group-scaling", tiled) < took("h800", tiled) == took("h800-wide-accumulator", tiled)
    assert took("h800-wide-accumulator", single) < took("h800", single)
    assert Costs(cluster("h800-fused-cast")).cost(cast).bytes == pytest.approx(4096 * 7168)  # BF16 for FP8, once
    assert Costs(H800).cost(cast).bytes == pytest.approx(4096 * (7168 * 3 + 56 * 4))
    counts = value(DType.i32, 64)
    sent = AllToAllRows((value(DType.f8e4m3, 32768, 7168),), counts, counts, "ep", 64, 32768)
    assert took("h800-unified", sent) < took("h800", sent)
    for op in (tiled, cast, sent):
        parts = [took(name, op) for name in ("h800", "h800-group-scaling", "h800-fused-cast", "h800-unified")]
        assert took("h800-all", op) <= min(parts) * (1 + 1e-12)


def test_a_hop_of_the_pipeline_takes_bytes_by_bandwidth() -> None:
    """4096 x 7168 in BF16 are 58.7 MB: 1.17 ms at 50 GB/s."""
    ideal = H800.with_figures({"inter.efficiency": 1.0, "inter.latency": 0.0, "intra.efficiency": 1.0, "intra.latency": 0.0})
    sent = 4096 * 7168 * 2
    assert round(Costs(ideal).send(sent) * 1e3, 2) == 1.17
    assert Costs(ideal).send(sent, away=False) == pytest.approx(sent / 160e9)
    assert Costs(H800).send(sent) > Costs(ideal).send(sent)
    assert Costs(H800, overlap=True).send(sent) > Costs(H800).send(sent)
    assert Costs(H800).send(0) == 0


def test_two_hops_follow_the_mesh_whatever_a_domain_is() -> None:
    """A program for nodes of two ranks, on a cluster whose domains have eight: both hops are inside one."""
    source = dsc.trace("deepseek-v3-tiny", seq=16, batch=4)
    module = dsc.apply(source, 'simplify,shard-experts{mesh="dp=4,ep=4,node=2",dispatch=two-hop}')
    costs = Costs.of(module, H800)
    found = {op.axis: costs.cost(op) for func in module.funcs for op in func.ops if isinstance(op, AllToAllRows)}
    assert found.keys() == {"ep.node", "ep.local"}
    assert all(cost.seconds > 0 for cost in found.values())
    made = dsc.apply(module, "overlap{microbatches=2}")
    assert made.stage == "scheduled"
    assert parameters(made) == parameters(module)  # hops in two functions, now: a token goes to as many of as many experts
