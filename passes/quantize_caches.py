"""What forward keeps for backward, in fewer bits (DeepSeek-V3 report, sections 3.3.3 and 3.5).

A residual that only quantised products read again is kept as FP8 codes and scales, and backward tiles it anew along tokens. Of SwiGLU the
inputs are kept, in FP8, and backward computes its result from them again. The result of attention, which both the Wgrad of the next
Linear and the backward of attention read, is kept in a format of its own, in the rows that this Linear reads, and so one kernel casts it
for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from ..ir.core import Func, Module, Op, Phase, Value
from ..ir.ops.attention import Attention, AttentionBackward
from ..ir.ops.control import Pack, Unpack
from ..ir.ops.elementwise import SwiGLU, SwiGLUBackward
from ..ir.ops.quant import Dequantize, Quantize, scale_shape
from ..ir.ops.rules import static
from ..ir.ops.shape import Reshape, Transpose
from ..ir.types import Bundle, DType, Tensor, Type
from .bundles import Link, links, packed, retyped, unpacked
from .outline import is_free
from .pairs import Pair, carried_out, pairs
from .recipe import Quantization, Recipe
from .rewrite import Replacements, fresh

Decline = Callable[[Func, Op, str], None]


@dataclass(frozen=True)
class _Form:
    """How a residual is kept."""

    codes: Tensor
    scales: Tensor
    tile: tuple[int, int]
    made: Quantization | None
    """How forward makes it; None where the value was sent in this form already."""
    heads: tuple[int, ...] = ()
    """The shape [..., heads, tokens, width] of a result of attention, which is kept as rows [..., tokens, heads * width]."""


@dataclass
class _Edits:
    """What changes in one function: fields of bundles that it takes and that it gives."""

    taken: dict[Unpack, dict[int, _Form]] = field(default_factory=dict)
    given: dict[Pack, dict[int, _Form]] = field(default_factory=dict)


def cache_residuals(module: Module, recipe: Recipe, decline: Decline) -> Module:
    """`module` with residuals kept as the recipe says. Programs of one function keep theirs as they are: nothing travels in a bundle."""
    every = links(module)
    edits = {func.name: _Edits() for func in module.funcs}
    for name, result in dict.fromkeys((link.source, link.result) for link in every):
        owner = module[name].results[result].owner
        if not isinstance(owner, Pack) or owner.phase is not Phase.F:
            continue  # what backward hands on to backward is no residual
        for index, value in enumerate(owner.values):
            if not isinstance(value.type, Tensor) or not value.dtype.is_float:
                continue
            readers = list(_readers(module, every, name, result, index, edits, None))
            form = _form(value, readers, recipe)
            if isinstance(form, _Form):
                list(_readers(module, every, name, result, index, edits, form))
            elif form and value.owner:
                decline(module[name], value.owner, form)
    changed = module.map(lambda func: _rewritten(func, edits[func.name]))
    return module if changed is module else retyped(changed)


def without_swiglu(module: Module) -> Module:
    """`module` with the inputs of every SwiGLU kept in place of its result, which backward computes again from what they are kept as."""
    found = pairs(module)
    return carried_out(module, found, {pair.forward.name: _inputs_of_swiglu(pair) for pair in found})


def _inputs_of_swiglu(pair: Pair) -> set[Value]:
    again = {value.owner for value in pair.needed if isinstance(value.owner, SwiGLU)}
    return {v for v in pair.needed if v.owner not in again} | {v for op in again if op for v in op.operands}


def _readers(
    module: Module, every: tuple[Link, ...], source: str, result: int, index: int, edits: dict[str, _Edits], form: _Form | None
) -> Iterator[Op]:
    """Every op that reads field `index` of a bundle, in whatever function and through views; with `form`, note that it arrives so."""
    for link in every:
        if (link.source, link.result) != (source, result):
            continue
        pack, unpack = packed(module, link), unpacked(module, link)
        if form and pack:
            edits[source].given.setdefault(pack, {})[index] = form
        if unpack is None:
            continue
        if form:
            edits[link.target].taken.setdefault(unpack, {})[index] = form
        target = module[link.target]
        seen = {unpack.results[index]}
        for op in target.ops:
            if seen.isdisjoint(op.operands):
                continue
            if isinstance(op, Pack) and op.result in target.results:
                at = target.results.index(op.result)
                for k in (k for k, v in enumerate(op.values) if v in seen):
                    yield from _readers(module, every, link.target, at, k, edits, form)
            elif is_free(op):
                seen.update(op.results)
            else:
                yield op


def _form(value: Value, readers: list[Op], recipe: Recipe) -> _Form | str | None:
    """How `value` is kept; a reason where it stays as it is though a quantised product reads it; None where none does."""
    products = [op for op in readers if isinstance(op, Quantize)]
    if isinstance(value.owner, Attention) and all(isinstance(op, Quantize | AttentionBackward) for op in readers):
        chosen = recipe.cache_attention if products else None
    elif readers and all(isinstance(op, SwiGLU | SwiGLUBackward) for op in readers):
        chosen = recipe.cache_swiglu
    elif readers and len(products) == len(readers):
        chosen = recipe.cache_linear
        if chosen and isinstance(value.owner, Dequantize):  # what was sent to the experts is in FP8 already
            sent = value.owner
            return _Form(sent.codes.tensor, sent.scales.tensor, sent.tile, None)
    else:
        others = next((op for op in readers if not isinstance(op, Quantize)), None)
        return f"its residual stays in {value.dtype}: {others.name} {others.id} reads it too" if products and others else None
    if chosen is None:
        return None
    shape, heads = value.shape, tuple[int, ...]()
    if isinstance(value.owner, Attention):
        *batch, number, tokens, width = heads = static(value, "attention")
        shape = (*batch, tokens, number * width)
    tile = shape[-2:] if chosen.tile == (0, 0) else chosen.tile
    scales = Tensor(DType.f32, scale_shape(shape, tile, 0))  # type: ignore[arg-type]
    return _Form(Tensor(chosen.format, shape), scales, tile, chosen, heads)  # type: ignore[arg-type]


def _swapped(heads: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation between [..., heads, tokens, width] and [..., tokens, heads, width]."""
    *batch, number, tokens, width = range(len(heads))
    return *batch, tokens, number, width


def _rewritten(func: Func, edits: _Edits) -> Func:
    """`func` with codes and scales in place of some fields: quantised after they are made, dequantised before they are read."""
    if not edits.taken and not edits.given:
        return func
    values = Replacements()
    codes: dict[Value, tuple[Value, Value]] = {}
    wide: dict[Value, _Form] = {}
    forms = {pack.values[i]: form for pack, fields in edits.given.items() for i, form in fields.items()}
    again = {_key(op): op for op in func.ops if isinstance(op, Quantize) and op.counts is None}
    taken = {op.id for op in func.ops}
    ops: list[Op] = []

    def emit(op: Op, like: Op) -> tuple[Value, ...]:
        ops.append(op.copy(id=fresh(like.id, taken), phase=like.phase))
        return ops[-1].results

    def quantized(value: Value, like: Op) -> None:
        form = forms.get(value)
        if form is None or value in codes or form.made is None:
            return
        same = again.get((value, form.tile, form.made.format, form.made.rule))
        if same is None:
            x = values[value]
            if form.heads:
                (turned,) = emit(Transpose(x, _swapped(form.heads)), like)
                (x,) = emit(Reshape(turned, form.codes.shape), like)  # type: ignore[arg-type]
            names = (f"{value.name}_c", f"{value.name}_cs")
            q, s = emit(Quantize(x, tile=form.tile, dtype=form.made.format, rule=form.made.rule, names=names), like)
            codes[value] = q, s

    params = []
    for param in func.params:
        unpack = next((op for op in edits.taken if op.x is param), None)
        params.append(Value(_bundle(unpack, edits.taken[unpack]), param.name) if unpack else param)
        values[param] = params[-1]
        quantized(param, func.ops[0])
    for old in func.ops:
        if isinstance(old, Unpack) and old in edits.taken:
            forms_here = edits.taken[old]
            names = [n for i, r in enumerate(old.results) for n in ((f"{r.name}_c", f"{r.name}_cs") if i in forms_here else (r.name,))]
            ops.append(Unpack(values[old.x], id=old.id, phase=old.phase, names=tuple(names)))
            fields = iter(ops[-1].results)
            for i, r in enumerate(old.results):
                if i in forms_here:
                    codes[r], wide[r] = (next(fields), next(fields)), forms_here[i]
                else:
                    values[r] = next(fields)
            continue
        if isinstance(old, Pack) and old in edits.given:
            found: list[Value] = []
            for i, v in enumerate(old.values):
                found += _kept(v, edits.given[old].get(i), codes, again, values)
            ops.append(Pack(tuple(found), id=old.id, phase=old.phase, names=(old.result.name,)))
        else:
            for v in old.operands:
                if v in wide and v not in values:
                    form = wide[v]
                    (x,) = emit(Dequantize(*codes[v], tile=form.tile, dtype=v.dtype, names=(v.name,)), old)
                    if form.heads:
                        swapped = _swapped(form.heads)
                        (rows,) = emit(Reshape(x, tuple(form.heads[axis] for axis in swapped)), old)
                        (x,) = emit(Transpose(rows, swapped), old)
                    values[v] = x
            ops.append(old.with_operands(values.__getitem__))
        values.update(zip(old.results, ops[-1].results, strict=True))
        for r in old.results:
            quantized(r, old)
    return replace(func, params=tuple(params), ops=tuple(ops), results=tuple(values[r] for r in func.results))


def _key(op: Quantize) -> tuple[object, ...]:
    return op.x, op.tile, op.dtype, op.rule


def _kept(
    value: Value,
    form: _Form | None,
    codes: dict[Value, tuple[Value, Value]],
    again: dict[tuple[object, ...], Quantize],
    values: Replacements,
) -> tuple[Value, ...]:
    """The fields of a bundle that hold `value`."""
    if form is None:
        return (values[value],)
    if value in codes:
        return codes[value]
    if form.made:  # a product quantises it in the same way
        found: Op = again[value, form.tile, form.made.format, form.made.rule]
        first, second = found.results
    else:
        assert isinstance(value.owner, Dequantize)
        first, second = value.owner.codes, value.owner.scales
    return values[first], values[second]


def _bundle(unpack: Unpack, forms: dict[int, _Form]) -> Bundle:
    """The type of a bundle with codes and scales in place of some fields."""
    fields: list[Type] = []
    for i, result in enumerate(unpack.results):
        fields += [forms[i].codes, forms[i].scales] if i in forms else [result.type]
    return Bundle(tuple(fields))
