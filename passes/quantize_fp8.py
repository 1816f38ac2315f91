"""Quantise a program by a recipe: matrix products with a weight, and what is sent to the experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..hardware.device import accumulation
from ..ir.core import Builder, Func, Module, Op, Phase, Trait, Value, users
from ..ir.errors import require
from ..ir.ops.control import Param
from ..ir.ops.elementwise import Cast
from ..ir.ops.linalg import GroupedMatmul, GroupedMatmulWgrad, Matmul
from ..ir.ops.moe import Dispatch, Redispatch
from ..ir.ops.quant import Dequantize, GroupedScaledMatmul, Quantize, ScaledMatmul, scale_shape
from ..ir.ops.shape import Reshape
from ..ir.quantization import RULES, SCALE_SUFFIX
from ..ir.types import DType, Tensor, bound
from ..ir.walk import join, walk
from . import quantize_backward
from .bundles import links
from .manager import Pass, register
from .quantize_caches import cache_residuals, without_swiglu
from .recipe import WHOLE, Quantization, Recipe, recipe
from .rewrite import rebuild
from .simplify import drop_unused

Quantized = tuple[Value, Value]


@register
@dataclass(frozen=True)
class QuantizeFp8(Pass):
    """Do matrix products with a weight in FP8, by a recipe (DeepSeek-V3 report, section 3.3).

    A product x W^T becomes `scaled_matmul` of quantised x and W, an expert product `grouped_scaled_matmul`; a value that several
    products read is quantised once. Where the recipe says how tokens are sent, they are quantised before `dispatch`, and
    the scales travel with the codes. With `stored` the weights' codes and scales are parameters, as an FP8 checkpoint holds
    them, and nothing quantises them again. `tile`, `format`, `scale`, `accumulate` and `promote` each change one decision of the
    recipe: the width of a tile, the format, the scale rule, who accumulates (a device), and after how many elements it promotes.

    Of a differentiated module the backward products of the same weights follow (passes/quantize_backward.py), gradients are quantised
    on their way to the experts, and residuals are kept in the recipe's formats (passes/quantize_caches.py).

    Before `quantize-fp8{recipe=deepseek-v3}`:

        func @f(%x: bf16[8, 256]) {
          %w: bf16[384, 256] = param("up_proj.weight")             @ f#1 F
          %y: bf16[8, 384] = matmul(%x, %w, transpose_b=true)      @ f#2 F
          return %y
        }

    after:

        module { stage=quantized, recipe="deepseek-v3" }

        func @f(%x: bf16[8, 256]) {
          %w: bf16[384, 256] = param("up_proj.weight")                                 @ f#1 F
          %xq: f8e4m3[8, 256], %xs: f32[8, 2] = quantize(%x)                           @ f#2.1 F
          %wq: f8e4m3[384, 256], %ws: f32[3, 2] = quantize(%w, tile=[128, 128])        @ f#2.2 F
          %y: bf16[8, 384] = scaled_matmul(%xq, %xs, %wq, %ws)                         @ f#2 F
          return %y
        }

    Before `quantize-fp8{recipe=deepseek-v3}`:

        module { stage=differentiated }

        func @f(%x: bf16[200, 256], %dy: bf16[200, 384]) {
          %w: bf16[384, 256] = param("up_proj.weight")                            @ f#1 F
          %y: bf16[200, 384] = matmul(%x, %w, transpose_b=true)                   @ f#2 F
          %dx: bf16[200, 256] = matmul(%dy, %w)                                   @ f#2.1 I
          %t: bf16[384, 200] = transpose(%dy, perm=[1, 0])                        @ f#2.2 W
          %dw: f32[384, 256] = matmul(%t, %x, out=f32)                            @ f#2.3 W
          return %y, %dx, %dw
        }

    after:

        module { stage=quantized, recipe="deepseek-v3" }

        func @f(%x: bf16[200, 256], %dy: bf16[200, 384]) {
          %w: bf16[384, 256] = param("up_proj.weight")                                                                      @ f#1 F
          %x_q: f8e4m3[200, 256], %x_s: f32[200, 2] = quantize(%x)                                                          @ f#2.4 F
          %w_q: f8e4m3[384, 256], %w_s: f32[3, 2] = quantize(%w, tile=[128, 128])                                           @ f#2.5 F
          %y: bf16[200, 384] = scaled_matmul(%x_q, %x_s, %w_q, %w_s)                                                        @ f#2 F
          %dy_q: f8e4m3[200, 384], %dy_s: f32[200, 3] = quantize(%dy)                                                       @ f#2.1.1 I
          %transpose: f8e4m3[256, 384] = transpose(%w_q, perm=[1, 0])                                                       @ f#2.1.2 I
          %transpose_1: f32[2, 3] = transpose(%w_s, perm=[1, 0])                                                            @ f#2.1.3 I
          %dx: bf16[200, 256] = scaled_matmul(%dy_q, %dy_s, %transpose, %transpose_1)                                       @ f#2.1 I
          %dy_q_1: f8e4m3[200, 384], %dy_s_1: f32[2, 384] = quantize(%dy, tile=[128, 1])                                    @ f#2.3.1 W
          %transpose_2: f8e4m3[384, 200] = transpose(%dy_q_1, perm=[1, 0])                                                  @ f#2.3.2 W
          %transpose_3: f32[384, 2] = transpose(%dy_s_1, perm=[1, 0])                                                       @ f#2.3.3 W
          %x_q_1: f8e4m3[200, 256], %x_s_1: f32[2, 256] = quantize(%x, tile=[128, 1])                                       @ f#2.3.4 W
          %transpose_4: f8e4m3[256, 200] = transpose(%x_q_1, perm=[1, 0])                                                   @ f#2.3.5 W
          %transpose_5: f32[256, 2] = transpose(%x_s_1, perm=[1, 0])                                                        @ f#2.3.6 W
          %dw: f32[384, 256] = scaled_matmul(%transpose_2, %transpose_3, %transpose_4, %transpose_5, b_tile=[1, 128], out=f32)  @ f#2.3 W
          return %y, %dx, %dw
        }
    """

    name: ClassVar[str] = "quantize-fp8"
    requires: ClassVar[str] = "..differentiated"
    ensures: ClassVar[str | None] = "quantized"

    recipe: str = "deepseek-v3"
    stored: bool = False
    tile: int | None = None
    format: str | None = None
    scale: str | None = None
    accumulate: str | None = None
    promote: int | None = None

    def __post_init__(self) -> None:
        self.decisions()

    def decisions(self) -> Recipe:
        """The recipe with the options' changes in it."""
        found = recipe(self.recipe)
        model = found.accumulation if self.accumulate is None else accumulation(self.accumulate)
        if self.promote is not None:
            require(self.promote >= 0, f"promote is {self.promote}, expected 0 (never) or more")
            model = replace(model, interval=self.promote)
        require(self.tile is None or self.tile > 0, f"tile is {self.tile}, expected 1 or more")
        require(self.scale is None or self.scale in RULES, f"unknown scale rule {self.scale}; expected one of {', '.join(RULES)}")
        formats = ("f8e4m3", "f8e5m2")
        require(self.format in (None, *formats), f"unknown format {self.format}; expected one of {', '.join(formats)}")
        sections = ("activation", "weight", "gradient", "dispatch")
        changed: dict[str, Any] = {name: self._change(section) for name in sections if (section := getattr(found, name)) is not None}
        return replace(found, accumulation=model, **changed)

    def _change(self, chosen: Quantization) -> Quantization:
        tile = chosen.tile
        if self.tile is not None and tile != WHOLE:
            tile = (tile[0] if tile[0] == 1 else self.tile, tile[1] if tile[1] == 1 else self.tile)
        return replace(
            chosen,
            tile=tile,
            format=chosen.format if self.format is None else DType[self.format],
            rule=chosen.rule if self.scale is None else RULES[self.scale],
        )

    def __call__(self, module: Module) -> Module:
        by_recipe = self.decisions()
        prefixes: dict[str, set[str]] = {}
        for prefix, func, _ in walk(module):
            prefixes.setdefault(func.name, set()).add(prefix)
        sources: dict[str, list[str]] = {}
        for link in links(module):
            sources.setdefault(link.target, []).append(link.source)
        rules: dict[str, Rule] = {}

        def quantized(func: Func) -> Func:
            """Forward functions before the backward ones that take their residuals: a product is decided upon once."""
            if func.name not in rules:
                forward = [source for source in sources.get(func.name, []) if source != func.name]
                for source in forward:
                    quantized(module[source])
                rules[func.name] = Rule(self, by_recipe, func, prefixes.get(func.name, {""}), [rules[source] for source in forward])
                done[func.name] = drop_unused(rebuild(func, rules[func.name]))
            return done[func.name]

        done: dict[str, Func] = {}
        after = module.map(quantized)
        if by_recipe.cache_swiglu:
            after = without_swiglu(after)
        after = cache_residuals(after, by_recipe, self.decline).map(drop_unused)
        return after.replace(stage="quantized", attributes={**module.attributes, "recipe": by_recipe.name})


class Rule:
    """The rewriting of one function. It remembers what it has quantised, so that nothing is quantised twice."""

    def __init__(
        self, options: QuantizeFp8, decisions: Recipe, func: Func, prefixes: Collection[str], forward: Sequence[Rule] = ()
    ) -> None:
        self.options = options
        self.recipe = decisions
        self.func = func
        self.prefixes = prefixes
        readers = users(func)
        self.readers = {op.id: readers.get(op.results[0], []) for op in func.ops if isinstance(op, Dispatch)}
        self.flat: dict[Value, Value] = {}
        self.done: dict[tuple[Value, Quantization, Value | None], Quantized] = {}
        self.sent: dict[Value, tuple[Quantized, tuple[int, int]]] = {}
        self.sends: bool = any(rule.sends for rule in forward)
        self.reasons: dict[str, str] = {id: reason for rule in forward for id, reason in rule.reasons.items()}
        """Why a forward product stays as it is, by its id; empty where it is quantised."""

    def __call__(self, op: Op, b: Builder) -> Sequence[Value] | None:
        forward = op.phase in (Phase.F, Phase.R)
        match op:
            case Matmul() if forward:
                return self._matmul(op, b)
            case GroupedMatmul() if forward:
                return self._grouped(op, b)
            case Dispatch(xs=(x,)) if self.recipe.dispatch and self._feeds_products(op):
                return self._dispatch(op, x, self.recipe.dispatch, b)
            case Matmul(b=Value(owner=Param())):
                return quantize_backward.dgrad(self, op, b)
            case Matmul():
                return quantize_backward.wgrad(self, op, b)
            case GroupedMatmul():
                return quantize_backward.grouped_dgrad(self, op, b)
            case GroupedMatmulWgrad():
                return quantize_backward.wgrad(self, op, b)
            case Redispatch(xs=(x,)) if self.recipe.dispatch and self.sends:
                return quantize_backward.redispatch(self, op, x, self.recipe.dispatch, b)
        return None

    def reason_of_forward(self, id: str) -> str | None:
        """Why the forward product from which an op comes stays as it is; empty where it is quantised, None where there is none."""
        while id not in self.reasons and "." in id.partition("#")[2]:
            id = id.rpartition(".")[0]  # o_proj#2.5 is of o_proj#2
        return self.reasons.get(id)

    def _matmul(self, op: Matmul, b: Builder) -> Sequence[Value] | None:
        reason = self.reasons[op.id] = self._why_not(op.b.owner, op.transpose_b, op.a.dtype)
        return self.decline(op, reason) if reason else self.linear(op, self.recipe.activation, b)

    def linear(self, op: Matmul, chosen: Quantization | None, b: Builder, backward: bool = False) -> Sequence[Value]:
        """Rows, quantised as `chosen`, times a weight; `backward` its codes are transposed."""
        assert chosen
        x = op.a if chosen.tile[0] == 1 else self.rows(op.a, b)
        codes = self.quantize(x, chosen, b)
        weight, tile = self.weight(op.b, b, backward)
        product = b.emit(ScaledMatmul(*codes, *weight, self.tile(chosen, x), tile, self.recipe.accumulation, op.result.dtype))
        return product.results if x is op.a else b.emit(Reshape(product.result, tuple(map(bound, op.result.shape)))).results

    def _grouped(self, op: GroupedMatmul, b: Builder) -> Sequence[Value] | None:
        activation = self.recipe.activation
        reason = self._why_not(op.w.owner, op.transpose_b, op.x.dtype)
        if not reason and activation and activation.tile[0] != 1 and activation.tile != WHOLE:
            reason = f"tiles of {activation.tile[0]} rows would mix tokens of different experts"
        self.reasons[op.id] = reason
        return self.decline(op, reason) if reason else self.experts(op, activation, b)

    def experts(self, op: GroupedMatmul, chosen: Quantization | None, b: Builder, backward: bool = False) -> Sequence[Value]:
        """As `linear`, of experts. Backward tiles of several rows, as in the ablation of appendix B.2, restart at each expert."""
        assert chosen
        codes, x_tile = self.rows_of_experts(op.x, chosen, b, op.counts if backward else None)
        weight, tile = self.weight(op.w, b, backward)
        product = GroupedScaledMatmul(*codes, *weight, op.counts, x_tile, tile, self.recipe.accumulation, op.result.dtype)
        return b.emit(product).results

    def _dispatch(self, op: Dispatch, x: Value, chosen: Quantization, b: Builder) -> Sequence[Value]:
        self.sends = True
        codes, scales = self.quantize(x, chosen, b)
        names = ("rows_q", "rows_s", "counts", "handle")
        sent = b.emit(Dispatch((codes, scales), op.ids, op.experts, id=op.id, phase=op.phase, names=names))
        rows, row_scales, counts, handle = sent.results
        # For readers that are no products; its id is given too, or it would inherit that of the dispatch.
        wide = b.emit(Dequantize(rows, row_scales, tile=chosen.tile, dtype=x.dtype, id=f"{op.id}.2", phase=op.phase)).result
        self.sent[wide] = (rows, row_scales), chosen.tile
        return wide, counts, handle

    def _feeds_products(self, op: Dispatch) -> bool:
        readers = self.readers[op.id]  # by id, for the op itself may have got new operands
        products = [r for r in readers if isinstance(r, GroupedMatmul) and not self._why_not(r.w.owner, r.transpose_b, r.x.dtype)]
        return bool(products)

    def _why_not(self, weight: Op | None, transposed: bool, dtype: DType) -> str:
        """Why a product stays as it is; empty where it does not."""
        if self.recipe.activation is None:
            return f"recipe {self.recipe.name} quantises nothing"
        while weight is not None and (isinstance(weight, Cast) or Trait.VIEW in weight.traits):
            inner = weight.operands[0].owner
            if isinstance(inner, Param):
                kept = self._kept(inner)
                return kept or f"{inner.path} is read in another form ({weight.name}), not as the weight of a Linear"
            weight = inner
        if not isinstance(weight, Param):
            return "neither operand is a weight"
        if kept := self._kept(weight):
            return kept
        if not transposed:
            return f"{weight.path} is [in, out]; a quantised product reads a weight as [out, in]"
        return f"it computes in {dtype}" if dtype not in (DType.bf16, DType.f16, DType.f32) else ""

    def _kept(self, weight: Param) -> str:
        names = [join(prefix, weight.path) for prefix in self.prefixes]
        part = next((part for part in self.recipe.keep if any(part in name for name in names)), None)
        return f"the recipe keeps {part}" if part else ""

    def decline(self, op: Op, reason: str) -> Sequence[Value] | None:
        """Leave `op` as it is."""
        self.options.decline(self.func, op, reason)
        return None

    def quantize(self, x: Value, chosen: Quantization, b: Builder, counts: Value | None = None) -> Quantized:
        """Codes and scales of `x`; tiles that span rows restart where the groups of `counts` do."""
        counts = counts if chosen.tile[0] != 1 else None
        if (x, chosen, counts) not in self.done:
            names = (f"{x.name}_q", f"{x.name}_s")
            made = b.emit(Quantize(x, counts, tile=self.tile(chosen, x), dtype=chosen.format, rule=chosen.rule, names=names))
            self.done[x, chosen, counts] = made.results[0], made.results[1]
        return self.done[x, chosen, counts]

    def rows_of_experts(self, x: Value, chosen: Quantization, b: Builder, counts: Value | None = None) -> tuple[Quantized, tuple[int, int]]:
        """Codes, scales and tile of what a product of experts reads: as it was sent, if it was."""
        by_row = replace(chosen, tile=(1, bound(x.shape[-1]))) if chosen.tile == WHOLE else chosen
        return self.sent[x] if x in self.sent else (self.quantize(x, by_row, b, counts), by_row.tile)

    def rows(self, x: Value, b: Builder) -> Value:
        """Tokens as rows of one matrix, for tiles that span several."""
        if x.tensor.rank > 2 and x not in self.flat:
            columns = bound(x.shape[-1])
            self.flat[x] = b.emit(Reshape(x, (x.tensor.size // columns, columns))).result
        return self.flat.get(x, x)

    def weight(self, value: Value, b: Builder, backward: bool) -> tuple[Quantized, tuple[int, int]]:
        """Codes, scales and tile of a weight, transposed `backward`: made here, or parameters where they are stored."""
        chosen, owner = self.recipe.weight, value.owner
        assert chosen
        assert isinstance(owner, Param)
        if self.options.stored and (value, chosen, None) not in self.done:
            scales = Tensor(DType.f32, scale_shape(value.shape, self.tile(chosen, value)))
            codes = Param(owner.path, (Tensor(chosen.format, value.shape),), names=(f"{value.name}_q",))
            factors = Param(owner.path + SCALE_SUFFIX, (scales,), names=(f"{value.name}_s",))
            self.done[value, chosen, None] = b.emit(codes).result, b.emit(factors).result
        found, tile = self.quantize(value, chosen, b), self.tile(chosen, value)
        return (quantize_backward.transposed(found, b), tile[::-1]) if backward else (found, tile)

    @staticmethod
    def tile(chosen: Quantization, x: Value) -> tuple[int, int]:
        """The tile in numbers: a per-tensor one is as large as the matrix."""
        rows, columns = (bound(d) for d in x.shape[-2:])
        return (rows, columns) if chosen.tile == WHOLE else chosen.tile
