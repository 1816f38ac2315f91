"""What an op takes on one device: the longer of computing and of moving bytes, as fast as kernels do either (Williams, CACM 52(4), 2009).

matrix products   `products.py`: tiles and waves over the units, promotion of FP8 sums; bytes at the share `memory` of the bandwidth.
                  The two hide one another in part: (computing^4 + moving^4)^(1/4)
attention         FLOPs, of the tiles on and below the diagonal where causal, at the share `attention`, `attention_backward` or `decode`
                  of the peak, and bytes at the share `memory`, or `cache` where decoding
all else          FLOPs at the peak of the vector units, bytes at the share `rows` of the bandwidth

A weight on its way to its reader and a bundle move nothing, nor does a view that strides can say; others are copies, and what is read row
by row but does not lie so is copied before (`ir/strides.py`, by which the Triton backend goes, too). An op reads what lies in memory: of a
value that is stretched its original, of a value and a part of it the value, of a table the rows that are taken. A cache is
extended where it lies, as `updates` of a program allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Literal

from ..ir.core import Op, Phase, Trait, Value
from ..ir.ops.attention import Attention, AttentionBackward, AttentionDecode
from ..ir.ops.control import Call
from ..ir.ops.fused import Fused
from ..ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad, Matmul
from ..ir.ops.quant import GroupedScaledMatmul, GroupedScaledMatmulWgrad, Quantize, ScaledMatmul
from ..ir.ops.shape import CacheAppend, Gather, Take
from ..ir.strides import FP8, VIEWS, strides, uneven, viewed
from ..ir.types import Bundle, Ragged, Tensor, Type, bound, landed
from .device import Device
from .products import Product, loop_seconds

Bound = Literal["matrix", "vector", "memory", "network", "latency", "nothing"]
MATRIX = (
    Matmul,
    GroupedMatmul,
    GroupedMatmulWgrad,
    ScaledMatmul,
    GroupedScaledMatmul,
    GroupedScaledMatmulWgrad,
    Attention,
    AttentionBackward,
    AttentionDecode,
)
"""Ops that run on matrix units; all others on vector units."""
TILE = 128
"""Queries and keys of a tile of attention: of those on the diagonal half is computed in vain."""


@dataclass(frozen=True)
class Cost:
    """What one execution of an op takes: `seconds`, what bounds it, and how much it computes, moves through memory and sends."""

    seconds: float
    bound: Bound
    flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    """Bytes that leave the GPU."""


NOTHING = Cost(0.0, "nothing")


@dataclass(frozen=True)
class Compute:
    """Ops on `units` of a device's units. `rows` says how long ragged dimensions are; where it does not, their bound counts."""

    device: Device
    units: int = 0
    features: frozenset[str] = frozenset()
    rows: Mapping[Ragged, float] | None = None

    def cost(self, op: Op) -> Cost:
        """Of one execution, launching apart."""
        if self.free(op):
            return NOTHING
        moved = self.moved(op)
        flops = op.flops() * self._share(op)
        computing, bound = self._computing(op, flops)
        moving = moved / (self.device.peak.bandwidth.mid * self._reached(op))
        attention = isinstance(op, Attention | AttentionBackward | AttentionDecode)
        both = isinstance(op, MATRIX) and not attention and 0 < computing < inf
        longer = max(computing, moving)
        took = longer * ((computing / longer) ** 4 + (moving / longer) ** 4) ** 0.25 if both else longer
        return Cost(took, bound if computing >= moving else "memory", flops, moved)

    def _reached(self, op: Op) -> float:
        """The share of the bandwidth at which an op moves its bytes."""
        kernels = self.device.kernels
        if isinstance(op, AttentionDecode):
            return kernels.cache.mid
        return kernels.memory.mid if isinstance(op, MATRIX) else kernels.rows.mid

    def free(self, op: Op) -> bool:
        """Whether nothing runs for it."""
        if isinstance(op, VIEWS):
            return viewed(op, strides(op.x, turned=self._turned), turned=self._turned) is not None
        called = isinstance(op, Call) and not isinstance(op, Fused)  # what a call runs is the caller's to add up; a fused op is one kernel
        return Trait.VIEW in op.traits or Trait.SOURCE in op.traits or called

    @property
    def _turned(self) -> bool:
        return "transposed-reads" in self.features

    def moved(self, op: Op) -> float:
        """Bytes read and written."""
        if isinstance(op, Quantize) and "fused-cast" in self.features:
            wider = (op.x.dtype.bits - op.dtype.bits) / 8  # the product that reads it reads the original instead
            return max(0.0, wider) * self.size(op.x.type)
        match op:
            case Take() | Gather():
                return 2 * self.bytes(op.result.type) + self._stored(op.indices)
            case CacheAppend():
                return 2 * self._stored(op.new) + self._stored(op.positions)
        read = dict.fromkeys(map(self._all_of, op.operands))
        apart = (v for v in read if read.keys().isdisjoint(self._behind(v)[1:]))
        copied = sum(2 * self.bytes(v.type) for v in uneven(op, turned=self._turned))
        return copied + sum(map(self._stored, apart)) + sum(self.bytes(r.type) for r in op.results)

    def _behind(self, value: Value) -> list[Value]:
        """The value, and what it is a view of, up to what lies in memory."""
        found = [value]
        while isinstance(owner := found[-1].owner, VIEWS) and self.free(owner):
            found.append(owner.x)
        return found

    def _all_of(self, value: Value) -> Value:
        """The first that was made of those that have the elements of `value` and no others."""
        size = self.size(value.type)
        return [v for v in self._behind(value) if self.size(v.type) == size][-1]

    def _stored(self, value: Value) -> float:
        """Bytes in memory of what an op reads of a value."""
        return min(self.bytes(v.type) for v in self._behind(value))

    def extent(self, dim: int | Ragged) -> float:
        """How long a dimension is."""
        return (self.rows or {}).get(dim, dim.bound) if isinstance(dim, Ragged) else dim

    def size(self, type: Type) -> float:
        """How many elements it has."""
        there = landed(type)
        return sum(map(self.size, there.fields)) if isinstance(there, Bundle) else prod(map(self.extent, there.shape))

    def bytes(self, type: Type) -> float:
        """How many bytes it has."""
        there = landed(type)
        return sum(map(self.bytes, there.fields)) if isinstance(there, Bundle) else self.size(there) * there.dtype.bits / 8

    def _share(self, op: Op) -> float:
        """Of the FLOPs at the bound of a ragged dimension, those at its length: the largest tensor's, whose rows others follow."""
        largest = max((v.tensor for v in (*op.operands, *op.results) if isinstance(v.type, Tensor)), key=lambda t: t.size, default=None)
        dims = largest.shape if largest else ()
        return prod(self.extent(d) / max(1, d.bound) for d in dims if isinstance(d, Ragged))

    def _peak(self, operand: Value) -> float:
        type, peak = operand.type, self.device.peak
        rates = {"f64": peak.f64, "f32": peak.f32, "f16": peak.f16, "bf16": peak.bf16}
        return (rates.get(type.dtype.name, peak.f8) if isinstance(type, Tensor) else peak.f32).mid

    def _computing(self, op: Op, flops: float) -> tuple[float, Bound]:
        units = self.units or self.device.units
        share = units / self.device.units
        if not isinstance(op, MATRIX):
            return flops / (self.device.peak.vector.mid * share), "vector"
        peak, kernels = self._peak(op.operands[0]), self.device.kernels
        if isinstance(op, Attention | AttentionBackward):
            reached = kernels.attention if isinstance(op, Attention) else kernels.attention_backward
            tiles = -(-self.extent(op.k.shape[-2]) // TILE)
            diagonal = (tiles + 1) / tiles if op.causal and tiles else 1.0
            return flops * diagonal / (peak * share * reached.mid), "matrix"
        if isinstance(op, AttentionDecode):
            return flops / (peak * share * kernels.decode.mid), "matrix"
        product = self.product(op)
        slower = kernels.wgrad.mid if product.promoted and _is_wgrad(op) else 1.0
        return slower * loop_seconds(product, self.device, units, peak), "matrix"

    def _promoted(self, op: Op) -> bool:
        """Whether partial sums leave the matrix unit: to be scaled, or because it adds with too few bits."""
        if op.operands[0].dtype not in FP8 or "group-scaling" in self.features:
            return False
        return not ("wide-accumulator" in self.features and _one_scale(op))

    def product(self, op: Op) -> Product:
        """The matrix product that an op is, its groups of equal size."""
        bits, promoted = op.operands[0].dtype.bits, self._promoted(op)
        if isinstance(op, Matmul):
            *batch, m, n = map(self.extent, op.result.shape)
            folded = op.b.tensor.rank == 2
            m, groups = (prod(batch) * m, 1) if folded else (m, round(prod(batch)))
            return Product(round(m), round(n), round(self.extent(op.a.shape[-1])), groups, bits)
        if isinstance(op, ScaledMatmul):
            *leading, n = map(self.extent, op.result.shape)
            return Product(round(prod(leading)), round(n), round(self.extent(op.a.shape[-1])), 1, bits, promoted)
        if isinstance(op, GroupedMatmul | GroupedScaledMatmul):
            groups = bound(op.w.shape[0])
            rows = prod(map(self.extent, op.x.shape[:-1]))
            columns, k = self.extent(op.result.shape[-1]), self.extent(op.x.shape[-1])
            return Product(round(rows / max(1, groups)), round(columns), round(k), groups, bits, promoted)
        assert isinstance(op, GroupedMatmulWgrad | GroupedScaledMatmulWgrad), op
        groups, rows = bound(op.counts.shape[0]), self.extent(op.a.shape[0])
        m, n = bound(op.a.shape[1]), bound(op.b.shape[1])
        return Product(m, n, round(rows / max(1, groups)), groups, bits, promoted)


def _one_scale(op: Op) -> bool:
    """Whether scales stay the same along all of K."""
    if isinstance(op, ScaledMatmul):
        return min(op.a_tile[1], op.b_tile[1]) >= bound(op.a.shape[-1])
    return isinstance(op, GroupedScaledMatmul) and min(op.x_tile[1], op.w_tile[1]) >= bound(op.x.shape[-1])


def _is_wgrad(op: Op) -> bool:
    return isinstance(op, GroupedScaledMatmulWgrad) or (op.phase is Phase.W and isinstance(op, ScaledMatmul))


def slower(cost: Cost, factor: float, extra: float = 0.0) -> Cost:
    """The cost `factor` times over, and `extra` seconds later."""
    return replace(cost, seconds=cost.seconds * factor + extra)
