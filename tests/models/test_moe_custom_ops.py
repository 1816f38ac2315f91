"""The dsc torch ops: torch's own contract checks, naive loops, and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsc.models import ops

EPS = torch.finfo(torch.float32).eps


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def routed(tokens: int = 7, experts: int = 6, top_k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(tokens, experts)
    ids, weights = ops.route(logits, None, top_k, "softmax", 1, 1, "max", False, 1.0)
    return logits, ids, weights


def samples(grad: bool) -> dict[str, tuple[object, ...]]:
    torch.manual_seed(0)
    angles = torch.rand(5, 4)
    _, ids, weights = routed()
    x = randn(7, 5, grad=grad)
    rows, counts, order = (part.detach() for part in ops.dispatch(x, ids, 6))
    return {
        "rope": (randn(2, 5, 3, 8, grad=grad), angles.cos(), angles.sin(), True),
        "route": (randn(7, 12, grad=grad), torch.randn(12), 4, "sigmoid", 4, 2, "top2", True, 2.5),
        "dispatch": (x, ids, 6),
        "combine": (rows.requires_grad_(grad), order, weights.detach().requires_grad_(grad)),
        "grouped_matmul": (rows.detach().requires_grad_(grad), randn(6, 4, 5, grad=grad), counts),
        "swiglu": (randn(3, 4, grad=grad), randn(3, 4, grad=grad)),
        "cache_append": (randn(2, 6, 3, grad=grad), randn(2, 3, grad=grad), torch.tensor([5, 0])),
        "attention_decode": (
            randn(2, 4, 8, grad=grad),
            randn(2, 6, 2, 8, grad=grad),
            randn(2, 6, 2, 5, grad=grad),
            torch.tensor([5, 0]),
            0.3,
        ),
        "balance_loss": (randn(14, 6, grad=grad), torch.randint(0, 6, (14, 3)), 2, "sigmoid"),
    }


@pytest.mark.parametrize("name", list(samples(False)))
def test_schema_fake_rule_and_ahead_of_time_tracing(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.dsc, name).default, samples(False)[name])


@pytest.mark.parametrize("name", list(samples(True)))
def test_autograd_registration(name: str) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.dsc, name).default, samples(True)[name], test_utils=checks)


def test_schemas_are_those_that_importers_match() -> None:
    schemas = {name: str(getattr(torch.ops.dsc, name).default._schema) for name in samples(False)}
    assert schemas == {
        "rope": "dsc::rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
        "route": "dsc::route(Tensor logits, Tensor? bias, SymInt top_k, str score, SymInt groups, SymInt top_groups, str group_score, "
        "bool normalize, float scale) -> (Tensor, Tensor)",
        "dispatch": "dsc::dispatch(Tensor x, Tensor ids, SymInt experts) -> (Tensor, Tensor, Tensor)",
        "combine": "dsc::combine(Tensor rows, Tensor order, Tensor weights) -> Tensor",
        "grouped_matmul": "dsc::grouped_matmul(Tensor x, Tensor w, Tensor counts) -> Tensor",
        "swiglu": "dsc::swiglu(Tensor gate, Tensor up) -> Tensor",
        "cache_append": "dsc::cache_append(Tensor cache, Tensor new, Tensor positions) -> Tensor",
        "attention_decode": "dsc::attention_decode(Tensor q, Tensor k, Tensor v, Tensor positions, float scale) -> Tensor",
        "balance_loss": "dsc::balance_loss(Tensor logits, Tensor ids, SymInt sequences, str score) -> Tensor",
    }


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_multiplication_by_unit_complex_numbers(interleaved: bool, batched: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    angles = torch.rand(2, 5, 4, dtype=torch.float64) * 50
    if not batched:
        angles = angles[:1].expand(2, 5, 4)
    pairs = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles).unsqueeze(2))
    expected = (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
    cos, sin = angles.float().cos(), angles.float().sin()
    cos, sin = (cos, sin) if batched else (cos[0], sin[0])
    actual = ops.rope(x.float(), cos, sin, interleaved)
    # Two products and a sum of the rounded inputs: each of |x cos| + |x sin| <= 2 max|x| is off by a few units, and angles up to 50
    # carry half a unit of 50 themselves.
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2 * x.abs().max().item() * (3 + 50 / 2) * EPS)


def naive_route(
    logits: list[float], bias: list[float], top_k: int, score: str, groups: int, top_groups: int, group_score: str
) -> list[int]:
    """The choice for one token in plain Python over float32 scores computed by torch, so that ties are the same."""
    row = torch.tensor(logits)
    scores = (row.sigmoid() if score == "sigmoid" else row.softmax(0)) + torch.tensor(bias)
    choice = [scores[index].item() for index in range(len(logits))]
    size = len(choice) // groups
    kept = set(range(groups))
    if groups > 1:
        strength = []
        for group in range(groups):
            best = sorted(choice[group * size : (group + 1) * size], reverse=True)[: 2 if group_score == "top2" else 1]
            strength.append(torch.tensor(best).sum().item())
        kept = set(sorted(range(groups), key=lambda group: (-strength[group], group))[:top_groups])
    allowed = [index for index in range(len(choice)) if index // size in kept]
    return sorted(allowed, key=lambda index: (-choice[index], index))[:top_k]


@st.composite
def routing_problems(draw: st.DrawFn) -> tuple[list[list[float]], list[float], int, str, int, int, str]:
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, top_groups * size if groups > 1 else size))
    # Few distinct values, so that ties between experts and between groups are common; negative biased scores occur.
    value = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0])
    rows = draw(st.lists(st.lists(value, min_size=groups * size, max_size=groups * size), min_size=1, max_size=4))
    bias = draw(st.lists(st.sampled_from([-2.0, 0.0, 0.25]), min_size=groups * size, max_size=groups * size))
    return rows, bias, top_k, draw(st.sampled_from(["sigmoid", "softmax"])), groups, top_groups, draw(st.sampled_from(["top2", "max"]))


@settings(max_examples=200, deadline=None)
@given(routing_problems(), st.booleans())
def test_route_against_loops(problem: tuple[list[list[float]], list[float], int, str, int, int, str], normalize: bool) -> None:
    rows, bias, top_k, score, groups, top_groups, group_score = problem
    logits = torch.tensor(rows)
    ids, weights = ops.route(logits, torch.tensor(bias), top_k, score, groups, top_groups, group_score, normalize, 2.5)
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    scores = (logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)).double()
    for token, row in enumerate(rows):
        chosen = naive_route(row, bias, top_k, score, groups, top_groups, group_score)
        assert ids[token].tolist() == chosen
        expected = scores[token, chosen]
        expected = 2.5 * (expected / expected.sum() if normalize else expected)
        # A sum of k positive terms, one division, one product: k + 2 roundings.
        torch.testing.assert_close(weights[token].double(), expected, rtol=(top_k + 2) * EPS, atol=0)


@pytest.mark.parametrize("experts", [16, 256, 384])
def test_ties_go_to_the_lower_index_at_full_size(experts: int) -> None:
    """Sorting short rows is stable in any case, sorting long ones is not."""
    logits = torch.zeros(64, experts)
    logits[:, experts // 2 :] = 1.0
    ids, _ = ops.route(logits, None, 8, "sigmoid", 8, 4, "top2", True, 2.5)
    assert (ids == torch.arange(experts // 2, experts // 2 + 8)).all()
    order = ops.dispatch(torch.zeros(64, 1), ids, experts)[2]
    assert torch.equal(order.view(8, 64), torch.arange(64) * 8 + torch.arange(8).unsqueeze(1))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_dispatch_and_combine_against_loops(tokens: int, experts: int, top_k: int, random: object) -> None:
    top_k = min(top_k, experts)
    ids = torch.tensor([random.sample(range(experts), top_k) for _ in range(tokens)], dtype=torch.int32)  # type: ignore[attr-defined]
    x = torch.randn(tokens, 3)
    weights = torch.rand(tokens, top_k)
    rows, counts, order = ops.dispatch(x, ids, experts)
    expected = [
        (token * top_k + slot, token)
        for expert in range(experts)
        for token in range(tokens)
        for slot in range(top_k)
        if ids[token, slot] == expert
    ]
    assert order.tolist() == [flat for flat, _ in expected]
    assert torch.equal(rows, x[[token for _, token in expected]])
    assert counts.tolist() == [(ids == expert).sum().item() for expert in range(experts)]
    assert order.dtype == counts.dtype == torch.int32

    result = torch.zeros(tokens, 3, dtype=torch.float64)
    for row, flat in enumerate(order.tolist()):
        result[flat // top_k] += weights[flat // top_k, flat % top_k].double() * rows[row].double()
    size = (weights.sum(1, keepdim=True) * x.abs()).double()  # the sum of the terms' magnitudes
    assert ((ops.combine(rows, order, weights) - result).abs() <= (top_k + 1) * EPS * size).all()


def test_combine_rounds_once() -> None:
    """1 + 2^-8 + 2^-8 in bfloat16: exact sum 1 + 2^-7; rounding after each addition would give 1."""
    rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    combined = ops.combine(rows, torch.tensor([0, 1, 2], dtype=torch.int32), torch.ones(1, 3))
    assert combined.item() == 1 + 2.0**-7


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [7, 0, 0], [1, 5, 1]])
def test_grouped_matmul_against_one_product_per_expert(counts: list[int]) -> None:
    torch.manual_seed(2)
    x, w = torch.randn(7, 33), torch.randn(3, 5, 33)
    actual = ops.grouped_matmul(x, w, torch.tensor(counts, dtype=torch.int32)).double()
    expert = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    expected = torch.einsum("rk,rnk->rn", x.double(), w.double()[expert])
    size = torch.einsum("rk,rnk->rn", x.double().abs(), w.double().abs()[expert])
    assert ((actual - expected).abs() <= 33 * EPS * size).all()


def test_attention_decode_against_torch_attention() -> None:
    torch.manual_seed(3)
    q, k, v, positions = torch.randn(3, 8, 16), torch.randn(3, 9, 2, 16), torch.randn(3, 9, 2, 12), torch.tensor([0, 4, 8])
    mask = (torch.arange(9) <= positions[:, None])[:, None, None]  # (B, 1, 1, N)
    query, key, value = q.double().unsqueeze(2), k.double().transpose(1, 2), v.double().transpose(1, 2)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.2, enable_gqa=True)[:, :, 0]
    torch.testing.assert_close(ops.attention_decode(q, k, v, positions, 0.2).double(), expected, rtol=1e-5, atol=1e-6)


def test_what_lies_beyond_the_position_is_not_read() -> None:
    q, k, v, positions = torch.randn(2, 4, 8), torch.randn(2, 6, 1, 8), torch.randn(2, 6, 1, 8), torch.tensor([2, 5])
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[0, 3:], poisoned_v[0, 3:] = 1e30, 1e30
    expected = ops.attention_decode(q, k, v, positions, 1.0)
    assert torch.equal(ops.attention_decode(q, poisoned_k, poisoned_v, positions, 1.0), expected)


def test_cache_append_writes_one_position_and_leaves_its_input_alone() -> None:
    cache, new = torch.zeros(2, 4, 3), torch.ones(2, 3)
    result = ops.cache_append(cache, new, torch.tensor([3, 1]))
    expected = torch.zeros(2, 4, 3)
    expected[0, 3], expected[1, 1] = 1, 1
    assert torch.equal(result, expected)
    assert not cache.any()


def naive_balance(logits: Tensor, ids: Tensor, sequences: int, score: str) -> Tensor:
    """Equations 17-20 of the DeepSeek-V3 report, term by term."""
    experts, top_k, length = logits.shape[1], ids.shape[1], logits.shape[0] // sequences
    total = torch.zeros((), dtype=torch.float64)
    for sequence in range(sequences):
        tokens = range(sequence * length, (sequence + 1) * length)
        for expert in range(experts):
            frequency = experts / (top_k * length) * sum(expert in ids[token].tolist() for token in tokens)
            mean = torch.zeros((), dtype=torch.float64)
            for token in tokens:
                row = logits[token].double()
                scores = row.sigmoid() if score == "sigmoid" else row.exp()
                mean = mean + scores[expert] / scores.sum() / length
            total = total + frequency * mean
    return total / sequences


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_balance_loss_and_its_gradient_against_loops(score: str) -> None:
    torch.manual_seed(4)
    logits = torch.randn(10, 6, requires_grad=True)
    _, ids, _ = routed(10)
    actual, expected = ops.balance_loss(logits, ids, 2, score), naive_balance(logits, ids, 2, score)
    assert math.isclose(actual.item(), expected.item(), rel_tol=1e-6)
    (gradient,) = torch.autograd.grad(actual, logits)
    (reference,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, reference.float(), rtol=1e-5, atol=1e-7)


def test_perfect_balance_costs_one() -> None:
    ids = torch.arange(8).view(4, 2)
    assert ops.balance_loss(torch.zeros(4, 8), ids, 1, "sigmoid").item() == 1.0


CASTS: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
    (ops.swiglu, (torch.randn(50), torch.randn(50))),
    (lambda x, w: ops.grouped_matmul(x, w, torch.tensor([2, 3], dtype=torch.int32)), (torch.randn(5, 40), torch.randn(2, 4, 40))),
]


@pytest.mark.parametrize(("op", "inputs"), CASTS, ids=["swiglu", "grouped_matmul"])
def test_bfloat16_results_are_the_float32_results_rounded_once(op: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    narrow = [value.bfloat16() for value in inputs]
    assert torch.equal(op(*narrow), op(*(value.float() for value in narrow)).bfloat16())
