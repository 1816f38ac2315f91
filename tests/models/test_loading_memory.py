"""Loading a checkpoint of more than 200 MB takes little more memory than its result: the process's own peak, mapped pages included."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsc.models.checkpoint import save_checkpoint

EXPERTS, INNER, HIDDEN = 32, 2048, 1536
STEM = "model.layers.0.mlp.experts"
STACK = (EXPERTS, INNER, HIDDEN)
MATRIX = (EXPERTS * INNER, HIDDEN)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint with a stack of 201 MB in BF16; one of 201 MB in FP8, half of it a stack, half one matrix."""
    folder = tmp_path_factory.mktemp("large")
    bits = np.random.default_rng(0).integers(0, 0x7F, STACK, np.uint8)
    codes, scales = bits.view(ml_dtypes.float8_e4m3fn), np.ones((EXPERTS, INNER // 128, HIDDEN // 128), np.float32)
    save_checkpoint(folder / "bf16", {f"{STEM}.up_proj": bits.astype(ml_dtypes.bfloat16)}, {})
    stack = {f"{STEM}.up_proj": codes, f"{STEM}.up_proj_scale_inv": scales}
    matrix = {"lm_head.weight": codes.reshape(MATRIX), "lm_head.weight_scale_inv": scales.reshape(-1, HIDDEN // 128)}
    save_checkpoint(folder / "fp8", stack | matrix, {})
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("checkpoint", "wanted"), [
    ("bf16", f'Wanted("{STEM}.up_proj", "bf16", {STACK})'),
    ("bf16", f'Wanted("{STEM}.up_proj", "f32", {STACK})'),
    ("fp8", f'Wanted("{STEM}.up_proj", "bf16", {STACK})'),
    ("fp8", f'Wanted("{STEM}.up_proj", "f8e4m3", {STACK})'),
    ("fp8", f'Wanted("lm_head.weight", "bf16", {MATRIX})'),
])  # fmt: skip
def test_peak_memory(checkpoints: Path, checkpoint: str, wanted: str) -> None:
    """Three float32 slices of a million values, 12 MB, are what a conversion may hold; the bound leaves the allocator as much again."""
    code = f"""
from dsc.models.checkpoint import CheckpointFolder, Wanted
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
weights = CheckpointFolder({str(checkpoints / checkpoint)!r})
before = peak()
result = weights.get({wanted})
print(result.nbytes, peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    result, grown = map(int, run.stdout.split())
    assert result >= 100e6
    assert grown < result + 24 * 2**20
