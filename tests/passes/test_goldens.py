"""Passes on programs small enough to read: tests/passes/<pass>/<case>.dsc holds a module, `// ---- expect` and what the pass makes of it.

The folder's name is the pipeline, unless the first line is `// pipeline: ...`. Comparison is of modules, not of text. A file whose second
part is `// error: ...` expects that message. `pytest --bless` rewrites the part below the mark.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dsc
from dsc.ir.core import Module
from dsc.passes.manager import PASSES

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*/*.dsc"))
MARK = "// ---- expect\n"
PIPELINE = re.compile(r"// pipeline: (.*)\n")


def outcome(text: str, pipeline: str) -> Module | str:
    """The module that the pipeline makes of a text, or the comment that says why it makes none."""
    try:
        return dsc.apply(dsc.parse(text), pipeline)
    except dsc.DscError as error:
        return "".join(f"// error: {line}\n" for line in str(error).split("\n"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_golden(file: Path, bless: bool) -> None:
    before, mark, expected = file.read_text().partition(MARK)
    named = PIPELINE.match(before)
    found = outcome(before, named[1] if named else file.parent.name)
    if bless:
        file.write_text(f"{before.rstrip()}\n\n{MARK}\n{str(found).removeprefix(default_header(before))}")
        return
    assert mark, f"{file.name} has no line {MARK.strip()!r}"
    if isinstance(found, str) or "// error: " in expected:
        assert str(found) == expected.lstrip()
    else:
        wanted = dsc.parse(expected)
        assert found == wanted, f"the pass gives\n\n{found}\nbut expected was\n\n{wanted}"


def default_header(before: str) -> str:
    """The header that may be left out, where the input does so."""
    return "" if "module {" in before else "module { stage=traced }\n\n"


def test_folders_are_named_after_passes() -> None:
    assert {file.parent.name for file in FILES} <= set(PASSES)


def test_blessing_changes_only_the_expectation(tmp_path: Path) -> None:
    file = tmp_path / "simplify" / "case.dsc"
    file.parent.mkdir()
    source = "// why\nfunc @f(%x: f32[2]) {\n  %y: f32[2] = neg(%x) // unused\n  return %x\n}\n\n"
    file.write_text(f"{source}{MARK}\nnonsense")
    test_golden(file, bless=True)
    assert file.read_text() == f"{source}{MARK}\nfunc @f(%x: f32[2]) {{\n  return %x\n}}\n"
    test_golden(file, bless=False)
    file.write_text(f"{source}{MARK}\nfunc @f(%x: f32[2]) {{\n  return %x, %x\n}}\n")
    with pytest.raises(AssertionError, match="the pass gives"):
        test_golden(file, bless=False)
