"""An FP8 checkpoint that `transformers` quantised and wrote runs in ONNX Runtime straight from its own shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import dsc
from dsc import DscError
from dsc.backends.arrays import rounded
from dsc.driver.export import export
from dsc.driver.inputs import prepare
from dsc.ir.types import DType
from dsc.models.safetensors_file import write_safetensors

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 128,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
"""Multiples of a block: `transformers` leaves other matrices as they are."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by its classes, its quantiser and its writer. Its check for a GPU is passed over: what follows is plain torch."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    folder = tmp_path_factory.mktemp("transformers")
    tiny = json.loads((Path(dsc.__file__).parent / "models" / "configs" / "deepseek-v3-tiny.json").read_text())
    given = {k: v for k, v in tiny.items() if k not in ("architectures", "model_type", "quantization_config", "head_dim")}
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**given | SIZES)).to(torch.bfloat16).save_pretrained(folder / "bf16")
    patch = pytest.MonkeyPatch()
    patch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    try:
        config = FineGrainedFP8Config(modules_to_not_convert=["lm_head"])
        model = DeepseekV3ForCausalLM.from_pretrained(folder / "bf16", quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(folder / "fp8", max_shard_size="300KB")
    finally:
        patch.undo()
    return folder / "fp8"


@pytest.mark.slow
def test_it_runs_in_ort_from_its_own_shards(checkpoint: Path, tmp_path: Path) -> None:
    shards = {file.name for file in checkpoint.glob("*.safetensors")}
    assert len(shards) > 2
    program = dsc.compile(checkpoint, out=tmp_path / "out", recipe="deepseek-v3", weights=str(checkpoint), seq=16)
    made = export(program, checkpoint / "model.onnx", profile="ort", weights="reference")
    assert made.inputs == 1
    assert made.data is None
    stored = onnx.load(checkpoint / "model.onnx", load_external_data=False).graph.initializer
    assert {next(e.value for e in t.external_data if e.key == "location") for t in stored} == shards
    fp8 = [t.name for t in stored if t.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    assert sum(".mlp.experts." in name for name in fp8) == 16 * 3
    assert any(name.endswith("kv_a_proj_with_mqa.weight") for name in fp8)
    gate = next(t for t in stored if t.name.endswith("mlp.gate.weight"))
    assert gate.data_type == onnx.TensorProto.FLOAT, "it keeps the gate in float32, which the program, as its config says, reads as BF16"
    onnx.checker.check_model(checkpoint / "model.onnx", full_check=True)
    (tokens,) = inputs = prepare(program.module, None)
    (expected,) = (np.asarray(x, np.float64) for x in dsc.run(program, inputs=inputs))
    session = onnxruntime.InferenceSession(checkpoint / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"tokens": tokens})
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"relative L2 {error:.2g}")
    assert error <= 1e-2


@pytest.mark.parametrize(("stored", "declared"), [("f32", "bf16"), ("bf16", "f32"), ("f16", "bf16"), ("f32", "f16")])
def test_another_float_in_the_shard_is_cast_to_the_bit(tmp_path: Path, stored: str, declared: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    rng = np.random.default_rng(0)
    write_safetensors(folder / "model.safetensors", {"w": rounded(rng.standard_normal((3, 67)), DType[stored])})
    text = f"""func @main(%x: f32[3, 67]) {{
  %w: {declared}[3, 67] = param("w")  @ main#1 F
  %y: f32[3, 67] = cast(%w, dtype=f32)  @ main#2 F
  %z: f32[3, 67] = add(%x, %y)  @ main#3 F
  return %z
}}
"""
    file, module, x = folder / "m.onnx", dsc.parse(text), np.zeros((3, 67), np.float32)
    export(module, file, profile="ort", weights="reference", checkpoint=str(folder))
    onnx.checker.check_model(file, full_check=True)
    (found,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_array_equal(found, dsc.run(module, weights=str(folder), inputs=(x,))[0])


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    """A folder of another tool: its model, its manifest, a file in place of a folder."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    with pytest.raises(DscError, match=r"expected an artifact made by dsc compile, found a folder without manifest\.json"):
        dsc.load(tmp_path / "hub")
    (tmp_path / "hub" / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(DscError, match="not a manifest of dsc"):
        dsc.load(tmp_path / "hub")
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    with pytest.raises(DscError, match="expected an artifact made by dsc compile, found a file"):
        dsc.load(tmp_path / "model.onnx")
