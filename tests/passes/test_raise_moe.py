"""raise-moe: what it lifts gives the same numbers, bit for bit, and what only looks alike stays and says why."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc import backends
from dsc.ir.core import Module
from dsc.ir.parser import parse
from dsc.ir.types import DType
from dsc.passes.manager import parse_pipeline, run_pipeline

MOE = """
module {{ stage=traced }}

func @moe(%x: {dtype}[{t}, 8], %logits: f32[{t}, {e}], %bias: f32[{e}], %up: {dtype}[{e}, 12, 8], %down: {dtype}[{e}, 8, 6]) {{
  %score: f32[{t}, {e}] = {score}
  %biased: f32[{t}, {e}] = add(%score, %bias)
  %grouped: f32[{t}, {g}, {s}] = reshape(%biased, shape=[{t}, {g}, {s}])
  %two: f32[{t}, {g}, 2], %where_two: i64[{t}, {g}, 2] = topk(%grouped, k=2)
  %group_score: f32[{t}, {g}] = sum(%two, axes=[2])
  %best: f32[{t}, {tg}], %groups: i64[{t}, {tg}] = topk(%group_score, k={tg})
  %zeros: f32[{t}, {g}] = literal([0.0], [{t}, {g}], f32)
  %ones: f32[{t}, {tg}] = literal([1.0], [{t}, {tg}], f32)
  %mask: f32[{t}, {g}] = scatter(%zeros, %groups, %ones, axis=1)
  %column: f32[{t}, {g}, 1] = reshape(%mask, shape=[{t}, {g}, 1])
  %spread: f32[{t}, {g}, {s}] = broadcast(%column, shape=[{t}, {g}, {s}])
  %flat_mask: f32[{t}, {e}] = reshape(%spread, shape=[{t}, {e}])
  %zero: f32[] = literal([0.0], [], f32)
  %kept: bool[{t}, {e}] = ne(%flat_mask, %zero)
  %dropped: bool[{t}, {e}] = not(%kept)
  %fill: f32[] = literal([{fill}], [], f32)
  %masked: f32[{t}, {e}] = where(%dropped, %fill, %biased)
  %values: f32[{t}, {k}], %ids: i64[{t}, {k}] = topk(%masked, k={k})
  %chosen: f32[{t}, {k}] = gather(%score, %ids, axis=1)
  %total: f32[{t}, 1] = sum(%chosen, axes=[1], keepdims=true)
  %eps: f32[] = literal([{eps}], [], f32)
  %denominator: f32[{t}, 1] = add(%total, %eps)
  %normal: f32[{t}, {k}] = div(%chosen, %denominator)
  %factor: f32[] = literal([2.5], [], f32)
  %weights: f32[{t}, {k}] = mul(%normal, %factor)
  %flat_weights: f32[{r}] = reshape(%weights, shape=[{r}])
  %flat_ids: i64[{r}] = reshape(%ids, shape=[{r}])
  %sorted: i64[{r}], %order: i64[{r}] = sort(%flat_ids)
  %slots: i64[] = literal([{slots}], [], i64)
  %tokens: i64[{r}] = div(%order, %slots)
  %rows: {dtype}[{r}, 8] = take(%x, %tokens)
  %row_weights: f32[{r}] = take(%flat_weights, %order)
  %counts: i32[{e}] = histogram(%sorted, bins={e})
  %gate_up: {dtype}[{r}, 12] = grouped_matmul(%rows, %up, %counts, transpose_b=true)
  %gate: {dtype}[{r}, 6] = slice(%gate_up, axis=1, start=0, stop=6)
  %upper: {dtype}[{r}, 6] = slice(%gate_up, axis=1, start=6, stop=12)
  %act: {dtype}[{r}, 6] = silu(%gate)
  %inner: {dtype}[{r}, 6] = mul(%act, %upper)
  %y: {dtype}[{r}, 8] = grouped_matmul(%inner, %down, %counts, transpose_b=true)
  %wide: f32[{r}, 8] = cast(%y, dtype=f32)
  %weight_column: f32[{r}, 1] = reshape(%row_weights, shape=[{r}, 1])
  %weighted: f32[{r}, 8] = mul(%wide, %weight_column)
  %nothing: i64[{r}] = literal([0], [{r}], i64)
  %places: i64[{r}] = iota({r}, i64{iota})
  %inverse: i64[{r}] = scatter(%nothing, %order, %places, axis=0)
  %back: f32[{r}, 8] = take(%weighted, %inverse)
  %per_slot: f32[{t}, {k}, 8] = reshape(%back, shape=[{t}, {k}, 8])
  %summed: f32[{t}, 8] = sum(%per_slot, axes=[1])
  %out: {dtype}[{t}, 8] = cast(%summed, dtype={dtype})
  return %out, %ids
}}
"""


SIGMOID, SOFTMAX = "sigmoid(%logits)", "softmax(%logits, axis=-1)"


def moe(t: int = 5, g: int = 3, s: int = 2, tg: int = 2, k: int = 3, dtype: str = "f32", score: str = SIGMOID, **more: str) -> Module:
    """t tokens, g groups of s experts of which tg stay, k experts for each token."""
    fields = {"fill": "-inf", "eps": "1e-20", "slots": str(k), "iota": ""} | more
    return parse(MOE.format(t=t, e=g * s, g=g, s=s, tg=tg, k=k, r=t * k, dtype=dtype, score=score, **fields))


def names(module: Module) -> set[str]:
    return {op.name for op in module.main.ops}


def raised(module: Module, pipeline: str = "raise-moe") -> tuple[Module, list[str]]:
    result = run_pipeline(module, parse_pipeline(pipeline))
    return result.module, [declined.reason for record in result.records for declined in record.declined]


def results(module: Module, seed: int = 0) -> list[bytes]:
    """Of random inputs with many equal scores, so that ties count."""
    rng = np.random.default_rng(seed)
    inputs = []
    for param in module.main.params:
        numbers = rng.integers(-4, 5, param.shape) / 4 if param.name in ("logits", "bias") else rng.standard_normal(param.shape)
        inputs.append(numbers.astype(np.float32 if param.dtype is DType.f32 else ml_dtypes.bfloat16))
    found = backends.get("numpy").run(module, lambda name, _: pytest.fail(name), inputs)
    return [np.asarray(x).tobytes() for x in found]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(2, 4),
    st.data(),
    st.sampled_from([SIGMOID, SOFTMAX]),
    st.sampled_from(["f32", "bf16"]),
    st.integers(0, 2**16),
)
def test_every_shape_gives_the_same_bits(t: int, g: int, s: int, data: st.DataObject, score: str, dtype: str, seed: int) -> None:
    top_groups = data.draw(st.integers(1, g))
    k = data.draw(st.integers(1, top_groups * s))
    before = moe(t, g, s, top_groups, k, dtype, score)
    after, reasons = raised(before)
    assert {"route", "dispatch", "combine"} <= names(after)
    assert names(after).isdisjoint({"topk", "sort", "histogram", "gather"})
    assert bool(reasons) == (dtype == "bf16")  # swiglu alone
    assert results(after, seed) == results(before, seed)
    assert parse(str(after)) == after


def test_attributes_of_the_route() -> None:
    after, _ = raised(moe())
    (route,) = (op for op in after.main.ops if op.name == "route")
    expected = {"top_k": 3, "score": "sigmoid", "groups": 3, "top_groups": 2, "group_score": "top2", "normalize": True, "scale": 2.5}
    assert route.attributes == expected


def test_swiglu_below_float32_is_lifted_on_request() -> None:
    before = moe(dtype="bf16")
    plain, reasons = raised(before)
    assert "swiglu" not in names(plain)
    assert reasons == ["swiglu would skip the rounding of silu to bf16; raise-moe{swiglu=true} accepts that"]
    fused, reasons = raised(before, "raise-moe{swiglu=true}")
    assert ("swiglu" in names(fused), "silu" in names(fused), reasons) == (True, False, [])


def test_simplified_programs_are_lifted_too() -> None:
    after, _ = raised(moe(), "simplify,raise-moe")
    assert {"route", "dispatch", "combine"} <= names(after)
    assert results(after) == results(moe())


def edited(pattern: str, replacement: str) -> Module:
    text, count = re.subn(pattern, replacement, str(moe()))
    assert count == 1
    return parse(text)


GROUP_SCORE = "groups are not scored by their best or their two best experts"
ROUTER = [
    (
        r"sigmoid\(%logits\)",
        "tanh(%logits)",
        "it picks from the result of add, expected sigmoid or softmax of logits, with or without a bias",
    ),
    (r"literal\(\[-inf\]", "literal([-1.0]", "it fills in -1.0, expected -inf or 0"),
    (r"literal\(\[-inf\]", "literal([0.0]", "other groups are masked with 0, which a biased score may fall below; expected -inf"),
    (r"= not\(%kept\)", "= eq(%flat_mask, %zero)", "a mask stands before the choice that is not one of expert groups"),
    (r"sum\(%two, axes=\[2\]\)", "min(%two, axes=[2])", GROUP_SCORE),
    (r"reshape\(%biased, shape=\[5, 3, 2\]\)", "reshape(%score, shape=[5, 3, 2])", GROUP_SCORE),
]


@pytest.mark.parametrize(("pattern", "replacement", "reason"), ROUTER)
def test_other_routers_stay(pattern: str, replacement: str, reason: str) -> None:
    before = edited(pattern, replacement)
    after, reasons = raised(before)
    assert any(reason in said for said in reasons), reasons
    assert "route" not in names(after)
    assert {"dispatch", "combine"} <= names(after)  # the experts are what they are
    assert results(after) == results(before)


EXPERTS = [
    (r"div\(%order, %slots\)", "remainder(%order, %slots)", "no rows of [5, width] are taken in its order divided by 3"),
    (r"iota\(15, i64\)", "iota(15, i64, start=14, step=-1)", "the order that brings rows back is not the inverse of the sort"),
    (r"take\(%flat_weights, %order\)", "take(%flat_weights, %tokens)", "rows are not multiplied by float32 weights [5, 3] in their order"),
    (r"sum\(%per_slot, axes=\[1\]\)", "max(%per_slot, axes=[1])", "no weighted sum over slots ends the experts"),
    (r"sort\(%flat_ids\)", "sort(%flat_ids, descending=true)", "expected flattened expert ids [tokens, k] in ascending order"),
]


@pytest.mark.parametrize(("pattern", "replacement", "reason"), EXPERTS)
def test_other_experts_stay(pattern: str, replacement: str, reason: str) -> None:
    before = edited(pattern, replacement)
    after, reasons = raised(before)
    assert any(reason in said for said in reasons), reasons
    assert names(after).isdisjoint({"dispatch", "combine"})
    assert "route" in names(after)
    assert results(after) == results(before)


def test_biased_scores_are_not_taken_for_weights() -> None:
    """What the last top-k picks has the bias in it: where a program uses that, `route` gives the ids alone."""
    before = edited(r"gather\(%score, %ids, axis=1\)", "maximum(%values, %zero)")
    after, _ = raised(before)
    assert {"route", "topk"} <= names(after)
    assert results(after) == results(before)


def test_another_epsilon_keeps_the_normalisation_outside() -> None:
    before = edited("1e-20", "0.001")
    after, _ = raised(before)
    (route,) = (op for op in after.main.ops if op.name == "route")
    assert (route.attributes["normalize"], route.attributes["scale"], "div" in names(after)) == (False, 1.0, True)
    assert results(after) == results(before)


def test_a_module_without_experts_is_itself() -> None:
    module = parse("func @f(%x: f32[3, 4]) {\n  %best: f32[3, 2], %ids: i64[3, 2] = topk(%x, k=2)\n  return %best, %ids\n}\n")
    assert raised(module) == (module, [])


def test_ids_of_unknown_range_are_not_sent() -> None:
    """`dispatch` has a place for every row; a histogram passes over what it does not count."""
    text = re.sub(
        r"  %flat_ids: i64\[15\] = .*",
        "  %next: i64[] = literal([1], [], i64)\n  %others: i64[5, 3] = add(%ids, %next)\n"
        "  %flat_ids: i64[15] = reshape(%others, shape=[15])",
        str(moe()),
    )
    after, reasons = raised(parse(text))
    assert reasons == ["it is not known that the expert ids are below 6, the number that is counted"]
    assert results(after) == results(parse(text))
