"""The whole page: its sections in order, and the frame around them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...ir.mesh import ATTRIBUTE
from ...ir.timeline import timeline
from ..artifact import MEMORY, Artifact, replacing
from ..inspect import describe_parameters
from . import numbers, numerics, overview
from .html import Html, el
from .programs import programs
from .trace import timeline as schedule

SCRIPTS = ("page.js", "programs.js", "timeline.js")


def write(program: Artifact, out: Path, diff: Mapping[str, Any] | None = None, trace: Path | None = None) -> int:
    """Write the page of `program` to `out`, and say how many bytes it has.

    `diff` is what `dsc diff --json` prints about the program, `trace` a timeline in place of the artifact's own.
    """
    text = page(program, diff, trace).encode("utf-8", "replace")
    with replacing(out) as stream:
        stream.write(text)
    return len(text)


def page(program: Artifact, diff: Mapping[str, Any] | None = None, trace: Path | None = None) -> Html:
    """The page as text. It depends on what it is given alone."""
    module = program.module
    parameters, _ = describe_parameters(module)
    products_section, products = numbers.quantization(program, module)
    communication, sent = numbers.communication(module) if ATTRIBUTE in module.attributes else (None, None)
    kernels = numbers.kernel_facts(program)
    memory = program.data_of(MEMORY)
    found = overview.Numbers(parameters, memory, products, sent, kernels, diff)
    sections: dict[tuple[str, str], Html | None] = {
        ("warnings", "Warnings"): overview.warnings(program, found),
        ("made", "Made by"): overview.made_by(program),
        ("model", "Model"): overview.model(module, found),
        ("programs", "Program"): programs(program),
        ("quantization", "Formats"): products_section,
        ("numerics", "Numerics"): numerics.numerics(diff) if diff else None,
        ("memory", "Memory"): numbers.memory(found.memory, timeline(module)),
        ("communication", "Communication"): communication,
        ("schedule", "Schedule"): schedule(program.path, trace),
        ("kernels", "Kernels"): numbers.kernels(kernels) if kernels else None,
        ("files", "Files"): overview.index(program),
    }
    shown = {names: body for names, body in sections.items() if body is not None}
    links = [el("a", words, href=f"#{name}") for name, words in shown]
    return frame(overview.title(program), overview.header(program, module, found), links, list(shown.values()))


def frame(name: str, head: Html, links: list[Html], sections: list[Html]) -> Html:
    """The document. Its policy allows this style and these scripts alone, and no address at all."""
    here = files(__package__)
    style = Html((here / "report.css").read_text(encoding="utf-8"))
    script = Html("".join((here / file).read_text(encoding="utf-8") for file in SCRIPTS))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return Html(
        "<!doctype html>\n"
        + el(
            "html",
            el(
                "head",
                el("meta", charset="utf-8"),
                el("meta", http_equiv="Content-Security-Policy", content=policy),
                el("meta", name="viewport", content="width=device-width, initial-scale=1"),
                el("meta", name="color-scheme", content="light dark"),
                el("title", name),
                el("style", style),
            ),
            el(
                "body",
                el("a", "Skip to the report", href="#report", class_="skip"),
                head,
                el("nav", links, aria_label="sections"),
                el("main", sections, id="report"),
                el("script", script),
            ),
            lang="en",
        )
        + "\n"
    )
