"""Faulty IR text: every file in invalid/ says what is wrong with it, and the parser has to say exactly that, all at once.

`// error: message` stands on the line at fault, more than one where there are several, from left to right. The line below holds
a caret under each column, again in a comment; a column that no comment can reach, or that has two errors, is given in the line
itself as `// error (column 1): message`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsc.ir.diagnostics import Diagnostic, IRError
from dsc.ir.parser import parse

FILES = sorted((Path(__file__).parent / "invalid").glob("*.dsc"))
ERROR = re.compile(r"// error(?: \(column (\d+)\))?: (.*?)(?= // error|$)")


def expectations(text: str) -> list[Diagnostic]:
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        errors = ERROR.findall(line)
        below = lines[number] if number < len(lines) else ""
        carets = [m.start() + 1 for m in re.finditer(r"\^", below)] if re.fullmatch(r"\s*//[ ^]*", below) else []
        columns = [int(column) if column else 0 for column, _ in errors]
        assert columns.count(0) == len(carets), f"line {number}: {columns.count(0)} errors without a column, {len(carets)} carets below"
        waiting = iter(carets)
        found += [Diagnostic(number, column or next(waiting), message) for column, (_, message) in zip(columns, errors, strict=True)]
    return sorted(found)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_fault_is_reported_where_it_stands(file: Path) -> None:
    text = file.read_text()
    with pytest.raises(IRError) as caught:
        parse(text, file.name)
    assert list(caught.value.diagnostics) == expectations(text)


def test_the_cases_are_many() -> None:
    assert sum(len(expectations(file.read_text())) for file in FILES) >= 100


def test_a_message_shows_the_place() -> None:
    text = 'func @f(%x: f32[2]) {\n  %w: f32[2] = param("a")  // "tab:\t"\n  %y: f32[2] = sillu(%x)\n  return %y\n}\n'
    with pytest.raises(IRError) as caught:
        parse(text, "program.dsc")
    expected = ["program.dsc:3:16: unknown op sillu; did you mean silu?", "      %y: f32[2] = sillu(%x)", "                   ^"]
    assert str(caught.value).split("\n") == expected


@pytest.mark.parametrize("text", ["func @f() {\n  return", "func @f() {\n  return\n\n", "func @f() {\u2028\n  return"])
def test_the_end_of_the_text_is_a_place(text: str) -> None:
    with pytest.raises(IRError) as caught:
        parse(text)
    assert str(caught.value).split("\n") == ["2:9: the text ends here, expected '}', a value (%x)", "      return", "            ^"]
