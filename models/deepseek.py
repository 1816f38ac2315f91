"""The DeepSeek family: multi-head latent attention (MLA), mixture of experts (DeepSeekMoE), multi-token prediction (MTP).

One set of classes covers DeepSeek-V3 and Kimi-K2, DeepSeek-V2 and its Lite and Coder relatives, Moonlight, and DeepSeekMoE-16B
(which has the experts but ordinary attention). Equations are those of the DeepSeek-V3 technical report. Shapes: B sequences,
S positions, T = B*S tokens, H hidden width, E routed experts, I expert width, k experts per token, N cache length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dense, ops
from .config import ModelConfig
from .dense import MLP, RMSNorm, TokenLoss, linear
from .rotary import softmax_scale

# The two norms inside MLA use the RMSNorm default of the released code, whatever rms_norm_eps says (Moonlight: 1e-5).
_LATENT_EPS = 1e-6


class LatentAttention(nn.Module):
    """MLA (eq. 1-11): keys and values of all heads are projections of one narrow latent vector, the only thing cached."""

    caches = ("latent",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        self.scale = softmax_scale(config, self.nope + self.rope)
        self.interleaved = config.rope_interleave
        if config.q_lora_rank is None:
            self.q_proj = linear(hidden, heads * (self.nope + self.rope), config)
        else:
            self.q_a_proj = linear(hidden, config.q_lora_rank, config)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_EPS, config)
            self.q_b_proj = linear(config.q_lora_rank, heads * (self.nope + self.rope), config)
        self.compressed_query = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = linear(hidden, self.latent + self.rope, config)
        self.kv_a_layernorm = RMSNorm(self.latent, _LATENT_EPS, config)
        self.kv_b_proj = linear(self.latent, heads * (self.nope + self.value), config)
        self.o_proj = linear(heads * self.value, hidden, config)

    def queries(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (..., H) -> q_C (..., heads, nope) and rotated q_R (..., heads, rope)."""
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden))) if self.compressed_query else self.q_proj(hidden)
        plain, rotated = query.unflatten(-1, (-1, self.nope + self.rope)).split([self.nope, self.rope], dim=-1)
        return plain, ops.rope(rotated, cos, sin, self.interleaved)

    def latents(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (..., H) -> normalised c_KV (..., latent) and rotated k_R (..., 1, rope), one vector for all heads."""
        latent, rotated = self.kv_a_proj_with_mqa(hidden).split([self.latent, self.rope], dim=-1)
        return self.kv_a_layernorm(latent), ops.rope(rotated.unsqueeze(-2), cos, sin, self.interleaved)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.prefill(hidden, cos, sin)[0]

    def prefill(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, S, H) -> (B, S, H), and what decoding caches: latents and rotated keys (B, S, latent + rope)."""
        plain_query, rotated_query = self.queries(hidden, cos, sin)
        latent, rotated_key = self.latents(hidden, cos, sin)
        expanded = self.kv_b_proj(latent).unflatten(-1, (-1, self.nope + self.value))
        plain_key, value = expanded.split([self.nope, self.value], dim=-1)  # (B, S, heads, nope), (B, S, heads, value)
        query = torch.cat([plain_query, rotated_query], dim=-1)  # (B, S, heads, nope + rope)
        key = torch.cat([plain_key, rotated_key.expand(-1, -1, plain_key.shape[2], -1)], dim=-1)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, scale=self.scale
        )  # (B, heads, S, value)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), torch.cat([latent, rotated_key.squeeze(-2)], dim=-1)

    def decode(self, hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, H), cache (B, N, latent + rope) -> (B, H), cache. The absorbed form (DeepSeek-V2 report, section 2.1.2):

        W_UK is folded into the query and W_UV into the output, so that all heads attend to the cached latents themselves.
        """
        plain_query, rotated_query = self.queries(hidden, cos, sin)
        latent, rotated_key = self.latents(hidden, cos, sin)
        cache = ops.cache_append(cache, torch.cat([latent, rotated_key.squeeze(-2)], dim=-1), positions)
        expand = self.kv_b_proj.weight.unflatten(0, (-1, self.nope + self.value))  # (heads, nope + value, latent)
        expand_key, expand_value = expand.split([self.nope, self.value], dim=1)
        latent_query = torch.matmul(plain_query.transpose(0, 1), expand_key).transpose(0, 1)  # (B, heads, latent)
        query = torch.cat([latent_query, rotated_query], dim=-1)  # (B, heads, latent + rope)
        keys = cache.unsqueeze(2)  # (B, N, 1, latent + rope)
        mixed = ops.attention_decode(query, keys, keys[..., : self.latent], positions, self.scale)  # (B, heads, latent)
        output = torch.matmul(mixed.transpose(0, 1), expand_value.transpose(1, 2)).transpose(0, 1)  # (B, heads, value)
        return self.o_proj(output.flatten(1)), cache

    @staticmethod
    def cache_shapes(config: ModelConfig, batch: int, context: int) -> tuple[tuple[int, ...], ...]:
        return ((batch, context, config.kv_lora_rank + config.qk_rope_head_dim),)


class Gate(nn.Module):
    """Expert scores and the choice of experts (eq. 12-16). The logits are float32, whatever the type of the model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=getattr(torch, config.dtype)))
        self.e_score_correction_bias: nn.Parameter | None = None
        if config.topk_method == "noaux_tc":  # moved by the balancing rule of section 2.1.2, never by a gradient
            bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        self.top_k, self.score = config.num_experts_per_tok, config.scoring_func
        limited = config.topk_method != "greedy"
        self.groups, self.top_groups = (config.n_group, config.topk_group) if limited else (1, 1)
        self.group_score = "top2" if config.topk_method == "noaux_tc" else "max"
        self.normalize, self.scale = config.norm_topk_prob, config.routed_scaling_factor

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (T, H) -> logits float32 (T, E), expert ids int32 (T, k), their weights float32 (T, k)."""
        logits = F.linear(tokens.float(), self.weight.float())
        ids, weights = ops.route(
            logits,
            self.e_score_correction_bias,
            self.top_k,
            self.score,
            self.groups,
            self.top_groups,
            self.group_score,
            self.normalize,
            self.scale,
        )
        return logits, ids, weights

    def balance_loss(self, logits: Tensor, ids: Tensor, sequences: int) -> Tensor:
        """Eq. 17-20, which count the experts that the scores alone would choose: without bias and without groups."""
        if self.e_score_correction_bias is not None:
            ids, _ = ops.route(logits, None, self.top_k, self.score, 1, 1, self.group_score, self.normalize, self.scale)
        return ops.balance_loss(logits, ids, sequences, self.score)


class Experts(nn.Module):
    """The routed feed-forward networks of a layer, stacked per projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden, dtype=getattr(torch, config.dtype)))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden, dtype=getattr(torch, config.dtype)))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width, dtype=getattr(torch, config.dtype)))

    def forward(self, tokens: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (T, H), ids and weights (T, k) -> (T, H), and how many rows each expert got, int32 (E,)."""
        rows, counts, order = ops.dispatch(tokens, ids, self.gate_proj.shape[0])  # rows (T*k, H)
        gate = ops.grouped_matmul(rows, self.gate_proj, counts)  # (T*k, I)
        up = ops.grouped_matmul(rows, self.up_proj, counts)
        down = ops.grouped_matmul(ops.swiglu(gate, up), self.down_proj, counts)  # (T*k, H)
        return ops.combine(down, order, weights), counts


class MoE(nn.Module):
    """Shared experts, which see every token, plus the chosen routed ones (eq. 12)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config, config.n_shared_experts * config.moe_intermediate_size) if config.n_shared_experts else None

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mix(hidden)[0]

    def mix(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden (..., H) -> output (..., H), logits (T, E), ids (T, k), counts (E,)."""
        tokens = hidden.flatten(0, -2)  # (T, H)
        logits, ids, weights = self.gate(tokens)
        mixed, counts = self.experts(tokens, ids, weights)
        mixed = mixed.view(hidden.shape)
        if self.shared_experts is not None:
            mixed = mixed + self.shared_experts(hidden)
        return mixed, logits, ids, counts


class TrainingMoELayer(dense.DecoderLayer):
    """A decoder layer with experts that also returns its balance loss (float32 scalar) and counts int32 (E,)."""

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        hidden = self.attend(hidden, cos, sin)  # (B, S, H)
        mixed, logits, ids, counts = self.mlp.mix(self.post_attention_layernorm(hidden))
        return hidden + mixed, self.mlp.gate.balance_loss(logits, ids, hidden.shape[0]), counts


class MTPModule(TrainingMoELayer):
    """One depth of multi-token prediction (eq. 21-23): a projection of two normed inputs, a decoder layer, a norm before the shared head.

    The order of the two is that of the released eh_proj, [embedding; hidden], not that printed in eq. 21. As in code that runs the
    released weights, `hidden` is what the head reads: after model.norm at depth 1, after the previous shared_head.norm beyond.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, make_attention(config), MoE(config))
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config)
        self.eh_proj = linear(2 * config.hidden_size, config.hidden_size, config)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps, config)})

    def forward(self, embedding: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """embedding of token i + depth, hidden of position i (B, S, H) -> hidden for the head, balance loss, counts."""
        joined = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1))
        hidden, balance, counts = super().forward(joined, cos, sin)
        return self.shared_head["norm"](hidden), balance, counts


class Shift(nn.Module):
    """Tokens and labels (B, S) of the next depth: one place to the left.

    Nothing follows the last position: its label becomes -100, and its token, which then cannot reach any loss, the first one.
    """

    is_block = True

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        ignored = torch.full_like(labels[:, :1], -100)
        return torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1), torch.cat([labels[:, 1:], ignored], dim=1)


class TotalLoss(nn.Module):
    """lm + lambda / D * (sum of the D depths' losses) + alpha * (sum of the layers' balance losses) (eq. 17, 25)."""

    is_block = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.depths, self.mtp_weight, self.alpha = config.num_nextn_predict_layers, config.mtp_loss_weight, config.aux_loss_alpha

    def forward(self, lm_loss: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """parts: D losses, then the balance losses of M layers, then their counts (E,) -> loss, [mean of the D], balance, counts (M, E)."""
        layers = (len(parts) - self.depths) // 2
        mtp, balances, counts = parts[: self.depths], parts[self.depths : self.depths + layers], parts[self.depths + layers :]
        balance = torch.stack(balances).sum()
        loss = lm_loss + self.alpha * balance
        if not mtp:
            return loss, balance, torch.stack(counts)
        mtp_loss = torch.stack(mtp).mean()
        return loss + self.mtp_weight * mtp_loss, mtp_loss, balance, torch.stack(counts)


def make_attention(config: ModelConfig) -> nn.Module:
    return LatentAttention(config) if config.latent_attention else dense.Attention(config)


class CausalLM(dense.CausalLM):
    """tokens int64 (B, S) -> logits (B, S, V)."""

    def make_layer(self, config: ModelConfig, index: int) -> nn.Module:
        feed_forward = MoE(config) if config.is_moe_layer(index) else MLP(config, config.intermediate_size)
        return self.layer_class(config, make_attention(config), feed_forward)


class PrefillLM(dense.PrefillLM, CausalLM):
    """Whole prompts, with what the caches of latents (B, S, latent + rope) begin with; see dense.PrefillLM."""


class DecodingLM(dense.DecodingLM, CausalLM):
    """One token of each sequence, with one cache of latents (B, N, latent + rope) per layer; see dense.DecodingLM."""


class TrainingLM(CausalLM):
    """tokens, labels int64 (B, S) -> loss, lm_loss, [mtp_loss,] balance_loss (float32 scalars), counts int32 (M, E).

    labels[b, i] is the token after tokens[b, i], or -100 for none. Every loss is a mean over the positions that have a label.
    mtp_loss, the mean over depths, is there if the model has MTP modules. balance_loss is the sum over the M layers with experts,
    MTP modules last, before alpha; counts has how many tokens each of their experts got. Without any such layer: lm_loss alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.model.layers.extend(MTPModule(config) for _ in range(config.num_nextn_predict_layers))
        self.token_loss = TokenLoss()
        self.shift = Shift()
        self.total_loss = TotalLoss(config)

    def make_layer(self, config: ModelConfig, index: int) -> nn.Module:
        if config.is_moe_layer(index):
            return TrainingMoELayer(config, make_attention(config), MoE(config))
        return super().make_layer(config, index)

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return [layer for layer in self.model.layers if not isinstance(layer, MTPModule)]

    @property
    def mtp_modules(self) -> list[nn.Module]:
        return [layer for layer in self.model.layers if isinstance(layer, MTPModule)]

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        mtp_losses: list[Tensor] = []
        balances: list[Tensor] = []
        counts: list[Tensor] = []
        hidden = self.model.embed_tokens(tokens)  # (B, S, H)
        cos, sin = self.model.rotary_emb(tokens)
        for layer in self.decoder_layers:
            if isinstance(layer, TrainingMoELayer):
                hidden, balance, count = layer(hidden, cos, sin)
                balances.append(balance)
                counts.append(count)
            else:
                hidden = layer(hidden, cos, sin)
        hidden = self.model.norm(hidden)
        lm_loss = self.token_loss(self.lm_head(hidden), labels)
        for module in self.mtp_modules:
            tokens, labels = self.shift(tokens, labels)
            hidden, balance, count = module(self.model.embed_tokens(tokens), hidden, cos, sin)
            mtp_losses.append(self.token_loss(self.lm_head(hidden), labels))
            balances.append(balance)
            counts.append(count)
        if not balances:
            return lm_loss
        total = self.total_loss(lm_loss, *mtp_losses, *balances, *counts)
        return total[0], lm_loss, *(total[index] for index in range(1, 4 if mtp_losses else 3))
