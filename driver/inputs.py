"""A program's inputs: seeded ones where none are given, or those of a file, checked and cast to what the program takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.core import Func, Module, Op, Trait, Value, users
from ..ir.errors import DscError, require
from ..ir.mesh import ATTRIBUTE, mesh_of
from ..ir.ops.attention import AttentionDecode
from ..ir.ops.control import Call
from ..ir.ops.elementwise import Cast
from ..ir.ops.loss import CrossEntropy
from ..ir.ops.shape import CacheAppend, Concat, Gather, Take
from ..ir.sharding import input_splits, whole
from ..ir.stages import cut_inputs
from ..ir.types import DType, Tensor, bound
from ..models.json_file import present
from ..models.state_dict import as_array
from ..models.weights import NUMPY_DTYPES
from ..numerics.formats import FORMATS, round_to
from .ui import plural

Inputs = Sequence[Any] | Mapping[str, Any] | str | Path | None


def prepare(module: Module, inputs: Inputs, seed: int = 0, microbatches: int = 1) -> tuple[np.ndarray, ...]:
    """The arrays that @main takes, in order: from a tuple, by name from a mapping or an .npz file, or seeded for None.

    Of a sharded program they are the whole inputs, of which each rank takes its part; of a pipeline those of all micro-batches. Integers
    are taken as they are, floats are rounded to the parameter's dtype. Raises `DscError` with every fault.
    """
    if inputs is None:
        return seeded(module, seed, microbatches)
    params = module.main.params
    if isinstance(inputs, str | Path):
        inputs = _load(Path(inputs))
    names = [p.name for p in params]
    if isinstance(inputs, Mapping):
        faults = [f"input {name} is missing" for name in names if name not in inputs]
        faults += [f"input {name} is not one of the program's: {', '.join(names)}" for name in inputs if name not in names]
        require(not faults, "\n".join(faults))
        inputs = [inputs[name] for name in names]
    require(len(inputs) == len(params), f"@main takes {plural(len(params), 'input')} ({', '.join(names)}), found {len(inputs)}")
    fitted, faults = [], []
    for param, tensor, array in zip(params, whole_inputs(module, microbatches), inputs, strict=True):
        try:
            fitted.append(_fit(param.name, tensor, array))
        except DscError as error:
            faults.append(str(error))
    require(not faults, "\n".join(faults))
    return tuple(fitted)


def seeded(module: Module, seed: int = 0, microbatches: int = 1) -> tuple[np.ndarray, ...]:
    """Inputs made from `seed` and each parameter's name: normal floats, integers in the range that the program can take."""
    wholes = whole_inputs(module, microbatches)
    return tuple(_random(p, tensor, module, seed) for p, tensor in zip(module.main.params, wholes, strict=True))


def whole_inputs(module: Module, microbatches: int = 1) -> list[Tensor]:
    """The types of the whole inputs: those of @main's parameters, unless ranks or micro-batches have parts of them."""
    types = [param.tensor for param in module.main.params]
    if ATTRIBUTE in module.attributes:
        found = (whole(type, split, mesh_of(module)) for type, split in zip(types, input_splits(module), strict=True))
        types = [type for type in found if isinstance(type, Tensor)]
    times = [microbatches if own else 1 for own in cut_inputs(module)]
    return [t if n == 1 else Tensor(t.dtype, (n * bound(t.shape[0]), *t.shape[1:])) for t, n in zip(types, times, strict=True)]


def _random(param: Value, tensor: Tensor, module: Module, seed: int) -> np.ndarray:
    shape = tuple(bound(d) for d in tensor.shape)
    digest = hashlib.sha256(f"{seed}/{param.name}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    if tensor.dtype.is_float:
        return _narrow(generator.standard_normal(shape, dtype=np.float32), tensor.dtype)
    high = min(_limits(module, module.main, param), default=2)
    return generator.integers(0, 2 if tensor.dtype is DType.bool else high, shape).astype(NUMPY_DTYPES[tensor.dtype.name])


def _limits(module: Module, func: Func, value: Value) -> Iterator[int]:
    """Extents that integers in `value` index, followed through calls and ops that only move them."""
    for op in users(func).get(value, ()):
        match op:
            case Take(indices=v) | Gather(indices=v) if v is value:
                yield bound(op.x.shape[op.axis])
            case CrossEntropy(labels=v) if v is value:
                yield bound(op.logits.shape[1])
            case AttentionDecode(positions=v) if v is value:
                yield op.keys
            case AttentionDecode(pages=v) if v is value:
                yield bound(op.k.shape[0])
            case CacheAppend(positions=v) if v is value:
                yield bound(op.cache.shape[1])
            case Call():
                callee = module[op.callee]
                for argument, param in zip(op.args, callee.params, strict=True):
                    if argument is value:
                        yield from _limits(module, callee, param)
            case Op() if Trait.VIEW in op.traits or isinstance(op, Cast | Concat):
                for result in op.results:
                    yield from _limits(module, func, result)


def _load(file: Path) -> dict[str, np.ndarray]:
    wanted = "an .npz file with an array for each input"
    with present(file, wanted).open("rb") as stream:
        start = stream.read(6)
        found = "one bare array" if start == b"\x93NUMPY" else "something else"
        require(start[:2] == b"PK", f"{file}: expected {wanted}, found {found}")
        stream.seek(0)
        try:
            loaded = np.load(stream, allow_pickle=False)
            return {name: loaded[name] for name in loaded.files}
        except ValueError as error:
            raise DscError(f"{file}: expected plain arrays: {error}") from None
        except Exception as error:  # zipfile and zlib raise their own kinds for a damaged archive
            raise DscError(f"{file}: damaged: {error}") from None


def _fit(name: str, tensor: Tensor, given: Any) -> np.ndarray:
    array = np.asarray(as_array(given))
    fits = array.ndim == tensor.rank and all(
        n <= d.bound if not isinstance(d, int) else n == d for n, d in zip(array.shape, tensor.shape, strict=True)
    )
    require(fits, f"input {name}: expected {tensor}, found shape {list(array.shape)}")
    wanted = NUMPY_DTYPES.get(tensor.dtype.name, array.dtype)
    if array.dtype == wanted:
        return array
    if array.dtype.kind == "V" and array.dtype.itemsize == wanted.itemsize:
        return array.view(wanted)  # NumPy's files keep the bytes of bf16 and FP8, but not the name
    if tensor.dtype.is_float and array.dtype.name in ("float16", "float32", "float64", "bfloat16"):
        return _narrow(array, tensor.dtype)
    if tensor.dtype.is_int and array.dtype.kind in "iu":
        info = np.iinfo(wanted)
        inside = array.size == 0 or (int(array.min()) >= info.min and int(array.max()) <= info.max)
        require(inside, f"input {name}: values do not fit {tensor.dtype}")
        return array.astype(wanted)
    raise DscError(f"input {name}: expected {tensor}, found {array.dtype}{list(array.shape)}")


def _narrow(array: np.ndarray, dtype: DType) -> np.ndarray:
    return array.astype(np.float64) if dtype is DType.f64 else round_to(array, FORMATS[dtype.name])
