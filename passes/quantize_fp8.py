"""Quantise a program by a recipe: matrix products with a weight, and what is sent to the experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..hardware.device import accumulation
from ..ir.core import Builder, Func, Module, Op, Trait, Value, users
from ..ir.errors import require
from ..ir.ops.control import Param
from ..ir.ops.elementwise import Cast
from ..ir.ops.linalg import GroupedMatmul, Matmul
from ..ir.ops.moe import Dispatch
from ..ir.ops.quant import Dequantize, GroupedScaledMatmul, Quantize, ScaledMatmul, scale_shape
from ..ir.ops.shape import Reshape
from ..ir.quantization import RULES, SCALE_SUFFIX
from ..ir.types import DType, Tensor, bound
from ..ir.walk import join, walk
from .manager import Pass, register
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
        quantized = module.map(lambda func: drop_unused(rebuild(func, _Rule(self, by_recipe, func, prefixes.get(func.name, {""})))))
        return quantized.replace(stage="quantized", attributes={**module.attributes, "recipe": by_recipe.name})


class _Rule:
    """The rewriting of one function. It remembers what it has quantised, so that nothing is quantised twice."""

    def __init__(self, options: QuantizeFp8, decisions: Recipe, func: Func, prefixes: Collection[str]) -> None:
        self.options = options
        self.recipe = decisions
        self.func = func
        self.prefixes = prefixes
        readers = users(func)
        self.readers = {op.id: readers.get(op.results[0], []) for op in func.ops if isinstance(op, Dispatch)}
        self.flat: dict[Value, Value] = {}
        self.done: dict[tuple[Value, Quantization], Quantized] = {}
        self.sent: dict[Value, tuple[Quantized, tuple[int, int]]] = {}

    def __call__(self, op: Op, b: Builder) -> Sequence[Value] | None:
        match op:
            case Matmul():
                return self._matmul(op, b)
            case GroupedMatmul():
                return self._grouped(op, b)
            case Dispatch(xs=(x,)) if self.recipe.dispatch and self._feeds_products(op):
                return self._dispatch(op, x, self.recipe.dispatch, b)
        return None

    def _matmul(self, op: Matmul, b: Builder) -> Sequence[Value] | None:
        weight = op.b.owner
        activation, chosen = self.recipe.activation, self.recipe.weight
        if reason := self._why_not(weight, op.transpose_b, op.a.dtype):
            return self._decline(op, reason)
        assert isinstance(weight, Param)
        assert activation
        assert chosen
        x = op.a if activation.tile[0] == 1 else self._rows(op.a, b)
        a, a_scales = self._quantize(x, activation, b)
        w, w_scales = self._weight(weight, chosen, b)
        tiles = _tile(activation, x), _tile(chosen, op.b)
        product = b.emit(ScaledMatmul(a, a_scales, w, w_scales, *tiles, self.recipe.accumulation, op.result.dtype))
        return product.results if x is op.a else b.emit(Reshape(product.result, tuple(map(bound, op.result.shape)))).results

    def _grouped(self, op: GroupedMatmul, b: Builder) -> Sequence[Value] | None:
        activation, chosen = self.recipe.activation, self.recipe.weight
        if reason := self._why_not(op.w.owner, op.transpose_b, op.x.dtype):
            return self._decline(op, reason)
        assert isinstance(op.w.owner, Param)
        assert activation
        assert chosen
        if activation.tile[0] != 1 and activation.tile != WHOLE:
            return self._decline(op, f"tiles of {activation.tile[0]} rows would mix tokens of different experts")
        if op.x in self.sent:
            (x, x_scales), x_tile = self.sent[op.x]
        else:
            by_row = replace(activation, tile=(1, bound(op.x.shape[-1]))) if activation.tile == WHOLE else activation
            (x, x_scales), x_tile = self._quantize(op.x, by_row, b), by_row.tile
        w, w_scales = self._weight(op.w.owner, chosen, b)
        product = GroupedScaledMatmul(
            x, x_scales, w, w_scales, op.counts, x_tile, _tile(chosen, op.w), self.recipe.accumulation, op.result.dtype
        )
        return b.emit(product).results

    def _dispatch(self, op: Dispatch, x: Value, chosen: Quantization, b: Builder) -> Sequence[Value]:
        codes, scales = self._quantize(x, chosen, b)
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

    def _decline(self, op: Op, reason: str) -> Sequence[Value] | None:
        self.options.decline(self.func, op, reason)
        return None

    def _quantize(self, x: Value, chosen: Quantization, b: Builder) -> Quantized:
        if (x, chosen) not in self.done:
            names = (f"{x.name}_q", f"{x.name}_s")
            made = b.emit(Quantize(x, tile=_tile(chosen, x), dtype=chosen.format, rule=chosen.rule, names=names))
            self.done[x, chosen] = made.results[0], made.results[1]
        return self.done[x, chosen]

    def _rows(self, x: Value, b: Builder) -> Value:
        """Tokens as rows of one matrix, for tiles that span several."""
        if x.tensor.rank > 2 and x not in self.flat:
            columns = bound(x.shape[-1])
            self.flat[x] = b.emit(Reshape(x, (x.tensor.size // columns, columns))).result
        return self.flat.get(x, x)

    def _weight(self, weight: Param, chosen: Quantization, b: Builder) -> Quantized:
        value = weight.result
        if not self.options.stored:
            return self._quantize(value, chosen, b)
        if (value, chosen) not in self.done:
            scales = Tensor(DType.f32, scale_shape(value.shape, _tile(chosen, value)))
            codes = Param(weight.path, (Tensor(chosen.format, value.shape),), names=(f"{value.name}_q",))
            factors = Param(weight.path + SCALE_SUFFIX, (scales,), names=(f"{value.name}_s",))
            self.done[value, chosen] = b.emit(codes).result, b.emit(factors).result
        return self.done[value, chosen]


def _tile(chosen: Quantization, x: Value) -> tuple[int, int]:
    """The tile in numbers: a per-tensor one is as large as the matrix."""
    rows, columns = (bound(d) for d in x.shape[-2:])
    return (rows, columns) if chosen.tile == WHOLE else chosen.tile
