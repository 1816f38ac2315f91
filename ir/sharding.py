"""How the program of one rank stands to the whole: which part of each weight, input and result it holds.

A split names, for each dimension of a tensor, the mesh axes that it is cut along, the outermost first: `["dp", "tp"]` cuts dimension 0
along dp and dimension 1 along tp, `["dp+tp"]` dimension 0 along both, rank (i, j) having part i * size(tp) + j. What is left out at the
end is whole. A bundle has a split for each field. A weight carries its split as `param`'s attribute `shard`; a sharded module says with the
attributes `inputs` and `results` how the parameters and results of its main function are split. Ranks that differ along other axes alone
hold the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from .core import Module, Value
from .errors import require
from .mesh import ATTRIBUTE, Mesh, mesh_of
from .ops.control import Param
from .types import Bundle, Tensor, Type, landed
from .walk import join, walk
from .walk import weights as weights_of

INPUTS, RESULTS = "inputs", "results"

Split = tuple[Any, ...]
"""Of a tensor a text for each dimension, of a bundle a split for each field."""


def axes_of(split: Split, dim: int) -> tuple[str, ...]:
    """The axes along which dimension `dim` is cut, the outermost first."""
    return tuple(split[dim].split("+")) if dim < len(split) and split[dim] else ()


def axes(split: Split) -> tuple[str, ...]:
    """All axes along which a tensor is cut."""
    return tuple(axis for dim in range(len(split)) for axis in axes_of(split, dim))


def part(split: Split, shape: Sequence[int], mesh: Mesh, rank: int) -> tuple[slice, ...]:
    """Where the part of `rank` lies in a whole tensor of `shape`. `DscError` where a dimension cannot be cut so."""
    found = []
    for dim, extent in enumerate(shape):
        index, count = 0, 1
        for axis in axes_of(split, dim):
            size = mesh.size(axis)
            index, count = index * size + mesh.index(axis, rank), count * size
        require(
            extent % count == 0,
            f"dimension {dim} of {list(shape)} does not make {count} equal parts along {' and '.join(axes_of(split, dim))}",
        )
        found.append(slice(index * (extent // count), (index + 1) * (extent // count)))
    return tuple(found)


def whole(type: Type, split: Split, mesh: Mesh) -> Type:
    """The type of the whole of which a rank has a value of `type`."""
    type = landed(type)
    if isinstance(type, Bundle):
        return Bundle(tuple(whole(t, s, mesh) for t, s in zip(type.fields, split, strict=True)))
    return whole_tensor(type, split, mesh)


def whole_tensor(tensor: Tensor, split: Split, mesh: Mesh) -> Tensor:
    """The same of a tensor."""
    sizes = [prod(map(mesh.size, axes_of(split, dim))) for dim in range(tensor.rank)]
    return Tensor(tensor.dtype, tuple(d * s if isinstance(d, int) else d for d, s in zip(tensor.shape, sizes, strict=True)))


def input_splits(module: Module) -> tuple[Split, ...]:
    """How each parameter of main is split; whole where nothing is said."""
    return _splits(module, INPUTS, module.main.params)


def result_splits(module: Module) -> tuple[Split, ...]:
    """How each result of main is split; whole where nothing is said."""
    return _splits(module, RESULTS, module.main.results)


def _splits(module: Module, name: str, values: Sequence[Value]) -> tuple[Split, ...]:
    given = module.attributes.get(name)
    if given is None:
        return tuple(nowhere(v.type) for v in values)
    require(len(given) == len(values), f"the module splits {len(given)} {name}, but @{module.main.name} has {len(values)}")
    return tuple(given)


def nowhere(type: Type) -> Split:
    """The split of what every rank holds whole."""
    return tuple(map(nowhere, type.fields)) if isinstance(type, Bundle) else ()


def weight_splits(module: Module) -> Mapping[str, Split]:
    """How each weight is split, by full name."""
    return {join(prefix, op.path): op.shard for prefix, _, op in walk(module) if isinstance(op, Param)}


def whole_weights(module: Module) -> Mapping[str, Tensor]:
    """Every weight of the whole model, by full name, in the order of first use: of what was not sharded as it is read."""
    if ATTRIBUTE not in module.attributes:
        return weights_of(module)
    mesh, splits = mesh_of(module), weight_splits(module)
    return {name: whole_tensor(tensor, splits[name], mesh) for name, tensor in weights_of(module).items()}
