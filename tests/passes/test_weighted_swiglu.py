"""Routing weights inside SwiGLU: the same values and gradients, in float64 against torch, and nothing of the down projection is kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dsc
from dsc import backends
from dsc.ir.core import Module
from dsc.ir.gradients import by_name
from dsc.ir.ops.elementwise import SwiGLU
from dsc.ir.ops.moe import Combine, RowWeights
from dsc.ir.ops.shape import Reshape
from dsc.passes.manager import parse_pipeline, run_pipeline
from dsc.passes.vjp import rules

TOKENS, SLOTS, EXPERTS, HIDDEN, WIDTH = 7, 3, 5, 6, 4
ROWS = TOKENS * SLOTS

MOE = f"""
func @main(%ids: i32[{TOKENS}, {SLOTS}], %c: f64[{TOKENS}, {HIDDEN}]) {{
  %x: f64[{TOKENS}, {HIDDEN}] = param("x")                                              @ main#1 F
  %t: f64[{TOKENS}, {SLOTS}] = param("t")                                               @ main#2 F
  %y: f64[{TOKENS}, {HIDDEN}] = call(@experts, [%x, %ids, %t], weights="e")             @ main#3 F
  %p: f64[{TOKENS}, {HIDDEN}] = mul(%y, %c)                                             @ main#4 F
  %loss: f64[] = sum(%p, axes=[0, 1])                                                   @ main#5 F
  return %loss, %y
}}

func @experts(%h: f64[{TOKENS}, {HIDDEN}], %ids: i32[{TOKENS}, {SLOTS}], %t: f64[{TOKENS}, {SLOTS}]) {{
  %rows: f64[{ROWS}, {HIDDEN}], %counts: i32[{EXPERTS}], %handle: bundle{{i32[{ROWS}]}} = dispatch([%h], %ids, experts={EXPERTS})  @ e#1 F
  %wg: f64[{EXPERTS}, {WIDTH}, {HIDDEN}] = param("gate")                                @ e#2 F
  %gate: f64[{ROWS}, {WIDTH}] = grouped_matmul(%rows, %wg, %counts, transpose_b=true)   @ e#3 F
  %wu: f64[{EXPERTS}, {WIDTH}, {HIDDEN}] = param("up")                                  @ e#4 F
  %up: f64[{ROWS}, {WIDTH}] = grouped_matmul(%rows, %wu, %counts, transpose_b=true)     @ e#5 F
  %act: f64[{ROWS}, {WIDTH}] = swiglu(%gate, %up)                                       @ e#6 F
  %wd: f64[{EXPERTS}, {HIDDEN}, {WIDTH}] = param("down")                                @ e#7 F
  %down: f64[{ROWS}, {HIDDEN}] = grouped_matmul(%act, %wd, %counts, transpose_b=true)   @ e#8 F
  %y: f64[{TOKENS}, {HIDDEN}] = combine(%down, %handle, %t)                             @ e#9 F
  return %y
}}
"""

SHAPES = {
    "x": (TOKENS, HIDDEN),
    "t": (TOKENS, SLOTS),
    "e.gate": (EXPERTS, WIDTH, HIDDEN),
    "e.up": (EXPERTS, WIDTH, HIDDEN),
    "e.down": (EXPERTS, HIDDEN, WIDTH),
}


def data() -> tuple[dict[str, Any], Any, Any]:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(EXPERTS - 1)[:SLOTS] for _ in range(TOKENS)]).astype(np.int32)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}, ids, rng.standard_normal((TOKENS, HIDDEN))


def by_torch(weights: dict[str, Any], ids: Any, c: Any) -> dict[str, Any]:
    """Values and gradients of the block with the weights moved, token by token and slot by slot, by torch.autograd in float64."""
    w = {name: torch.tensor(value, requires_grad=True) for name, value in weights.items()}
    y = torch.stack(
        [
            sum(
                w["e.down"][e] @ (F.silu(w["e.gate"][e] @ w["x"][t]) * (w["e.up"][e] @ w["x"][t]) * w["t"][t, s])
                for s, e in enumerate(ids[t].tolist())
            )
            for t in range(TOKENS)
        ]
    )
    (y * torch.tensor(c)).sum().backward()
    return {"y": y.detach().numpy()} | {name: value.grad.numpy() for name, value in w.items()}  # type: ignore[union-attr]


def by_dsc(pipeline: str, weights: dict[str, Any], ids: Any, c: Any) -> dict[str, Any]:
    module = dsc.parse(str(dsc.apply(dsc.parse(MOE), pipeline)))
    results = backends.get("numpy-f64").run(module, lambda name, _: weights[name], (ids, c))
    return {"y": results[1]} | by_name(module, results)


def excess(found: dict[str, Any], weights: dict[str, Any], ids: Any, c: Any) -> float:
    """The largest error by its bound.

    Of a sum of products with n roundings on the way to each term the error is at most n u / (1 - n u) of what the magnitudes of the terms
    add up to: what the block gives of the magnitudes of all operands, for silu and its slope, at most 1.1 and at least 1/2 at a positive
    gate, rise with the gate's magnitude but for a factor of 2.2. A gate's own error moves silu by its slope, which is one term more.
    """
    expected = by_torch(weights, ids, c)
    magnitudes = by_torch({name: np.abs(value) for name, value in weights.items()}, ids, np.abs(c))
    roundings = 2 * (2 * HIDDEN + WIDTH + SLOTS + TOKENS + 40)
    unit = roundings * 2.0**-53 / (1 - roundings * 2.0**-53)
    assert found.keys() == expected.keys()
    return max(float((np.abs(found[n] - expected[n]) / (2.2 * unit * magnitudes[n] + 1e-300)).max()) for n in expected)


@pytest.mark.parametrize("pipeline", ["autodiff", "weighted-swiglu,autodiff", "weighted-swiglu,autodiff{split=true},simplify,recompute"])
def test_values_and_every_gradient(pipeline: str) -> None:
    given = data()
    assert excess(by_dsc(pipeline, *given), *given) <= 1


def without_the_weight(op: SwiGLU, b: rules.Backward, dy: Any) -> Any:
    dgate, _, dweight = TRUE[SwiGLU](op, b, dy)
    _, dup = TRUE[SwiGLU](op.copy(weight=None), b, dy)
    return dgate, dup, dweight


def of_the_weighted_result(op: SwiGLU, b: rules.Backward, dy: Any) -> Any:
    dgate, dup, dweight = TRUE[SwiGLU](op, b, dy)
    return dgate, dup, b.mul(dweight, op.weight)


def in_the_order_of_rows(op: RowWeights, b: rules.Backward, dy: Any) -> Any:
    return b.emit(Reshape(dy, (TOKENS, SLOTS))).result, None


TRUE = dict(rules.VJPS)
FAULTS = {
    "the gradient of up without the weight": (SwiGLU, without_the_weight),
    "the gradient of the weight times the weight": (SwiGLU, of_the_weighted_result),
    "gradients of weights in the order of rows": (RowWeights, in_the_order_of_rows),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, rule = FAULTS[fault]
    monkeypatch.setitem(rules.VJPS, cls, rule)
    given = data()
    assert excess(by_dsc("weighted-swiglu,autodiff", *given), *given) > 1e3


def kept(*passes: str) -> dict[str, int]:
    """Bytes that a layer of experts keeps, by name and number."""
    module = dsc.apply(traced(), ",".join(("simplify", *passes, "simplify")))
    bundle = module["training_moe_layer_fwd"].results[-1].owner
    assert bundle is not None
    return {f"{v.name} {i}": v.type.bytes for i, v in enumerate(bundle.operands)}


@cache
def traced() -> Module:
    return dsc.trace("deepseek-v3-tiny", mode="train", seq=64)


def test_what_a_layer_of_experts_keeps() -> None:
    """Summed by hand, as the report keeps it (3.2.3, 3.3.3): what norms read in BF16, FP8 inputs of products, E5M6 of attention."""
    tokens, hidden, width, experts, slots, heads, value, rope, queries, latent = 64, 144, 56, 16, 4, 4, 40, 16, 72, 48
    rows = tokens * slots
    by_hand = {
        "what the two norms read, which run again": 2 * 2 * tokens * hidden,
        "what MLA projects down, and the rotated key": 2 * tokens * (queries + (latent + rope) + rope),
        "angles": 2 * 4 * tokens * rope // 2,
        "the result of attention in E5M6, a scale for each tile of 128": tokens * (heads * value * 12 // 8 + 4 * 2),
        "logits of the gate": 4 * tokens * experts,
        "chosen experts, also those of the scores alone": 2 * 4 * tokens * slots,
        "rows as they were sent, in two tiles": rows * (hidden + 2 * 4),
        "their weights, their order, how many an expert has": 4 * rows + 4 * rows + 4 * experts,
        "the inputs of SwiGLU, routed and shared": 2 * (rows + tokens) * (width + 4),
    }
    pipeline = ("autodiff", "simplify", "quantize-fp8", "simplify", "recompute")
    found = kept("weighted-swiglu", *pipeline)
    assert sum(found.values()) == sum(by_hand.values())
    other = kept(*pipeline)
    assert sum(other.values()) - sum(found.values()) == 2 * rows * hidden + 4 * tokens * slots - 4 * rows  # what down gives, other weights


def test_the_recipe_says_whether() -> None:
    from dsc.driver.compile import default_pipeline

    assert "weighted-swiglu,autodiff" in default_pipeline("deepseek-v3", None, "train")
    for recipe, mode in (("deepseek-v3", "forward"), ("per-tensor", "train"), (None, "train")):
        assert "weighted-swiglu" not in default_pipeline(recipe, None, mode)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("swiglu(%gate, %up)", "mul(%gate, %up)", "@experts e#9: %act, which the projection of %down reads, is no swiglu without a weight"),
        ("combine(%down,", "combine(%rows,", "@experts e#9: %rows is no product of experts' rows"),
        ("return %y\n}\n", "return %y, %down\n}\n", "@experts e#9: %down is read elsewhere too"),
    ],
)
def test_what_stays_says_why(old: str, new: str, reason: str) -> None:
    func = MOE[MOE.index("func @experts") :]
    assert old in func
    (record,) = run_pipeline(dsc.parse(func.replace(old, new)), parse_pipeline("weighted-swiglu")).records
    assert [str(d) for d in record.declined] == [reason]


def test_it_does_not_weigh_twice() -> None:
    once = dsc.apply(dsc.parse(MOE), "weighted-swiglu")
    assert dsc.apply(once, "weighted-swiglu").funcs == once.funcs
    (combine,) = (op for op in once["experts"].ops if isinstance(op, Combine))
    assert combine.is_sum
