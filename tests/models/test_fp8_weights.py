"""FP8 checkpoints: dequantised as torch does it in float32, or handed out byte for byte, under every spelling of the experts."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsc.ir.errors import DscError
from dsc.models.checkpoint import CheckpointFolder, StateDict, Wanted, save_checkpoint

STEM = "model.layers.3.mlp.experts"
WIDE = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}


def quantised(rows: int, columns: int, seed: int, block: tuple[int, int] = (128, 128)) -> tuple[torch.Tensor, torch.Tensor]:
    """Every finite E4M3 code, at random, and scales that are no powers of two."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator) * 1e-3 + 1e-5
    return codes.view(torch.float8_e4m3fn), scales


def dequantised(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """The independent line: spread each scale over its block, multiply in float32, cast."""
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: codes.shape[0], : codes.shape[1]]
    return (codes.float() * spread).to(dtype).float().numpy()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 400),
    columns=st.integers(1, 300),
    block=st.sampled_from([(128, 128), (64, 32), (1, 128)]),
    dtype=st.sampled_from(sorted(WIDE)),
    seed=st.integers(0, 1000),
)
def test_dequantised_as_torch_does(rows: int, columns: int, block: tuple[int, int], dtype: str, seed: int) -> None:
    codes, scales = quantised(rows, columns, seed, block)
    config = {"quantization_config": {"weight_block_size": list(block)}}
    weights = StateDict({"q.weight": codes, "q.weight_scale_inv": scales}, config)
    wanted = Wanted("q.weight", dtype, (rows, columns))
    weights.check([wanted])
    found = weights.get(wanted)
    np.testing.assert_array_equal(found.astype(np.float32), dequantised(codes, scales, WIDE[dtype], block))


def test_slices_of_a_large_matrix_meet_the_right_scales() -> None:
    """Several slices (each about a million values), rows that end in the middle of a block."""
    codes, scales = quantised(3000, 1100, seed=1)
    found = StateDict({"q.weight": codes, "q.weight_scale_inv": scales}).get(Wanted("q.weight", "bf16", (3000, 1100)))
    np.testing.assert_array_equal(found.astype(np.float32), dequantised(codes, scales, torch.bfloat16))


@pytest.fixture(scope="module")
def experts() -> dict[str, torch.Tensor]:
    """Two experts, I = 200 and H = 130, neither a multiple of 128, as DeepSeek's checkpoints name them."""
    tensors = {}
    for e in range(2):
        for i, (projection, rows, columns) in enumerate((("gate_proj", 200, 130), ("up_proj", 200, 130), ("down_proj", 130, 200))):
            name = f"{STEM}.{e}.{projection}.weight"
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(rows, columns, seed=10 * e + i)
    return tensors


@pytest.fixture(scope="module")
def folder(experts: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    save_file(experts, folder / "model.safetensors")
    return folder


def test_stacks_of_experts_byte_for_byte(folder: Path, experts: dict[str, torch.Tensor]) -> None:
    weights = CheckpointFolder(folder)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        names = [f"{STEM}.{e}.{projection}.weight" for e in range(2)]
        codes = torch.stack([experts[name].view(torch.uint8) for name in names])
        scales = torch.stack([experts[f"{name}_scale_inv"] for name in names])
        found = weights.get(Wanted(f"{STEM}.{projection}", "f8e4m3", tuple(codes.shape)))
        assert found.dtype == ml_dtypes.float8_e4m3fn
        np.testing.assert_array_equal(found.view(np.uint8), codes.numpy())
        found = weights.get(Wanted(f"{STEM}.{projection}_scale_inv", "f32", tuple(scales.shape)))
        np.testing.assert_array_equal(found, scales.numpy())


def test_stacks_of_experts_dequantised(folder: Path, experts: dict[str, torch.Tensor]) -> None:
    def expert(e: int, projection: str) -> np.ndarray:
        name = f"{STEM}.{e}.{projection}.weight"
        return dequantised(experts[name], experts[f"{name}_scale_inv"], torch.bfloat16)

    weights = CheckpointFolder(folder)
    fused, down = Wanted(f"{STEM}.gate_up_proj", "bf16", (2, 400, 130)), Wanted(f"{STEM}.down_proj", "bf16", (2, 130, 200))
    weights.check([fused, down])  # the scales of what is dequantised are not extra
    expected = np.stack([np.concatenate([expert(e, "gate_proj"), expert(e, "up_proj")]) for e in range(2)])
    np.testing.assert_array_equal(weights.get(fused).astype(np.float32), expected)
    np.testing.assert_array_equal(weights.get(down).astype(np.float32), np.stack([expert(e, "down_proj") for e in range(2)]))


def test_fp8_survives_saving_in_stacks(folder: Path, experts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weights = CheckpointFolder(folder)
    shapes = {"gate_proj": (200, 130), "up_proj": (200, 130), "down_proj": (130, 200)}
    stacks = {f"{STEM}.{p}": weights.get(Wanted(f"{STEM}.{p}", "f8e4m3", (2, *shape))) for p, shape in shapes.items()}
    stacks |= {f"{STEM}.{p}_scale_inv": weights.get(Wanted(f"{STEM}.{p}_scale_inv", "f32", (2, 2, 2))) for p in shapes}
    save_checkpoint(tmp_path / "again", stacks, {})
    again = CheckpointFolder(tmp_path / "again")
    assert again.tensors.keys() == experts.keys()
    for name, tensor in experts.items():
        assert again.tensors[name].array().tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_e8m0_scales_are_powers_of_two() -> None:
    codes, _ = quantised(130, 5, seed=0)
    exponents = torch.tensor([[0.5], [4.0]])
    weights = StateDict({"q.weight": codes, "q.weight_scale_inv": exponents.to(torch.float8_e8m0fnu)})
    found = weights.get(Wanted("q.weight", "f32", (130, 5)))
    np.testing.assert_array_equal(found, dequantised(codes, exponents, torch.float32))
    np.testing.assert_array_equal(weights.get(Wanted("q.weight_scale_inv", "f32", (2, 1))), exponents.numpy())


def test_fused_fp8_experts_whose_blocks_straddle_are_refused(experts: dict[str, torch.Tensor]) -> None:
    """400 fused rows have 4 rows of blocks, as two times 200 rows have, but not the same ones: the third block row would be misread."""
    wanted = Wanted(f"{STEM}.gate_up_proj_scale_inv", "f32", (2, 4, 2))
    with pytest.raises(DscError, match=r"would straddle gate and up: expected rows in multiples of 128, found 200"):
        StateDict(experts).get(wanted)
    fused = {f"{STEM}.gate_up_proj": torch.zeros(2, 400, 130).to(torch.float8_e4m3fn), wanted.name: torch.ones(2, 4, 2)}
    with pytest.raises(DscError, match=r"experts\.\{0\.\.1\}\.gate_proj\.weight: FP8 blocks .* would straddle"):
        StateDict(fused).get(Wanted(f"{STEM}.gate_proj", "bf16", (2, 200, 130)))


@pytest.mark.parametrize(("scale", "kind", "found"), [
    (None, "missing", ""),
    (torch.ones(3, 2), "misshapen", ", found f32[3, 2] in memory"),
    (torch.ones(3, 1, dtype=torch.int32), "misshapen", ", found i32[3, 1] in memory"),
])  # fmt: skip
def test_scales_that_do_not_fit(scale: torch.Tensor | None, kind: str, found: str) -> None:
    tensors = {"q.weight": quantised(300, 100, seed=0)[0]} | ({} if scale is None else {"q.weight_scale_inv": scale})
    expected = f"{kind}: q.weight_scale_inv: expected f32[3, 1], one per 128x128 block of f8e4m3[300, 100]{found}"
    for ask in (StateDict(tensors).get, lambda wanted: StateDict(tensors).check([wanted])):
        with pytest.raises(DscError) as error:
            ask(Wanted("q.weight", "bf16", (300, 100)))
        assert str(error.value) == f"state dict: {expected}"


def test_fp8_is_dequantised_only_as_a_matrix() -> None:
    tensors = {"q.weight": torch.zeros(8).to(torch.float8_e4m3fn), "q.weight_scale_inv": torch.ones(1)}
    with pytest.raises(DscError, match=r"misshapen: q\.weight: expected a matrix, which can have block scales, found f8e4m3\[8\]"):
        StateDict(tensors).get(Wanted("q.weight", "f32", (8,)))


def nearest_bf16(value: float) -> Fraction:
    """`value` rounded once to BF16 by rational arithmetic: nearest, ties to the even significand (normal range)."""
    exact = Fraction(value)
    exponent = 0
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 7)
    return round(exact / unit) * unit


@settings(max_examples=200)
@given(
    significand=st.integers(128, 255),
    offset=st.sampled_from([Fraction(0), Fraction(1, 2)]),
    nudge=st.integers(-2, 2),
    exponent=st.integers(-20, 20),
    sign=st.sampled_from([-1, 1]),
)
def test_float64_is_rounded_to_bf16_once(significand: int, offset: Fraction, nudge: int, exponent: int, sign: int) -> None:
    """Values within float64's last bits of a tie, which float32 on the way would turn into the tie."""
    value = sign * float((significand + offset) * Fraction(2) ** exponent * (1 + nudge * Fraction(1, 2**50)))
    found = StateDict({"w": np.array([value])}).get(Wanted("w", "bf16", (1,)))
    assert Fraction(float(found[0])) == nearest_bf16(value)


@pytest.mark.parametrize("source", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize("target", ["f64", "f32", "f16", "bf16"])
def test_float_conversions_agree_with_torch(source: str, target: str) -> None:
    dtypes = {**WIDE, "f64": torch.float64}
    tensor = torch.randn(7, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtypes[source])
    found = StateDict({"w": tensor}).get(Wanted("w", target, (7, 33)))
    np.testing.assert_array_equal(found.astype(np.float64), tensor.to(dtypes[target]).double().numpy())
