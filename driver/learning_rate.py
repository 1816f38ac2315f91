"""How the learning rate and the balancing speed of DeepSeek-V3's pre-training run over its 14.8T tokens, scaled to a run of any length.

DeepSeek-V3 report, section 4.2: the rate rises in a line to 2.2e-4 over 2,000 steps, stays until 10T tokens, falls in a cosine to 2.2e-5
over 4.3T more, stays for 333B, and is 7.3e-6 for the last 167B. The balancing speed of the gates is 0.001 until the last 500B, then 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

PEAK, FLOOR, LAST = 2.2e-4, 2.2e-5, 7.3e-6
TOKENS = 14.8e12
CONSTANT_UNTIL, COSINE_UNTIL, FLOOR_UNTIL = (tokens / TOKENS for tokens in (10e12, 14.3e12, 14.633e12))
WARMUP = 2000 * 15360 * 4096 / TOKENS
"""The 2,000 steps as a share of all tokens, at the batch of 15,360 sequences of 4,096 tokens: 0.85%. The ramp to that batch is left out."""
BALANCE_SPEED = 0.001


@dataclass(frozen=True)
class Schedule:
    """A run of `steps` steps of equal batches whose learning rate rises to `peak`; the rates that follow keep their ratio to it."""

    steps: int
    peak: float = PEAK

    @property
    def warmup(self) -> int:
        """Steps in which the rate rises."""
        return max(1, round(WARMUP * self.steps))

    def learning_rate(self, step: int) -> float:
        """The rate of `step`, counted from 1."""
        if step <= self.warmup:
            return self.peak * (step / self.warmup)
        done = (step - 1) / self.steps
        if done < CONSTANT_UNTIL:
            return self.peak
        if done < COSINE_UNTIL:
            falling = (1 + cos(pi * (done - CONSTANT_UNTIL) / (COSINE_UNTIL - CONSTANT_UNTIL))) / 2
            return self.peak * (FLOOR / PEAK + (1 - FLOOR / PEAK) * falling)
        return self.peak * ((FLOOR if done < FLOOR_UNTIL else LAST) / PEAK)

    def balance_speed(self, step: int) -> float:
        """How far the bias of a gate moves in `step`."""
        return BALANCE_SPEED if (step - 1) / self.steps < COSINE_UNTIL else 0.0
