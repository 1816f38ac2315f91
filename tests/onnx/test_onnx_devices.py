"""A sharded program's mesh as ONNX's device annotations: what they say of each rank is what each rank holds."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

import dsc
from dsc.driver.export import export
from dsc.ir.mesh import mesh_of
from dsc.ir.sharding import input_splits, part, result_splits, weight_splits, whole_tensor, whole_weights
from dsc.passes.manager import apply


def held(spec: onnx.ShardingSpecProto, rank_shape: tuple[int, ...], ranks: int) -> dict[int, tuple[slice, ...]]:
    """Which part of the whole each rank holds, read from the annotation as its comments in onnx.proto define it."""
    groups = {entry.key: list(entry.value) for entry in spec.index_to_device_group_map}
    count, whole = [1] * len(rank_shape), list(rank_shape)
    for dim in spec.sharded_dim:
        (simple,) = dim.simple_sharding
        count[dim.axis], whole[dim.axis] = simple.num_shards, simple.dim_value
    assert len(spec.device) == prod(count)
    found: dict[int, tuple[slice, ...]] = {}
    for number, device in enumerate(spec.device):
        index = np.unravel_index(number, count)
        for rank in groups.get(device, [device]):
            assert rank not in found, "a rank holds two shards"
            found[rank] = tuple(slice(int(i) * w // c, (int(i) + 1) * w // c) for i, w, c in zip(index, whole, count, strict=True))
    assert found.keys() == set(range(ranks))
    return found


@pytest.fixture(scope="module")
def plain() -> dsc.ir.core.Module:
    return dsc.trace("deepseek-v3-tiny", seq=16, batch=4)


@pytest.mark.parametrize("profile", ["standard", "compact"])
@pytest.mark.parametrize("mesh", ["dp=4,ep=4", "dp=2,tp=2,ep=2", "dp=4,ep=2"])
def test_each_rank_holds_what_the_annotations_say(plain: dsc.ir.core.Module, tmp_path: Path, mesh: str, profile: str) -> None:
    module = apply(plain, f'simplify,shard-experts{{mesh="{mesh}"}}')
    export(module, tmp_path / "m.onnx", opaque=True, profile=profile)
    model = onnx.load(tmp_path / "m.onnx")
    ranks, splits = mesh_of(module), weight_splits(module)
    (configuration,) = model.configuration
    assert (configuration.name, configuration.num_devices, len(configuration.device)) == ("mesh", ranks.world, ranks.world)
    local = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in (*model.graph.input, *model.graph.output)}
    seen: dict[str, onnx.ShardingSpecProto] = {}
    for node in model.graph.node:
        for each in node.device_configurations:
            assert each.configuration_id == "mesh"
            for spec in each.sharding_spec:
                assert spec.tensor_name in (*node.input, *node.output)
                seen[spec.tensor_name] = spec
    expected = {name: (splits[name], tensor) for name, tensor in whole_weights(module).items() if any(splits[name])}
    for values, each in ((module.main.params, input_splits(module)), (module.main.results, result_splits(module))):
        for value, split in zip(values, each, strict=True):
            if any(split):
                expected[value.name if value in module.main.params else "logits"] = split, whole_tensor(value.tensor, split, ranks)
    assert seen.keys() == expected.keys()
    assert any(".experts." in name for name in seen)
    for name, (split, whole) in expected.items():
        shape = tuple(d for d in whole.shape if isinstance(d, int))
        for rank, mine in held(seen[name], local[name], ranks.world).items():
            assert mine == part(split, shape, ranks, rank), (name, rank)


def test_a_quantised_program_of_ragged_rows_names_what_has_no_mapping(plain: dsc.ir.core.Module, tmp_path: Path) -> None:
    module = apply(plain, 'simplify,quantize-fp8{recipe=deepseek-v3},shard-experts{mesh="dp=4,ep=4"}')
    with pytest.raises(dsc.DscError, match=r"grouped_scaled_matmul \(.*static shape, found f8e4m3\[rows<="):
        export(module, tmp_path / "m.onnx")
    export(module, tmp_path / "m.onnx", opaque=True)


def test_checker_runtime_and_library_keep_them(tmp_path: Path) -> None:
    """A program whose ranks need nothing of each other runs as it is; onnx_ir reads and writes the annotations."""
    text = """module { stage=sharded, mesh={pp=1, dp=2, ep=1, tp=2, node=8}, inputs=[["dp"]], results=[["dp", "tp"]] }
func @main(%x: f32[3, 4]) {
  %w: f32[5, 4] = param("w", shard=["tp"])  @ main#1 F
  %y: f32[3, 5] = matmul(%x, %w, transpose_b=true)  @ main#2 F
  return %y
}
"""
    file = tmp_path / "m.onnx"
    export(dsc.parse(text), file, profile="ort")
    onnx.checker.check_model(file, full_check=True)
    model = onnx.load(file)
    specs = {s.tensor_name: s for n in model.graph.node for c in n.device_configurations for s in c.sharding_spec}
    assert specs.keys() == {"x", "w", "y"}
    assert held(specs["x"], (3, 4), 4) == {r: (slice(r // 2 * 3, r // 2 * 3 + 3), slice(0, 4)) for r in range(4)}
    assert held(specs["w"], (5, 4), 4) == {r: (slice(r % 2 * 5, r % 2 * 5 + 5), slice(0, 4)) for r in range(4)}
    assert list(specs["y"].device) == [0, 1, 2, 3]
    assert list(specs["x"].device) == [4, 5]
    x, w = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)
    (y,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x, "w": w})
    assert y.tolist() == np.full((3, 5), 4).tolist()
    again = onnx_ir.serde.serialize_model(onnx_ir.serde.deserialize_model(model))
    assert [c.num_devices for c in again.configuration] == [4]
    kept = {s.tensor_name: list(s.device) for n in again.graph.node for c in n.device_configurations for s in c.sharding_spec}
    assert kept == {name: list(s.device) for name, s in specs.items()}


def test_a_program_of_one_rank_has_none(tmp_path: Path) -> None:
    export(dsc.parse("func @main(%x: f32[3]) {\n  %y: f32[3] = neg(%x)  @ main#1 F\n  return %y\n}\n"), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    assert len(model.configuration) == 0
    assert not any(node.device_configurations for node in model.graph.node)
