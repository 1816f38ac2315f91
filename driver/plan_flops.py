"""How many operations a token takes by the model's own definition, to which utilisation refers."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.core import Op, Phase
from ..ir.ops.attention import Attention
from ..ir.ops.control import Call
from ..ir.ops.linalg import GroupedMatmul, Matmul
from ..ir.ops.loss import CrossEntropy
from ..ir.ops.quant import GroupedScaledMatmul, ScaledMatmul
from ..ir.types import Ragged, Tensor
from ..ir.walk import walk
from .plan_layers import Layer, Program

PRODUCTS = (Matmul, ScaledMatmul, GroupedMatmul, GroupedScaledMatmul, Attention)
ROUTER = ".gate"


@dataclass(frozen=True)
class Flops:
    """Of one token: three times the forward pass in training, once in inference; attention over the lower triangle, or the whole square."""

    causal: float
    full: float
    left_out: str


def model_flops(program: Program, tokens: int, ranks: int) -> Flops:
    """Of `tokens`, on which `ranks` work together; the routers' products and what follows the main loss (MTP) left out, as published."""
    causal = full = 0.0
    counted, left = _main_model(program)
    for layer in counted:
        for op in _ops(program, layer):
            if isinstance(op, PRODUCTS) and op.phase is Phase.F and not op.id.split("#")[0].endswith(ROUTER):
                number = op.flops() * _share(program, op)
                causal += number
                full += number * (2 if isinstance(op, Attention) and op.causal else 1)
    times = (3 if program.trains else 1) * ranks / tokens
    words = "the router's" + (" and the MTP module's" if left else "") + " left out"
    return Flops(causal * times, full * times, words)


def _ops(program: Program, layer: Layer) -> list[Op]:
    calls = [op for op in layer.ops if op.phase is Phase.F]
    inside = [op for c in calls if isinstance(c, Call) for _, _, op in walk(program.module, program.module[c.callee], c.weights)]
    return [*calls, *inside]


def _main_model(program: Program) -> tuple[list[Layer], bool]:
    """The layers up to the first loss, and whether products follow."""
    layers = program.layers
    first = next((i for i, layer in enumerate(layers) if any(isinstance(op, CrossEntropy) for op in _ops(program, layer))), len(layers) - 1)
    left = any(isinstance(op, PRODUCTS) for layer in layers[first + 1 :] for op in _ops(program, layer))
    return list(layers[: first + 1]), left


def _share(program: Program, op: Op) -> float:
    """Of the FLOPs at the bound of ragged rows, those at their mean."""
    ragged = {d for v in op.operands if isinstance(v.type, Tensor) for d in v.shape if isinstance(d, Ragged)}
    share = 1.0
    for dim in ragged:
        share *= program.extents[dim] / dim.bound
    return share
