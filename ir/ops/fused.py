"""Ops that one kernel computes from a single read. Each means its `expand`, bit for bit: values in between are rounded as they are there.

`fuse` forms them, and the general `fused`, out of the ops that they stand for; nothing else makes them. A program is differentiated and
quantised before. Scales of powers of two, saturation and so on are fields of `rule`, as in `quantize`.
"""

from __future__ import annotations

from dataclasses import field

from ..core import Builder, Func, Module, Op, Value, family, op
from ..errors import require
from ..quantization import ScaleRule
from ..types import DType, Tensor, Type
from .control import Call
from .elementwise import Add, SwiGLU
from .norm import RmsNorm, RmsNormBackward
from .quant import GroupedScaledMatmul, Quantize, ScaledMatmul
from .rules import require_float


@op("fused")
class Fused(Call):
    """Run another function of the module, as a call does, in one kernel where the backend can.

    The function reads no weights of its own. Its ops keep the ids that they had in the caller.
    """


def _codes(y: Tensor, tile: tuple[int, int], dtype: DType, rule: ScaleRule, keep: bool) -> tuple[Type, ...]:
    """The results of a fused op that quantises rows of y: y itself first where it is kept."""
    require(tile[0] == 1, f"expected tiles of one row, found {list(tile)}")
    found = tuple(r.type for r in Quantize(Value(y, "y"), tile=tile, dtype=dtype, rule=rule).results)
    return (y, *found) if keep else found


@op("rms_norm_quantize")
class RmsNormQuantize(Op):
    """Codes and scales of y = rms_norm(x, weight), in tiles of one row; y itself, before them, where `keep`."""

    x: Value
    weight: Value
    eps: float
    tile: tuple[int, int] = (1, 128)
    dtype: DType = DType.f8e4m3
    rule: ScaleRule = ScaleRule(floor=1e-4)
    keep: bool = False

    def infer(self) -> tuple[Type, ...]:
        y = RmsNorm(self.x, self.weight, self.eps).result.tensor
        return _codes(y, self.tile, self.dtype, self.rule, self.keep)

    def flops(self) -> int:
        return 7 * self.x.tensor.size

    def expand(self, b: Builder) -> tuple[Value, ...]:
        y = b.emit(RmsNorm(self.x, self.weight, self.eps)).result
        found = b.emit(Quantize(y, tile=self.tile, dtype=self.dtype, rule=self.rule)).results
        return (y, *found) if self.keep else found


@op("swiglu_quantize")
class SwiGLUQuantize(Op):
    """Codes and scales of y = swiglu(gate, up, weight), in tiles of one row; y itself, first, where `keep`. Gate and up have one type."""

    gate: Value
    up: Value
    weight: Value | None = None
    tile: tuple[int, int] = (1, 128)
    dtype: DType = DType.f8e4m3
    rule: ScaleRule = ScaleRule(floor=1e-4)
    keep: bool = False

    def infer(self) -> tuple[Type, ...]:
        require_float(self.gate)
        require(self.gate.type == self.up.type, f"types differ: gate is {self.gate.type} and up {self.up.type}")
        y = SwiGLU(self.gate, self.up, self.weight).result.tensor
        return _codes(y, self.tile, self.dtype, self.rule, self.keep)

    def flops(self) -> int:
        return 4 * self.gate.tensor.size

    def expand(self, b: Builder) -> tuple[Value, ...]:
        y = b.emit(SwiGLU(self.gate, self.up, self.weight)).result
        found = b.emit(Quantize(y, tile=self.tile, dtype=self.dtype, rule=self.rule)).results
        return (y, *found) if self.keep else found


@family
class WithSum(Op):
    """The op that a class derives from besides, and `added`, which is like its first result, on top of that: it is rounded before."""

    added: Value | None = field(default=None, kw_only=True)

    def infer(self) -> tuple[Type, ...]:
        return tuple(v.type for v in self.expand(Builder("types")))

    def expand(self, b: Builder) -> tuple[Value, ...]:
        require(self.added is not None, f"{self.name} needs what is added")
        assert self.added is not None
        base = next(base for base, cls in SUMS.items() if isinstance(self, cls))
        made = b.emit(base(**{a.name: getattr(self, a.name) for a in base.arguments}))
        y = made.results[0]
        require(self.added.type == y.type, f"{self.added.type} is added, expected {y.type}")
        return (*b.emit(Add(y, self.added)).results, *made.results[1:])


@op("scaled_matmul_add")
class ScaledMatmulAdd(WithSum, ScaledMatmul):
    """`scaled_matmul`, and `added`, which is like its result, on top of it: the product is rounded before."""


@op("grouped_scaled_matmul_add")
class GroupedScaledMatmulAdd(WithSum, GroupedScaledMatmul):
    """`grouped_scaled_matmul`, and `added`, which is like its result, on top of it: the product is rounded before."""


@op("rms_norm_backward_add")
class RmsNormBackwardAdd(WithSum, RmsNormBackward):
    """`rms_norm_backward`, and `added`, which is like x, on top of its gradient: that of the residual stream, which passes the norm by."""


SUMS: dict[type[Op], type[Op]] = {
    ScaledMatmul: ScaledMatmulAdd,
    GroupedScaledMatmul: GroupedScaledMatmulAdd,
    RmsNormBackward: RmsNormBackwardAdd,
}
"""What stands for an op whose first result something is added to."""


def expansion(op: Op, module: Module | None = None) -> Func | None:
    """What a fused op means, as a function of its operands; None for a primitive. A `fused` op's function stands in the module."""
    if isinstance(op, Fused):
        require(module is not None, f"fused @{op.callee} has no meaning outside a module")
        return module[op.callee] if module else None
    b = Builder(op.name, component=op.name)
    results = op.expand(b)
    return None if results is None else Func(op.name, tuple(dict.fromkeys(op.operands)), tuple(b.ops), results)


def alone(op: Op, module: Module) -> Module:
    """A module that runs one op of `module` on its operands, a parameter each."""
    func = Func("evaluate", tuple(dict.fromkeys(op.operands)), (op,), op.results)
    return Module((func, module[op.callee]) if isinstance(op, Call) else (func,), constants=module.constants)
