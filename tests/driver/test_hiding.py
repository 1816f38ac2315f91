"""`dsc inspect --overlap`: what is hidden, function by function, against sums of what its ops take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsc
from dsc.hardware.cluster import cluster
from dsc.hardware.cost import Costs
from dsc.passes.overlap import Overlap

PROGRAM = """module { stage=sharded, mesh={pp=1, dp=2, ep=2, tp=1, node=8} }

func @main(%x: bf16[4096, 7168], %w: bf16[7168, 7168]) {
  %y: bf16[4096, 7168] = all_to_all(%x, axis="ep", size=2)  @ moe#1 F
  %s: bf16[4096, 7168] = matmul(%x, %w)  @ moe#2 F
  %z: bf16[4096, 7168] = add(%y, %s)  @ moe#3 F
  return %z
}
"""


def test_what_is_hidden_is_what_the_product_covers(command: Callable[..., Any], tmp_path: Path) -> None:
    """Plain nothing is; in order the exchange runs beside the product, each slower than alone."""
    where, module = "h800", dsc.parse(PROGRAM)
    made = dsc.apply(module, [Overlap(cluster=where)])
    results = []
    for name, program, beside in (("plain", module, False), ("made", made, True)):
        (tmp_path / f"{name}.dsc").write_text(str(program))
        found = command("inspect", tmp_path / f"{name}.dsc", "--overlap", "--cluster", where, "--json").json["overlap"]
        sent, product, sums = map(Costs.of(module, cluster(where), overlap=beside).seconds, module.main.ops)
        (row,) = found["functions"]
        assert row["communicating"] == pytest.approx(sent)
        assert row["computing"] == pytest.approx(product + sums)
        assert row["exposed"] == pytest.approx(max(0.0, sent - product) if beside else sent)
        assert row["total"] == pytest.approx((max(sent, product) if beside else sent + product) + sums)
        assert row["hidden"] == pytest.approx(1 - row["exposed"] / sent)
        results.append(row["total"])
    assert results[1] < results[0]
    text = command("inspect", tmp_path / "made.dsc", "--overlap", "--cluster", where).out
    assert text.splitlines()[0] == f"on {where}, one run of each function"


def test_a_program_of_one_rank_sends_nothing(refused: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "one.dsc").write_text("func @main(%x: f32[2]) {\n  %y: f32[2] = neg(%x)  @ f#1 F\n  return %y\n}\n")
    assert "--overlap: nothing is sent" in refused("inspect", tmp_path / "one.dsc", "--overlap")[0]
    assert "--cluster says where communication is hidden" in refused("inspect", tmp_path / "one.dsc", "--cluster", "h800")[0]
