"""dsc compile --mesh, and what dsc inspect --comm says of the result, against sums by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.driver.comm import describe_comm
from dsc.ir.walk import parameters


def test_a_mesh_is_compiled_for_and_run_on_all_its_ranks(tmp_path: Path) -> None:
    whole, sharded = (
        dsc.compile("deepseek-v3-tiny", out=tmp_path / name, seq=8, batch=2, mesh=mesh) for name, mesh in (("a", None), ("b", "ep=2"))
    )
    assert sharded.manifest.stage == "sharded"
    (expected,) = dsc.run(whole, backend="numpy-f64")
    (found,) = dsc.run(sharded, backend="numpy-f64", ranks="local")
    assert np.array_equal(found, expected)


def test_batch_is_a_sequence_for_each_rank_along_dp(tmp_path: Path) -> None:
    made = dsc.compile("deepseek-v3-tiny", out=tmp_path / "out", seq=8, mesh="dp=4,ep=2")
    assert made.module.attributes["batch"] == 4
    assert made.module.main.params[0].tensor.shape == (1, 8)


def test_a_mesh_that_cannot_be_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(dsc.DscError, match="ep=3 does not divide dp x tp"):
        dsc.compile("deepseek-v3-tiny", out=tmp_path / "out", mesh="dp=4,ep=3")
    with pytest.raises(dsc.DscError, match="--mesh belongs to the default pipeline"):
        dsc.compile("deepseek-v3-tiny", out=tmp_path / "out", mesh="ep=2", passes="simplify")


def test_a_program_of_one_rank_sends_nothing() -> None:
    with pytest.raises(dsc.DscError, match="compile it with --mesh"):
        describe_comm(dsc.parse("func @f(%x: f32[2]) {\n  return %x\n}\n"))


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 in FP8 as one of 64 ranks on 8 nodes runs it, tokens going to their experts directly."""
    out = tmp_path_factory.mktemp("v3") / "out"
    dsc.compile("deepseek-v3", out=out, recipe="deepseek-v3", mesh="ep=64", dispatch="direct")
    return out


def test_dispatch_and_combine_bytes_of_deepseek_v3(v3: Path, command: Any) -> None:
    """A token goes to 8 experts, 7168 wide: to them in E4M3 with a scale of 4 bytes for 128, back in BF16; 7 of 8 nodes are others."""
    found = command("inspect", v3, "--comm", "--json").json["comm"]["collectives"]
    rows = [one for one in found if one["kind"] == "all_to_all_rows"]
    there, back = 4096 * 8 * (7168 + 7168 // 128 * 4), 4096 * 8 * 7168 * 2
    assert [one["bytes"] for one in rows] == [there, back] * 58
    assert [one["crossing"] for one in rows] == [there * 7 // 8, back * 7 // 8] * 58
    counts = [one for one in found if one["kind"] == "all_to_all"]
    assert [one["bytes"] for one in counts] == [63 * 4 * 4] * 58  # 4 counts for each of 63 other ranks
    assert len(found) == 3 * 58
    assert "leave the node" in command("inspect", v3, "--comm").out


def test_bytes_over_nodes_of_deepseek_v3(v3: Path, command: Any, tmp_path: Path) -> None:
    """A token reaches 3.954 of 8 nodes and 7.49 of 64 ranks by DeepSeek's rule: so many rows of 7392 bytes go there, of 14336 back.

    With a row go its 8 ids there, and before it comes back its 8 weights: 32 bytes each.
    """
    before = v3 / "ir" / "03-simplify.dsc"
    text = (before if before.is_file() else v3 / "ir" / "02-quantize-fp8.dsc").read_text()
    (tmp_path / "v3.dsc").write_text(text)
    dsc.compile(tmp_path / "v3.dsc", out=tmp_path / "out", passes='shard-experts{mesh="ep=64"}')
    found = command("inspect", tmp_path / "out", "--comm", "--json").json["comm"]["collectives"]
    each = [7392 + 8 * 4, 8 * 4, 14336]
    for axis, copies, leaving in (("ep.node", 3.954, 7 / 8), ("ep.local", 7.49, 0)):
        rows = [one for one in found if one["kind"].startswith("internode") and one["axis"] == axis]
        assert len(rows) == 3 * 58
        by_size = sorted({one["bytes"] for one in rows})
        for number, width in zip(by_size, sorted(each), strict=True):
            assert abs(number / 4096 / width - copies) < 0.01
        assert all(abs(one["crossing"] - one["bytes"] * leaving) <= 1 for one in rows)
    shown = command("inspect", tmp_path / "out", "--comm").out
    assert "ep.node=8" in shown
    assert "ep.local=8" in shown


def test_parameters_of_a_rank_of_deepseek_v3(v3: Path) -> None:
    """671,026,419,200 in all, of which 58 layers have 256 experts of 3 x 7168 x 2048; a rank has 4 of the 256."""
    expert = 58 * 256 * 3 * 7168 * 2048
    held = sum(counted.total for counted in parameters(dsc.load(v3).module).values())
    assert held == 671_026_419_200 - expert + expert * 4 // 256 == 27_334_972_928
