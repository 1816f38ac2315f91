"""Triton source of a region, one kernel: what `fuse` gathered, or a single op element by element, for which nobody wrote a kernel.

The source is readable Python, in a file (`generated.py`).

A program holds BLOCK elements of the region's space, ROWS whole rows where something goes along them (strips of WIDTH columns where that is
tiles of a row alone), or a square of TILE x TILE where something goes down columns, and reads each operand once, by the index that
broadcasting gives it. Every value is float32 (or bool) and,
after each op, on the grid of its dtype, as the op's type rule rounds it. What an op is in Triton stands in `expressions.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import inf, isnan, prod
from typing import Any

import numpy as np

from ...ir.core import Func, Op, Value
from ...ir.errors import DscError, require
from ...ir.ops.control import Literal
from ...ir.ops.elementwise import Cast
from ...ir.ops.quant import Dequantize, Quantize
from ...ir.ops.shape import Reshape, Transpose
from ...ir.printer import print_attribute
from ...ir.region import Region, downward, free, member, region_of
from ...ir.types import DType, Ragged
from ..arrays import rounded, widen
from .expressions import ALONG_ROWS, expression
from .generated import load
from .kernels.quantize import rule_constants
from .registry import Declined, Launch, Slot
from .targets import Target
from .tiles import ceil_div, power_of_two, rows_of, warps

BLOCK = 2048
STRIP = 1024
"""Columns of a strip, at least: a whole number of tiles."""

AT = "first + at"
"""Where an element of the space lies in a tensor of its shape: 64 bits once per program, 32 for each element."""

HELPERS = {
    "arithmetic": (
        "exp",
        "larger",
        "narrow",
        "rms_norm",
        "rounded",
        "row_max",
        "row_sum",
        "sigmoid",
        "silu",
        "swiglu_backward",
        "tanh",
        "widen",
    ),
    "groups": ("extents", "rows_of_tile"),
    "kernels.quantize": ("quantize_columns", "quantize_rows"),
}
"""The device functions that generated code calls, by module."""


def lone(op: Op) -> Func | None:
    """A function of one op element by element or along rows, which a kernel can be generated for; None where it cannot."""
    if member(op) or free(op) or (expression(op) is None and not isinstance(op, Cast)):
        return None
    return Func(op.name, tuple(dict.fromkeys(op.operands)), (op,), op.results)


def launch_of(func: Func, target: Target, operands: Sequence[Slot], results: Sequence[Slot]) -> Launch | Declined:
    """The launch of the kernel of a region, on tensors so laid out (contiguous); `Declined` says what is in the way."""
    try:
        for op in func.ops:
            if reason := member(op):
                raise DscError(reason)
        region = region_of(func.ops)
    except DscError as error:
        return Declined(str(error))
    shapes = {v: s.shape for v, s in zip((*func.params, *func.results), (*operands, *results), strict=True)}
    size, columns = prod(_extents(region.space, func, shapes)), (_extents(region.space, func, shapes) or (1,))[-1]
    try:
        text = _Source(func, region, target, shapes).text()
    except DscError as error:
        return Declined(str(error))
    names = [f"X{i}" for i in range(len(operands))] + [f"Y{i}" for i in range(len(results))]
    slots = dict(zip(names, (s.on(target) for s in (*operands, *results)), strict=True))
    kernel = load(kernel_name(func), text)
    if not region.rowwise:
        arguments: dict[str, Any] = {**slots, "size": size}
        return Launch(kernel, (ceil_div(size, BLOCK),), arguments, {"BLOCK": BLOCK}, num_warps=warps(BLOCK))
    rows = size // max(1, columns)
    if region.block:
        groups = shapes[region.counts][0] if region.counts is not None else 0
        return _in_blocks(kernel, region.block, groups, slots, rows, columns)
    tile = rows_of(columns if _whole_rows(func) else min(columns, max(STRIP, *(op.tile[1] for op in _tiled(func)))))
    constants = {"ROWS": tile.rows, "COLUMNS": columns, "WIDTH": tile.width}
    grid = (ceil_div(rows, tile.rows), ceil_div(columns, tile.width))
    return Launch(kernel, grid, {**slots, "rows": rows}, constants, num_warps=tile.num_warps)


def _tiled(func: Func) -> list[Quantize | Dequantize]:
    return [op for op in func.ops if isinstance(op, Quantize | Dequantize)]


def _whole_rows(func: Func) -> bool:
    """Whether a program has to hold whole rows: something adds up along them."""
    return any(isinstance(op, tuple(ALONG_ROWS)) for op in func.ops)


def _in_blocks(kernel: Any, block: int, groups: int, slots: dict[str, Slot], rows: int, columns: int) -> Launch:
    """Blocks of all rows, or, where they restart at groups, as many as there can be."""
    down = rows // block + groups if groups else ceil_div(rows, block)
    constants = {"TILE": block, "COLUMNS": columns, "GROUPS": power_of_two(groups) if groups else 0}
    arguments: dict[str, Any] = {**slots, "rows": rows, "groups": groups, "tiles": down}
    return Launch(kernel, (down, ceil_div(columns, block)), arguments, constants, num_warps=warps(block * block))


def kernel_name(func: Func) -> str:
    """The kernel's name: that of its ops."""
    names = [op.name for op in func.ops if not free(op)]
    return "_".join(names if len(names) <= 6 else [*names[:3], "to", *names[-2:]]) + "_kernel"


def _extents(shape: Sequence[Any], func: Func, shapes: dict[Value, tuple[int, ...]]) -> tuple[int, ...]:
    """The extents of this run: a ragged one is that of a tensor which has it."""
    known = {d.name: n for v, s in shapes.items() for d, n in zip(v.shape, s, strict=True) if isinstance(d, Ragged)}
    return tuple(known[d.name] if isinstance(d, Ragged) else d for d in shape)


class _Source:
    """The text of one kernel."""

    def __init__(self, func: Func, region: Region, target: Target, shapes: dict[Value, tuple[int, ...]]) -> None:
        self.func = func
        self.region = region
        self.target = target
        self.shapes = shapes
        self.names: dict[Value, str] = {}
        self.made = 0
        self.pointers = {v: f"X{i}" for i, v in enumerate(func.params)}
        self.loads: dict[tuple[Value, str], str] = {}
        self.lines: list[str] = []

    def text(self) -> str:
        """A module that holds the kernel."""
        results = [f"Y{i}" for i in range(len(self.func.results))]
        places = list(zip(self.func.results, results, strict=True))
        body: list[str] = []
        for op in self.func.ops:  # each value is stored where it is made, so that it takes registers no longer than it has to
            body += self.op(op)
            body += (line for value, pointer in places if value in op.results for line in self.store(value, pointer))
        rowwise = self.region.rowwise
        numbers, constants = (["rows"], ["ROWS", "COLUMNS", "WIDTH"]) if rowwise else (["size"], ["BLOCK"])
        if self.region.block:
            numbers, constants = ["rows", "groups", "tiles"], ["TILE", "COLUMNS", "GROUPS"]
        arguments = [*self.pointers.values(), *results, *numbers, *(f"{name}: tl.constexpr" for name in constants)]
        lines = [
            "@triton.jit",
            f"def {kernel_name(self.func)}({', '.join(arguments)}):",
            f'    """{self.docstring()}"""',
            *(f"    {line}" for line in (*self.where(), *body)),
        ]
        called = set(re.findall(r"(?<![.\w])\w+(?=\()", "\n".join(lines)))
        used = {module: sorted(called & set(names)) for module, names in HELPERS.items()}
        imports = [f"from {__package__}.{module} import {', '.join(names)}" for module, names in used.items() if names]
        return "\n".join(["import triton", "import triton.language as tl", "", *imports, "", "", *lines, ""])

    def docstring(self) -> str:
        """The ops that the kernel runs, without extents: those are arguments of the kernel."""
        names = {v: f"%x{i}" for i, v in enumerate(self.func.params)}
        lines = [f"    {', '.join(f'{names[v]}: {v.dtype}' for v in self.func.params)}"]
        for op in self.func.ops:
            for value in op.results:
                names[value] = f"%v{len(names) - len(self.func.params)}"
            attributes = (f"{k}={print_attribute(v)}" for k, v in op.attributes.items() if k not in ("shape", "axes"))
            given = ", ".join([*(names[v] for v in op.operands), *attributes])
            lines.append(f"    {', '.join(f'{names[v]}: {v.dtype}' for v in op.results)} = {op.name}({given})")
        return "\n".join(["", *lines, f"    return {', '.join(names[v] for v in self.func.results)}", "    "])

    def where(self) -> list[str]:
        if not self.region.rowwise:
            return ["first = tl.program_id(0).to(tl.int64) * BLOCK", "at = tl.arange(0, BLOCK)", "inside = first + at < size"]
        if self.region.block:
            return [
                "nth, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)",
                *self.rows_of_block(),
                "row = start + tl.arange(0, TILE)[:, None]",
                "column = tile * TILE + tl.arange(0, TILE)[None, :]",
                "inside = (row < stop) & (column < COLUMNS)",
                "first = start * COLUMNS",
                "at = tl.arange(0, TILE)[:, None] * COLUMNS + column",
            ]
        return [
            "row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]",
            f"column = {'' if _whole_rows(self.func) else 'tl.program_id(1) * WIDTH + '}tl.arange(0, WIDTH)[None, :]",
            "inside = (row < rows) & (column < COLUMNS)",
            "first = tl.program_id(0).to(tl.int64) * ROWS * COLUMNS",
            "at = tl.arange(0, ROWS)[:, None] * COLUMNS + column",
        ]

    def rows_of_block(self) -> list[str]:
        if self.region.counts is None:
            return ["start = nth * TILE", "stop = tl.minimum(start + TILE, rows)"]
        counts = self.pointers[self.region.counts]
        return [
            f"starts, ends = extents({counts}, rows, groups, GROUPS, False)",
            "_, start, stop = rows_of_tile(nth, starts, ends, TILE, GROUPS)",
        ]

    # ---- reading

    def read(self, value: Value, op: Op) -> str:
        """The operand of an op: what an earlier op made, a number, or a tensor loaded where it is first read."""
        if isinstance(value.owner, Literal) and value not in self.pointers:
            return _number(value.owner)
        if value in self.names:
            return self.names[value]
        index, mask = self.index(value, op)
        if (value, index) not in self.loads:
            name = self.loads[value, index] = f"x{len(self.loads)}"
            pointer = self.pointers[value]
            zero = "0" if value.dtype is DType.bool else "0.0"
            loaded = f"tl.load({pointer}{index and f' + {index}'}{mask and f', mask={mask}, other={zero}'})"
            form = "{} != 0" if value.dtype is DType.bool else f'widen({{}}, "{self.format(value.dtype)}")'
            self.lines.append(f"{name} = {form.format(loaded)}")
        return self.loads[value, index]

    def index(self, value: Value, op: Op) -> tuple[str, str]:
        """Where an operand's elements lie, and which of them are there."""
        of = self.shapes[value]
        if prod(of) == 1:
            return "", ""
        within = of if isinstance(op, Reshape) else self.extents(op)
        if not self.region.rowwise:
            offset = _offset(of, within, f"({AT})")
            return (AT if offset == f"({AT})" else offset), "inside"
        if all(v in self.region.rows for v in op.results) and not isinstance(op, tuple(ALONG_ROWS)):
            if len(within) == len(self.region.space) and within[-1:] == (1,) and len(of) == len(within):
                of, within = of[:-1], within[:-1]
            return _offset(of, within, "row"), "row < rows"
        of = (1,) * (len(within) - len(of)) + of
        row = _offset(of[:-1], within[:-1], "row")
        if of[-1] == 1:
            return row, "row < rows"
        if not row:
            return "column", "column < COLUMNS"
        return (AT if row == "row" else f"({row}) * COLUMNS + column"), "inside"

    def extents(self, op: Op) -> tuple[int, ...]:
        shape = op.operands[0].shape if isinstance(op, (*ALONG_ROWS, Quantize, Dequantize)) else op.results[0].shape
        return _extents(shape, self.func, self.shapes)

    def format(self, dtype: DType) -> str:
        return Slot("operand", 0, dtype, (), ()).on(self.target).format

    # ---- ops

    def op(self, op: Op) -> Iterator[str]:
        """The lines of one op, those that load its operands before them."""
        if isinstance(op, Literal):
            return
        if isinstance(op, Transpose):
            return  # stored so, see `store`
        if isinstance(op, Quantize):
            made = list(self.quantize(op))
        elif isinstance(op, Dequantize):
            made = list(self.dequantize(op))
        else:
            made = list(self.compute(op))
        yield from self.lines
        self.lines.clear()
        yield from made

    def compute(self, op: Op) -> Iterator[str]:
        operands = [self.read(v, op) for v in op.operands]
        if isinstance(op, Reshape) or (isinstance(op, Cast) and op.dtype in (op.x.dtype, DType.f32) and op.x.dtype is not DType.bool):
            self.names[op.results[0]] = operands[0]  # the same numbers
            return
        if all(v not in self.pointers and isinstance(v.owner, Literal) for v in op.operands):
            operands[0] = f"tl.full((), {operands[0]}, {'tl.int1' if op.operands[0].dtype is DType.bool else 'tl.float32'})"
        if isinstance(op, Cast):
            text = _cast(operands[0], op.x.dtype, op.dtype)
        else:
            found = expression(op)
            require(found is not None, f"{op.name} has no expression in backends/triton/expressions.py")
            text = (found or "").format(*operands, **{k: repr(v) for k, v in op.attributes.items()})
        names = [self.name(v) for v in op.results]
        yield f"{', '.join(names)} = {text}"
        for name, value in zip(names, op.results, strict=True):
            if value.dtype not in (DType.f32, DType.bool):
                yield f'{name} = rounded({name}, "{self.format(value.dtype)}")'

    def name(self, value: Value) -> str:
        self.names[value] = f"v{self.made}"
        self.made += 1
        return self.names[value]

    def quantize(self, op: Quantize) -> Iterator[str]:
        x = self.read(op.x, op)
        rule = ", ".join(f"{k}={v!r}" for k, v in rule_constants(op.dtype, op.x.dtype, op.rule).items())
        codes, scales = (self.name(v) for v in op.results)
        if downward(op):
            yield f"{codes}, {scales} = quantize_columns(tl.where(inside, {x}, 0.0), {rule})"
        elif self.region.block:
            yield f"{codes}, {scales} = quantize_rows({x}, inside, TILE, TILE, TILE, {rule})"
        else:
            yield f"{codes}, {scales} = quantize_rows({x}, inside, ROWS, WIDTH, {op.tile[1]}, {rule})"
        yield f'{codes} = narrow({codes}, "{self.format(op.dtype)}", {op.rule.clamp})'

    def dequantize(self, op: Dequantize) -> Iterator[str]:
        codes, pointer = self.read(op.codes, op), self.pointers[op.scales]
        name, tiles = self.name(op.result), self.shapes[op.scales][-1]
        yield f"{name} = {codes} * tl.load({pointer} + row * {tiles} + column // {op.tile[1]}, mask=inside, other=0.0)"
        if op.dtype is not DType.f32:
            yield f'{name} = rounded({name}, "{self.format(op.dtype)}")'

    # ---- writing

    def store(self, value: Value, pointer: str) -> Iterator[str]:
        if value.owner is not None and downward(value.owner):
            yield from self.store_down(value, pointer)
            return
        name = self.names[value]
        if isinstance(value.owner, Quantize):
            if value.index == 0:
                yield f"tl.store({pointer} + {AT}, {name}, mask=inside)"
            else:
                tiles = self.shapes[value][-1]
                mask = "row < stop" if self.region.block else f"(row < rows) & (tile < {tiles})"
                if not self.region.block:
                    strip = "" if _whole_rows(self.func) else f"tl.program_id(1) * {name}.shape[1] + "
                    yield f"tile = {strip}tl.arange(0, {name}.shape[1])[None, :]"
                yield f"tl.store({pointer} + row * {tiles} + tile, {name}, mask={mask})"
            return
        at, mask = ("row", "row < rows") if value in self.region.rows else (AT, "inside")
        if value.dtype is DType.bool:
            stored = f"{name}.to(tl.int8)"
        else:
            stored = name if value.dtype is DType.f32 else f'narrow({name}, "{self.format(value.dtype)}")'
        yield f"tl.store({pointer} + {at}, {stored}, mask={mask})"

    def store_down(self, value: Value, pointer: str) -> Iterator[str]:
        """Codes of a square [TILE, TILE] or their scales [1, TILE], as they are or turned."""
        turned = isinstance(value.owner, Transpose)
        made = value.owner.x if isinstance(value.owner, Transpose) else value
        name = self.names[made]
        if made.index == 0:
            if turned:
                yield "down, across = start + tl.arange(0, TILE)[None, :], tile * TILE + tl.arange(0, TILE)[:, None]"
                at, mask = "across.to(tl.int64) * rows + down", "(across < COLUMNS) & (down < stop)"
                yield f"tl.store({pointer} + {at}, tl.trans({name}), mask={mask})"
            else:
                yield f"tl.store({pointer} + {AT}, {name}, mask=inside)"
            return
        used = f"tl.where(start < stop, {name}, 0.0)"  # of groups there may be fewer tiles than there is room for
        at = "column * tiles + nth" if turned else "nth * COLUMNS + column"
        yield f"tl.store({pointer} + {at}, {used}, mask=column < COLUMNS)"


def _offset(of: Sequence[int], within: Sequence[int], at: str) -> str:
    """The offset in a tensor of shape `of`, stretched to `within`, of the element that has the flat index `at` there; "" where it is 0."""
    padded = (1,) * (len(within) - len(of)) + tuple(of)
    groups: list[list[int]] = []  # extents from the last on, neighbours together that are stretched or are not: [extent, kept]
    for own, extent in zip(reversed(padded), reversed(within), strict=True):
        if extent == 1:
            continue
        kept = int(own == extent)
        if groups and groups[-1][1] == kept:
            groups[-1][0] *= extent
        else:
            groups.append([extent, kept])
    terms, inner, stride = list[str](), 1, 1
    for i, (extent, kept) in enumerate(groups):
        if kept:
            term = at if inner == 1 else f"{at} // {inner}"
            term = term if i == len(groups) - 1 else f"{term} % {extent}"
            terms.append(term if stride == 1 else f"({term}) * {stride}")
            stride *= extent
        inner *= extent
    return " + ".join(terms)


def _number(op: Literal) -> str:
    """A number as Triton takes it: on the grid of its dtype."""
    if op.dtype is DType.bool:
        return f"({bool(op.values[0])})"
    x = float(widen(rounded(np.array(op.values, np.float64), op.dtype), np.float64)[0])
    return 'float("nan")' if isnan(x) else f'{"-" if x < 0 else ""}float("inf")' if abs(x) == inf else repr(x)


def _cast(x: str, source: DType, target: DType) -> str:
    if source is DType.bool and target is not DType.bool:
        return f"tl.where({x}, 1.0, 0.0)"
    return f"{x} != 0.0" if target is DType.bool and source is not DType.bool else x
