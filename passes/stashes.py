"""What backward for inputs hands on to backward for weights, in the form in which the latter reads it.

A gradient that only products for weights read again, quantised down its columns, is quantised where it is made: one kernel then reads
it for both products (DeepSeek-V3 report, section 3.5.2), and what waits for the second takes half the bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from ..ir.core import Func, Module, Op, Phase, Value, users
from ..ir.ops.control import Pack, Unpack
from ..ir.ops.shape import Reshape
from ..ir.region import downward
from .bundles import links, packed, retyped, unpacked
from .rewrite import Replacements


def quantized_stashes(module: Module) -> Module:
    """`module` with quantisations of stashed gradients where they are stashed. Bundles that take several ways stay as they are."""
    every = links(module)
    ways = Counter(end for link in every for end in ((link.source, link.result), (link.target, -1 - link.param)))
    changed: dict[str, Func] = {}
    for link in every:
        pack, unpack = packed(module, link), unpacked(module, link)
        alone = ways[link.source, link.result] == ways[link.target, -1 - link.param] == 1
        if alone and pack and unpack and (pack.phase, unpack.phase) == (Phase.I, Phase.W):
            source, target = (changed.get(name, module[name]) for name in (link.source, link.target))
            changed |= {link.source: source, link.target: target} | _moved(source, target, pack, unpack)
    if not changed:
        return module
    return retyped(module.map(lambda func: changed.get(func.name, func)))


def _moved(source: Func, target: Func, pack: Pack, unpack: Unpack) -> dict[str, Func]:
    """Both functions, each field that can be quantised before it travels."""
    readers = users(target)
    here = dict(zip(unpack.results, pack.values, strict=True))
    there = {op.id: op for op in source.ops if isinstance(op, Reshape)}
    made: list[Op] = []
    gone: set[Op] = set()
    fields: list[tuple[Value, Value]] = []
    """Of the new bundle: what is packed, and what the target knows it as."""
    for field, value in zip(unpack.results, pack.values, strict=True):
        chain = _chain(field, target, here)
        if not chain:
            fields.append((value, field))
            continue
        for op in chain:
            early = there.get(op.id) or op.with_operands(here.__getitem__).copy(phase=Phase.I)
            made += [] if op.id in there else [early]
            here |= dict(zip(op.results, early.results, strict=True))
        gone |= set(chain)
        left = [v for op in chain for v in op.results if v in target.results or any(u not in chain for u in readers.get(v, []))]
        fields += [(here[v], v) for v in left]
    if not made:
        return {}
    bundle = pack.copy(values=tuple(value for value, _ in fields))
    ops = (*(op for op in source.ops if op is not pack), *made, bundle)
    results = tuple(bundle.result if r is pack.result else r for r in source.results)
    param = Value(bundle.result.type, unpack.x.name)
    opened = unpack.copy(x=param, names=tuple(known.name for _, known in fields))
    return {source.name: replace(source, ops=ops, results=results), target.name: _opened(target, unpack, opened, fields, gone)}


def _chain(field: Value, func: Func, known: Collection[Value]) -> list[Op]:
    """The ops that make of a field what is read of it, where these are but quantisations down its columns; else none."""
    found: list[Op] = []
    wide, quantized = {field}, set[Value]()
    for op in func.ops:
        read = wide.intersection(op.operands)
        if not (read or (downward(op) and not quantized.isdisjoint(op.operands))):
            continue
        if not (isinstance(op, Reshape) or downward(op)) or not all(v in wide or v in quantized or v in known for v in op.operands):
            return []
        found.append(op)
        (wide if isinstance(op, Reshape) else quantized).update(op.results)
    return found if quantized else []


def _opened(func: Func, unpack: Unpack, opened: Unpack, fields: list[tuple[Value, Value]], gone: set[Op]) -> Func:
    """The function on a bundle of other fields, without the ops that are done already."""
    values = Replacements({unpack.x: opened.x} | {known: result for (_, known), result in zip(fields, opened.results, strict=True)})
    ops = tuple(opened if op is unpack else values.moved(op) for op in func.ops if op not in gone)
    return replace(func, params=tuple(values[v] for v in func.params), ops=ops, results=tuple(values[v] for v in func.results))
