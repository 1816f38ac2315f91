"""Tiles from a file override those chosen by shape, and the tuner writes the fastest; a clock that is made up stands for the GPU's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dsc import backends
from dsc.backends.arrays import widen
from dsc.backends.triton import tuned
from dsc.backends.triton.program import layout_of, plan_function
from dsc.backends.triton.run import Executor
from dsc.backends.triton.targets import TARGETS, Target
from dsc.backends.triton.tiles import Gemm, scaled_gemm
from dsc.backends.triton.tune import candidates, operands, products, tune
from dsc.driver.kernels import tune_tiles
from dsc.ir.core import Builder, Module, Op
from dsc.ir.errors import DscError
from dsc.ir.ops.fused import alone
from dsc.ir.ops.linalg import GroupedMatmul
from dsc.ir.ops.norm import RmsNorm
from dsc.ir.ops.quant import ScaledMatmul
from dsc.ir.types import DType, Tensor
from dsc.testing.bounds import bound

HOPPER = TARGETS["sm_90"]
SMALL = Gemm(64, 64, 128, 4, 2)


def program(rows: int = 4096) -> Module:
    """One product in FP8, twice, one of experts in BF16, and an op without tiles."""
    b = Builder("main")
    x = b.param("x", Tensor(DType.bf16, (rows, 256)))
    w, norm = b.param("w", Tensor(DType.bf16, (4, 256, 512))), b.param("n", Tensor(DType.bf16, (256,)))
    counts = b.param("counts", Tensor(DType.i32, (4,)))
    a, sa = b.param("a", Tensor(DType.f8e4m3, (rows, 256))), b.param("sa", Tensor(DType.f32, (rows, 2)))
    c, sc = b.param("c", Tensor(DType.f8e4m3, (512, 256))), b.param("sc", Tensor(DType.f32, (4, 2)))
    ops: list[Op] = [ScaledMatmul(a, sa, c, sc), ScaledMatmul(a, sa, c, sc), GroupedMatmul(x, w, counts), RmsNorm(x, norm, 1e-6)]
    return Module((b.finish([b.emit(op).result for op in ops]),))


def launch_of(op: Op, target: Target) -> Any:
    single = alone(op)
    return plan_function(single, single.main, [layout_of(v.type) for v in single.main.params], target, {}).steps[0].launches[-1]


def test_every_product_is_found_once() -> None:
    found = products(program(), HOPPER)
    assert [key.split()[0] for key in found] == ["scaled_gemm", "gemm"]
    assert {op.name for op, _ in found.values()} == {"scaled_matmul", "grouped_matmul"}
    for key, (op, tile) in found.items():
        assert next(candidates(key, tile)) == tile
        assert len(set(candidates(key, tile))) == len(list(candidates(key, tile))) > 5
        assert all(c.m >= 64 for c in candidates(key, tile))
        assert launch_of(op, HOPPER).constants["BLOCK_M"] == tile.m


def test_the_fastest_is_written_and_used(tmp_path: Path) -> None:
    """The clock favours one tile that does not come first; what fails to run is infinitely slow and never chosen."""
    asked: list[tuple[str, Gemm]] = []

    def clock(op: Op, tiles: Mapping[str, Gemm]) -> float:
        ((_, tile),) = tiles.items()
        asked.append((op.name, tile))
        launch = launch_of(op, replace(HOPPER, tuned=tiles))
        assert (launch.constants["BLOCK_M"], launch.num_warps, launch.num_stages) == (tile.m, tile.num_warps, tile.num_stages)
        return 1.0 if (tile.m, tile.n) == (64, 64) else float("inf") if tile.m == 256 else 2.0

    done: list[str] = []
    found = tune(program(), HOPPER, clock, done.append)
    assert done == [m.key for m in found]
    assert len(asked) == sum(len(m.seconds) for m in found)
    assert all((m.best.m, m.best.n) == (64, 64) for m in found)
    file = tmp_path / "tiles.toml"
    tuned.write_tiles(file, "NVIDIA H200", {m.key: m.best for m in found})
    tiles = tuned.read_tiles(file)["NVIDIA H200"]
    assert tiles == {m.key: m.best for m in found}
    for op, by_shape in products(program(), HOPPER).values():
        assert launch_of(op, replace(HOPPER, tuned=tiles)).constants["BLOCK_N"] == 64 != by_shape.n
        assert launch_of(op, replace(HOPPER, tuned={})).constants["BLOCK_N"] == by_shape.n


def test_rows_count_up_to_a_power_of_two() -> None:
    arguments: Any = {"k_step": 128, "scale_rows": 128}
    key = "scaled_gemm m=4096 n=512 k=256 k_step=128 scale_rows=128 groups=1 specialize=True"
    assert key in products(program(), HOPPER)
    target = replace(HOPPER, tuned={key: SMALL})
    found = {m: scaled_gemm(m, 512, 256, target=target, specialize=True, **arguments) == SMALL for m in (2048, 2049, 4096, 4097)}
    assert found == {2048: False, 2049: True, 4096: True, 4097: False}


def test_tiles_of_devices_lie_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "tiles.toml"
    tuned.write_tiles(file, "NVIDIA H200", {"a": SMALL, "b": SMALL})
    tuned.write_tiles(file, "AMD Instinct MI300X", {"a": Gemm(128, 128, 64, 8, 2)})
    tuned.write_tiles(file, "NVIDIA H200", {"b": Gemm(128, 128, 128, 4, 4, 8, True)})
    assert tuned.read_tiles(file) == {
        "NVIDIA H200": {"a": SMALL, "b": Gemm(128, 128, 128, 4, 4, 8, True)},
        "AMD Instinct MI300X": {"a": Gemm(128, 128, 64, 8, 2)},
    }
    for text, reason in (("x = ", "Invalid value"), ('["d"]\n"k" = { m = 1 }', "missing"), ("k = 3", "no attribute")):
        file.write_text(text)
        with pytest.raises(DscError, match=rf"tiles\.toml is not a file of tiles: .*{reason}"):
            tuned.read_tiles(file)


def test_a_tile_changes_no_result() -> None:
    """An executor with a table runs what the table says, and what it computes stays within rounding."""
    single = alone(next(op for op in program(130).main.ops if op.name == "scaled_matmul"))
    inputs = operands(single.main.ops[0])
    inputs[0] = (inputs[0].view(np.uint8) % 64).view(inputs[0].dtype)
    (key,) = products(single, HOPPER)
    op = single.main.ops[0]
    (expected,) = backends.get("numpy").evaluate(op, inputs)
    (permitted,) = bound(op, tuple(inputs), (expected,))
    for executor in (Executor(), Executor(tuned={key: SMALL})):
        (found,) = executor.run(single, lambda *_: None, inputs)
        assert (np.abs(widen(found, np.float64) - widen(expected, np.float64)) <= permitted).all()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DscError, match=r"^dsc tune measures on a GPU, and there is none here; tiles are chosen by shape and device$"):
        tune_tiles(program(), tmp_path / "tiles.toml")
    assert not list(tmp_path.iterdir())
