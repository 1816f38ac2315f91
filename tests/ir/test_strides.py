"""Strides of views, held to torch's."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dsc.ir.core import Value
from dsc.ir.ops.attention import Attention
from dsc.ir.ops.norm import RmsNorm
from dsc.ir.ops.shape import Broadcast, Concat, Reshape, Slice, Transpose
from dsc.ir.strides import contiguous, reshaped, row_major, strides, uneven, viewed
from dsc.ir.types import DType, Tensor


def value(*shape: int, dtype: DType = DType.bf16) -> Value:
    return Value(Tensor(dtype, shape), "x")


def factored(draw: st.DrawFn, size: int) -> list[int]:
    """A shape of so many elements."""
    found = []
    while size > 1:
        divisor = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        found.append(divisor)
        size //= divisor
    return found + [1] * draw(st.integers(0, 2))


@st.composite
def laid_out(draw: st.DrawFn) -> torch.Tensor:
    """A tensor after some views of every kind."""
    x = torch.empty(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)), device="meta")
    for kind in draw(st.lists(st.sampled_from(["permute", "slice", "expand"]), max_size=3)):
        axis = draw(st.integers(0, x.ndim - 1))
        if kind == "permute":
            x = x.permute(draw(st.permutations(range(x.ndim))))
        elif kind == "slice":
            start = draw(st.integers(0, x.shape[axis] - 1))
            x = x.narrow(axis, start, draw(st.integers(1, x.shape[axis] - start)))
        else:
            x = x.narrow(axis, 0, 1).expand([3 if i == axis else d for i, d in enumerate(x.shape)])
    return x


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    x = draw(laid_out())
    return x, draw(st.permutations(factored(draw, x.numel()) or [1]))


@given(reshapes())
def test_a_reshape_is_a_view_where_torch_makes_one(case: tuple[torch.Tensor, list[int]]) -> None:
    """Under an extent of 1 a stride has no meaning: only the others are compared."""
    x, shape = case
    found = reshaped(x.shape, x.stride(), shape)
    try:
        expected = x.view(shape).stride()
    except RuntimeError:
        assert found is None
        return
    assert found is not None
    assert [s for s, d in zip(found, shape, strict=True) if d > 1] == [s for s, d in zip(expected, shape, strict=True) if d > 1]


@given(laid_out())
def test_what_lies_row_by_row(x: torch.Tensor) -> None:
    assert contiguous(x.shape, x.stride()) == x.is_contiguous()


@given(laid_out(), st.data())
def test_other_views(x: torch.Tensor, data: st.DataObject) -> None:
    given = value(*x.shape)
    perm = tuple(data.draw(st.permutations(range(x.ndim))))
    assert viewed(Transpose(given, perm), x.stride()) == x.permute(perm).stride()
    axis = data.draw(st.integers(0, x.ndim - 1))
    start, step = data.draw(st.integers(0, x.shape[axis] - 1)), data.draw(st.integers(1, 2))
    cut = x[(slice(None),) * axis + (slice(start, x.shape[axis], step),)]
    assert viewed(Slice(given, axis, start, x.shape[axis], step), x.stride()) == cut.stride()
    wider = (2, *(5 if d == 1 else d for d in x.shape))
    assert viewed(Broadcast(given, wider), x.stride()) == x.expand(wider).stride()


def test_strides_of_nothing_and_of_axes_in_another_order() -> None:
    assert row_major((2, 0, 3)) == (3, 3, 1)
    assert reshaped((2, 0), (1, 1), (0, 5)) == (5, 1)
    assert row_major((2, 3, 4, 5), (0, 2, 1, 3)) == (60, 5, 15, 1)


def test_codes_whose_rows_become_columns_are_copied() -> None:
    turned = Transpose(value(4, 6, dtype=DType.f8e4m3), (1, 0))
    assert viewed(turned, (6, 1)) is None
    assert viewed(turned, (6, 1), turned=True) == (1, 6)
    assert strides(turned.result) == (4, 1)
    assert viewed(Transpose(value(4, 6, 8, dtype=DType.f8e4m3), (1, 0, 2)), (48, 8, 1)) == (8, 48, 1)


def test_attention_lies_token_by_token() -> None:
    """[B, heads, tokens, width] is rows [B, tokens, heads * width] without a copy; in the order that its type has it is not."""
    q = value(2, 3, 5, 4)
    out = Attention(q, q, q).result
    assert strides(out) == (60, 4, 12, 1)
    rows, heads = Reshape(Transpose(out, (0, 2, 1, 3)).result, (2, 5, 12)), Reshape(out, (2, 15, 4))
    assert viewed(rows, strides(rows.x)) == (60, 12, 1)
    assert viewed(heads, strides(heads.x)) is None


def test_what_has_to_be_copied_before_it_is_read_row_by_row() -> None:
    q = value(2, 3, 5, 4)
    out, part = Attention(q, q, q).result, Slice(q, 3, 0, 2).result
    rows = Reshape(Transpose(out, (0, 2, 1, 3)).result, (2, 5, 12)).result
    assert uneven(RmsNorm(rows, value(12), 1e-6)) == []
    assert uneven(RmsNorm(out, value(4), 1e-6)) == [out]
    assert uneven(RmsNorm(part, value(2), 1e-6)) == [part]
    assert uneven(Concat((part, part), 3)) == []
