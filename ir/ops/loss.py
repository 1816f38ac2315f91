"""Training losses, all f32 scalars, and their gradients."""

from __future__ import annotations

from typing import Literal

from ..core import Op, Value, op
from ..errors import require
from ..types import DType, Tensor, Type
from .rules import require_float, require_int


@op("cross_entropy", work=5)
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


@op("cross_entropy_backward", work=6)
class CrossEntropyBackward(Op):
    """The gradient of `cross_entropy` by the logits, dloss being that of the loss: dloss * (softmax(logits) - onehot(label)) / n.

    n is how many tokens count; the rows of those that do not are 0. logits [T, V], labels i64[T], dloss f32[] -> like logits.
    """

    logits: Value
    labels: Value
    dloss: Value
    ignore: int = -100

    def infer(self) -> tuple[Type, ...]:
        loss = CrossEntropy(self.logits, self.labels, self.ignore).result.type
        require(self.dloss.type == loss, f"dloss is {self.dloss.type}, expected {loss}")
        return (self.logits.type,)


@op("balance_loss", work=5)
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


@op("balance_loss_backward", work=9)
class BalanceLossBackward(Op):
    """The gradient of `balance_loss` by the logits; how often an expert was chosen has none. Like logits, f32[sequences * S, E].

    With s the scores, p_i = s_i / sum_j s_j and df_i = dloss f_i / (S * sequences): dp = df, ds_i = (dp_i - sum_j dp_j p_j) / sum_j s_j
    for sigmoid scores, then times s_i (1 - s_i); for softmax scores p_i (dp_i - sum_j dp_j p_j).
    """

    logits: Value
    ids: Value
    dloss: Value
    sequences: int
    score: Literal["sigmoid", "softmax"] = "sigmoid"

    def infer(self) -> tuple[Type, ...]:
        loss = BalanceLoss(self.logits, self.ids, self.sequences, self.score).result.type
        require(self.dloss.type == loss, f"dloss is {self.dloss.type}, expected {loss}")
        return (self.logits.type,)
