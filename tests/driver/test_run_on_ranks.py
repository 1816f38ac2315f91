"""`dsc.run` of a sharded program: parts of inputs and weights out to the ranks, whole results back."""

from __future__ import annotations

import numpy as np
import pytest

import dsc
from dsc import DscError

SHARDED = """
module { stage=sharded, mesh={dp=2, ep=2, tp=2}, inputs=[["dp", "tp"]], results=[["dp"], ["", "tp"], []] }

func @main(%x: f32[2, 3]) {
  %w: f32[3, 4] = param("w", shard=["tp"])  @ main#1 F
  %e: f32[1, 3, 3] = param("mlp.experts.up_proj", shard=["ep"])  @ main#2 F
  %part: f32[2, 4] = matmul(%x, %w)  @ main#3 F
  %y: f32[2, 4] = all_reduce(%part, axis="tp", size=2)  @ main#4 F
  %all: f32[4, 3] = all_gather(%x, axis="dp", size=2)  @ main#5 F
  %every: f32[2, 3, 3] = all_gather(%e, axis="ep", size=2)  @ main#6 F
  return %y, %all, %every
}
"""
X = np.arange(24, dtype=np.float32).reshape(4, 6)
W = np.arange(24, dtype=np.float32).reshape(6, 4) / 8
E = np.arange(18, dtype=np.float32).reshape(2, 3, 3)
WEIGHTS = {"w": W, "mlp.experts.up_proj": E}


def message(text: str, **options: str) -> str:
    with pytest.raises(DscError) as error:
        dsc.run(dsc.parse(text), WEIGHTS, [X], **options)
    return str(error.value)


def test_whole_inputs_and_weights_give_whole_results() -> None:
    y, gathered, experts = dsc.run(dsc.parse(SHARDED), WEIGHTS, [X], ranks="local")
    np.testing.assert_array_equal(y, X @ W)
    np.testing.assert_array_equal(gathered, X)
    np.testing.assert_array_equal(experts, E)


def test_seeded_inputs_are_those_of_the_whole_program() -> None:
    found = dsc.run(dsc.parse(SHARDED), WEIGHTS, ranks="local")[1]
    whole = "func @main(%x: f32[4, 6]) {\n  return %x\n}\n"
    np.testing.assert_array_equal(found, dsc.run(dsc.parse(whole))[0])


def test_ranks_that_should_hold_the_same_have_to() -> None:
    wrong = SHARDED.replace("return %y, %all, %every", "return %y, %all, %e")
    assert message(wrong, ranks="local") == "result %e: ranks 0 and 1 should hold the same, and do not"


def test_what_is_one_ranks_program_does_not_run_alone() -> None:
    hint = 'run it with --ranks local (ranks="local"), or under torchrun'
    assert message(SHARDED) == f"the program is that of one of 4 ranks: {hint}"
    assert message("func @main(%x: f32[4, 6]) {\n  return %x\n}\n", ranks="local") == "the module has no mesh: it was not sharded"
    assert message(SHARDED, ranks="local", backend="onnx").startswith("unknown backend 'onnx'")


def test_without_torchrun_there_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert message(SHARDED, ranks="torchrun") == "the mesh pp=1,dp=2,ep=2,tp=2 is 4 ranks, but there is no torchrun"
