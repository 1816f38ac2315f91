"""The emitter: collects the nodes of one ONNX graph or function, with the casts that keep every op's one rounding.

`g.Add(a, b)` appends a node of the standard op and returns its output; NumPy values become constants, lists of ints int64 constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from ...ir.core import Builder, Op
from ...ir.core import Value as DscValue
from ...ir.types import Bundle, DType, Ragged, Shape, Type, landed
from ...numerics.formats import FORMATS
from .registry import MAPPINGS, Unmapped

Value: TypeAlias = ir.Value
Tree: TypeAlias = Any
"""What stands for a value of dsc: an ONNX value, a `Stack`, or for a bundle a tuple of such."""

TYPES: dict[DType, ir.DataType] = {
    DType.f64: ir.DataType.DOUBLE,
    DType.f32: ir.DataType.FLOAT,
    DType.f16: ir.DataType.FLOAT16,
    DType.bf16: ir.DataType.BFLOAT16,
    DType.e5m6: ir.DataType.FLOAT16,  # on its own grid, as in every backend
    DType.f8e4m3: ir.DataType.FLOAT8E4M3FN,
    DType.f8e5m2: ir.DataType.FLOAT8E5M2,
    DType.e8m0: ir.DataType.FLOAT8E8M0,
    DType.i64: ir.DataType.INT64,
    DType.i32: ir.DataType.INT32,
    DType.i16: ir.DataType.INT16,
    DType.i8: ir.DataType.INT8,
    DType.u8: ir.DataType.UINT8,
    DType.bool: ir.DataType.BOOL,
}

FP8 = (DType.f8e4m3, DType.f8e5m2, DType.e8m0)


@dataclass(frozen=True)
class Stack:
    """A stack of matrices, one value each: how experts come from a checkpoint, and the only way in which FP8 can be picked apart."""

    parts: tuple[Value, ...]


def flat(tree: Tree) -> list[Value]:
    """The ONNX values of a tree, in order."""
    if isinstance(tree, Stack):
        return list(tree.parts)
    return [v for x in tree for v in flat(x)] if isinstance(tree, tuple) else [tree]


def shape_of(shape: Shape) -> ir.Shape:
    """A ragged dimension is a named one in ONNX, without its bound."""
    return ir.Shape([d.name if isinstance(d, Ragged) else d for d in shape])


def fresh(type: Type, name: str | None = None, stacked: int = 0) -> Tree:
    """New values of a type: inputs of a function or a graph, or of the `stacked` matrices of a stack."""
    type = landed(type)
    if isinstance(type, Bundle):
        return tuple(fresh(field, f"{name}.{i}" if name else None) for i, field in enumerate(type.fields))
    if stacked:
        made = ir.TensorType(TYPES[type.dtype])
        names = [f"{name}.{i}" if name else None for i in range(stacked)]
        return Stack(tuple(Value(name=n, type=made, shape=shape_of(type.shape[1:])) for n in names))
    return Value(name=name, type=ir.TensorType(TYPES[type.dtype]), shape=shape_of(type.shape))


class Emitter:
    """Nodes in order, and what they are made of."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.metadata: dict[str, str] = {}
        """What the nodes that follow say about where they come from."""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._casts: dict[tuple[Value, DType], Value] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return partial(self.node, op_type)

    def node(self, op_type: str, *inputs: Any, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; its output, or the tuple of them where there are several."""
        given = [None if x is None else self.value(x) for x in inputs]
        made = ir.node(op_type, given, attributes, domain=domain, num_outputs=outputs)
        made.metadata_props.update(self.metadata)
        self.nodes.append(made)
        return made.outputs[0] if outputs == 1 else tuple(made.outputs)

    def value(self, x: Any) -> Value:
        """`x` itself, or a constant of its numbers."""
        if isinstance(x, Value):
            return x
        array = np.asarray(x, np.int64) if isinstance(x, list | tuple | int) else np.asarray(x)
        key = str(array.dtype), array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = self.Constant(value=ir.tensor(array))
        return self._constants[key]

    # ---- types

    def cast(self, x: Value, dtype: DType, saturate: bool = True) -> Value:
        """A plain Cast; to E8M0 as to other floats, to the nearest."""
        if dtype is DType.e8m0:
            return self.Cast(x, to=TYPES[dtype].value, round_mode="nearest")
        return self.Cast(x, to=TYPES[dtype].value, **({} if saturate else {"saturate": 0}))

    def widened(self, x: Value, source: DType, wide: DType = DType.f32) -> Value:
        """The exact values of a float tensor as float32 or float64; cast once however often it is asked for."""
        if source is wide:
            return x
        if (x, wide) not in self._casts:
            self._casts[x, wide] = self.cast(x, wide)
        return self._casts[x, wide]

    def rounded(self, x: Value, source: DType, target: DType) -> Value:
        """A float tensor rounded once, to nearest even, FP8 saturating. A cast from float64 may go by way of float32 in a runtime, so
        values are put on the narrow grid before it."""
        if source is target:
            return x
        if target is DType.e5m6:
            return self.cast(self._e5m6(self.cast(x, DType.f32) if source is DType.f64 else x), target)
        if source is DType.f64 and target is not DType.f32:
            x = self._on_grid(x, target)
        return self.cast(x, target)

    def _on_grid(self, x: Value, target: DType) -> Value:
        """float64 values rounded to those of `target`, infinite beyond its range unless it has FP8's eight bits."""
        fmt, number = FORMATS[target.name], partial(self.number, dtype=DType.f64)
        unit = self.Mul(self.Max(self.power_of_two(self.Abs(x), DType.f64), number(fmt.min_normal)), number(2.0**-fmt.mantissa_bits))
        on = self.Where(self.IsInf(x), x, self.Mul(self.Round(self.Div(x, unit)), unit))
        if target in FP8:
            return on
        return self.Where(self.Greater(self.Abs(on), number(fmt.max)), self.Mul(self.Sign(x), number(np.inf)), on)

    def _e5m6(self, x: Value) -> Value:
        """float32 values on the grid of E5M6 by the published rule (`numerics.formats`): cut, then raised by float32's low 17 bits."""
        fmt, number = FORMATS["e5m6"], self.number
        size = self.Min(self.Abs(x), number(fmt.max))
        power = self.power_of_two(size, DType.f32)
        unit = self.Mul(self.Max(power, number(fmt.min_normal)), number(2.0**-fmt.mantissa_bits))
        code = self.Floor(self.Div(size, unit))
        low = self.Mod(self.Mul(self.Div(size, power), number(2.0**23)), number(2.0**17), fmod=1)
        up = self.Greater(self.Add(self.Mod(code, number(2.0), fmod=1), low), number(2.0**16))
        found = self.Mul(self.Add(code, self.cast(up, DType.f32)), unit)
        return self.Where(self.Less(x, number(0.0)), self.Neg(found), found)

    def power_of_two(self, x: Value, dtype: DType) -> Value:
        """The largest power of two that is not above x >= 0, at least 2^-126; the logarithm's last bits are made good by comparing."""
        number = partial(self.number, dtype=dtype)
        x = self.Min(self.Max(x, number(2.0**-126)), number(2.0**127 * 1.5))
        guess = self.Floor(self.Mul(self.Log(x), number(1 / np.log(2))))
        power = self.Pow(number(2.0), self.Min(guess, number(127.0)))
        power = self.Where(self.Greater(power, x), self.Mul(power, number(0.5)), power)
        half = self.Mul(x, number(0.5))
        return self.Where(self.LessOrEqual(power, half), self.Mul(power, number(2.0)), power)

    def number(self, value: float, dtype: DType = DType.f32) -> Value:
        """A scalar constant of float32 or float64."""
        return self.value(np.float64(value) if dtype is DType.f64 else np.float32(value))

    def same(self, op: Op, *xs: Value) -> tuple[Value, ...]:
        """Operands, floats of which are wide already, as one type: a scalar of another adapts."""
        dtypes = [v.dtype for v in op.operands]
        if any(d.is_float for d in dtypes):
            to = wide_of(op)
            return tuple(x if d.is_float else self.cast(x, to) for x, d in zip(xs, dtypes, strict=True))
        to = next((v.dtype for v in op.operands if v.tensor.rank), dtypes[0])
        return tuple(x if d is to else self.cast(x, to) for x, d in zip(xs, dtypes, strict=True))

    # ---- shapes

    def reshaped(self, x: Value, *shape: int) -> Value:
        return self.Reshape(x, list(shape), **({"allowzero": 1} if 0 in shape else {}))

    def swapped(self, x: Value, rank: int) -> Value:
        """The last two axes exchanged."""
        return self.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])

    def sum(self, x: Value, *axes: int, keepdims: bool = True) -> Value:
        return self.ReduceSum(x, list(axes), keepdims=int(keepdims))

    def carried(self, x: Value, dtype: DType) -> Value:
        return x if (to := carrier(dtype)) is dtype else self.cast(x, to)

    def uncarried(self, x: Value, dtype: DType) -> Value:
        return x if carrier(dtype) is dtype else self.cast(x, dtype, saturate=dtype not in FP8)

    def dense(self, x: Value | Stack) -> Value:
        """A stack as one tensor; not of FP8, which ONNX does not join."""
        if not isinstance(x, Stack):
            return x
        return self.Concat(*(self.Unsqueeze(part, [0]) for part in x.parts), axis=0)

    # ---- ops of dsc

    def lower(self, op: Op, operands: Sequence[Tree]) -> tuple[Tree, ...]:
        """The results of `op` by the standard ops that compute it. `Unmapped` where its mapping does not cover it."""
        mapping = MAPPINGS.get(type(op))
        if mapping is None:
            return self._expanded(op, operands)
        if mapping.operands == "wide":
            wide = wide_of(op)
            given = [self._operand(v, x, lambda x, d: self.widened(x, d, wide) if d.is_float else x) for v, x in pairs(op, operands)]
        elif mapping.operands == "stored":
            given = list(operands) if mapping.stacks else [self.dense(x) if isinstance(x, Stack) else x for x in operands]
        else:
            to = self.carried if mapping.operands == "carried" else self._moving
            given = [self._operand(v, x, to) for v, x in pairs(op, operands)]
        found = mapping.function(self, op, *given)
        results = found if isinstance(found, tuple) else (found,)
        return tuple(self._result(op, mapping.operands, v, x) for v, x in zip(op.results, results, strict=True))

    def _operand(self, value: DscValue, x: Tree, to: Callable[[Value, DType], Value]) -> Tree:
        return x if isinstance(value.type, Bundle) else to(self.dense(x), value.dtype)

    def _moving(self, x: Value, dtype: DType) -> Value:
        return self.cast(x, DType.f32) if dtype in FP8 else x

    def _result(self, op: Op, operands: str, value: DscValue, x: Tree) -> Tree:
        if isinstance(value.type, Bundle) or operands == "stored":
            return x
        if operands == "wide":
            return self.rounded(x, wide_of(op), value.dtype) if value.dtype.is_float else x
        moved = operands == "carried" or value.dtype in FP8
        return self.uncarried(x, value.dtype) if moved else x

    def _expanded(self, op: Op, operands: Sequence[Tree]) -> tuple[Tree, ...]:
        b = Builder(op.name, component=op.name)
        results = op.expand(b)
        if results is None:
            raise Unmapped("it has no mapping to standard ops")
        values: dict[DscValue, Tree] = dict(zip(op.operands, operands, strict=True))
        for inner in b.ops:
            values.update(zip(inner.results, self.lower(inner, [values[v] for v in inner.operands]), strict=True))
        return tuple(values[v] for v in results)


def carrier(dtype: DType) -> DType:
    """The type in which values of `dtype` travel through ops that runtimes know for 32 and 64 bits only; every value is kept."""
    if dtype in (DType.f64, DType.f32, DType.i64, DType.i32):
        return dtype
    return DType.f32 if dtype.is_float else DType.i32


def pairs(op: Op, operands: Sequence[Tree]) -> list[tuple[DscValue, Tree]]:
    return list(zip(op.operands, operands, strict=True))


def wide_of(op: Op) -> DType:
    """What an op computes in."""
    values = [v for v in (*op.operands, *op.results) if not isinstance(v.type, Bundle)]
    return DType.f64 if any(v.dtype is DType.f64 for v in values) else DType.f32
