"""`dsc schedule`: what it shows and writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_a_schedule_is_shown_with_its_closed_form(command: Callable[..., Any]) -> None:
    out = command("schedule", "dualpipe", "--stages", 8, "--microbatches", 20).out
    assert out.startswith("dualpipe: 8 stages on 8 ranks, 20 micro-batches; checked\n")
    assert "\x1b" not in out
    assert "step      66\nbubble    6 on every rank, 9.1% of the step; (PP/2-1)(F&B+B-3W) = 6\n" in out
    assert "in flight 9 chunks on every rank; closed form 9\n" in out


def test_csv_that_is_written_is_read(command: Callable[..., Any], tmp_path: Path) -> None:
    """A file in torch's text, lowered, gives what the name gives."""
    file, arguments = tmp_path / "mine.csv", ("--durations", "F=1,B=3,comm=0.25", "--json")
    name = ("schedule", "zb1p", "--stages", 4, "--microbatches", 6)
    file.write_text(command(*name, "--csv", "--lower").out)
    assert file.read_text().splitlines()[1].startswith("1RECV_F0,1F0,")
    read, generated = command("schedule", file, *arguments).json, command(*name, *arguments).json
    assert (read["time"], read["bubbles"], read["peak_chunks"]) == (generated["time"], generated["bubbles"], generated["peak_chunks"])
    assert generated["closed_form"]["exact"] is False, "transfers take time"
    assert read["closed_form"] is None


def test_auto_shows_what_it_chose_from(command: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ("schedule", "auto", "--stages", 8, "--microbatches", 16, "--memory", 12, "--parameters", 2)
    svg, trace = tmp_path / "best.svg", tmp_path / "best.json"
    ended = command(*arguments, "--plot", svg, "--trace", trace)
    assert ended.out.splitlines()[0].split() == [
        "schedule",
        "stages",
        "of",
        "a",
        "rank",
        "step",
        "bubble",
        "in",
        "flight",
        "memory",
        "fits",
    ]
    found = command(*arguments, "--json").json
    best = found["candidates"][0]
    assert (found["schedule"], found["time"]) == (best["name"], best["time"])
    assert [c["fits"] for c in found["candidates"]] == sorted((c["fits"] for c in found["candidates"]), reverse=True)
    assert svg.read_text().startswith("<svg ")
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("2f1b", "--stages", 4, "--microbatches", 4),
            "unknown schedule 2f1b, expected auto, a .csv file or one of 1f1b, interleaved, zb1p, dualpipe, dualpipev",
        ),
        (("zb1p", "--stages", 0, "--microbatches", 4), "--stages is 0, expected 1 or more"),
        (("auto", "--stages", 0, "--microbatches", 4), "--stages is 0, expected 1 or more"),
        (("interleaved", "--stages", 4, "--microbatches", 4, "--chunks", 0), "--chunks is 0, expected 1 or more"),
        (("1f1b",), "1f1b needs --stages and --microbatches"),
        (("1f1b", "--stages", 4, "--microbatches", 4, "--durations", "F"), "--durations: 'F', expected a number, such as F=1"),
        (("1f1b", "--stages", 4, "--microbatches", 4, "--plot", "x.png"), "x.png: expected a name that ends in .svg"),
        (("auto", "--stages", 4, "--microbatches", 4, "--memory", 2), "no schedule fits --memory 2: the quickest, "),
        (("no.csv",), "no.csv: No such file or directory"),
    ],
)
def test_bad_arguments(
    refused: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = refused("schedule", *arguments)
    assert line.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_is_one_line_and_the_grid(refused: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B1,1F1,1B0\n")
    assert refused("schedule", "mine.csv") == [
        "mine.csv, rank 1, cell 1: 1B1 stands before its 1F1",
        "          0    1      2    3    4",
        "  rank 0  0F0  0F1    0B0  0B1",
        "  rank 1  1F0  >1B1<  1F1  1B0",
    ]
