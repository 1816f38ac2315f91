"""quantize-fp8: a quantised model against an emulation in plain torch, recipes key by key, and weights that are stored in FP8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsc
from dsc.driver.inputs import seeded
from dsc.driver.run import open_weights
from dsc.ir.core import Module
from dsc.ir.ops.control import Param
from dsc.ir.ops.moe import Dispatch
from dsc.ir.ops.quant import GroupedScaledMatmul, Quantize, ScaledMatmul
from dsc.ir.types import DType
from dsc.ir.walk import parameters, walk, weights
from dsc.models.build import build
from dsc.models.config import load_config, shipped
from dsc.models.deepseek import Experts
from dsc.models.weights import Wanted
from dsc.passes.manager import parse_pipeline, run_pipeline
from dsc.passes.recipe import recipe, recipes

F32 = ["dtype=float32", "num_nextn_predict_layers=0"]


def blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """amax of each block, spread over its elements; [..., R, C], edges cut."""
    r, c = x.shape[-2:]
    padded = F.pad(x.abs(), (0, -c % columns, 0, -r % rows))
    grid = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1), keepdim=True)
    return grid.expand(*grid.shape[:-3], rows, grid.shape[-2], columns).flatten(-4, -3).flatten(-2)[..., :r, :c]


def fake(x: Tensor, rows: int, columns: int, pow2: bool = False) -> Tensor:
    """Quantise to E4M3 and back by the released code's rule: s = max(amax, 1e-4) / 448, x / s cast; s up to a power of two for V3.1."""
    scale = blocks(x, rows, columns).clamp(min=1e-4) / torch.full((), 448.0)
    if pow2:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class FakeLinear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return fake(x, 1, 128) @ fake(self.weight, 128, 128).T


def fake_experts(experts: Experts, tokens: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """Each token through its experts, one after the other; it is quantised before it is sent, with a power-of-two scale."""
    sent, out = fake(tokens, 1, 128, pow2=True), torch.zeros_like(tokens)
    weight = {name: fake(getattr(experts, name).detach(), 128, 128) for name in ("gate_proj", "up_proj", "down_proj")}
    for token in range(len(tokens)):
        for slot, expert in enumerate(ids[token].tolist()):
            x = sent[token]
            hidden = F.silu(weight["gate_proj"][expert] @ x) * (weight["up_proj"][expert] @ x)
            out[token] += scores[token, slot] * (weight["down_proj"][expert] @ fake(hidden[None], 1, 128)[0])
    return out


def emulate(model: nn.Module) -> nn.Module:
    """`model` with every Linear but the head, and every expert, quantised on the fly."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], FakeLinear(module.weight.detach()))
        elif isinstance(module, Experts):
            module.forward = lambda tokens, ids, scores, experts=module: (fake_experts(experts, tokens, ids, scores), None)
    return model


@pytest.mark.slow
def test_tiny_logits_equal_those_of_a_torch_emulation() -> None:
    module = dsc.trace("deepseek-v3-tiny", overrides=F32, seq=24)
    (tokens,) = seeded(module)
    fetch = open_weights("random:0", module, None)
    model = build(load_config("deepseek-v3-tiny", F32), device="cpu")
    model.load_state_dict({name: torch.tensor(np.array(fetch(name, tensor))) for name, tensor in weights(module).items()}, strict=False)
    with torch.no_grad():
        plain = model(torch.tensor(tokens)).numpy()
        expected = emulate(model)(torch.tensor(tokens)).numpy()
    (found,) = dsc.run(dsc.apply(module, "quantize-fp8"), inputs=(tokens,))
    norm = np.linalg.norm(expected)
    assert np.linalg.norm(plain - expected) > 0.02 * norm, "the emulation quantises nothing"
    # Both sum in float32, in another order. Codes agree unless a value lies within that of a rounding boundary.
    assert np.linalg.norm(found - expected) < 1e-5 * norm


def test_the_whole_recipe_on_a_layer() -> None:
    module = dsc.apply(dsc.trace("deepseek-v3-tiny"), "quantize-fp8{recipe=deepseek-v3}")
    layer = next(f for f in module.funcs if any(isinstance(op, GroupedScaledMatmul) for op in f.ops))
    (sent,) = (op for op in layer.ops if isinstance(op, Dispatch))
    codes, scales = sent.xs
    assert codes.dtype is DType.f8e4m3
    assert isinstance(codes.owner, Quantize)
    assert codes.owner.rule.pow2 != "no", "tokens are sent with power-of-two scales"
    assert codes.owner.results == (codes, scales)
    experts = [op for op in layer.ops if isinstance(op, GroupedScaledMatmul)]
    assert [op.x.owner is sent for op in experts] == [True, True, False], "gate and up read what was sent, down reads SwiGLU"
    for op in layer.ops:
        if isinstance(op, ScaledMatmul):
            assert (op.a_tile, op.b_tile) == ((1, 128), (128, 128))
            assert isinstance(op.a.owner, Quantize)
            assert op.a.owner.rule.pow2 == "no"
    kept = {
        op.path
        for f in module.funcs
        for op in f.ops
        if isinstance(op, Param) and not any(u for u in f.ops if isinstance(u, Quantize) and u.x is op.result)
    }
    assert {"weight", "mlp.gate.weight", "mlp.gate.e_score_correction_bias", "input_layernorm.weight"} <= kept


def test_a_value_that_two_products_read_is_quantised_once() -> None:
    module = dsc.apply(dsc.trace("deepseek-v3-tiny"), "quantize-fp8")
    for func in module.funcs:
        read = [op.x for op in func.ops if isinstance(op, Quantize)]
        rules = [(op.x, op.tile, op.rule) for op in func.ops if isinstance(op, Quantize)]
        assert len(set(rules)) == len(read)


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("chosen", recipes())
def test_what_the_pass_prints_parses_back(name: str, chosen: str, traced: dict[str, Module]) -> None:
    module = traced.setdefault(name, dsc.trace(name, seq=32))
    for stored in (False, True):
        after = dsc.apply(module, f"quantize-fp8{{recipe={chosen},stored={str(stored).lower()}}},simplify")
        assert dsc.parse(str(after)) == after
        assert sum(c.total for c in parameters(after).values()) == sum(c.total for c in parameters(module).values())
        assert sum(c.active for c in parameters(after).values()) == sum(c.active for c in parameters(module).values())


@pytest.fixture(scope="module")
def traced() -> dict[str, Module]:
    return {}


def linear(shape: str = "4, 8, 256", path: str = "up_proj.weight", dtype: str = "bf16") -> Module:
    *lead, k = shape.split(", ")
    y = f"{dtype}[{', '.join([*lead, '384'])}]"
    return dsc.parse(
        f"func @f(%x: {dtype}[{shape}]) {{\n  %w: {dtype}[384, {k}] = param({path!r})  @ f#1 F\n".replace("'", '"')
        + f"  %y: {y} = matmul(%x, %w, transpose_b=true)  @ f#2 F\n  return %y\n}}\n"
    )


def quantized(module: Module, options: str) -> ScaledMatmul:
    (func,) = dsc.apply(module, f"quantize-fp8{{{options}}}").funcs
    (found,) = (op for op in func.ops if isinstance(op, ScaledMatmul))
    return found


def test_each_option_changes_its_decision() -> None:
    base = quantized(linear(), "")
    assert quantized(linear(), "tile=64").a_tile == (1, 64)
    assert quantized(linear(), "tile=64").b_tile == (64, 64)
    assert quantized(linear(), "format=f8e5m2").a.dtype is DType.f8e5m2
    assert quantized(linear(), "scale=transformer-engine").a.owner.rule.pow2 == "mantissa-mask"  # type: ignore[union-attr]
    assert base.accumulation.arithmetic == "float32"
    assert quantized(linear(), "accumulate=h800").accumulation.fraction_bits == 13
    assert quantized(linear(), "accumulate=h800,promote=0").accumulation.interval == 0
    assert quantized(linear(), "recipe=per-tensor").a_tile == (32, 256), "tokens become rows of one matrix"
    assert quantized(linear(), "recipe=deepseek-v3.1").b.owner.rule.pow2 == "ceil-log2"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (linear(path="lm_head.weight"), "the recipe keeps lm_head"),
        (linear(path="layers.0.mlp.gate.weight"), "the recipe keeps mlp.gate."),
        (
            dsc.parse(
                'func @f(%x: bf16[4, 8]) {\n  %w: bf16[8, 4] = param("w")  @ f#1 F\n'
                "  %y: bf16[4, 4] = matmul(%x, %w)  @ f#2 F\n  return %y\n}\n"
            ),
            "w is [in, out]; a quantised product reads a weight as [out, in]",
        ),
        (
            dsc.parse("func @f(%x: bf16[4, 8]) {\n  %y: bf16[4, 4] = matmul(%x, %x, transpose_b=true)  @ f#2 F\n  return %y\n}\n"),
            "neither operand is a weight",
        ),
        (
            dsc.parse(
                'func @f(%x: bf16[4, 8]) {\n  %w: bf16[32] = param("w")  @ f#1 F\n  %v: bf16[4, 8] = reshape(%w, shape=[4, 8])  @ f#3 F\n'
                "  %y: bf16[4, 4] = matmul(%x, %v, transpose_b=true)  @ f#2 F\n  return %y\n}\n"
            ),
            "w is read in another form (reshape), not as the weight of a Linear",
        ),
    ],
)
def test_it_says_why_a_product_is_left_alone(module: Module, reason: str) -> None:
    result = run_pipeline(module, parse_pipeline("quantize-fp8"))
    assert [d.reason for d in result.records[0].declined] == [reason]
    assert not any(isinstance(op, ScaledMatmul) for _, _, op in walk(result.module))


def test_bf16_leaves_everything_and_says_so() -> None:
    result = run_pipeline(linear(), parse_pipeline("quantize-fp8{recipe=bf16}"))
    assert [d.reason for d in result.records[0].declined] == ["recipe bf16 quantises nothing"]
    assert result.module.funcs == linear().funcs


def test_stored_weights_are_read_and_never_quantised_again() -> None:
    module = dsc.apply(dsc.trace("deepseek-v3-tiny"), "quantize-fp8{stored=true},simplify")
    for func in module.funcs:
        for op in func.ops:
            if isinstance(op, Quantize):
                assert not isinstance(op.x.owner, Param), f"{op.x.name} is a weight, quantised again"
    types = weights(module)
    name = "model.layers.1.mlp.experts.gate_proj"
    assert types[name].dtype is DType.f8e4m3
    assert types[f"{name}_scale_inv"].shape == (16, 1, 2)
    assert "lm_head.weight_scale_inv" not in types
    seen: dict[str, np.ndarray] = {}

    def observe(site: object, op: object, operands: tuple[np.ndarray, ...], results: tuple[np.ndarray, ...]) -> None:
        if isinstance(op, ScaledMatmul):
            seen[str(site)] = operands[2]

    dsc.run(module, observe=observe)
    stored = open_weights("random:0", module, None)(
        "model.layers.0.self_attn.o_proj.weight", types["model.layers.0.self_attn.o_proj.weight"]
    )
    (used,) = (codes for site, codes in seen.items() if "layers.0" in site and "o_proj" in site)
    assert used.tobytes() == stored.tobytes(), "the product reads the stored bytes"


def test_an_fp8_checkpoint_is_read_byte_for_byte(tmp_path: Path) -> None:
    from dsc.models.checkpoint import CheckpointFolder, save_checkpoint
    from dsc.models.convert import Conversion

    plain = dsc.trace("deepseek-v3-tiny", seq=16)
    fetch = open_weights("random:3", plain, None)
    config = load_config("deepseek-v3-tiny", ["num_nextn_predict_layers=0"]).to_dict()
    save_checkpoint(tmp_path / "bf16", {name: fetch(name, tensor) for name, tensor in weights(plain).items()}, config)
    Conversion(tmp_path / "bf16", tmp_path / "fp8", "fp8").run()
    folder = CheckpointFolder(tmp_path / "fp8")
    artifact = dsc.compile(tmp_path / "fp8", tmp_path / "out", seq=16, recipe="deepseek-v3", weights=str(tmp_path / "fp8"))
    assert any("stored=true" in p.text for p in artifact.manifest.passes), "an FP8 checkpoint is recognised"
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = weights(artifact.module)[name]
    assert tensor.dtype is DType.f8e4m3
    found = open_weights(str(tmp_path / "fp8"), artifact.module, config)(name, tensor)
    assert found.tobytes() == folder.get(Wanted(name, "f8e4m3", found.shape)).tobytes()
    # Quantising the BF16 weights in the program gives the same codes, so the results are the same to the bit.
    (stored,) = dsc.run(artifact)
    (fresh,) = dsc.run(dsc.apply(plain, "quantize-fp8"), weights=str(tmp_path / "bf16"))
    assert stored.tobytes() == fresh.tobytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("description = 3", 'expected description = "..."'),
        ('description = "x"\nkep = []', "the recipe has no key kep"),
        ('description = "x"\n[activation]\nformat = "f8e4m3"\ntile = [1, 128]\nrule = "deepseek-v3"', "one of them is missing"),
        ('description = "x"\n[weight]\nformat = "int8"\ntile = [1, 128]\nrule = "deepseek-v3"', "format 'int8', expected one of"),
        ('description = "x"\n[weight]\nformat = "f8e4m3"\ntile = [0, 128]\nrule = "deepseek-v3"', "expected two numbers of 1 or more"),
        ('description = "x"\n[weight]\nformat = "f8e4m3"\ntile = [1]\nrule = "deepseek-v3"', "expected a list of 2, found 1"),
        ('description = "x"\n[weight]\nformat = "f8e4m3"\ntile = [1, 2]\nrule = "mine"', "unknown rule 'mine'"),
        ('description = "x"\n[accumulation]\nmodel = "h8000"', "unknown device h8000"),
        ("description =", "not TOML"),
    ],
)
def test_a_recipe_that_is_wrong_is_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(dsc.DscError) as error:
        recipe(str(file))
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    section = 'format = "f8e5m2"\ntile = [1, 32]\nrule = { floor = 1e-6, pow2 = "ceil-bits" }\n'
    file.write_text(f'description = "mine"\nkeep = ["up"]\n[activation]\n{section}[weight]\n{section}')
    found = quantized(linear(path="down.weight"), f'recipe="{file}"')
    assert found.a_tile == found.b_tile == (1, 32)
    assert found.a.owner.rule.floor == 1e-6  # type: ignore[union-attr]


def test_quantised_input_is_refused() -> None:
    once = dsc.apply(linear(), "quantize-fp8")
    with pytest.raises(dsc.DscError, match="this one is at stage quantized"):
        dsc.apply(once, "quantize-fp8")
