"""DualPipe with the forward pass of one stage under the backward pass of another: bit for bit what the two give one after the other."""

from __future__ import annotations

import pytest

import dsc
from dsc import backends
from dsc.distributed import local
from dsc.driver.inputs import prepare
from dsc.driver.pipelining import schedule_of
from dsc.driver.ranks import rank_program
from dsc.ir.core import Module, Phase, called
from dsc.ir.errors import DscError
from dsc.ir.mesh import mesh_of, parse_mesh
from dsc.ir.ops.collective import Done
from dsc.ir.stages import merged
from dsc.models.random_weights import RandomWeights

pytestmark = pytest.mark.slow
QUICK = """
name = "quick"
base = "h800"
[comm]
sms = 0
slowdown = 1
compute_slowdown = 1
provenance = "assumed"
source = "neither stream slows the other: what can run side by side pays"
"""


@pytest.fixture(scope="module")
def staged() -> Module:
    source = dsc.trace("deepseek-v3-tiny", mode="train", batch=2, seq=8, overrides=["num_hidden_layers=3"])
    pipeline = 'simplify,autodiff{split=true},simplify,split-stages{stages=2},shard-experts{mesh="pp=2,dp=2,ep=2"}'
    return dsc.parse(str(dsc.apply(source, pipeline)))


def test_overlapped_pairs_give_the_same_bits(staged: Module, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("cluster") / "quick.toml"
    file.write_text(QUICK)
    made = dsc.apply(staged, f"overlap{{cluster={file}}}")
    assert dsc.parse(str(made)) == made
    pairs = merged(made)
    assert set(pairs) == {(f"stage{f}_fwd", f"stage{b}_bwd_input", f"stage{b}_bwd_weight") for f, b in ((0, 1), (1, 0))}
    for name in pairs.values():
        layers = [made[callee] for callee in called(made, made[name]) if "overlapped" in callee]
        assert layers  # a layer's forward pass and another's backward pass are one function
        assert all(any(isinstance(op, Done) for op in func.ops) for func in layers)
        assert all({op.id.split(".")[0] for op in func.ops} == {"fwd", "bwd"} for func in layers)
        assert all(any(op.phase is Phase.W for op in func.ops) for func in layers)  # all of the backward pass
    schedule = schedule_of(parse_mesh("pp=2"), "train", "dualpipe", 4)
    inputs, found = prepare(staged, None, microbatches=4), []
    seen: set[str] = set()
    for module in (staged, made):
        placed, _ = rank_program(module, RandomWeights(0), inputs, backends.get("numpy"), lambda site, *_: seen.add(site.func), schedule)
        found.append([{key: leaves(x) for key, x in held.items()} for held in local.run(mesh_of(module), placed)])
    assert any("overlapped" in name for name in seen)
    for plain, overlapped in zip(*found, strict=True):
        assert plain.keys() == overlapped.keys()
        assert all(len(plain[k]) == len(overlapped[k]) and all(map(bytes.__eq__, plain[k], overlapped[k])) for k in plain)


def leaves(x: object) -> list[bytes]:
    return [b for field in x for b in leaves(field)] if isinstance(x, tuple) else [x.tobytes()]  # type: ignore[attr-defined]


def test_micro_batches_of_inference_are_not_cut_into_stages(staged: Module) -> None:
    with pytest.raises(DscError, match="microbatches=2 is for a program that is not cut into stages"):
        dsc.apply(staged, "overlap{microbatches=2}")
