"""IR to text. What it prints, `parse` reads back to an equal module, at every stage, and prints again byte for byte."""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from .core import Func, Module, Op, Role, Symbol, Value
from .types import DType


def print_module(module: Module) -> str:
    """The whole module, its header first."""
    head = {"stage": Word(module.stage), **module.attributes}
    header = f"module {{ {', '.join(f'{k}={print_attribute(v)}' for k, v in head.items())} }}\n"
    return "\n".join([header, *map(print_func, module.funcs)])


def print_func(func: Func) -> str:
    """One function, with a newline at its end."""
    names = Names()
    params = ", ".join(f"{names.define(p)}: {p.type}" for p in func.params)
    lines = [print_op(op, names) for op in func.ops]
    results = ", ".join(names[r] for r in func.results)
    updates = ", ".join(f"{names[func.params[p]]}={r}" for p, r in sorted(func.updates.items()))
    head = f"func @{func.name}({params}){f' updates {{{updates}}}' if updates else ''} {{"
    return "\n".join([head, *(f"  {line}" for line in lines), f"  return {results}".rstrip(), "}", ""])


def print_op(op: Op, names: Names | None = None) -> str:
    """One op as a line. Without `names` its operands show their hints, which may not be unique: for messages."""
    names = Names() if names is None else names
    arguments = []
    for a in op.arguments:
        given = getattr(op, a.name)
        if a.role is Role.OPERAND:
            text = names[given]
        elif a.role is Role.OPTIONAL:
            text = "none" if given is None else names[given]
        elif a.role is Role.OPERANDS:
            text = f"[{', '.join(names[v] for v in given)}]"
        else:
            text = print_attribute(given)
        if a.positional:
            arguments.append(text)
        elif a.required or _differs(given, a.default):
            arguments.append(f"{a.name}={text}")
    binders = ", ".join(f"{names.define(r)}: {r.type}" for r in op.results)
    place = f"  @ {op.id} {op.phase.name}" if op.id else ""
    return f"{binders + ' = ' if binders else ''}{op.name}({', '.join(arguments)}){place}"


class Word(str):
    """A bare word among attributes, like a dtype or the name of a stage."""

    __slots__ = ()


def print_attribute(value: Any) -> str:
    """A literal of the text form."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case Symbol():
            return f"@{value}"
        case Word():
            return str(value)
        case str():
            return json.dumps(value, ensure_ascii=not value.isprintable())  # a lone surrogate has no UTF-8
        case int() | float():
            return repr(value)
        case Enum():
            return value.name if isinstance(value, DType) else str(value.value)
        case tuple() | list():
            return f"[{', '.join(map(print_attribute, value))}]"
        case dict():
            return f"{{{', '.join(f'{key}={print_attribute(item)}' for key, item in value.items())}}}"
        case _ if is_dataclass(value):
            given = {f.name: getattr(value, f.name) for f in fields(value) if _differs(getattr(value, f.name), f.default)}
            return f"{{{', '.join(f'{key}={print_attribute(item)}' for key, item in given.items())}}}"
    raise TypeError(f"no text form for an attribute of type {type(value).__name__}")


def _differs(given: Any, default: Any) -> bool:
    """Whether an attribute has to be printed: -0.0 equals the default 0.0, but it is another number."""
    return given != default or repr(given) != repr(default)


class Names:
    """Unique names for values, given in the order of definition: `%h`, `%h_1`, ..."""

    def __init__(self) -> None:
        self._names: dict[Value, str] = {}
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def define(self, value: Value) -> str:
        hint = re.sub(r"[^A-Za-z0-9_]+", "_", value.name) or "v"
        name = hint
        while name in self._taken:
            self._next[hint] = self._next.get(hint, 0) + 1
            name = f"{hint}_{self._next[hint]}"
        self._taken.add(name)
        self._names[value] = f"%{name}"
        return self._names[value]

    def __getitem__(self, value: Value) -> str:
        return self._names.get(value, f"%{value.name}")
