"""The FP8 backward pass against an emulation in plain torch: a Linear, an MLP of experts, attention and its output projection."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsc
from dsc import backends
from dsc.backends.arrays import Array
from dsc.ir.core import Module, Op, Phase
from dsc.ir.gradients import by_name
from dsc.ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad, Matmul
from dsc.ir.ops.moe import Redispatch
from dsc.ir.ops.quant import Dequantize, GroupedScaledMatmul, GroupedScaledMatmulWgrad, Quantize, ScaledMatmul
from dsc.ir.types import Bundle, DType
from dsc.passes.manager import parse_pipeline, run_pipeline
from dsc.passes.recipe import recipes
from dsc.testing.sampling import seeded

CLOSE = 1e-5
"""Largest difference relative to the largest magnitude: sums of float32 in another order."""


def blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """amax of each block, spread over its elements; [..., R, C], edges cut."""
    r, c = x.shape[-2:]
    padded = F.pad(x.abs(), (0, -c % columns, 0, -r % rows))
    grid = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1), keepdim=True)
    return grid.expand(*grid.shape[:-3], rows, grid.shape[-2], columns).flatten(-4, -3).flatten(-2)[..., :r, :c]


def fake(x: Tensor, rows: int, columns: int, pow2: bool = False, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Quantise and back by the released code's rule: s = max(amax, 1e-4) / M, x / s cast; s up to a power of two for V3.1."""
    largest = torch.finfo(dtype).max
    scale = blocks(x, rows, columns).clamp(min=1e-4) / torch.full((), largest)
    if pow2:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return (x / scale).clamp(-largest, largest).to(dtype).float() * scale


def e5m6(x: Tensor) -> Tensor:
    """E5M6 in tiles of 1x128 with power-of-two scales: float16 rounded to 6 places of the mantissa, largest value 127/64 * 2^15."""
    largest = 127 / 64 * 2.0**15
    scale = torch.exp2(torch.ceil(torch.log2(blocks(x, 1, 128).clamp(min=1e-4) / largest)))
    y = x / scale
    exponent = torch.frexp(y).exponent.clamp(min=-13) - 1  # below 2^-14 the spacing stays
    step = torch.exp2((exponent - 6).float())
    return torch.round(y / step).clamp(-largest / step, largest / step) * step * scale


def error(found: Array, expected: Tensor) -> float:
    reference = expected.detach().numpy()
    assert found.shape == reference.shape
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def run(module: Module, weights: dict[str, Tensor], *inputs: Tensor) -> tuple[tuple[Any, ...], dict[str, Array]]:
    results = backends.get("numpy").run(module, lambda name, _: weights[name].numpy(), [x.numpy() for x in inputs])
    return results, by_name(module, results)


def quantized(text: str, pipeline: str = "autodiff,quantize-fp8") -> Module:
    return dsc.apply(dsc.parse(text), pipeline)


# ---- a Linear: 200 tokens, 300 -> 150, no size a multiple of 128; what precedes it makes its input depend on a weight

LINEAR = """
func @main(%x: f32[200, 300], %g: f32[200, 150]) {
  %s: f32[300] = param("s")                                      @ main#1 F
  %h: f32[200, 300] = mul(%x, %s)                                @ main#2 F
  %y: f32[200, 150] = call(@linear, [%h], weights="l")           @ main#3 F
  %p: f32[200, 150] = mul(%y, %g)                                @ main#4 F
  %loss: f32[] = sum(%p, axes=[0, 1])                            @ main#5 F
  return %loss, %y
}

func @linear(%h: f32[200, 300]) {
  %w: f32[150, 300] = param("w")                                 @ linear#1 F
  %y: f32[200, 150] = matmul(%h, %w, transpose_b=true)           @ linear#2 F
  return %y
}
"""


def linear_data() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Numbers whose magnitude changes along tokens and channels, so that every tile has a scale of its own."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 300, generator=rng) * torch.logspace(-2, 2, 300) * torch.logspace(0, 2, 200)[:, None]
    g = torch.randn(200, 150, generator=rng) * torch.logspace(-3, 0, 150) * torch.logspace(1, -1, 200)[:, None]
    return {"s": torch.ones(300), "l.w": torch.randn(150, 300, generator=rng) / 17}, x, g


def test_a_linear_in_all_three_products() -> None:
    weights, x, g = linear_data()
    w, cached = weights["l.w"], fake(x, 1, 128)
    (_, y, *_), found = run(quantized(LINEAR), weights, x, g)
    assert error(y, cached @ fake(w, 128, 128).T) <= CLOSE
    dx = fake(g, 1, 128) @ fake(w, 128, 128)
    assert error(found["s"], (dx * x).sum(0)) <= CLOSE
    dw = fake(g, 128, 1).T @ fake(cached, 128, 1)
    assert error(found["l.w"], dw) <= CLOSE
    wrong = {
        "x is not cached in FP8": fake(g, 128, 1).T @ fake(x, 128, 1),
        "x is not tiled anew": fake(g, 128, 1).T @ cached,
        "dy in tiles along channels": fake(g, 1, 128).T @ fake(cached, 128, 1),
        "dy is not quantised": g.T @ fake(cached, 128, 1),
    }
    for fault, expected in wrong.items():
        assert error(found["l.w"], expected) > 100 * CLOSE, f"the test cannot tell: {fault}"
    assert error(found["s"], ((fake(g, 1, 128) @ w) * x).sum(0)) > 100 * CLOSE
    assert error(found["s"], ((fake(g, 128, 1) @ fake(w, 128, 128)) * x).sum(0)) > 100 * CLOSE


@pytest.mark.parametrize("recipe", ["block-only", "hybrid-e4m3-e5m2", "per-tensor", "transformer-engine"])
def test_a_linear_by_other_recipes(recipe: str) -> None:
    weights, x, g = linear_data()
    w = weights["l.w"]
    _, found = run(quantized(LINEAR, f"autodiff,quantize-fp8{{recipe={recipe}}}"), weights, x, g)
    if recipe == "block-only":
        dx, dw = fake(g, 128, 128) @ fake(w, 128, 128), fake(g, 128, 128).T @ fake(fake(x, 1, 128), 128, 1)
    elif recipe == "hybrid-e4m3-e5m2":
        e5m2 = torch.float8_e5m2
        dx = fake(g, 1, 128, dtype=e5m2) @ fake(w, 128, 128)
        dw = fake(g, 128, 1, dtype=e5m2).T @ fake(fake(x, 1, 128), 128, 1)
    elif recipe == "per-tensor":
        dx, dw = fake(g, *g.shape) @ fake(w, *w.shape), fake(g, *g.shape).T @ fake(x, *x.shape)
    else:  # the multiplier down to a power of two, as 2^floor(log2(448 / amax)); nothing is cached

        def masked(v: Tensor, rows: int, columns: int) -> Tensor:
            m = torch.exp2(torch.floor(torch.log2(448 / blocks(v, rows, columns))))
            return (v * m).to(torch.float8_e4m3fn).float() / m

        dx, dw = masked(g, 1, 128) @ masked(w, 128, 128), masked(g, 128, 1).T @ masked(x, 128, 1)
    assert error(found["s"], (dx * x).sum(0)) <= CLOSE
    assert error(found["l.w"], dw) <= CLOSE


# ---- experts: 90 tokens, each to 3 of 5 experts, one of which nobody chooses

EXPERTS = """
func @main(%x: f32[90, 140], %ids: i32[90, 3], %g: f32[90, 140]) {
  %s: f32[140] = param("s")                                                                      @ main#1 F
  %t: f32[90, 3] = param("t")                                                                    @ main#2 F
  %h: f32[90, 140] = mul(%x, %s)                                                                 @ main#3 F
  %y: f32[90, 140] = call(@experts, [%h, %ids, %t], weights="e")                                 @ main#4 F
  %p: f32[90, 140] = mul(%y, %g)                                                                 @ main#5 F
  %loss: f32[] = sum(%p, axes=[0, 1])                                                            @ main#6 F
  return %loss, %y
}

func @experts(%h: f32[90, 140], %ids: i32[90, 3], %t: f32[90, 3]) {
  %rows: f32[270, 140], %counts: i32[5], %handle: bundle{i32[270]} = dispatch([%h], %ids, experts=5)  @ e#1 F
  %wg: f32[5, 70, 140] = param("gate")                                                           @ e#2 F
  %gate: f32[270, 70] = grouped_matmul(%rows, %wg, %counts, transpose_b=true)                    @ e#3 F
  %wu: f32[5, 70, 140] = param("up")                                                             @ e#4 F
  %up: f32[270, 70] = grouped_matmul(%rows, %wu, %counts, transpose_b=true)                      @ e#5 F
  %act: f32[270, 70] = swiglu(%gate, %up)                                                        @ e#6 F
  %wd: f32[5, 140, 70] = param("down")                                                           @ e#7 F
  %down: f32[270, 140] = grouped_matmul(%act, %wd, %counts, transpose_b=true)                    @ e#8 F
  %y: f32[90, 140] = combine(%down, %handle, %t)                                                 @ e#9 F
  return %y
}
"""


def emulated_experts(
    weights: dict[str, Tensor], x: Tensor, ids: Tensor, g: Tensor, fault: str = "", weighted: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward, one expert after the other. `fault` changes one decision.

    Scores multiply what the down projection gives or, where `weighted`, what it reads: then the gradient that was sent is what Dgrad reads.
    """
    restart = fault != "tiles run on over experts"
    wg, wu, wd = (weights[f"e.{n}"] for n in ("gate", "up", "down"))
    qg, qu, qd = (fake(w, 128, 128) for w in (wg, wu, wd))
    sent, back = fake(x, 1, 128, pow2=True), fake(g, 1, 128, pow2=fault != "gradients sent without powers of two")
    if fault == "gradients sent in full":
        back = g
    chosen = [(ids == e).nonzero() for e in range(5)]  # rows of one expert keep the tokens' order
    y, dx, dt = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(ids.shape)
    parts: list[tuple[Tensor, ...]] = []
    for e, at in enumerate(chosen):
        token, slot = at.T
        rows, scores = sent[token], weights["t"][token, slot][:, None]
        gate, up = rows @ qg[e].T, rows @ qu[e].T
        inside, outside = (scores, torch.ones_like(scores)) if weighted else (torch.ones_like(scores), scores)
        down = fake(F.silu(gate) * up * inside, 1, 128) @ qd[e].T
        y.index_add_(0, token, outside * down)
        ddown = outside * back[token]
        if fault != "SwiGLU's inputs cached in full":
            gate, up = fake(gate, 1, 128), fake(up, 1, 128)
        act = F.silu(gate) * up
        dact = (ddown if weighted else fake(ddown, 1, 128)) @ qd[e]
        dt[token, slot] = (dact * act).sum(-1) if weighted else (down * back[token]).sum(-1)
        act, dact = act * inside, dact * inside
        s = gate.sigmoid()
        dgate, dup = dact * up * s * (1 + gate * (1 - s)), dact * gate * s
        dx.index_add_(0, token, fake(dgate, 1, 128) @ qg[e] + fake(dup, 1, 128) @ qu[e])
        parts.append((ddown, act, dgate, dup, rows))
    sizes = [len(at) for at in chosen]

    def tiled(index: int) -> list[Tensor]:
        """Each expert's rows of one operand of a Wgrad, in tiles of 128x1."""
        each = [p[index] for p in parts]
        return [fake(v, 128, 1) if len(v) else v for v in each] if restart else list(fake(torch.cat(each), 128, 1).split(sizes))

    ddown, act, dgate, dup, rows = (tiled(i) for i in range(5))
    found = {
        name: torch.stack([a.T @ b for a, b in zip(left, right, strict=True)])
        for name, left, right in (("e.down", ddown, act), ("e.gate", dgate, rows), ("e.up", dup, rows))
    }
    return y, found | {"s": (dx * x).sum(0), "t": dt}


def expert_data() -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    choose = torch.stack([torch.randperm(4, generator=rng)[:3] for _ in range(90)])
    ids = torch.tensor([0, 2, 3, 4])[choose].int()
    x = torch.randn(90, 140, generator=rng) * torch.logspace(-1, 1, 140) * torch.logspace(0, 1, 90)[:, None]
    g = torch.randn(90, 140, generator=rng) * torch.logspace(-2, 0, 140) * torch.logspace(1, -1, 90)[:, None]
    shapes = {"e.gate": (5, 70, 140), "e.up": (5, 70, 140), "e.down": (5, 140, 70)}
    weights = {n: torch.randn(s, generator=rng) / s[-1] ** 0.5 / 8 for n, s in shapes.items()}
    return weights | {"s": torch.ones(140), "t": torch.rand(90, 3, generator=rng)}, x, ids, g


APART = ("tiles run on over experts", "gradients sent without powers of two", "gradients sent in full", "SwiGLU's inputs cached in full")


@pytest.mark.parametrize("weighted", [False, True])
def test_an_mlp_of_experts_in_all_its_products(weighted: bool) -> None:
    """Norms of the difference: a sum in another order may move a value over the edge of an FP8 step, here and there."""
    weights, x, ids, g = expert_data()
    (_, y, *_), found = run(quantized(EXPERTS, f"{'weighted-swiglu,' * weighted}autodiff,quantize-fp8"), weights, x, ids, g)
    expected_y, expected = emulated_experts(weights, x, ids, g, weighted=weighted)
    assert found.keys() == expected.keys()
    assert distance(y, expected_y) <= 1e-3
    for name, gradient in expected.items():
        assert distance(found[name], gradient) <= 2e-3, name
    assert not found["e.up"][1].any(), "the expert that nobody chose has a gradient"
    for fault in APART:
        _, other = emulated_experts(weights, x, ids, g, fault, weighted)
        assert max(distance(found[name], gradient) for name, gradient in other.items()) > 0.01, f"the test cannot tell: {fault}"


def distance(found: Array, expected: Tensor) -> float:
    return float(np.linalg.norm(found - expected.numpy()) / np.linalg.norm(expected.numpy()))


# ---- attention and the Linear behind it

ATTENTION = """
func @main(%x: f32[1, 2, 130, 128], %g: f32[130, 50]) {
  %s: f32[128] = param("s")                                                       @ main#1 F
  %h: f32[1, 2, 130, 128] = mul(%x, %s)                                           @ main#2 F
  %y: f32[130, 50] = call(@block, [%h], weights="b")                              @ main#3 F
  %p: f32[130, 50] = mul(%y, %g)                                                  @ main#4 F
  %loss: f32[] = sum(%p, axes=[0, 1])                                             @ main#5 F
  return %loss, %y
}

func @block(%h: f32[1, 2, 130, 128]) {
  %a: f32[1, 2, 130, 128] = attention(%h, %h, %h, scale=0.1, causal=true)         @ b#1 F
  %t: f32[1, 130, 2, 128] = transpose(%a, perm=[0, 2, 1, 3])                      @ b#2 F
  %r: f32[130, 256] = reshape(%t, shape=[130, 256])                               @ b#3 F
  %w: f32[50, 256] = param("o")                                                   @ b#4 F
  %y: f32[130, 50] = matmul(%r, %w, transpose_b=true)                             @ b#5 F
  return %y
}
"""


def test_the_result_of_attention_is_cached_in_e5m6() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 130, 128, generator=rng) * torch.logspace(-1, 0.3, 130)[:, None]
    g = torch.randn(130, 50, generator=rng)
    weights = {"s": torch.ones(128), "b.o": torch.randn(50, 256, generator=rng) / 16}
    (_, y, *_), found = run(quantized(ATTENTION), weights, x, g)

    scores = (x @ x.transpose(-1, -2) * 0.1).masked_fill(~torch.ones(130, 130, dtype=torch.bool).tril(), -torch.inf)
    p = scores.softmax(-1)
    out = p @ x

    def rows(v: Tensor) -> Tensor:
        return v.transpose(1, 2).reshape(130, 256)

    assert error(y, fake(rows(out), 1, 128) @ fake(weights["b.o"], 128, 128).T) <= CLOSE  # Fprop reads E4M3 of the result itself
    cached = e5m6(out)
    assert 1e-3 < error(cached.numpy(), out) < 2**-6
    assert error(found["b.o"], fake(g, 128, 1).T @ fake(rows(cached), 128, 1)) <= CLOSE
    assert error(found["b.o"], fake(g, 128, 1).T @ fake(rows(out), 128, 1)) > 100 * CLOSE
    dout = (fake(g, 1, 128) @ fake(weights["b.o"], 128, 128)).reshape(1, 130, 2, 128).transpose(1, 2)

    def of_inputs(result: Tensor) -> Tensor:
        ds = p * (dout @ x.transpose(-1, -2) - (dout * result).sum(-1, keepdim=True)) * 0.1
        dh = ds @ x + ds.transpose(-1, -2) @ x + p.transpose(-1, -2) @ dout
        return (dh * x).sum((0, 1, 2))

    assert error(found["s"], of_inputs(cached)) <= CLOSE
    assert error(found["s"], of_inputs(out)) > 10 * CLOSE


# ---- what is quantised and what is not


@cache
def traced() -> Module:
    return dsc.trace("deepseek-v3-tiny", mode="train")


def tiny(recipe: str = "deepseek-v3", split: bool = False) -> Module:
    return dsc.apply(traced(), f"simplify,autodiff{{split={str(split).lower()}}},quantize-fp8{{recipe={recipe}}},simplify")


def count(ops: tuple[Op, ...], cls: type[Op], phase: Phase) -> int:
    return sum(isinstance(op, cls) and op.phase is phase for op in ops)


def test_every_product_of_a_layer_has_three_forms() -> None:
    module = tiny()
    forward, backward = module["training_moe_layer_fwd"].ops, module["training_moe_layer_bwd"].ops
    linears = 8  # five of MLA, three of the shared experts
    assert count(forward, ScaledMatmul, Phase.F) == linears
    assert count(backward, ScaledMatmul, Phase.I) == linears
    assert count(backward, ScaledMatmul, Phase.W) == linears
    assert count(forward, GroupedScaledMatmul, Phase.F) == 3
    assert count(backward, GroupedScaledMatmul, Phase.I) == 3
    assert count(backward, GroupedScaledMatmulWgrad, Phase.W) == 3
    assert not any(isinstance(op, GroupedMatmul | GroupedMatmulWgrad) for op in (*forward, *backward))
    assert {op.id.split(".")[1].split("#")[0] for op in backward if isinstance(op, Matmul)} == {"gate"}
    for op in (*forward, *backward):
        if isinstance(op, ScaledMatmul | GroupedScaledMatmul | GroupedScaledMatmulWgrad):
            assert op.out is (DType.f32 if op.phase is Phase.W else DType.bf16)
    (sent,) = (op for op in backward if isinstance(op, Redispatch))
    assert [x.dtype for x in sent.xs] == [DType.f8e4m3, DType.f32]
    for op in backward:
        if isinstance(op, Quantize) and op.phase is Phase.W:
            assert op.tile == (128, 1)
            assert (op.counts is not None) == op.id.startswith("mlp.experts#")


def test_what_stays_as_it_is_says_why() -> None:
    declined = [str(d) for r in run_pipeline(traced(), parse_pipeline("autodiff,quantize-fp8")).records for d in r.declined]
    assert "@head_bwd head#2.1: its forward product stays as it is: the recipe keeps lm_head" in declined
    assert sum("mlp.gate#4." in line and "the recipe keeps mlp.gate." in line for line in declined) == 4
    assert any("post_attention_layernorm#2: its residual stays in bf16: matmul mlp.gate#4.4 reads it too" in line for line in declined)


def test_a_recipe_without_gradients_says_so(tmp_path: Any) -> None:
    file = tmp_path / "forward.toml"
    section = '\nformat = "f8e4m3"\ntile = [1, 128]\nrule = "deepseek-v3"\n'
    file.write_text(f'description = "Fprop alone"\n[activation]{section}[weight]{section.replace("[1, 128]", "[128, 128]")}')
    (_, record) = run_pipeline(dsc.parse(LINEAR), parse_pipeline(f'autodiff,quantize-fp8{{recipe="{file}"}}')).records
    assert [str(d) for d in record.declined] == [
        "@linear_bwd linear#2.1: recipe forward does not quantise gradients",
        "@linear_bwd linear#2.3: recipe forward does not quantise gradients",
    ]


def test_residuals_are_kept_in_the_formats_of_the_recipe() -> None:
    module = tiny()
    kept = module["training_moe_layer_fwd"].results[-1].owner
    assert kept is not None
    formats = {v.name: v.dtype for v in kept.operands if not isinstance(v.type, Bundle)}
    assert formats["attention_c"] is DType.e5m6
    assert formats["rows_q"] is DType.f8e4m3
    for name in ("input_layernorm_q", "q_a_layernorm_q", "kv_a_layernorm_q", "gate_proj_c", "up_proj_c"):
        assert formats[name] is DType.f8e4m3, name
    assert not any("swiglu" in name for name in formats)  # its inputs are there
    assert formats["post_attention_layernorm"] is DType.bf16
    assert formats["matmul"] is DType.f32  # the logits of the gate
    before = dsc.apply(traced(), "simplify,autodiff")
    assert kept.results[0].type.bytes < 0.8 * before["training_moe_layer_fwd"].results[-1].type.bytes  # type: ignore[union-attr]
    assert tiny("transformer-engine")["training_moe_layer_fwd"].results[-1].type == before["training_moe_layer_fwd"].results[-1].type
    decoded = [op for op in module["decoder_layer_bwd"].ops if isinstance(op, Dequantize)]
    assert len({op.codes for op in decoded}) == len(decoded), "a residual is decoded twice"


@pytest.mark.parametrize("recipe", [r for r in recipes() if r != "bf16"])
def test_split_phases_compute_the_same_bits(recipe: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 320, (1, 64))
    both = [tiny(recipe, split) for split in (False, True)]
    found = [by_name(m, backends.get("numpy").run(m, seeded, (tokens, tokens))) for m in both]
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        np.testing.assert_array_equal(gradient, found[1][name], err_msg=name)
        assert gradient.dtype == np.float32


def test_a_recipe_that_quantises_nothing_changes_nothing() -> None:
    before = dsc.apply(traced(), "autodiff")
    assert dsc.apply(traced(), "autodiff,quantize-fp8{recipe=bf16}").funcs == before.funcs
