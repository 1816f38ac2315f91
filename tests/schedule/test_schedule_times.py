"""Times and memory: the published closed forms, in exact fractions; the longest path, found another way; the search."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsc.ir.errors import DscError
from dsc.schedule.actions import Kind, Schedule, parse
from dsc.schedule.formulas import closed_form
from dsc.schedule.generate import NAMES, generate
from dsc.schedule.search import Memory, search
from dsc.schedule.simulate import Durations, lower, parse_durations, simulate
from dsc.schedule.validate import check, in_flight

Case = tuple[str, int, int, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """(name, stages, micro-batches, chunks) in their steady state."""
    name = draw(st.sampled_from(NAMES))
    ranks = draw(st.integers(2, 6))
    if name in ("interleaved", "zb1p"):
        chunks = draw(st.integers(2 if name == "interleaved" else 1, 3))
        return name, ranks * chunks, ranks * draw(st.integers(2, 4)), chunks
    if name == "1f1b":
        return name, ranks, draw(st.integers(ranks, 4 * ranks)), 1
    stages = 2 * draw(st.integers(1, 4))
    more = draw(st.integers(0, 6))
    return name, stages, (2 * stages + 2 * more if name == "dualpipe" else stages + more), 2


fractions = st.fractions(Fraction(1, 10), 4, max_denominator=12)
durations = st.builds(Durations, F=fractions, I=fractions, W=fractions)


def made(case: Case) -> Schedule:
    name, stages, microbatches, chunks = case
    return generate(name, stages, microbatches, chunks)


@settings(max_examples=60)
@given(cases(), durations, st.booleans())
def test_closed_forms_hold_exactly(case: Case, given_durations: Durations, even: bool) -> None:
    """1F1B and interleaved for any durations, ZB1P where W is the shortest, DualPipe where F = I >= W: in fractions, with `==`."""
    name, stages, _, chunks = case
    d = Durations(given_durations.F, given_durations.F, min(given_durations.F, given_durations.W)) if even else given_durations
    expected = closed_form(name, stages, chunks, d)
    assume(expected.exact)
    schedule = made(case)
    assert set(simulate(schedule, d).bubbles) == {expected.bubble}
    assert max(map(max, in_flight(schedule))) == expected.peak


@pytest.mark.parametrize(
    ("case", "bubble", "peak"),
    [
        (("1f1b", 8, 20, 1), 21, 8),
        (("1f1b", 16, 40, 1), 45, 16),
        (("zb1p", 8, 20, 1), 7, 8),
        (("zb1p", 16, 40, 1), 15, 16),
        (("interleaved", 8, 8, 2), 9, 11),
        (("interleaved", 32, 16, 4), 21, 39),
        (("dualpipe", 8, 20, 2), 6, 9),
        (("dualpipe", 16, 120, 2), 14, 17),
        (("dualpipev", 8, 20, 2), 6, 9),
    ],
)
def test_published_figures(case: Case, bubble: int, peak: int) -> None:
    """With F = I = W = 1. DualPipe holds PP + 1 chunks on every rank (DeepSeek-V3 report, table 2)."""
    schedule = made(case)
    assert set(simulate(schedule).bubbles) == {bubble}
    peaks = [max(row) for row in in_flight(schedule)]
    assert max(peaks) == peak
    assert case[0] == "1f1b" or case[0] == "interleaved" or len(set(peaks)) == 1


def test_the_formula_of_dualpipe_is_the_largest_bubble_where_overlap_saves_time() -> None:
    """F&B = 2.4 with F = I = W = 1 at PP 8: the middle ranks idle as the formula says, the others less."""
    found = simulate(generate("dualpipe", 8, 20), Durations(overlap=Fraction(12, 5)))
    assert max(found.bubbles) == 3 * (Fraction(12, 5) + 2 - 3)
    assert [float(b) for b in found.bubbles[:4]] == pytest.approx([3.0, 3.6, 4.2, 4.2])


def test_the_step_of_16_stages_and_120_chunks() -> None:
    schedule = generate("dualpipe", 16, 120)
    check(schedule)
    timeline = simulate(schedule)
    kinds = [
        [[s.parts[0].kind if len(s.parts) == 1 else "FB" for s in row].count(k) for k in ("F", "B", "I", "W", "FB")]
        for row in schedule.rows
    ]
    assert kinds[0] == [23, 8, 15, 15, 97]  # of github.com/deepseek-ai/DualPipe
    assert kinds[6] == [17, 8, 9, 9, 103]
    assert kinds[7] == [17, 9, 8, 8, 103]
    assert timeline.time == 374


def longest_path(schedule: Schedule, d: Durations) -> Any:
    """The time of a step as the longest path through computations and transfers, by relaxing edges until nothing changes."""
    length: dict[Any, Any] = {}
    edges: list[tuple[Any, Any]] = []
    step_of: dict[Any, Any] = {}
    for rank, row in enumerate(schedule.rows):
        for cell, step in enumerate(row):
            length[rank, cell] = d(step)
            if cell:
                edges.append(((rank, cell - 1), (rank, cell)))
            for a in step.parts:
                step_of[a.kind if a.kind in "FW" else "B", a.stage, a.microbatch] = rank, cell
    links: dict[Any, Any] = {}
    for rank, row in enumerate(schedule.rows):
        for cell, step in enumerate(row):
            for a in step.parts:
                after = (
                    [("F", a.stage + 1, a.microbatch)]
                    if a.kind is Kind.F
                    else [("B", a.stage - 1, a.microbatch)]
                    if a.kind is not Kind.W
                    else []
                )
                for key in after:
                    if key in step_of and step_of[key][0] != rank:
                        node = ("transfer", key)
                        length[node] = d.comm_overlap if len(step.parts) == 2 else d.comm
                        edges += [((rank, cell), node), (node, step_of[key])]
                        if (link := (rank, step_of[key][0])) in links:
                            edges.append((links[link], node))
                        links[link] = node
                    elif key in step_of and step_of[key] != (rank, cell):
                        edges.append(((rank, cell), step_of[key]))
    end = dict(length)
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            if end[a] + length[b] > end[b]:
                end[b] = end[a] + length[b]
                changed = True
    return max(end.values())


@settings(max_examples=25)
@given(cases(), durations, st.fractions(0, 2, max_denominator=6), st.fractions(0, 1, max_denominator=6))
def test_the_time_is_that_of_the_longest_path(case: Case, d: Durations, comm: Fraction, comm_overlap: Fraction) -> None:
    with_transfers = Durations(d.F, d.I, d.W, comm=comm, comm_overlap=comm_overlap)
    schedule = made(case)
    assert simulate(schedule, with_transfers).time == longest_path(schedule, with_transfers)


@settings(max_examples=40)
@given(cases(), durations)
def test_every_schedule_passes_its_checks_and_reads_back(case: Case, d: Durations) -> None:
    schedule = made(case)
    check(schedule)
    lowered = lower(simulate(schedule, d))
    check(lowered)
    for each in (schedule, lowered):
        assert parse(str(each), each.name) == each
    assert lowered.compute() == schedule
    assert in_flight(lowered) == in_flight(schedule)


@settings(max_examples=30)
@given(cases(), durations, st.fractions(0, 1))
def test_steps_run_in_order_and_one_at_a_time(case: Case, d: Durations, comm: Fraction) -> None:
    found = simulate(made(case), Durations(d.F, d.I, d.W, comm=comm))
    for row in found.spans:
        assert all(a.end <= b.start for a, b in pairwise(row))
    links: dict[tuple[int, int], list[Any]] = {}
    for transfer in found.transfers:
        links.setdefault((transfer.source, transfer.target), []).append(transfer)
    for transfers in links.values():
        assert all(a.end <= b.start for a, b in pairwise(transfers))


def test_weights_may_let_go_early() -> None:
    """ZB1P: where W needs nothing of what forward kept, each rank holds what 1F1B holds."""
    schedule = generate("zb1p", 4, 8)
    assert [max(row) for row in in_flight(schedule, waiting=0)] == [4, 3, 2, 1]
    assert [max(row) for row in in_flight(schedule)] == [4, 4, 4, 4]
    assert max(map(max, in_flight(schedule, waiting=Fraction(1, 2)))) == 4


def test_stages_may_hold_more_or_less() -> None:
    """Stage s keeps 10 s bytes of a micro-batch: with two stages on a rank, each counts by its own."""
    schedule = generate("interleaved", 4, 2)
    sizes = [0, 10, 20, 30]
    for rank, row in enumerate(schedule.rows):
        held = most = 0
        for step in row:
            held += sizes[step.parts[0].stage] if step.parts[0].kind is Kind.F else 0
            most = max(most, held)
            held -= sizes[step.parts[0].stage] if step.parts[0].kind is Kind.B else 0
        assert max(in_flight(schedule, sizes)[rank]) == most


def test_stages_that_differ() -> None:
    """Durations may be any function of the step: the first stage, with an embedding, twice as long."""
    found = simulate(generate("1f1b", 2, 2), lambda step: 2 if step.parts[0].stage == 0 else 1, lambda step: 1)
    # 0F0 0-2, 0F1 2-4; 1F0 3-4, 1B0 4-5, 1F1 5-6, 1B1 6-7; 0B0 6-8, 0B1 8-10
    assert [[(span.start, span.end) for span in row] for row in found.spans] == [
        [(0, 2), (2, 4), (6, 8), (8, 10)],
        [(3, 4), (4, 5), (5, 6), (6, 7)],
    ]


def every_case(ranks: int) -> Iterator[tuple[str, int, int]]:
    for name in NAMES:
        for chunks in {"1f1b": (1,), "interleaved": (2, 4), "zb1p": (1, 2, 4)}.get(name, (2,)):
            yield name, (ranks if name == "dualpipe" else ranks * chunks), chunks


def test_the_search_finds_the_least_time_that_fits() -> None:
    d = Durations(F=1, I=Fraction(3, 2), W=Fraction(1, 2), comm=Fraction(1, 10))
    best: dict[tuple[str, int], Any] = {}
    for name, stages, chunks in every_case(8):
        schedule, part = generate(name, stages, 16, chunks), Fraction(8, stages)
        peak = max(map(max, in_flight(schedule))) * part
        best[name, chunks] = simulate(schedule, d.scaled(part)).time, peak + (4 if name == "dualpipe" else 2)
    for cap in (None, 11, 10):
        found = search(8, 16, d, memory=Memory(parameters=2), cap=cap)
        fitting = {key: t for key, (t, held) in best.items() if cap is None or held <= cap}
        assert {(c.name, c.chunks) for c in found if c.fits} == set(fitting)
        assert found[0].time == pytest.approx(float(min(fitting.values())))
    assert not any(c.fits for c in search(8, 16, d, cap=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zb2p", 4, 4), "unknown schedule zb2p, expected one of 1f1b, interleaved, zb1p, dualpipe, dualpipev, gpipe, forward"),
        (("gpipe", 4, 4, 2), "--chunks is 2, but a rank of gpipe has 1: interleaved takes more"),
        (("1f1b", 0, 4), "--stages is 0, expected 1 or more"),
        (("1f1b", 4, 0), "--microbatches is 0, expected 1 or more"),
        (("1f1b", 4, 4, 2), "--chunks is 2, but a rank of 1f1b has 1: interleaved takes more"),
        (("interleaved", 7, 8), "7 stages do not make ranks of 2"),
        (("interleaved", 8, 9), "9 micro-batches do not make 2 equal rounds over 4 ranks, as several stages on a rank need"),
        (("dualpipe", 7, 20), "--stages is 7, but dualpipe takes an even number"),
        (("dualpipe", 8, 15), "--microbatches is 15, but dualpipe takes an even number, and at least 2 for each of 8 stages"),
        (("dualpipe", 8, 14), "--microbatches is 14, but dualpipe takes an even number, and at least 2 for each of 8 stages"),
        (("dualpipev", 8, 7), "--microbatches is 7, but dualpipev takes at least as many as there are stages, 8"),
        (("dualpipev", 8, 8, 3), "--chunks is 3, but a rank of dualpipev has 2"),
    ],
)
def test_what_cannot_be_generated(arguments: Any, message: str) -> None:
    with pytest.raises(DscError) as error:
        generate(*arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F=one", "--durations: 'F=one', expected a number, such as F=1"),
        ("F=-1", "--durations: 'F=-1', expected a number of 0 or more"),
        ("X=1", "--durations: unknown 'X', expected some of F, I, W, overlap, comm, comm_overlap, B, such as F=1,I=1,W=0.8"),
        ("B=2,W=1", "--durations: B is I and W: expected B, or I and W"),
        ("F=0", "--durations: F, I and overlap are expected to take time"),
        ("overlap=0", "--durations: F, I and overlap are expected to take time"),
    ],
)
def test_durations_that_are_none(text: str, message: str) -> None:
    with pytest.raises(DscError) as error:
        parse_durations(text)
    assert str(error.value) == message


def test_durations_as_text() -> None:
    assert parse_durations("F=2,B=3,comm=0.5") == Durations(2, 1.5, 1.5, comm=0.5)
    assert parse_durations("") == Durations()
    assert parse_durations("overlap=2.5").FB == 2.5


def test_what_transfers_cost_dualpipe() -> None:
    """Neighbours wait for each other in every pair, and the two tensors of a pair go to the same one: unless transfers go on inside, it
    costs both; but not for the first and the last pair, around which ranks wait anyway.
    """
    schedule = generate("dualpipe", 16, 120)
    after = simulate(schedule, Durations(comm=Fraction(1, 10))).time
    inside = simulate(schedule, Durations(comm=Fraction(1, 10), comm_overlap=0)).time
    pairs = max(sum(len(step.parts) == 2 for step in row) for row in schedule.rows)
    assert simulate(schedule).time == 374 < inside < 378
    assert 2 * (pairs - 2) * Fraction(1, 10) <= after - inside <= 2 * pairs * Fraction(1, 10)
