"""What an op is, for people: cards on a terminal and the reference page, both made from the declarations."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from . import ops as _ops  # noqa: F401 - fills the op table
from .core import OPS, Argument, Op, Role, takes_result_types
from .errors import DscError
from .printer import print_attribute

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Card:
    """One op: how it is written, what it means, where it is declared."""

    name: str
    family: str
    form: str
    text: str
    traits: tuple[str, ...]
    place: str
    fused: bool


def card(name: str) -> Card:
    """The card of the op `name`; `DscError` with the nearest names where there is none."""
    if name not in OPS:
        near = ", ".join(get_close_matches(name, OPS, 3))
        raise DscError(f"unknown op {name}; {f'did you mean {near}?' if near else 'dsc ops lists them all'}")
    cls = OPS[name]
    return Card(
        name=name,
        family=cls.__module__.rpartition(".")[2],
        form=form(cls),
        text=inspect.cleandoc(cls.__doc__ or ""),
        traits=tuple(sorted(t.name.lower() for t in cls.traits)),
        place=place(cls),
        fused=cls.expand is not Op.expand,
    )


def cards() -> list[Card]:
    """Every op, by family in the order of declaration."""
    return [card(name) for name in OPS]


def form(cls: type[Op]) -> str:
    """How the op is written: operands, then attributes with their defaults or the kind of value they take."""
    written = ", ".join(_argument(a) for a in cls.arguments)
    return f"{cls.name}({written}){' : the declared types' if takes_result_types(cls) else ''}"


def _argument(argument: Argument) -> str:
    match argument.role:
        case Role.OPERAND:
            return f"%{argument.name}"
        case Role.OPTIONAL:
            return f"{argument.name}=none"
        case Role.OPERANDS:
            return f"[%{argument.name}, ...]"
    kind = getattr(argument.hint, "__name__", str(argument.hint)) if isinstance(argument.hint, type) else _kind(argument.hint)
    if argument.positional:
        return f"<{argument.name}: {kind}>"
    return f"{argument.name}=<{kind}>" if argument.required else f"{argument.name}={print_attribute(argument.default)}"


def _kind(hint: Any) -> str:
    return str(hint).replace("typing.", "").replace("dsc.ir.types.", "").replace("tuple[int, ...]", "ints")


def place(what: Any) -> str:
    """`file:line` of a class or function, or of what it wraps, the file relative to the package."""
    what = inspect.unwrap(what)
    file = Path(inspect.getsourcefile(what) or "?")
    line = inspect.getsourcelines(what)[1]
    return f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}:{line}"


def markdown(facets: Mapping[str, Iterable[str]]) -> str:
    """The reference page of every op. `facets` says which consumers (reference, kernel, ...) have which ops."""
    head = [
        "# Ops",
        "",
        "Made by `dsc ops --markdown` from the declarations in `ir/ops/`. Operands broadcast by NumPy's rule where an op says so;",
        "every op reads its operands exactly, computes in float32 and rounds once to the dtype of its result.",
        "",
    ]
    have = {consumer: set(names) for consumer, names in facets.items()}
    body: list[str] = []
    family = None
    for c in cards():
        if c.family != family:
            family = c.family
            body += [f"## {family}", ""]
        consumers = [consumer for consumer, names in have.items() if c.name in names]
        facts = [*c.traits, *(["fused"] if c.fused else []), *consumers]
        body += [
            f"### {c.name}",
            "",
            "```",
            c.form,
            "```",
            "",
            c.text,
            "",
            f"<sub>{c.place.rpartition(':')[0]} · {' · '.join(facts)}</sub>",
            "",
        ]
    return "\n".join([*head, *body]).rstrip() + "\n"
