"""Damaged text: whatever comes in, the parser gives a module that round-trips, or an `IRError` with places in the text."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from dsc.ir.diagnostics import IRError
from dsc.ir.parser import parse
from dsc.testing.samples import SAMPLES

INVALID = [re.sub(r"\s*//.*", "", file.read_text()) for file in sorted((Path(__file__).parent / "invalid").glob("*.dsc"))]
TEXTS = [str(sample.module()) for sample in SAMPLES] + INVALID
TOKEN = re.compile(r'\s+|%\w+|@\w+|"[^"\n]*"|-?\d+\.?\d*(?:e[+-]?\d+)?|\w+|.')
ODD = ["-1", "0", "2.5", "nan", "-inf", "1e999", "9" * 20, '"\\u12"', '"\\ud800"', "\x00", "\u2028", "é", "none", "true", "{", "}"]
POOL = [*sorted({token for text in TEXTS for token in TOKEN.findall(text) if token.strip()}), *ODD]


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A valid or nearly valid text, with one to four tokens dropped, doubled, exchanged, or replaced by others."""
    tokens = TOKEN.findall(draw(st.sampled_from(TEXTS)))
    for _ in range(draw(st.integers(1, 4))):
        places = [i for i, token in enumerate(tokens) if token.strip()]
        if not places:
            break
        at, other = draw(st.sampled_from(places)), draw(st.sampled_from(places))
        match draw(st.sampled_from(["drop", "double", "exchange", "replace", "insert", "cut", "letter"])):
            case "drop":
                del tokens[at]
            case "double":
                tokens.insert(at, tokens[at] + " ")
            case "exchange":
                tokens[at], tokens[other] = tokens[other], tokens[at]
            case "replace":
                tokens[at] = draw(st.sampled_from(POOL))
            case "insert":
                tokens.insert(at, draw(st.sampled_from(POOL)) + " ")
            case "cut":
                tokens = tokens[:at]
            case "letter":
                tokens[at] = tokens[at][:-1] + draw(st.characters())
    return "".join(tokens)


def check(text: str) -> None:
    try:
        module = parse(text)
    except IRError as error:
        faults = error.diagnostics
    else:
        assert parse(str(module)) == module
        assert str(parse(str(module))) == str(module)
        return
    lines = text.split("\n")
    assert faults
    for found in faults:
        assert 1 <= found.line <= len(lines)
        assert 1 <= found.column <= len(lines[found.line - 1]) + 1
        assert found.message
        assert "\n" not in found.message


@settings(max_examples=400)
@given(damaged())
def test_damaged_programs(text: str) -> None:
    check(text)


@given(st.text(alphabet=st.sampled_from('func@%x:f32[]{}()=,"return 0-.#<\n/bundle_'), max_size=60) | st.text(max_size=30))
def test_arbitrary_text(text: str) -> None:
    check(text)
