"""Rules of ops that compute along no dimension that is spread, or add up along it. What has no rule here runs on whole values."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeAlias

from ...ir.core import Op, Symbol, Trait, Value
from ...ir.errors import require
from ...ir.ops.attention import Attention, AttentionBackward, AttentionDecode
from ...ir.ops.control import Call, Constant, Iota, Literal, Pack, Param, Unpack
from ...ir.ops.elementwise import Add, Cast, Div, Mul, Neg, Sub
from ...ir.ops.norm import RmsNorm, RmsNormBackward, Rope
from ...ir.ops.reduce import ArgMax, CumSum, Histogram, LogSoftmax, Max, Mean, Min, Softmax, Sort, Sum, TopK
from ...ir.ops.shape import Broadcast, CacheAppend, Concat, Gather, IndexAdd, Pad, Reshape, Slice, Take, Transpose
from ...ir.types import bound
from .body import Body, Rule, sharding
from .layout import Dim, Factor, Layout, Rows, axes, canonical, factors, gathered, local_type, reshaped, whole
from .tiles import cuts_blocks

Dims: TypeAlias = tuple[Dim, ...]

HEADS = {"q_proj": 0, "q_b_proj": 0, "k_proj": 0, "v_proj": 0, "kv_b_proj": 0, "o_proj": 1}
"""Projections of heads, and the dimension of their weights along which the heads lie: it is cut along tp.

The down projections of MLA make what all heads share: every rank has them whole, and applies them to its own tokens.
"""


def default(op: Op) -> Rule:
    """The rule of an op that has none of its own."""
    return elementwise if Trait.ELEMENTWISE in op.traits else on_whole


def on_whole(body: Body, op: Op) -> None:
    """Every rank does all of it."""
    keep(body, op, body.emit(op.with_operands(body.whole)), *(whole(r.shape) for r in op.results))


def keep(body: Body, op: Op, made: Op, *layouts: Layout) -> None:
    """The results of `made`, which stands for `op`, are where `layouts` say."""
    for value, result, layout in zip(op.results, made.results, layouts, strict=True):
        body.set(value, layout, result)


def joined(body: Body, values: Sequence[Value], shape: Sequence[object]) -> Dims:
    """Dimensions of a result to which operands are stretched: spread as the first operand that is."""
    dims: list[Dim] = []
    used: set[str] = set()
    for i, extent in enumerate(shape):
        offers = [body.dims(v)[i - len(shape)] for v in values if v.tensor.rank >= len(shape) - i and v.shape[i - len(shape)] == extent]
        chosen = next((d for d in offers if isinstance(d, Rows) or (axes(d) and not axes(d) & used)), None)
        dims.append(chosen if chosen is not None else canonical([Factor(bound(extent))]))  # type: ignore[arg-type]
        used |= axes(dims[-1])
    return tuple(dims)


def stretched(value: Value, dims: Dims, shape: Sequence[object]) -> Dims:
    """The dimensions of an operand that is stretched to a result: of extent 1 it is nowhere spread."""
    own = dims[len(dims) - value.tensor.rank :]
    return tuple(d if e == s else () for e, s, d in zip(value.shape, shape[len(shape) - value.tensor.rank :], own, strict=True))


def elementwise(body: Body, op: Op) -> None:
    """Sums and scalings of partial values stay partial."""
    shape = op.results[0].shape
    dims = joined(body, op.operands, shape)
    partial = _linear(body, op)

    def operand(v: Value) -> Value:
        return body.get(v, Layout(stretched(v, dims, shape), partial & body.layout(v).partial))

    made = body.emit(op.with_operands(operand))
    for result, new in zip(op.results, made.results, strict=True):
        body.set(result, Layout(dims, partial), new)


def _linear(body: Body, op: Op) -> frozenset[str]:
    """Along which axes the result is a sum of what ranks get from their own operands."""
    parts = [body.layout(v).partial for v in op.operands]
    match op:
        case Add() | Sub() | Concat():
            return frozenset.intersection(*parts)
        case Neg() | Reshape() | Transpose() | Broadcast() | Slice() | Sum() | Mean():
            return parts[0]
        case Cast(dtype=dtype, x=x) if dtype.is_float and x.dtype.is_float and dtype.bits > x.dtype.bits:
            return parts[0]
        case Pad(value=0.0):
            return parts[0]
        case Mul() if not parts[0] or not parts[1]:
            return parts[0] | parts[1]
        case Div() if not parts[1]:
            return parts[0]
    return frozenset()


@sharding(Param)
def param(body: Body, op: Param) -> None:
    """Experts lie along ep, heads along tp; anything else is whole on every rank."""
    shape, shard, dims = op.result.shape, [""] * op.result.tensor.rank, list(whole(op.result.shape).dims)
    name = next((part for part in op.path.split(".")[::-1] if part in HEADS), "")
    dim, axis = (0, "ep") if op.path in body.experts else (HEADS.get(name, 0), "tp" if name and op.result.tensor.rank > HEADS[name] else "")
    if axis and (size := body.size(axis)) > 1 and not cuts_blocks(body, op, dim, axis):
        extent = bound(shape[dim])
        require(extent % size == 0, f"{op.path} is {op.result.type}: dimension {dim} does not make {size} equal parts along {axis}")
        shard[dim], dims[dim] = axis, canonical([Factor(size, axis), Factor(extent // size)])
    while shard and not shard[-1]:
        shard.pop()
    layout = Layout(tuple(dims))
    made = body.emit(op.copy(result_types=(local_type(op.result.type, layout),), shard=tuple(shard)))
    keep(body, op, made, layout)


@sharding(Literal, Iota, Constant)
def source(body: Body, op: Op) -> None:
    keep(body, op, body.emit(op), *(whole(r.shape) for r in op.results))


@sharding(Pack)
def pack(body: Body, op: Pack) -> None:
    """A bundle's fields are where they are."""
    made = body.emit(op.with_operands(body.form))
    body.set(op.result, tuple(body.layouts[v] for v in op.values), made.result)


@sharding(Unpack)
def unpack(body: Body, op: Unpack) -> None:
    placements = body.layouts[op.x]
    made = body.emit(op.with_operands(body.form))
    assert isinstance(placements, tuple)
    for value, placement, new in zip(op.results, placements, made.results, strict=True):
        body.set(value, placement, new)


@sharding(Call)
def call(body: Body, op: Call) -> None:
    """The function is made for where its arguments are."""
    name, placements = body.lower(op.callee, tuple(body.layouts[v] for v in op.args))
    types = tuple(local_type(r.type, p) for r, p in zip(op.results, placements, strict=True))
    made = body.emit(op.copy(callee=Symbol(name), args=tuple(map(body.form, op.args)), result_types=types))
    for value, placement, new in zip(op.results, placements, made.results, strict=True):
        body.set(value, placement, new)


def _one(body: Body, op: Op, x: Value, have: Layout, result: Layout, **changes: object) -> None:
    partial = _linear(body, op)
    made = body.emit(op.copy(x=body.get(x, Layout(have.dims, partial)), **changes))
    keep(body, op, made, *(Layout(result.dims, partial) for _ in op.results))


@sharding(Reshape)
def reshape(body: Body, op: Reshape) -> None:
    have = body.layout(op.x)
    after = reshaped(have, op.shape)
    if after is None:
        have = have.without(set(have.places()))
        after = whole(op.shape)
    _one(body, op, op.x, have, after, shape=after.shape)


@sharding(Transpose)
def transpose(body: Body, op: Transpose) -> None:
    have = body.layout(op.x)
    _one(body, op, op.x, have, Layout(tuple(have.dims[p] for p in op.perm)))


@sharding(Broadcast)
def broadcast(body: Body, op: Broadcast) -> None:
    dims = joined(body, [op.x], op.shape)
    _one(body, op, op.x, Layout(stretched(op.x, dims, op.shape)), Layout(dims), shape=Layout(dims).shape)


@sharding(Slice, Pad, CumSum, Softmax, LogSoftmax, Sort, TopK, ArgMax)
def along(body: Body, op: Op) -> None:
    """What works along a dimension has it whole."""
    (x,) = op.operands
    rank = x.tensor.rank
    padded = {i for i in range(rank) if op.low[i] or op.high[i]} if isinstance(op, Pad) else set()
    touched = padded if isinstance(op, Pad) else {op.attributes["axis"] % rank}
    have = Layout(tuple(gathered(d, axes(d)) if i in touched else d for i, d in enumerate(body.dims(x))))
    dropped = isinstance(op, ArgMax) and not op.keepdims
    dims = [d if i not in touched else whole(op.result.shape).dims[i] if not dropped else None for i, d in enumerate(have.dims)]
    _one(body, op, x, have, Layout(tuple(d for d in dims if d is not None)))


@sharding(Sum, Mean)
def total(body: Body, op: Sum | Mean) -> None:
    """Added up over a spread dimension it is partial; a mean is divided by how many parts there are."""
    have, rank = body.layout(op.x), op.x.tensor.rank
    gone = {a % rank for a in op.axes}
    over = [a for i in gone for a in axes(have.dims[i])]
    partial = _linear(body, op)
    made: Op = body.emit(op.copy(x=body.get(op.x, Layout(have.dims, partial))))
    if isinstance(op, Mean) and over:
        made = body.emit(Mul(made.result, body.number(1 / prod(map(body.size, over)), op.result.dtype), names=(op.result.name,)))
    dims = tuple(() if i in gone else d for i, d in enumerate(have.dims) if i not in gone or op.keepdims)
    keep(body, op, made, Layout(dims, partial | set(over)))


@sharding(Max, Min)
def extreme(body: Body, op: Max | Min) -> None:
    rank = op.x.tensor.rank
    gone = {a % rank for a in op.axes}
    have = Layout(tuple(gathered(d, axes(d)) if i in gone else d for i, d in enumerate(body.dims(op.x))))
    _one(body, op, op.x, have, Layout(tuple(() if i in gone else d for i, d in enumerate(have.dims) if i not in gone or op.keepdims)))


@sharding(Histogram)
def histogram(body: Body, op: Histogram) -> None:
    have = body.layout(op.x).summed()
    keep(body, op, body.emit(op.copy(x=body.get(op.x, have))), Layout(whole(op.result.shape).dims, frozenset(have.places())))


@sharding(Concat)
def concat(body: Body, op: Concat) -> None:
    axis = op.axis % op.result.tensor.rank
    shape = [d if i != axis else None for i, d in enumerate(op.xs[0].shape)]
    dims = list(joined(body, op.xs, [0 if d is None else d for d in shape]))
    partial = _linear(body, op)

    def operand(v: Value) -> Value:
        return body.get(v, Layout((*dims[:axis], *whole(v.shape[axis : axis + 1]).dims, *dims[axis + 1 :]), partial))

    made = body.emit(op.with_operands(operand))
    keep(body, op, made, Layout((*dims[:axis], *whole(op.result.shape[axis : axis + 1]).dims, *dims[axis + 1 :]), partial))


@sharding(Take)
def take(body: Body, op: Take) -> None:
    """Rows of a table that is whole along them."""
    axis = op.axis % op.x.tensor.rank
    table, where = list(body.dims(op.x)), body.layout(op.indices).summed()
    used = set(where.places())
    table = [gathered(d, axes(d) if i == axis else used) for i, d in enumerate(table)]
    made = body.emit(op.copy(x=body.get(op.x, Layout(tuple(table))), indices=body.get(op.indices, where)))
    keep(body, op, made, Layout((*table[:axis], *where.dims, *table[axis + 1 :])))


@sharding(Gather)
def gather(body: Body, op: Gather) -> None:
    """Elements of a value that is whole along the axis; outside it both lie alike."""
    axis = op.axis % op.x.tensor.rank
    dims = joined(body, [op.indices, op.x], [0 if i == axis else d for i, d in enumerate(op.x.shape)])
    have, at = (Layout((*dims[:axis], *whole(v.shape[axis : axis + 1]).dims, *dims[axis + 1 :])) for v in (op.x, op.indices))
    keep(body, op, body.emit(op.copy(x=body.get(op.x, have), indices=body.get(op.indices, at))), at)


@sharding(IndexAdd)
def index_add(body: Body, op: IndexAdd) -> None:
    """Onto zeros, the rows of one rank give a part of the sum."""
    zeros = isinstance(op.x.owner, Literal) and op.x.owner.values == (0.0,)
    rows = joined(body, [op.indices, op.updates], op.indices.shape) if zeros else whole(op.indices.shape).dims
    if zeros and (found := factors(body.dims(op.updates)[0])):
        rows = (found,)
    own = Layout((*rows, *whole(op.x.shape[1:]).dims))
    made = body.emit(op.copy(x=body.whole(op.x), indices=body.get(op.indices, Layout(rows)), updates=body.get(op.updates, own)))
    keep(body, op, made, Layout(whole(op.x.shape).dims, frozenset(own.places())))


@sharding(CacheAppend)
def cache_append(body: Body, op: CacheAppend) -> None:
    """Sequences lie as those of the cache."""
    have = Layout((body.dims(op.cache)[0], *whole(op.cache.shape[1:]).dims))
    new = Layout((have.dims[0], *have.dims[2:]))
    made = op.copy(cache=body.get(op.cache, have), new=body.get(op.new, new), positions=body.get(op.positions, Layout(have.dims[:1])))
    keep(body, op, body.emit(made), have)


@sharding(RmsNorm)
def rms_norm(body: Body, op: RmsNorm) -> None:
    have = _rows_of(body, op.x)
    keep(body, op, body.emit(op.copy(x=body.get(op.x, have), weight=body.whole(op.weight))), have)


@sharding(RmsNormBackward)
def rms_norm_backward(body: Body, op: RmsNormBackward) -> None:
    """The gradient of the weight is a sum over all tokens."""
    have = _rows_of(body, op.x)
    made = body.emit(op.copy(x=body.get(op.x, have), weight=body.whole(op.weight), dy=body.get(op.dy, have)))
    keep(body, op, made, have, Layout(whole(op.weight.shape).dims, frozenset(have.places())))


def _rows_of(body: Body, x: Value) -> Layout:
    dims = body.dims(x)
    return Layout((*dims[:-1], gathered(dims[-1], axes(dims[-1]))))


@sharding(Rope)
def rope(body: Body, op: Rope) -> None:
    """Linear in x: a partial x stays so. The table has the positions of the rank."""
    have = _rows_of(body, op.x)
    partial = body.layout(op.x).partial
    *outer, _heads, _pairs = have.dims
    table = Layout((*stretched_to(op.cos, outer), *whole(op.cos.shape[-1:]).dims))
    made = op.copy(x=body.get(op.x, Layout(have.dims, partial)), cos=body.get(op.cos, table), sin=body.get(op.sin, table))
    keep(body, op, body.emit(made), Layout(have.dims, partial))


def stretched_to(table: Value, dims: Sequence[Dim]) -> Dims:
    """How the leading dimensions of `table` lie beside `dims`, to which they are stretched."""
    lead = table.shape[:-1]
    return tuple(d if e != 1 else () for e, d in zip(lead, dims[len(dims) - len(lead) :], strict=True))


@sharding(Attention, AttentionBackward)
def attention(body: Body, op: Attention | AttentionBackward) -> None:
    """Sequences and heads may be spread, positions not."""
    outer = op.q.shape[:-2]
    lead = joined(body, [op.q, op.k, op.v], [*outer, 0, 0])[: len(outer)]

    def operand(v: Value) -> Value:
        if v is op.mask and v.dtype.is_int:  # boundaries of documents, the same for every sequence
            return body.get(v, whole(v.shape))
        if v is op.mask:  # stretched to the scores
            return body.get(v, Layout(stretched(v, (*lead, *whole(v.shape[-2:]).dims), (*outer, *v.shape[-2:]))))
        return body.get(v, Layout((*lead_of(v), *whole(v.shape[-2:]).dims)))

    def lead_of(v: Value) -> Dims:
        """Fewer key heads than query heads are spread likewise."""
        return tuple(_fewer(d, e, v.shape[i]) for i, (d, e) in enumerate(zip(lead, outer, strict=True)))

    made = body.emit(op.with_operands(operand))
    keep(body, op, made, *(Layout((*lead_of(r), *whole(r.shape[-2:]).dims)) for r in op.results))


def _fewer(dim: Dim, extent: object, own: object) -> Dim:
    if extent == own:
        return dim
    spread = [f for f in factors(dim) if f.axis]
    count = prod(f.size for f in spread)
    require(bound(own) % count == 0, f"{own} key heads do not make {count} equal parts")  # type: ignore[arg-type]
    return canonical([*spread, Factor(bound(own) // count)])  # type: ignore[arg-type]


@sharding(AttentionDecode)
def attention_decode(body: Body, op: AttentionDecode) -> None:
    """The latents of a sequence are where its cache is; heads may be spread."""
    require(op.pages is None, "a paged cache is one pool for all sequences: it is not spread over ranks")
    sequences, heads = body.dims(op.k)[0], body.dims(op.q)[1]
    keys = sequences, *whole(op.k.shape[1:2]).dims, _kv_heads(heads, op), *whole(op.k.shape[3:]).dims
    values = (*keys[:3], *whole(op.v.shape[3:]).dims)
    made = op.copy(
        q=body.get(op.q, Layout((sequences, heads, *whole(op.q.shape[2:]).dims))),
        k=body.get(op.k, Layout(keys)),
        v=body.get(op.v, Layout(values)),
        positions=body.get(op.positions, Layout((sequences,))),
    )
    keep(body, op, body.emit(made), Layout((sequences, heads, *whole(op.result.shape[2:]).dims)))


def _kv_heads(heads: Dim, op: AttentionDecode) -> Dim:
    return () if op.k.shape[2] == 1 else _fewer(heads, op.q.shape[1], op.k.shape[2])
