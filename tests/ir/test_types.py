"""Types: bytes by hand, text, and what equals what."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dsc.ir.errors import DscError
from dsc.ir.types import Bundle, DType, Ragged, Tensor, bound, tensors

FROM_ML_DTYPES = {"bf16": "bfloat16", "f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2", "e8m0": "float8_e8m0fnu"}
FROM_NUMPY = {"f64": "f8", "f32": "f4", "f16": "f2", "i64": "i8", "i32": "i4", "i16": "i2", "i8": "i1", "u8": "u1", "bool": "?"}


@pytest.mark.parametrize("dtype", list(DType))
def test_sizes_are_those_of_numpy_and_ml_dtypes(dtype: DType) -> None:
    if dtype is DType.e5m6:
        assert dtype.bits == 12  # 1 sign, 5 exponent, 6 mantissa: packed in memory figures, though no NumPy dtype holds it so
    else:
        storage = FROM_NUMPY.get(dtype.name) or getattr(ml_dtypes, FROM_ML_DTYPES[dtype.name])
        assert Tensor(dtype, (3, 5)).bytes == np.zeros((3, 5), storage).nbytes
    assert [dtype.is_float, dtype.is_int, dtype is DType.bool].count(True) == 1


@pytest.mark.parametrize(("shape", "expected"), [((), 2), ((1,), 2), ((2,), 3), ((3,), 5), ((2, 64, 128), 24576), ((0, 7), 0)])
def test_twelve_bits_are_packed_and_an_odd_one_rounded_up(shape: tuple[int, ...], expected: int) -> None:
    assert Tensor(DType.e5m6, shape).bytes == expected


def test_ragged_dimensions_count_at_their_bound() -> None:
    rows = Ragged("rows", 4608)
    type = Tensor(DType.bf16, (rows, 7168))
    assert (type.size, type.bytes, bound(rows), type.is_static) == (4608 * 7168, 4608 * 7168 * 2, 4608, False)
    assert str(type) == "bf16[rows<=4608, 7168]"
    assert type == Tensor(DType.bf16, (Ragged("rows", 4608), 7168))
    assert len({type, Tensor(DType.bf16, (Ragged("tokens", 4608), 7168)), Tensor(DType.bf16, (Ragged("rows", 4607), 7168))}) == 3


def test_bundles_add_up() -> None:
    inner = Bundle((Tensor(DType.e5m6, (3,)), Tensor(DType.i32, (2,))))
    outer = Bundle((Tensor(DType.bool, ()), inner, Bundle(())))
    assert outer.bytes == 1 + 5 + 8
    assert [str(t) for t in tensors(outer)] == ["bool[]", "e5m6[3]", "i32[2]"]
    assert str(outer) == "bundle{bool[], bundle{e5m6[3], i32[2]}, bundle{}}"
    assert list(tensors(Tensor(DType.f32, ()))) == [Tensor(DType.f32, ())]


def test_dtypes_are_apart_though_their_sizes_agree() -> None:
    assert len(set(DType)) == len(list(DType)) == 14
    assert Tensor(DType.f16, (2,)) != Tensor(DType.bf16, (2,))


@pytest.mark.parametrize("dim", [-1, Ragged("rows", -1)])
def test_a_negative_dimension_is_refused(dim: int | Ragged) -> None:
    with pytest.raises(DscError, match=r"^a dimension is 0 or more, found f32\[2, (rows<=)?-1\]$"):
        Tensor(DType.f32, (2, dim))
