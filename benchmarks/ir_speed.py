"""Parse, verify, print and simplify a program of 10,000 ops: one function, no layer shared, as nobody would write it.

Each figure is the best of five in one process, after one warm-up that also builds the parser's tables. To be reached: parsing at most 2 s,
verifying at most 0.2 s. A pipeline verifies after every pass, so that one has to cost next to nothing.

    python benchmarks/ir_speed.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import dsc
from dsc.ir.verify import verify

OPS = 10_000
LIMITS = {"parse": 2.0, "verify": 0.2}

LAYER = """\
  %n{i}: bf16[512, 896] = rms_norm(%x{i}, %g, eps=1e-06)  @ model.layers.{i}.input_layernorm#1 F
  %u{i}: bf16[2048, 896] = param("model.layers.{i}.mlp.up_proj.weight")  @ model.layers.{i}.mlp.up_proj#1 F
  %q{i}: f8e4m3[512, 896], %s{i}: f32[512, 7] = quantize(%n{i})  @ model.layers.{i}.mlp.up_proj#2 F
  %w{i}: f8e4m3[2048, 896], %t{i}: f32[16, 7] = quantize(%u{i}, tile=[128, 128])  @ model.layers.{i}.mlp.up_proj#3 F
  %h{i}: bf16[512, 2048] = scaled_matmul(%q{i}, %s{i}, %w{i}, %t{i})  @ model.layers.{i}.mlp.up_proj#4 F
  %a{i}: bf16[512, 2048] = silu(%h{i})  @ model.layers.{i}.mlp#1 F
  %b{i}: bf16[512, 16, 128] = reshape(%a{i}, shape=[512, 16, 128])  @ model.layers.{i}.mlp#2 F
  %c{i}: bf16[512, 16] = sum(%b{i}, axes=[2])  @ model.layers.{i}.mlp#3 F
  %d{i}: bf16[16, 896] = param("model.layers.{i}.mlp.down_proj.weight")  @ model.layers.{i}.mlp.down_proj#1 F
  %x{next}: bf16[512, 896] = matmul(%c{i}, %d{i})  @ model.layers.{i}.mlp.down_proj#2 F"""


def program() -> str:
    """Ten ops a layer, as the printer writes them."""
    layers = OPS // 10
    body = [LAYER.format(i=i, next=i + 1) for i in range(layers)]
    return "\n".join(["func @main(%x0: bf16[512, 896], %g: bf16[896]) {", *body, f"  return %x{layers}", "}", ""])


def best(run: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest run."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> int:
    """Print the figures; 1 where a limit is missed."""
    text = program()
    module = dsc.parse(text)
    assert str(module).endswith(text)
    figures = {
        "parse": best(lambda: dsc.parse(text)),
        "verify": best(lambda: verify(module)),
        "print": best(lambda: str(module)),
        "simplify": best(lambda: dsc.apply(module, "simplify")),
    }
    print(f"{len(module.main.ops):,} ops, {len(text) / 1e6:.1f} MB of text")
    for name, seconds in figures.items():
        limit = f"limit {LIMITS[name]:.1f} s, {seconds / LIMITS[name]:.0%} of it" if name in LIMITS else ""
        print(f"{name:<9}{seconds:7.3f} s  {OPS / seconds:>12,.0f} ops/s  {limit}".rstrip())
    return int(any(figures[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
