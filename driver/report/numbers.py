"""What `dsc inspect` knows, as sections: memory, quantisation, communication; and the kernels of an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...ir.core import Module, Phase
from ...ir.timeline import ACTIVATIONS, KINDS, Timeline
from ..artifact import Artifact
from ..comm import describe_comm
from ..kernels import FOLDER
from ..memory import BUCKETS, place
from ..quantization import describe_quantization
from ..ui import plural, size
from .chart import stacked
from .html import Child, Html, cards, code, data, el, section, share, table

COLUMNS = 480
"""Points of a run that are drawn; each stands for the fullest of as many ops as it takes."""


def memory(found: Mapping[str, Any], line: Timeline) -> Html:
    """`found` is what plan/memory.json holds."""
    held = ", ".join(f"{size(number)} in {dtype}" for dtype, number in found["weights"].items())
    figures: list[tuple[str, str, Child]] = [("weights", size(found["weight_bytes"]), held), ("inputs", size(found["input_bytes"]), None)]
    if "training" in found:
        more, by_function = _training(found["training"])
    else:
        more, by_function = _inference(found, line)
    lead = (
        "What one run holds, before anything runs: weights, and every value from the op that makes it to the last that reads it. "
        "Residuals are kept from forward for backward; workspace is everything else that is computed."
    )
    shared = _buckets(found["buckets"], "training" in found) if "buckets" in found else None
    return section("memory", "Memory", lead, cards([*figures, *more]), _over_time(line), by_function, shared)


def _training(found: Mapping[str, Any]) -> tuple[list[tuple[str, str, Child]], Html]:
    states = found["state_bytes"]
    figures: list[tuple[str, str, Child]] = [
        ("optimiser", size(sum(states.values())), f"{size(states['master'])} FP32 weights, {size(states['moments'])} BF16 moments"),
        ("gradients", size(found["gradient_bytes"]), "FP32, for as long as they are accumulated"),
        ("activations", size(found["activation_peak_bytes"]), ["most at once, at ", code(found["activation_peak_at"])]),
        ("in all", size(found["total_bytes"]), "weights, optimiser, gradients, inputs and activations"),
    ]
    rows = [
        (code(f"@{name}"), code(f["at"]), *(size(f[kind]) for kind in ("residuals", "workspace", "gradients")))
        for name, f in found["functions"].items()
    ]
    head = ("function", "where residuals and workspace are fullest", "residuals", "workspace", "gradients")
    return figures, table(head, rows, name="memory by function", left=2)


def _inference(found: Mapping[str, Any], line: Timeline) -> tuple[list[tuple[str, str, Child]], Html]:
    most, at = line.peak(*ACTIVATIONS)
    figures: list[tuple[str, str, Child]] = [
        ("results", size(found["output_bytes"]), None),
        ("activations", size(most), ["most at once, at ", code(place(line, at))] if line.points else None),
        ("in all", size(found["total_bytes"]), "weights, inputs and the most that lives at once"),
    ]
    rows = [(code(f"@{name}"), code(f["at"]), f"{f['ops']:,}", size(f["peak_bytes"])) for name, f in found["functions"].items()]
    return figures, table(("function", "where most lives at once", "ops", "bytes"), rows, name="memory by function", left=2)


def _buckets(found: Mapping[str, Mapping[str, int]], training: bool) -> list[Child]:
    """What a rank holds of the weights, and in training beside them, by how ranks share them."""
    keys = ("weight_bytes", *(("gradient_bytes", "state_bytes") if training else ()))
    rows = [
        (BUCKETS[name], f"{bucket['parameters']:,}", *(size(bucket[key]) for key in keys))
        for name, bucket in found.items()
        if bucket["weight_bytes"]
    ]
    head = ("weights that are", "parameters", "weights", *(("gradients", "optimiser") if training else ()))
    return [el("h3", "What a rank holds all the time"), table(head, rows, name="weights by how ranks share them")] if rows else []


def _over_time(line: Timeline) -> list[Html]:
    """Live bytes by kind over the run, with what the pointer should say."""
    if not line.points:
        return []
    each = -(-len(line.points) // COLUMNS)
    whole = [line.series(kind) for kind in KINDS]
    peaks = [
        max(range(at, min(at + each, len(line.points))), key=lambda i: sum(s[i] for s in whole)) for at in range(0, len(line.points), each)
    ]
    series = {kind: [values[i] for i in peaks] for kind, values in zip(KINDS, whole, strict=True)}
    shown = {kind: values for kind, values in series.items() if any(values)}
    if not shown:
        return []
    turn = next((i for i, point in enumerate(line.points) if point.op.phase is not Phase.F), None)
    key = [el("span", el("i", class_=f"kind-{i}"), kind) for i, kind in enumerate(shown)]
    says = {"places": [place(line, i) for i in peaks], "series": shown}
    return [
        el("p", key, class_="key"),
        stacked(shown, turn / len(line.points) if turn is not None else None),
        el("output", id="memory-says", class_="says"),
        data("memory-points", says),
    ]


def quantization(program: Artifact, module: Module) -> tuple[Html | None, dict[str, Any]]:
    """The table of matrix products, and what it was made from."""
    value, _ = describe_quantization(module, program.manifest.reasons)
    products = value["products"]
    if not products:
        return None, value
    asked = any(row["quantised"] or row["reason"] for row in products)
    decisions = [
        (el("span", "quantised", class_="good") if row["quantised"] else row["reason"] or "–",) if asked else () for row in products
    ]
    rows = [
        (
            el("span", row["op"], class_="mono"),
            code(row["func"]),
            *decision,
            row["activation"],
            row["weight_format"],
            row["accumulation"],
            "–" if row["weight"] == "-" else code(row["weight"]),
        )
        for row, decision in zip(products, decisions, strict=True)
    ]
    head = ("product", "function", *(("decision",) if asked else ()), "first operand", "second operand", "accumulation", "weight")
    done = f"{value['quantised']} of {plural(len(products), 'matrix product')} {'is' if value['quantised'] == 1 else 'are'} quantised. "
    lead: list[Child] = (
        [done, "A tile of 1x128 shares one scale among 128 numbers; the decision says why a product was left as it was."]
        if asked
        else [
            "The formats in which matrix products read their operands. No pass was asked to quantise them, as ",
            code("--recipe"),
            " does.",
        ]
    )
    body = table(head, rows, name="matrix products", left=len(head))
    return section("quantization", "Number formats of matrix products", lead, body), value


def communication(module: Module) -> tuple[Html, dict[str, Any]]:
    """What a rank sends, by function and collective, and what that was made from."""
    value, _ = describe_comm(module)
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for one in value["collectives"]:
        groups.setdefault((one["func"], one["kind"], f"{one['axis']}={one['ranks']}"), []).append(one)
    rows = []
    for (func, kind, axis), found in sorted(groups.items(), key=lambda item: -sum(one["bytes"] for one in item[1])):
        bytes, crossing = (sum(one[what] for one in found) for what in ("bytes", "crossing"))
        part = share(bytes / value["bytes"]) if value["bytes"] else None
        rows.append((code(f"@{func}"), kind, axis, f"{len(found):,}", size(bytes), part, size(crossing)))
    mesh = ", ".join(f"{axis}={number}" for axis, number in value["mesh"].items() if isinstance(number, int))
    lead = [
        f"One rank of the mesh {mesh} sends {size(value['bytes'])} in a step, {size(value['crossing'])} of it to other nodes, ",
        f"in {plural(len(value['collectives']), 'collective')}.",
    ]
    if "microbatch" in value:
        many, once = size(value["microbatch"]["bytes"]), size(value["end"]["bytes"])
        lead = [f"One rank of each stage of the mesh {mesh}, together, send {many} for a micro-batch and {once} at the end of a step."]
    last = ("in all", "", "", f"{len(value['collectives']):,}", size(value["bytes"]), None, size(value["crossing"]))
    head = ("function", "collective", "axis", "times", "bytes", "", "leave the node")
    return section("communication", "Communication", lead, table(head, rows, name="collectives", left=3, last=last)), value


def kernel_facts(program: Artifact) -> dict[str, list[dict[str, Any]]]:
    """By target, what the compiler said of each kernel, as kernels/<target>/*.json have it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((program.path / FOLDER).glob("*/*.json")):
        if not file.name.endswith(".triton.json"):
            facts = program.data_of(file.relative_to(program.path).as_posix())
            found.setdefault(file.parent.name, []).append(facts | {"name": file.stem})
    return found


def kernels(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Html:
    """A table for each target."""
    parts: list[Child] = []
    head = ("kernel", "runs", "warps", "registers", "shared memory", "spilled", "matrix instructions")
    for target, entries in found.items():
        rows = [
            (
                code(k["name"]),
                ", ".join(k["ops"]),
                k["num_warps"],
                k["registers"],
                size(k["shared"]),
                el("span", size(k["spill_bytes"]), class_="bad") if k["spill_bytes"] else "0 B",
                ", ".join(f"{number} {name}" for name, number in sorted(k["matrix"].items())) or "–",
            )
            for k in entries
        ]
        parts += [el("h3", target), table(head, rows, name=f"kernels for {target}", left=2, right=1)]
    lead = [
        "Machine code compiled ahead of time, with its assembly beside it in ",
        code("kernels/"),
        ". Registers are per thread; a kernel that spills keeps values in memory for want of them.",
    ]
    return section("kernels", "Kernels", lead, parts)
