"""What becomes of each tensor of a checkpoint, and of its config.json, when its Linear weights go to block-scaled FP8 or back.

A reader finds `plan`, which looks at names, types and shapes alone and refuses what cannot be converted; `Task`, which converts one
tensor piece by piece; `new_config`. `convert` writes the results into files.

**To FP8**, the convention of the released DeepSeek-V3 weights (README_WEIGHTS.md): every Linear weight `X.weight` [N, K] of attention,
dense FFN, routed and shared experts becomes codes f8e4m3[N, K] and `X.weight_scale_inv` f32[ceil(N/128), ceil(K/128)], one
dequantisation factor for each 128x128 block, by the scale rule "deepseek-v3" of `numerics.scale`. A block cut by the edge takes the
maximum of what is there. Embedding, output head, norms, the gate, biases and MTP's `eh_proj` stay as they are, byte for byte.

**To BF16**: codes times scale in float32, rounded to BF16, as the released fp8_cast_bf16.py does. The rest stays byte for byte.

Converting to FP8, back, and to FP8 again gives the first bytes if the source was BF16 and no block has its largest magnitude within
[0.964e-4, 1e-4), where the rule's floor applies and yet a value reaches the largest code. Otherwise the second scale may differ from
the first by the rounding to BF16, 2^-8 of it, the codes do not, and from then on nothing changes. Scales made by another rule, such as
those of the released weights, are not brought back: the largest code of a block need not be 448 there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ..ir.errors import DscError, require
from ..ir.quantization import RULES
from ..numerics.formats import widen
from ..numerics.scale import Tile, dequantize, quantize, scale_shape
from .checkpoint import CONFIG, CheckpointFolder
from .config import REQUIRED
from .expert_names import collapse
from .safetensors_file import Entry, FileTensor
from .stored_weights import DECODABLE, row_chunks
from .weights import FLOATS, FP8, NUMPY_DTYPES, type_text

Form = Literal["bf16", "fp8"]

BLOCK: Tile = (128, 128)
RULE = RULES["deepseek-v3"]
QUANTIZATION_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}

_LINEAR = re.compile(
    r"(?:.*\.)?layers\.\d+\."
    r"(?:self_attn\.(?:q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight"
    r"|mlp\.(?:shared_experts\.|experts\.\d+\.)?(?:gate_proj|up_proj|down_proj)\.weight"
    r"|mlp\.experts\.(?:gate_up_proj|gate_proj|up_proj|down_proj))"
)
_SCALE = "_scale_inv"
_COPY_BYTES = 1 << 23


@dataclass(frozen=True)
class Task:
    """What becomes of one tensor: `dtype` is that of the result; one that is dequantised has a `scale` for each `block`."""

    tensor: FileTensor
    dtype: str
    scale: FileTensor | None = None
    block: Tile = BLOCK

    @property
    def matrices(self) -> int:
        """How many matrices are stacked in the tensor."""
        return math.prod(self.tensor.shape[:-2])

    def entries(self) -> Iterator[Entry]:
        """The tensors that come of this one."""
        tensor = self.tensor
        nbytes = tensor.nbytes if self.dtype == tensor.dtype else math.prod(tensor.shape) * NUMPY_DTYPES[self.dtype].itemsize
        yield Entry(tensor.name, self.dtype, tensor.shape, nbytes)
        if self.dtype in FP8:
            blocks = scale_shape(tensor.shape, BLOCK)
            yield Entry(tensor.name + _SCALE, "f32", blocks, 4 * math.prod(blocks))

    def pieces(self) -> Iterator[tuple[str, np.ndarray]]:
        """The bytes of the results, each result's in order, a few megabytes at a time, under its name."""
        if self.dtype == self.tensor.dtype:
            return self._copied()
        return self._quantised() if self.dtype in FP8 else self._dequantised()

    def _copied(self) -> Iterator[tuple[str, np.ndarray]]:
        for first in range(0, self.tensor.nbytes, _COPY_BYTES):
            data = self.tensor.data(first, min(first + _COPY_BYTES, self.tensor.nbytes))
            yield self.tensor.name, data
            self.tensor.release(data)

    def _quantised(self) -> Iterator[tuple[str, np.ndarray]]:
        name = self.tensor.name
        for matrix, rows, values in self._slices(BLOCK[0]):
            codes, scales = quantize(values, BLOCK, rule=RULE)
            if not np.isfinite(scales).all():
                row, column = np.argwhere(~np.isfinite(scales))[0] * BLOCK
                which = f"matrix {matrix}, " if self.matrices > 1 else ""
                where = f"{which}the block at row {rows.start + row}, column {column}"
                raise DscError(f"{self.tensor.where}: {name}: {where}, holds an infinity or a NaN, for which no FP8 block has a scale")
            yield name, codes
            yield name + _SCALE, scales

    def _dequantised(self) -> Iterator[tuple[str, np.ndarray]]:
        scale, block = cast(FileTensor, self.scale), self.block
        scales = widen(scale.array()).reshape(self.matrices, *scale.shape[-2:])
        for matrix, rows, codes in self._slices(block[0]):
            factors = scales[matrix, rows.start // block[0] : -(-rows.stop // block[0])]
            yield self.tensor.name, dequantize(codes, factors, block, dtype=NUMPY_DTYPES[self.dtype])

    def _slices(self, multiple: int) -> Iterator[tuple[int, slice, np.ndarray]]:
        """(number of the matrix, rows, their values as the file aligns them), each about a million values in a multiple of rows."""
        rows, columns = self.tensor.shape[-2:]
        dtype = NUMPY_DTYPES[self.tensor.dtype]
        width = columns * dtype.itemsize
        for matrix in range(self.matrices):
            for chunk in row_chunks((rows, columns), multiple):
                first, last = chunk.start, min(chunk.stop, rows)
                data = self.tensor.data((matrix * rows + first) * width, (matrix * rows + last) * width)
                yield matrix, slice(first, last), data.view(dtype).reshape(last - first, columns)
                self.tensor.release(data)


def plan(folder: CheckpointFolder, to: Form) -> list[Task]:
    """What becomes of each tensor of `folder`; block scales that are used up are no tasks of their own.

    Raises `DscError`, one line for each fault: a folder that has the form already, mixes forms, or is quantised in another way; block
    scales that are missing, misshapen or of no FP8 weight; weights that are no matrices of floats.
    """
    block = _check_quantization(folder.config, folder.folder / CONFIG)
    return _to_fp8(folder) if to == "fp8" else _to_bf16(folder, block)


def _check_quantization(config: Mapping[str, Any], where: Path) -> Tile:
    """The block size of a `quantization_config`, 128x128 without one. Raises `DscError` for another kind of quantisation."""
    found = config.get("quantization_config") or {}
    require(isinstance(found, Mapping), f"{where}: quantization_config is {found!r}, expected an object")
    accepted: dict[str, tuple[Any, ...]] = {
        "quant_method": ("fp8",),
        "fmt": ("e4m3",),
        "activation_scheme": ("dynamic",),
        "scale_fmt": (None, "float", "ue8m0"),
        "expert_dtype": (None, "fp8"),
    }
    for key, values in accepted.items():
        expected = " or ".join(json.dumps(value) for value in values if value is not None)
        value = found.get(key, values[0])
        require(value in values, f"{where}: quantization_config has {key} = {json.dumps(value)}, expected {expected}")
    block = found.get("weight_block_size", list(BLOCK))
    pair = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    require(pair, f"{where}: quantization_config has weight_block_size = {json.dumps(block)}, expected two sizes such as {list(BLOCK)}")
    return block[0], block[1]


def new_config(config: Mapping[str, Any], to: Form) -> dict[str, Any]:
    """The config.json of the result: `config` with the quantization_config of the released weights, or without one."""
    if to == "fp8":
        return {**config, "quantization_config": QUANTIZATION_CONFIG}
    new = {key: value for key, value in config.items() if key != "quantization_config"}
    return new | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in new}


def _to_fp8(folder: CheckpointFolder) -> list[Task]:
    kind = folder.config.get("model_type")
    known = f"expected one of {', '.join(sorted(REQUIRED))}, whose Linear weights are known by name"
    require(kind in REQUIRED, f"{folder.folder / CONFIG}: model_type = {json.dumps(kind)}, {known}")
    linear = {name: tensor for name, tensor in folder.tensors.items() if _LINEAR.fullmatch(name)}
    quantised = [tensor for tensor in folder.tensors.values() if tensor.dtype in FP8]
    if quantised:
        plain = [name for name, tensor in linear.items() if tensor.dtype not in FP8]
        require(bool(plain), f"{folder.folder}: is in FP8 already ({len(quantised):,} of its tensors)")
        mixed = f"mixes {len(quantised):,} FP8 weights with {len(plain):,} that are not, such as {plain[0]}"
        raise DscError(f"{folder.folder}: {mixed}; convert it --to bf16 first")
    require(bool(linear), f"{folder.folder}: holds no Linear weight of attention, FFN or experts, so there is nothing to quantise")
    faults = _orphaned_scales(folder)
    for name, tensor in linear.items():
        found = f"found {type_text(tensor.dtype, tensor.shape)} in {tensor.where}"
        if tensor.dtype not in FLOATS or len(tensor.shape) != (2 if name.endswith(".weight") else 3):
            faults[name] = f"expected a matrix of floats (a stack of them where experts are stacked), {found}"
        elif name.endswith("gate_up_proj") and tensor.shape[1] % (2 * BLOCK[0]):
            faults[name] = f"FP8 blocks would straddle gate and up: expected rows in multiples of {2 * BLOCK[0]}, {found}"
    _report(folder, faults)
    return [Task(tensor, "f8e4m3" if name in linear else tensor.dtype) for name, tensor in folder.tensors.items()]


def _to_bf16(folder: CheckpointFolder, block: Tile) -> list[Task]:
    tensors = folder.tensors
    if not any(tensor.dtype in FP8 for tensor in tensors.values()):
        stale = f"; its {CONFIG} has a quantization_config all the same, which is wrong" if folder.config.get("quantization_config") else ""
        raise DscError(f"{folder.folder}: holds no FP8 weights, so there is nothing to dequantise{stale}")
    faults = _orphaned_scales(folder)
    tasks = []
    for name, tensor in tensors.items():
        if tensor.dtype not in FP8:
            if not name.endswith(_SCALE):
                tasks.append(Task(tensor, tensor.dtype))
            continue
        scale = tensors.get(name + _SCALE)
        found = type_text(tensor.dtype, tensor.shape)
        if tensor.dtype != "f8e4m3" or len(tensor.shape) < 2:
            faults[name] = f"expected a matrix of f8e4m3, found {found} in {tensor.where}"
            continue
        expected = f"expected {type_text('f32', scale_shape(tensor.shape, block))}, one per {block[0]}x{block[1]} block of {found}"
        if scale is None:
            faults[name + _SCALE] = f"missing, {expected}"
        elif scale.shape != scale_shape(tensor.shape, block) or scale.dtype not in DECODABLE:
            faults[name + _SCALE] = f"{expected}, found {type_text(scale.dtype, scale.shape)} in {scale.where}"
        else:
            tasks.append(Task(tensor, "bf16", scale, block))
    _report(folder, faults)
    return tasks


def _orphaned_scales(folder: CheckpointFolder) -> dict[str, str]:
    """Block scales whose weight is absent or not FP8."""
    faults = {}
    for name, tensor in folder.tensors.items():
        if name.endswith(_SCALE):
            weight = folder.tensors.get(name.removesuffix(_SCALE))
            if weight is None or weight.dtype not in FP8:
                found = "no such weight" if weight is None else type_text(weight.dtype, weight.shape)
                faults[name] = f"in {tensor.where}, expected an FP8 weight of that name without {_SCALE}, found {found}"
    return faults


def _report(folder: CheckpointFolder, faults: Mapping[str, str]) -> None:
    names: dict[str, list[str]] = {}
    for name, fault in faults.items():
        names.setdefault(fault, []).append(name)
    lines = [f"{folder.folder}: {name}: {fault}" for fault, members in names.items() for name in collapse(members)]
    require(not lines, "\n".join(lines))
