"""Exporting to ONNX, in CPU time. To be reached: 671B compact without weights in 5 s and 5 MB; by reference into a made folder of
headers and sparse shards in 30 s and 30 MB; V2-Lite as standard ops throughout, every call entered, in 20 s.

    python benchmarks/onnx_export.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import dsc
from dsc.driver.export import Exported, export
from dsc.ir.core import Module
from dsc.ir.walk import weights
from dsc.models.expert_names import parts
from dsc.models.safetensors_file import Entry, lay_out

SHARD = 4.3e9
"""Bytes of a shard, as the released model has them."""


def sparse_checkpoint(folder: Path, module: Module, config: dict) -> int:
    """The files of a checkpoint for `module`, with headers and holes in place of numbers; how many tensors there are."""
    shards: list[list[Entry]] = [[]]
    room = SHARD
    for name, tensor in weights(module).items():
        shape = tuple(d for d in tensor.shape if isinstance(d, int))
        for part in parts(name, shape):
            size = tensor.bytes // (shape[0] if part.name != name else 1)
            if size > room:
                shards.append([])
                room = SHARD
            shards[-1].append(Entry(part.name, tensor.dtype.name, part.shape, size))
            room -= size
    places = {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors"
        head, _ = lay_out(entries)
        with open(folder / file, "wb") as stream:
            stream.write(head)
            stream.truncate(len(head) + sum(e.nbytes for e in entries))
        places |= {e.name: file for e in entries}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return len(places)


def timed(name: str, run: Callable[[], Exported], seconds: float, megabytes: float) -> bool:
    """Print the figure; whether both limits hold."""
    start = time.process_time()
    made = run()
    took, size = time.process_time() - start, made.bytes / 1e6
    print(f"{name:<44} {took:6.2f} s CPU  {size:7.2f} MB  {made.nodes:6,} nodes  {made.initializers:7,} tensors  "
          f"(at most {seconds:g} s{f', {megabytes:g} MB' if megabytes < float('inf') else ''})")  # fmt: skip
    return took <= seconds and size <= megabytes


def main() -> int:
    """Print the figures; 1 where a limit is missed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        v3 = dsc.compile("deepseek-v3", out=folder / "v3", recipe="deepseek-v3")
        lite = dsc.compile("deepseek-v2-lite", out=folder / "lite")
        print(f"{os.cpu_count()} CPUs; the compilations are not counted")
        fine = timed("671B compact, no weights", lambda: export(v3, folder / "a.onnx", profile="compact"), 5, 5)
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir()
        assert v3.manifest.config
        count = sparse_checkpoint(checkpoint, v3.module, v3.manifest.config)
        fine &= timed(
            f"671B compact, {count:,} tensors by reference",
            lambda: export(v3, checkpoint / "b.onnx", profile="compact", weights="reference", checkpoint=str(checkpoint)),
            30,
            30,
        )
        fine &= timed("V2-Lite, all standard ops, entered", lambda: export(lite, folder / "c.onnx", profile="ort"), 20, float("inf"))
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
