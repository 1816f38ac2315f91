"""What `dsc diff --json` found, as a section: how far two runs lie apart, op by op."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...backends import Site
from ...ir.core import Func, Module, Op
from ...ir.errors import require
from ...ir.ops.control import Call
from ...ir.ops.fused import Fused
from ...ir.walk import join
from ...models.json_file import read_json
from ..ui import plural
from .chart import dots
from .html import Child, Html, cards, code, el, section, table

KEYS = ("a", "b", "same", "criterion", "first", "worst", "ops", "only_in_a", "only_in_b", "routing", "quantization", "outputs")
MOST = 400
"""Rows of ops: those that differ most in themselves, in program order."""
Found = Mapping[str, Any]


def read(file: Path, module: Module) -> dict[str, Any]:
    """The document that `dsc diff --json` printed. `DscError` where it is something else, or speaks of another program than `module`."""
    found = read_json(file, object)
    missing = [key for key in KEYS if key not in found] if isinstance(found, dict) else KEYS
    require(not missing, f"{file}: expected what dsc diff --json prints; it lacks {', '.join(missing)}")
    check(found, module, str(file))
    return dict(found)


def check(found: Found, module: Module, where: str) -> None:
    """Refuse a comparison in which `module` is neither side.

    Ops that both sides have bear the names of the first, so the second is told by the ops that it alone has and by their number.
    """
    mine = set(sites(module))
    shared, only_a, only_b = {op["site"] for op in found["ops"]}, set(found["only_in_a"]), set(found["only_in_b"])
    is_a = shared | only_a <= mine
    is_b = only_b <= mine and len(shared) + len(only_b) == len(mine)
    strange = sorted((shared | only_a) - mine)
    example = f", e.g. {strange[0]}" if strange else ""
    require(
        is_a or is_b,
        f"{where}: compares {found['a']} with {found['b']}, and neither is this program: of {plural(len(shared | only_a), 'op')} "
        f"{len(strange):,} are not in it{example}",
    )


def sites(module: Module) -> Iterator[str]:
    """The place of every op that a run of the reference shows: calls are entered, and the parts of what is fused seen one by one."""
    runs: dict[tuple[str, str], int] = {}

    def ops(func: Func) -> Iterator[Op]:
        for op in func.ops:
            if isinstance(op, Fused):
                yield from module[op.callee].ops
            yield op

    def enter(func: Func, prefix: str) -> Iterator[str]:
        runs[func.name, prefix] = run = runs.get((func.name, prefix), 0) + 1
        for op in ops(func):
            if isinstance(op, Call):
                yield from enter(module[op.callee], join(prefix, op.weights))
            else:
                yield str(Site(func.name, prefix, op.id, run))

    yield from enter(module.main, "")


def numerics(found: Found) -> Html:
    """The verdict, a picture, and a row for every op that differs."""
    ops: list[Found] = list(found["ops"])
    unequal = [op for op in ops if not op["equal"]]
    moved = [gate for gate in found["routing"] if gate["changed"]]
    worst = next((op["local"] for op in ops if op["site"] == found["worst"]), None)
    figures: list[tuple[str, str, Child]] = [
        ("verdict", "same" if found["same"] else "different", found["criterion"]),
        ("ops", f"{len(ops):,}", f"{len(ops) - len(unequal):,} of them with equal bits"),
        ("first to differ", "–" if not found["first"] else "", code(found["first"]) if found["first"] else "none"),
        ("largest of its own", _relative(worst), code(found["worst"]) if found["worst"] else None),
        ("routing", plural(max((g["changed"] for g in moved), default=0), "token"), "chose other experts, at the gate where most did"),
    ]
    lead = [
        "Two runs on the same weights and inputs: ",
        code(found["a"]),
        " and ",
        code(found["b"]),
        ". Accumulated is how far the free runs lie apart at an op, local what the op itself does differently when it is given the other ",
        "run's values; both are relative L2, the norm of the difference over the norm of the value.",
    ]
    picture = dots(
        [(float(op["accumulated"]["relative_l2"]), "dot", f"{op['site']}: {_relative(op['accumulated'])}") for op in ops],
        "Accumulated difference by op",
    )
    parts: list[Child] = [cards(figures)]
    if unequal:
        parts += [el("h3", "Accumulated relative L2, in the order in which ops run"), picture, _ops(unequal)]
    parts += [el("h3", "Results"), _results(found)]
    if found["quantization"]:
        parts += [el("h3", "What quantising did"), _quantised(found["quantization"])]
    return section("numerics", "Numerics by op", lead, parts)


def _ops(unequal: list[Found]) -> Html:
    bounded = any(op["bound_ratio"] is not None for op in unequal)
    kept = sorted(range(len(unequal)), key=lambda i: -float((unequal[i]["local"] or unequal[i]["accumulated"])["relative_l2"]))[:MOST]
    head = ("op", "kind", "type", "local", "accumulated", "same experts", "SQNR dB", "cosine", *(("local / bound",) if bounded else ()))
    rows = []
    for op in (unequal[i] for i in sorted(kept)):
        m, ratio = op["accumulated"], op["bound_ratio"]
        over = el("span", f"{float(ratio):.2f}", class_="bad" if not float(ratio) <= 1 else None) if ratio is not None else "–"
        own: tuple[Child, ...] = (over,) if bounded else ()
        row = (code(op["site"]), op["op"], op["type"], *map(_relative, (op["local"], m, op["same_experts"])))
        rows.append((*row, f"{float(m['sqnr_db']):.1f}", f"{float(m['cosine']):.6f}", *own))
    more = f" and {len(unequal) - MOST:,} more that differ less" if len(unequal) > MOST else ""
    return el(
        "div", table(head, rows, name="ops that differ", left=3), el("p", f"{plural(len(rows), 'op')} that differ{more}.", class_="quiet")
    )


def _results(found: Found) -> Html:
    entries = [(entry, "") for entry in found["outputs"]] + [(entry, "routed alike") for entry in found.get("outputs_forced", ())]
    head = ("result", "type", "", "relative L2", "same experts", "largest error", "SQNR dB", "cosine")
    rows = []
    for e, how in entries:
        m = e["accumulated"]
        kind = how or ("equal bits" if e["equal"] else "")
        numbers = (f"{float(m['max_error']):.2e}", f"{float(m['sqnr_db']):.1f}", f"{float(m['cosine']):.6f}")
        rows.append((code(e["site"]), e["type"], kind, _relative(m), _relative(e["same_experts"]), *numbers))
    return table(head, rows, name="results", left=3)


def _quantised(stats: list[Found]) -> Html:
    rows = [
        (code(s["site"]), s["format"], f"{s['saturated']:.2%}", f"{s['flushed']:.2%}", f"{s['scale_min']:.2e}", f"{s['scale_max']:.2e}")
        for s in stats[:MOST]
    ]
    return table(("op", "format", "saturated", "flushed to zero", "least scale", "largest scale"), rows, name="quantised tensors", left=2)


def _relative(measures: Found | None) -> str:
    if measures is None:
        return "–"
    value = float(measures["relative_l2"])  # infinities and NaN stand in JSON as text
    return "0" if value == 0 else f"{value:.2e}"
