"""A diff report as text."""

from __future__ import annotations

import math

from .diff import OpDiff, Report
from .measure import Measures
from .ui import plural, table

SHOWN = 12


def show(report: Report, everything: bool = False) -> str:
    """The verdict first, then routing and quantisation in a line each, the ops that matter, and what only one side has."""
    unequal = [e for e in report.ops if not e.equal]
    verdict = "same" if report.same else "different"
    what = "result" if all(e.op == "result" for e in report.ops) else "op"
    lines = [
        f"a: {report.a}",
        f"b: {report.b}",
        f"{verdict} ({report.criterion}): {plural(len(report.ops), what)} compared, {len(report.ops) - len(unequal):,} with equal bits",
        *([f"first: {report.first}"] if report.first else []),
        *_worst(report),
        *_routing(report),
        *_quantization(report),
    ]
    chosen = list(report.ops) if everything else _telling(report, unequal)
    entries = [*chosen, *report.outputs, *report.outputs_forced]
    if chosen:
        lines += ["", _table(entries, len(report.outputs_forced))]
    if not everything and len(unequal) > len(chosen):
        lines.append(f"and {plural(len(unequal) - len(chosen), what)} more that differ (--all shows every {what})")
    for which, sites in (("a", report.only_in_a), ("b", report.only_in_b)):
        if sites:
            lines.append(f"only in {which}: {plural(len(sites), what)}, e.g. {sites[0]}")
    return "\n".join(lines)


def _worst(report: Report) -> list[str]:
    found = next((e for e in report.ops if e.site == report.worst), None)
    if found is None:
        return []
    return [f"worst: {found.site}, {'local ' if found.local else ''}relative L2 {(found.local or found.accumulated).relative_l2:.2e}"]


def _routing(report: Report) -> list[str]:
    moved = [gate for gate in report.routing if gate.changed]
    if not moved:
        return [f"routing: the same experts at {plural(len(report.routing), 'gate')}"] if report.routing else []
    return [f"routing: {gate.changed} of {plural(gate.tokens, 'token')} chose other experts at {gate.site}" for gate in moved]


def _quantization(report: Report) -> list[str]:
    stats = report.quantization
    if not stats:
        return []
    saturated, flushed = (max(stats, key=lambda s: getattr(s, key)) for key in ("saturated", "flushed"))
    low, high = min(s.scale_min for s in stats), max(s.scale_max for s in stats)
    return [
        f"quantised: {plural(len(stats), 'tensor')}, scales {low:.2e} to {high:.2e}, at most {saturated.saturated:.2%} saturated "
        f"and {flushed.flushed:.2%} flushed to zero ({flushed.site})"
    ]


def _telling(report: Report, unequal: list[OpDiff]) -> list[OpDiff]:
    """Those over their bound, the first, and those with the largest local difference, of results the largest; in program order."""
    ranked = sorted(unequal, key=lambda e: (-_finite(e.bound_ratio), -_finite((e.local or e.accumulated).relative_l2)))[:SHOWN]
    kept = {e.site for e in ranked} | {report.first}
    return [e for e in report.ops if e.site in kept]


def _table(entries: list[OpDiff], forced: int) -> str:
    bounded = any(e.bound_ratio is not None for e in entries)
    apart = any(e.same_experts is not None for e in entries)
    head = (
        "site",
        "op",
        "type",
        "local",
        "accumulated",
        *(["same experts"] if apart else []),
        "max error",
        "SQNR dB",
        "cosine",
        "calc_diff",
    )
    head += ("local/bound",) if bounded else ()
    rows = []
    for i, e in enumerate(entries):
        m = e.accumulated
        site = f"{e.site}, routed as a" if i >= len(entries) - forced else _short(e.site)
        row = [site, e.op, e.type, _relative(e.local), _relative(m), *([_relative(e.same_experts)] if apart else [])]
        row += [f"{m.max_error:.2e}", f"{m.sqnr_db:.1f}", f"{m.cosine:.6f}", f"{m.calc_diff:.1e}"]
        rows.append([*row, *([f"{e.bound_ratio:.2f}" if e.bound_ratio is not None else "-"] if bounded else [])])
    return (
        table(head, rows, left=3)
        + "\n(local, accumulated, same experts: relative L2; SQNR, cosine and calc_diff of the accumulated difference)"
    )


def _short(site: str) -> str:
    """`model.layers.3 mlp#2` for `@moe_layer (model.layers.3) mlp#2`: within a table the function says nothing new."""
    _, found, rest = site.partition(" (")
    return rest.replace(") ", " ", 1) if found else site


def _relative(measures: Measures | None) -> str:
    return "-" if measures is None else "0" if measures.relative_l2 == 0 else f"{measures.relative_l2:.2e}"


def _finite(value: float | None) -> float:
    return 0.0 if value is None else math.inf if math.isnan(value) else value
