"""plan/timeline.json, a Chrome trace, as a timeline that zooms: the page's script draws it, so here it is only read and made small."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ir.errors import require
from ...models.json_file import read_json
from ...schedule.timeline import COLOURS, MEANING
from .html import Html, code, data, el, fold, section

FILE = Path("plan") / "timeline.json"
ROWS = Path("plan") / "schedule.txt"
MOST = 40_000
"""Spans that a page holds: the longest ones."""
HUES = 8
"""Colours of spans in the page's style: those of the kinds of steps, then of whatever else there is."""


def timeline(folder: Path, file: Path | None = None) -> Html | None:
    """The section: of `file`, else of the trace that the artifact has, if it has one."""
    file = file or folder / FILE
    if not file.is_file():
        return None
    found = read(file)
    spans = sum(len(row["spans"]) // 4 for row in found["rows"])
    lead: list[Any] = [
        f"{spans:,} spans in {len(found['rows']):,} rows, from ",
        code(file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)),
        " (which opens in Perfetto too). Drag to move; wheel with Ctrl, the buttons or + and − zoom; arrow keys move.",
    ]
    if found["left_out"]:
        lead.append(f" The {found['left_out']:,} shortest spans are left out here.")
    buttons = [
        el("button", words, type="button", data_zoom=name, aria_label=label)
        for name, words, label in (("in", "+", "zoom in"), ("out", "−", "zoom out"), ("all", "whole", "show everything"))
    ]
    key = [
        el("span", el("i", class_=f"hue-{hue}"), MEANING.get(name, name)) for name, hue in zip(found["kinds"], found["hues"], strict=True)
    ]
    rows = folder / ROWS
    text = (
        fold("The schedule as text", el("pre", rows.read_text(encoding="utf-8"), tabindex="0", class_="scroll")) if rows.is_file() else None
    )
    label = "timeline: + and − zoom, arrows move"
    return section(
        "schedule",
        "Schedule",
        lead,
        el("div", el("div", buttons, class_="views"), el("p", key, class_="key"), class_="tools"),
        el("div", el("div", class_="canvas"), id="timeline", tabindex="0", role="application", aria_label=label),
        el("output", id="timeline-says", class_="says"),
        text,
        data("timeline-data", found),
    )


def read(file: Path) -> dict[str, Any]:
    """`rows` with their process, name and four numbers for each span: start and length in µs, name, kind; `names`, `kinds`, `hues`.

    `DscError` for what is no Chrome trace.
    """
    raw = read_json(file, object)
    events: Any = raw.get("traceEvents") if isinstance(raw, dict) else raw
    require(isinstance(events, list), f"{file}: expected a Chrome trace, a list of events or an object with traceEvents")
    titles: dict[tuple[str, Any, Any], str] = {}
    spans: list[Mapping[str, Any]] = []
    for number, event in enumerate(events):
        require(isinstance(event, dict) and "ph" in event, f"{file}: event {number} is no event of a Chrome trace")
        if event["ph"] == "M":
            thread = event.get("tid") if event.get("name") == "thread_name" else None
            titles[str(event.get("name")), event.get("pid"), thread] = str(event.get("args", {}).get("name", ""))
        elif event["ph"] == "X":
            times = [event.get(key) for key in ("ts", "dur")]
            require(
                all(isinstance(t, int | float) and t >= 0 for t in times), f"{file}: event {number}: ts and dur are {times}, expected times"
            )
            spans.append(event)
    require(bool(spans), f"{file}: no events of phase X, so there is nothing to draw")
    kept = sorted(spans, key=lambda s: -s["dur"])[:MOST]
    return _packed(kept, titles) | {"left_out": len(spans) - len(kept)}


def _packed(spans: list[Mapping[str, Any]], titles: Mapping[tuple[str, Any, Any], str]) -> dict[str, Any]:
    names: dict[str, int] = {}
    kinds: dict[str, int] = {}
    rows: dict[tuple[Any, Any], list[float]] = {}
    first = min(s["ts"] for s in spans)
    for s in sorted(spans, key=lambda s: (str(s.get("pid")).zfill(9), str(s.get("tid")).zfill(9), s["ts"])):
        name, kind = str(s.get("name", "")), str(s.get("cat") or "span")
        row = rows.setdefault((s.get("pid"), s.get("tid")), [])
        row += [round(s["ts"] - first, 3), round(s["dur"], 3), names.setdefault(name, len(names)), kinds.setdefault(kind, len(kinds))]
    made = [
        {
            "group": titles.get(("process_name", pid, None)) or f"process {pid}",
            "name": titles.get(("thread_name", pid, tid)) or f"thread {tid}",
            "spans": numbers,
        }
        for (pid, tid), numbers in rows.items()
    ]
    end = max(s["ts"] + s["dur"] for s in spans) - first
    return {"rows": made, "names": list(names), "kinds": list(kinds), "hues": _hues(list(kinds)), "end": end}


def _hues(kinds: list[str]) -> list[int]:
    """The same colour for the same kind of step in every schedule."""
    steps = list(COLOURS)
    others = [kind for kind in kinds if kind not in steps]
    return [steps.index(kind) if kind in steps else len(steps) + others.index(kind) % (HUES - len(steps)) for kind in kinds]
