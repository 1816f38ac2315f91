"""Attention of heads in two parts, and parts made where they are joined: the same bits, and nothing is moved."""

from __future__ import annotations

import numpy as np
import pytest

from dsc import backends
from dsc.backends.arrays import Data, rounded
from dsc.ir.core import Module, Trait
from dsc.ir.ops.shape import Concat
from dsc.ir.parser import parse
from dsc.ir.printer import print_module
from dsc.ir.types import DType, Tensor
from dsc.passes.fuse import Fuse
from dsc.passes.in_place import in_place

HEADS = """
module { stage=quantized }

func @f(%q: bf16[2, 5, 4, 6], %r: bf16[2, 5, 4, 2], %kv: bf16[2, 5, 4, 11], %s: bf16[2, 5, 1, 2],
        %dy: bf16[2, 4, 5, 5], %cos: f32[5, 1], %sin: f32[5, 1]) {
  %k: bf16[2, 5, 4, 6] = slice(%kv, axis=3, start=0, stop=6)                       @ f#1 F
  %v: bf16[2, 5, 4, 5] = slice(%kv, axis=3, start=6, stop=11)                      @ f#2 F
  %every: bf16[2, 5, 4, 2] = broadcast(%s, shape=[2, 5, 4, 2])                     @ f#3 F
  %qs: bf16[2, 5, 4, 8] = concat([%q, %r], axis=3)                                 @ f#4 F
  %ks: bf16[2, 5, 4, 8] = concat([%k, %every], axis=3)                             @ f#5 F
  %qt: bf16[2, 4, 5, 8] = transpose(%qs, perm=[0, 2, 1, 3])                        @ f#6 F
  %kt: bf16[2, 4, 5, 8] = transpose(%ks, perm=[0, 2, 1, 3])                        @ f#7 F
  %vt: bf16[2, 4, 5, 5] = transpose(%v, perm=[0, 2, 1, 3])                         @ f#8 F
  %y: bf16[2, 4, 5, 5] = attention(%qt, %kt, %vt, scale=0.3, causal=true)          @ f#9 F
  %dq: bf16[2, 4, 5, 8], %dk: bf16[2, 4, 5, 8], %dv: bf16[2, 4, 5, 5]
    = attention_backward(%qt, %kt, %vt, %y, %dy, scale=0.3, causal=true)           @ f#10 I
  %dqt: bf16[2, 5, 4, 8] = transpose(%dq, perm=[0, 2, 1, 3])                       @ f#11 I
  %dkt: bf16[2, 5, 4, 8] = transpose(%dk, perm=[0, 2, 1, 3])                       @ f#12 I
  %dvt: bf16[2, 5, 4, 5] = transpose(%dv, perm=[0, 2, 1, 3])                       @ f#13 I
  %dq1: bf16[2, 5, 4, 6] = slice(%dqt, axis=3, start=0, stop=6)                    @ f#14 I
  %dq2: bf16[2, 5, 4, 2] = slice(%dqt, axis=3, start=6, stop=8)                    @ f#15 I
  %dk1: bf16[2, 5, 4, 6] = slice(%dkt, axis=3, start=0, stop=6)                    @ f#16 I
  %dk2: bf16[2, 5, 4, 2] = slice(%dkt, axis=3, start=6, stop=8)                    @ f#17 I
  %back: bf16[2, 5, 4, 2] = rope(%dq2, %cos, %sin, interleaved=true)               @ f#18 I
  %dqs: bf16[2, 5, 4, 8] = concat([%dq1, %back], axis=3)                           @ f#19 I
  %dkv: bf16[2, 5, 4, 11] = concat([%dk1, %dvt], axis=3)                           @ f#20 I
  %ds: bf16[2, 5, 1, 2] = sum(%dk2, axes=[2], keepdims=true)                       @ f#21 I
  return %y, %dqs, %dkv, %ds
}
"""

DECODE = """
module { stage=quantized }

func @f(%q: bf16[3, 4, 6], %r: bf16[3, 4, 2], %k: bf16[3, 9, 1, 8], %at: i64[3]) {
  %qs: bf16[3, 4, 8] = concat([%q, %r], axis=2)                                    @ f#1 F
  %v: bf16[3, 9, 1, 6] = slice(%k, axis=3, start=0, stop=6)                        @ f#2 F
  %y: bf16[3, 4, 6] = attention_decode(%qs, %k, %v, %at, scale=0.3)                @ f#3 F
  return %y
}
"""


def inputs(module: Module) -> list[Data]:
    rng = np.random.default_rng(0)
    found: list[Data] = []
    for param in module.main.params:
        assert isinstance(param.type, Tensor)
        shape = tuple(int(d) for d in param.shape)  # type: ignore[arg-type]
        found.append(np.arange(3, 3 + shape[0]) if param.dtype is DType.i64 else rounded(rng.standard_normal(shape), param.dtype))
    return found


def kinds(module: Module) -> list[str]:
    return [op.name for op in module.main.ops if Trait.VIEW not in op.traits or op.name == "joined"]


@pytest.mark.parametrize("text", [HEADS, DECODE], ids=["training", "decoding"])
def test_the_same_bits(text: str) -> None:
    before = parse(text)
    after = in_place(before)
    given = inputs(before)
    numpy = backends.get("numpy")
    for x, y in zip(numpy.run(before, {}.__getitem__, given), numpy.run(after, {}.__getitem__, given), strict=True):
        assert np.array_equal(x, y)
    assert parse(print_module(after)) == after


def test_nothing_is_joined_in_memory() -> None:
    assert kinds(in_place(parse(HEADS))) == ["mla_attention", "mla_attention_backward", "rope", "joined", "joined", "sum"]
    assert kinds(in_place(parse(DECODE))) == ["mla_decode"]
    fused = Fuse()(parse(HEADS))
    assert not [op for op in fused.main.ops if type(op) is Concat]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("return %y, %dqs, %dkv, %ds", "return %y, %dqs, %dkv, %ds, %dvt", 1),  # read elsewhere as well
        ("return %y, %dqs, %dkv, %ds", "return %y, %dqs, %dkv, %ds, %back", 1),
        ("concat([%dk1, %dvt], axis=3) ", "concat([%dk1, %v], axis=3) ", 1),  # not made here
        ("slice(%dqt, axis=3, start=0, stop=6)  ", "slice(%dqt, axis=3, start=1, stop=7)  ", 1),  # no part: dq is joined for it
    ],
)
def test_what_is_read_elsewhere_or_cut_elsewhere_is_joined_as_before(old: str, new: str, expected: int) -> None:
    assert old in HEADS
    before = parse(HEADS.replace(old, new))
    after = in_place(before)
    assert kinds(after).count("joined") == expected
    given, numpy = inputs(before), backends.get("numpy")
    for x, y in zip(numpy.run(before, {}.__getitem__, given), numpy.run(after, {}.__getitem__, given), strict=True):
        assert np.array_equal(x, y)


def test_parts_of_other_widths_stay_joined() -> None:
    text = HEADS.replace("%q: bf16[2, 5, 4, 6], %r: bf16[2, 5, 4, 2]", "%q: bf16[2, 5, 4, 5], %r: bf16[2, 5, 4, 3]")
    assert "mla_attention" not in kinds(in_place(parse(text)))
