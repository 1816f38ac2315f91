"""Tiles of FP8 where the share of a rank cuts them: stored scales stay those of their elements, and a note says what begins anew."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dsc
from dsc.backends.numpy_ref.run import FLOAT64
from dsc.distributed import local
from dsc.driver.ranks import assembled, cut
from dsc.ir.core import Module
from dsc.ir.mesh import mesh_of
from dsc.ir.sharding import input_splits, part, weight_splits
from dsc.passes.manager import parse_pipeline, run_pipeline

STORED = """
module {{ stage=quantized }}

func @main(%x: bf16[2, {k}], %q: bf16[1, {tp}, 1, 8]) {{
  %xq: f8e4m3[2, {k}], %xs: f32[2, {columns}] = quantize(%x, tile=[1, 128])  @ main#1 F
  %w: f8e4m3[{n}, {k}] = param("{name}.weight")  @ {name}#1 F
  %s: f32[{rows}, {columns}] = param("{name}.weight_scale_inv")  @ {name}#2 F
  %y: f32[2, {n}] = scaled_matmul(%xq, %xs, %w, %s, out=f32)  @ {name}#3 F
  %wide: f32[{n}, {k}] = dequantize(%w, %s, tile=[128, 128], dtype=f32)  @ {name}#4 F
  %a: bf16[1, {tp}, 1, 8] = attention(%q, %q, %q, scale=1.0)  @ attention#1 F
  return %y, %wide, %a
}}
"""
"""Attention is there because a mesh with tp wants some."""


@pytest.mark.parametrize("name", ["q_b_proj", "o_proj"])
@pytest.mark.parametrize(("tp", "extent"), [(2, 256), (2, 192), (3, 288), (4, 480), (5, 640), (8, 72), (2, 1000)])
def test_a_stored_weight_keeps_its_scales(name: str, tp: int, extent: int) -> None:
    """Whole numbers of which no sum needs rounding, and the same largest one in every tile of x: however the sum is split, it is exact."""
    n, k = (64, extent) if name == "o_proj" else (extent, 64)
    rows, columns = -(-n // 128), -(-k // 128)
    module = dsc.parse(STORED.format(n=n, k=k, rows=rows, columns=columns, tp=tp, name=name))
    rng = np.random.default_rng(extent)
    x = rng.integers(-3, 4, (2, k)).astype(ml_dtypes.bfloat16)
    x[:, ::8] = 448
    codes = rng.integers(-7, 8, (n, k)).astype(ml_dtypes.float8_e4m3fn)
    scales = (2.0 ** (np.arange(rows * columns) % 3)).astype(np.float32).reshape(rows, columns)
    weights, inputs = {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, (x, np.ones((1, tp, 1, 8), ml_dtypes.bfloat16))
    expected = FLOAT64.run(module, lambda name, _: weights[name], inputs)
    wide = codes.astype(np.float64) * np.repeat(np.repeat(scales, 128, 0), 128, 1)[:n, :k]
    assert np.array_equal(expected[0], x.astype(np.float64) @ wide.T), "the numbers are not as simple as they should be"
    sharded = dsc.parse(str(dsc.apply(module, f'shard-experts{{mesh="tp={tp},node={tp}"}}')))
    found = on_ranks(sharded, weights, inputs)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def on_ranks(module: Module, weights: dict[str, Any], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    mesh, splits = mesh_of(module), weight_splits(module)

    def one(rank: int) -> Any:
        own = tuple(cut(x, split, mesh, rank) for x, split in zip(inputs, input_splits(module), strict=True))
        return FLOAT64.program(module, lambda name, _: weights[name][part(splits[name], weights[name].shape, mesh, rank)], own)

    return assembled(module, local.run(mesh, one))


@pytest.mark.parametrize(
    ("mode", "mesh", "seq", "said"),
    [
        ("forward", "tp=2", 16, ["tp 96 rows of self_attn.q_b_proj, 144 rows of self_attn.kv_b_proj, 80 columns of self_attn.o_proj"]),
        ("forward", "dp=2,ep=2", 16, []),
        ("train", "ep=2", 128, []),
        ("train", "dp=2", 128, ["edp the rows of an expert of mlp.experts"]),
        ("train", "ep=2", 16, ["dp 16 rows of mlp.down_proj, mlp.up_proj, mlp.gate_proj and 8 more"]),
    ],
)
def test_a_note_says_which_tiles_begin_anew(mode: str, mesh: str, seq: int, said: list[str], program: Any) -> None:
    module = program(mode, seq=seq, passes="quantize-fp8")
    records = run_pipeline(module, parse_pipeline(f'shard-experts{{mesh="{mesh}"}}')).records
    found = [str(line) for line in records[-1].declined if line.op == "tiles"]
    assert found == [f"@main tiles: of FP8 begin anew on each rank along {line}: their scales are not those of one rank" for line in said]
