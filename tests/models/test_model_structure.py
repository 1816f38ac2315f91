"""What the tracer relies on: exact parameter counts, checkpoint names, and stacks that are nothing but calls of blocks."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from dsc.ir.errors import DscError
from dsc.models.build import build, example_inputs, output_names
from dsc.models.config import load_config, shipped

# Recomputed from the published shapes, gate bias included; the models are published as 671B, 236B, 15.7B, 16.4B, 67B, 16B and 1T.
PARAMETERS = {
    "deepseek-v3": 671_026_419_200,
    "deepseek-v2": 235_741_434_880,
    "deepseek-coder-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-coder-v2-lite": 15_706_484_224,
    "deepseek-moe-16b": 16_375_728_128,
    "deepseek-llm-67b": 67_425_001_472,
    "moonlight-16b-a3b": 15_960_110_208,
    "kimi-k2": 1_026_408_232_448,
}
MODES: tuple[Any, ...] = ("forward", "train", "prefill", "decode")


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    model = build(load_config(name))
    assert count(model) == PARAMETERS[name]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_parameters_of_the_prediction_module() -> None:
    """11.610 B: one V3 layer with experts, the 2H x H projection and three norms; embedding and head are the main model's."""
    config = load_config("deepseek-v3")
    hidden, width, experts = 7168, 2048, 256
    attention = hidden * 1536 + 1536 * 128 * 192 + hidden * 576 + 512 * 128 * 256 + 128 * 128 * hidden + 1536 + 512
    layer = attention + (experts + 1) * 3 * hidden * width + experts * hidden + experts + 2 * hidden
    assert count(build(config, "train")) - count(build(config)) == layer + 2 * hidden * hidden + 3 * hidden == 11_610_068_224


def test_the_tiny_model_has_every_mechanism_and_few_parameters() -> None:
    config = load_config("deepseek-v3-tiny")
    assert count(build(config, "train")) <= 2_000_000
    assert config.q_lora_rank
    assert config.rope_scaling
    assert config.num_nextn_predict_layers == 1
    assert 1 < config.topk_group < config.n_group
    assert config.n_shared_experts
    kinds = [config.is_moe_layer(index) for index in range(config.num_hidden_layers)]
    assert kinds.count(True) >= 2
    assert kinds.count(False) >= 1
    assert config.hidden_size % 128
    assert config.moe_intermediate_size % 128


def test_parameter_names_and_types_are_those_of_the_checkpoint() -> None:
    config = load_config("deepseek-v3")
    parameters = dict(build(config, "train").named_parameters())
    expected = {
        "model.embed_tokens.weight": (129280, 7168),
        "model.layers.0.mlp.gate_proj.weight": (18432, 7168),
        "model.layers.3.self_attn.q_a_proj.weight": (1536, 7168),
        "model.layers.3.self_attn.q_a_layernorm.weight": (1536,),
        "model.layers.3.self_attn.q_b_proj.weight": (24576, 1536),
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "model.layers.3.self_attn.kv_a_layernorm.weight": (512,),
        "model.layers.3.self_attn.kv_b_proj.weight": (32768, 512),
        "model.layers.3.self_attn.o_proj.weight": (7168, 16384),
        "model.layers.3.input_layernorm.weight": (7168,),
        "model.layers.3.post_attention_layernorm.weight": (7168,),
        "model.layers.3.mlp.gate.weight": (256, 7168),
        "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
        "model.layers.3.mlp.experts.gate_proj": (256, 2048, 7168),
        "model.layers.3.mlp.experts.up_proj": (256, 2048, 7168),
        "model.layers.3.mlp.experts.down_proj": (256, 7168, 2048),
        "model.layers.3.mlp.shared_experts.gate_proj.weight": (2048, 7168),
        "model.layers.61.enorm.weight": (7168,),
        "model.layers.61.hnorm.weight": (7168,),
        "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.shared_head.norm.weight": (7168,),
        "model.layers.61.mlp.experts.down_proj": (256, 7168, 2048),
        "model.norm.weight": (7168,),
        "lm_head.weight": (129280, 7168),
    }
    assert {name: tuple(parameters[name].shape) for name in expected} == expected
    types = {name: parameter.dtype for name, parameter in parameters.items()}
    assert {name for name, dtype in types.items() if dtype != torch.bfloat16} == {name for name in types if "correction_bias" in name}
    assert types["model.layers.3.mlp.gate.e_score_correction_bias"] == torch.float32


def test_modes_share_their_names() -> None:
    for name in ("deepseek-v3-tiny", "deepseek-llm-67b", "deepseek-moe-16b"):
        config = load_config(name)
        forward, train, prefill, decode = (build(config, mode).state_dict().keys() for mode in MODES)
        assert forward == prefill == decode
        prediction = f"model.layers.{config.num_hidden_layers}."
        assert forward == {key for key in train if not key.startswith(prediction)}


class BlockTracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return getattr(m, "is_block", False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", shipped())
def test_a_stack_is_calls_of_blocks_and_tuples(name: str, mode: Any) -> None:
    config = load_config(name, ["num_hidden_layers=4"])
    model = build(config, mode)
    graph = BlockTracer().trace(model)
    for node in graph.nodes:
        assert node.op in ("placeholder", "call_module", "output") or (node.op, node.target) == ("call_function", operator.getitem), node
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    with_weights = {name.rsplit(".", 1)[0] for name, _ in model.named_parameters()}
    assert all(any(weight == block or weight.startswith(f"{block}.") for block in called) for weight in with_weights)

    inputs = example_inputs(config, mode, batch=2, seq=16, context=8)
    direct, replayed = model(*inputs.values()), torch.fx.GraphModule(model, graph)(*inputs.values())
    flat = pytree.tree_leaves(direct)
    assert [(value.shape, value.dtype) for value in flat] == [(value.shape, value.dtype) for value in pytree.tree_leaves(replayed)]
    assert len(flat) == len(output_names(config, mode))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_equal_layers_export_to_equal_graphs(mode: Any) -> None:
    """torch.export keeps the dsc ops whole and sees nothing that tells layer 1 from layer 2."""
    config = load_config("deepseek-v3-tiny")
    model = build(config, mode)
    calls: dict[str, tuple[Any, ...]] = {}
    layers = {index: model.get_submodule(f"model.layers.{index}") for index in (1, 2)}
    for index, layer in layers.items():
        layer.register_forward_pre_hook(lambda _module, inputs, index=index: calls.update({index: inputs}))
    model(*example_inputs(config, mode, batch=2, seq=16, context=8).values())
    first, second = (torch.export.export(layers[index], calls[index]).graph for index in (1, 2))
    assert str(first) == str(second)
    ops = {str(node.target) for node in first.nodes if "dsc" in str(node.target)}
    common = {"dsc.rope", "dsc.route", "dsc.dispatch", "dsc.combine", "dsc.grouped_matmul", "dsc.swiglu"}
    own = {"forward": set(), "prefill": set(), "train": {"dsc.balance_loss"}, "decode": {"dsc.cache_append", "dsc.attention_decode"}}[mode]
    assert ops == {f"{op}.default" for op in common | own}


def test_example_inputs_and_output_names() -> None:
    config = load_config("deepseek-v3", ["num_hidden_layers=4"])
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in example_inputs(config, "decode", 3, 16, 100).items()}
    assert shapes["tokens"] == shapes["positions"] == ((3,), torch.int64)
    assert shapes["latent_3"] == ((3, 100, 576), torch.bfloat16)
    assert output_names(config, "decode") == ("logits", "latent_0", "latent_1", "latent_2", "latent_3")
    assert output_names(config, "train") == ("loss", "lm_loss", "mtp_loss", "balance_loss", "counts")
    dense = load_config("deepseek-llm-67b", ["num_hidden_layers=1"])
    assert tuple(example_inputs(dense, "decode", 3, 16, 100)["value_0"].shape) == (3, 100, 8, 128)
    assert output_names(dense, "train") == ("loss",)


def test_weights_drawn_on_a_real_device() -> None:
    config = load_config("deepseek-v3-tiny")
    torch.manual_seed(0)
    model = build(config, "train", device="cpu")
    parameters = dict(model.named_parameters())
    assert all((value == 1).all() for name, value in parameters.items() if "norm" in name)
    assert not any(value.any() for name, value in parameters.items() if "correction_bias" in name)
    experts = parameters["model.layers.1.mlp.experts.up_proj"].float()
    standard_error = config.initializer_range / (2 * experts.numel()) ** 0.5
    assert abs(experts.std().item() - config.initializer_range) <= 5 * standard_error
    tokens = torch.randint(0, config.vocab_size, (2, 16))
    assert all(value.isfinite().all() for value in model(tokens, tokens))


def test_an_unknown_mode_is_an_error() -> None:
    mode: Any = "serve"
    with pytest.raises(DscError, match='mode "serve" is unknown, expected one of forward, train, prefill, decode'):
        build(load_config("deepseek-v3-tiny"), mode)
