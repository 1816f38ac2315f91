"""One .safetensors file: its header read and checked, its tensors as views of a memory map, and the writer.

The format: eight bytes with the length of the header (little-endian), the header (a JSON object: name -> dtype, shape and the
begin and end of the data, counted from the end of the header), then the data. It is read here rather than through the
safetensors library because every error must name the tensors it costs, BF16 and FP8 must arrive without a copy, and pages must
be given back once copied, so that loading a checkpoint needs little more memory than its result.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..ir.errors import DscError, require
from ..ir.types import Tensor, bound
from .weights import DTYPE_NAMES, NUMPY_DTYPES

_FILE_CODES = {
    "bf16": "BF16",
    "f16": "F16",
    "f32": "F32",
    "f64": "F64",
    "f8e4m3": "F8_E4M3",
    "f8e5m2": "F8_E5M2",
    "e8m0": "F8_E8M0",
    "i64": "I64",
    "i32": "I32",
    "i16": "I16",
    "i8": "I8",
    "u8": "U8",
    "bool": "BOOL",
}
_IR_NAMES = {code: name for name, code in _FILE_CODES.items()}
_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True, eq=False, slots=True)
class FileTensor:
    """A tensor in a .safetensors file: `nbytes` bytes from byte `start` of `file`. A dtype that dsc lacks keeps the file's code."""

    file: SafetensorsFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def where(self) -> str:
        """The file's name, for messages."""
        return self.file.path.name

    def array(self) -> np.ndarray:
        """The tensor as a read-only view of the memory map (a copy where the file does not align it)."""
        view = self.data().view(NUMPY_DTYPES[self.dtype]).reshape(self.shape)
        return view if view.flags.aligned else view.copy()

    def data(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """The tensor's bytes from `first` to `last`, whatever its dtype, as a read-only view of the memory map: u8[last - first]."""
        count = (self.nbytes if last is None else last) - first
        return np.ndarray((count,), np.uint8, buffer=self.file.map(), offset=self.start + first)

    def release(self, view: np.ndarray) -> None:
        """Give back the memory that reading `view`, a contiguous part of `array()` or `data()`, has taken; it may be read again."""
        self.file.release(view)


@dataclass(eq=False)
class SafetensorsFile:
    """An open .safetensors file: only the header is read; data is mapped at the first `array()`.

    Raises `DscError` (one line: file, found, expected) if the file cannot be read, the header is corrupt, or the file is not
    exactly as long as the header says.
    """

    path: Path
    tensors: dict[str, FileTensor] = field(init=False, default_factory=dict)
    _map: mmap.mmap | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                require(size >= 8 and length <= _LONGEST_HEADER, f"{self.path}: not a safetensors file: no plausible header length")
                cut = f"truncated within its header: expected {8 + length:,} bytes or more, found {size:,}"
                require(size >= 8 + length, f"{self.path}: {cut}")
                header = json.loads(file.read(length))
        except OSError as error:
            raise DscError(f"{self.path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DscError(f"{self.path}: corrupt header: not JSON ({error})") from error
        require(isinstance(header, dict), f"{self.path}: corrupt header: expected a JSON object, found {type(header).__name__}")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            self.tensors[name] = self._tensor(name, entry, 8 + length)
        self._check_layout(8 + length, size)

    def _tensor(self, name: str, entry: object, data: int) -> FileTensor:
        match entry:
            case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
                all(type(n) is int and n >= 0 for n in shape) and 0 <= begin <= end
            ):
                dtype = _IR_NAMES.get(code, code)
            case _:
                raise DscError(f"{self.path}: corrupt header: {name!r}: expected dtype, shape and data_offsets, found {entry}")
        if dtype in NUMPY_DTYPES:
            expected = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
            described = f"{name!r}: {dtype}{shape} is {expected:,} bytes"
            require(expected == end - begin, f"{self.path}: corrupt header: {described}, data_offsets give {end - begin:,}")
        return FileTensor(self, name, dtype, tuple(shape), data + begin, end - begin)

    def _check_layout(self, data: int, size: int) -> None:
        """The tensors' bytes follow one another without gap or overlap from `data` to the end of the file."""
        end = data
        for tensor in sorted(self.tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
            found = f"starts at byte {tensor.start:,}, expected {end:,}, the end of the tensor before it"
            require(tensor.start == end, f"{self.path}: corrupt header: {tensor.name!r} {found}")
            end += tensor.nbytes
        if size < end:
            cut = [tensor.name for tensor in self.tensors.values() if tensor.start + tensor.nbytes > size]
            raise DscError(f"{self.path}: truncated: expected {end:,} bytes, found {size:,}; cut short: {', '.join(cut)}")
        require(size == end, f"{self.path}: expected {end:,} bytes by its header, found {size:,}")

    def map(self) -> mmap.mmap:
        """The file's bytes, mapped read-only."""
        if self._map is None:
            try:
                with open(self.path, "rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise DscError(f"{self.path}: cannot be read: {error.strerror}") from error
        return self._map

    def release(self, view: np.ndarray) -> None:
        """Drop the pages that lie wholly within `view` from this process: the system reads them again if they are needed again."""
        whole = np.frombuffer(self.map(), np.uint8)
        if hasattr(mmap, "MADV_DONTNEED") and np.may_share_memory(view, whole):
            start = _address(view) - _address(whole)
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                self.map().madvise(mmap.MADV_DONTNEED, first, last - first)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


class Entry(NamedTuple):
    """A tensor that a .safetensors file is to hold. A dtype that dsc lacks is the file's code."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def lay_out(entries: Iterable[Entry]) -> tuple[bytes, dict[str, int]]:
    """What a file of `entries` begins with (the header and its length), and the byte of the file at which each tensor begins.

    Tensors lie in the order of `entries`, but those of wider elements before the others, so that everything is aligned.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for entry in sorted(entries, key=_width, reverse=True):
        code = _FILE_CODES.get(entry.dtype, entry.dtype)
        header[entry.name] = {"dtype": code, "shape": entry.shape, "data_offsets": [end, end + entry.nbytes]}
        starts[entry.name] = end
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in starts.items()}


def _width(entry: Entry) -> int:
    """Bytes of an element; 0 where elements are smaller or there are none to tell by."""
    return NUMPY_DTYPES[entry.dtype].itemsize if entry.dtype in NUMPY_DTYPES else entry.nbytes // max(1, math.prod(entry.shape))


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `tensors` as one .safetensors file, without copying contiguous ones."""
    _write(path, [Entry(name, DTYPE_NAMES[array.dtype], array.shape, array.nbytes) for name, array in tensors.items()], tensors)


def stream_safetensors(path: Path, types: Mapping[str, Tensor], tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors of known `types` as one .safetensors file. Each is looked up once, in order, those of wider elements first."""
    shapes = {name: tuple(map(bound, type.shape)) for name, type in types.items()}
    _write(path, [Entry(name, type.dtype.name, shapes[name], type.bytes) for name, type in types.items()], tensors)


def _write(path: Path, entries: Sequence[Entry], tensors: Mapping[str, np.ndarray]) -> None:
    head, starts = lay_out(entries)
    with open(path, "wb") as file:
        file.write(head)
        for name in starts:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
