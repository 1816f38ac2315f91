"""Which kernel runs which op, and how it is launched.

A kernel file holds `@triton.jit` functions and one *launcher* under `@kernel(OpClass)`. The launcher is a pure function of the op, the
target and the layouts of its tensors, and returns a `Launch` (or several, run in order): grid, arguments, constants, options. No
tensor is touched, so one description serves the executor on a GPU, the interpreter, and compilation ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, TypeAlias, TypeVar

from ...ir.core import Op, Role
from ...ir.types import DType, tensors
from .targets import Target

POINTERS: dict[DType, str] = {
    DType.f64: "*fp64",
    DType.f32: "*fp32",
    DType.f16: "*fp16",
    DType.bf16: "*bf16",
    DType.e5m6: "*fp16",
    DType.f8e4m3: "*fp8e4nv",
    DType.f8e5m2: "*fp8e5",
    DType.e8m0: "*u8",
    DType.i64: "*i64",
    DType.i32: "*i32",
    DType.i16: "*i16",
    DType.i8: "*i8",
    DType.u8: "*u8",
    DType.bool: "*i8",
}
"""What a kernel sees of a tensor of each dtype. E5M6 lies as float16 values, E8M0 as its exponent byte, bool as 0 or 1 in a byte."""


@dataclass(frozen=True)
class Slot:
    """A tensor that a kernel is given: the op's operand, result or workspace of that number (bundles count field by field)."""

    kind: Literal["operand", "result", "workspace"]
    index: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    as_bytes: bool = False
    """Whether the kernel sees bytes: FP8 codes that it takes apart itself."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def pointer(self) -> str:
        """Its type in a kernel's signature."""
        return "*u8" if self.as_bytes else POINTERS[self.dtype]

    @property
    def format(self) -> str:
        """What `arithmetic.widen` and `narrow` are told of its elements: the dtype, with `_bytes` where FP8 is handled as bytes."""
        return f"{self.dtype.name}_bytes" if self.as_bytes else self.dtype.name

    def on(self, target: Target) -> Slot:
        """The slot as `target` takes it: as bytes where it is FP8 and the target has no such type."""
        fp8 = self.dtype in (DType.f8e4m3, DType.f8e5m2)
        return replace(self, as_bytes=True) if fp8 and target.fp8 == "none" else self


Slots: TypeAlias = "Slot | tuple[Slots, ...]"
"""A bundle is given as the tuple of its fields."""

Argument: TypeAlias = "Slot | int | float"


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel: all of it but the addresses.

    kernel     the `@triton.jit` function
    grid       programs along up to three axes; a 0 among them: nothing is launched
    arguments  by parameter name, in any order: tensors, ints (i32, i64 beyond), floats (f32)
    constants  the `tl.constexpr` parameters: ints, floats, bools, strings
    fusion     whether the compiler may contract a * b + c where the kernel does not say `tl.fma`
    workspace  tensors that it needs besides: each as `Slot("workspace", i, ...)` among the arguments of this or a later launch
    described  arguments that the kernel copies by tensor descriptors, which want them at multiples of 16 bytes
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Argument]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    fusion: bool = False
    workspace: tuple[Slot, ...] = ()
    described: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fusion}


@dataclass(frozen=True)
class Declined:
    """Why a kernel cannot run an op as it stands: the torch implementation does."""

    reason: str


Launcher = Callable[..., "Launch | tuple[Launch, ...] | Declined"]
LauncherT = TypeVar("LauncherT", bound=Launcher)


KERNELS: dict[type[Op], Launcher] = {}
"""The launcher of each op that has a kernel. `kernels/__init__.py` imports every file, which fills it.

Operands and results of an op with the trait STRIDED have any strides but for the last axis; those of others are contiguous.
"""


def kernel(cls: type[Op]) -> Callable[[LauncherT], LauncherT]:
    """Attach the launcher below to the op `cls`. A second one raises TypeError.

    It is called as `launcher(op, target, *operands, *results)` with one `Slots` per declared operand field (None where an optional one is
    absent, a tuple where the field is a tuple of values or a bundle) and one per result.
    """

    def attach(launcher: LauncherT) -> LauncherT:
        if cls in KERNELS:
            raise TypeError(f"op {cls.name!r} has two kernels: {KERNELS[cls].__qualname__} and {launcher.__qualname__}")
        KERNELS[cls] = launcher
        return launcher

    return attach


def plan(op: Op, target: Target, operands: tuple[Slots, ...], results: tuple[Slots, ...]) -> tuple[Launch, ...] | Declined:
    """The launches that run `op` on tensors so laid out; or why its kernel, if there is one, does not."""
    if type(op) not in KERNELS:
        return Declined("no kernel")
    every = [t for v in (*op.operands, *op.results) for t in tensors(v.type)]
    if any(t.dtype is DType.f64 for t in every):
        return Declined("f64, but kernels compute in float32")
    found = KERNELS[type(op)](op, target, *_by_field(op, operands), *results)
    return (found,) if isinstance(found, Launch) else found


def _by_field(op: Op, operands: tuple[Slots, ...]) -> list[Slots | None]:
    rest, found = list(operands), list[Any]()
    for argument in op.arguments:
        given = getattr(op, argument.name)
        if argument.role is Role.OPERANDS:
            found.append(tuple(rest.pop(0) for _ in given))
        elif argument.role is not Role.ATTRIBUTE:
            found.append(None if given is None else rest.pop(0))
    return found
