"""What every rule needs: the table they stand in, the builder they emit into, torch's dtypes and type promotion in the IR.

A rule is a function `(b, *args, **kwargs)` under `@aten("add.Tensor")`: `args` and `kwargs` are those of the torch op with
every tensor replaced by its IR value, `b` emits ops and knows the type that torch gave the result. It returns the value, or
a tuple where the op has several results. An in-place op needs no rule: the walk applies its functional form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...ir.core import Builder, Op, Value
from ...ir.errors import DscError, require
from ...ir.ops.control import LITERAL_LIMIT, Constant, Literal
from ...ir.ops.elementwise import Cast, Ne
from ...ir.ops.shape import Broadcast, Transpose
from ...ir.types import Dim, DType, Tensor
from ..state_dict import to_numpy
from ..weights import NUMPY_DTYPES

Number = int | float | bool

DTYPES: dict[torch.dtype, DType] = {getattr(torch, dtype.name): DType[name] for name, dtype in NUMPY_DTYPES.items()}
TORCH = {dtype: torch_dtype for torch_dtype, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Complex:
    """A complex tensor, which the IR does not have: its two parts, of one shape."""

    re: Value
    im: Value


Rule = Callable[..., Any]
OpClass = Callable[..., Op]
"""A declared op, called with its operands and attributes."""

TABLE: dict[str, Rule] = {}
"""Every rule, by the torch op's full name: `aten.add.Tensor`."""


def aten(*names: str, namespace: str = "aten") -> Callable[[Rule], Rule]:
    """Let the function below translate these ops: `@aten("add.Tensor")`. A name without an overload means `.default`."""

    def register(rule: Rule) -> Rule:
        for name in names:
            full = f"{namespace}.{name if '.' in name else f'{name}.default'}"
            if full in TABLE:
                raise TypeError(f"{full} has two rules: {TABLE[full].__qualname__} and {rule.__qualname__}")
            TABLE[full] = rule
        return rule

    return register


def dtype_of(dtype: torch.dtype) -> DType:
    """The IR's name of a torch dtype."""
    require(dtype in DTYPES, f"{dtype} has no counterpart in the IR, which has {', '.join(DType.__members__)}")
    return DTYPES[dtype]


def type_of(tensor: torch.Tensor) -> Tensor:
    """The IR type of a tensor (a fake one will do)."""
    sizes = tuple(tensor.shape)
    require(all(type(size) is int for size in sizes), f"a shape must be static, found {list(sizes)}, which depends on data")
    return Tensor(dtype_of(tensor.dtype), sizes)


def ints(shape: Sequence[Dim]) -> tuple[int, ...]:
    """A shape of a traced program: its dimensions are static."""
    return tuple(dim for dim in shape if isinstance(dim, int))


def extent(x: Value, axis: int) -> int:
    """How many elements x has along an axis."""
    return ints(x.shape)[axis]


class Emitter(Builder):
    """A builder that also knows what torch says of the op being translated.

    `out` is the fake tensor, or list of them, that the op yields; `constants` collects the arrays too large for a literal.
    """

    def __init__(self, name: str, component: str = "main") -> None:
        super().__init__(name, component)
        self.out: Any = None
        self.constants: dict[str, np.ndarray] = {}

    @property
    def dtype(self) -> DType:
        """The dtype of the op's only result."""
        return dtype_of(self.out.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the op's only result."""
        return tuple(self.out.shape)

    def make(self, op: Op) -> Value:
        """Emit an op with one result and return that."""
        return self.emit(op).result

    def number(self, value: Number, dtype: DType) -> Value:
        """A rank-0 literal."""
        given = float(value) if dtype.is_float else int(value)
        return self.make(Literal((given,), (), dtype))

    def filled(self, value: Number, shape: Sequence[Dim], dtype: DType) -> Value:
        """A literal of one number everywhere."""
        return self.make(Literal((float(value) if dtype.is_float else int(value),), ints(shape), dtype))

    def data(self, tensor: torch.Tensor, name: str) -> Value:
        """The numbers of the buffer `name`: a literal up to 4,096 of them, else an entry of the module's constants."""
        type = type_of(tensor)
        require(not tensor.is_meta, f"{name} is no weight of the model and lies on the meta device: its numbers are not known")
        array = to_numpy(tensor.contiguous())
        if not 0 < type.size <= LITERAL_LIMIT:
            entry = name if self.name == "main" else f"{self.name}.{name}"
            self.constants[entry] = array
            return self.make(Constant(entry, (type,), names=(hint_of(name),)))
        return self.make(Literal(_numbers(array, type.dtype), tuple(tensor.shape), type.dtype, names=(hint_of(name),)))

    def cast(self, x: Value, dtype: DType) -> Value:
        """x in another dtype. Torch's bool of a number is whether it is not zero."""
        if x.dtype is dtype:
            return x
        if dtype is DType.bool:
            return self.make(Ne(x, self.number(0, x.dtype)))
        return self.make(Cast(x, dtype))

    def wide(self, x: Value) -> Value:
        """x in float32 where it is narrower: what a rule of several ops computes in, to round once as torch's kernel does."""
        return self.cast(x, DType.f32) if x.dtype.is_float and x.dtype.bits < 32 else x

    def stretch(self, x: Value, shape: Sequence[Dim]) -> Value:
        """x broadcast to `shape`."""
        return x if x.shape == tuple(shape) else self.make(Broadcast(x, ints(shape)))


def _numbers(array: np.ndarray, dtype: DType) -> tuple[int | float, ...]:
    """The elements as Python numbers that round to exactly them, in the fewest digits."""
    if not dtype.is_float:
        return tuple(int(x) for x in array.flat)
    short = [float(str(x)) for x in array.flat]
    back = np.asarray(short, np.float64).astype(np.float32 if dtype.bits <= 32 else np.float64).astype(array.dtype)
    same = np.equal(back, array.reshape(-1)) | np.isnan(array.reshape(-1))
    return tuple(s if ok else float(x) for s, ok, x in zip(short, same, array.flat, strict=True))


def hint_of(path: str) -> str:
    """A name for a weight's value: `q_a_proj_weight` for `model.layers.0.self_attn.q_a_proj.weight`."""
    return "_".join([part for part in path.split(".") if not part.isdigit()][-2:]) or "weight"


def promoted(*operands: Value | Number) -> DType:
    """Torch's type promotion: dimensioned tensors before scalars, float before int before bool, then the wider."""
    shown = [
        torch.empty((1,) * min(x.tensor.rank, 1), dtype=TORCH[x.dtype], device="meta") if isinstance(x, Value) else x for x in operands
    ]
    result = shown[0]
    for other in shown[1:]:
        common = torch.result_type(result, other)
        shaped = any(isinstance(x, torch.Tensor) and x.dim() for x in (result, other))
        result = torch.empty((1,) * shaped, dtype=common, device="meta")
    return dtype_of(result.dtype) if isinstance(result, torch.Tensor) else promoted(result, result)


def unify(b: Emitter, *operands: Value | Number, dtype: DType | None = None) -> tuple[Value, ...]:
    """The operands in one dtype, theirs by torch's promotion unless given; scalars beside tensors keep their full precision."""
    common = dtype or promoted(*operands)
    shaped = any(isinstance(x, Value) and x.shape for x in operands)
    exact = DType.f32 if shaped and common.is_float and common.bits < 32 else common

    def one(x: Value | Number) -> Value:
        if not isinstance(x, Value):
            return b.number(x, exact)
        scalar = shaped and not x.shape and x.dtype.kind == common.kind
        return x if scalar else b.cast(x, common)

    return tuple(map(one, operands))


def untransposed(w: Value) -> tuple[Value, bool]:
    """A matrix (or a stack of them), and whether it is to be read transposed: `transpose(w)` of the last two axes gives (w, True)."""
    rank = w.tensor.rank
    if isinstance(w.owner, Transpose) and w.owner.perm == (*range(rank - 2), rank - 1, rank - 2):
        return w.owner.x, True
    return w, False


def unsupported(what: str, expected: str) -> DscError:
    """The error of a rule that knows the op, but not with these arguments."""
    return DscError(f"{what} is not supported, expected {expected}")
