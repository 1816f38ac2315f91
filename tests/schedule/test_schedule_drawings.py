"""Schedules drawn: the text grid, the picture, and the trace, each held against the simulated times."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from dsc.schedule.generate import generate
from dsc.schedule.simulate import Durations, Timeline, simulate
from dsc.schedule.timeline import MOST_BANDS, svg, text_grid, trace
from dsc.schedule.validate import in_flight


def timelines() -> list[Timeline]:
    costs = Durations(F=1, I=Fraction(3, 2), W=Fraction(1, 2), comm=Fraction(1, 4)), Durations()
    names = (("1f1b", 4, 8), ("interleaved", 4, 4), ("zb1p", 4, 8), ("dualpipe", 4, 10), ("dualpipev", 4, 6))
    return [simulate(generate(*name), cost) for name in names for cost in costs]


TIMELINES = timelines()
IDS = [f"{t.schedule.name}-{float(t.time):g}" for t in TIMELINES]


def test_a_grid() -> None:
    assert text_grid(simulate(generate("1f1b", 3, 3))).splitlines() == [
        "time    0               4               8               12",
        "rank 0  0F0 0F1 0F2   .   .   .   . 0B0       . 0B1       . 0B2",
        "rank 1    . 1F0 1F1   .   . 1B0     1F2 1B1       . 1B2       .   .",
        "rank 2    .   . 2F0 2B0     2F1 2B1     2F2 2B2       .   .   .   .",
    ]


def test_an_overlapped_pair_is_one_bar_and_colours_take_no_room() -> None:
    timeline = simulate(generate("dualpipe", 4, 8))
    plain, coloured = text_grid(timeline, 400), text_grid(timeline, 400, colour=True)
    assert "0F3+3B5" in plain
    assert re.sub(r" +$", "", re.sub(r"\x1b\[[0-9;]*m", "", coloured), flags=re.M) == plain
    assert coloured.count("\x1b[0m") == sum(map(len, timeline.spans))


@pytest.mark.parametrize("timeline", TIMELINES, ids=IDS)
def test_bands_hold_every_step_once_and_keep_the_width(timeline: Timeline) -> None:
    wide = text_grid(timeline, 10_000).splitlines()
    assert len(wide) == 1 + timeline.schedule.ranks
    for rank, row in enumerate(timeline.spans):
        assert [word for word in wide[1 + rank].split()[2:] if word != "."] == [
            "+".join(map(str, s.step.parts)).replace("@r", "") for s in row
        ]
    narrow = text_grid(timeline, 60)
    assert max(map(len, narrow.splitlines())) <= 60


def test_a_long_schedule_shows_its_beginning_and_its_end() -> None:
    timeline = simulate(generate("1f1b", 4, 100))
    lines = text_grid(timeline, 60).splitlines()
    assert sum(line.startswith("rank 0") for line in lines) == MOST_BANDS
    (left_out,) = [line for line in lines if line.startswith("...")]
    shown = sum(len(line.split()) > 2 for line in lines if line.startswith("rank 0"))
    assert shown == MOST_BANDS
    assert int(left_out.split()[1]) > 0
    assert "0B99" in lines[-4]


@pytest.mark.parametrize("timeline", TIMELINES, ids=IDS)
def test_the_picture_has_a_bar_for_each_step(timeline: Timeline) -> None:
    root = ElementTree.fromstring(svg(timeline))
    groups = root.findall("{*}g")
    spans = [span for row in timeline.spans for span in row]
    assert len(groups) == len(spans)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    total = sum(float(span.end - span.start) for span in spans)
    bars = [group.findall("{*}rect")[0].attrib for group in groups]
    per_unit = sum(float(bar["width"]) for bar in bars) / total
    for span, bar, group in zip(spans, bars, groups, strict=True):
        assert float(bar["width"]) == pytest.approx(float(span.end - span.start) * per_unit, abs=0.02)
        assert float(bar["x"]) == pytest.approx(70 + float(span.start) * per_unit, abs=0.5)
        assert float(bar["x"]) + float(bar["width"]) <= width
        assert float(bar["y"]) < height
        title = group.find("{*}title")
        assert title is not None
        assert (title.text or "").startswith(f"{span.step} from ")


@pytest.mark.parametrize("timeline", TIMELINES, ids=IDS)
def test_the_trace_is_what_perfetto_takes(timeline: Timeline) -> None:
    """One slice at a time on each thread, arrows from a slice to a slice, counters that end where memory does; no time is NaN."""
    document = json.loads(json.dumps(trace(timeline, unit=1000), allow_nan=False))
    events: list[dict[str, Any]] = document["traceEvents"]
    threads: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(threads) == set(names)
    for slices in threads.values():
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(sorted(slices, key=lambda e: e["ts"])))
    for rank, row in enumerate(timeline.spans):
        own = [(e["name"], e["ts"], e["dur"]) for e in threads[rank, 0]]
        assert own == [(str(s.step), float(s.start) * 1000, float(s.end - s.start) * 1000) for s in row]
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys() == set(range(len(timeline.transfers)))
    for number, transfer in enumerate(timeline.transfers):
        begin, end = starts[number], ends[number]
        assert names[begin["pid"], begin["tid"]] == f"to rank {end['pid']}" == f"to rank {transfer.target}"
        assert begin["ts"] <= end["ts"]
        assert any(e["ts"] == begin["ts"] for e in threads[begin["pid"], begin["tid"]])
        assert any(e["ts"] == end["ts"] for e in threads[end["pid"], 0])
    peaks = [max(e["args"]["chunks"] for e in events if e["ph"] == "C" and e["pid"] == rank) for rank in range(timeline.schedule.ranks)]
    assert peaks == [max(row) for row in in_flight(timeline.schedule)]
