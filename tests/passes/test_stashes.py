"""Gradients that wait for products of weights wait quantised: the same bits, half the bytes, in programs that run op by op."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import dsc
from dsc import backends
from dsc.backends.arrays import Data
from dsc.driver.measure import same_bits
from dsc.ir.core import Module, Phase
from dsc.ir.ops.control import Call, Unpack
from dsc.ir.ops.fused import Fused
from dsc.ir.ops.quant import Quantize
from dsc.ir.region import downward
from dsc.models.trace import trace
from dsc.passes.stashes import quantized_stashes
from dsc.testing.sampling import seeded

SPLIT = "simplify,autodiff{split=true},quantize-fp8{recipe=deepseek-v3}"


@pytest.fixture(scope="module")
def split() -> Module:
    """A training step of one dense layer and one of experts, backward in two parts."""
    shape = ("num_hidden_layers=2", "num_nextn_predict_layers=0", "first_k_dense_replace=1")
    return dsc.apply(trace("deepseek-v3-tiny", mode="train", seq=8, overrides=shape), SPLIT)


def stashed(module: Module) -> int:
    """Bytes that backward for weights is given by backward for inputs."""
    return sum(a.type.bytes for op in module.main.ops if op.phase is Phase.W and isinstance(op, Call) for a in op.operands)


def test_gradients_are_quantised_where_they_are_made(split: Module) -> None:
    """Those of every product but of what other ops read, too. Of each value that waited in BF16, 2 bytes, there are codes, and scales."""
    moved = quantized_stashes(split)
    assert dsc.parse(str(moved)) == moved
    for before, after in zip(split.funcs, moved.funcs, strict=True):
        weights = any(isinstance(op, Unpack) and op.phase is Phase.W for op in before.ops)
        gone = [op for op in before.ops if op.id not in {o.id for o in after.ops}]
        assert all(downward(op) or op.name == "reshape" for op in gone)
        assert any(isinstance(op, Quantize) for op in gone) or not weights or before.name.startswith(("embedding", "final", "head"))
    assert stashed(moved) < stashed(split)


def test_the_gradients_are_the_same_bits(split: Module) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, 64, tuple(map(int, p.shape))) for p in split.main.params]
    numpy = backends.get("numpy")
    fused = dsc.apply(split, "fuse")
    assert any(isinstance(op, Fused) for func in fused.funcs for op in func.ops)
    expected = numpy.run(split, seeded, inputs)
    for module in (quantized_stashes(split), fused):
        assert all(map(same_bits, arrays(numpy.run(module, seeded, inputs)), arrays(expected)))


def arrays(data: Data) -> Iterator[np.ndarray]:
    for part in data if isinstance(data, tuple) else ():
        yield from arrays(part)
    if not isinstance(data, tuple):
        yield data
