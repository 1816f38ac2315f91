"""`dsc convert` on tensors of DeepSeek-V3's own sizes: speed on one core, and the peak of anonymous memory.

Writes a checkpoint of about 3 GB in BF16 into a temporary folder (one dense layer, one MoE layer with 16 experts, a small vocabulary),
converts it to FP8 and back, and removes everything. Each conversion is a process of its own, bound to one core; this one reads its RssAnon
from /proc every 10 milliseconds. To be reached: 150 MB of BF16 a second, in either direction, and less than 1 GB. The files have just been
written, so they come from the page cache; what is written is synchronised to the disk within the time. Leave the machine idle meanwhile.

    python benchmarks/convert_speed.py
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dsc.models.build import build
from dsc.models.checkpoint import RandomWeights, Wanted, save_checkpoint
from dsc.models.config import load_config

AT_LEAST, AT_MOST = 150e6, 1e9
DISK = 9e9
SIZES = {
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 16, "num_nextn_predict_layers": 0, "vocab_size": 8192,
}  # fmt: skip


class Drawn(Mapping[str, np.ndarray]):
    """Random weights of a model, each drawn when it is looked up."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __getitem__(self, name: str) -> np.ndarray:
        return RandomWeights(0).get(Wanted(name, "bf16", self.shapes[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def generate(folder: Path) -> float:
    """Write the checkpoint; returns the bytes of its files."""
    config = load_config("deepseek-v3", SIZES)
    shapes = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    fields = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    save_checkpoint(folder, Drawn(shapes), fields, shard_bytes=5e8)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory that the process holds now; 0 when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def convert(source: Path, target: Path, to: str) -> tuple[float, float, int]:
    """Seconds that the conversion took, seconds of the processor that its process took, and its peak of anonymous memory."""
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, sys.executable, "-m", "dsc", "convert", str(source), str(target), "--to", to, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    out = process.communicate()[0]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(out)["seconds"], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="dsc-convert-"))
    try:
        if shutil.disk_usage(folder).free < DISK:
            print(f"{folder}: needs {DISK / 1e9:g} GB free")
            return 2
        size = generate(folder / "bf16")
        print(f"checkpoint of {size / 1e9:.2f} GB in BF16, {len(list((folder / 'bf16').glob('*.safetensors')))} shards, one core")
        missed = 0
        for source, target, to in (("bf16", "fp8", "fp8"), ("fp8", "back", "bf16")):
            seconds, processor, peak = convert(folder / source, folder / target, to)
            rate = size / seconds
            speed = f"{seconds:5.1f} s, {rate / 1e6:.0f} MB/s of BF16 ({processor:.1f} s of the processor)"
            print(f"--to {to:4} {speed}, RssAnon at most {peak / 1e6:.0f} MB")
            missed += rate < AT_LEAST or peak > AT_MOST
        print(f"to be reached: {AT_LEAST / 1e6:g} MB/s, {AT_MOST / 1e6:g} MB")
        return int(missed > 0)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
