"""From a configuration to a torch module and example inputs, one family and one mode at a time."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..ir.errors import require
from . import deepseek, dense
from .config import ModelConfig

Mode = Literal["forward", "train", "prefill", "decode"]


def build(config: ModelConfig, mode: Mode = "forward", device: str | torch.device = "meta") -> nn.Module:
    """The model for `mode`: "forward" (logits), "train" (losses), "prefill" (prompts: logits of their last tokens, and
    caches) or "decode" (one token per sequence, with caches).

    On the meta device, the default, parameters have shapes and no storage. Elsewhere matrices are normal with
    `initializer_range` as standard deviation, norms 1 and the gate's correction bias 0, from torch's global generator.
    """
    family = deepseek if config.mixture_of_experts else dense
    classes: dict[str, type[nn.Module]] = {
        "forward": family.CausalLM,
        "train": family.TrainingLM,
        "prefill": family.PrefillLM,
        "decode": family.DecodingLM,
    }
    require(mode in classes, f'mode "{mode}" is unknown, expected one of {", ".join(get_args(Mode))}')
    with torch.device("meta"):
        model = classes[mode](config)
    if torch.device(device).type != "meta":
        _materialize(model, torch.device(device), config.initializer_range)
    return model


@torch.no_grad()
def _materialize(model: nn.Module, device: torch.device, std: float) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            storage = torch.zeros_like(parameter, device=device)
            if parameter.dim() > 1:
                storage.normal_(0.0, std)
            elif name == "weight":
                storage.fill_(1.0)
            setattr(module, name, nn.Parameter(storage, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def example_inputs(config: ModelConfig, mode: Mode, batch: int, seq: int, context: int) -> dict[str, Tensor]:
    """Inputs of `build(config, mode)` by name, in order, on the meta device.

    forward: tokens int64 (batch, seq). train: also labels. prefill: also positions int64 (batch,). decode: tokens and positions int64
    (batch,), then the caches of each layer for `context` positions, `latent_0` (batch, context, kv_lora_rank + qk_rope_head_dim) or
    `key_0` and `value_0` (batch, context, kv heads, head_dim), in the model's type.
    """
    with torch.device("meta"):
        if mode != "decode":
            names = ("tokens", "labels") if mode == "train" else ("tokens",)
            given = {name: torch.empty(batch, seq, dtype=torch.int64) for name in names}
            return given | ({"positions": torch.empty(batch, dtype=torch.int64)} if mode == "prefill" else {})
        attention = deepseek.LatentAttention if config.latent_attention else dense.Attention
        shapes = attention.cache_shapes(config, batch, context)
        inputs = {name: torch.empty(batch, dtype=torch.int64) for name in ("tokens", "positions")}
        for layer in range(config.num_hidden_layers):
            for name, shape in zip(attention.caches, shapes, strict=True):
                inputs[f"{name}_{layer}"] = torch.empty(shape, dtype=getattr(torch, config.dtype))
        return inputs


def output_names(config: ModelConfig, mode: Mode) -> tuple[str, ...]:
    """The names of the outputs of `build(config, mode)`, in order."""
    if mode == "forward":
        return ("logits",)
    if mode in ("prefill", "decode"):
        return ("logits", *(name for name in example_inputs(config, "decode", 1, 1, 1) if name not in ("tokens", "positions")))
    if not (config.num_nextn_predict_layers or any(map(config.is_moe_layer, range(config.num_hidden_layers)))):
        return ("loss",)
    return ("loss", "lm_loss", *(("mtp_loss",) if config.num_nextn_predict_layers else ()), "balance_loss", "counts")
