"""`dsc convert` between BF16 and FP8: bit for bit the released rule, written out here in torch; loaded by transformers."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsc.driver.cli import main
from dsc.models.convert import Conversion, Form

CONFIG = {"model_type": "deepseek_v3", "torch_dtype": "bfloat16", "rms_norm_eps": 1e-06}
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
O_PROJ, NORM = "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"


def released(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and `weight_scale_inv` by README_WEIGHTS.md and kernel.py of DeepSeek-V3: zero padding, amax of at least 1e-4, amax / 448."""
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
    blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / 448.0
    codes = (blocks / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes.reshape(padded.shape)[:rows, :columns].contiguous(), scale[:, 0, :, 0]


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """fp8_cast_bf16.py: each scale spread over its block, the product in float32, stored as BF16."""
    spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: codes.shape[0], : codes.shape[1]]
    return (codes.float() * spread).to(torch.bfloat16)


def assert_same_bits(found: Tensor, expected: Tensor, name: str = "") -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


def checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """A folder with one shard."""
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def convert(source: Path, target: Path, to: Form) -> dict[str, Tensor]:
    """The tensors of the converted folder, all shards together."""
    Conversion(source, target, to).run()
    return read(target)


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def model_of(**sizes: int) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, dtype="bfloat16", **sizes,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(std=0.02)
    return model


ALIGNED = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
RAGGED = {
    "vocab_size": 96, "hidden_size": 136, "intermediate_size": 300, "moe_intermediate_size": 72, "q_lora_rank": 130, "kv_lora_rank": 64,
    "qk_nope_head_dim": 80, "qk_rope_head_dim": 64, "v_head_dim": 100,
}  # fmt: skip


@pytest.fixture(scope="module", params=["one file", "sharded"])
def ragged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DeepseekV3ForCausalLM, Path]:
    """No size is a multiple of 128."""
    model, folder = model_of(**RAGGED), tmp_path_factory.mktemp("ragged") / "bf16"
    model.save_pretrained(folder, max_shard_size="5GB" if request.param == "one file" else "200KB")
    (folder / "tokenizer.json").write_text("{}")
    return model, folder


def linear_names(model: DeepseekV3ForCausalLM, names: Mapping[str, Any]) -> set[str]:
    """Every Linear of the module but the output head, and the experts, which transformers stacks into parameters."""
    linears = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head.weight"}
    return linears | {name for name in names if ".mlp.experts." in name}


class TestAgainstTheReleasedRule:
    def test_to_fp8(self, ragged: tuple[DeepseekV3ForCausalLM, Path], tmp_path: Path) -> None:
        model, source = ragged
        before, after = read(source), convert(source, tmp_path / "fp8", "fp8")
        linear = linear_names(model, before)
        assert linear <= before.keys()
        assert len(linear) == 2 * 5 + 3 + 3 + 4 * 3
        assert after.keys() == before.keys() | {f"{name}_scale_inv" for name in linear}
        for name, tensor in before.items():
            if name in linear:
                codes, scale = released(tensor)
                assert_same_bits(after[name], codes, name)
                assert_same_bits(after[f"{name}_scale_inv"], scale, name)
            else:
                assert_same_bits(after[name], tensor, name)

    def test_and_back(self, ragged: tuple[DeepseekV3ForCausalLM, Path], tmp_path: Path) -> None:
        model, source = ragged
        before = read(source)
        convert(source, tmp_path / "fp8", "fp8")
        after = convert(tmp_path / "fp8", tmp_path / "bf16", "bf16")
        assert after.keys() == before.keys()
        linear = linear_names(model, before)
        for name, tensor in before.items():
            assert_same_bits(after[name], dequantised(*released(tensor)) if name in linear else tensor, name)

    def test_shards_index_and_config(self, ragged: tuple[DeepseekV3ForCausalLM, Path], tmp_path: Path) -> None:
        source, fp8, bf16 = ragged[1], tmp_path / "new" / "fp8", tmp_path / "bf16"
        done = Conversion(source, fp8, "fp8").run()
        Conversion(fp8, bf16, "bf16").run()
        names = sorted(path.name for path in source.iterdir())
        assert sorted(os.listdir(fp8)) == sorted(os.listdir(bf16)) == names
        assert "tokenizer.json" in names
        shards = [name for name in names if name.endswith(".safetensors")]
        assert (done.shards, done.kept, done.left_out) == (len(shards), 0, ())
        for shard in shards:
            scales = {name for name in load_file(fp8 / shard) if name.endswith("_scale_inv")}
            assert load_file(fp8 / shard).keys() - scales == load_file(source / shard).keys() == load_file(bf16 / shard).keys()
            assert {name.removesuffix("_scale_inv") for name in scales} <= load_file(source / shard).keys()
        for folder in (fp8, bf16) if len(shards) > 1 else ():
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert index["weight_map"] == {name: shard for shard in shards for name in load_file(folder / shard)}
            assert index["metadata"]["total_size"] == sum(t.nbytes for t in read(folder).values())
        config = json.loads((source / "config.json").read_text())
        assert json.loads((fp8 / "config.json").read_text()) == {**config, "quantization_config": QUANTIZATION}
        assert json.loads((bf16 / "config.json").read_text()) == config

    @settings(max_examples=25, deadline=None)
    @given(
        rows=st.integers(1, 300),
        columns=st.integers(1, 300),
        exponents=st.lists(st.integers(-40, 30), min_size=1, max_size=6),
        dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        seed=st.integers(0, 1000),
    )
    def test_any_values(
        self, tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, exponents: list[int], dtype: torch.dtype, seed: int
    ) -> None:
        """Zeros, and magnitudes from far below the floor of 1e-4 to large ones, mixed in each block."""
        generator = torch.Generator().manual_seed(seed)
        powers = torch.tensor([0.0, *(2.0**e for e in exponents)])
        weight = torch.randn(rows, columns, generator=generator) * powers[torch.randint(len(powers), (rows, columns), generator=generator)]
        weight = weight.clamp(-6e4, 6e4).to(dtype)
        folder = tmp_path_factory.mktemp("any")
        after = convert(checkpoint(folder / "source", {O_PROJ: weight}), folder / "fp8", "fp8")
        codes, scale = released(weight)
        assert_same_bits(after[O_PROJ], codes)
        assert_same_bits(after[f"{O_PROJ}_scale_inv"], scale)

    def test_several_slices_of_a_large_matrix_and_a_stack(self, tmp_path: Path) -> None:
        """A slice is about a million values; the rows end within a block, so slices of the stack's matrices must start afresh."""
        stack = "model.layers.3.mlp.experts.down_proj"
        weights = {O_PROJ: torch.randn(3000, 1100, dtype=torch.bfloat16), stack: torch.randn(2, 1100, 1300, dtype=torch.bfloat16)}
        after = convert(checkpoint(tmp_path / "source", weights), tmp_path / "fp8", "fp8")
        back = convert(tmp_path / "fp8", tmp_path / "bf16", "bf16")
        for name, parts in {O_PROJ: [released(weights[O_PROJ])], stack: [released(matrix) for matrix in weights[stack]]}.items():
            codes, scale = (torch.stack(part).reshape(-1, part[0].shape[1]) for part in zip(*parts, strict=True))
            assert_same_bits(after[name].reshape(codes.shape), codes)
            assert_same_bits(after[f"{name}_scale_inv"].reshape(scale.shape), scale)
            wide = torch.stack([dequantised(*part) for part in parts])
            assert_same_bits(back[name].reshape(wide.shape), wide)


def test_which_weights_are_quantised(tmp_path: Path) -> None:
    """The released layout, MTP's layer included: the projections and nothing else."""
    mla = [f"self_attn.{p}.weight" for p in ("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    ffn = [f"{part}{p}_proj.weight" for part in ("mlp.", "mlp.shared_experts.", "mlp.experts.255.") for p in ("gate", "up", "down")]
    linear = [f"model.layers.{layer}.{name}" for layer in (0, 61) for name in (*mla, *ffn)]
    linear += ["model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"]
    plain = [f"model.layers.61.{name}.weight" for name in ("eh_proj", "embed_tokens", "shared_head.head", "enorm", "mlp.gate")]
    plain += [f"model.layers.0.self_attn.{name}" for name in ("q_a_layernorm.weight", "o_proj.bias", "indexer.wk.weight")]
    plain += ["model.layers.61.mlp.gate.e_score_correction_bias", "model.embed_tokens.weight", "lm_head.weight", NORM]
    tensors = {name: torch.ones(2, 2, dtype=torch.bfloat16) for name in (*linear, *plain)}
    after = convert(checkpoint(tmp_path / "source", tensors), tmp_path / "fp8", "fp8")
    assert {name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn} == set(linear)
    assert {name for name in after if name.endswith("_scale_inv")} == {f"{name}_scale_inv" for name in linear}


def test_transformers_loads_what_was_converted(tmp_path: Path) -> None:
    model = model_of(**ALIGNED)
    model.save_pretrained(tmp_path / "source", max_shard_size="1MB")
    stored = read(tmp_path / "source")
    Conversion(tmp_path / "source", tmp_path / "fp8", "fp8").run()
    Conversion(tmp_path / "fp8", tmp_path / "bf16", "bf16").run()
    linear = linear_names(model, stored)
    expected = {name: dequantised(*released(tensor)) if name in linear else tensor for name, tensor in stored.items()}
    for folder in ("fp8", "bf16"):
        loaded, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16, output_loading_info=True)
        assert not any(info.values()), info
        found = loaded.state_dict()
        for name, tensor in expected.items():
            if ".mlp.experts." not in name:
                assert_same_bits(found.pop(name).to(tensor.dtype), tensor, name)
        experts = "model.layers.1.mlp.experts"
        for e in range(4):
            gate, up, down = (expected[f"{experts}.{e}.{p}_proj.weight"] for p in ("gate", "up", "down"))
            assert_same_bits(found[f"{experts}.gate_up_proj"][e], torch.cat([gate, up]))
            assert_same_bits(found[f"{experts}.down_proj"][e], down)
        assert found.keys() == {f"{experts}.gate_up_proj", f"{experts}.down_proj"}


class TestThereAndBackAgain:
    def rounds(self, folder: Path, weight: Tensor) -> list[dict[str, Tensor]]:
        """The FP8 folders of three conversions, with BF16 in between."""
        source, found = checkpoint(folder / "source", {O_PROJ: weight}), []
        for i in range(3):
            found.append(convert(source, folder / f"fp8-{i}", "fp8"))
            convert(folder / f"fp8-{i}", source := folder / f"bf16-{i}", "bf16")
        return found

    @settings(max_examples=15, deadline=None)
    @given(exponent=st.integers(-13, 60), spread=st.integers(0, 30), seed=st.integers(0, 1000))
    def test_bf16_gives_the_same_bytes(self, tmp_path_factory: pytest.TempPathFactory, exponent: int, spread: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(130, 140, generator=generator) * 2.0 ** -(torch.rand(130, 140, generator=generator) * spread)
        weight = (weight / weight.abs().max() * 2.0**exponent).to(torch.bfloat16)
        weight[::128, ::128] = 2.0**exponent  # a block is above the floor, 1e-4 < 2^-13
        first, second, _ = self.rounds(tmp_path_factory.mktemp("rounds"), weight)
        for name, tensor in first.items():
            assert_same_bits(second[name], tensor)

    @pytest.mark.parametrize(("largest", "same"), [(0.97e-4, False), (0.99e-4, False), (0.96e-4, True), (5e-5, True), (0.0, True)])
    def test_below_the_floor(self, tmp_path: Path, largest: float, same: bool) -> None:
        """At 432/448 of the floor and above, a value becomes the code 448, 1e-4, which BF16 rounds to 1.0014e-4: above the floor."""
        first, second, third = self.rounds(tmp_path, (torch.rand(128, 128) * largest).index_fill(0, torch.tensor(5), largest).bfloat16())
        assert_same_bits(second[O_PROJ], first[O_PROJ])
        scales = [found[f"{O_PROJ}_scale_inv"] for found in (first, second, third)]
        assert torch.equal(scales[0], scales[1]) == same
        assert_same_bits(scales[1], scales[2])

    def test_float32_settles_after_one_round(self, tmp_path: Path) -> None:
        first, second, third = self.rounds(tmp_path, torch.randn(500, 500, generator=torch.Generator().manual_seed(0)))
        assert_same_bits(second[O_PROJ], first[O_PROJ])
        for name, tensor in second.items():
            assert_same_bits(third[name], tensor)
        scales = [found[f"{O_PROJ}_scale_inv"] for found in (first, second)]
        assert not torch.equal(*scales)
        assert torch.all((scales[0] / scales[1] - 1).abs() <= 2.0**-8)


def codes_of(rows: int, columns: int) -> Tensor:
    """Every finite E4M3 code, at random."""
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes[codes & 0x7F == 0x7F] = 0
    return codes.view(torch.float8_e4m3fn)


class TestFp8Sources:
    """FP8 checkpoints as they are met in the wild, to BF16."""

    config = CONFIG | {"quantization_config": QUANTIZATION, "torch_dtype": "float8_e4m3fn"}

    def test_scales_in_another_shard_and_an_index_without_metadata(self, tmp_path: Path) -> None:
        """The released shards part some weights from their scales; a shard of nothing but scales has nothing to become."""
        codes, scale = codes_of(200, 300), torch.rand(2, 3) + 0.1
        source = tmp_path / "fp8"
        source.mkdir()
        save_file({O_PROJ: codes, NORM: torch.ones(3)}, source / "a.safetensors")
        save_file({f"{O_PROJ}_scale_inv": scale}, source / "b.safetensors")
        weight_map = {O_PROJ: "a.safetensors", NORM: "a.safetensors", f"{O_PROJ}_scale_inv": "b.safetensors"}
        (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (source / "config.json").write_text(json.dumps(self.config))
        after = convert(source, tmp_path / "bf16", "bf16")
        assert_same_bits(after[O_PROJ], dequantised(codes, scale))
        assert_same_bits(after[NORM], torch.ones(3))
        index = json.loads((tmp_path / "bf16" / "model.safetensors.index.json").read_text())
        assert index == {"metadata": {"total_size": 200 * 300 * 2 + 12}, "weight_map": {NORM: "a.safetensors", O_PROJ: "a.safetensors"}}
        assert not (tmp_path / "bf16" / "b.safetensors").exists()
        assert json.loads((tmp_path / "bf16" / "config.json").read_text()) == CONFIG

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
    def test_scales_of_other_types(self, tmp_path: Path, dtype: torch.dtype) -> None:
        """V3.1's are powers of two in float32 (scale_fmt ue8m0), or in E8M0 itself."""
        codes, scale = codes_of(200, 300), (2.0 ** torch.arange(-3, 3).reshape(2, 3)).to(dtype)
        config = self.config | {"quantization_config": QUANTIZATION | {"scale_fmt": "ue8m0"}}
        source = checkpoint(tmp_path / "fp8", {O_PROJ: codes, f"{O_PROJ}_scale_inv": scale}, config)
        assert_same_bits(convert(source, tmp_path / "bf16", "bf16")[O_PROJ], dequantised(codes, scale))

    def test_mixed_and_other_block_sizes(self, tmp_path: Path) -> None:
        codes, scale, plain = codes_of(128, 96), torch.rand(2, 3) + 0.1, torch.randn(5, 7, dtype=torch.bfloat16)
        name = O_PROJ.replace("o_proj", "q_proj")
        config = self.config | {"quantization_config": QUANTIZATION | {"weight_block_size": [64, 32]}}
        source = checkpoint(tmp_path / "fp8", {O_PROJ: codes, f"{O_PROJ}_scale_inv": scale, name: plain}, config)
        after = convert(source, tmp_path / "bf16", "bf16")
        assert_same_bits(after[name], plain)
        assert_same_bits(after[O_PROJ], (codes.float() * scale.repeat_interleave(64, 0).repeat_interleave(32, 1)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_that_dsc_lacks_and_misaligned_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    """A file made by hand whose tensors begin at odd bytes, as a writer that does not sort makes them; one is of uint16."""
    weight, extra = torch.randn(130, 70).to(dtype), torch.tensor([1, 2, 65535], dtype=torch.uint16)
    data = {"odd": torch.ones(3, dtype=torch.uint8), O_PROJ: weight, "extra": extra, "empty": torch.ones(0, 3)}
    codes = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.float32: "F32"}
    header, body = {}, b""
    for name, tensor in data.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    (tmp_path / "source" / "config.json").write_text(json.dumps(CONFIG))
    after = convert(tmp_path / "source", tmp_path / "fp8", "fp8")
    assert_same_bits(after[O_PROJ], released(weight)[0])
    for name in ("odd", "extra", "empty"):
        assert_same_bits(after[name], data[name])


def test_what_else_is_copied(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", {O_PROJ: torch.ones(2, 2)})
    copied = ["inference/model.py", "inference/config.json", "tokenizer.json", ".gitattributes"]
    for name in (*copied, ".git/HEAD", "old.bin", "x.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (tmp_path / "blob").write_text("linked, as in a cache of downloads")
    (source / "generation_config.json").symlink_to(tmp_path / "blob")
    done = Conversion(source, tmp_path / "fp8", "fp8").run()
    assert done.left_out == ("old.bin", "x.safetensors")
    names = {str(path.relative_to(tmp_path / "fp8")) for path in (tmp_path / "fp8").rglob("*") if path.is_file()}
    assert names == {*copied, "generation_config.json", "config.json", "model.safetensors"}
    assert all((tmp_path / "fp8" / name).read_text() == name for name in copied)
    assert (tmp_path / "fp8" / "generation_config.json").read_text() == "linked, as in a cache of downloads"


class TestCommand:
    def test_text_json_and_errors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = str(checkpoint(tmp_path / "source", {O_PROJ: torch.ones(256, 256, dtype=torch.bfloat16)}))
        fp8, again = str(tmp_path / "fp8"), str(tmp_path / "again")
        with pytest.raises(SystemExit, match="0"):
            main(["convert", source, fp8, "--to", "fp8"])
        out, err = capsys.readouterr()
        size = os.stat(tmp_path / "fp8" / "model.safetensors").st_size
        assert out.startswith(f"{fp8}: 1 shard, 131.07 kB in, {size / 1e3:.2f} kB out, ")
        assert out.endswith(" MB/s\n")
        assert err == ""
        with pytest.raises(SystemExit, match="0"):
            main(["convert", source, again, "--to", "fp8", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["seconds"] > 0
        assert found["megabytes_per_second"] == pytest.approx(131072 / found["seconds"] / 1e6)
        fixed = {key: found[key] for key in ("out", "to", "shards", "kept", "bytes_read", "bytes_written", "left_out")}
        assert fixed == {
            "out": again, "to": "fp8", "shards": 1, "kept": 0, "bytes_read": 131072, "bytes_written": size, "left_out": [],
        }  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main(["convert", source, fp8, "--to", "fp8"])
        expected = f"dsc: error: {fp8}: exists, expected a new or empty folder or an unfinished conversion of this source\n"
        assert capsys.readouterr() == ("", expected)

    def test_needs_no_torch(self, tmp_path: Path) -> None:
        source = checkpoint(tmp_path / "source", {O_PROJ: torch.ones(2, 2)})
        code = f"""
import sys
from dsc.models.convert import Conversion
Conversion({str(source)!r}, {str(tmp_path / "fp8")!r}, "fp8").run()
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", code], check=True)
