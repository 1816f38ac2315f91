"""Checkpoint folders against transformers: what it writes is read under dsc's names, what dsc writes it loads."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from dsc.ir.errors import DscError
from dsc.models.checkpoint import CheckpointFolder, RandomWeights, StateDict, Wanted, Weights, open_weights, save_checkpoint
from dsc.models.weights import DTYPE_NAMES

LAYERS, EXPERTS, INNER, HIDDEN = 3, 4, 24, 48


def tiny_config(**overrides: object) -> DeepseekV3Config:
    sizes = {
        "vocab_size": 96, "hidden_size": HIDDEN, "intermediate_size": 72, "moe_intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "dtype": "bfloat16",
    }  # fmt: skip
    return DeepseekV3Config(**(sizes | overrides))


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values by way of a cast to float32, which is exact for every dtype used here: independent of the code under test."""
    dtype = {torch.bfloat16: ml_dtypes.bfloat16, torch.float32: np.float32, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}[tensor.dtype]
    return tensor.detach().float().numpy().astype(dtype)


def wanted_of(state: dict[str, torch.Tensor]) -> list[Wanted]:
    return [Wanted(name, DTYPE_NAMES[numpy_of(t).dtype], tuple(t.shape)) for name, t in state.items()]


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def dsc_program(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a dsc program for the model whose fused transformers state dict is `state`."""
    tensors = {}
    for name, tensor in state.items():
        if name.endswith("gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            tensors[stem + "gate_proj"], tensors[stem + "up_proj"] = tensor[:, :INNER], tensor[:, INNER:]
        else:
            tensors[name] = tensor
    return tensors


@pytest.fixture(scope="module")
def model() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(tiny_config()).to(torch.bfloat16)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float()  # as released checkpoints have it
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model


@pytest.fixture(scope="module", params=["one file", "sharded"])
def folder(request: pytest.FixtureRequest, model: DeepseekV3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder, max_shard_size="5GB" if request.param == "one file" else "20KB")
    assert len(list(folder.glob("*.safetensors"))) == (1 if request.param == "one file" else 8)
    return folder


@pytest.mark.parametrize("spelling", ["transformers", "dsc"])
@pytest.mark.parametrize("source", ["folder", "state dict"])
def test_transformers_weights_arrive_bit_for_bit(model: DeepseekV3ForCausalLM, folder: Path, spelling: str, source: str) -> None:
    state = model.state_dict()
    expected = state if spelling == "transformers" else dsc_program(state)
    weights: Weights = open_weights(folder if source == "folder" else state)
    weights.check(wanted_of(expected))
    for wanted in wanted_of(expected):
        assert_same_bits(weights.get(wanted), numpy_of(expected[wanted.name]))


def test_single_experts_out_of_every_spelling(model: DeepseekV3ForCausalLM, folder: Path) -> None:
    state = model.state_dict()
    stem = "model.layers.2.mlp.experts"
    fused, down = numpy_of(state[f"{stem}.gate_up_proj"]), numpy_of(state[f"{stem}.down_proj"])
    for weights in (CheckpointFolder(folder), StateDict(state), StateDict(dsc_program(state))):
        assert_same_bits(weights.get(Wanted(f"{stem}.3.up_proj.weight", "bf16", (INNER, HIDDEN))), fused[3, INNER:])
        assert_same_bits(weights.get(Wanted(f"{stem}.gate_up_proj", "bf16", (EXPERTS, 2 * INNER, HIDDEN))), fused)
        subset = Wanted(f"{stem}.down_proj", "bf16", (2, HIDDEN, INNER), experts=(3, 1))
        assert_same_bits(weights.get(subset), down[[3, 1]])
        pair = {f"{stem}.down_proj": numpy_of(state[f"{stem}.down_proj"])[:2]}
        assert_same_bits(StateDict(pair).get(Wanted(f"{stem}.down_proj", "bf16", (2, HIDDEN, INNER), experts=(1, 0))), down[[1, 0]])
        weights.check([subset, *(w for w in wanted_of(dsc_program(state)) if w.name != subset.name)])


def test_opening_weights_does_not_import_torch(folder: Path) -> None:
    code = f"""
import sys
from dsc.models.checkpoint import Wanted, open_weights
open_weights("random:0"), open_weights({{}})
open_weights({str(folder)!r}).get(Wanted("model.layers.1.mlp.experts.gate_proj", "f32", (4, 24, 48)))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_whole_tensor_is_the_memory_it_came_from(folder: Path, model: DeepseekV3ForCausalLM) -> None:
    norm = model.state_dict()["model.norm.weight"]
    array = StateDict({"model.norm.weight": norm}).get(Wanted("model.norm.weight", "bf16", (HIDDEN,)))
    assert array.__array_interface__["data"] == (norm.data_ptr(), True)
    mapped = CheckpointFolder(folder).get(Wanted("model.norm.weight", "bf16", (HIDDEN,)))
    assert not mapped.flags.owndata
    assert not mapped.flags.writeable


@pytest.mark.parametrize("shard_bytes", [5e9, 20e3])
@pytest.mark.parametrize("spelling", ["transformers", "dsc"])
def test_transformers_loads_what_save_checkpoint_writes(
    model: DeepseekV3ForCausalLM, tmp_path: Path, spelling: str, shard_bytes: float
) -> None:
    state = model.state_dict()
    tensors = {name: numpy_of(t) for name, t in (state if spelling == "transformers" else dsc_program(state)).items()}
    folder = tmp_path / "new" / "checkpoint"
    save_checkpoint(folder, tensors, model.config.to_dict(), shard_bytes=shard_bytes)
    loaded, info = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype in (state[name].dtype, torch.float32), name  # newer releases keep the gate in float32, whatever was saved
        assert torch.equal(tensor.float(), state[name].float()), name
    shards = sorted(folder.glob("*.safetensors"))
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= shard_bytes for shard in shards)
    count = len(shards)
    names = ["model.safetensors"] if shard_bytes > 1e9 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert [shard.name for shard in shards] == names
    assert (folder / "model.safetensors.index.json").exists() == (count > 1) == (shard_bytes < 1e9)
    assert sorted(os.listdir(folder.parent)) == ["checkpoint"]


TORCH_DTYPES = {
    "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64, "f8e4m3": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2, "e8m0": torch.float8_e8m0fnu, "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
    "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


def test_every_dtype_and_shape_by_way_of_the_safetensors_library(tmp_path: Path) -> None:
    """What the library writes is read, from the file and from torch's memory; what is written the library reads."""
    assert TORCH_DTYPES.keys() == set(DTYPE_NAMES.values())
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (3, 40), np.uint8))
    tensors = {f"w.{name}": bits.clone().view(dtype) for name, dtype in TORCH_DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.ones(3, dtype=torch.uint8)}
    raw = {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    arrays = {}
    for weights in (CheckpointFolder(tmp_path / "theirs"), StateDict(tensors)):
        for name, tensor in tensors.items():
            dtype = next(key for key, value in TORCH_DTYPES.items() if value == tensor.dtype)
            arrays[name] = weights.get(Wanted(name, dtype, tuple(tensor.shape)))
            assert (DTYPE_NAMES[arrays[name].dtype], arrays[name].shape) == (dtype, tuple(tensor.shape))
            assert arrays[name].tobytes() == raw[name]
    save_checkpoint(tmp_path / "ours", arrays, {})
    read = load_file(tmp_path / "ours" / "model.safetensors")
    ours = CheckpointFolder(tmp_path / "ours").tensors.values()
    assert all(tensor.start % tensor.array().itemsize == 0 for tensor in ours)  # aligned, so that reading need not copy
    assert {name: (t.dtype, t.shape) for name, t in read.items()} == {name: (t.dtype, t.shape) for name, t in tensors.items()}
    assert {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in read.items()} == raw


def test_tied_output_head(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    llama = LlamaForCausalLM(config).to(torch.bfloat16)
    llama.save_pretrained(tmp_path)
    weights = CheckpointFolder(tmp_path)
    assert "lm_head.weight" not in weights.tensors
    state = llama.state_dict()
    assert "lm_head.weight" in state
    weights.check(wanted_of(state))
    embedding = numpy_of(state["model.embed_tokens.weight"])
    assert_same_bits(weights.get(Wanted("lm_head.weight", "bf16", embedding.shape)), embedding)
    # a program that has only the embedding leaves a stored copy of it alone, but only in a tied model
    without_head = [w for w in wanted_of(state) if w.name != "lm_head.weight"]
    StateDict(state, config.to_dict()).check(without_head)
    with pytest.raises(DscError, match=r"extra: lm_head\.weight"):
        StateDict(state).check(without_head)


class TestSaving:
    def test_a_killed_writer_leaves_no_target(self, tmp_path: Path) -> None:
        code = f"""
import os, signal
from collections.abc import Mapping
import numpy as np
from dsc.models.checkpoint import save_checkpoint

class Killed(dict):
    def items(self):
        yield "a", np.zeros(1000, np.float32)
        yield "b", np.zeros(1000, np.float32)
        os.kill(os.getpid(), signal.SIGKILL)

save_checkpoint({str(tmp_path / "target")!r}, Killed(), {{}}, shard_bytes=4000)
"""
        assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
        assert not (tmp_path / "target").exists()
        assert any(path.is_file() for path in tmp_path.rglob("*"))  # it was indeed killed between two shards
        save_checkpoint(tmp_path / "target", {"a": np.zeros(1000, np.float32)}, {})
        assert CheckpointFolder(tmp_path / "target").tensors.keys() == {"a"}

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tmp_path: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            with pytest.raises(DscError, match=r"target: cannot be written: File too large$"):
                save_checkpoint(tmp_path / "target", {"w": np.zeros(100_000, np.float32)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert list(tmp_path.iterdir()) == []

    def test_refusals(self, tmp_path: Path) -> None:
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "notes.txt").write_text("mine")
        with pytest.raises(DscError, match=r"taken: exists, expected a new or empty folder"):
            save_checkpoint(tmp_path / "taken", {}, {})
        with pytest.raises(DscError, match=r"notes.txt/x: cannot be written: File exists"):
            save_checkpoint(tmp_path / "taken" / "notes.txt" / "x", {}, {})
        with pytest.raises(DscError, match=r"z: found dtype complex64, expected one of f64, f32"):
            save_checkpoint(tmp_path / "new", {"z": np.zeros(2, np.complex64)}, {})
        both = {"experts.gate_up_proj": np.zeros((1, 4, 4), np.float32), "experts.gate_proj": np.zeros((1, 2, 4), np.float32)}
        with pytest.raises(DscError, match=r"experts\.gate_proj: experts\.0\.gate_proj\.weight has been written before"):
            save_checkpoint(tmp_path / "new", both, {})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]

    def test_an_empty_folder_is_a_fine_target(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, {"a": np.ones(2, np.float32)}, {"num_hidden_layers": 1})
        assert CheckpointFolder(tmp_path).config == {"num_hidden_layers": 1}


class TestOpenWeights:
    def test_every_kind(self, folder: Path) -> None:
        assert open_weights("random:42") == RandomWeights(42)
        assert isinstance(open_weights(str(folder)), CheckpointFolder)
        assert isinstance(open_weights(folder), CheckpointFolder)
        assert isinstance(open_weights({}), StateDict)
        assert open_weights(weights := RandomWeights(1)) is weights

    @pytest.mark.parametrize("spec", ["random:", "random:-1", "random:x", "nowhere", Path("nowhere"), 7])
    def test_anything_else_says_what_is_accepted(self, spec: object) -> None:
        found = f"an object of type {type(spec).__name__}" if spec == 7 else repr(str(spec))
        with pytest.raises(DscError) as error:
            open_weights(spec)  # type: ignore[arg-type]
        assert str(error.value) == (
            f"weights: found {found}, expected random:SEED, a checkpoint folder, or a mapping such as model.state_dict()"
        )

    def test_values_that_are_no_tensors(self) -> None:
        with pytest.raises(DscError, match=r"'a' is of type list, expected a torch tensor or a NumPy array\n.*'b' is of type float"):
            open_weights({"a": [1.0], "w": np.zeros(2), "b": 1.0})

    def test_meta_tensors_have_no_values(self) -> None:
        weights = open_weights({"w": torch.empty(3, device="meta")})
        weights.check([Wanted("w", "f32", (3,))])
        with pytest.raises(DscError, match=r"'w' is on the meta device"):
            weights.get(Wanted("w", "f32", (3,)))
