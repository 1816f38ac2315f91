"""A simulated schedule drawn: as text for a terminal, as SVG, and as a trace that Perfetto and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import floor
from typing import Any

from .actions import Action, Number, Overlap, Step, Token
from .simulate import Span, Timeline
from .validate import in_flight

COLOURS = {"F": "#8fb8de", "I": "#f2c078", "W": "#a5c882", "B": "#e8998d", "FB": "#b9a0d0"}
"""Of each kind of step in SVG."""
ANSI = {"F": 44, "I": 43, "W": 42, "B": 41, "FB": 45}
"""Backgrounds on a terminal, near to those."""
MEANING = {
    "F": "forward",
    "I": "backward for inputs",
    "W": "backward for weights",
    "B": "full backward",
    "FB": "forward and backward overlapped",
}
MOST_BANDS = 6
"""Text that would need more bands than this shows the first and the last."""


def kind_of(step: Step) -> str:
    """F, I, W, B, or FB for an overlapped pair."""
    return "FB" if isinstance(step, Overlap) else step.kind.value


def label(step: Step) -> str:
    """As short as a step can be said: `0F7`, `0F7+7B3`. The direction follows from the micro-batch."""
    return "+".join(f"{a.stage}{a.kind}{a.microbatch}" for a in step.parts)


def text_grid(timeline: Timeline, width: int = 110, colour: bool = False) -> str:
    """Ranks down, time to the right, in bands of `width` characters; a dot is a unit of idle time, the unit being the shortest step."""
    spans = [span for row in timeline.spans for span in row]
    unit = min(span.end - span.start for span in spans if span.end > span.start)
    cell = max(len(label(span.step)) for span in spans if isinstance(span.step, Action)) + 1

    def column(time: Number) -> int:
        return floor(time / unit + 0.5)

    total = column(timeline.time)
    lead = len(f"rank {timeline.schedule.ranks - 1}") + 2
    per_band = max(1, (width - lead) // cell)
    bands = [(a, min(a + per_band, total)) for a in range(0, total, per_band)]
    rows = [[(column(s.start), column(s.end), s.step) for s in row if column(s.end) > column(s.start)] for row in timeline.spans]
    shown = bands if len(bands) <= MOST_BANDS else [*bands[: MOST_BANDS - 1], bands[-1]]
    lines: list[str] = []
    for band in shown:
        if len(bands) > MOST_BANDS and band == bands[-1]:
            lines += [f"... {band[0] - shown[-2][1]} columns left out, which --plot draws", ""]
        first, last = band
        ticks = [_tick(t * unit).ljust(cell * 4)[: cell * (last - t)] for t in range(first, last, 4)]
        lines.append(("time".ljust(lead) + "".join(ticks)).rstrip())
        for rank, row in enumerate(rows):
            line, at = f"rank {rank}".ljust(lead), first
            for start, end, step in row:
                if end <= first or start >= last:
                    continue
                line += (". ".rjust(cell)) * (start - at)
                here = (min(end, last) - max(start, first)) * cell
                name = label(step) if start >= first else "~"
                body = name[: here - 1].ljust(here - 1)
                line += f"\x1b[30;{ANSI[kind_of(step)]}m{body}\x1b[0m " if colour else f"{body} "
                at = min(end, last)
            line += (". ".rjust(cell)) * (last - at)
            lines.append(line.rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


def _tick(time: Number) -> str:
    return f"{float(time):g}"


def svg(timeline: Timeline) -> str:
    """The schedule as an SVG picture: a bar for each step, and under it the activations that each rank holds."""
    ranks, time = timeline.schedule.ranks, float(timeline.time)
    shortest = float(min(span.end - span.start for row in timeline.spans for span in row if span.end > span.start))
    left, top, row, width = 70, 50, 26, max(600.0, min(8000.0, 17 * time / shortest))
    scale = width / time
    held = in_flight(timeline.schedule)
    most = float(max(map(max, held)))
    height = top + row * ranks + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + left + 20:.0f} {height}" font-family="sans-serif" font-size="10">',
        f'<rect width="{width + left + 20:.0f}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="16" font-size="13">{escape(timeline.schedule.name)}: {timeline.schedule.stages} stages, '
        f"{timeline.schedule.microbatches} micro-batches, time {_tick(timeline.time)}, bubble {_tick(max(timeline.bubbles))}, "
        f"peak {_tick(most)} chunks</text>",
    ]
    x = float(left)
    for kind in dict.fromkeys(kind_of(span.step) for spans in timeline.spans for span in spans):
        parts.append(f'<rect x="{x:.0f}" y="24" width="10" height="10" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 14:.0f}" y="33">{MEANING[kind]}</text>')
        x += 30 + 6 * len(MEANING[kind])
    for rank, spans in enumerate(timeline.spans):
        y = top + row * rank
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">rank {rank}</text>')
        for span, chunks in zip(spans, held[rank], strict=True):
            start, long = left + float(span.start) * scale, float(span.end - span.start) * scale
            title = f"{span.step} from {_tick(span.start)} to {_tick(span.end)}, {_tick(chunks)} chunks held"
            fill = f'fill="{COLOURS[kind_of(span.step)]}" fill-opacity="{0.6 if span.step.parts[0].reverse else 1}" stroke="white"'
            parts.append(f'<g><title>{escape(title)}</title><rect x="{start:.2f}" y="{y}" width="{long:.2f}" height="18" {fill}/>')
            words = "+".join(str(a.microbatch) for a in span.step.parts)
            if long > 6 * len(words):
                parts.append(f'<text x="{start + long / 2:.2f}" y="{y + 13}" text-anchor="middle">{words}</text>')
            share = 4 * float(chunks) / most
            parts.append(f'<rect x="{start:.2f}" y="{y + 23 - share:.2f}" width="{long:.2f}" height="{share:.2f}" fill="#666"/></g>')
    y = top + row * ranks + 14
    step = 10 ** (len(str(int(time))) - 1)
    for tick in range(0, int(time) + 1, step):
        parts.append(f'<text x="{left + tick * scale:.2f}" y="{y}" text-anchor="middle">{tick}</text>')
    parts.append(
        f'<text x="{left}" y="{y + 20}">numbers: micro-batches, pale in reverse; grey: activations, most {_tick(most)} chunks</text></svg>'
    )
    return "\n".join(parts) + "\n"


def trace(timeline: Timeline, unit: float = 1000.0) -> dict[str, Any]:
    """The Chrome trace: a process for each rank with a thread for computation and one for each link, arrows along transfers, and a counter.

    `unit` is the microseconds of one unit of time.
    """
    return {"displayTimeUnit": "ms", "traceEvents": list(_events(timeline, unit))}


def _events(timeline: Timeline, unit: float) -> Iterator[dict[str, Any]]:
    links = sorted({(t.source, t.target) for t in timeline.transfers})
    threads = {link: 1 + [other for other in links if other[0] == link[0]].index(link) for link in links}
    for rank in range(timeline.schedule.ranks):
        yield _meta("process_name", rank, 0, f"rank {rank}")
        yield _meta("thread_name", rank, 0, "compute")
    for (source, target), tid in threads.items():
        yield _meta("thread_name", source, tid, f"to rank {target}")
    held = in_flight(timeline.schedule)
    reads: dict[Token, Span] = {}
    for rank, spans in enumerate(timeline.spans):
        for span, chunks in zip(spans, held[rank], strict=True):
            yield _slice(str(span.step), kind_of(span.step), rank, 0, span.start, span.end, unit)
            yield {"ph": "C", "name": "activations", "pid": rank, "ts": float(span.start) * unit, "args": {"chunks": float(chunks)}}
            for action in span.step.parts:
                reads |= {token: span for token in action.needs(timeline.schedule.stages) if token[1] != action.stage}
    for number, transfer in enumerate(timeline.transfers):
        tid = threads[transfer.source, transfer.target]
        yield _slice(str(transfer.send), "transfer", transfer.source, tid, transfer.start, transfer.end, unit)
        flow = {"name": "transfer", "cat": "transfer", "id": number}
        yield flow | {"ph": "s", "pid": transfer.source, "tid": tid, "ts": float(transfer.start) * unit}
        yield flow | {"ph": "f", "bp": "e", "pid": transfer.target, "tid": 0, "ts": float(reads[transfer.token].start) * unit}


def _meta(what: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": thread, "args": {"name": name}}


def _slice(name: str, category: str, rank: int, thread: int, start: Number, end: Number, unit: float) -> dict[str, Any]:
    span = {"ts": float(start) * unit, "dur": float(end - start) * unit}
    return {"ph": "X", "name": name, "cat": category, "pid": rank, "tid": thread, **span}
