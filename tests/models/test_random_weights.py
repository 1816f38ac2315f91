"""Random weights: a function of seed and name, the same under every spelling, distributed as documented."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc.ir.errors import DscError
from dsc.models.checkpoint import RandomWeights, StateDict, Wanted

STEM = "model.layers.3.mlp.experts"


def test_the_values_are_those_of_the_documented_stream() -> None:
    """Recomputed number by number: a change here would silently change every run that names a seed."""
    found = RandomWeights(5).get(Wanted("lm_head.weight", "f32", (7, 9)))
    key = int.from_bytes(hashlib.sha256(b"5:lm_head.weight").digest()[:16], "little")
    words = [int(word) for word in np.random.Philox(key=key).random_raw(16)]
    picks = [word >> 16 * i & 0xFFFF for word in words for i in range(4)][:63]
    expected = [np.float32(NormalDist().inv_cdf((pick + 0.5) / 65536)) * np.float32(1 / 3) for pick in picks]
    np.testing.assert_array_equal(found.ravel(), np.array(expected, np.float32))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64),
    experts=st.lists(st.integers(0, 300), min_size=1, max_size=5, unique=True),
    inner=st.integers(1, 70),
    hidden=st.integers(1, 70),
    dtype=st.sampled_from(["bf16", "f32", "f16"]),
)
def test_every_spelling_and_every_rank_sees_the_same_numbers(seed: int, experts: list[int], inner: int, hidden: int, dtype: str) -> None:
    weights, number = RandomWeights(seed), len(experts)
    on_disk = {
        f"{STEM}.{e}.{p}.weight": weights.get(Wanted(f"{STEM}.{e}.{p}.weight", dtype, shape))
        for e in experts
        for p, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner)))
    }
    stored = StateDict(on_disk)
    for name, shape in (("gate_proj", (inner, hidden)), ("down_proj", (hidden, inner)), ("gate_up_proj", (2 * inner, hidden))):
        wanted = Wanted(f"{STEM}.{name}", dtype, (number, *shape), tuple(experts))
        np.testing.assert_array_equal(weights.get(wanted), stored.get(wanted))


def test_a_tensor_longer_than_a_chunk_is_drawn_from_one_stream() -> None:
    """The first rows of a long tensor are those of a short one of the same name and width."""
    long, short = (RandomWeights(0).get(Wanted("w", "f32", (rows, 1001))) for rows in (200, 3))
    np.testing.assert_array_equal(long[:3], short)


def test_seeds_names_and_experts_are_independent() -> None:
    """200,000 products of independent N(0, 1): their mean has standard deviation 1 / sqrt(200,000); five of these allowed."""
    shape = (400, 500)
    draws = [
        RandomWeights(seed).get(Wanted(name, "f32", shape)).ravel() * math.sqrt(shape[1])
        for seed in (0, 1)
        for name in (f"{STEM}.0.gate_proj.weight", f"{STEM}.1.gate_proj.weight", f"{STEM}.0.up_proj.weight", "lm_head.weight")
    ]
    products = np.array(draws) @ np.array(draws).T / draws[0].size
    assert np.abs(products - np.diag(np.diag(products))).max() < 5 / math.sqrt(draws[0].size)


@pytest.mark.parametrize(("name", "shape", "mean", "deviation"), [
    ("model.layers.0.self_attn.q_a_proj.weight", (600, 400), 0.0, 1 / 20),
    ("model.layers.3.mlp.gate.weight", (600, 400), 0.0, 1 / 20),
    ("model.embed_tokens.weight", (600, 400), 0.0, 1.0),
    ("model.norm.weight", (240_000,), 1.0, 0.1),
    ("model.layers.0.self_attn.kv_a_layernorm.weight", (240_000,), 1.0, 0.1),
    ("model.layers.61.enorm.weight", (240_000,), 1.0, 0.1),
    ("model.layers.3.mlp.gate.e_score_correction_bias", (240_000,), 0.0, 0.01),
    ("model.layers.0.self_attn.q_proj.bias", (240_000,), 0.0, 0.02),
])  # fmt: skip
def test_distribution(name: str, shape: tuple[int, ...], mean: float, deviation: float) -> None:
    """Moments within five of their own standard errors, and Kolmogorov-Smirnov's greatest distance from the normal, at p = 1e-6."""
    normal = np.sort((RandomWeights(0).get(Wanted(name, "f64", shape)).ravel() - mean) / deviation)
    count = normal.size
    assert abs(normal.mean()) < 5 / math.sqrt(count)
    assert abs(normal.var() - 1) < 5 * math.sqrt(2 / count)
    points = normal[::100]
    expected = np.array([NormalDist().cdf(x) for x in points])
    assert np.abs(np.arange(0, count, 100) / count - expected).max() < math.sqrt(math.log(2 / 1e-6) / (2 * count)) + 1 / 65536 + 1e-6


def test_fp8_and_its_scales_agree_with_bf16() -> None:
    """Codes times scales are the values of the same name, to E4M3's half unit (2^-4 relative, 2^-10 scale units near zero)."""
    shape, weights = (300, 200), RandomWeights(3)
    fused = {
        f"{STEM}.gate_proj": weights.get(Wanted(f"{STEM}.gate_proj", "f8e4m3", (2, *shape))),
        f"{STEM}.gate_proj_scale_inv": weights.get(Wanted(f"{STEM}.gate_proj_scale_inv", "f32", (2, 3, 2))),
    }
    found = StateDict(fused).get(Wanted(f"{STEM}.gate_proj", "f32", (2, *shape)))
    exact = weights.get(Wanted(f"{STEM}.gate_proj", "f32", (2, *shape)))
    scale = fused[f"{STEM}.gate_proj_scale_inv"]
    assert np.all(scale > 0)
    assert len(np.unique(scale)) == scale.size
    # 1 + 1e-6 for the rounding of the division and the product to float32
    assert np.all(np.abs(found - exact) <= np.maximum(np.abs(exact) / 16, scale.max() / 1024) * (1 + 1e-6))


def test_only_floats_are_random() -> None:
    RandomWeights(0).check([Wanted("a", "bf16", (2,))])
    with pytest.raises(DscError) as error:
        RandomWeights(0).get(Wanted("steps", "i64", (2,)))
    assert str(error.value) == "random weights: steps: found i64[2], expected one of f64, f32, f16, bf16, f8e4m3, f8e5m2"


def test_what_training_begins_with() -> None:
    weights = RandomWeights(3, initializer_range=0.006)
    matrix = weights.get(Wanted(f"{STEM}.up_proj", "f32", (4, 64, 96)))
    assert matrix.std() == pytest.approx(0.006, rel=5 / math.sqrt(2 * matrix.size))  # five standard errors
    assert abs(matrix.mean()) < 5 * 0.006 / math.sqrt(matrix.size)
    np.testing.assert_array_equal(weights.get(Wanted("model.norm.weight", "bf16", (7,))), 1)
    np.testing.assert_array_equal(weights.get(Wanted("model.layers.3.mlp.gate.e_score_correction_bias", "f32", (7,))), 0)
    other = RandomWeights(3).get(Wanted(f"{STEM}.up_proj", "f32", (4, 64, 96)))
    np.testing.assert_allclose(matrix / np.float32(0.006), other * math.sqrt(96), rtol=1e-6)
