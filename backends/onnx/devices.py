"""A sharded program's mesh in ONNX's own device annotations (IR version 11: `ModelProto.configuration`, `NodeProto.device_configurations`).

The graph is what one rank runs. Of each input, weight and result that is cut, the nodes that read or make it say how: the whole tensor's
extent and number of shards along each axis, and which ranks hold which shard, the shards counted in row-major order. What no node
speaks of is whole on every rank. Runtimes ignore this; onnx.checker and onnx_ir keep it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import onnx

from ...ir.core import Module, Value
from ...ir.mesh import Mesh, mesh_of
from ...ir.sharding import Split, axes_of, input_splits, part, result_splits, weight_splits
from ...ir.types import Bundle, Tensor, Type, landed
from ...ir.walk import weights as weights_of

CONFIGURATION = "mesh"


def annotate(model: onnx.ModelProto, module: Module) -> None:
    """Write the mesh of `module`, and how its inputs, weights and results are cut, into the model that was made of it."""
    mesh = mesh_of(module)
    model.configuration.add(name=CONFIGURATION, num_devices=mesh.world, device=[f"rank{i}" for i in range(mesh.world)])
    given = list(_leaves(module.main.params, input_splits(module)))
    made = list(_leaves(module.main.results, result_splits(module)))
    cut = {value.name: at for value, at in zip(model.graph.input, given, strict=False)}
    cut |= {value.name: at for value, at in zip(model.graph.output, made, strict=True)}
    splits = weight_splits(module)
    cut |= {name: (tensor, splits[name]) for name, tensor in weights_of(module).items()}
    specs = {name: spec for name, (tensor, split) in cut.items() if (spec := sharding(name, tensor, split, mesh)) is not None}
    for node in model.graph.node:
        used = [specs[name] for name in dict.fromkeys((*node.input, *node.output)) if name in specs]
        if used:
            node.device_configurations.add(configuration_id=CONFIGURATION, sharding_spec=used)


def _leaves(values: Sequence[Value], splits: Sequence[Split]) -> Iterator[tuple[Tensor, Split]]:
    """The tensors of values with their splits, those in bundles one by one."""

    def fields(type: Type, split: Split) -> Iterator[tuple[Tensor, Split]]:
        there = landed(type)
        if isinstance(there, Bundle):
            for field, inner in zip(there.fields, split, strict=True):
                yield from fields(field, inner)
        else:
            yield there, split

    for value, split in zip(values, splits, strict=True):
        yield from fields(value.type, split)


def sharding(name: str, tensor: Tensor, split: Split, mesh: Mesh) -> onnx.ShardingSpecProto | None:
    """How a tensor is cut, of which a rank has a part of type `tensor`; None where it is whole everywhere."""
    shards = [prod(map(mesh.size, axes_of(split, dim))) for dim in range(tensor.rank)]
    if prod(shards) == 1:
        return None
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.world):  # of a tensor with one element for each shard the part is the shard's index
        holders.setdefault(tuple(s.start for s in part(split, shards, mesh, rank)), []).append(rank)
    spec = onnx.ShardingSpecProto(tensor_name=name)
    for number, index in enumerate(product(*map(range, shards))):
        ranks = holders[index]
        spec.device.append(ranks[0] if len(ranks) == 1 else mesh.world + number)
        if len(ranks) > 1:  # a number that is no rank's stands for a group
            spec.index_to_device_group_map.add(key=mesh.world + number, value=ranks)
    for dim, count in enumerate(shards):
        if count > 1:
            extent = tensor.shape[dim]
            whole = {"dim_value": extent * count} if isinstance(extent, int) else {"dim_param": extent.name}
            spec.sharded_dim.add(axis=dim).simple_sharding.add(num_shards=count, **whole)
    return spec
