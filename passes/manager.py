"""Passes and pipelines: what a pass is, how a pipeline is written as text, and how it is run, recorded and bisected.

A pass is a frozen dataclass under `@register`: its options are its fields, and calling it gives a new module.

    @register
    @dataclass(frozen=True)
    class Recompute(Pass):
        name: ClassVar[str] = "recompute"
        requires: ClassVar[str] = "differentiated..sharded"
        ensures: ClassVar[str | None] = "rematerialized"
        budget_gb: float

        def __call__(self, module: Module) -> Module: ...

A pipeline is passes in order, with their options in braces: `autodiff,quantize-fp8{recipe=deepseek-v3},recompute{budget-gb=60}`.
A value is a number, a word (which may hold anything but blanks and `,=[]{}"`), a string in quotes or a list in brackets.

The docstring of every pass shows what it does, in this form, once or more often:

    Before `recompute{budget-gb=60}`:

        func @f(...) ...

    after:

        func @f(...) ...

Both are IR text, and a test runs the pipeline on the one and compares the result with the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from time import perf_counter
from typing import Any, ClassVar, NoReturn, TypeVar, get_type_hints

from ..ir.attributes import convert
from ..ir.core import Func, Module, Op
from ..ir.diagnostics import IRError
from ..ir.errors import DscError, require
from ..ir.printer import Word, print_attribute
from ..ir.verify import STAGES, stage_index, verify


@dataclass(frozen=True)
class Declined:
    """A rewrite that a pass did not do, and why."""

    func: str
    op: str
    reason: str

    def __str__(self) -> str:
        return f"@{self.func} {self.op}: {self.reason}"


@dataclass(frozen=True)
class Pass:
    """One rewriting of a module. Subclasses declare their options as fields and what they do as `__call__`.

    A pass sets the stage that it `ensures` itself, and says with `decline` what it leaves as it is.
    """

    name: ClassVar[str]
    requires: ClassVar[str] = ".."
    """The stages of the modules it takes: `traced` alone, `..traced` up to it, `differentiated..` from it on, or `a..b`.

    Without an upper end it is the stage before `ensures`: no pass runs twice, or carries a module back.
    """
    ensures: ClassVar[str | None] = None
    """The stage of the result, unless it was further before; None where it stays what it was."""
    declined: list[Declined] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, module: Module) -> Module:
        raise TypeError(f"{type(self).__name__} does not say what it does")

    def decline(self, func: Func, op: Op, reason: str) -> None:
        """Record why `op` is left as it is: `--why` shows it."""
        self.declined.append(Declined(func.name, op.id, reason))

    def __str__(self) -> str:
        """As a pipeline says it; options at their defaults are left out."""
        given = [(f, getattr(self, f.name)) for f in options(type(self)).values()]
        shown = ",".join(f"{_option(f.name)}={_print(value)}" for f, value in given if value != _default(f))
        return f"{self.name}{{{shown}}}" if shown else self.name


PASSES: dict[str, type[Pass]] = {}
"""Every registered pass by name."""

PassClass = TypeVar("PassClass", bound=type[Pass])


def register(cls: PassClass) -> PassClass:
    """Make a pass known to pipelines by its `name`."""
    if cls.name in PASSES:
        raise TypeError(f"pass {cls.name!r} is registered twice: {PASSES[cls.name].__qualname__} and {cls.__qualname__}")
    for stage in {*_range(cls), cls.ensures or "traced"}:
        if stage not in STAGES:
            raise TypeError(f"pass {cls.name!r} speaks of a stage {stage!r}; there are {', '.join(STAGES)}")
    PASSES[cls.name] = cls
    return cls


def _range(cls: type[Pass]) -> tuple[str, str]:
    """The first and the last stage whose modules the pass takes."""
    first, dots, last = cls.requires.partition("..")
    every = list(STAGES)
    latest = every[max(0, every.index(cls.ensures) - 1)] if cls.ensures in every else every[-1]
    return first or every[0], last or (latest if dots else first)


def taken(cls: type[Pass]) -> str:
    """The stages whose modules the pass takes, in words."""
    first, last = _range(cls)
    return f"at stage {first}" if first == last else f"at the stages from {first} to {last}"


def options(cls: type[Pass]) -> dict[str, Field[Any]]:
    """The fields of a pass that a pipeline may set, by the name that it uses: `budget_gb` is `budget-gb` there."""
    return {_option(f.name): f for f in fields(cls) if f.init}


def _option(field_name: str) -> str:
    return field_name.replace("_", "-")


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


BARE = re.compile(r'[^\s,={}\[\]"]+')
NUMBER = re.compile(r"-?(\d+(\.\d*)?([eE][+-]?\d+)?|inf|nan)")
STRING = re.compile(r'"(\\.|[^"\\])*"')


def _print(value: Any) -> str:
    if isinstance(value, str) and BARE.fullmatch(value):
        return value
    return f"[{','.join(map(_print, value))}]" if isinstance(value, tuple) else print_attribute(value)


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes that a pipeline says. Raises `DscError` with the column, what was found and what is near to it."""
    return _Pipeline(text).passes()


@dataclass
class _Pipeline:
    text: str
    at: int = 0

    def passes(self) -> tuple[Pass, ...]:
        found: list[Pass] = []
        while self.text.strip():
            found.append(self._pass())
            if not self._skip(","):
                break
        if self.at < len(self.text.rstrip()):
            self._fail(self.at, f"found {self.text[self.at]!r}, expected ',' and another pass, or the end")
        return tuple(found)

    def _pass(self) -> Pass:
        start, name = self._bare("the name of a pass")
        cls = PASSES.get(name)
        if cls is None:
            self._fail(start, unknown("pass", name, PASSES))
        given = dict(self._options(cls)) if self._skip("{") else {}
        missing = [key for key, f in options(cls).items() if _default(f) is MISSING and f.name not in given]
        if missing:
            self._fail(start, f"{name} needs {', '.join(missing)}: {name}{{{','.join(f'{key}=...' for key in missing)}}}")
        try:
            return cls(**given)
        except DscError as error:
            self._fail(start, f"{name}: {error}")

    def _options(self, cls: type[Pass]) -> Iterator[tuple[str, Any]]:
        known, seen = options(cls), set[str]()
        while not self._skip("}"):
            if seen:
                self._expect(",")
            start, key = self._bare(f"an option of {cls.name}")
            if key not in known:
                self._fail(start, unknown("option", key, known, f" of {cls.name}"))
            if key in seen:
                self._fail(start, f"{key} is given twice")
            seen.add(key)
            self._expect("=")
            start, raw = self._blank(), self._value()
            try:
                yield known[key].name, _convert(get_type_hints(cls)[known[key].name], raw)
            except DscError as error:
                self._fail(start, f"{cls.name}: {key}: {error}")

    def _value(self) -> Any:
        if self._skip("["):
            items: list[Any] = []
            while not self._skip("]"):
                if items:
                    self._expect(",")
                items.append(self._value())
            return items
        if found := STRING.match(self.text, self._blank()):
            self.at = found.end()
            return str(json.loads(found[0]))
        return _Bare(self._bare("a value")[1])

    def _bare(self, what: str) -> tuple[int, str]:
        start = self._blank()
        found = BARE.match(self.text, start)
        if not found:
            self._fail(start, f"expected {what}, found {self._here()}")
        self.at = found.end()
        return start, found[0]

    def _skip(self, sign: str) -> bool:
        if not self.text.startswith(sign, self._blank()):
            return False
        self.at += len(sign)
        return True

    def _expect(self, sign: str) -> None:
        if not self._skip(sign):
            self._fail(self.at, f"expected {sign!r}, found {self._here()}")

    def _blank(self) -> int:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.at

    def _here(self) -> str:
        return repr(self.text[self.at]) if self.at < len(self.text) else "the end"

    def _fail(self, at: int, message: str) -> NoReturn:
        raise DscError(f"pipeline, column {at + 1}: {message}")


class _Bare(str):
    """A value without quotes: `60` is a number, or a text where the option is one."""

    __slots__ = ()


def _convert(hint: Any, raw: Any) -> Any:
    try:
        return convert(hint, _read(raw, _literal))
    except DscError:
        with suppress(DscError):
            return convert(hint, _read(raw, str))
        raise


def _read(raw: Any, leaf: Callable[[_Bare], Any]) -> Any:
    if isinstance(raw, list):
        return [_read(item, leaf) for item in raw]
    return leaf(raw) if isinstance(raw, _Bare) else raw


def _literal(raw: _Bare) -> Any:
    if not NUMBER.fullmatch(raw):
        return Word(raw)
    return int(raw) if raw.lstrip("-").isdigit() else float(raw)


def unknown(what: str, name: str, known: Iterable[str], of: str = "") -> str:
    near = get_close_matches(name, known, 1)
    return f"unknown {what} {name}{of}; {f'did you mean {near[0]}?' if near else 'known are: ' + (', '.join(known) or 'none')}"


@dataclass(frozen=True)
class Record:
    """What one pass did."""

    index: int
    """Its place in the pipeline, from 1."""
    name: str
    options: str
    """The pass as a pipeline says it, options included."""
    seconds: float
    ops_before: int
    ops_after: int
    changed: bool
    declined: tuple[Declined, ...]


@dataclass(frozen=True)
class Result:
    """The module that a pipeline ends with, and what each pass did."""

    module: Module
    records: tuple[Record, ...]


def run_pipeline(
    module: Module,
    passes: Iterable[Pass],
    *,
    until: str | None = None,
    on_snapshot: Callable[[Record, Module], None] | None = None,
) -> Result:
    """Run `passes` in order, and verify the module before the first and after each.

    `until` names a stage: the passes that carry the module past it are not run, nor is what follows them. `on_snapshot` is
    handed the record and the module after each pass. Raises `DscError` where a pass does not take a module of the stage it
    meets, and where the result of a pass breaks a law of the IR: that is the pass's fault, and the message says which one.
    """
    check_until(until)
    verify(module)
    records: list[Record] = []
    for index, each in enumerate(passes, 1):
        if until and each.ensures and stage_index(each.ensures) > stage_index(until):
            break
        _check_stage(each, module)
        known, start = len(each.declined), perf_counter()
        try:
            after = each(module)
        except DscError as error:
            raise DscError(f"{each.name}: {error}") from error
        seconds = perf_counter() - start
        _check_result(each, module, after)
        changed = after is not module and after != module
        declined = tuple(each.declined[known:])
        records.append(Record(index, each.name, str(each), seconds, _count(module), _count(after), changed, declined))
        module = after
        if on_snapshot:
            on_snapshot(records[-1], module)
    return Result(module, tuple(records))


def check_until(stage: str | None) -> None:
    """Raise `DscError` where there is no such stage to stop at."""
    require(stage is None or stage in STAGES, unknown("stage", stage or "", STAGES))


def _count(module: Module) -> int:
    return sum(len(func.ops) for func in module.funcs)


def _check_stage(each: Pass, module: Module) -> None:
    first, last = _range(type(each))
    if not stage_index(first) <= stage_index(module.stage) <= stage_index(last):
        raise DscError(f"{each.name} takes a module {taken(type(each))}, but this one is at stage {module.stage}")


def _check_result(each: Pass, before: Module, after: Module) -> None:
    blame = f"{each.name} has a bug (the program is not at fault): its result"
    expected = max(each.ensures or before.stage, before.stage, key=stage_index)
    require(after.stage == expected, f"{blame} is at stage {after.stage}, expected {expected}")
    try:
        verify(after)
    except IRError as error:
        raise DscError(f"{blame} breaks the laws of the IR\n{error}") from error


def apply(module: Module, pipeline: str | Iterable[Pass]) -> Module:
    """`module` after a pipeline, given as text or as passes. Errors are those of `run_pipeline`.

    >>> module = dsc.parse("func @f(%x: f32[2]) {\\n  %y: f32[2] = neg(%x)  @ f#1 F\\n  return %x\\n}\\n")
    >>> len(dsc.apply(module, "simplify").main.ops)
    0
    """
    require(isinstance(module, Module), f"cannot apply passes to a {type(module).__name__}: expected a module (dsc.trace, dsc.parse)")
    return run_pipeline(module, parse_pipeline(pipeline) if isinstance(pipeline, str) else pipeline).module


def bisect(module: Module, passes: Iterable[Pass], same: Callable[[Module], bool]) -> str | None:
    """The name of the first pass after which `same(module)` no longer holds; None where it holds to the end.

    `same` says whether a module still means what the pipeline started from, by running it on some backend. It is asked in
    order, after each pass that changes something: a pipeline is short, and halving could pass over a fault that a later pass
    removes again. Raises `DscError` where `same` does not hold even before the first pass.
    """
    require(same(module), "the module differs from what is expected before the first pass, so no pass is to blame")
    for each in passes:
        result = run_pipeline(module, [each])
        if result.records[0].changed and not same(result.module):
            return each.name
        module = result.module
    return None
