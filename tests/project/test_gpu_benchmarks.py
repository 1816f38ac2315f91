"""The GPU benchmarks run: here with tiny shapes in the interpreter, every kernel and every peer that needs no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dsc.backends.triton.kernels import KERNELS

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "all.py"


def run(*arguments: object) -> str:
    done = subprocess.run([sys.executable, FILE, *map(str, arguments)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_kernel_is_measured_and_every_peer_agrees(tmp_path: Path) -> None:
    """A kernel without a benchmark fails here. Peers that are present compute what the kernel does, but for rounding to BF16."""
    run("--dry", "--out", tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {cls.name for cls in KERNELS} <= {row["kernel"].split()[0] for row in found["rows"] if row["who"] == "dsc"}
    assert all(row["seconds"] for row in found["rows"] if row["who"].startswith("dsc"))
    compared = [row for row in found["rows"] if row["difference"] is not None]
    assert len(compared) > 20
    assert max(row["difference"] for row in compared) < 2**-7, max(compared, key=lambda row: row["difference"])
    absent = {row["who"]: row["note"] for row in found["rows"] if row["seconds"] is None}
    assert absent.keys() <= {"torch scaled_mm", "DeepGEMM"}, absent
    assert all(note.startswith("absent: ") for note in absent.values())
    assert {"torch", "triton", "cuda", "python"} <= found["versions"].keys()
    assert found["dry"]


def test_without_a_gpu_nothing_is_measured() -> None:
    assert run() == "no GPU here: nothing is measured; --dry runs all of it on the CPU with tiny shapes\n"
