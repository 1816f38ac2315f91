"""Heads in two parts, results written where they are joined, and copies where the rule of `ir/strides.py` says, nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dsc import backends
from dsc.backends.arrays import rounded, widen
from dsc.backends.triton.program import Step, layout_of, plan_function
from dsc.backends.triton.run import Executor, machine
from dsc.backends.triton.targets import TARGETS
from dsc.driver.compile import default_pipeline, read
from dsc.driver.measure import same_bits
from dsc.ir.core import Builder, Module, Op, Trait, Value
from dsc.ir.ops.control import Call
from dsc.ir.ops.fused import Fused, Joined, MlaAttention, MlaAttentionBackward, MlaDecode
from dsc.ir.ops.norm import Rope
from dsc.ir.ops.shape import Broadcast, Slice, Transpose
from dsc.ir.strides import VIEWS, strides, uneven, viewed
from dsc.ir.types import DType, Tensor
from dsc.passes.manager import apply
from dsc.testing.bounds import bound

TRITON, NUMPY = Executor(poison=True), backends.get("numpy")
BF16, F32, I64 = DType.bf16, DType.f32, DType.i64


def value(dtype: DType, *shape: int) -> Value:
    return Value(Tensor(dtype, shape), "x")


def normal(x: Value, seed: int) -> np.ndarray:
    shape = tuple(x.shape)
    if x.dtype is I64:
        return np.arange(17, 17 + shape[0])  # type: ignore[operator]
    return rounded(np.random.default_rng(seed).standard_normal(shape), x.dtype)  # type: ignore[arg-type]


def heads(dtype: DType, count: int, kv: int, queries: int, keys: int, nope: int, pe: int, dv: int) -> dict[str, Value]:
    return {
        **{"q": value(dtype, 1, count, queries, nope), "k": value(dtype, 1, kv, keys, nope), "v": value(dtype, 1, kv, keys, dv)},
        **{"q_pe": value(dtype, 1, count, queries, pe), "k_pe": value(dtype, 1, kv, keys, pe)},
    }


CASES: list[Op] = [
    MlaAttention(**heads(BF16, 1, 1, 70, 70, 128, 64, 128), scale=0.1, causal=True),
    MlaAttention(**heads(F32, 4, 2, 33, 40, 24, 7, 17), scale=0.2),
    MlaAttentionBackward(
        **heads(BF16, 1, 1, 40, 40, 128, 64, 128), out=value(BF16, 1, 1, 40, 128), dout=value(BF16, 1, 1, 40, 128), scale=0.1, causal=True
    ),
    MlaAttentionBackward(**heads(F32, 4, 2, 33, 40, 17, 24, 16), out=value(F32, 1, 4, 33, 16), dout=value(F32, 1, 4, 33, 16), scale=0.2),
    MlaDecode(
        *(value(BF16, 2, 18, 512), value(BF16, 2, 60, 1, 576), value(BF16, 2, 60, 1, 512), value(I64, 2)),
        scale=0.1,
        q_pe=value(BF16, 2, 18, 64),
    ),
    MlaDecode(
        *(value(F32, 2, 6, 17), value(F32, 2, 60, 2, 24), value(F32, 2, 60, 2, 16), value(I64, 2)), scale=0.2, q_pe=value(F32, 2, 6, 7)
    ),
]


@pytest.mark.parametrize("op", CASES, ids=lambda op: f"{op.name}-{op.q.type}-{op.q_pe.type}")
def test_two_parts_are_within_the_bound_of_whole_heads(op: Op) -> None:
    operands = [normal(x, i) for i, x in enumerate(op.operands)]
    found, expected = TRITON.evaluate(op, operands), NUMPY.evaluate(op, operands)
    for x, y, permitted in zip(found, expected, bound(op, operands, expected), strict=True):
        assert (np.abs(widen(x, np.float64) - widen(y, np.float64)) <= permitted).all()


def layer() -> Module:
    """Gradients of heads whose keys share k_pe, joined as the gradients of what the parts were cut from."""
    b = Builder("main")
    types = {"q": (40, 4, 24), "r": (40, 4, 8), "kv": (40, 4, 40), "s": (40, 1, 8), "out": (40, 4, 16), "dout": (40, 4, 16)}
    q, r, kv, s, out, dout = (b.param(name, Tensor(BF16, (2, *shape))) for name, shape in types.items())
    cos, sin = (b.param(name, Tensor(F32, (40, 4))) for name in ("cos", "sin"))
    k, v = (b.emit(Slice(kv, 3, start, stop)).result for start, stop in ((0, 24), (24, 40)))
    every = b.emit(Broadcast(s, (2, 40, 4, 8))).result
    turned = [b.emit(Transpose(x, (0, 2, 1, 3))).result for x in (q, k, v, out, dout, r, every)]
    made = b.emit(MlaAttentionBackward(*turned[:5], scale=0.2, causal=True, q_pe=turned[5], k_pe=turned[6])).results
    dq, dk, dv, dr, ds = (b.emit(Transpose(x, (0, 2, 1, 3))).result for x in made)
    back = b.emit(Rope(dr, cos, sin, interleaved=True)).result
    joined = [b.emit(Joined((dq, back), 3)).result, b.emit(Joined((dk, dv), 3)).result]
    return Module((b.finish([*joined, ds]),))


def steps(module: Module) -> tuple[Step, ...]:
    return plan_function(module, module.main, [layout_of(p.type) for p in module.main.params], machine()[0], {}).steps


def test_gradients_are_written_where_they_are_joined() -> None:
    """No op but attention and rope runs, nothing is copied, and the bits are those of results in memory of their own."""
    module = layer()
    planned = steps(module)
    assert [s.op.name for s in planned if s.how != "view"] == ["mla_attention_backward", "rope"]
    assert not any(s.copies for s in planned)
    inputs = [normal(p, i) for i, p in enumerate(module.main.params)]
    found = TRITON.run(module, {}.__getitem__, inputs)
    backward = next(op for op in module.main.ops if isinstance(op, MlaAttentionBackward))
    q, r, kv, s, out, dout, cos, sin = inputs
    operands = [x.swapaxes(1, 2) for x in (q, kv[..., :24], kv[..., 24:], out, dout, r, np.broadcast_to(s, r.shape))]
    dq, dk, dv, dr, ds = (x.swapaxes(1, 2) for x in TRITON.evaluate(backward, operands))
    rope = Rope(value(BF16, *r.shape), value(F32, *cos.shape), value(F32, *sin.shape), interleaved=True)
    (back,) = TRITON.evaluate(rope, (np.ascontiguousarray(dr), cos, sin))
    assert same_bits(found[0], np.concatenate([dq, back], 3))
    assert same_bits(found[1], np.concatenate([dk, dv], 3))
    assert same_bits(found[2], np.ascontiguousarray(ds))


def test_an_observer_that_replaces_a_part_sees_it_joined() -> None:
    module = layer()
    inputs = [normal(p, i) for i, p in enumerate(module.main.params)]

    def observe(site: Any, op: Op, operands: Any, results: Any) -> Any:
        return tuple(np.zeros_like(x) for x in results) if isinstance(op, Rope) else None

    found = TRITON.run(module, {}.__getitem__, inputs, observe)
    assert not widen(found[0])[..., 24:].any()
    assert widen(found[0])[..., :24].any()


@pytest.mark.parametrize("mode", ["train", "decode"])
def test_the_backend_copies_what_the_costs_count(mode: str) -> None:
    """Of every function of a fused program, on arguments that lie row by row."""
    module = compiled(mode)
    compared = 0
    for func in module.funcs:
        plan = plan_function(module, func, [layout_of(p.type) for p in func.params], TARGETS["sm_90"], {})
        for step in plan.steps:
            op = step.op
            if isinstance(op, VIEWS):
                assert (step.how == "view") == (viewed(op, strides(op.x)) is not None), op
            elif step.how == "kernel" and Trait.SOURCE not in op.traits and (not isinstance(op, Call) or isinstance(op, Fused)):
                flat = [v for v in op.operands if isinstance(v.type, Tensor)]
                if len(flat) == len(op.operands):
                    assert {op.operands[i] for i, _ in step.copies} == set(uneven(op)), op
                    compared += 1
    assert compared > 20
    kinds = {op.name for func in module.funcs for op in func.ops}
    assert kinds >= ({"mla_attention", "mla_attention_backward", "joined"} if mode == "train" else {"mla_decode"})


def compiled(mode: str) -> Module:
    seq, context = (None, 32) if mode == "decode" else (32, None)
    _, module, config = read("deepseek-v3-tiny", mode=mode, batch=2, seq=seq, context=context)
    again = ",recompute" if mode == "train" else ""
    return apply(module, default_pipeline("deepseek-v3", config, mode) + again + ",fuse")
