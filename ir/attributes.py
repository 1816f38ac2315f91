"""Attributes from text: a parsed literal becomes what the op's annotation says, or an error that names both."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .core import Symbol
from .errors import DscError, require
from .printer import Word, print_attribute
from .types import DType

hints_of = cache(get_type_hints)

SPOKEN: dict[Any, str] = {
    NoneType: "none",
    Symbol: "@name",
    bool: "true or false",
    str: '"text"',
    int: "a whole number",
    float: "a number",
    DType: "a dtype",
}
"""How a message says what an attribute has to be."""


def convert(hint: Any, given: Any) -> Any:
    """`given` (numbers, strings, words, lists, records as the parser yields them) as a value of type `hint`."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _first(get_args(hint), given)
    if origin is Literal:
        require(given in get_args(hint), f"expected one of {', '.join(map(print_attribute, get_args(hint)))}, found {_show(given)}")
        return str(given) if isinstance(given, str) else given
    if origin is tuple:
        return _tuple(get_args(hint), given)
    if hint in (None, NoneType) and given == "none":
        return None
    if hint is DType and isinstance(given, Word):
        require(given in DType.__members__, f"unknown dtype {given}; expected one of {', '.join(DType.__members__)}")
        return DType[given]
    if hint is bool and given in ("true", "false") and isinstance(given, Word):
        return given == "true"
    if hint is float and type(given) in (int, float):
        return float(given)
    if hint is int and type(given) is int:
        return given
    if hint is Symbol and isinstance(given, Symbol):
        return given
    if hint is str and type(given) is str:
        return given
    if is_dataclass(hint) and isinstance(given, dict):
        return _record(hint, given)
    raise DscError(f"expected {_name(hint)}, found {_show(given)}")


def free(given: Any) -> Any:
    """`given` where nothing says its type: an attribute of the module."""
    if isinstance(given, list):
        return tuple(map(free, given))
    if isinstance(given, dict):
        return {key: free(item) for key, item in given.items()}
    if isinstance(given, Word):
        return {"true": True, "false": False, "none": None}.get(given, given)
    require(type(given) in (int, float, str, Symbol), f"expected a literal, found {given}")
    return given


def _first(hints: tuple[Any, ...], given: Any) -> Any:
    for hint in hints:
        try:
            return convert(hint, given)
        except DscError:
            continue
    raise DscError(f"expected {' or '.join(map(_name, hints))}, found {_show(given)}")


def _tuple(hints: tuple[Any, ...], given: Any) -> tuple[Any, ...]:
    require(isinstance(given, list), f"expected a list, found {_show(given)}")
    if len(hints) == 2 and hints[1] is Ellipsis:
        return tuple(convert(hints[0], item) for item in given)
    require(len(given) == len(hints), f"expected a list of {len(hints)}, found {len(given)}")
    return tuple(convert(hint, item) for hint, item in zip(hints, given, strict=True))


def _record(hint: Any, given: dict[str, Any]) -> Any:
    known = {f.name for f in fields(hint)}
    unknown = ", ".join(sorted(set(given) - known))
    require(not unknown, f"unknown key {unknown}; {_name(hint)} has {', '.join(sorted(known))}")
    missing = ", ".join(f.name for f in fields(hint) if f.default is MISSING and f.name not in given)
    require(not missing, f"{_name(hint)} needs {missing}")
    return hint(**{key: convert(hints_of(hint)[key], value) for key, value in given.items()})


def _name(hint: Any) -> str:
    return SPOKEN.get(hint, getattr(hint, "__name__", str(hint)))


def _show(given: Any) -> str:
    if isinstance(given, list):
        return f"[{', '.join(map(_show, given))}]"
    if isinstance(given, dict):
        return f"{{{', '.join(given)}}}"
    return print_attribute(given)
