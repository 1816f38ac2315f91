"""Training losses, all f32 scalars."""

from __future__ import annotations

from typing import Literal

from ..core import Op, Value, op
from ..errors import require
from ..types import DType, Tensor, Type
from .rules import require_float, require_int


@op("cross_entropy")
class CrossEntropy(Op):
    """-mean over tokens of log softmax(logits)[label]; tokens whose label is `ignore` do not count. 0 / 0 gives NaN.

    logits [T, V], labels i64[T] -> f32[].
    """

    logits: Value
    labels: Value
    ignore: int = -100

    def infer(self) -> tuple[Type, ...]:
        require_float(self.logits)
        require_int(self.labels)
        matches = self.logits.tensor.rank == 2 and self.labels.shape == self.logits.shape[:1]
        require(matches, f"expected logits [T, V] and labels [T], found {self.logits.type} and {self.labels.type}")
        return (Tensor(DType.f32, ()),)

    def flops(self) -> int:
        return 5 * self.logits.tensor.size


@op("balance_loss")
class BalanceLoss(Op):
    """The sequence-wise balance loss without its factor alpha, averaged over sequences (DeepSeek-V3 report, equations 17 to 20).

    logits f32[sequences * S, E] and ids [sequences * S, k] -> f32[]. Per sequence: sum_i f_i P_i with f_i = E / (k S) *
    (how often i was chosen) and P_i the mean over tokens of s_i / sum_j s_j, s being sigmoid or softmax of the logits.
    """

    logits: Value
    ids: Value
    sequences: int
    score: Literal["sigmoid", "softmax"] = "sigmoid"

    def infer(self) -> tuple[Type, ...]:
        require_int(self.ids)
        logits, ids = self.logits.tensor, self.ids.tensor
        fits = logits.rank == ids.rank == 2 and logits.dtype is DType.f32 and logits.shape[0] == ids.shape[0]
        require(fits, f"expected logits f32[T, E] and ids [T, k], found {logits} and {ids}")
        tokens = logits.shape[0]
        divides = isinstance(tokens, int) and self.sequences > 0 and tokens % self.sequences == 0
        require(divides, f"{tokens} tokens are not {self.sequences} equal sequences")
        return (Tensor(DType.f32, ()),)

    def flops(self) -> int:
        return 5 * self.logits.tensor.size
