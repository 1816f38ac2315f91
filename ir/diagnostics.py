"""Errors in IR text: where, what was found, what was expected, with the source line and a caret."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import DscError


@dataclass(frozen=True, order=True)
class Diagnostic:
    """One thing wrong at `line`, `column` (both from 1; 0 where there is no text)."""

    line: int
    column: int
    message: str

    def show(self, lines: Sequence[str], file: str = "") -> str:
        """`file:line:column: message`, then the source line with a caret under the column."""
        if not 0 < self.line <= len(lines):
            return f"{file}: {self.message}" if file else self.message
        source = lines[self.line - 1]
        return f"{f'{file}:' if file else ''}{self.line}:{self.column}: {self.message}\n    {source}\n    {' ' * (self.column - 1)}^"


class IRError(DscError):
    """IR that breaks the rules. `diagnostics` has every fault found, in the order of the text."""

    def __init__(self, diagnostics: Sequence[Diagnostic], text: str = "", file: str = "") -> None:
        self.diagnostics = tuple(sorted(diagnostics))
        lines = text.split("\n")  # as the parser counts; splitlines knows more ends of a line
        super().__init__("\n".join(d.show(lines, file) for d in self.diagnostics))
