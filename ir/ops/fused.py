"""Ops that one kernel computes from a single read. Each means its `expand`, bit for bit: values in between are rounded as they are there.

`fuse` forms them out of the ops that they stand for; nothing else makes them. A program is differentiated and quantised before.
"""

from __future__ import annotations

from dataclasses import field

from ..core import Builder, Func, Module, Op, Trait, Value, family, op
from ..errors import require
from ..types import Type
from .attention import Attention, AttentionBackward, AttentionDecode
from .control import Call
from .elementwise import Add
from .norm import RmsNormBackward
from .quant import GroupedScaledMatmul, ScaledMatmul
from .shape import Concat, Slice


@op("fused")
class Fused(Call):
    """Run another function of the module, as a call does, in one kernel where the backend can.

    The function reads no weights of its own. Its ops keep the ids that they had in the caller.
    """


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


@family
class ApartHeads(Op):
    """The op that a class derives from besides, on heads of two parts: `q_pe` follows q, and `k_pe` follows k, along the last axis.

    MLA makes them apart, and k_pe once for all heads (DeepSeek-V2 report, section 2.1.3): nothing has to join them in memory.
    """

    q_pe: Value | None = field(default=None, kw_only=True)
    k_pe: Value | None = field(default=None, kw_only=True)

    def infer(self) -> tuple[Type, ...]:
        return tuple(v.type for v in self.expand(Builder("types")))

    def flops(self) -> int:
        b = Builder("flops")
        self.expand(b)
        return sum(op.flops() for op in b.ops)

    def joined(self, b: Builder) -> Op:
        """The op on whole heads."""
        base = next(base for base, cls in HALVES.items() if isinstance(self, cls))
        given = {a.name: getattr(self, a.name) for a in base.arguments}
        for name, rest in (("q", self.q_pe), ("k", self.k_pe)):
            if rest is not None:
                given[name] = b.emit(Concat((given[name], rest), given[name].tensor.rank - 1)).result
        return b.emit(base(**given))

    def expand(self, b: Builder) -> tuple[Value, ...]:
        require(self.q_pe is not None and self.k_pe is not None, f"{self.name} needs q_pe and k_pe")
        return self.joined(b).results


@op("mla_attention", Trait.STRIDED)
class MlaAttention(ApartHeads, Attention):
    """`attention` of heads of two parts, q before q_pe and k before k_pe."""


@op("mla_attention_backward", Trait.STRIDED)
class MlaAttentionBackward(ApartHeads, AttentionBackward):
    """`attention_backward` of heads of two parts, q before q_pe and k before k_pe: dq, dk and dv, then dq_pe and dk_pe."""

    def expand(self, b: Builder) -> tuple[Value, ...]:
        dq, dk, dv = super().expand(b)
        apart = ((dq, self.q), (dk, self.k))
        cuts = [(d, x.shape[-1], d.shape[-1]) for d, x in apart]
        first = [b.emit(Slice(d, d.tensor.rank - 1, 0, cut)).result for d, cut, _ in cuts]  # type: ignore[arg-type]
        rest = [b.emit(Slice(d, d.tensor.rank - 1, cut, end)).result for d, cut, end in cuts]  # type: ignore[arg-type]
        return (*first, dv, *rest)


@op("mla_decode", Trait.STRIDED)
class MlaDecode(ApartHeads, AttentionDecode):
    """`attention_decode` of queries of two parts, q before q_pe, as absorbed MLA makes them; the cache has keys in one piece."""

    def expand(self, b: Builder) -> tuple[Value, ...]:
        require(self.q_pe is not None and self.k_pe is None, f"{self.name} needs q_pe, and its keys are whole")
        return self.joined(b).results


HALVES: dict[type[Op], type[Op]] = {Attention: MlaAttention, AttentionBackward: MlaAttentionBackward, AttentionDecode: MlaDecode}
"""What stands for attention of heads that lie in two parts."""


@op("joined", Trait.VIEW)
class Joined(Concat):
    """`concat` of what is made in its place: each operand is written where it lies in the result, and nothing is copied."""

    def expand(self, b: Builder) -> tuple[Value, ...]:
        return b.emit(Concat(self.xs, self.axis)).results


NAMED = (*SUMS.values(), *HALVES.values(), Joined)
"""Every op with a meaning of its own here."""


def expansion(op: Op, module: Module | None = None) -> Func | None:
    """What a fused op means, as a function of its operands; None for a primitive. A `fused` op's function stands in the module."""
    if isinstance(op, Fused):
        require(module is not None, f"fused @{op.callee} has no meaning outside a module")
        return module[op.callee] if module else None
    b = Builder(op.name, component=op.name)
    results = op.expand(b)
    return None if results is None else Func(op.name, tuple(dict.fromkeys(op.operands)), tuple(b.ops), results)


def alone(op: Op, module: Module | None = None) -> Module:
    """A module that runs one op on its operands, a parameter each; what it calls stands in `module`."""
    func = Func("evaluate", tuple(dict.fromkeys(op.operands)), (op,), op.results)
    if module is None:
        return Module((func,))
    return Module((func, module[op.callee]) if isinstance(op, Call) else (func,), constants=module.constants)
