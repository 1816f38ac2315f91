"""Matrix products. Products are summed in float32, the result is rounded once."""

from __future__ import annotations

from math import prod

from ..core import Op, Value, op
from ..errors import require
from ..types import DType, Tensor, Type, bound
from .rules import broadcast, require_float, require_int


@op("matmul")
class Matmul(Op):
    """c[..., m, n] = sum_k a[..., m, k] b[..., k, n]; with transpose_b, b is [..., n, k] as a Linear's weight is.

    Leading dimensions broadcast; a and b have one dtype, and the result has it too unless `out` is given.
    """

    a: Value
    b: Value
    transpose_b: bool = False
    out: DType | None = None

    def infer(self) -> tuple[Type, ...]:
        a, b = self.a.tensor, self.b.tensor
        require_float(self.a, self.b)
        require(a.rank >= 2 and b.rank >= 2, f"expected matrices, found {a} and {b}")
        require(a.dtype is b.dtype, f"dtypes differ: {a} and {b}")
        k, n = reversed(b.shape[-2:]) if self.transpose_b else b.shape[-2:]
        require(a.shape[-1] == k, f"inner dimensions differ: a is {a}, so k = {a.shape[-1]}, but b is {b}, so k = {k}")
        return (Tensor(self.out or a.dtype, (*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], n)),)

    def flops(self) -> int:
        return 2 * prod(map(bound, self.result.shape)) * bound(self.a.shape[-1])


@op("grouped_matmul")
class GroupedMatmul(Op):
    """Row r of x[R, K] times the matrix of its group: w[E, K, N], or [E, N, K] with transpose_b, gives [R, N].

    The first counts[0] rows are group 0, the next counts[1] rows group 1, ...; rows past the sum of the counts give 0.
    """

    x: Value
    w: Value
    counts: Value
    transpose_b: bool = False

    def infer(self) -> tuple[Type, ...]:
        x, w = self.x.tensor, self.w.tensor
        require_float(self.x, self.w)
        require_int(self.counts)
        require(x.rank == 2 and w.rank == 3, f"expected x [R, K] and w of rank 3, found {x} and {w}")
        require(x.dtype is w.dtype, f"dtypes differ: {x} and {w}")
        k, n = reversed(w.shape[1:]) if self.transpose_b else w.shape[1:]
        require(x.shape[1] == k, f"inner dimensions differ: x is {x}, so k = {x.shape[1]}, but w is {w}, so k = {k}")
        require(self.counts.shape == w.shape[:1], f"counts are {self.counts.type}, expected one for each of {w.shape[0]} groups")
        return (Tensor(x.dtype, (x.shape[0], n)),)

    def flops(self) -> int:
        return 2 * self.result.tensor.size * bound(self.x.shape[1])


@op("grouped_matmul_wgrad")
class GroupedMatmulWgrad(Op):
    """For each group e the product of its rows, c[e, m, n] = sum over rows r of group e of a[r, m] b[r, n].

    a[R, M], b[R, N] give [E, M, N]: the gradient of `grouped_matmul` by w[E, N, K] with a = dy and b = x, by w[E, K, N] with the
    two exchanged. Groups are as in `grouped_matmul`; rows past the sum of the counts do not count, and an empty group gives 0.
    """

    a: Value
    b: Value
    counts: Value
    out: DType = DType.f32

    def infer(self) -> tuple[Type, ...]:
        a, b = self.a.tensor, self.b.tensor
        require_float(self.a, self.b)
        require_int(self.counts)
        require(a.rank == b.rank == 2 and a.shape[0] == b.shape[0], f"expected a [R, M] and b [R, N], found {a} and {b}")
        require(a.dtype is b.dtype, f"dtypes differ: {a} and {b}")
        require(self.counts.tensor.rank == 1, f"counts are {self.counts.type}, expected one number for each group")
        return (Tensor(self.out, (self.counts.shape[0], a.shape[1], b.shape[1])),)

    def flops(self) -> int:
        return 2 * self.a.tensor.size * bound(self.b.shape[1])
