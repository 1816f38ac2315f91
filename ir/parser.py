"""Text to IR. Every fault of a text is reported at once, each with its line, column and a caret."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken

from . import ops as _ops  # noqa: F401 - fills the op table
from .attributes import convert, free
from .core import OPS, Func, Module, Op, Phase, Role, Symbol, Value, takes_result_types
from .diagnostics import Diagnostic, IRError
from .errors import DscError
from .printer import Word
from .types import Async, Bundle, DType, Ragged, Shape, Tensor, Type
from .verify import STAGES, check

DTYPES = dict(DType.__members__)
PHASES = dict(Phase.__members__)


def parse(text: str, file: str = "") -> Module:
    """The module that `text` says, verified. Raises `IRError`, a `DscError`, with every fault; `file` is for its message.

    >>> module = dsc.parse("func @f(%x: f32[2]) {\\n  %y: f32[2] = neg(%x)  @ f#1 F\\n  return %y\\n}\\n")
    >>> dsc.parse(str(module)) == module
    True
    """
    try:
        tree: Any = _lark().parse(text)  # not a tree: the transformer has made records of it
    except UnexpectedInput as error:
        raise IRError([_syntax(error, text)], text, file) from None
    reader = _Reader()
    module = reader.module(tree)
    faults = reader.faults or check(module, reader.places)
    if faults:
        raise IRError(faults, text, file)
    return module


@cache
def _lark() -> Lark:
    grammar = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    return Lark(grammar, start="module", parser="lalr", lexer="contextual", maybe_placeholders=True, transformer=_Tree())


@dataclass(slots=True)
class _Stmt:
    binders: list[tuple[Token, Type | DscError]]
    op: Token
    arguments: list[Any]
    place: tuple[str, Token] | None


@dataclass(slots=True)
class _Func:
    name: Token
    params: list[tuple[Token, Type | DscError]]
    updates: list[tuple[Token, Token]]
    body: list[_Stmt]
    results: list[Token]


@dataclass(slots=True)
class _Pair:
    key: Token
    value: Any


@v_args(inline=True)
class _Tree(Transformer[Token, Any]):
    """The syntax tree as the small records above, built while parsing."""

    def module(self, header: Any, *funcs: _Func) -> tuple[list[_Pair], list[_Func]]:
        return header or [], list(funcs)

    def header(self, *pairs: _Pair | None) -> list[_Pair]:
        return [p for p in pairs if p]

    def func(self, name: Token, *rest: Any) -> _Func:
        params = [r for r in rest if isinstance(r, tuple)]
        updates: list[Any] = next((r.children for r in rest if hasattr(r, "data")), [])
        return _Func(name, params, updates, [r for r in rest if isinstance(r, _Stmt)], rest[-1])

    def binder(self, name: Token, type: Type | DscError) -> tuple[Token, Type | DscError]:
        return name, type

    def usual_binder(self, token: Token) -> tuple[Token, Type | DscError]:
        name, _, type = token.partition(": ")
        return Token("VALUE", name, line=token.line, column=token.column), _usual_tensor(type)

    def update(self, name: Token, result: Token) -> tuple[Token, Token]:
        return name, result

    def stmt(self, *parts: Any) -> _Stmt:
        at = next(i for i, p in enumerate(parts) if isinstance(p, Token))
        binders = [p for p in parts[:at] if p]
        return _Stmt(binders, parts[at], [p for p in parts[at + 1 : -1] if p is not None], parts[-1])

    def place(self, id: Token, phase: Token) -> tuple[str, Token]:
        return id, phase

    def usual_place(self, token: Token) -> tuple[str, Token]:
        _, id, phase = token.split(" ")
        return id, Token("PHASE", phase)

    def pair(self, key: Token, value: Any) -> _Pair:
        return _Pair(key, value)

    def tensor(self, name: Token, *dims: Any) -> Type | DscError:
        fault = next((d for d in dims if isinstance(d, DscError)), None)
        return fault or _tensor(name, tuple(d for d in dims if d is not None))

    def bundle(self, *types: Any) -> Type | DscError:
        return next((t for t in types if isinstance(t, DscError)), Bundle(tuple(t for t in types if t)))

    def async_(self, tensor: Tensor | DscError) -> Type | DscError:
        return tensor if isinstance(tensor, DscError) else Async(tensor)

    def fixed(self, number: Token) -> int | DscError:
        return int(number) if number.isdigit() else DscError(f"a dimension is a whole number, found {number}")

    def ragged(self, name: Token, limit: Token) -> Ragged | DscError:
        known = self.fixed(limit)
        return known if isinstance(known, DscError) else Ragged(str(name), known)

    def value(self, token: Token) -> Token:
        return token

    def symbol(self, token: Token) -> Symbol:
        return Symbol(token[1:])

    def number(self, token: Token) -> int | float:
        return int(token) if token.lstrip("-").isdigit() else float(token)

    def string(self, token: Token) -> str:
        return str(json.loads(token))

    def word(self, token: Token) -> Word:
        return Word(token)

    def list(self, *items: Any) -> list[Any]:
        return [i for i in items if i is not None]

    def record(self, *pairs: _Pair | None) -> dict[str, Any]:
        return {str(p.key): p.value for p in pairs if p}

    def results(self, *names: Token | None) -> list[Token]:  # type: ignore[valid-type]
        return [n for n in names if n is not None]


def _tensor(dtype: str, shape: Shape) -> Type | DscError:
    if dtype not in DTYPES:
        return DscError(f"unknown dtype {dtype}; expected one of {', '.join(DTYPES)}")
    return Tensor(DTYPES[dtype], shape)


@lru_cache(maxsize=4096)
def _usual_tensor(text: str) -> Type | DscError:
    dtype, _, dims = text.rstrip("]").partition("[")
    return _tensor(dtype, tuple(map(int, dims.split(", "))) if dims else ())


@dataclass
class _Reader:
    """Records to IR. A statement that fails still defines its results, by the types that its binders declare."""

    faults: list[Diagnostic] = field(default_factory=list)
    places: dict[Any, tuple[int, int]] = field(default_factory=dict)
    unknown: set[Value] = field(default_factory=set)
    """Values of no known type: what reads them is passed over, so that one fault is reported once."""

    def module(self, tree: tuple[list[_Pair], list[_Func]]) -> Module:
        header, funcs = tree
        attributes: dict[str, Any] = {}
        for pair in header:
            if pair.key in attributes:
                self._fault(pair.key, f"{pair.key} is given twice")
            try:
                attributes[str(pair.key)] = free(pair.value)
            except DscError as error:
                self._fault(pair.key, f"{pair.key}: {error}")
        stage = str(attributes.pop("stage", "traced"))
        if stage not in STAGES:
            at = next(p.key for p in header if p.key == "stage")
            self._fault(at, f"unknown stage {stage}; expected one of {', '.join(STAGES)}")
        if not funcs:
            self.faults.append(Diagnostic(1, 1, "expected at least one function, found none"))
        return Module(tuple(map(self.func, funcs)), stage, attributes)

    def func(self, source: _Func) -> Func:
        scope: dict[str, Value] = {}
        params = []
        for name, type in source.params:
            if checked := self._type(name, type):
                params.append(self._define(scope, name, Value(checked, name[1:])))
        ops = [op for stmt in source.body if (op := self._stmt(stmt, scope))]
        results = [v for name in source.results if (v := self._use(scope, name))]
        updates = {}
        for name, result in source.updates:
            index = next((i for i, (p, _) in enumerate(source.params) if p == name), None)
            if index is None:
                self._fault(name, f"{name} is not a parameter of {source.name}")
            elif index in updates:
                self._fault(name, f"{name} is updated twice")
            elif not result.isdigit():
                self._fault(result, f"{name} is updated by the number of a result, found {result}")
            else:
                updates[index] = int(result)
        func = Func(source.name[1:], tuple(params), tuple(ops), tuple(results), updates)
        self.places[func] = (source.name.line or 0, source.name.column or 0)
        return func

    def _stmt(self, stmt: _Stmt, scope: dict[str, Value]) -> Op | None:
        types = [self._type(name, type) for name, type in stmt.binders]
        op = None if None in types else self._op(stmt, [t for t in types if t], scope)
        if op:
            for (name, _), value in zip(stmt.binders, op.results, strict=True):
                self._define(scope, name, value)
            return op
        for (name, _), type in zip(stmt.binders, types, strict=True):
            value = self._define(scope, name, Value(type or Bundle(()), name[1:]))
            if type is None:
                self.unknown.add(value)
        return None

    def _op(self, stmt: _Stmt, types: list[Type], scope: dict[str, Value]) -> Op | None:
        cls = OPS.get(stmt.op)
        if cls is None:
            near = get_close_matches(stmt.op, OPS, 1)
            self._fault(stmt.op, f"unknown op {stmt.op}{f'; did you mean {near[0]}?' if near else ''}")
            return None
        before = len(self.faults)
        given = self._arguments(cls, stmt, scope)
        operands = [v for g in given.values() for v in (g if isinstance(g, tuple) else (g,)) if isinstance(v, Value)]
        if len(self.faults) > before or not self.unknown.isdisjoint(operands):
            return None
        if takes_result_types(cls):
            given["result_types"] = tuple(types)
        if stmt.place:
            id, phase = stmt.place
            if phase not in PHASES:
                self._fault(phase, f"unknown phase {phase}; expected one of {', '.join(PHASES)}")
                return None
            given |= {"id": str(id), "phase": PHASES[phase]}
        try:
            op = cls(**given, names=tuple(name[1:] for name, _ in stmt.binders))
        except DscError as error:
            self._fault(stmt.op, f"{stmt.op}: {error}")
            return None
        self.places[op] = (stmt.op.line or 0, stmt.op.column or 0)
        if not stmt.binders and op.results:
            self._fault(stmt.op, f"{stmt.op}: the number of results is {len(op.results)}, but no names stand before it")
            return None
        for (name, _), declared, result in zip(stmt.binders, types, op.results, strict=True):
            if declared != result.type:
                self._fault(name, f"{name} is declared {declared}, but {stmt.op} gives {result.type}")
        return op

    def _arguments(self, cls: type[Op], stmt: _Stmt, scope: dict[str, Value]) -> dict[str, Any]:
        positional = [a for a in cls.arguments if a.positional]
        by_name = {a.name: a for a in cls.arguments if not a.positional}
        given: dict[str, Any] = {}
        count = sum(not isinstance(a, _Pair) for a in stmt.arguments)
        if count != len(positional):
            expected = ", ".join(a.name for a in positional)
            self._fault(stmt.op, f"{stmt.op} takes {_count(len(positional), 'positional argument')} ({expected}), found {count}")
            return given
        waiting = iter(positional)
        for item in stmt.arguments:
            argument = by_name.get(item.key) if isinstance(item, _Pair) else next(waiting)
            if argument is None:
                known = ", ".join(by_name) or "none"
                self._fault(item.key, f"{stmt.op} has no attribute {item.key}; it has: {known}")
            elif argument.name in given:
                self._fault(item.key, f"{argument.name} is given twice")
            else:
                at, raw = (item.key, item.value) if isinstance(item, _Pair) else (stmt.op, item)
                given[argument.name] = self._argument(argument.role, argument.hint, at, raw, scope, f"{stmt.op}: {argument.name}")
        missing = [a.name for a in cls.arguments if a.required and a.name not in given]
        if missing:
            self._fault(stmt.op, f"{stmt.op} needs {', '.join(missing)}")
        return given

    def _argument(self, role: Role, hint: Any, at: Token, raw: Any, scope: dict[str, Value], what: str) -> Any:
        if role is Role.OPERANDS:
            if isinstance(raw, list) and all(_is_value(v) for v in raw):
                return tuple(self._use(scope, v) for v in raw)
            self._fault(at, f"{what}: expected a list of values such as [%a, %b]")
        elif role is not Role.ATTRIBUTE:
            if _is_value(raw):
                return self._use(scope, raw)
            self._fault(at, f"{what}: expected a value such as %x")
        elif _is_value(raw):
            self._fault(at, f"{what}: expected an attribute, found the value {raw}")
        else:
            try:
                return convert(hint, raw)
            except DscError as error:
                self._fault(at, f"{what}: {error}")
        return None

    def _type(self, at: Token, type: Type | DscError) -> Type | None:
        if isinstance(type, DscError):
            self._fault(at, f"{at}: {type}")
            return None
        return type

    def _define(self, scope: dict[str, Value], name: Token, value: Value) -> Value:
        if name in scope:
            self._fault(name, f"{name} is defined twice")
        scope[str(name)] = value
        return value

    def _use(self, scope: Mapping[str, Value], name: Token) -> Value | None:
        value = scope.get(name)
        if value is None:
            near = get_close_matches(name, scope, 1)
            self._fault(name, f"{name} is not defined before this line{f'; did you mean {near[0]}?' if near else ''}")
        return value

    def _fault(self, at: Token, message: str) -> None:
        self.faults.append(Diagnostic(at.line or 0, at.column or 0, message))


def _is_value(raw: Any) -> bool:
    return isinstance(raw, Token) and raw.type == "VALUE"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


_UNSAID = ("COMMENT", "__IGNORE_0", "BINDER", "PLACE")
"""Terminals that a message does not list: ignored ones, and those that stand for a sequence of others."""

_WORDS: dict[str, str] = {
    "VALUE": "a value (%x)",
    "SYMBOL": "a function name (@f)",
    "NAME": "a name",
    "NUMBER": "a number",
    "STRING": '"text"',
    "ID": "an id",
    "PHASE": "a phase (F, I, W or R)",
    "$END": "the end",
}


def _syntax(error: UnexpectedInput, text: str) -> Diagnostic:
    lark = _lark()
    spelled: Callable[[str], str] = lambda name: _WORDS.get(name) or _pattern(lark, name)  # noqa: E731
    allowed: Iterable[str] = getattr(error, "accepts", None) or getattr(error, "expected", None) or getattr(error, "allowed", None) or ()
    expected = ", ".join(sorted({spelled(name) for name in allowed if name not in _UNSAID}))
    if isinstance(error, UnexpectedToken) and error.token.type != "$END":
        found = error.token.partition(":")[0] if error.token.type == "BINDER" else str(error.token)
        return Diagnostic(error.line, error.column, f"found {found!r}, expected {expected}")
    if isinstance(error, UnexpectedCharacters):
        at = error.pos_in_stream or 0
        if text[at : at + 1] == '"':
            return Diagnostic(error.line, error.column, "this string does not end on its line, or has an unknown escape")
        return Diagnostic(error.line, error.column, f"found {text[at : at + 1]!r}, expected {expected}")
    lines = text.rstrip().split("\n")
    assert isinstance(error, UnexpectedEOF | UnexpectedToken)
    return Diagnostic(len(lines), len(lines[-1]) + 1, f"the text ends here, expected {expected}")


def _pattern(lark: Lark, name: str) -> str:
    found = next((t for t in lark.terminals if t.name == name), None)
    return repr(found.pattern.value) if found and found.pattern.type == "str" else name.lower()
