"""A rank reads its parts of a checkpoint and no more, as the kernel counts it: the pages of the files' memory maps that it has touched.

The files lie in a tmpfs, of which Linux maps pages of 4 kB, and 64 kB around one that is touched; of other file systems it may map 2 MB at
once. So a run of bytes may count as up to 64 kB more at either end, where what lies there is not read anyway.
"""

from __future__ import annotations

import gc
import math
import mmap
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsc.driver.ranks import RankWeights
from dsc.driver.train_program import Programs, programs
from dsc.driver.train_ranks import Alone
from dsc.driver.train_state import first_state, load, save
from dsc.ir.sharding import part
from dsc.ir.types import bound
from dsc.models.checkpoint import CheckpointFolder
from dsc.models.safetensors_file import SafetensorsFile

SMAPS, TMPFS = Path("/proc/self/smaps"), Path("/dev/shm")
there = SMAPS.exists() and TMPFS.is_dir() and shutil.disk_usage(TMPFS).free > 300e6
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not there, reason="there is no tmpfs, or no count of the pages that are mapped")]
AROUND = 64 << 10
SIZES = ("num_hidden_layers=2", "hidden_size=256", "n_routed_experts=32", "moe_intermediate_size=384", "intermediate_size=512")


@pytest.fixture(scope="module")
def made() -> dict[str | None, Programs]:
    return {mesh: programs("deepseek-v3-tiny", batch=4, seq=4, overrides=SIZES, mesh=mesh) for mesh in (None, "dp=4,ep=4", "dp=4,ep=2")}


@pytest.fixture(scope="module")
def checkpoint(made: dict[str | None, Programs]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=TMPFS) as folder:
        (Path(folder) / "checkpoints").mkdir()
        yield save(Path(folder), first_state(made[None], 0), None, made[None], {}, {}, Alone())


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], int]]:
    """`touched(file)`: bytes of `file` that this process has mapped since it last asked. Maps are kept until then."""
    real, kept = SafetensorsFile.map, list[Any]()

    def map(self: SafetensorsFile) -> Any:
        kept.append(real(self))
        kept[-1].madvise(mmap.MADV_NOHUGEPAGE)
        return kept[-1]

    def measure(file: Path) -> int:
        blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text(), flags=re.MULTILINE)
        found = sum(int(re.search(r"^Rss: +(\d+) kB", b, re.MULTILINE)[1]) for b in blocks if b.split("\n")[0].endswith(str(file)))  # type: ignore[index]
        kept.clear()
        gc.collect()  # a file and its tensors name each other
        return found << 10

    monkeypatch.setattr(SafetensorsFile, "map", map)
    yield measure
    kept.clear()


def expected(programs: Programs, splits: Any, rank: int, names: Any, width: int) -> tuple[int, int]:
    """Bytes of the parts of these weights at `width` bytes an element, and how many more may be mapped around them."""
    own, more = 0, 0
    for name in names:
        shape = tuple(map(bound, programs.weights[name].shape))
        part_of_it = width * math.prod(s.stop - s.start for s in part(splits[name], shape, programs.mesh, rank))
        own += part_of_it
        more += min(2 * AROUND, width * math.prod(shape) - part_of_it)
    return own, more


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("mesh", ["dp=4,ep=4", "dp=4,ep=2"])
def test_a_rank_reads_its_parts(
    mesh: str, rank: int, made: dict[str | None, Programs], checkpoint: Path, touched: Callable[[Path], int]
) -> None:
    """To run, to begin training with masters in float32 from weights in BF16, and to go on: a quarter or half of the experts."""
    programs, model, optimizer = made[mesh], checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors"
    own, more = expected(programs, programs.weight_splits, rank, programs.weights, 2)
    given = RankWeights(CheckpointFolder(checkpoint), programs.step, keep="none")
    for name in programs.weights:
        np.array(given.get(rank, name))
    del given.source
    found = touched(model)
    assert own <= found <= own + more
    first_state(programs, 0, checkpoint, (rank,))
    assert touched(model) == found, "masters are made of what the rank reads anyway"
    load(checkpoint, programs, {}, (rank,))
    state = [expected(programs, programs.state_splits, rank, programs.trained, width) for width in (4, 2, 2)]
    own, more = (sum(numbers) for numbers in zip(*state, strict=True))
    assert own <= touched(optimizer) <= own + more < 0.45 * optimizer.stat().st_size


def test_one_rank_reads_everything(made: dict[str | None, Programs], checkpoint: Path, touched: Callable[[Path], int]) -> None:
    """What the counting would say if a rank read the whole."""
    load(checkpoint, made[None], {})
    assert touched(checkpoint / "optimizer.safetensors") >= 0.95 * (checkpoint / "optimizer.safetensors").stat().st_size
