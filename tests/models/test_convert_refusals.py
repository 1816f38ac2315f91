"""What `dsc convert` refuses before it writes anything, and in which words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsc.ir.errors import DscError
from dsc.models.convert import Conversion, Form

CONFIG = {"model_type": "deepseek_v3", "torch_dtype": "bfloat16"}
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
O_PROJ, NORM = "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"
BF16, FP8 = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2).to(torch.float8_e4m3fn)
SCALE, Q_PROJ = f"{O_PROJ}_scale_inv", O_PROJ.replace("o_proj", "q_proj")
EXPERTS = "model.layers.3.mlp.experts"


def checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """A folder with one shard."""
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


@pytest.mark.parametrize(("to", "tensors", "expected"), [
    ("fp8", {O_PROJ: FP8, SCALE: torch.ones(1, 1), NORM: BF16}, "{}: is in FP8 already (1 of its tensors)"),
    ("bf16", {O_PROJ: BF16}, "{}: holds no FP8 weights, so there is nothing to dequantise"),
    ("fp8", {O_PROJ: FP8, SCALE: torch.ones(1, 1), Q_PROJ: BF16},
     "{}: mixes 1 FP8 weights with 1 that are not, such as " + Q_PROJ + "; convert it --to bf16 first"),
    ("fp8", {NORM: BF16}, "{}: holds no Linear weight of attention, FFN or experts, so there is nothing to quantise"),
    ("fp8", {O_PROJ: torch.ones(2, 2, dtype=torch.int32)}, "{}: " + O_PROJ + ": expected a matrix of floats (a stack of them where "
     "experts are stacked), found i32[2, 2] in model.safetensors"),
    ("fp8", {f"{EXPERTS}.gate_up_proj": torch.ones(2, 400, 8)}, "{}: " + EXPERTS + ".gate_up_proj: FP8 blocks would straddle gate and "
     "up: expected rows in multiples of 256, found f32[2, 400, 8] in model.safetensors"),
    ("fp8", {O_PROJ: BF16, SCALE: torch.ones(1, 1)}, "{}: " + SCALE + ": in model.safetensors, expected an FP8 weight of that name "
     "without _scale_inv, found bf16[2, 2]"),
    ("bf16", {O_PROJ: FP8.to(torch.float8_e5m2), SCALE: torch.ones(1, 1)},
     "{}: " + O_PROJ + ": expected a matrix of f8e4m3, found f8e5m2[2, 2] in model.safetensors"),
    ("bf16", {O_PROJ: FP8, SCALE: torch.ones(1, 1, dtype=torch.uint8)},
     "{}: " + SCALE + ": expected f32[1, 1], one per 128x128 block of f8e4m3[2, 2], found u8[1, 1] in model.safetensors"),
])  # fmt: skip
def test_weights_that_cannot_be_converted(tmp_path: Path, to: Form, tensors: dict[str, Tensor], expected: str) -> None:
    source = checkpoint(tmp_path / "source", tensors)
    with pytest.raises(DscError) as error:
        Conversion(source, tmp_path / "target", to)
    assert str(error.value) == expected.format(source)
    assert not (tmp_path / "target").exists()


def test_every_offender_is_listed(tmp_path: Path) -> None:
    codes = torch.ones(200, 130).to(torch.float8_e4m3fn)
    tensors = {f"{EXPERTS}.{e}.{p}_proj.weight": codes.clone() for e in range(3) for p in ("up", "down")}
    tensors |= {f"{EXPERTS}.{e}.up_proj.weight_scale_inv": torch.ones(2, 1) for e in range(3)}
    tensors |= {O_PROJ: codes.clone(), SCALE: torch.ones(2, 2), f"{Q_PROJ}_scale_inv": torch.ones(1, 1)}
    source = checkpoint(tmp_path / "source", tensors)
    with pytest.raises(DscError) as error:
        Conversion(source, tmp_path / "target", "bf16")
    scales = "expected f32[2, 2], one per 128x128 block of f8e4m3[200, 130]"
    assert sorted(str(error.value).splitlines()) == sorted([
        f"{source}: {Q_PROJ}_scale_inv: in model.safetensors, expected an FP8 weight of that name without _scale_inv, "
        "found no such weight",
        f"{source}: {EXPERTS}.{{0..2}}.down_proj.weight_scale_inv: missing, {scales}",
        f"{source}: {EXPERTS}.{{0..2}}.up_proj.weight_scale_inv: {scales}, found f32[2, 1] in model.safetensors",
    ])  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), [
    ({"quant_method": "awq"}, 'quantization_config has quant_method = "awq", expected "fp8"'),
    ({"fmt": "e5m2"}, 'quantization_config has fmt = "e5m2", expected "e4m3"'),
    ({"activation_scheme": "static"}, 'quantization_config has activation_scheme = "static", expected "dynamic"'),
    ({"scale_fmt": "e5m6"}, 'quantization_config has scale_fmt = "e5m6", expected "float" or "ue8m0"'),
    ({"expert_dtype": "fp4"}, 'quantization_config has expert_dtype = "fp4", expected "fp8"'),
    ({"weight_block_size": None}, "quantization_config has weight_block_size = null, expected two sizes such as [128, 128]"),
])  # fmt: skip
@pytest.mark.parametrize("to", ["fp8", "bf16"])
def test_other_quantisations(tmp_path: Path, to: Form, change: dict[str, Any], expected: str) -> None:
    config = CONFIG | {"quantization_config": QUANTIZATION | change}
    source = checkpoint(tmp_path / "source", {O_PROJ: FP8, SCALE: torch.ones(1, 1)}, config)
    with pytest.raises(DscError) as error:
        Conversion(source, tmp_path / "target", to)
    assert str(error.value) == f"{source / 'config.json'}: {expected}"


def test_a_stale_quantization_config(tmp_path: Path) -> None:
    """What fp8_cast_bf16.py leaves: BF16 weights whose config.json still says FP8."""
    source = checkpoint(tmp_path / "source", {O_PROJ: BF16}, CONFIG | {"quantization_config": QUANTIZATION})
    with pytest.raises(DscError, match=r"to dequantise; its config.json has a quantization_config all the same, which is wrong$"):
        Conversion(source, tmp_path / "target", "bf16")
    Conversion(source, tmp_path / "target", "fp8").run()
    assert load_file(tmp_path / "target" / "model.safetensors")[O_PROJ].dtype == torch.float8_e4m3fn


def test_models_and_folders(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "gpt", {O_PROJ: BF16}, {"model_type": "gpt2"})
    with pytest.raises(DscError, match=r'gpt/config.json: model_type = "gpt2", expected one of deepseek, deepseek_v2, .* by name$'):
        Conversion(source, tmp_path / "target", "fp8")
    (source / "config.json").unlink()
    with pytest.raises(DscError, match=r"gpt: has no config.json, expected a complete checkpoint$"):
        Conversion(source, tmp_path / "target", "fp8")
    source = checkpoint(tmp_path / "source", {O_PROJ: BF16})
    for target in (source, source / "fp8"):
        with pytest.raises(DscError, match=r"lies in the source folder .*source, expected a folder outside it$"):
            Conversion(source, target, "fp8")
    with pytest.raises(DscError, match=r"^to 'fp4': expected one of bf16, fp8$"):
        Conversion(source, tmp_path / "target", "fp4")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_without_a_scale(tmp_path: Path, value: float) -> None:
    weight = torch.ones(300, 300)
    weight[290, 140] = value
    source = checkpoint(tmp_path / "source", {O_PROJ: weight})
    with pytest.raises(DscError, match=r"o_proj\.weight: the block at row 256, column 128, holds an infinity or a NaN, for which"):
        Conversion(source, tmp_path / "target", "fp8").run()
    assert not (tmp_path / "target" / "model.safetensors").exists()
