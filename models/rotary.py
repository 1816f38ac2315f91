"""Rotary position embedding: the frequencies, YaRN's extension of them, and the blocks that turn positions into cos and sin."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import ModelConfig, YarnScaling


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN sharpens attention for a context `factor` times as long (arXiv 2309.00071, eq. 22): 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig, head_dim: int) -> float:
    """What attention scores are multiplied by: head_dim^-0.5, times mscale^2 in latent attention whose YaRN sets mscale_all_dim.

    DeepSeek applies the sharpening to the scores, where the undecoupled part of the key feels it too, and leaves cos and sin alone.
    """
    scale = head_dim**-0.5
    yarn = config.rope_scaling
    if config.latent_attention and yarn is not None and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """The angle per position of each pair, float32 [rope_dim / 2] on the CPU, and what cos and sin are multiplied by.

    Computed in float32 in the order of the released code, so that angles are bit-equal to it.
    """
    dim, yarn = config.rope_dim, config.rope_scaling
    powers = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if yarn is None:
        return 1.0 / powers, 1.0
    low, high = _correction_range(config, yarn)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp  # 1: a pair that turns often within the original context keeps its frequency; 0: it is slowed down by the factor
    return 1.0 / (yarn.factor * powers) * (1 - keep) + 1.0 / powers * keep, _attention_factor(yarn)


def _correction_range(config: ModelConfig, yarn: YarnScaling) -> tuple[float, float]:
    """The pairs that turn beta_fast and beta_slow times within the original context (arXiv 2309.00071, section 3.2)."""

    def pair_of(turns: float) -> float:
        angle = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.rope_dim * math.log(angle) / (2 * math.log(config.rope_theta))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rope_dim - 1)
    return low, high if high != low else high + 0.001


def _attention_factor(yarn: YarnScaling) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor)


class Rotary(nn.Module):
    """cos and sin of positions 0..S-1 for every layer of the stack. No weights."""

    is_block = True
    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies, self.scale = rotary_frequencies(config)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, S), of which only S matters -> cos, sin float32 (S, rope_dim / 2)."""
        return self.rotate(torch.arange(tokens.shape[1], dtype=torch.float32, device=tokens.device))

    def rotate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.outer(positions, self.inv_freq.to(positions.device))
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)


class PositionRotary(Rotary):
    """cos and sin of given positions, one token of each sequence: the B tokens count as the positions of one sequence."""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 (B,) -> cos, sin float32 (B, rope_dim / 2)."""
        return self.rotate(positions.float())
