"""A diff report as text."""

from __future__ import annotations

import math

from .diff import OpDiff, Report
from .ui import plural, table

SHOWN = 12


def show(report: Report, everything: bool = False) -> str:
    """The verdict first, then routing, the ops that matter, and what only one side has."""
    unequal = [e for e in report.ops if not e.equal]
    lines = [
        f"a: {report.a}",
        f"b: {report.b}",
        f"{'same' if report.same else 'different'} ({report.criterion}): "
        f"{plural(len(report.ops), 'op')} compared, {len(report.ops) - len(unequal):,} with equal bits",
    ]
    if report.first:
        lines.append(f"first: {report.first}")
    if report.worst:
        worst = next(e for e in report.ops if e.site == report.worst)
        lines.append(f"worst: {report.worst}, relative L2 {worst.accumulated.relative_l2:.2e}")
    for gate in (r for r in report.routing if r.changed):
        lines.append(f"routing: {gate.changed} of {plural(gate.tokens, 'token')} chose other experts at {gate.site}")
    if report.routing and not any(r.changed for r in report.routing):
        lines.append(f"routing: the same experts at all {plural(len(report.routing), 'gate')}")
    chosen = list(report.ops) if everything else _telling(report, unequal)
    if chosen:
        lines += ["", _table([*chosen, *report.outputs])]
    if not everything and len(unequal) > len(chosen):
        lines.append(f"and {plural(len(unequal) - len(chosen), 'op')} more that differ (--all shows every op)")
    for which, sites in (("a", report.only_in_a), ("b", report.only_in_b)):
        if sites:
            lines.append(f"only in {which}: {plural(len(sites), 'op')}, e.g. {sites[0]}")
    return "\n".join(lines)


def _telling(report: Report, unequal: list[OpDiff]) -> list[OpDiff]:
    """Those over their bound first, then the worst of the rest, in program order."""
    key = {e.site: (e.bound_ratio or 0.0) > 1 for e in unequal}
    ranked = sorted(unequal, key=lambda e: (not key[e.site], -_finite(e.accumulated.relative_l2)))[:SHOWN]
    kept = {e.site for e in ranked} | {report.first}
    return [e for e in report.ops if e.site in kept]


def _table(entries: list[OpDiff]) -> str:
    local = any(e.bound_ratio is not None for e in entries)
    apart = any(e.other_tokens is not None for e in entries)
    head: tuple[str, ...] = ("op", "", "type", "rel L2", "max error", "SQNR dB", "cosine", "calc_diff")
    head += (("rel L2, same experts",) if apart else ()) + (("local/bound",) if local else ())
    rows = []
    for e in entries:
        m = e.accumulated
        row = [
            e.site,
            e.op,
            e.type,
            f"{m.relative_l2:.2e}",
            f"{m.max_error:.2e}",
            f"{m.sqnr_db:.1f}",
            f"{m.cosine:.6f}",
            f"{m.calc_diff:.1e}",
        ]
        row += ([f"{e.other_tokens.relative_l2:.2e}" if e.other_tokens else "-"] if apart else []) + (
            [f"{e.bound_ratio:.2f}" if e.bound_ratio is not None else "-"] if local else []
        )
        rows.append(row)
    return table(head, rows, left=3)


def _finite(value: float) -> float:
    return math.inf if math.isnan(value) else value
