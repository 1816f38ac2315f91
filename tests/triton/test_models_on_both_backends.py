"""A whole model as `dsc diff OUT OUT --backends numpy,triton` compares it: every op, on the reference's operands, within its bound."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import dsc
from dsc.backends.triton import kernels
from dsc.ir.ops.norm import RmsNorm

SIZES = ("num_hidden_layers=2",)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "recipe"), [("forward", None), ("forward", "deepseek-v3"), ("train", None)])
def test_the_backends_are_the_same(tmp_path: Path, mode: str, recipe: str | None) -> None:
    artifact = dsc.compile("deepseek-v3-tiny", out=tmp_path / "out", mode=mode, seq=8, recipe=recipe, overrides=SIZES)
    report = dsc.diff(artifact, backends=("numpy", "triton"))
    assert report.same, report.first
    assert (report.only_in_a, report.only_in_b) == ((), ())
    compared = [op for op in report.ops if not op.equal]
    assert compared, "the two backends sum in another order: something has to differ in its last bits"
    assert all(op.bound_ratio is not None and op.bound_ratio <= 1 for op in compared if op.local)


def test_a_faulty_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm whose epsilon is off by a tenth of the mean square."""
    artifact = dsc.compile("deepseek-v3-tiny", out=tmp_path / "out", seq=8, overrides=("num_hidden_layers=1",))
    right = kernels.KERNELS[RmsNorm]

    def wrong(op: RmsNorm, *rest):  # type: ignore[no-untyped-def]
        return right(op.copy(eps=0.1), *rest)

    monkeypatch.setitem(kernels.KERNELS, RmsNorm, wrong)
    report = dsc.diff(artifact, backends=("numpy", "triton"))
    assert not report.same
    assert report.first == "@decoder_layer (model.layers.0) input_layernorm#2"
