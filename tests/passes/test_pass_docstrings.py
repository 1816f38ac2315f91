"""What the docstring of a pass shows is what the pass does: its `Before ...: / after:` snippets are run."""

from __future__ import annotations

import inspect
import re
from textwrap import dedent

import pytest

import dsc
from dsc.passes.manager import PASSES, Pass

EXAMPLE = re.compile(r"^Before `(?P<pipeline>[^`]+)`:\n\n(?P<before>(?:    .*\n|\n)+)after:\n\n(?P<after>(?:    .*(?:\n|$)|\n)+)", re.M)


def examples(cls: type[Pass]) -> list[tuple[str, str, str]]:
    """Pipeline, text before and text after."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return [(m["pipeline"], dedent(m["before"]), dedent(m["after"])) for m in EXAMPLE.finditer(text)]


EXAMPLES = [(name, *example) for name, cls in sorted(PASSES.items()) for example in examples(cls)]


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_shows_what_it_does(name: str) -> None:
    shown = examples(PASSES[name])
    assert shown, f"the docstring of {name} has no part 'Before `{name}`: ... after: ...'"
    assert all(name in pipeline for pipeline, _, _ in shown)
    assert inspect.cleandoc(PASSES[name].__doc__ or "").split("\n")[0].endswith("."), "the first line is a sentence: dsc passes lists it"


@pytest.mark.parametrize(("name", "pipeline", "before", "after"), EXAMPLES, ids=[f"{e[0]}-{i}" for i, e in enumerate(EXAMPLES)])
def test_the_snippets_are_true(name: str, pipeline: str, before: str, after: str) -> None:
    found, expected = dsc.apply(dsc.parse(before), pipeline), dsc.parse(after)
    assert found == expected, f"{name} gives\n\n{found}\nbut its docstring says\n\n{expected}"
    assert found != dsc.parse(before), "the example shows nothing"
