"""Rules of the losses, which are means: a rank's mean counts as much as it has tokens, or sequences, of the whole."""

from __future__ import annotations

from ...ir.core import Value
from ...ir.ops.collective import AllReduce
from ...ir.ops.control import Literal
from ...ir.ops.elementwise import Cast, Div, Gt, Mul, Ne, Where
from ...ir.ops.loss import BalanceLoss, BalanceLossBackward, CrossEntropy, CrossEntropyBackward
from ...ir.ops.reduce import Sum
from ...ir.types import DType, bound
from .body import Body, sharding
from .layout import Dim, Factor, Layout, axes, canonical, whole
from .rules import keep


@sharding(CrossEntropy)
def cross_entropy(body: Body, op: CrossEntropy) -> None:
    """loss = sum over ranks of (their tokens with a label / all such tokens) * their mean. A rank without one has no mean, and adds 0."""
    tokens = body.dims(op.labels)[0] if axes(body.dims(op.labels)[0]) else body.dims(op.logits)[0]
    made = body.emit(op.copy(**_of_tokens(body, op, tokens)))
    if not axes(tokens):
        keep(body, op, made, Layout(()))
        return
    counted, share = _share(body, made.labels, op.ignore, tokens)
    own = body.emit(Where(body.emit(Gt(counted, body.number(0))).result, made.result, body.number(0))).result
    keep(body, op, body.emit(Mul(own, share, names=(op.result.name,))), Layout((), frozenset(axes(tokens))))


@sharding(CrossEntropyBackward)
def cross_entropy_backward(body: Body, op: CrossEntropyBackward) -> None:
    tokens = body.dims(op.logits)[0]
    given = _of_tokens(body, op, tokens)
    dloss = body.whole(op.dloss)
    if axes(tokens):
        dloss = body.emit(Mul(dloss, _share(body, given["labels"], op.ignore, tokens)[1])).result
    keep(body, op, body.emit(op.copy(dloss=dloss, **given)), Layout((tokens, *whole(op.logits.shape[1:]).dims)))


def _of_tokens(body: Body, op: CrossEntropy | CrossEntropyBackward, tokens: Dim) -> dict[str, Value]:
    logits = body.get(op.logits, Layout((tokens, *whole(op.logits.shape[1:]).dims)))
    return {"logits": logits, "labels": body.get(op.labels, Layout((tokens,)))}


def _share(body: Body, labels: Value, ignore: int, tokens: Dim) -> tuple[Value, Value]:
    """How many labels count on this rank, and which share of all that is."""
    ignored = body.emit(Literal((ignore,), (), labels.dtype)).result
    counts = body.emit(Cast(body.emit(Ne(labels, ignored)).result, DType.f32)).result
    counted = body.emit(Sum(counts, (0,), names=("counted",))).result
    every = counted
    for axis in ["stage"] if axes(tokens) == {"dp", "tp"} else sorted(axes(tokens)):
        every = body.emit(AllReduce(every, axis, body.size(axis))).result
    return counted, body.emit(Div(counted, every, names=("share",))).result


@sharding(BalanceLoss)
def balance_loss(body: Body, op: BalanceLoss) -> None:
    """Sequences are whole on a rank, and every rank has as many."""
    tokens, ranks = _sequences(body, op)
    logits, ids = (body.get(v, Layout((tokens, *whole(v.shape[1:]).dims))) for v in (op.logits, op.ids))
    made = body.emit(op.copy(logits=logits, ids=ids, sequences=op.sequences // ranks))
    if ranks == 1:
        keep(body, op, made, Layout(()))
        return
    share = body.emit(Mul(made.result, body.number(1 / ranks), names=(op.result.name,)))
    keep(body, op, share, Layout((), frozenset({"dp"})))


@sharding(BalanceLossBackward)
def balance_loss_backward(body: Body, op: BalanceLossBackward) -> None:
    tokens, ranks = _sequences(body, op)
    dloss = body.whole(op.dloss)
    if ranks > 1:
        dloss = body.emit(Mul(dloss, body.number(1 / ranks))).result
    logits, ids = (body.get(v, Layout((tokens, *whole(v.shape[1:]).dims))) for v in (op.logits, op.ids))
    made = op.copy(logits=logits, ids=ids, dloss=dloss, sequences=op.sequences // ranks)
    keep(body, op, body.emit(made), Layout((tokens, *whole(op.logits.shape[1:]).dims)))


def _sequences(body: Body, op: BalanceLoss | BalanceLossBackward) -> tuple[Dim, int]:
    """Tokens by whole sequences, and over how many ranks these are spread."""
    ranks = body.size("dp") if op.sequences % body.size("dp") == 0 else 1
    return canonical([Factor(ranks, "dp"), Factor(bound(op.logits.shape[0]) // ranks)]), ranks
