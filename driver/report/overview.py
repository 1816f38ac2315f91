"""What the page begins and ends with: a sentence and figures, warnings, how it was made, the model, the index of files."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...hardware.device import device, devices
from ...ir.core import Module, called
from ...ir.mesh import ATTRIBUTE, mesh_of
from ...ir.walk import flops
from ..artifact import REPORT, Artifact
from ..inspect import held_heading, held_in_words
from ..ui import count, plural, size
from . import tree
from .html import Child, Html, cards, code, el, facts, fold, section, share, table
from .programs import passes


@dataclass(frozen=True)
class Numbers:
    """What the sections are made of, computed once."""

    parameters: Mapping[str, Any]
    memory: Mapping[str, Any]
    products: Mapping[str, Any]
    sent: Mapping[str, Any] | None
    kernels: Mapping[str, Any]
    diff: Mapping[str, Any] | None


def title(program: Artifact) -> str:
    """What was compiled, in a few words."""
    return f"{Path(program.manifest.source).name or program.manifest.source} · {program.manifest.mode} · dsc"


def header(program: Artifact, module: Module, found: Numbers) -> Html:
    """The name, a sentence that says everything, and the figures."""
    manifest, main = program.manifest, module.main
    total, active = found.parameters["total"], found.parameters["active"]
    words = {"forward": "running forward", "train": "a training step", "prefill": "reading prompts", "decode": "decoding with a cache"}
    ranks = mesh_of(module).world if ATTRIBUTE in module.attributes else 1
    quantised, products = found.products["quantised"], len(found.products["products"])
    whose = f"What one of {ranks:,} ranks runs of " if ranks > 1 else "The whole of "
    kind = f"{words.get(manifest.mode, manifest.mode)}, compiled " if manifest.source_kind in ("config", "checkpoint") else ""
    sentence = [
        whose,
        code(manifest.source),
        f", {kind}in {plural(len(manifest.passes), 'step')} to the stage ",
        el("em", manifest.stage),
        f": {plural(len(module.funcs), 'function')} with {plural(sum(len(f.ops) for f in module.funcs), 'op')}, which take ",
        [(", " if i else "", code(f"{p.name}: {p.type}")) for i, p in enumerate(main.params[:3])],
        f" and {len(main.params) - 3:,} more." if len(main.params) > 3 else ".",
    ]
    stages = found.parameters.get("held_by_stage", ())
    own = held_in_words(found.parameters["held"], stages) if stages else f"on each rank, of {count(found.parameters['held'])} parameters"
    held = own if ranks > 1 else ", ".join(found.memory["weights"])
    peak = at_once(found.memory)
    figures: list[tuple[str, str, Child]] = [
        ("parameters", count(total), f"{count(active)} active per token"),
        ("FLOPs of a run", count(flops(module)), f"{'on each rank; ' if ranks > 1 else ''}a multiply-add counts as two"),
        ("weights", size(found.memory["weight_bytes"]), held),
        (
            "memory in all",
            size(peak),
            "weights, state and what lives at once" if "training" in found.memory else "weights, inputs, what lives at once",
        ),
    ]
    if products:
        figures.append(("matrix products", f"{quantised} of {products}", "quantised"))
    if found.sent:
        figures.append(("a rank sends", size(found.sent["bytes"]), f"{size(found.sent['crossing'])} to other nodes"))
    rank = f" · one of {ranks:,} ranks" if ranks > 1 else ""
    name = Path(manifest.source).name or manifest.source
    return el(
        "header",
        el("p", f"dsc {manifest.dsc_version} · {manifest.mode}{rank}", class_="over"),
        el("h1", name),
        el("p", sentence, class_="lead"),
        cards(figures),
    )


def warnings(program: Artifact, found: Numbers) -> Html:
    """What a reader should know before anything else."""
    lines = list(_warnings(program, found))
    if not lines:
        lead = "Nothing: no kernel spills, no pass has left a matrix product as it was against the recipe, no comparison failed."
        return section("warnings", "What to look at", el("span", lead, class_="good"))
    items = [el("li", el("b", kind, class_=f"flag {kind}"), el("span", words)) for kind, words in lines]
    return section("warnings", "What to look at", None, el("ul", items, class_="warnings"))


def _warnings(program: Artifact, found: Numbers) -> Iterator[tuple[str, Child]]:
    """Each with how much it matters, the worst first."""
    if found.diff:
        yield from _differences(found.diff)
    for target, entries in found.kernels.items():
        spilling = [k for k in entries if k["spill_bytes"]]
        if spilling:
            worst = max(spilling, key=lambda k: k["spill_bytes"])
            bytes = size(worst["spill_bytes"])
            words = f"{plural(len(spilling), 'kernel')} for {target} {'spills' if len(spilling) == 1 else 'spill'} registers, most of all "
            yield "warning", [words, code(worst["name"]), f" with {bytes}: ", _to("kernels")]
    yield from _room("a rank" if found.sent else "it", at_once(found.memory))
    left = [row for row in found.products["products"] if not row["quantised"]]
    if found.products["quantised"] and left:
        words = f"{len(left)} of {plural(len(found.products['products']), 'matrix product')} are not quantised; the reasons are with the "
        yield "note", [words, _to("quantization", "number formats")]
    notes = [(record.name, note) for record in program.manifest.passes for note in record.notes if record.name != "quantize-fp8"]
    if notes:
        yield (
            "note",
            [
                f"passes left {plural(len(notes), 'thing')} as {'it was' if len(notes) == 1 else 'they were'}, each with its reason: ",
                _to("made", "the steps"),
            ],
        )


def at_once(memory: Mapping[str, Any]) -> int:
    """The most bytes that a rank holds at once, weights and what training keeps included."""
    return int(memory["training"]["total_bytes"] if "training" in memory else memory["total_bytes"])


def _room(who: str, needed: int) -> Iterator[tuple[str, Child]]:
    """Which of the GPUs that dsc knows have not the memory that is needed, if any."""
    known = [found for found in map(device, devices()) if found.architecture.startswith(("sm_", "gfx"))]
    memory = {found.name: float(found.memory) for found in sorted(known, key=lambda found: float(found.memory))}
    fits = [name for name, bytes in memory.items() if bytes >= needed]
    words = f"{who} needs {size(needed)} at once, by the sum of what is under "
    if not fits:
        most = list(memory)[-1]
        yield "warning", [words, _to("memory"), f"; no GPU that dsc knows has as much (most: {most}, {size(memory[most])})"]
    elif len(fits) < len(memory):
        lacking = [name for name in memory if name not in fits]
        yield "note", [words, _to("memory"), f": {', '.join(fits)} {'has' if len(fits) == 1 else 'have'} as much, {', '.join(lacking)} not"]


def _differences(diff: Mapping[str, Any]) -> Iterator[tuple[str, Child]]:
    over = [op for op in diff["ops"] if op["bound_ratio"] is not None and not float(op["bound_ratio"]) <= 1]
    if over:
        yield "warning", [f"{plural(len(over), 'op')} beyond the bound of rounding, first ", code(over[0]["site"]), ": ", _to("numerics")]
    elif not diff["same"]:
        first = [", first at ", code(diff["first"])] if diff["first"] else None
        yield "warning", ["the two runs that were compared are different (", diff["criterion"], ")", first, ": ", _to("numerics")]
    changed = max((gate["changed"] for gate in diff["routing"]), default=0)
    if changed:
        yield "warning", [f"{plural(changed, 'token')} chose other experts at one gate: ", _to("numerics")]
    saturated = [s for s in diff["quantization"] if s["saturated"] > 0]
    if saturated:
        yield "warning", [f"{plural(len(saturated), 'quantised tensor')} had values cut off at the largest code: ", _to("numerics")]


def _to(name: str, words: str | None = None) -> Html:
    return el("a", words or name, href=f"#{name}")


def made_by(program: Artifact) -> Html:
    """The command, the versions, and what each pass did."""
    m = program.manifest
    versions = ", ".join(f"{name} {number}" for name, number in {"dsc": m.dsc_version, **m.versions}.items())
    weights = "none given: dsc run takes random:0" if m.weights == "none" else code(m.weights)
    command = shlex.join(m.command) if m.command else None
    pairs: list[tuple[str, Child]] = [
        ("command", el("pre", command, tabindex="0") if command else "dsc.compile, from Python"),
        ("source", [code(m.source), f", a {SOURCES.get(m.source_kind, m.source_kind)}"]),
        ("its sha256", code(m.source_sha256) if m.source_sha256 else None),
        ("weights", weights),
        ("versions", versions),
    ]
    seconds = sum(record.seconds for record in m.passes)
    lead = f"{plural(len(m.passes), 'step')} in {seconds:.2f} s, on the machine that compiled it. manifest.json says the same to programs."
    config = None
    if m.config:
        rows = [(code(key), "–" if value is None else str(value)) for key, value in m.config.items()]
        config = fold(
            f"The model's configuration: {plural(len(rows), 'field')}", table(("field", "value"), rows, name="configuration", left=2)
        )
    return section("made", "How it was made", lead, facts(pairs), passes(program), config)


SOURCES = {
    "config": "model's configuration",
    "checkpoint": "checkpoint",
    "factory": "function that makes a torch module",
    "dsc": "program as text",
}


def model(module: Module, found: Numbers) -> Html:
    """The tree, and parameters by part."""
    sharded, numbers = ATTRIBUTE in module.attributes, found.parameters
    lead = [
        "Every module with what is below it; open one to see its parts, down to the weights. ",
        "Layers that are alike are one entry, with the numbers of all of them. Active are the parameters that work on one token.",
        f" Bytes and FLOPs are those of one rank of the mesh {mesh_of(module)}." if sharded else None,
    ]
    head = (
        "part",
        "parameters",
        "",
        "active per token",
        *((held_heading(module),) if sharded else ()),
        "bytes",
    )

    def row(part: Mapping[str, Any], name: str) -> tuple[Child, ...]:
        held = (f"{part['held']:,}",) if sharded else ()
        bar = share(part["total"] / numbers["total"]) if numbers["total"] else None
        return (name, f"{part['total']:,}", bar, f"{part['active']:,}", *held, size(part["bytes"]))

    rows = [row(part, part["name"]) for part in numbers["parts"]]
    parts = table(head, rows, name="parameters by part", last=row(numbers, "in all"))
    buttons = el(
        "p", [el("button", w, type="button", data_fold=k) for k, w in (("open", "open all"), ("close", "close all"))], class_="views"
    )
    body = el("div", tree.render(module), class_="scroll", tabindex="0", role="region", aria_label="the model")
    by_part = fold("Parameters by part", parts) if rows else None
    calls = fold(f"Functions, and who calls whom: {plural(len(module.funcs), 'function')}", _functions(module))
    return section("model", "The model", lead, buttons, body, by_part, calls)


def _functions(module: Module) -> Html:
    rows = [
        (
            code(f"@{func.name}"),
            [code(f"@{name} ") for name in sorted(called(module, func))],
            f"{len(func.ops):,}",
            count(flops(module, func)),
        )
        for func in module.funcs
    ]
    return table(("function", "calls", "ops", "FLOPs"), rows, name="functions", left=2)


def index(program: Artifact) -> Html:
    """Every file of the artifact but this one, with its bytes and hash."""
    rows = []
    for file in sorted(path for path in program.path.rglob("*") if path.is_file()):
        name = file.relative_to(program.path).as_posix()
        if file.name not in (REPORT, f".{REPORT}.partial"):
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            rows.append((code(name), f"{file.stat().st_size:,}", el("span", digest, class_="mono")))
    lead = ["What lies in the folder beside this page, by ", code("sha256sum"), ". It may be moved and renamed as a whole. ", MORE]
    head = ("file", "bytes", "sha256")
    return section("files", "Files", lead, fold(plural(len(rows), "file"), table(head, rows, name="files", right=1), open=len(rows) <= 40))


MORE = el(
    "span",
    "More can be in it: numerics with ",
    code("dsc report OUT --diff OTHER"),
    ", kernels with ",
    code("dsc compile --target"),
    ", formats with ",
    code("--recipe"),
    ", communication with ",
    code("--mesh"),
    ".",
)
