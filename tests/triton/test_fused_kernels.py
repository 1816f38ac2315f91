"""Fused kernels: bit for bit where the math is exact or the kernel of each op alone is at hand, else within the bound.

Whole fused programs are held to the interval bound of their expansions; seeded faults in expressions, roundings and kernels are caught.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("triton", reason="triton is not installed")

import dsc
from dsc import backends
from dsc.backends.arrays import rounded, widen
from dsc.backends.triton import aot, expressions, generated
from dsc.backends.triton.program import FunctionPlan, Step, layout_of, plan_function
from dsc.backends.triton.run import Executor, machine
from dsc.backends.triton.targets import TARGETS, parse_targets
from dsc.driver.diff import diff
from dsc.driver.measure import same_bits
from dsc.ir.core import OPS, Module, Op, Trait
from dsc.ir.ops.elementwise import Add, Cast, Sub, SwiGLU, Tanh
from dsc.ir.ops.fused import SUMS, Fused, alone, expansion
from dsc.ir.ops.norm import RmsNorm
from dsc.ir.printer import print_attribute
from dsc.ir.quantization import RULES, ScaleRule
from dsc.ir.region import LIBRARY
from dsc.ir.types import DType, Tensor
from dsc.models.trace import trace
from dsc.testing import assert_backends_agree
from dsc.testing.agree import share_of_bound
from dsc.testing.bounds import bound
from dsc.testing.programs import programs
from dsc.testing.samples import SAMPLES, samples
from dsc.testing.sampling import Sample, seeded

TRITON, NUMPY = Executor(poison=True), backends.get("numpy")
BF16, F32 = DType.bf16, DType.f32
POWERS = ScaleRule(floor=1e-4, apply="multiply", pow2="ceil-bits")


def planned(module: Module, target: str = "") -> FunctionPlan:
    chosen = TARGETS[target] if target else machine()[0]
    return plan_function(module, module.main, [layout_of(p.type) for p in module.main.params], chosen, {})


def steps(module: Module, target: str = "") -> Iterator[Step]:
    return planned(module, target).all_steps()


def adversarial(dtype: DType, *shape: int, seed: int = 0) -> np.ndarray:
    """Magnitudes over 2^-20 to 2^20; a row and a column of zeros, one of a tiny number, infinity and NaN where there is room."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-20, 20, shape))
    rows = x.reshape(-1, shape[-1])
    rows[0], rows[:, -1] = 0.0, 0.0
    if len(rows) > 3:
        rows[1], rows[2, 0], rows[3, shape[-1] // 2] = 1e-30, np.inf, np.nan
    return rounded(x, dtype)


def within(op: Op, module: Module, operands: Sequence[np.ndarray]) -> bool:
    found, expected = (runner.run(alone(op, module), seeded, operands) for runner in (TRITON, NUMPY))
    limits = bound(op, operands, expected, module=module)
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(found, expected, strict=True))
    return all(share_of_bound(b, a, limit).max(initial=0.0) <= 1 for a, b, limit in zip(found, expected, limits, strict=True))


# ---- quantised where they are made

SHAPES = [(5, 128), (3, 7, 129), (1, 1), (2, 40), (130, 140)]


RULED = [(shape, "deepseek-v3") for shape in SHAPES] + [
    ((3, 7, 129), name) for name in ("tilekernels-ue8m0", "deepgemm", "transformer-engine")
]


TWICE = """
module {{ stage=quantized }}

func @f(%x: {dtype}[{shape}], %c: f8e4m3[{shape}], %s: f32[{lead}, {across}]{counts}) {{
  %w: {dtype}[{shape}] = dequantize(%c, %s, tile=[1, {tile}], dtype={dtype})                                  @ f#1 I
  %y: {dtype}[{shape}] = add(%x, %w)                                                                         @ f#2 I
  %a: {format}[{shape}], %as: f32[{lead}, {across}] = quantize(%y, tile=[1, {tile}], dtype={format}, rule={rule})  @ f#3 I
  %m: {dtype}[{rows}, {columns}] = reshape(%y, shape=[{rows}, {columns}])                                    @ f#4 W
  %d: {format}[{rows}, {columns}], %ds: f32[{down}, {columns}] = quantize(%m, {given}tile=[{tile}, 1], dtype={format}, rule={rule})  @ f#5 W
  {turn}
  return %y, %a, %as, {result}
}}
"""


def twice(shape: tuple[int, ...], rule: ScaleRule, tile: int = 128, format: str = "f8e4m3", turned: bool = True, groups: int = 0) -> Module:
    """A sum that is quantised along its rows and down its columns, each copy with a reader of its own."""
    *lead, columns = shape
    rows = int(np.prod(lead))
    down = rows // tile + groups if groups else -(-rows // tile)
    turn = (
        f"%t: {format}[{columns}, {rows}] = transpose(%d, perm=[1, 0])  @ f#6 W\n"
        f"  %ts: f32[{columns}, {down}] = transpose(%ds, perm=[1, 0])  @ f#7 W"
    )
    return dsc.parse(
        TWICE.format(
            **{"dtype": "bf16", "shape": ", ".join(map(str, shape)), "lead": ", ".join(map(str, lead)), "across": -(-columns // tile)},
            **{"tile": tile, "format": format, "rule": print_attribute(rule), "rows": rows, "columns": columns, "down": down},
            **{"counts": f", %counts: i32[{groups}]" if groups else "", "given": "counts=%counts, " if groups else ""},
            **{"turn": turn if turned else "", "result": "%t, %ts" if turned else "%d, %ds"},
        )
    )


def operands_of(module: Module, *counts: int) -> list[np.ndarray]:
    x, codes, scales, *_ = module.main.params
    given = [adversarial(v.dtype, *map(int, v.shape), seed=i) for i, v in enumerate((x, codes, scales))]
    return [*given, *([np.array(counts, np.int32)] if counts else [])]


@pytest.mark.parametrize(("shape", "rule"), RULED, ids=str)
def test_a_region_by_blocks_is_exact(shape: tuple[int, ...], rule: str) -> None:
    """Both copies bit for bit, as one kernel of one read; turned or not, by rules with and without powers of two, E5M2 and small tiles."""
    for options in ({}, {"turned": False}, {"tile": 16, "format": "f8e5m2"}):
        module = twice(shape, RULES[rule], **options)
        fused = dsc.apply(module, "fuse")
        assert [step.how for step in steps(fused)] == ["kernel"]
        arrays = operands_of(module)
        assert all(map(same_numbers, TRITON.run(fused, seeded, arrays), NUMPY.run(module, seeded, arrays)))


@pytest.mark.parametrize("counts", [(0, 23, 0), (7, 9, 7), (1, 0, 22), (23,)], ids=str)
def test_blocks_restart_at_experts(counts: tuple[int, ...]) -> None:
    """One expert with all the rows, experts without any."""
    for turned in (False, True):
        module = twice((23, 37), RULES["deepseek-v3"], tile=8, turned=turned, groups=len(counts))
        fused = dsc.apply(module, "fuse")
        assert [step.how for step in steps(fused)] == ["kernel"]
        arrays = operands_of(module, *counts)
        assert all(map(same_numbers, TRITON.run(fused, seeded, arrays), NUMPY.run(module, seeded, arrays)))


QUANTISED = """
module {{ stage=quantized }}

func @f(%x: {dtype}[{shape}], %y: {dtype}[{shape}], %w: {dtype}[{c}], %v: f32[{lead}, 1]) {{
  %n: {dtype}[{shape}] = rms_norm(%x, %w, eps=1e-06)                                                 @ f#1 F
  %nq: f8e4m3[{shape}], %ns: f32[{lead}, {tiles}] = quantize(%n, tile=[1, {tile}], rule={rule})      @ f#2 F
  %a: {dtype}[{shape}] = swiglu(%x, %y, weight=%v)                                                   @ f#3 I
  %aq: f8e4m3[{shape}], %as: f32[{lead}, {tiles}] = quantize(%a, tile=[1, {tile}], rule={rule})      @ f#4 I
  return {kept}%nq, %ns, %aq, %as
}}
"""


def quantised(dtype: DType, shape: tuple[int, ...], tile: int = 128, rule: ScaleRule = RULES["deepseek-v3"], keep: bool = False) -> Module:
    """A norm and a SwiGLU whose results are quantised, and read elsewhere where `keep`."""
    text = QUANTISED.format(
        **{"dtype": dtype, "shape": ", ".join(map(str, shape)), "lead": ", ".join(map(str, shape[:-1])), "c": shape[-1]},
        **{"tiles": -(-shape[-1] // tile), "tile": tile, "rule": print_attribute(rule), "kept": "%n, %a, " if keep else ""},
    )
    return dsc.apply(dsc.parse(text), "fuse")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2500)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_what_is_quantised_where_it_is_made_is_within_its_bound(dtype: DType, shape: tuple[int, ...], keep: bool) -> None:
    """In whole rows and in strips of them."""
    for options in ({}, {"tile": 32, "rule": POWERS}):
        module = quantised(dtype, shape, keep=keep, **options)
        assert [(type(op), step.how) for op, step in zip(module.main.ops, steps(module), strict=True)] == [(Fused, "kernel")] * 2
        gate = rounded(np.clip(widen(adversarial(dtype, *shape), np.float64), -90, 90), dtype)
        arrays = [gate, *(adversarial(v.dtype, *map(int, v.shape), seed=1) for v in module.main.params[1:])]
        assert all(within(op, module, [arrays[module.main.params.index(v)] for v in op.operands]) for op in module.main.ops)


@pytest.mark.parametrize("sample", samples(*SUMS.values()), ids=lambda s: s.name)
def test_a_sum_on_top_gives_the_same_bits(sample: Sample) -> None:
    """One kernel adds what two did, product and sum apart, with each rounding in its place; `fuse` makes it of them."""
    func = expansion(sample.op())
    assert func is not None
    apart = Module((func,), stage="quantized")
    fused = dsc.apply(apart, "fuse")
    assert [type(op) for op in fused.main.ops] == [sample.cls]
    assert [step.how for step in steps(fused)] == ["kernel"]
    for seed in range(2):
        arrays = sample.arrays(seed)
        assert all(map(same_bits, TRITON.run(fused, seeded, arrays), TRITON.run(apart, seeded, arrays)))


def test_the_bound_permits_little() -> None:
    """Nearly all codes have to be equal: the interval of a code is wider than a point for few, and never than one step."""
    module = quantised(BF16, (32, 256), keep=True)
    rng = np.random.default_rng(0)
    arrays = [rounded(rng.standard_normal(shape), BF16) for shape in ((32, 256), (256,))]
    op = module.main.ops[0]
    y, codes, _ = bound(op, arrays, NUMPY.run(alone(op, module), seeded, arrays), module=module)
    assert np.mean(np.asarray(y) > 0) < 0.01
    assert np.mean(np.asarray(codes) > 0) < 0.05


# ---- generated kernels


def test_every_op_element_by_element_has_a_kernel() -> None:
    """Written for it or generated; those of LIBRARY apart. Integers are torch's."""
    known = {*expressions.EXPRESSIONS, *LIBRARY, Cast}
    assert {cls for cls in OPS.values() if Trait.ELEMENTWISE in cls.traits} <= known
    ran = set()
    for sample in SAMPLES:
        dtypes = {t.dtype for v in (*sample.op().operands, *sample.op().results) if isinstance(t := v.type, Tensor)}
        if sample.cls in {*expressions.EXPRESSIONS, *expressions.ALONG_ROWS} and dtypes <= {F32, BF16, DType.bool}:
            (how,) = {step.how for step in steps(sample.module())}
            ran |= {sample.cls} if how == "kernel" else set()
    assert ran == {*expressions.EXPRESSIONS, *expressions.ALONG_ROWS}


EXACT = """
func @f(%x: bf16[{lead}, {c}], %r: f32[{c}], %g: bf16[{lead}, 1], %s: f32[], %m: bool[{c}]) {{
  %wide: f32[{lead}, {c}] = cast(%x, dtype=f32)              @ f#1 F
  %a: f32[{lead}, {c}] = mul(%wide, %r)                      @ f#2 F
  %b: f32[{lead}, {c}] = add(%a, %s)                         @ f#3 F
  %n: bf16[{lead}, {c}] = cast(%b, dtype=bf16)               @ f#4 F
  %d: bf16[{lead}, {c}] = div(%n, %g)                        @ f#5 F
  %zero: f32[] = literal([-0.0], [], f32)                    @ f#6 F
  %neg: bool[{lead}, {c}] = lt(%d, %zero)                    @ f#7 F
  %w: bf16[{lead}, {c}] = where(%m, %d, %n)                  @ f#8 F
  %top: bf16[{lead}, 1] = max(%w, axes=[-1], keepdims=true)  @ f#9 F
  %low: bf16[{lead}, {c}] = minimum(%w, %top)                @ f#10 F
  %e: f8e5m2[{lead}, {c}] = cast(%low, dtype=f8e5m2)         @ f#11 F
  %q: f8e4m3[{lead}, {c}], %qs: f32[{lead}, {t}] = quantize(%low, tile=[1, 64])  @ f#12 F
  return %neg, %top, %e, %q, %qs
}}
"""


@pytest.mark.parametrize(("lead", "columns"), [("7", 131), ("2, 3", 64), ("1, 5", 1), ("70", 33), ("3", 1000)])
def test_a_region_of_exact_ops_is_exact(lead: str, columns: int) -> None:
    """Broadcast operands, a scalar, a condition, rows, a cast that saturates and one that quantises: equal bits, NaN and infinity too."""
    module = dsc.parse(EXACT.format(lead=lead, c=columns, t=-(-columns // 64)))
    fused = dsc.apply(module, "fuse")
    assert [step.how for step in steps(fused)] == ["kernel"]
    arrays = []
    for i, p in enumerate(fused.main.params):
        shape = tuple(d for d in p.shape if isinstance(d, int))
        x = adversarial(F32, *shape, seed=i) if shape else np.array(2.5, np.float32)
        arrays.append(x > 0 if p.dtype is DType.bool else rounded(x, p.dtype))
    assert all(map(same_numbers, TRITON.run(fused, seeded, arrays), NUMPY.run(module, seeded, arrays)))


def same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, whatever the bits of NaN."""
    x, y = (v.astype(np.float64) if v.dtype == np.bool else widen(v, np.float64) for v in (a, b))
    return a.dtype == b.dtype and np.array_equal(x, y, equal_nan=True) and bool(((np.signbit(x) == np.signbit(y)) | np.isnan(x)).all())


@settings(max_examples=25, deadline=None)
@given(programs(steps=("unary", "binary", "scalar", "choice", "roots", "cast"), most_steps=5, calls=False))
def test_a_generated_kernel_computes_what_those_of_its_ops_do(program: tuple[Module, tuple[np.ndarray, ...]]) -> None:
    """To the bit: fusing moves no rounding."""
    module, inputs = program
    assert all(map(same_bits, TRITON.run(dsc.apply(module, "fuse"), seeded, inputs), TRITON.run(module, seeded, inputs)))


@settings(max_examples=20, deadline=None)
@given(programs(most_steps=5))
def test_random_fused_programs_stay_within_their_bounds(program: tuple[Module, tuple[np.ndarray, ...]]) -> None:
    module, inputs = program
    assert_backends_agree(dsc.apply(module, "fuse"), seeded, inputs, ("numpy", "triton"))


def test_numbers_alone_and_nothing_at_all() -> None:
    """Rank 0, ops of numbers only, and tensors without elements."""
    module = dsc.parse(
        "func @f(%x: f32[], %v: f32[3], %e: f32[0, 5], %o: f32[5]) {\n"
        "  %two: f32[] = literal([2.0], [], f32)\n  %root: f32[] = sqrt(%two)\n  %b: f32[] = mul(%x, %root)\n"
        "  %mean: f32[] = mean(%v, axes=[0])\n  %c: f32[] = div(%mean, %b)\n"
        "  %z: f32[0, 5] = mul(%e, %o)\n  %y: f32[0, 5] = neg(%z)\n  return %b, %c, %y\n}\n"
    )
    arrays = [np.array(0.3, np.float32), np.arange(3, dtype=np.float32), np.zeros((0, 5), np.float32), np.ones(5, np.float32)]
    fused = dsc.apply(module, "fuse")
    assert [step.how for step in steps(fused)] == ["kernel", "kernel"]
    assert all(map(same_bits, TRITON.run(fused, seeded, arrays), NUMPY.run(module, seeded, arrays)))
    assert not any(op.id for op in module.main.ops), "the program that was fused has changed"


FAULTS = {
    "another op": (Add, "{0} - {1}"),
    "operands the wrong way round": (SwiGLU, "silu({1}) * {0}"),
    "an approximation": (Tanh, "{0} - {0} * {0} * {0} * 0.3333"),
    "a rounding too many": (Sub, 'rounded({0} - {1}, "bf16")'),
    "a row too long": (RmsNorm, "rms_norm({0}, {1}, inside, WIDTH, {eps})"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_an_expression_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, text = FAULTS[fault]
    module = dsc.apply(dsc.parse(ALL_FAULTY), "fuse")
    drawn = (np.random.default_rng(i).standard_normal((6, 40)[2 - len(p.shape) :]) for i, p in enumerate(module.main.params))
    arrays = [x.astype(np.float32) for x in drawn]
    assert [step.how for step in steps(module)] == ["kernel"]
    assert_backends_agree(module, seeded, arrays, ("numpy", "triton"))
    monkeypatch.setitem(expressions.ALONG_ROWS if cls in expressions.ALONG_ROWS else expressions.EXPRESSIONS, cls, text)
    with pytest.raises(AssertionError, match="disagree first at @f"):
        assert_backends_agree(module, seeded, arrays, ("numpy", "triton"))


ALL_FAULTY = """
func @f(%x: f32[6, 40], %y: f32[6, 40], %w: f32[40]) {
  %a: f32[6, 40] = add(%x, %y)  @ f#1 F
  %b: f32[6, 40] = swiglu(%x, %a)  @ f#2 F
  %c: f32[6, 40] = tanh(%b)  @ f#3 F
  %d: f32[6, 40] = sub(%c, %y)  @ f#4 F
  %e: f32[6, 40] = rms_norm(%d, %w, eps=1e-06)  @ f#5 F
  return %e
}
"""


def test_a_region_without_an_expression_runs_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says why."""
    monkeypatch.delitem(expressions.EXPRESSIONS, Tanh)
    module = dsc.apply(dsc.parse(ALL_FAULTY), "fuse")
    (call, *_) = steps(module)
    assert (call.how, call.declined) == ("call", "tanh has no expression in backends/triton/expressions.py")
    arrays = [np.ones((6, 40)[2 - len(p.shape) :], np.float32) for p in module.main.params]
    assert np.isfinite(TRITON.run(module, seeded, arrays)[0]).all()


def test_generated_source_is_a_readable_file_named_by_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    generated.load.cache_clear()
    module = dsc.apply(dsc.parse(ALL_FAULTY), "fuse")
    assert [s.launches[0].kernel.__name__ for s in steps(module)] == ["add_swiglu_tanh_sub_rms_norm_kernel"]
    (file,) = (tmp_path / "dsc" / "generated").iterdir()
    text = file.read_text()
    assert "%v2: f32 = tanh(%v1)" in text
    assert "v2 = tanh(v1)" in text
    stamp = file.stat().st_mtime_ns
    generated.load.cache_clear()
    assert len(list(steps(module))) == 1
    assert file.stat().st_mtime_ns == stamp
    generated.load.cache_clear()


# ---- whole models


def test_a_model_has_fewer_kernels_and_torch_functions() -> None:
    """The norm behind attention, the gate's cast and both quantisations are one kernel of a layer of experts, after the product's sum."""
    module = dsc.apply(trace("deepseek-v3-tiny", seq=16), "simplify,quantize-fp8{recipe=deepseek-v3}")
    fused = dsc.apply(module, "fuse")
    before, after = ([s.how for s in steps(m, "sm_90")] for m in (module, fused))
    assert after.count("kernel") <= before.count("kernel") - 14
    assert after.count("torch") <= before.count("torch")
    names = {s.op.name for s in steps(fused, "sm_90") if s.how == "kernel"}
    assert {"scaled_matmul_add", "fused"} <= names
    assert {"rms_norm_quantize", "swiglu_quantize", "rms_norm_cast_quantize_quantize"} <= {f.name for f in fused.funcs}


@pytest.mark.slow
def test_a_fused_model_agrees_op_by_op_and_with_the_unfused_one() -> None:
    module = dsc.apply(trace("deepseek-v3-tiny", seq=16, overrides=("num_hidden_layers=2",)), "simplify,quantize-fp8{recipe=deepseek-v3}")
    fused = dsc.apply(module, "fuse")
    same = diff(module, fused)
    assert same.same
    assert len(same.ops) > 100
    assert diff(fused, backends=("numpy", "triton")).same


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_fused_kernels_compile_without_spills(target: str, tmp_path: Any) -> None:
    """At the width of DeepSeek-V3."""
    module = dsc.apply(dsc.parse(WIDE), "fuse")
    made = {c.job.function: c for c in aot.compile_jobs(aot.jobs(module, parse_targets(target)), cache=tmp_path)}
    by_rows = {"add_rms_norm_quantize_kernel", "dequantize_quantize_kernel", "rms_norm_quantize_kernel", "swiglu_quantize_kernel"}
    assert made.keys() == {*by_rows, "add_quantize_quantize_transpose_transpose_kernel"}
    assert {name: c.facts["spill_bytes"] for name, c in made.items()} == dict.fromkeys(made, 0)
    aot.write(list(made.values()), tmp_path / "out")
    text = next((tmp_path / "out" / target).glob("add_rms_norm_quantize_kernel_*.py")).read_text()
    assert "%v1: bf16 = rms_norm(%v0, %x2, eps=1e-06)" in text
    assert "def quantize_rows(" in text


WIDE = """
module { stage=quantized }

func @f(%x: bf16[4096, 7168], %r: bf16[4096, 7168], %w: bf16[7168], %gate: bf16[4096, 2048], %up: bf16[4096, 2048],
        %gq: f8e4m3[4096, 2048], %gs: f32[4096, 16], %counts: i32[4]) {
  %h: bf16[4096, 7168] = add(%x, %r)                                 @ f#1 F
  %y: bf16[4096, 7168] = rms_norm(%h, %w, eps=1e-06)                 @ f#2 F
  %q: f8e4m3[4096, 7168], %s: f32[4096, 56] = quantize(%y)           @ f#3 F
  %z: bf16[4096, 7168] = rms_norm(%x, %w, eps=1e-06)                 @ f#4 I
  %zq: f8e4m3[4096, 7168], %zs: f32[4096, 56] = quantize(%z)         @ f#5 I
  %a: bf16[4096, 2048] = swiglu(%gate, %up)                          @ f#6 F
  %aq: f8e4m3[4096, 2048], %as: f32[4096, 16] = quantize(%a)         @ f#7 F
  %g: bf16[4096, 2048] = dequantize(%gq, %gs)                        @ f#8 W
  %gr: f8e4m3[4096, 2048], %grs: f32[36, 2048] = quantize(%g, counts=%counts, tile=[128, 1])  @ f#9 W
  %dg: bf16[4096, 2048] = add(%gate, %up)                            @ f#10 I
  %i: f8e4m3[4096, 2048], %is: f32[4096, 16] = quantize(%dg)         @ f#11 I
  %k: f8e4m3[4096, 2048], %ks: f32[32, 2048] = quantize(%dg, tile=[128, 1])  @ f#12 W
  %kt: f8e4m3[2048, 4096] = transpose(%k, perm=[1, 0])               @ f#13 W
  %kst: f32[2048, 32] = transpose(%ks, perm=[1, 0])                  @ f#14 W
  return %h, %q, %s, %zq, %zs, %aq, %as, %gr, %grs, %dg, %i, %is, %kt, %kst
}
"""
