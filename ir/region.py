"""What one kernel can compute from one read: ops element by element, and along rows.

A region has a space, the shape [..., C] of its widest ops, seen as rows of C elements. A value lies *full* in it, element for element, or,
in a region that goes along rows, as one number for each *row*. Where something is quantised in tiles down the columns, as the product for
the gradient of weights takes it, the region goes by *blocks*, squares as large as a tile, in which those along rows lie, too; what is made
down the columns may be written transposed. `member` says whether an op can belong to a region, `region_of` whether several ops together are
one, and each says why not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from .core import Op, Trait, Value
from .errors import DscError
from .ops.control import Literal
from .ops.elementwise import Cos, Pow, Remainder, Sin
from .ops.norm import RmsNorm
from .ops.quant import Dequantize, Quantize
from .ops.reduce import Max, Mean, Min, Sum
from .ops.shape import Reshape, Transpose
from .types import DType, Shape, Tensor, bound

WIDEST = 1 << 16
"""Elements of a row that a kernel holds at once, at most."""

COMPUTED = (DType.f32, DType.bf16, DType.f16, DType.f8e4m3, DType.f8e5m2, DType.bool)
"""What values within a region are: all that float32 holds, and bool."""

LARGEST_BLOCK = 128
"""Rows and columns of a block, at most: more do not fit in registers."""

LIBRARY = (Pow, Remainder, Sin, Cos)
"""Ops element by element that no few instructions compute for every operand: exact remainders, and angles far from 0."""

ROWWISE = (Sum, Mean, Max, Min, RmsNorm, Quantize, Dequantize)


@dataclass(frozen=True)
class Region:
    """How the values of some ops lie.

    space    the shape of the widest ops; its last extent is the row's
    rowwise  whether something goes along rows: if not, the space is as good as flat
    rows     the values that are one number for each row; the others that the ops make are full, scales of `quantize` apart
    block    rows and columns of a block, 0 where the region does not go by blocks
    counts   the rows of each group, at which blocks restart
    """

    space: Shape
    rowwise: bool
    rows: frozenset[Value]
    block: int = 0
    counts: Value | None = None


def free(op: Op) -> bool:
    """Whether an op costs nothing within a region, and may be repeated in several: a number, or a view."""
    return isinstance(op, Reshape) or (isinstance(op, Literal) and len(op.values) == 1 and op.result.tensor.size == 1)


def downward(op: Op) -> bool:
    """Whether an op makes tiles down the columns of a matrix, or turns what one made."""
    if isinstance(op, Transpose):
        return op.x.owner is not None and isinstance(op.x.owner, Quantize) and downward(op.x.owner) and op.perm == (1, 0)
    return isinstance(op, Quantize) and op.tile[1] == 1 and 1 < op.tile[0] <= LARGEST_BLOCK and op.x.tensor.rank == 2


def member(op: Op) -> str | None:
    """Why `op` cannot be in a region; None where it can."""
    if isinstance(op, Literal):
        return None if free(op) else f"{op.result.type} of several numbers"
    if isinstance(op, Quantize | Dequantize):
        width = max(op.tile) if downward(op) else op.tile[1]
        if (op.tile[0] != 1 and not downward(op)) or width & (width - 1):
            return f"tiles of {list(op.tile)}, expected [1, a power of two], or the reverse of a matrix"
    elif downward(op):
        return None
    elif isinstance(op, Sum | Mean | Max | Min):
        last = op.x.tensor.rank - 1
        if tuple(a % (last + 1) for a in op.axes) != (last,):
            return f"{op.name} over axes {list(op.axes)} of {op.x.type}, expected the last one"
    elif isinstance(op, LIBRARY):
        return f"{op.name} is left to a library"
    elif not isinstance(op, RmsNorm | Reshape) and Trait.ELEMENTWISE not in op.traits:
        return f"{op.name} is neither element by element nor along rows"
    quantised = isinstance(op, Quantize)
    for value in (*op.operands[:1], *(() if quantised else (*op.operands[1:], *op.results))):
        decoded = isinstance(op, Dequantize) and value is op.codes and value.dtype is DType.e5m6
        if isinstance(value.type, Tensor) and value.dtype not in COMPUTED and not decoded:
            return f"{value.type}, expected one of {', '.join(map(str, COMPUTED))}"
    if isinstance(op, ROWWISE):
        width = bound(_domain(op)[-1]) if _domain(op) else 0
        if not 0 < width <= WIDEST:
            return f"rows of {width} elements, expected 1 to {WIDEST}"
    return None


def _domain(op: Op) -> Shape:
    """The shape that the op runs over."""
    return op.operands[0].shape if isinstance(op, ROWWISE) else op.results[0].shape


def region_of(ops: Sequence[Op]) -> Region:
    """How the values of `ops`, members all, lie in one kernel. `DscError` says why they do not fit in one."""
    domains = [_domain(op) for op in ops if not isinstance(op, Literal | Transpose)]
    space = max(domains, key=_size, default=())
    rowwise = any(isinstance(op, ROWWISE) for op in ops)
    block, counts = _blocks(ops)
    made = {value for op in ops for value in op.results}
    rows: set[Value] = set()
    for op in ops:
        if isinstance(op, Literal | Transpose):
            continue
        domain = _domain(op)
        row = not _full(domain, space, rowwise)
        if row and not (rowwise and not block and _row(domain, space)):
            raise DscError(f"{op.name} over {_show(domain)} beside ops over {_show(space)}")
        if row and isinstance(op, ROWWISE):
            raise DscError(f"{op.name} along rows of {_show(domain)} beside rows of {_show(space)}")
        if row or isinstance(op, Sum | Mean | Max | Min):
            rows.update(op.results)
        for index, value in enumerate(op.operands):
            if value in made and not isinstance(value.owner, Literal):
                _check(op, index, value, domain, value in rows)
    return Region(space, rowwise, frozenset(rows), block, counts)


def _blocks(ops: Sequence[Op]) -> tuple[int, Value | None]:
    """The side of the blocks and the counts where they restart, if something goes down columns: all else has to lie in them."""
    down = [op for op in ops if isinstance(op, Quantize) and downward(op)]
    if not down:
        return 0, None
    block, counts = down[0].tile[0], down[0].counts
    for op in ops:
        if isinstance(op, Quantize) and (max(op.tile) != block or (downward(op) and op.counts is not counts)):
            raise DscError(f"tiles of {list(op.tile)} beside tiles of {list(down[0].tile)}, or of other groups")
        if isinstance(op, ROWWISE) and not isinstance(op, Quantize | Dequantize):
            raise DscError(f"{op.name} along whole rows beside tiles of {list(down[0].tile)}")
    return block, counts


def _check(op: Op, index: int, value: Value, domain: Shape, row: bool) -> None:
    """An operand that the region makes is at hand where the op wants it."""
    if isinstance(value.owner, Quantize):
        raise DscError(f"{op.name} reads what {value.owner.name} {value.owner.id} makes")
    whole = not isinstance(op, ROWWISE) or (index == 0 and not row and not isinstance(op, Dequantize))
    fits = isinstance(op, Reshape) or value.shape == domain or (row and value.shape == (*domain[:-1], 1))
    if not (whole and fits):
        raise DscError(f"{op.name} over {_show(domain)} reads {value.type} of {value.owner.id if value.owner else ''}")


def _full(domain: Shape, space: Shape, rowwise: bool) -> bool:
    return domain == space or (_size(domain) == _size(space) and (not rowwise or domain[-1:] == space[-1:]) and _static(domain, space))


def _row(domain: Shape, space: Shape) -> bool:
    return domain in (space[:-1], (*space[:-1], 1)) or (_size(domain) == _size(space[:-1]) and _static(domain, space))


def _static(*shapes: Shape) -> bool:
    return all(isinstance(d, int) for shape in shapes for d in shape)


def _size(shape: Shape) -> int:
    return prod(map(bound, shape))


def _show(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
