"""Ops that torch lacks, against loops in Python floats that say in the plainest words what the op's docstring says."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from dsc import backends
from dsc.backends.arrays import Array, widen
from dsc.ir.ops.attention import Attention, AttentionDecode
from dsc.ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad
from dsc.ir.ops.loss import BalanceLoss
from dsc.ir.ops.moe import ChooseSlots, Combine, CombineGroups, Dispatch, DispatchGroups, Redispatch, Route, RowWeights, SlotWeights
from dsc.ir.ops.quant import Dequantize, GroupedScaledMatmul, GroupedScaledMatmulWgrad, ScaledMatmul
from dsc.ir.ops.shape import CacheAppend, Scatter
from dsc.testing.bounds import bound
from dsc.testing.samples import samples
from dsc.testing.sampling import Sample


def numbers(x: Array) -> list:
    return (x if x.dtype.kind in "iub" else widen(x, np.float64)).tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exponentials = [math.exp(x - top) for x in row]
    return [e / math.fsum(exponentials) for e in exponentials]


def best(scores: dict[int, float], k: int) -> list[int]:
    return sorted(scores, key=lambda i: (-scores[i], i))[:k]


def route(op: Route, logits: Array, bias: Array | None = None) -> tuple[list, list]:
    ids, weights = [], []
    for row in numbers(logits):
        scores = [sigmoid(x) for x in row] if op.score == "sigmoid" else softmax(row)
        choice = [s + b for s, b in zip(scores, numbers(bias), strict=True)] if bias is not None else scores
        size = len(row) // op.groups
        group = {g: sorted(choice[g * size : (g + 1) * size])[::-1] for g in range(op.groups)}
        value = {g: members[0] if op.group_score == "max" else math.fsum(members[:2]) for g, members in group.items()}
        kept = best(value, op.top_groups)
        chosen = best({e: choice[e] for e in range(len(row)) if e // size in kept}, op.top_k)
        total = math.fsum(scores[e] for e in chosen) + 1e-20 if op.normalize else 1.0
        ids.append(chosen)
        weights.append([scores[e] / total * op.scale for e in chosen])
    return ids, weights


def dispatch(op: Dispatch, *operands: Array) -> tuple[list, ...]:
    *xs, ids = map(numbers, operands)
    order = [(t, s) for expert in range(op.experts) for t, row in enumerate(ids) for s, e in enumerate(row) if e == expert]
    counts = [sum(e == expert for row in ids for e in row) for expert in range(op.experts)]
    return *([x[t] for t, _ in order] for x in xs), counts, ([t * operands[-1].shape[1] + s for t, s in order],)


def combine(op: Combine, rows: Array, handle: tuple[Array], weights: Array) -> list:
    values, order = numbers(rows), numbers(handle[0])
    table = numbers(weights)
    k = weights.shape[1]
    return [
        [math.fsum(table[t][s] * values[order.index(t * k + s)][h] for s in range(k)) for h in range(rows.shape[1])]
        for t in range(len(table))
    ]


def grouped_matmul(op: GroupedMatmul, x: Array, w: Array, counts: Array) -> list:
    group_of = [g for g, count in enumerate(numbers(counts)) for _ in range(count)]
    matrices, result = numbers(w), []
    for r, row in enumerate(numbers(x)):
        if r >= len(group_of):
            result.append([0.0] * op.result.shape[1])
            continue
        m = matrices[group_of[r]]
        columns = m if op.transpose_b else [list(c) for c in zip(*m, strict=True)]
        result.append([math.fsum(a * b for a, b in zip(row, column, strict=True)) for column in columns])
    return result


def attend(q: list[float], keys: list[list[float]], values: list[list[float]], scale: float) -> list[float]:
    p = softmax([math.fsum(a * b for a, b in zip(q, k, strict=True)) * scale for k in keys])
    return [math.fsum(w * v[d] for w, v in zip(p, values, strict=True)) for d in range(len(values[0]))]


def decode(op: AttentionDecode, q: Array, k: Array, v: Array, positions: Array, pages: Array | None = None) -> list:
    if pages is not None:
        k, v = (np.stack([np.concatenate([x[page] for page in row]) for row in pages]) for x in (k, v))
    shared = q.shape[1] // k.shape[2]
    keys, values, queries = numbers(k), numbers(v), numbers(q)
    return [
        [
            attend(row, [keys[b][j][h // shared] for j in range(last + 1)], [values[b][j][h // shared] for j in range(last + 1)], op.scale)
            for h, row in enumerate(queries[b])
        ]
        for b, last in enumerate(numbers(positions))
    ]


def balance_loss(op: BalanceLoss, logits: Array, ids: Array) -> float:
    tokens, experts = logits.shape
    length = tokens // op.sequences
    losses = []
    for s in range(op.sequences):
        rows, chosen = numbers(logits)[s * length : (s + 1) * length], numbers(ids)[s * length : (s + 1) * length]
        shares = []
        for row in rows:
            scores = [sigmoid(x) for x in row] if op.score == "sigmoid" else softmax(row)
            shares.append([x / math.fsum(scores) for x in scores])
        f = [Fraction(experts, ids.shape[1] * length) * sum(e == i for row in chosen for e in row) for i in range(experts)]
        p = [math.fsum(share[i] for share in shares) / length for i in range(experts)]
        losses.append(math.fsum(float(a) * b for a, b in zip(f, p, strict=True)))
    return math.fsum(losses) / op.sequences


def cache_append(op: CacheAppend, cache: Array, new: Array, positions: Array) -> list:
    result = numbers(cache)
    for b, position in enumerate(numbers(positions)):
        result[b][position] = numbers(new)[b]
    return result


def dequantised(codes: Array, scales: Array, tile: tuple[int, int]) -> Array:
    """[rows, columns] codes times the scale of their tile, in float64."""
    return np.array([[c * scales[i // tile[0]][j // tile[1]] for j, c in enumerate(row)] for i, row in enumerate(numbers(codes))])


def dequantize(op: Dequantize, codes: Array, scales: Array, counts: Array | None = None) -> list:
    if counts is not None:
        starts = np.cumsum([0, *numbers(counts)])
        first = np.cumsum([0, *(-(-n // op.tile[0]) for n in numbers(counts))])
        return np.concatenate(
            [dequantised(codes[a:b], scales[t:], op.tile) for a, b, t in zip(starts, starts[1:], first, strict=False) if b > a]
        ).tolist()
    found = [dequantised(c, s, op.tile) for c, s in zip(_matrices(codes), _matrices(scales), strict=True)]
    return np.array(found).reshape(codes.shape).tolist()


def _matrices(x: Array) -> Array:
    return x.reshape(-1, *x.shape[-2:])


def scaled_matmul(op: ScaledMatmul, a: Array, a_scales: Array, b: Array, b_scales: Array) -> list:
    right = dequantised(b, b_scales, op.b_tile)
    found = [dequantised(c, s, op.a_tile) @ right.T for c, s in zip(_matrices(a), _matrices(a_scales), strict=True)]
    return np.array(found).reshape(*a.shape[:-1], len(b)).tolist()


def grouped_scaled_matmul(op: GroupedScaledMatmul, x: Array, x_scales: Array, w: Array, w_scales: Array, counts: Array) -> list:
    if x.ndim == 3:
        result = np.zeros((*x.shape[:2], w.shape[1]))
        for e, count in enumerate(numbers(counts)):
            rows = dequantised(x[e, :count], x_scales[e, :count], op.x_tile).reshape(count, x.shape[2])
            result[e, :count] = rows @ dequantised(w[e], w_scales[e], op.w_tile).T
        return result.tolist()
    groups = by_group(x, x_scales, op.x_tile, counts)
    found = [rows @ dequantised(w[e], w_scales[e], op.w_tile).T for e, rows in enumerate(groups)]
    return np.concatenate([*found, np.zeros((len(x) - sum(map(len, found)), w.shape[1]))]).tolist()


def grouped_scaled_matmul_wgrad(op: GroupedScaledMatmulWgrad, a: Array, a_scales: Array, b: Array, b_scales: Array, counts: Array) -> list:
    pairs = zip(by_group(a, a_scales, op.a_tile, counts), by_group(b, b_scales, op.b_tile, counts), strict=True)
    return np.stack([left.T @ right for left, right in pairs]).tolist()


def by_group(x: Array, scales: Array, tile: tuple[int, int], counts: Array) -> list[Array]:
    """The dequantised rows of each group; tiles restart at each."""
    found, start, scale_start = [], 0, 0
    for count in numbers(counts):
        tiles = -(-count // tile[0])
        rows = dequantised(x[start : start + count], scales[scale_start : scale_start + tiles], tile)
        found.append(rows.reshape(count, x.shape[1]))
        start, scale_start = start + count, scale_start + tiles
    return found


def grouped_matmul_wgrad(op: GroupedMatmulWgrad, a: Array, b: Array, counts: Array) -> list:
    result, start, left, right = [], 0, numbers(a), numbers(b)
    for count in numbers(counts):
        rows = range(start, start + count)
        result.append([[math.fsum(left[r][m] * right[r][n] for r in rows) for n in range(b.shape[1])] for m in range(a.shape[1])])
        start += count
    return result


def redispatch(op: Redispatch, *operands: Array | tuple[Array]) -> tuple[list, ...] | list:
    *xs, (order,) = operands
    slots = numbers(order)
    rows = tuple([numbers(x)[slot // (len(slots) // len(x))] for slot in slots] for x in xs)
    return rows if len(rows) > 1 else rows[0]


def row_weights(op: RowWeights, weights: Array, handle: tuple[Array]) -> list:
    table, k = numbers(weights), weights.shape[1]
    return [[table[slot // k][slot % k]] for slot in numbers(handle[0])]


def slot_weights(op: SlotWeights, rows: Array, handle: tuple[Array]) -> list:
    slots = dict(zip(numbers(handle[0]), numbers(rows), strict=True))
    return [[slots[token * op.slots + s][0] for s in range(op.slots)] for token in range(len(slots) // op.slots)]


def dispatch_groups(op: DispatchGroups, *operands: Array) -> tuple[list, ...]:
    *xs, ids = map(numbers, operands)
    members = [range(g * op.size, (g + 1) * op.size) for g in range(op.groups)]
    rows = [(g, t) for g in range(op.groups) for t, row in enumerate(ids) if any(e in members[g] for e in row)]
    inside = [[members[g].index(e) if e in members[g] else -1 for e in ids[t]] for g, t in rows]
    counts = [sum(g == one for one, _ in rows) for g in range(op.groups)]
    return *([x[t] for _, t in rows] for x in xs), inside, counts, [t for _, t in rows]


def choose_slots(op: ChooseSlots, ids: Array, slots: Array, start: Array | None = None) -> list:
    places = {e: [s for s, held in enumerate(numbers(slots)) if held == e] for e in set(numbers(slots))}
    turn = dict.fromkeys(places, int(start[0]) if start is not None else 0)
    found = []
    for row in numbers(ids):
        found.append([places[e][(turn[e] + row[:s].count(e)) % len(places[e])] for s, e in enumerate(row)])
        for e in row:
            turn[e] += 1
    return found


def combine_groups(op: CombineGroups, rows: Array, tokens: Array, ids: Array, weights: Array | None = None) -> list:
    values, owner = numbers(rows), numbers(tokens)
    factor = [w for (w,) in numbers(weights)] if weights is not None else [1.0] * len(values)
    mine = [[r for r, o in enumerate(owner) if o == t] for t in range(len(ids))]
    return [[math.fsum(factor[r] * values[r][h] for r in some) for h in range(rows.shape[1])] for some in mine]


def scatter(op: Scatter, x: Array, indices: Array, updates: Array) -> list:
    result = np.array(numbers(x))
    axis = op.axis % x.ndim
    for at in np.ndindex(*indices.shape):
        result[(*at[:axis], indices[at], *at[axis + 1 :])] = widen(updates, np.float64)[at]
    return result.tolist()


LOOPS = {
    Route: route,
    Dispatch: dispatch,
    Combine: combine,
    GroupedMatmul: grouped_matmul,
    AttentionDecode: decode,
    BalanceLoss: balance_loss,
    CacheAppend: cache_append,
    Dequantize: dequantize,
    ScaledMatmul: scaled_matmul,
    GroupedScaledMatmul: grouped_scaled_matmul,
    GroupedScaledMatmulWgrad: grouped_scaled_matmul_wgrad,
    GroupedMatmulWgrad: grouped_matmul_wgrad,
    Redispatch: redispatch,
    RowWeights: row_weights,
    SlotWeights: slot_weights,
    DispatchGroups: dispatch_groups,
    CombineGroups: combine_groups,
    ChooseSlots: choose_slots,
    Scatter: scatter,
}


def bit_exact_model(sample: Sample) -> bool:
    """A modelled accumulator is tested bit by bit in the tests of numerics."""
    return "accumulation" in sample.attributes and sample.attributes["accumulation"].arithmetic == "tensor-core"


@pytest.mark.parametrize("sample", [s for s in samples(*LOOPS) if not bit_exact_model(s)], ids=lambda s: s.name)
def test_loops_find_the_same(sample: Sample) -> None:
    for seed in range(3):
        op, arrays = sample.op(), sample.arrays(seed)
        expected = LOOPS[sample.cls](op, *arrays)
        expected = expected if len(op.results) > 1 else (expected,)
        for backend in ("numpy", "numpy-f64"):
            results = backends.get(backend).evaluate(op, arrays)
            same(results, bound(op, arrays, results), expected)


def same(results: tuple, bounds: tuple, expected: tuple) -> None:
    flat = [x for r in results for x in (r if isinstance(r, tuple) else (r,))]
    wanted = [x for r in expected for x in (r if isinstance(r, tuple) else (r,))]
    for found, limit, exactly in zip(flat, bounds, wanted, strict=True):
        y = np.array(exactly, np.float64).reshape(found.shape)
        x = np.array(numbers(found), np.float64).reshape(found.shape)
        rounding = np.abs(widen(np.asarray(y.astype(found.dtype)), np.float64) - y) if found.dtype.kind not in "iub" else 0.0
        fine = np.abs(x - y) <= limit + rounding
        assert fine.all(), f"{x[~fine][:3]} against {y[~fine][:3]}"


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_sees_no_key_gives_zero(causal: bool) -> None:
    (sample, *_) = [s for s in samples(Attention) if s.tag == ("masked twice" if causal else "with a mask of bools")]
    (found,) = backends.get("numpy").evaluate(sample.op(), sample.arrays())
    assert not widen(found[..., 0, :]).any()
    assert widen(found[..., 1:, :]).any()


def test_groups_without_rows_are_not_read() -> None:
    """Their weights may be anything: NaN here."""
    sample = samples(GroupedMatmul)[0]
    x, w, counts = sample.arrays()
    spoiled = w.copy()
    spoiled[counts == 0] = np.nan
    assert (counts == 0).any()
    for array in (w, spoiled):
        (found,) = backends.get("numpy").evaluate(sample.op(), (x, array, counts))
        assert np.isfinite(found).all()
