"""Weights out of a set of stored tensors, wherever these lie: how what is stored is made to serve what a program wants.

`StoredWeights` finds each wanted tensor under whichever spelling it is stored (see `expert_names`), dequantises FP8, converts
between float types, and lists everything that does not fit.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..ir.errors import DscError
from ..numerics.formats import FORMATS, round_to, widen
from .expert_names import Part, any_expert, collapse, parts
from .weights import FLOATS, FP8, NUMPY_DTYPES, Wanted, type_text

DECODABLE = (*FLOATS, "e8m0")
"""The dtypes that block scales come in."""
_MTP_COPY = re.compile(r"(?P<model>.*)layers\.\d+\.(?P<copy>embed_tokens|shared_head\.head)\.weight")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_CHUNK_VALUES = 1 << 20


class Stored(Protocol):
    """A tensor where it lies. `array` is a view if it can be; `release` lets go of memory that reading a part of it took."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def where(self) -> str: ...
    def array(self) -> np.ndarray: ...
    def release(self, view: np.ndarray) -> None: ...


@dataclass(frozen=True)
class _Problem:
    kind: str
    name: str
    detail: str


@dataclass(frozen=True)
class _Piece:
    """Where an on-disk tensor lies: `tensor.array()[part.index]`."""

    tensor: Stored
    part: Part

    def array(self) -> np.ndarray:
        return self.tensor.array()[(*self.part.index, ...)]


@dataclass(frozen=True)
class _Copy:
    """One step in assembling a wanted tensor: `wanted[index] = source`, times the block scales of an FP8 `source`."""

    index: tuple[int | slice, ...]
    source: _Piece
    scale: _Piece | None


class StoredWeights:
    """Weights out of a fixed set of stored tensors.

    An FP8 tensor that a program wants in a wider type is multiplied by its block scales, `X.weight_scale_inv`, in float32 and
    then rounded to that type, as DeepSeek's own converter does (fp8_cast_bf16.py); wanted as FP8, it is handed out byte for byte.
    Other conversions between float types round once, to nearest even. Nothing is ever quantised here.

    `config` is the model's config.json: `num_hidden_layers` (layers from there on are MTP's, which a program may leave alone),
    `tie_word_embeddings`, `quantization_config.weight_block_size`.
    """

    def __init__(self, tensors: Mapping[str, Stored], source: str, config: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.source = source
        self._layers: int | None = config.get("num_hidden_layers")
        self._tied = bool(config.get("tie_word_embeddings"))
        quantization = config.get("quantization_config") or {}
        self._block: tuple[int, int] = tuple(quantization.get("weight_block_size") or (128, 128))
        self._pieces = {part.name: _Piece(tensor, part) for tensor in tensors.values() for part in parts(tensor.name, tensor.shape)}

    def get(self, wanted: Wanted) -> np.ndarray:
        """See `Weights.get`. Beyond the result it takes a few times `_CHUNK_VALUES` float32 values, whatever the size of the tensor."""
        copies, problems = self._plan(wanted)
        self._report(problems)
        if [(copy.source.tensor.dtype, copy.source.part.shape) for copy in copies] == [(wanted.dtype, wanted.shape)]:
            return np.asarray(copies[0].source.array(), order="C")
        out = np.empty(wanted.shape, NUMPY_DTYPES[wanted.dtype])
        for copy in copies:
            self._fill(out[(*copy.index, ...)], copy, wanted.dtype)
        return out

    def part(self, wanted: Wanted, index: tuple[slice, ...]) -> np.ndarray:
        """`get(wanted)[index]`, and no more is read: of what has block scales the blocks that it touches."""
        copies, problems = self._plan(wanted)
        self._report(problems)
        if [(copy.source.tensor.dtype, copy.source.part.shape) for copy in copies] == [(wanted.dtype, wanted.shape)]:
            return copies[0].source.array()[index]
        ranges = [slice(*s.indices(extent)) for s, extent in zip((*index, *[slice(None)] * len(wanted.shape)), wanted.shape, strict=False)]
        out = np.empty([s.stop - s.start for s in ranges], NUMPY_DTYPES[wanted.dtype])
        for copy in copies:
            if overlap := _overlap(copy, wanted.shape, ranges):
                target, source = overlap
                self._fill(out[(*target, ...)], copy, wanted.dtype, source)
        return out

    def _fill(self, target: np.ndarray, copy: _Copy, dtype: str, part: tuple[slice, ...] = ()) -> None:
        """Write the `part` of a copy's source, all of it unless told, to `target`."""
        target, source = np.atleast_1d(target, copy.source.array()[part])
        if copy.scale is not None and part:
            target[...] = _convert(self._blocks(copy, part), dtype)
            return
        scale = None if copy.scale is None else widen(copy.scale.array())
        for rows in row_chunks(target.shape, self._block[0]):
            chunk = source[rows]
            values = chunk if scale is None else self._dequantise(chunk, scale[rows.start // self._block[0] :])
            target[rows] = _convert(values, dtype)
            if not part:
                copy.source.tensor.release(chunk)

    def _blocks(self, copy: _Copy, part: tuple[slice, ...]) -> np.ndarray:
        """float32: a part of an FP8 matrix, from the blocks that it touches."""
        assert copy.scale is not None
        rows, columns = (slice(s.start // b, -(-s.stop // b)) for s, b in zip(part, self._block, strict=True))
        touched = tuple(slice(s.start * b, s.stop * b) for s, b in zip((rows, columns), self._block, strict=True))
        values = self._dequantise(copy.source.array()[touched], widen(copy.scale.array()[rows, columns]))
        return values[tuple(slice(s.start - t.start, s.stop - t.start) for s, t in zip(part, touched, strict=True))]

    def check(self, wanted: Sequence[Wanted], *, strict: bool = True) -> None:
        """See `Weights.check`."""
        problems: list[_Problem] = []
        used: set[str] = set()
        stacks: set[str] = set()
        for item in wanted:
            copies, faults = self._plan(item)
            problems += faults
            used.update(part.name for copy in copies for part in parts(copy.source.part.name, copy.source.part.shape))
            names = [part.name for part in parts(item.name, item.shape, item.experts)]
            used.update(names)
            if item.experts is not None:
                stacks.update(any_expert(name) for name in names)
        if strict:
            problems += self._extra(used, stacks)
        self._report(problems)

    def _plan(self, wanted: Wanted) -> tuple[list[_Copy], list[_Problem]]:
        whole = self.tensors.get(wanted.name)
        if whole is not None and whole.dtype == wanted.dtype and whole.shape == wanted.shape and wanted.experts is None:
            return [_Copy((), _Piece(whole, Part(wanted.name, (), wanted.shape)), None)], []
        found = [self._locate(part, wanted.dtype) for part in parts(wanted.name, wanted.shape, wanted.experts)]
        return [item for item in found if isinstance(item, _Copy)], [item for item in found if isinstance(item, _Problem)]

    def _locate(self, part: Part, dtype: str) -> _Copy | _Problem:
        piece = self._find(part.name)
        if piece is None:
            return _Problem("missing", part.name, f"expected {type_text(dtype, part.shape)}")
        found, shape = piece.tensor.dtype, piece.part.shape
        here = f"expected {type_text(dtype, part.shape)}, found {type_text(found, shape)} in {piece.tensor.where}"
        if shape != part.shape:
            return _Problem("misshapen", part.name, here)
        if (piece.part.fused or (part.fused and part.name.endswith("_scale_inv"))) and (fault := self._straddling(piece.part.name)):
            return fault
        if found == dtype or (found in DECODABLE and dtype in FLOATS):
            return _Copy(part.index, piece, None)
        if found in FP8 and dtype in FLOATS:
            scale = self._scale(piece)
            return scale if isinstance(scale, _Problem) else _Copy(part.index, piece, scale)
        return _Problem("dtype", part.name, here + ("; weights are not quantised on loading" if dtype in FP8 else "; cannot be converted"))

    def _scale(self, weight: _Piece) -> _Piece | _Problem:
        """The block scales of an FP8 matrix, each of which holds for one block of rows and columns."""
        name, shape = f"{weight.part.name}_scale_inv", weight.part.shape
        found = type_text(weight.tensor.dtype, shape)
        if len(shape) != 2:
            return _Problem("misshapen", weight.part.name, f"expected a matrix, which can have block scales, found {found}")
        blocks = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=True))
        expected = f"expected {type_text('f32', blocks)}, one per {self._block[0]}x{self._block[1]} block of {found}"
        scale = self._find(name)
        if scale is None:
            return _Problem("missing", name, expected)
        if scale.part.shape != blocks or scale.tensor.dtype not in DECODABLE:
            here = f"found {type_text(scale.tensor.dtype, scale.part.shape)} in {scale.tensor.where}"
            return _Problem("misshapen", name, f"{expected}, {here}")
        return scale

    def _straddling(self, name: str) -> _Problem | None:
        """FP8 blocks start anew at each original tensor, so gate and up can share one tensor only if no block straddles them."""
        weight = self._find(name.removesuffix("_scale_inv"))
        if weight is None or weight.tensor.dtype not in FP8 or weight.part.shape[0] % self._block[0] == 0:
            return None
        rows = f"expected rows in multiples of {self._block[0]}, found {weight.part.shape[0]}"
        return _Problem("misshapen", name, f"FP8 blocks of a fused gate_up_proj would straddle gate and up: {rows}")

    def _find(self, name: str) -> _Piece | None:
        """The stored tensor called `name`, or the one that it is a copy of: tied output head, MTP's embedding and head."""
        if name in self._pieces:
            return self._pieces[name]
        original = self._original(name)
        return None if original is None else self._find(original)

    def _original(self, name: str) -> str | None:
        if name == "lm_head.weight" and self._tied:
            return "model.embed_tokens.weight"
        if (match := _MTP_COPY.fullmatch(name)) and self._is_mtp(name):
            return f"{match['model']}embed_tokens.weight" if match["copy"] == "embed_tokens" else "lm_head.weight"
        return None

    def _is_mtp(self, name: str) -> bool:
        layer = _layer(name)
        return layer is not None and self._layers is not None and layer >= self._layers

    def _extra(self, used: set[str], stacks: set[str]) -> Iterator[_Problem]:
        wanted_layers = {_layer(name) for name in used}
        for name, piece in self._pieces.items():
            scaled = name.removesuffix("_scale_inv")
            legitimate = (
                name in used
                or scaled in used
                or any_expert(scaled) in stacks
                or self._original(name) is not None
                or name.endswith("rotary_emb.inv_freq")
                or (self._is_mtp(name) and _layer(name) not in wanted_layers)
            )
            if not legitimate:
                found = type_text(piece.tensor.dtype, piece.part.shape)
                yield _Problem("extra", name, f"found {found} in {piece.tensor.where}, which the program does not want")

    def _dequantise(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """float32 [n, K]: `codes` [n, K] times `scale` [>= n / block rows, K / block columns]; the first row begins a block."""
        values = widen(codes)
        rows, columns = self._block
        for block, first in enumerate(range(0, len(values), rows)):
            values[first : first + rows] *= np.repeat(scale[block], columns)[: values.shape[1]]
        return values

    def _report(self, problems: Sequence[_Problem]) -> None:
        groups: dict[tuple[str, str], list[str]] = {}
        for problem in dict.fromkeys(problems):
            groups.setdefault((problem.kind, problem.detail), []).append(problem.name)
        lines = [f"{kind}: {name}: {detail}" for (kind, detail), names in groups.items() for name in collapse(names)]
        if len(lines) == 1:
            raise DscError(f"{self.source}: {lines[0]}")
        if lines:
            counts = Counter(problem.kind for problem in dict.fromkeys(problems))
            totals = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
            raise DscError("\n".join([f"{self.source}: these weights do not fit the program: {totals}", *(f"  {line}" for line in lines)]))


def _overlap(copy: _Copy, shape: tuple[int, ...], ranges: Sequence[slice]) -> tuple[tuple[int | slice, ...], tuple[slice, ...]] | None:
    """Where what `copy` has of the `ranges` of a tensor of `shape` goes there, and where it lies in its source; None if there is none."""
    target: list[int | slice] = []
    source: list[slice] = []
    for dim, wanted in enumerate(ranges):
        at = copy.index[dim] if dim < len(copy.index) else slice(0, shape[dim])
        first, last = (at, at + 1) if isinstance(at, int) else (at.start, at.stop)
        begin, end = max(first, wanted.start), min(last, wanted.stop)
        if begin >= end:
            return None
        target.append(begin - wanted.start if isinstance(at, int) else slice(begin - wanted.start, end - wanted.start))
        if not isinstance(at, int):
            source.append(slice(begin - first, end - first))
    return tuple(target), tuple(source)


def _convert(values: np.ndarray, dtype: str) -> np.ndarray:
    if values.dtype == NUMPY_DTYPES[dtype]:
        return values
    return widen(values, np.float64) if dtype == "f64" else round_to(values, FORMATS[dtype])


def row_chunks(shape: tuple[int, ...], multiple: int) -> Iterator[slice]:
    """Slices of the first axis, each `_CHUNK_VALUES` values or the least multiple of `multiple` rows above that."""
    row = max(1, math.prod(shape[1:]))
    step = -(-_CHUNK_VALUES // (row * multiple)) * multiple
    for first in range(0, shape[0], step):
        yield slice(first, first + step)


def _layer(name: str) -> int | None:
    match = _LAYER.search(name)
    return int(match[1]) if match else None
