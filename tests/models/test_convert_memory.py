"""Converting tensors of 134 MB takes a few slices of memory: the process's own peak, pages of mapped files included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsc.models.checkpoint import save_checkpoint
from dsc.models.convert import Conversion

SHAPE = (16384, 4096)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Linear weight, which is converted, and an embedding, which is copied, as BF16 and as FP8."""
    folder = tmp_path_factory.mktemp("large")
    bits = np.random.default_rng(0).integers(0, 0x7F, SHAPE, np.uint8)
    weights = {name: bits.astype(ml_dtypes.bfloat16) for name in ("model.layers.0.self_attn.o_proj.weight", "model.embed_tokens.weight")}
    save_checkpoint(folder / "bf16", weights, {"model_type": "deepseek_v3"})
    Conversion(folder / "bf16", folder / "fp8", "fp8").run()
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("source", "to"), [("bf16", "fp8"), ("fp8", "bf16")])
def test_peak_memory(checkpoints: Path, tmp_path: Path, source: str, to: str) -> None:
    """A slice has about a million values, 4 MB in float32: three of them, 8 MB of what is copied, and as much again for the allocator."""
    code = f"""
from dsc.models.convert import Conversion
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
conversion = Conversion({str(checkpoints / source)!r}, {str(tmp_path / "target")!r}, {to!r})
before = peak()
done = conversion.run()
print(done.bytes_read, peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    read, grown = map(int, run.stdout.split())
    assert read >= 200e6
    assert grown < 40 * 2**20
