"""The program after each step, as data that the page's script shows: each line once, however many steps have it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...ir.core import OPS
from ..artifact import UPDATE, Artifact, PassRecord
from ..ui import plural
from .html import Child, Html, code, data, el, fold, prose, section, table

BUDGET = 3_500_000
"""Bytes of program text that a page holds. What would be beyond it stays in the artifact, and the page says where."""
OP = re.compile(r" = (\w+)\(")


def pack(texts: Sequence[str], budget: int = BUDGET, before_all: int = 0) -> dict[str, Any]:
    """`lines`, each line that occurs, and `texts`, of each text the runs of lines that it is made of: first line, number of lines, ...

    None stands for a text that has no room; the text number `before_all` is asked first, the others in order.
    """
    known: dict[str, int] = {}
    packed: list[list[int] | None] = [None] * len(texts)
    used = 0
    for i in sorted(range(len(texts)), key=lambda i: (i != before_all, i)):
        lines = texts[i].splitlines()
        new = {line for line in lines if line not in known}
        cost = sum(len(line.encode()) + 3 for line in new)
        if used + cost > budget:
            continue
        used += cost
        packed[i] = list(_runs(known.setdefault(line, len(known)) for line in lines))
    return {"lines": list(known), "texts": packed}


def unpack(packed: Mapping[str, Any], index: int) -> str:
    """What `pack` was given: the inverse that the page's script computes."""
    runs, lines = packed["texts"][index], packed["lines"]
    found = [lines[first + i] for first, number in zip(runs[::2], runs[1::2], strict=True) for i in range(number)]
    return "".join(f"{line}\n" for line in found)


def _runs(numbers: Iterable[int]) -> list[int]:
    found: list[int] = []
    for number in numbers:
        if found and number == found[-2] + found[-1]:
            found[-1] += 1
        else:
            found += [number, 1]
    return found


def programs(program: Artifact, budget: int = BUDGET) -> Html:
    """The section, with its data."""
    steps = list(program.manifest.passes)
    texts = [program.text_of(record) for record in steps]
    names: list[dict[str, Any]] = [
        {"name": record.name, "file": record.file, "before": i - 1 if i else None} for i, record in enumerate(steps)
    ]
    update = program.path / UPDATE
    if update.is_file():
        texts.append(update.read_text(encoding="utf-8"))
        names.append({"name": "optimiser", "file": UPDATE, "before": None})
    value = pack(texts, budget, len(steps) - 1)
    value |= {"steps": names, "ops": meanings(texts)}
    missing = [name["file"] for name, text in zip(names, value["texts"], strict=True) if text is None]
    chips = [
        el(
            "button",
            f"{i:02d} {name['name']}",
            el("small", _change(steps, i)),
            type="button",
            data_step=i,
            disabled=value["texts"][i] is None,
        )
        for i, name in enumerate(names)
    ]
    tools = [
        el("div", chips, class_="steps", role="group", aria_label="step"),
        el(
            "div",
            el("div", _views(), class_="views", role="group", aria_label="view"),
            el("label", el("span", "Search this program", class_="hidden"), el("input", type="search", id="ir-query", **SEARCH)),
            el("button", "previous", type="button", id="ir-previous"),
            el("button", "next", type="button", id="ir-next"),
            el("output", id="ir-found", aria_live="polite"),
            class_="tools",
        ),
    ]
    left_out = f"Not in this page, for its size: {', '.join(missing)}. " if missing else None
    lead = [
        "The program as it was traced, and after each pass. A function runs once for every layer that calls it. ",
        "Choose a step, open a function; side by side, each line stands beside the line of the same id in the step before. ",
        left_out,
    ]
    viewer = el("div", el("p", "This part needs JavaScript. The programs are in the folder ir/ of the artifact.", class_="quiet"), id="ir")
    return section("programs", "The program, step by step", lead, how_to_read(), tools, viewer, data("programs-data", value))


SEARCH: dict[str, Any] = {"placeholder": "search: an op, a weight, an id ( / )", "autocomplete": "off", "spellcheck": "false"}


def _views() -> list[Html]:
    return [
        el("button", "program", type="button", data_view="text"),
        el("button", "changes, side by side", type="button", data_view="diff"),
    ]


def _change(steps: Sequence[PassRecord], i: int) -> str:
    if i >= len(steps):
        return "its own program"
    return plural(steps[i].ops, "op") if steps[i].changed else "unchanged"


def meanings(texts: Iterable[str]) -> dict[str, str]:
    """Of each op in the texts what it computes: the first paragraph of its documentation."""
    names = {name for text in texts for name in OP.findall(text)}
    return {name: " ".join((OPS[name].__doc__ or "").split("\n\n")[0].split()) for name in sorted(names) if name in OPS}


def how_to_read() -> Html:
    """One line of a program, taken apart."""
    parts: list[tuple[Child, Child]] = [
        (code("%h: bf16[4096, 2048]"), "a value, made once and never changed: its name, its number format and its shape"),
        (
            code("matmul(%x, %w, transpose_b=true)"),
            "the operation, the values that it reads, and its options; the pointer resting on it says what it computes",
        ),
        (
            code("@ mlp.up_proj#2"),
            "its id: the module that it came from, and a number. Passes keep ids, so that a value can be followed through all steps",
        ),
        (
            code("F"),
            [
                "the part of a step: ",
                code("F"),
                " forward, ",
                code("I"),
                " gradient of inputs, ",
                code("W"),
                " gradient of weights, ",
                code("R"),
                " recomputed",
            ],
        ),
    ]
    example = el("pre", "%h: bf16[4096, 2048] = matmul(%x, %w, transpose_b=true)  @ mlp.up_proj#2 F", tabindex="0")
    return fold(
        "How to read a line", example, el("dl", [el("div", el("dt", a), el("dd", b)) for a, b in parts], class_="legend"), class_="help"
    )


def passes(program: Artifact) -> Html:
    """The steps as a table: what each is for, how long it took, what it left alone."""
    from ...passes.manager import PASSES

    rows: list[tuple[Child, ...]] = []
    for i, record in enumerate(program.manifest.passes):
        known = PASSES.get(record.name)
        meaning = "The model as it was written, as a program." if i == 0 else (known.__doc__ or "").split("\n\n")[0] if known else ""
        notes = fold(plural(len(record.notes), "note"), el("ul", [el("li", note) for note in record.notes])) if record.notes else None
        options = record.text.removeprefix(record.name).strip("{}") if i else ""
        ops = f"{record.ops:,}" if record.changed else "unchanged"
        what = el("div", prose(meaning), notes, class_="wide")
        rows.append((code(record.name), what, code(options) if options else "", f"{record.seconds:.2f} s", ops))
    return table(("step", "what it does", "options", "time", "ops"), rows, name="steps", left=3)
