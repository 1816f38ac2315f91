"""Dense Llama-like models: grouped-query attention and a SwiGLU feed-forward network, and the parts every model here shares.

The stack-level `forward` of a model calls blocks (classes with `is_block = True`), unpacks and packs tuples, and does nothing
else, so that torch.fx can trace it with blocks as leaves; equal layers differ in their weights only. Parameters bear the names
of the Hugging Face checkpoint. Shapes: B sequences, S positions, H hidden width, D head dimension, V vocabulary, N cache length.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .config import ModelConfig
from .rotary import PositionRotary, Rotary, softmax_scale


def linear(inputs: int, outputs: int, config: ModelConfig) -> nn.Linear:
    """A bias-free projection in the model's type."""
    return nn.Linear(inputs, outputs, bias=False, dtype=getattr(torch, config.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=getattr(torch, config.dtype)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245); with as many key heads as query heads it is multi-head attention."""

    caches = ("key", "value")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = softmax_scale(config, self.head_dim)
        self.interleaved = config.rope_interleave
        self.q_proj = linear(config.hidden_size, config.num_attention_heads * self.head_dim, config)
        self.k_proj = linear(config.hidden_size, config.num_key_value_heads * self.head_dim, config)
        self.v_proj = linear(config.hidden_size, config.num_key_value_heads * self.head_dim, config)
        self.o_proj = linear(config.num_attention_heads * self.head_dim, config.hidden_size, config)

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (..., H) -> rotated queries (..., heads, D), rotated keys and plain values (..., kv heads, D)."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return ops.rope(query, cos, sin, self.interleaved), ops.rope(key, cos, sin, self.interleaved), value

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.prefill(hidden, cos, sin)[0]

    def prefill(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, S, H) -> (B, S, H), and what decoding caches: keys and values (B, S, kv heads, D)."""
        query, key, value = self.project(hidden, cos, sin)
        shared = query.shape[2] != key.shape[2]
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))  # (B, heads, S, D)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=shared)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), key, value

    def decode(self, hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """hidden (B, H), caches (B, N, kv heads, D) -> (B, H) and the caches with this token's key and value in place."""
        query, key, value = self.project(hidden, cos, sin)
        keys, values = ops.cache_append(keys, key, positions), ops.cache_append(values, value, positions)
        mixed = ops.attention_decode(query, keys, values, positions, self.scale)  # (B, heads, D)
        return self.o_proj(mixed.flatten(1)), keys, values

    @staticmethod
    def cache_shapes(config: ModelConfig, batch: int, context: int) -> tuple[tuple[int, ...], ...]:
        return ((batch, context, config.num_key_value_heads, config.head_dim),) * 2


class MLP(nn.Module):
    """down(silu(gate x) * up x), the SwiGLU feed-forward network (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = linear(config.hidden_size, width, config)
        self.up_proj = linear(config.hidden_size, width, config)
        self.down_proj = linear(width, config.hidden_size, config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(hidden), self.up_proj(hidden)))


class DecoderLayer(nn.Module):
    """hidden + attention(norm(hidden)), then + feed-forward(norm(.))."""

    is_block = True

    def __init__(self, config: ModelConfig, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.self_attn: Any = attention  # Attention or LatentAttention, which differ in what they cache
        self.mlp: Any = feed_forward  # MLP or MoE
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config)

    def attend(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = self.attend(hidden, cos, sin)  # (B, S, H)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DecodingLayer(DecoderLayer):
    """The same layer for one token of each sequence, which reads and extends the layer's caches."""

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        attended, *extended = self.self_attn.decode(self.input_layernorm(hidden), cos, sin, positions, *caches)
        hidden = hidden + attended  # (B, H)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), *extended


class PrefillLayer(DecoderLayer):
    """The same layer for whole prompts, which also returns what its caches begin with."""

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        attended, *caches = self.self_attn.prefill(self.input_layernorm(hidden), cos, sin)
        hidden = hidden + attended  # (B, S, H)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), *caches


class LastToken(nn.Module):
    """hidden (B, S, H), positions (B,) -> that of position positions[b] of each sequence (B, H): all that the head needs."""

    is_block = True

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return hidden.gather(1, positions.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)


class Embedding(nn.Module):
    """Token ids (...) -> rows of the embedding table (..., H)."""

    is_block = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=getattr(torch, config.dtype)))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class FinalNorm(RMSNorm):
    """The RMSNorm after the last layer; its output feeds the head and, in training, the multi-token prediction modules."""

    is_block = True


class Head(nn.Module):
    """(..., H) -> logits (..., V) in the model's type."""

    is_block = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=getattr(torch, config.dtype)))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class TokenLoss(nn.Module):
    """Mean cross entropy in float32 over the positions whose label is not -100."""

    is_block = True

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, S, V), labels int64 (B, S), the token that each position predicts -> float32 scalar."""
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


class Stack(nn.Module):
    """What a checkpoint keeps under `model.`; the models below call its blocks one by one."""

    def __init__(self, config: ModelConfig, rotary: nn.Module, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config)
        self.rotary_emb = rotary
        self.layers = nn.ModuleList(layers)
        self.norm = FinalNorm(config.hidden_size, config.rms_norm_eps, config)


class CausalLM(nn.Module):
    """tokens int64 (B, S) -> logits (B, S, V)."""

    rotary_class: type[Rotary] = Rotary
    layer_class: type[DecoderLayer] = DecoderLayer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers = [self.make_layer(config, index) for index in range(config.num_hidden_layers)]
        self.model = Stack(config, self.rotary_class(config), layers)
        self.lm_head = Head(config)

    def make_layer(self, config: ModelConfig, index: int) -> nn.Module:
        return self.layer_class(config, Attention(config), MLP(config, config.intermediate_size))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.embed_tokens(tokens)  # (B, S, H)
        cos, sin = self.model.rotary_emb(tokens)
        for layer in self.model.layers:
            hidden = layer(hidden, cos, sin)
        return self.lm_head(self.model.norm(hidden))


class TrainingLM(CausalLM):
    """tokens, labels int64 (B, S) -> mean cross entropy, float32 scalar. labels[b, i] is the token after tokens[b, i], or -100."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_loss = TokenLoss()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return self.token_loss(super().forward(tokens), labels)


class PrefillLM(CausalLM):
    """Whole prompts: tokens int64 (B, S), positions int64 (B,) -> logits (B, V), then layer by layer what the caches begin with.

    positions[b] is the index of the last token of prompt b, whose logits alone are computed; what follows is padding, which no token before
    it sees, in the caches too.
    """

    layer_class = PrefillLayer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.last = LastToken()

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        hidden = self.model.embed_tokens(tokens)  # (B, S, H)
        cos, sin = self.model.rotary_emb(tokens)
        caches: list[Tensor] = []
        for layer in cast("Iterable[PrefillLayer]", self.model.layers):
            result = layer(hidden, cos, sin)
            hidden = result[0]
            caches += [result[1 + kept] for kept in range(len(layer.self_attn.caches))]
        return self.lm_head(self.model.norm(self.last(hidden, positions))), *caches


class DecodingLM(CausalLM):
    """One token of each sequence: tokens, positions int64 (B,), caches -> logits (B, V), then the extended caches.

    positions[b] is the index of the token in its sequence and in the caches, which come layer by layer.
    """

    rotary_class = PositionRotary
    layer_class = DecodingLayer

    def forward(self, tokens: Tensor, positions: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        hidden = self.model.embed_tokens(tokens)  # (B, H)
        cos, sin = self.model.rotary_emb(positions)
        extended: list[Tensor] = []
        for layer in cast("Iterable[DecodingLayer]", self.model.layers):
            kept = range(len(layer.self_attn.caches))
            result = layer(hidden, cos, sin, positions, *(caches[len(extended) + offset] for offset in kept))
            hidden = result[0]
            extended += [result[1 + offset] for offset in kept]
        return self.lm_head(self.model.norm(hidden)), *extended
