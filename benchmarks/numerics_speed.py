"""Rates of the numerics on one core: quantise, dequantise, and the bit-exact tensor core.

    OMP_NUM_THREADS=1 python benchmarks/numerics_speed.py

Prints a table with the targets and exits with status 1 where one is missed. Each figure is the best of several runs, data in memory, in
processor time: everything runs in one thread, so on an idle machine that is the wall time, and on a busy one it is not the neighbours'.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy loads its BLAS

import sys
import time
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from dsc.hardware.device import accumulation
from dsc.numerics.formats import F32, FORMATS, round_to, widen
from dsc.numerics.logfmt import decode_logfmt, encode_logfmt
from dsc.numerics.scale import dequantize, quantize
from dsc.numerics.tensorcore import scaled_matmul

RUNS = 5
QUANTISE, DEQUANTISE, TENSOR_CORE = 120, 300, 150  # million values, values and multiply-adds a second


def rate(call: Callable[[], object], count: int) -> float:
    """Million of `count` things a second, the best of several runs."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return count / best / 1e6


def measure() -> Iterator[tuple[str, float, int | None]]:
    """(what, million a second, target or None), row by row."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1024, 7168)).astype(np.float32)
    tiles = {"1x128": (1, 128), "128x1": (128, 1), "128x128": (128, 128)}
    for source in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        values = x.astype(source)
        for name, tile in tiles.items():
            target = QUANTISE if name == "1x128" else None
            yield f"quantise {source.name} to f8e4m3, {name}", rate(lambda v=values, t=tile: quantize(v, t), x.size), target
    for name, tile in tiles.items():
        codes, scales = quantize(x, tile)
        for result in (np.float32, ml_dtypes.bfloat16):
            target = DEQUANTISE if name == "1x128" and result is np.float32 else None
            what = f"dequantise f8e4m3 to {np.dtype(result).name}, {name}"
            yield what, rate(lambda c=codes, s=scales, t=tile, r=result: dequantize(c, s, t, dtype=r), x.size), target
    for fmt in (fmt for fmt in FORMATS.values() if fmt is not F32):
        yield f"round float32 to {fmt}", rate(lambda f=fmt: round_to(x, f), x.size), None
        codes = round_to(x, fmt)
        yield f"widen {fmt}", rate(lambda c=codes: widen(c), x.size), None
    for bits in (8, 10):
        encoded = encode_logfmt(x, bits)
        yield f"LogFMT-{bits} encode", rate(lambda b=bits: encode_logfmt(x, b), x.size), None
        yield f"LogFMT-{bits} decode", rate(lambda e=encoded, b=bits: decode_logfmt(*e, b), x.size), None
    m, n, k = 128, 512, 2048
    operands = *quantize(x[:m, :k], (1, 128)), *quantize(x[:n, :k], (128, 128))
    for name in ("float32", "ideal/exact", "h800/wgmma", "h800/mma-sync", "rtx4090/mma-sync", "b200/tcgen05"):
        model = accumulation(name)
        target = TENSOR_CORE if name == "h800/wgmma" else None
        yield f"multiply-adds, {name}", rate(lambda a=model: scaled_matmul(*operands, model=a), m * n * k), target


def main() -> int:
    missed = 0
    print(f"{'':44} {'million/s':>10} {'target':>8}")
    for what, achieved, target in measure():
        verdict = "" if target is None else f"{target:8d}  {'ok' if achieved >= target else 'MISSED'}"
        missed += target is not None and achieved < target
        print(f"{what:44} {achieved:10.0f} {verdict}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
