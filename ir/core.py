"""The IR's objects: `Value`, `Op`, `Func`, `Module`, and the `Builder` that makes functions.

Everything is immutable once it stands in a function, so passes share what they do not change. An op is declared once, by
a class under `@op`; constructing it runs its type rule `infer`, so an ill-typed op cannot exist and a type cannot go
stale. Program order is meaning: it is the order in which one rank runs the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from functools import cached_property, wraps
from graphlib import TopologicalSorter
from types import NoneType
from typing import Any, ClassVar, Self, TypeVar, cast, dataclass_transform, get_args, get_origin, get_type_hints

from .errors import DscError, require
from .types import Async, Bundle, DType, Shape, Tensor, Type


class Phase(Enum):
    """Which part of a training step an op belongs to. Forward ops that are run again in backward are R."""

    F = "forward"
    I = "backward for inputs"  # noqa: E741 - the letter that ZeroBubble and torch's schedules use
    W = "backward for weights"
    R = "recompute"


class Trait(Enum):
    """What a pass may know about an op without naming it."""

    ELEMENTWISE = "each result element depends on the same element of the (broadcast) operands"
    VIEW = "moves no data: the result may share the operand's memory"
    STRIDED = "reads operands and writes results where they lie, whatever the strides of their axes but the last"
    CHEAP = "cheap to run again in backward"
    ROUTING = "decides where tokens go: never run twice, lest the second run decide otherwise"
    SOURCE = "reads no operand: a weight or a constant"
    COLLECTIVE = "ranks run it together: never dropped, shared or run twice, lest one of them wait for the others"


class Symbol(str):
    """The name of a function, written `@name`."""

    __slots__ = ()


class Value:
    """What an op or a function's parameter yields. Values are compared by identity; `name` is only a hint for the printer."""

    __slots__ = ("index", "name", "owner", "type")

    def __init__(self, type: Type, name: str, owner: Op | None = None, index: int = 0) -> None:
        self.type = type
        self.name = name
        self.owner = owner
        self.index = index

    @property
    def tensor(self) -> Tensor:
        """Its type, where only a tensor will do."""
        if isinstance(self.type, Tensor):
            return self.type
        raise DscError(f"expected a tensor, but %{self.name} is {self.type}")

    @property
    def bundle(self) -> Bundle:
        """Its type, where only a bundle will do."""
        if isinstance(self.type, Bundle):
            return self.type
        raise DscError(f"expected a bundle, but %{self.name} is {self.type}")

    @property
    def coming(self) -> Tensor:
        """The tensor that it is going to be, where only one on its way will do."""
        if isinstance(self.type, Async):
            return self.type.tensor
        raise DscError(f"expected a tensor on its way (async), but %{self.name} is {self.type}")

    @property
    def dtype(self) -> DType:
        return self.tensor.dtype

    @property
    def shape(self) -> Shape:
        return self.tensor.shape

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


class Role(Enum):
    """What a field of an op class is."""

    OPERAND = "Value"
    OPTIONAL = "Value | None"
    OPERANDS = "tuple[Value, ...]"
    ATTRIBUTE = "anything else"


@dataclass(frozen=True, slots=True)
class Argument:
    """One declared field of an op: how it prints, parses and copies follows from this alone.

    An operand without a default prints by position, as does an attribute declared before the first operand; every other
    attribute prints as `key=value`, unless it equals its default.
    """

    name: str
    role: Role
    hint: Any
    default: Any = MISSING
    positional: bool = False

    @property
    def required(self) -> bool:
        return self.default is MISSING


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Op:
    """One operation. Subclasses declare operands and attributes as fields and the type rule as `infer`."""

    name: ClassVar[str]
    traits: ClassVar[frozenset[Trait]] = frozenset()
    arguments: ClassVar[tuple[Argument, ...]] = ()
    floats: ClassVar[tuple[str, ...]] = ()
    work: ClassVar[int] = 0
    """Floating-point operations for each element of the first operand, where that is all there is to say."""

    id: str = ""
    """`component#n`: where the op came from, unique in its function; `component#n.k` for what a pass made of it."""
    phase: Phase = Phase.F
    names: tuple[str, ...] = ()
    """Hints for the names of the results."""
    results: tuple[Value, ...] = field(init=False)

    def __post_init__(self) -> None:
        for name in self.floats:
            object.__setattr__(self, name, float(getattr(self, name)))
        types = self.infer()
        names = self.names or ((self.name,) if len(types) == 1 else tuple(f"{self.name}_{i}" for i in range(len(types))))
        require(len(names) == len(types), f"the number of results is {len(types)}, but {len(names)} names stand before it")
        object.__setattr__(self, "results", tuple(Value(t, n, self, i) for i, (t, n) in enumerate(zip(types, names, strict=True))))

    def infer(self) -> tuple[Type, ...]:
        """The types of the results. It is the verifier too: it raises `DscError` with both sides and their values."""
        raise TypeError(f"{type(self).__name__} declares no type rule")

    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two, ragged dimensions at their bound."""
        if Trait.ELEMENTWISE in self.traits:
            return sum(t.size for r in self.results if isinstance(t := r.type, Tensor))
        return self.work * self.operands[0].tensor.size if self.work else 0

    def expand(self, b: Builder) -> tuple[Value, ...] | None:
        """The meaning of a fused op in more primitive ones, emitted into `b`; None for a primitive."""
        return None

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    @cached_property
    def operands(self) -> tuple[Value, ...]:
        """Every operand in declaration order, absent optional ones left out."""
        found: list[Value] = []
        for argument in self.arguments:
            given = getattr(self, argument.name)
            if argument.role is Role.OPERAND or (argument.role is Role.OPTIONAL and given is not None):
                found.append(given)
            elif argument.role is Role.OPERANDS:
                found.extend(given)
        return tuple(found)

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes by name, defaults included."""
        return {a.name: getattr(self, a.name) for a in self.arguments if a.role is Role.ATTRIBUTE}

    def with_operands(self, lookup: Callable[[Value], Value]) -> Self:
        """The same op over `lookup` of each operand; itself where nothing changes."""
        changes: dict[str, Any] = {}
        for argument in self.arguments:
            old = getattr(self, argument.name)
            if argument.role is Role.ATTRIBUTE or old is None:
                continue
            new = tuple(map(lookup, old)) if argument.role is Role.OPERANDS else lookup(old)
            if new is not old and new != old:
                changes[argument.name] = new
        return self.copy(**changes) if changes else self

    def copy(self, **changes: Any) -> Self:
        """A new op with other fields; result names are kept as hints unless given."""
        return replace(self, **{"names": tuple(r.name for r in self.results)} | changes)

    def __repr__(self) -> str:
        return f"<{self.name} {self.id} -> {', '.join(str(r.type) for r in self.results)}>"


OPS: dict[str, type[Op]] = {}
"""Every declared op by name."""

OpClass = TypeVar("OpClass", bound=type[Op])


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
def family(cls: OpClass) -> OpClass:
    """Let the ops derived from this class share its fields and its type rule."""
    return cast(OpClass, dataclass(frozen=True, eq=False, repr=False)(cls))


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
def op(name: str, *traits: Trait, work: int | None = None) -> Callable[[OpClass], OpClass]:
    """Declare the class below as the op `name`. Fields annotated `Value` are operands, the rest are attributes.

    `work` is how many floating-point operations it takes for each element of its first operand.
    """

    def declare(cls: OpClass) -> OpClass:
        if name in OPS:
            raise TypeError(f"op {name!r} is declared twice: {OPS[name].__qualname__} and {cls.__qualname__}")
        made = family(cls)
        made.name = name
        made.traits = frozenset(traits)
        if work is not None:
            made.work = work
        made.arguments = _arguments(made)
        made.floats = tuple(a.name for a in made.arguments if a.hint is float)
        OPS[name] = made
        return made

    return declare


def _arguments(cls: type[Op]) -> tuple[Argument, ...]:
    hints = get_type_hints(cls)
    base = {f.name for f in fields(Op)}
    found: list[Argument] = []
    for f in sorted(fields(cls), key=lambda f: bool(f.kw_only)):  # what a family adds by keyword comes last
        if f.name in base or f.name == "result_types":
            continue
        role = _role(hints[f.name])
        default = f.default if f.default_factory is MISSING else f.default_factory()
        before_operands = all(a.role is Role.ATTRIBUTE for a in found)
        positional = default is MISSING and (role is not Role.ATTRIBUTE or before_operands)
        found.append(Argument(f.name, role, hints[f.name], default, positional))
    return tuple(found)


def _role(hint: Any) -> Role:
    if hint is Value:
        return Role.OPERAND
    if set(get_args(hint)) == {Value, NoneType}:
        return Role.OPTIONAL
    if get_origin(hint) is tuple and get_args(hint) == (Value, ...):
        return Role.OPERANDS
    return Role.ATTRIBUTE


def takes_result_types(cls: type[Op]) -> bool:
    """Whether results are declared rather than inferred (weights, calls): then the text's binder is the declaration."""
    return "result_types" in cls.__dataclass_fields__


@dataclass(frozen=True, eq=False)
class Func:
    """A function: `params` in, `ops` in order, `results` out. `updates` says which result is a parameter's new state."""

    name: str
    params: tuple[Value, ...]
    ops: tuple[Op, ...]
    results: tuple[Value, ...]
    updates: Mapping[int, int] = field(default_factory=dict)
    """Parameter index -> result index. An executor may write the result into the parameter's memory."""

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What executors work out of this very function and keep as long as it lives, each under a key of its own."""
        return {}

    @cached_property
    def canonical(self) -> tuple[Any, ...]:
        """What two equal functions share: everything but the names of values."""
        number: dict[Value, int] = {}
        for value in self.params:
            number[value] = len(number)
        body = []
        for op in self.ops:
            for value in op.results:
                number[value] = len(number)
            body.append((op.name, *_key(op, number), op.id, op.phase, tuple(r.type for r in op.results)))
        types = tuple(p.type for p in self.params)
        return self.name, types, tuple(body), tuple(number[r] for r in self.results), tuple(sorted(self.updates.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Func) and self.canonical == other.canonical

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        from .printer import print_func

        return print_func(self)


def _key(op: Op, number: Mapping[Value, int]) -> Iterator[Any]:
    for argument in op.arguments:
        given = getattr(op, argument.name)
        match argument.role:
            case Role.ATTRIBUTE:
                yield repr(given)  # so that NaN equals itself, and 1 and 1.0 and True differ
            case Role.OPERANDS:
                yield tuple(number[v] for v in given)
            case _:
                yield None if given is None else number[given]


@dataclass(frozen=True, eq=False)
class Module:
    """Functions under one stage. The first function is the one that runs; the others are called.

    `attributes` are what all of it shares (the mesh, say). `constants` are arrays too large for text, by name; they are
    data of the artifact, not of the program, and equality does not look at them.
    """

    funcs: tuple[Func, ...]
    stage: str = "traced"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def main(self) -> Func:
        """The function that runs."""
        return self.funcs[0]

    @cached_property
    def by_name(self) -> Mapping[str, Func]:
        return {func.name: func for func in self.funcs}

    def __getitem__(self, name: str) -> Func:
        if name not in self.by_name:
            raise DscError(f"no function @{name}; the module has {', '.join('@' + f for f in self.by_name)}")
        return self.by_name[name]

    def replace(self, **changes: Any) -> Module:
        """A module with other fields."""
        return replace(self, **changes)

    def map(self, rule: Callable[[Func], Func]) -> Module:
        """The module with `rule` applied to each function; itself where nothing changes."""
        funcs = tuple(map(rule, self.funcs))
        return self if all(a is b for a, b in zip(funcs, self.funcs, strict=True)) else self.replace(funcs=funcs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Module):
            return NotImplemented
        same = self.stage == other.stage and dict(self.attributes) == dict(other.attributes)
        return same and self.funcs == other.funcs

    def __hash__(self) -> int:
        return hash((self.stage, self.funcs))

    def __str__(self) -> str:
        from .printer import print_module

        return print_module(self)


Fact = TypeVar("Fact")


def once(function: Callable[[Module], Fact]) -> Callable[[Module], Fact]:
    """`function`, computed once for each module, which never changes: the answer is kept with it, and must not be changed either."""
    key = f"once {function.__module__}.{function.__qualname__}"

    @wraps(function)
    def known(module: Module) -> Fact:
        facts = vars(module)
        if key not in facts:
            facts[key] = function(module)
        return cast("Fact", facts[key])

    return known


OpT = TypeVar("OpT", bound=Op)


class Builder:
    """Makes one function, op by op.

    `component` is where the ops that follow come from; an op that has no id yet is given `component#n`.
    """

    def __init__(self, name: str, component: str = "main", phase: Phase = Phase.F) -> None:
        self.name = name
        self.component = component
        self.phase = phase
        self.params: list[Value] = []
        self.ops: list[Op] = []
        self._numbers: dict[str, int] = {}

    def param(self, name: str, type: Type) -> Value:
        """A further parameter of the function."""
        self.params.append(Value(type, name))
        return self.params[-1]

    def emit(self, op: OpT) -> OpT:
        """Append `op`, giving it an id where it has none, and hand it back."""
        if not op.id:
            number = self._numbers[self.component] = self._numbers.get(self.component, 0) + 1
            object.__setattr__(op, "id", f"{self.component}#{number}")  # it has entered no function yet
            object.__setattr__(op, "phase", self.phase)
        self.ops.append(op)
        return op

    def finish(self, results: Sequence[Value], updates: Mapping[int, int] | None = None) -> Func:
        """The function that returns `results`."""
        return Func(self.name, tuple(self.params), tuple(self.ops), tuple(results), dict(updates or {}))


def users(func: Func) -> dict[Value, list[Op]]:
    """The ops that read each value, in order; a value that no op reads is absent."""
    found: dict[Value, list[Op]] = {}
    for op in func.ops:
        for value in dict.fromkeys(op.operands):
            found.setdefault(value, []).append(op)
    return found


def called(module: Module, func: Func) -> Iterable[str]:
    """The names of the functions that `func` calls, in order, repeats included."""
    for op in func.ops:
        for argument in op.arguments:
            if isinstance(given := getattr(op, argument.name), Symbol):
                yield str(given)


def callees_first(module: Module) -> tuple[Func, ...]:
    """The functions of the module, each after those that it calls."""
    order = TopologicalSorter({func.name: called(module, func) for func in module.funcs}).static_order()
    return tuple(module[name] for name in order)
