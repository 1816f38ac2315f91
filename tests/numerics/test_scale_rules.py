"""Each project's scale rule against its own formulation, in torch or struct as that project writes it; tiles against a loop over tiles."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc import DscError
from dsc.numerics.formats import BF16, E5M6, F8E4M3, F8E5M2, F32, Format, round_to, widen
from dsc.numerics.scale import RULES, ScaleRule, dequantize, quantize, scale_shape, scales_of

M = 448.0


def as_bits(x: np.ndarray) -> list[int]:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").ravel().tolist()


def e4m3(x: torch.Tensor) -> np.ndarray:
    """torch's cast after clipping (torch.clamp keeps NaN)."""
    return x.clamp(-M, M).to(torch.float8_e4m3fn).view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)


def up_by_bits(s: torch.Tensor) -> torch.Tensor:
    """DeepGEMM: exponent bits plus whether the mantissa is set, clamped to 1..254."""
    bits = s.abs().view(torch.int32)
    return ((((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()).clamp(1, 254) << 23).view(torch.float32)


def deepseek_v3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = x.abs().amax(-1, keepdim=True).clamp(1e-4) / M
    return x / s, s


def deepseek_v31(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = x.abs().amax(-1, keepdim=True).clamp(1e-4) / M
    s = torch.exp2(torch.ceil(torch.log2(s)))
    return x / s, s


def deepseek_v32(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = up_by_bits(x.abs().amax(-1, keepdim=True).clamp(1e-4) * torch.tensor(1.0 / M))
    return x / s, s


def deepgemm(x: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    s = x.abs().float().amax(-1, keepdim=True).clamp(1e-4) / M
    s = up_by_bits(s) if ue8m0 else s
    return x * (1.0 / s), s


def tilekernels(x: torch.Tensor, pow2: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    amax = x.abs().amax(-1, keepdim=True).clamp(1e-4)
    s = amax / torch.tensor(M)
    if not pow2:
        return x * (torch.tensor(M) / amax), s
    exponent = ((s.view(torch.int32) - 1) >> 23) + 1 - 127
    return x * ((127 - exponent) << 23).view(torch.float32), ((127 + exponent) << 23).view(torch.float32)


def vllm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = x.abs().amax(-1, keepdim=True).clamp(1e-10) / M
    return x / s, s


def torchao(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m = (M / x.abs().amax(-1, keepdim=True).clamp(1e-12).double()).float()
    return x * m, 1.0 / m


def transformer_engine(x: torch.Tensor, pow2: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """compute_scale_from_amax, one tile at a time."""

    def multiplier(amax: float) -> float:
        if amax == 0 or math.isinf(amax) or math.isnan(amax):
            return 1.0
        with np.errstate(over="ignore"):
            m = float(np.float32(M) / np.float32(amax))
        if math.isinf(m):
            m = float(np.finfo(np.float32).max)
        return struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", m))[0] & 0xFF800000))[0] if pow2 else m

    m = torch.tensor([[multiplier(a)] for a in x.abs().amax(-1).tolist()])
    return x * m, 1.0 / m


FORMULATIONS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "deepseek-v3": deepseek_v3,
    "deepseek-v3.1": deepseek_v31,
    "deepseek-v3.2": deepseek_v32,
    "deepgemm": deepgemm,
    "deepgemm-ue8m0": lambda x: deepgemm(x, ue8m0=True),
    "tilekernels": tilekernels,
    "tilekernels-ue8m0": lambda x: tilekernels(x, pow2=True),
    "vllm": vllm,
    "torchao": torchao,
    "transformer-engine": transformer_engine,
    "transformer-engine-f32": lambda x: transformer_engine(x, pow2=False),
}


def tiles_at_boundaries() -> np.ndarray:
    """Tiles [n, 128] whose amax is random over the range, 448 * 2^k and its neighbours, tiny, or zero."""
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.uniform(-40, 40, 3000)).astype(np.float32)
    powers = np.float32(M) * np.exp2(np.arange(-60, 60)).astype(np.float32)
    steps = [powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))]
    floors = np.array([1e-4, 9.9e-5, 1.1e-4, 1e-10, 1e-12, 1e-30, 1e-38, 1e-42, 1e-45, 0.0, 3e38], np.float32)
    amax = np.concatenate([spread, *steps, floors])
    x = rng.uniform(-1, 1, (len(amax), 128)).astype(np.float32) * amax[:, None]
    x[np.arange(len(amax)), rng.integers(0, 128, len(amax))] = amax * rng.choice(np.array([-1, 1], np.float32), len(amax))
    return x


@pytest.mark.parametrize("name", RULES)
def test_rule_is_bit_equal_to_the_projects_own_formula(name: str) -> None:
    x = tiles_at_boundaries()
    scaled, s = FORMULATIONS[name](torch.from_numpy(x))
    codes, scales = quantize(x, (1, 128), F8E4M3, RULES[name])
    assert as_bits(scales) == as_bits(s.numpy())
    assert as_bits(codes) == as_bits(e4m3(scaled))


@pytest.mark.parametrize("name", ["deepseek-v3", "deepgemm", "deepgemm-ue8m0", "vllm", "torchao", "transformer-engine"])
def test_special_values_are_those_of_the_projects_own_formula(name: str) -> None:
    x = np.ones((5, 128), np.float32)
    x[0, 3], x[1, 4], x[2, 5], x[3, :2], x[4] = np.inf, -np.inf, np.nan, (np.inf, np.nan), 0
    x[4, 7] = -0.0
    scaled, s = FORMULATIONS[name](torch.from_numpy(x))
    codes, scales = quantize(x, (1, 128), F8E4M3, ScaleRule(**{**vars(RULES[name]), "clamp": True}))
    assert np.array_equal(scales, s.numpy(), equal_nan=True)
    assert np.array_equal(widen(codes), widen(e4m3(scaled)), equal_nan=True)
    assert np.array_equal(np.signbit(widen(codes)[4]), np.signbit(x[4]))


def test_rules_differ_where_they_should() -> None:
    """Each choice of a rule shows in some tile, so that the agreement above is not of one rule with itself.

    On bfloat16 values: x / s and x * (1 / s) differ in 5 of 10,000 codes there, in 2 of a million on float32 values.
    """
    x = round_to(tiles_at_boundaries(), BF16)
    seen = {name: (as_bits(scales), as_bits(codes)) for name, rule in RULES.items() for codes, scales in [quantize(x, (1, 128), rule=rule)]}
    alike = {frozenset(b for b in seen if seen[b] == seen[a]) for a in seen}
    # With powers of two, dividing and multiplying by the reciprocal are the same; for the logarithm see the test below.
    powers = {"deepseek-v3.1", "deepseek-v3.2", "deepgemm-ue8m0", "tilekernels-ue8m0"}
    assert {group for group in alike if len(group) > 1} == {frozenset(powers)}


def test_special_values_by_the_table() -> None:
    x = np.full((4, 4), 0.5, np.float32)
    x[0, 1], x[1, 1], x[2], x[3] = np.inf, np.nan, 0, 1e-8
    codes, scales = quantize(x, (1, 4), rule=RULES["deepseek-v3"])
    floor = np.float32(1e-4) / np.float32(M)
    assert np.array_equal(scales[:, 0], np.array([np.inf, np.nan, floor, floor], np.float32), equal_nan=True)
    expected = [[0, np.nan, 0, 0], [np.nan] * 4, [0] * 4, [0.04296875] * 4]  # 1e-8 / floor = 0.0448, on a grid of 2^-8
    assert np.array_equal(widen(codes), np.array(expected, np.float32), equal_nan=True)

    codes, scales = quantize(x, (1, 4), rule=RULES["transformer-engine"])
    assert scales[:3, 0].tolist() == [1, 1, 1]
    assert widen(codes)[0].tolist() == [0.5, 448, 0.5, 0.5]
    assert np.array_equal(widen(codes)[1], np.array([0.5, np.nan, 0.5, 0.5], np.float32), equal_nan=True)

    codes, scales = quantize(x, (1, 4), rule=RULES["deepgemm-ue8m0"])
    assert scales[:2, 0].tolist() == [2.0**127, 2.0**127]
    assert np.array_equal(widen(codes)[:2], np.array([[0, np.nan, 0, 0]] * 2, np.float32), equal_nan=True)
    codes, _ = quantize(x, (1, 4), rule=ScaleRule(1e-4, apply="reciprocal", pow2="ceil-bits"))
    assert widen(codes)[0].tolist() == [0, 448, 0, 0]


def test_a_multiplier_that_overflows_is_the_input_types_largest_value() -> None:
    rule = RULES["transformer-engine-f32"]
    for dtype, largest in ((np.float32, np.finfo(np.float32).max), (ml_dtypes.bfloat16, BF16.max)):
        _, scales = quantize(np.full((1, 4), 2.0**-130).astype(dtype), (1, 4), rule=rule)
        assert scales[0, 0] == np.float32(1) / np.float32(largest)


def test_scale_by_the_reciprocal_of_the_maximum() -> None:
    """What CUDA's eager `amax / 448.0` computes: more than a third of the scales are one unit off those of a division."""
    amax = np.random.default_rng(3).uniform(1e-3, 1e3, 10_000).astype(np.float32)
    scale, factor = scales_of(amax, ScaleRule(1e-4, scale="amax*(1/max)"), F8E4M3)
    assert as_bits(scale) == as_bits((torch.from_numpy(amax) * torch.tensor(1.0 / M)).numpy())
    assert factor is scale
    assert (scale != amax / np.float32(M)).mean() > 1 / 3


def test_log2_and_bits_differ_only_next_to_a_power_of_two() -> None:
    amax = np.random.default_rng(1).uniform(1e-3, 1e3, 200_000).astype(np.float32)
    by_log2, by_bits = (scales_of(amax, RULES[name], F8E4M3)[0] for name in ("deepseek-v3.1", "deepgemm-ue8m0"))
    assert np.array_equal(by_log2, by_bits)
    just_above = np.nextafter(np.float32(M) * np.exp2(np.arange(4, 20)).astype(np.float32), np.float32(np.inf))
    by_log2, by_bits = (scales_of(just_above, RULES[name], F8E4M3)[0] for name in ("deepseek-v3.1", "deepgemm-ue8m0"))
    assert np.array_equal(by_log2 * 2, by_bits)


def test_a_power_of_two_rule_never_saturates_and_costs_at_most_one_bit() -> None:
    x = tiles_at_boundaries()
    for name in ("deepseek-v3.2", "deepgemm-ue8m0", "tilekernels-ue8m0", "transformer-engine"):
        _, scales = quantize(x, (1, 128), rule=RULES[name])
        mantissas = np.frexp(scales)[0]
        assert set(mantissas.ravel().tolist()) == {0.5}
        amax = np.abs(x).max(-1)
        inside = (amax > 1e-3) & (amax < 1e30)
        ratio = amax[inside] / scales[inside, 0]
        assert ratio.max() <= M
        assert ratio.min() > M / 2 * (1 - 2.0**-20)


@pytest.mark.parametrize("fmt", [F8E5M2, E5M6], ids=str)
def test_other_formats_use_their_own_maximum(fmt: Format) -> None:
    x = np.random.default_rng(2).standard_normal((8, 128)).astype(np.float32)
    codes, scales = quantize(x, (1, 128), fmt, RULES["tilekernels"])
    amax = np.abs(x).max(-1)
    assert as_bits(scales[:, 0]) == as_bits(amax / np.float32(fmt.max))
    assert as_bits(codes) == as_bits(round_to(x * (np.float32(fmt.max) / amax)[:, None], fmt))
    half = quantize(x, (1, 128), fmt, ScaleRule(1e-4, max=fmt.max / 2))[1]
    assert np.array_equal(half, 2 * quantize(x, (1, 128), fmt)[1])


def by_loop(x: np.ndarray, tile: tuple[int, int], fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """DeepSeek's rule, one tile after another, on one matrix."""
    rows, columns = x.shape
    scales = np.zeros((-(-rows // tile[0]), -(-columns // tile[1])), np.float32)
    codes = np.zeros(x.shape, fmt.dtype)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = np.s_[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            scales[i, j] = max(np.abs(x[part]).max(), np.float32(1e-4)) / np.float32(fmt.max)
            codes[part] = np.clip(x[part] / scales[i, j], -fmt.max, fmt.max).astype(fmt.dtype)
    return codes, scales


sizes = st.integers(1, 40)
tiles = st.sampled_from([(1, 8), (8, 1), (8, 8), (3, 5), (1, 1), (7, 64), (64, 64)])


@given(sizes, sizes, tiles, st.integers(0, 2**32 - 1), st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]))
def test_tiles_of_any_matrix(rows: int, columns: int, tile: tuple[int, int], seed: int, dtype: type) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, columns)).astype(dtype)
    codes, scales = quantize(x, tile)
    expected_codes, expected_scales = by_loop(x.astype(np.float32), tile, F8E4M3)
    assert as_bits(scales) == as_bits(expected_scales)
    assert as_bits(codes) == as_bits(expected_codes)
    assert scales.shape == scale_shape(x.shape, tile)
    back = dequantize(codes, scales, tile)
    wide = np.repeat(np.repeat(scales, tile[0], 0), tile[1], 1)[:rows, :columns]
    assert np.array_equal(back, codes.astype(np.float32) * wide)
    assert np.array_equal(dequantize(codes, scales, tile, dtype=np.float64), codes.astype(np.float64) * wide)
    assert as_bits(dequantize(codes, scales, tile, dtype=ml_dtypes.bfloat16)) == as_bits(back.astype(ml_dtypes.bfloat16))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), sizes, tiles, st.integers(0, 2**32 - 1))
def test_row_tiles_restart_at_every_group(groups: list[int], columns: int, tile: tuple[int, int], seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((sum(groups), columns)).astype(np.float32)
    codes, scales = quantize(x, tile, groups=groups)
    assert scales.shape == scale_shape(x.shape, tile, groups)
    parts = np.split(x, np.cumsum(groups)[:-1])
    each = [by_loop(part, tile, F8E4M3) for part in parts]
    assert as_bits(codes) == as_bits(np.concatenate([c for c, _ in each]))
    assert as_bits(scales) == as_bits(np.concatenate([s for _, s in each]))
    back = dequantize(codes, scales, tile, groups)
    assert np.array_equal(back, np.concatenate([dequantize(c, s, tile) for c, s in each]))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=2), sizes, sizes, tiles)
def test_blocks_restart_at_every_matrix_of_a_stack(batch: list[int], rows: int, columns: int, tile: tuple[int, int]) -> None:
    x = np.random.default_rng(7).standard_normal((*batch, rows, columns)).astype(np.float32)
    codes, scales = quantize(x, tile)
    back = dequantize(codes, scales, tile)
    for index in np.ndindex(*batch):
        one_codes, one_scales = by_loop(x[index], tile, F8E4M3)
        assert as_bits(codes[index]) == as_bits(one_codes)
        assert as_bits(scales[index]) == as_bits(one_scales)
        assert np.array_equal(back[index], dequantize(one_codes, one_scales, tile))


@pytest.mark.parametrize(
    ("shape", "tile"), [((300, 700), (300, 700)), ((3, 200_000), (1, 200_000)), ((70_000, 3), (128, 1)), ((257, 1000), (128, 128))]
)
def test_tiles_larger_than_a_cache_block_and_tails(shape: tuple[int, int], tile: tuple[int, int]) -> None:
    x = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
    x[-1, -1] = 100  # the maximum of its tile lies in the last piece
    codes, scales = quantize(x, tile)
    expected_codes, expected_scales = by_loop(x, tile, F8E4M3)
    assert as_bits(scales) == as_bits(expected_scales)
    assert as_bits(codes) == as_bits(expected_codes)
    assert np.array_equal(dequantize(codes, scales, tile)[-1], codes[-1].astype(np.float32) * np.repeat(scales[-1], tile[1])[: shape[1]])


def test_released_conversion_rule() -> None:
    """weight_dequant of the released inference code: w * weight_scale_inv per 128 x 128 block, in float32, stored as bfloat16."""
    rng = np.random.default_rng(9)
    codes = rng.integers(0, 256, (576, 300), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    scales = np.exp2(rng.uniform(-12, -4, (5, 3))).astype(np.float32)
    w = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    s = torch.from_numpy(scales).repeat_interleave(128, 0).repeat_interleave(128, 1)[:576, :300]
    ours = dequantize(codes.view(ml_dtypes.float8_e4m3fn), scales, (128, 128), dtype=ml_dtypes.bfloat16)
    assert as_bits(ours) == as_bits((w * s).to(torch.bfloat16).view(torch.int16).numpy())


def test_a_power_of_two_scale_makes_requantisation_exact() -> None:
    x = np.random.default_rng(10).standard_normal((64, 256)).astype(np.float32)
    codes, scales = quantize(x, (1, 128), rule=RULES["tilekernels-ue8m0"])
    again, same = quantize(dequantize(codes, scales, (1, 128)), (1, 128), rule=RULES["tilekernels-ue8m0"])
    exact = same == scales
    assert exact.mean() > 0.9
    assert as_bits(again.reshape(64, 2, 128)[exact]) == as_bits(codes.reshape(64, 2, 128)[exact])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(np.zeros(4, np.float32), (1, 4)), r"shape \[4\], expected two dimensions"),
        (lambda: quantize(np.zeros((4, 4), np.float32), (0, 4)), r"tile \[0, 4\], expected two sizes of at least 1"),
        (lambda: quantize(np.zeros((4, 4), np.float32), (1, 4), groups=[1, 2]), r"groups of \[1, 2\] rows, 3 in all, expected .* 4 rows"),
        (lambda: quantize(np.zeros((2, 4, 4), np.float32), (1, 4), groups=[4]), "expected two dimensions: the rows of all groups"),
        (lambda: dequantize(np.zeros((4, 4), F8E4M3.dtype), np.ones((2, 1), np.float32), (1, 4)), r"scales of shape \[2, 1\] .* \[4, 1\]"),
        (lambda: ScaleRule(floor=0.0), "a zero tile needs a floor above 0"),
        (lambda: ScaleRule(floor=1.0, pow2="mantissa-mask"), "the mask rounds the multiplier"),
    ],
)
def test_errors_say_what_was_found_and_expected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DscError, match=message):
        call()


def test_float64_is_rounded_to_float32_first() -> None:
    x = np.random.default_rng(11).standard_normal((4, 128))
    codes, scales = quantize(x, (1, 128))
    again, same = quantize(round_to(x, F32), (1, 128))
    assert as_bits(codes) == as_bits(again)
    assert as_bits(scales) == as_bits(same)
