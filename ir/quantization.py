"""How a program quantises and accumulates: the records that quantised ops bear as attributes.

What they mean, bit by bit, is in `numerics/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import require

SCALE_SUFFIX = "_scale_inv"
"""What the released checkpoints append to a weight's name to name its scales."""


@dataclass(frozen=True)
class ScaleRule:
    """How amax, the largest magnitude of a tile, becomes a scale, and how the scale is applied. All arithmetic is float32, nearest even.

    With M the format's largest value (or `max`) and a = max(amax, floor):

    scale       what is stored: s = "amax/max" a/M | "amax*(1/max)" a*(1/M) | "1/(max/amax)" 1/m, where m = M/a.
    apply       what is cast: "divide" x/s | "reciprocal" x*(1/s) | "multiply" x*m; with power-of-two s, m = 1/s.
    pow2        "no" | "ceil-bits": s up to a power of two by its bits (exponent, plus one where a mantissa bit is set, within 1..254) |
                "ceil-log2": s = 2^ceil(log2 s), the logarithm rounded to float32 | "mantissa-mask": m down to a power of two.
    clamp       clip to +-M before the cast. False leaves values that round beyond M to the format (E4M3: NaN, E5M2: infinity).
    nonfinite   "propagate": infinities and NaN go through the formulas above | "unit": s = 1 where amax is 0, infinite or NaN, and an m
                that overflows is the input type's largest value.
    max         M where it is not the format's largest value (224 for tensors shared with E4M3 of bias 8).
    """

    floor: float
    scale: Literal["amax/max", "amax*(1/max)", "1/(max/amax)"] = "amax/max"
    apply: Literal["divide", "reciprocal", "multiply"] = "divide"
    pow2: Literal["no", "ceil-bits", "ceil-log2", "mantissa-mask"] = "no"
    clamp: bool = True
    nonfinite: Literal["propagate", "unit"] = "propagate"
    max: float | None = None

    def __post_init__(self) -> None:
        require(
            self.floor > 0 or self.nonfinite == "unit",
            f"scale rule with floor {self.floor} and nonfinite {self.nonfinite!r}: a zero tile needs a floor above 0 or nonfinite 'unit'",
        )
        require(
            self.pow2 != "mantissa-mask" or (self.scale == "1/(max/amax)" and self.apply == "multiply"),
            f"scale rule with pow2 'mantissa-mask', scale {self.scale!r}, apply {self.apply!r}: the mask rounds the multiplier, so it "
            "needs scale '1/(max/amax)' and apply 'multiply'",
        )


RULES = {
    # DeepSeek-V3, inference/kernel.py; scale_fmt "ue8m0" came with V3.1
    "deepseek-v3": ScaleRule(floor=1e-4),
    "deepseek-v3.1": ScaleRule(floor=1e-4, pow2="ceil-log2"),
    # DeepSeek-V3.2-Exp, inference/kernel.py (TileLang)
    "deepseek-v3.2": ScaleRule(floor=1e-4, scale="amax*(1/max)", pow2="ceil-bits"),
    # DeepGEMM, deep_gemm/utils/math.py
    "deepgemm": ScaleRule(floor=1e-4, apply="reciprocal", clamp=False),
    "deepgemm-ue8m0": ScaleRule(floor=1e-4, apply="reciprocal", pow2="ceil-bits", clamp=False),
    # TileKernels, tile_kernels/quant/common.py and tile_kernels/torch/cast.py
    "tilekernels": ScaleRule(floor=1e-4, apply="multiply"),
    "tilekernels-ue8m0": ScaleRule(floor=1e-4, apply="multiply", pow2="ceil-bits"),
    # the Triton quantisers of SGLang and vLLM
    "vllm": ScaleRule(floor=1e-10),
    # torchao, prototype/blockwise_fp8_training/kernels.py
    "torchao": ScaleRule(floor=1e-12, scale="1/(max/amax)", apply="multiply"),
    # TransformerEngine, common/recipe/recipe_common.cuh: powers of two unless NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1
    "transformer-engine": ScaleRule(floor=0.0, scale="1/(max/amax)", apply="multiply", pow2="mantissa-mask", nonfinite="unit"),
    "transformer-engine-f32": ScaleRule(floor=0.0, scale="1/(max/amax)", apply="multiply", nonfinite="unit"),
}
"""The scale rules of the projects that matter, by project."""


@dataclass(frozen=True)
class Accumulation:
    """How a sum of products is accumulated.

    arithmetic     "float32": operands dequantised to float32, multiplied and added in float32, the order left to the machine |
                   "exact": dequantised and summed in float64, rounded once | "tensor-core": nodes as `numerics/tensorcore.py`
                   describes them; the fields below count only here.
    products       products that one node adds, together with C
    fraction_bits  binary places kept when terms are aligned
    result_bits    binary places kept of the normalised sum (23: all of float32)
    operands       "fp8": subnormal operands keep the format's smallest exponent | "f16": they are widened to float16 first, as where
                   the instruction itself has no FP8, so E4M3's subnormals are normalised
    interval       elements of K after which the partial sum is promoted: scaled and added to a float32 accumulator; 0: only at the end.
                   Where the scale changes between promotions, the partial sum is multiplied by the ratio of old to new scale.
    formula        promotion of p with scales sa, sb: "deepgemm" fma(fl(sa*sb), p, acc) | "cublas" fma(fl(p*s1), s2, acc), s1 the scale
                   that is per row (that of a if both are) | "unfused" fl(acc + fl(fl(p*sa)*sb)).
    """

    arithmetic: Literal["float32", "exact", "tensor-core"] = "tensor-core"
    products: int = 32
    fraction_bits: int = 25
    result_bits: int = 23
    operands: Literal["fp8", "f16"] = "fp8"
    interval: int = 128
    formula: Literal["deepgemm", "cublas", "unfused"] = "deepgemm"
