"""Markup as values: `el` makes an element and escapes every text in it; what several sections are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | int | None | Iterable["Child"]
"""What may stand in an element: markup, text, which is escaped, nothing, or a sequence of such."""
VOID = frozenset(("meta", "input", "br"))


def el(tag: str, *children: Child, **attributes: str | int | bool | None) -> Html:
    """`el("td", "a < b", class_="n")`.

    Of an attribute's name a last `_` is dropped, others become `-`; None and False leave the attribute out, True gives it no value.
    """
    words = [tag]
    for name, value in attributes.items():
        key = name.removesuffix("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{escape(str(value))}"')
    opened = f"<{' '.join(words)}>"
    return Html(opened if tag in VOID else f"{opened}{join(children)}</{tag}>")


def join(children: Child) -> Html:
    """Children one after another."""
    match children:
        case None:
            return Html()
        case Html():
            return children
        case str() | int():
            return Html(escape(str(children)))
    return Html("".join(map(join, children)))


def data(name: str, value: Any) -> Html:
    """A value for the page's scripts, as JSON. No `<` is left in it, so nothing in it ends the element or is read as markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Html(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def section(name: str, title: str, lead: Child, *body: Child) -> Html:
    """A part of the page with a heading, and a sentence that says what the reader sees."""
    heading = el("h2", title, id=f"{name}-title")
    return el("section", heading, el("p", lead, class_="lead"), body, id=name, aria_labelledby=f"{name}-title")


def table(
    head: Sequence[str], rows: Iterable[Sequence[Child]], *, name: str, left: int = 1, right: int = 0, last: Sequence[Child] = ()
) -> Html:
    """A table that scrolls inside itself. Its first `left` and last `right` columns are words, others numbers; `last` is a row of sums."""
    kinds = ["n" if left <= i < len(head) - right else None for i in range(len(head))]

    def line(row: Sequence[Child]) -> Html:
        return el("tr", [el("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)])

    titles = el("thead", el("tr", [el("th", title, scope="col", class_=kind) for title, kind in zip(head, kinds, strict=True)]))
    foot = el("tfoot", line(last)) if last else None
    return scroll(el("table", titles, el("tbody", map(line, rows)), foot), name)


def scroll(content: Child, name: str) -> Html:
    """A box that scrolls sideways, and down where it is high, by keyboard too."""
    return el("div", content, class_="scroll", tabindex="0", role="region", aria_label=name)


def facts(pairs: Iterable[tuple[str, Child]]) -> Html:
    """Names and what they stand for."""
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in pairs if value], class_="facts")


def cards(entries: Iterable[tuple[str, str, Child]]) -> Html:
    """The figures that a reader wants first: name, figure, what else there is to say."""
    made = [el("div", el("dt", name), el("dd", el("b", figure), el("small", more))) for name, figure, more in entries]
    return el("dl", made, class_="cards")


def fold(title: Child, *body: Child, open: bool = False, class_: str | None = None) -> Html:
    """What opens when its title is chosen."""
    return el("details", el("summary", title), body, open=open, class_=class_)


def code(text: str) -> Html:
    """A word of the program or of the command line."""
    return el("code", text)


def share(part: float) -> Html:
    """A bar as long as the share of a whole."""
    return el("i", class_="share", style=f"--share:{100 * part:.1f}%", aria_hidden="true")


def prose(text: str) -> Html:
    """Words of a docstring, what stands between backquotes as code."""
    return join([code(word) if i % 2 else word for i, word in enumerate(" ".join(text.split()).split("`"))])
