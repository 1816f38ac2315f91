"""Modules of transformers with random weights: what the traced program gives, before and after raise-moe, is what they give.

In float32 the bound is 1e-5 of the largest logit. In BF16 it is what rounding explains: the program is run again several times with
every result that it rounds to BF16 moved at random by up to one unit in the last place, and by what transformers' kernels round besides
(`other_roundings`); transformers must not lie farther from the program, in relative L2, than the farthest of those runs. Every run takes
the experts that transformers chose: a token sent elsewhere differs by more than rounding.
"""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from dsc import backends
from dsc.backends import Site
from dsc.ir.core import Builder, Module, Op, Trait, Value
from dsc.ir.ops.attention import Attention
from dsc.ir.ops.elementwise import SwiGLU
from dsc.ir.ops.moe import Dispatch, Route
from dsc.ir.ops.norm import RmsNorm, Rope
from dsc.ir.ops.shape import Concat, Gather, Scatter, Take
from dsc.ir.parser import parse
from dsc.ir.types import DType
from dsc.ir.types import Tensor as TensorType
from dsc.ir.verify import verify
from dsc.models.config import load_config
from dsc.models.state_dict import to_numpy as array_of
from dsc.models.trace import trace
from dsc.passes.manager import apply
from dsc.passes.rewrite import rebuild

Arrays = tuple[Any, ...]
RELATIVE = 1e-5
RUNS = 6
TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))

DENSE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "use_cache": False,
}
LATENT = DENSE | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
V2 = LATENT | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("DeepseekV3", LATENT),
    "v3 without q_lora": ("DeepseekV3", LATENT | {"q_lora_rank": None}),
    "v3 without groups": ("DeepseekV3", LATENT | {"n_group": 1, "topk_group": 1}),
    "v3 with yarn": ("DeepseekV3", LATENT | {"rope_parameters": YARN}),
    "v3 without normalised weights": ("DeepseekV3", LATENT | {"norm_topk_prob": False}),
    "v3 with half-split rope": ("DeepseekV3", LATENT | {"rope_interleave": False}),
    "v2": ("DeepseekV2", V2),
    "v2 like lite": ("DeepseekV2", V2 | {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0}),
    "llama": ("Llama", DENSE),
    "mixtral": ("Mixtral", DENSE | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3 moe": ("Qwen3Moe", DENSE | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}),
}
WITH_EXPERTS = [name for name in MODELS if name != "llama"]


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights large enough for every part to matter."""
    generator = torch.Generator().manual_seed(0)
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if "norm" in name:
            value.uniform_(0.5, 1.5, generator=generator)
        elif "correction_bias" in name:
            value.normal_(0, 0.2, generator=generator)
        elif "inv_freq" not in name:
            value.normal_(0, 0.1, generator=generator)


def model_of(name: str, dtype: torch.dtype = torch.float32, experts: str = "grouped_mm") -> nn.Module:
    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    randomize(model)
    model.config._experts_implementation = experts
    return model.to(dtype)


@torch.no_grad()
def logits_of(model: nn.Module) -> np.ndarray:
    return array_of(model(TOKENS).logits)


def run(program: Module, weights: dict[str, np.ndarray], observe: Any = None) -> np.ndarray:
    (logits,) = backends.get("numpy").run(program, lambda name, _: weights[name], (TOKENS.numpy(),), observe)
    assert isinstance(logits, np.ndarray)
    return logits


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: array_of(value) for name, value in model.state_dict().items()}


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest magnitude."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return float(abs(found - expected).max() / abs(expected).max())


@pytest.mark.parametrize(
    ("name", "experts"), [*((name, "grouped_mm") for name in MODELS), *((name, "batched_mm") for name in ("v3", "v2", "mixtral"))]
)
def test_logits_in_float32(name: str, experts: str) -> None:
    model = model_of(name, experts=experts)
    program = trace(model, (TOKENS,))
    assert parse(str(verify(program))) == program
    weights, expected = weights_of(model), logits_of(model)
    assert difference(run(program, weights), expected) <= RELATIVE
    raised = apply(program, "raise-moe")
    assert parse(str(raised)) == raised
    names = {op.name for op in raised.main.ops}
    assert ("route" in names) == (name in WITH_EXPERTS)
    assert ("dispatch" in names) == (name in WITH_EXPERTS and experts == "grouped_mm")
    assert names.isdisjoint({"topk", "sort", "histogram"})
    assert np.array_equal(run(raised, weights), run(program, weights))  # bit for bit


def test_cache_objects_are_left_out() -> None:
    """As transformers' models are by default: they return a cache besides the logits."""
    model = model_of("llama")
    plain = trace(model, (TOKENS,))
    model.config.use_cache = True
    program = trace(model, (TOKENS,))
    assert [str(r.type) for r in program.main.results] == ["f32[2, 24, 96]"]
    assert "forward" not in vars(model)
    assert np.array_equal(run(program, weights_of(model)), run(plain, weights_of(model)))


def ulps(x: np.ndarray) -> np.ndarray:
    """One unit in the last place of BF16 numbers, as float64: 2^-7 of the power of two below."""
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(x.astype(np.float64)), 2.0**-126))) - 7)


MOVES_ONLY = (Concat, Gather, Scatter, Take, Dispatch)


def other_roundings(op: Op, operands: Arrays, results: Arrays) -> np.ndarray | float:
    """What transformers' way of computing the op may be off besides the rounding of its result, as a bound per element.

    u = 2^-8 is the largest relative error of one rounding to BF16, that of a number just above a power of two.
    """
    u = 2.0**-8
    if isinstance(op, Attention):  # probabilities are rounded to BF16 before they multiply the values: u sum_j p_j |v_j|
        q, k, v, *mask = operands
        (size,) = backends.get("numpy").evaluate(op, (q, k, np.abs(v), *mask))
        return u * np.asarray(size, np.float64)
    if isinstance(op, SwiGLU | RmsNorm):  # silu, or the normalised row, is rounded before it is multiplied
        return u * np.abs(results[0].astype(np.float64))
    if isinstance(op, Rope):  # cos and sin are rounded, and so are both products: each of a cos, b sin is off by 2u of itself
        x = np.abs(operands[0].astype(np.float64))
        pairs = x.reshape(*x.shape[:-1], -1, 2).sum(-1) if op.interleaved else x.reshape(*x.shape[:-1], 2, -1).sum(-2)
        both = np.repeat(pairs, 2, axis=-1) if op.interleaved else np.concatenate([pairs, pairs], axis=-1)
        return 2 * u * both
    return 0.0


def routed_logits_of(model: nn.Module) -> tuple[np.ndarray, dict[str, Arrays]]:
    """The module's logits, and the expert ids and weights that each of its routers, by name, gave."""
    routing: dict[str, Arrays] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
            _, weights, ids = outputs
            routing[name] = ids.int().numpy(), weights.float().numpy()

        return hook

    routers = [(name, module) for name, module in model.named_modules() if "router" in type(module).__name__.lower()]
    hooks = [module.register_forward_hook(keep(name)) for name, module in routers]
    logits = logits_of(model)
    for hook in hooks:
        hook.remove()
    return logits, routing


def farthest(program: Module, weights: dict[str, np.ndarray], routing: dict[str, Arrays]) -> tuple[np.ndarray, float]:
    """The program's logits, and the largest relative L2 distance to them among runs with moved roundings."""

    def routed(site: Site, op: Op) -> Arrays:
        return routing[f"{site.weights}.{op.id.rpartition('#')[0]}".strip(".")]

    plain = run(program, weights, lambda site, op, operands, results: routed(site, op) if isinstance(op, Route) else None)
    distances = []
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)

        def move(site: Site, op: Op, operands: Arrays, results: Arrays, rng: np.random.Generator = rng) -> Arrays | None:
            if isinstance(op, Route):
                return routed(site, op)
            kept = op.traits & {Trait.VIEW, Trait.SOURCE} or isinstance(op, MOVES_ONLY)
            if kept or not (isinstance(op.results[0].type, TensorType) and op.results[0].dtype is DType.bf16):
                return None
            bound = ulps(results[0]) + other_roundings(op, operands, results)
            moved = results[0].astype(np.float64) + bound * rng.uniform(-1, 1, results[0].shape)
            return (moved.astype(ml_dtypes.bfloat16), *results[1:])

        distances.append(relative(run(program, weights, move), plain))
    return plain, max(distances)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 distance."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", ["v3", "v3 with yarn", "v2", "llama", "mixtral", "qwen3 moe"])
def test_logits_in_bfloat16(name: str) -> None:
    model = model_of(name, torch.bfloat16)
    program = trace(model, (TOKENS,))
    assert parse(str(program)) == program
    weights = weights_of(model)
    raised = apply(program, "raise-moe")
    assert np.array_equal(run(raised, weights), run(program, weights))
    expected, routing = routed_logits_of(model)
    plain, bound = farthest(raised, weights, routing)
    assert relative(expected, plain) <= bound
    # The bound is tight enough to tell: attention scores 10 % too large are farther than any rounding.
    assert relative(farthest(rescaled(raised), weights, routing)[0], expected) > bound


def rescaled(program: Module) -> Module:
    """The program with every attention scale 10 % larger."""

    def rule(op: Op, b: Builder) -> tuple[Value, ...] | None:
        return (b.emit(op.copy(scale=op.scale * 1.1)).result,) if isinstance(op, Attention) else None

    return program.map(lambda func: rebuild(func, rule))


def tiny_pair(dtype: str) -> tuple[Module, nn.Module, dict[str, np.ndarray]]:
    """The shipped deepseek-v3-tiny as dsc traces it, as transformers builds it, and weights under dsc's names."""
    overrides = [f"dtype={dtype}", "vocab_size=96", "num_nextn_predict_layers=0"]
    program = trace("deepseek-v3-tiny", batch=2, seq=24, overrides=overrides)
    fields = load_config("deepseek-v3-tiny", overrides).to_dict()
    config = transformers.DeepseekV3Config(**{k: v for k, v in fields.items() if k not in ("model_type", "head_dim", "dtype")})
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    randomize(model)
    for module in model.modules():
        if not any("correction_bias" in name for name, _ in module.named_buffers(recurse=False)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(getattr(torch, dtype))
    for layer in model.model.layers[1:]:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.to(getattr(torch, dtype))
    weights = {}
    for name, value in weights_of(model).items():
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), np.split(value, 2, axis=1), strict=True):
                weights[name.replace("gate_up_proj", part)] = half
        else:
            weights[name] = value
    return program, model, weights


def test_shipped_tiny_model_in_float32() -> None:
    program, model, weights = tiny_pair("float32")
    assert difference(run(program, weights), logits_of(model)) <= RELATIVE


def test_shipped_tiny_model_in_bfloat16() -> None:
    program, model, weights = tiny_pair("bfloat16")
    expected, routing = routed_logits_of(model)
    plain, bound = farthest(program, weights, routing)
    assert len(routing) == 2
    assert relative(expected, plain) <= bound
