"""Orders of schedules against those that torch.distributed.pipelining makes; its lowering and its dry run as judges of ours.

Its "1F1B" of 2.11 to 2.13 numbers the forwards of the last rank from 1 (it advances
an index before use), so that rank is left out.
"""

from __future__ import annotations

import pytest
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _simulate_comms_compute

from dsc.schedule.actions import Schedule, parse
from dsc.schedule.generate import generate
from dsc.schedule.simulate import lower, simulate
from dsc.schedule.validate import check

NAMES = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zb1p": "InterleavedZeroBubble", "dualpipev": "DualPipeV"}
CASES = [
    ("1f1b", 4, 4, 1),
    ("1f1b", 8, 20, 1),
    ("interleaved", 4, 8, 2),
    ("interleaved", 4, 10, 2),
    ("interleaved", 4, 3, 3),
    ("interleaved", 8, 16, 4),
    ("zb1p", 4, 8, 2),
    ("zb1p", 4, 10, 3),
    ("zb1p", 8, 16, 2),
    ("dualpipev", 2, 4, 2),
    ("dualpipev", 4, 10, 2),
    ("dualpipev", 3, 9, 2),
    ("dualpipev", 8, 40, 2),
]


@pytest.mark.parametrize(("name", "ranks", "microbatches", "chunks"), CASES)
def test_the_order_is_torchs(name: str, ranks: int, microbatches: int, chunks: int) -> None:
    theirs = get_schedule_ops(NAMES[name], ranks, microbatches, chunks)
    ours = generate(name, ranks * chunks, microbatches, chunks)
    last = -1 if name == "1f1b" else None
    expected = [[str(a) for a in row if a is not None and "REDUCE_GRAD" not in str(a)] for row in theirs]
    assert [list(map(str, row)) for row in ours.rows][:last] == expected[:last]
    assert len(ours.rows) == ranks


def torch_rows(schedule: Schedule) -> dict[int, list[_Action]]:
    return {rank: [_Action.from_str(str(step)) for step in row] for rank, row in enumerate(schedule.rows)}


@pytest.mark.parametrize(("name", "ranks", "microbatches", "chunks"), CASES)
def test_what_torch_lowers_passes_our_check(name: str, ranks: int, microbatches: int, chunks: int) -> None:
    ours = generate(name, ranks * chunks, microbatches, chunks)
    theirs = _add_send_recv(torch_rows(ours), lambda stage: ours.home[stage, False], ours.stages)
    lowered = parse("\n".join(",".join(map(str, theirs[rank])) for rank in range(ranks)))
    check(lowered)
    assert lowered.compute().rows == ours.rows
    mine = lower(simulate(ours))
    assert [sorted(map(str, row)) for row in mine.rows] == [sorted(map(str, row)) for row in lowered.rows], "the same sends and receives"


@pytest.mark.parametrize(("name", "ranks", "microbatches", "chunks"), [case for case in CASES if case[0] != "dualpipev"])
def test_what_we_lower_passes_torchs_dry_run(name: str, ranks: int, microbatches: int, chunks: int) -> None:
    """It knows no overlapped pairs. A deadlock would raise."""
    ours = lower(simulate(generate(name, ranks * chunks, microbatches, chunks)))
    _simulate_comms_compute(torch_rows(ours), lambda stage: ours.home[stage, False], ours.stages)
