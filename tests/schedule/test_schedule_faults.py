"""Faults in schedules: every cell of a few, left out or renumbered, must be noticed; and what is said of the ones that people make."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc.ir.errors import DscError
from dsc.schedule.actions import Action, Kind, Overlap, Schedule, Step, parse
from dsc.schedule.generate import generate
from dsc.schedule.simulate import lower, simulate
from dsc.schedule.validate import check

SCHEDULES = {
    name: lower(simulate(generate(name, stages, microbatches)))
    for name, stages, microbatches in (("1f1b", 4, 6), ("interleaved", 4, 4), ("zb1p", 3, 5), ("dualpipe", 4, 8), ("dualpipev", 4, 6))
}


def with_row(schedule: Schedule, rank: int, row: list[Step]) -> Schedule:
    return replace(schedule, rows=(*schedule.rows[:rank], tuple(row), *schedule.rows[rank + 1 :]))


def fault(schedule: Schedule) -> str:
    with pytest.raises(DscError) as error:
        check(schedule)
    return str(error.value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_cell_that_is_missing_stands_twice_or_has_another_microbatch(name: str) -> None:
    schedule = SCHEDULES[name]
    check(schedule)
    for rank, row in enumerate(schedule.rows):
        for cell, step in enumerate(row):
            fault(with_row(schedule, rank, [*row[:cell], *row[cell + 1 :]]))
            fault(with_row(schedule, rank, [*row[:cell], step, *row[cell:]]))
            other = (step.parts[0].microbatch + 1) % schedule.microbatches
            changed = replace(step.parts[0], microbatch=other)
            fault(
                with_row(
                    schedule,
                    rank,
                    [*row[:cell], replace(step, forward=changed) if isinstance(step, Overlap) else changed, *row[cell + 1 :]],
                )
            )


@pytest.mark.parametrize("name", SCHEDULES)
def test_exchanged_neighbours_keep_their_dependences_or_are_noticed(name: str) -> None:
    """Another order may be as good. What passes is run, one action at a time, every rank as far as it gets: it must come to the end."""
    schedule, passed = SCHEDULES[name], 0
    for rank, row in enumerate(schedule.rows):
        for cell in range(len(row) - 1):
            other = with_row(schedule, rank, [*row[:cell], row[cell + 1], row[cell], *row[cell + 2 :]])
            try:
                check(other)
            except DscError:
                assert not runs(other), f"{row[cell]} and {row[cell + 1]} can be exchanged"
            else:
                passed += 1
                assert runs(other), f"{row[cell]} and {row[cell + 1]} cannot be exchanged"
    print(f"{name}: {passed} exchanges of neighbours are as good")


def runs(schedule: Schedule) -> bool:
    """Whether ranks with blocking sends and receives come to the end, each action finding in its own rank's memory what it reads."""
    at, memory, last = [0] * schedule.ranks, [set[str]() for _ in schedule.rows], schedule.stages - 1

    def computes(rank: int, step: Step) -> bool:
        have = memory[rank]
        for a in step.parts:
            reads = {
                Kind.F: [f"F{a.stage - 1}.{a.microbatch}"] * (a.stage > 0),
                Kind.W: [f"B{a.stage}.{a.microbatch}"],
            }.get(a.kind, [f"F{a.stage}.{a.microbatch}", *[f"B{a.stage + 1}.{a.microbatch}"] * (a.stage < last)])
            if not have.issuperset(reads):
                return False
        have.update(f"{'F' if a.kind is Kind.F else 'B' if a.kind is not Kind.W else 'W'}{a.stage}.{a.microbatch}" for a in step.parts)
        return True

    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(schedule.rows):
            while at[rank] < len(row):
                step = row[at[rank]]
                if isinstance(step, Overlap) or "_" not in step.kind:
                    if not computes(rank, step):
                        return False
                elif step.kind in (Kind.SEND_F, Kind.SEND_B):
                    away = 1 if step.kind is Kind.SEND_F else -1
                    meet = Action(Kind("RECV_" + step.kind[-1]), step.stage + away, step.microbatch, step.reverse)
                    peers = [r for r, other in enumerate(schedule.rows) if at[r] < len(other) and other[at[r]] == meet]
                    value = f"{step.kind[-1]}{step.stage}.{step.microbatch}"
                    if not peers or value not in memory[rank]:
                        break
                    memory[peers[0]].add(value)
                    at[peers[0]] += 1
                else:
                    break
                at[rank] += 1
                progress = True
    return all(at[rank] == len(row) for rank, row in enumerate(schedule.rows))


def test_wrong_order_is_shown() -> None:
    rows = [list(row) for row in generate("1f1b", 3, 3).rows]
    rows[1][0], rows[1][2] = rows[1][2], rows[1][0]
    assert fault(Schedule(tuple(map(tuple, rows)), "mine.csv")) == "\n".join(
        [
            "mine.csv, rank 1, cell 0: 1B0 stands before its 1F0",
            "          0      1    2    3",
            "  rank 0  0F0    0F1  0F2  0B0",
            "  rank 1  >1B0<  1F1  1F0  1F2",
            "  rank 2  2F0    2B0  2F1  2B1",
        ]
    )


def test_a_missing_receive_is_shown() -> None:
    schedule = lower(simulate(generate("1f1b", 2, 2)))
    at = schedule.rows[1].index(Action(Kind.RECV_F, 1, 1))
    text = fault(with_row(schedule, 1, [*schedule.rows[1][:at], *schedule.rows[1][at + 1 :]]))
    assert text.splitlines()[0] == "1f1b, rank 1, cell 4: 1F1 on rank 1 reads what 0F1 on rank 0 makes, but rank 1 has no 1RECV_F1"
    assert ">1F1<" in text


def test_a_swapped_microbatch_is_shown() -> None:
    """In a lowered schedule: rank 1 computes micro-batches 1 and 0 in exchange, the later before it has come."""
    schedule = lower(simulate(generate("1f1b", 3, 3)))
    swapped = {Action(Kind.F, 1, 0): Action(Kind.F, 1, 1), Action(Kind.F, 1, 1): Action(Kind.F, 1, 0)}
    text = fault(with_row(schedule, 1, [swapped.get(step, step) if isinstance(step, Action) else step for step in schedule.rows[1]]))
    assert text.splitlines()[0] == "1f1b, rank 1, cell 2: 1RECV_F1 stands after 1F1, which reads what it receives"
    assert ">1RECV_F1<" in text


def test_more_activations_than_there_is_room_for_are_shown() -> None:
    schedule = generate("1f1b", 4, 8)
    check(schedule, most=4)
    with pytest.raises(DscError) as error:
        check(schedule, most=3)
    assert str(error.value).splitlines()[:3] == [
        "1f1b, rank 0, cell 3: the rank holds the activations of 4 chunks, but has room for 3",
        "          0    1    2    3      4    5    6",
        "  rank 0  0F0  0F1  0F2  >0F3<  0B0  0F4  0B1",
    ]


def test_ranks_that_wait_for_each_other_are_named() -> None:
    """Rank 0 wants the gradient of micro-batch 1 first, rank 1 makes it after that of micro-batch 0, for which it wants a later forward."""
    text = fault(parse("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "ring.csv"))
    assert text.splitlines()[0] == (
        "ring.csv, rank 0, cell 1: no rank can go on: rank 0 at 0B0 for the gradient of 1B0; rank 1 at 1F1 for the output of 0F1"
    )
    blocked = parse(
        "0F0,0SEND_F0,0F1,0RECV_B0,0B0,0SEND_F1,0RECV_B1,0B1\n1RECV_F0,1F0,1B0,1RECV_F1,1SEND_B0,1F1,1B1,1SEND_B1\n", "blocked.csv"
    )
    assert fault(blocked).splitlines()[0] == (
        "blocked.csv, rank 0, cell 3: no send meets its receive: rank 0 at 0RECV_B0 for rank 1; rank 1 at 1RECV_F1 for rank 0"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n0F1,0B1", "x, rank 1, cell 0: 0F1 is on rank 1, but rank 0 has stage 0"),
        ("0F0,0B0,0I0", "x, rank 0, cell 2: 0I0 is part of 0B0, which stands before it"),
        ("0F0,0I0,0B0", "x, rank 0, cell 2: 0B0 is I and W in one, and one of them stands before it"),
        ("0F0,0I0", "x, rank 0, cell 0: micro-batch 0 on stage 0: found 0F0, 0I0, expected F and B, or F, I and W"),
        ("0F0,0W0", "x, rank 0, cell 1: 0W0 stands before its 0I0"),
        ("0F0,0B0,0F2,0B2", "x, rank 0, cell 0: micro-batch 1 on stage 0: found nothing, expected F and B, or F, I and W"),
        ("0F0,0B0@r", "x, rank 0, cell 1: 0B0@r and other actions of micro-batch 0 differ in direction"),
        ("0F0,0SEND_F0,0B0", "x, rank 0, cell 1: 0SEND_F0: no rank reads what would be sent or received here"),
        (
            "0X0",
            "x, row 0, cell 0: found '0X0', expected stage, one of F, I, W, B, SEND_F, RECV_F, SEND_B, RECV_B and micro-batch, such as 2F0",
        ),
        (
            "(0F0;0F1)OVERLAP_F_B",
            "x, row 0, cell 0: found '(0F0;0F1)OVERLAP_F_B', expected an F and a B to overlap, such as (0F7;7B3)OVERLAP_F_B",
        ),
        ("0F0,0B0\n,,\n", "x, row 1: a rank without actions"),
        ("", "x: expected a CSV with a row of actions for each rank, found no action"),
    ],
)
def test_other_faults(text: str, message: str) -> None:
    with pytest.raises(DscError) as error:
        check(parse(text, "x"))
    assert str(error.value).splitlines()[0] == message


WORDS = st.sampled_from(
    ["0F0", "0B0", "1F0", "1B0", "0I0", "0W0", "0SEND_F0", "1RECV_F0", "0F1@r", "(0F1;0B0)OVERLAP_F_B", "", "9" * 5000 + "F0", "\x00", '"']
)


@given(st.one_of(st.text(), st.lists(st.lists(WORDS, max_size=6), max_size=4).map(lambda rows: "\n".join(map(",".join, rows)))))
def test_any_text_is_a_schedule_or_one_fault(text: str) -> None:
    """What is read and passes prints, reads back, and can be lowered; all else is a `DscError` whose first line says where."""
    try:
        schedule = parse(text, "x")
        check(schedule)
    except DscError as error:
        first, *grid = str(error).splitlines()
        assert first.startswith("x")
        assert all(line.startswith("  ") for line in grid)
    else:
        assert parse(str(schedule), "x") == schedule
        check(lower(simulate(schedule)))
