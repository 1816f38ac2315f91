"""Golden tensors: what every op gives for given operands, as files that NumPy alone reads, and the check of a device's results.

    golden.json         what there is: each case with its op, formula, IR text, attributes, and the type and storage of each array
    matmul-0.npz ...    the arrays of a case: operand.0, ..., weight.NAME, result.0, ... and bound.0, ... (docs/golden.md)

A result is right where each element differs from the reference's by at most its bound (`testing/bounds.py`).
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..backends.arrays import STORAGE, Array, Data
from ..ir.core import OPS, Op, Role
from ..ir.errors import DscError, require
from ..ir.explain import card
from ..ir.printer import print_attribute
from ..ir.types import Bundle, DType, Type, landed
from ..testing.agree import share_of_bound
from ..testing.answers import answer
from ..testing.samples import samples
from ..testing.sampling import Sample
from .artifact import beside

SCHEMA = 1
INDEX = "golden.json"
Format = Literal["npz", "safetensors"]
FORMATS: tuple[Format, ...] = ("npz", "safetensors")

BITS: dict[DType, type[np.generic]] = {DType.bf16: np.uint16, DType.f8e4m3: np.uint8, DType.f8e5m2: np.uint8, DType.e8m0: np.uint8}
"""The dtypes that NumPy does not know: an .npz holds their bits."""

MEANINGS = {
    DType.bf16: "the upper 16 bits of a float32",
    DType.f8e4m3: "sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7f and 0xff are NaN (OCP E4M3, 'fn')",
    DType.f8e5m2: "sign, 5 bits of exponent (bias 15), 2 of mantissa, as IEEE 754",
    DType.e8m0: "2 to the power of (code - 127); 255 is NaN",
    DType.e5m6: "a float16 whose last 4 bits of mantissa are 0",
}


@dataclass(frozen=True)
class Written:
    """What `write` made."""

    folder: Path
    cases: dict[str, int]
    """How many there are of each op."""
    bytes: int


def write(
    folder: str | Path,
    op: str | None = None,
    *,
    seed: int = 0,
    draws: int = 1,
    format: Format = "npz",
    on_step: Callable[[str], None] = lambda step: None,
) -> Written:
    """Write the golden tensors of one op, or of all, into a new folder or in place of an older one of ours.

    Every sample of an op (`testing/samples.py`) is drawn `draws` times, from `seed` on. The folder may be moved; it appears when it is
    complete.
    """
    target = Path(folder)
    require(draws > 0, f"--samples is {draws}, expected 1 or more")
    require(format in FORMATS, f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    chosen = cases(op)
    ours = not target.exists() or (target.is_dir() and (not any(target.iterdir()) or (target / INDEX).is_file()))
    require(ours, f"{target} exists and is no folder of golden tensors; expected a new folder, an empty one or one to replace")
    found: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    with beside(target) as draft:
        for sample in chosen:
            for s in range(seed, seed + draws):
                name = sample.cls.name
                counts[name] = counts.get(name, 0) + 1
                found.append(_write_case(draft, f"{name}-{counts[name] - 1}.{format}", sample, s))
            on_step(sample.cls.name)
        index = {
            "schema": SCHEMA,
            "dsc_version": version("dsc"),
            "format": format,
            "storage": {str(dtype): _storage(dtype) for dtype in DType},
            "cases": found,
        }
        (draft / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Written(target, counts, sum(file.stat().st_size for file in target.iterdir()))


def cases(op: str | None) -> tuple[Sample, ...]:
    """The samples of an op, or all. `DscError` with the nearest names for an unknown one."""
    if op is not None:
        card(op)
    return samples(*([OPS[op]] if op else ()))


def _storage(dtype: DType) -> dict[str, str]:
    numpy = np.dtype(BITS.get(dtype, STORAGE[dtype]))
    return {"npz": numpy.name} | ({"meaning": MEANINGS[dtype]} if dtype in MEANINGS else {})


def _write_case(folder: Path, file: str, sample: Sample, seed: int) -> dict[str, Any]:
    found = answer(sample, seed)
    op, described = found.op, card(sample.cls.name)
    arrays: dict[str, Array] = {}

    def add(kind: str, values: Sequence[Any], types: Sequence[Type]) -> list[dict[str, Any]]:
        entries = list(_entries(kind, values, types))
        arrays.update((entry["array"], array) for entry, array in entries)
        return [entry for entry, _ in entries]

    operands = add("operand", found.operands, [o.type for o in sample.operands])
    for entry in operands:
        entry["name"] = _names(op)[int(entry["array"].split(".")[1])]
    results = add("result", found.results, [r.type for r in op.results])
    for i, (entry, limit) in enumerate(zip(results, found.bounds, strict=True)):
        entry["bound"] = f"bound.{i}"
        arrays[entry["bound"]] = np.ascontiguousarray(limit)
    arrays |= {f"weight.{name}": array for name, array in found.weights.items()}
    arrays |= {f"constant.{name}": array for name, array in found.module.constants.items()}
    path = folder / file
    _save(path, arrays)
    return {
        "name": sample.name,
        "file": file,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "op": op.name,
        "seed": seed,
        "form": described.form,
        "formula": described.text,
        "attributes": {key: print_attribute(value) for key, value in op.attributes.items()},
        "ir": str(found.module),
        "operands": operands,
        "results": results,
    }


def _entries(kind: str, values: Sequence[Data], types: Sequence[Type]) -> Iterator[tuple[dict[str, Any], Array]]:
    """Each array with what golden.json says of it; a bundle's fields as `operand.2.0`, `operand.2.1`."""
    for i, (value, declared) in enumerate(zip(values, types, strict=True)):
        type = landed(declared)
        if isinstance(type, Bundle):
            yield from _entries(f"{kind}.{i}", value, type.fields)
        else:
            yield {"array": f"{kind}.{i}", "type": str(declared), "dtype": str(type.dtype), "shape": list(value.shape)}, value


def _names(op: Op) -> list[str]:
    """What the op calls each of its operands; `xs[0]`, `xs[1]` where it takes any number of them."""
    found: list[str] = []
    for argument in op.arguments:
        given = getattr(op, argument.name)
        if argument.role is Role.OPERANDS:
            found += [f"{argument.name}[{i}]" for i in range(len(given))]
        elif argument.role is not Role.ATTRIBUTE and given is not None:
            found.append(argument.name)
    return found


def _save(path: Path, arrays: dict[str, Array]) -> None:
    if path.suffix == ".safetensors":
        from ..models.safetensors_file import write_safetensors

        write_safetensors(path, arrays)
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:  # np.savez, but for the time of day: equal numbers, equal bytes
        for name, array in arrays.items():
            with file.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w") as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(_as_bits(array)).reshape(array.shape), allow_pickle=False)


def _as_bits(array: Array) -> Array:
    for dtype, bits in BITS.items():
        if array.dtype == STORAGE[dtype]:
            return array.view(bits)
    return array


# ---- the check


@dataclass(frozen=True)
class CaseCheck:
    """What became of one case. `status` is same, different or missing."""

    name: str
    file: str
    op: str
    status: str
    share: float = 0.0
    """The largest difference over its bound."""
    beyond: int = 0
    """Elements that are further off."""
    reason: str = ""


@dataclass(frozen=True)
class Check:
    """What `check` found, case by case."""

    cases: tuple[CaseCheck, ...] = field(repr=False)

    @property
    def same(self) -> bool:
        """Whether every result is there and within its bound."""
        return all(c.status == "same" for c in self.cases)


def check(folder: str | Path, results: str | Path, on_step: Callable[[str], None] = lambda step: None) -> Check:
    """Hold results against golden tensors: `results` has files of the same names, .npz or .safetensors, with the arrays result.0, ...

    An array holds bits as the golden one does, or the numbers themselves as float32 or float64. `DscError` where a folder or a file
    cannot be read.
    """
    golden, theirs = Path(folder), Path(results)
    index = _index(golden)
    require(theirs.is_dir(), f"{theirs}: expected a folder of results, found {'a file' if theirs.exists() else 'nothing'}")
    found = []
    for case in index["cases"]:
        file = golden / case["file"]
        require(file.is_file(), f"{file} is missing; write the golden tensors again")
        require(hashlib.sha256(file.read_bytes()).hexdigest() == case["sha256"], f"{file} is not what {INDEX} says; write it again")
        found.append(_check_case(case, _load(file), theirs))
        on_step(case["op"])
    return Check(tuple(found))


def _index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        kind = "no such folder" if not folder.exists() else "a file" if folder.is_file() else f"a folder without {INDEX}"
        raise DscError(f"{folder}: expected golden tensors made by dsc golden, found {kind}")
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = index.get("schema") == SCHEMA
    except (ValueError, AttributeError) as error:
        raise DscError(f"{file}: not an index of golden tensors: {error}") from None
    require(known, f"{file}: schema {index.get('schema')}, but this dsc reads {SCHEMA}; write the golden tensors again")
    return index


def _load(file: Path) -> dict[str, Array]:
    if file.suffix == ".safetensors":
        from ..models.safetensors_file import SafetensorsFile

        return {name: tensor.array() for name, tensor in SafetensorsFile(file).tensors.items()}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise their own kinds
        raise DscError(f"{file}: not an .npz file that NumPy reads: {error}") from None


def _check_case(case: dict[str, Any], golden: dict[str, Array], folder: Path) -> CaseCheck:
    known = case["name"], case["file"], case["op"]
    given = next((path for suffix in FORMATS if (path := (folder / case["file"]).with_suffix(f".{suffix}")).is_file()), None)
    if given is None:
        return CaseCheck(*known, "missing", reason="no such file")
    arrays = _load(given)
    share, beyond, reason = 0.0, 0, ""
    for entry in case["results"]:
        name, dtype = entry["array"], DType[entry["dtype"]]
        if name not in arrays:
            return CaseCheck(*known, "missing", reason=f"no array {name}")
        found, fault = _decoded(arrays[name], dtype, entry["shape"])
        if fault:
            return CaseCheck(*known, "different", np.inf, int(np.prod(entry["shape"])), f"{name}: {fault}")
        expected, limit = _stored(golden[name], dtype), golden[entry["bound"]]
        shares = share_of_bound(expected, found, limit)
        if shares.max(initial=0.0) > max(1.0, share):
            at = np.unravel_index(int(shares.argmax()), shares.shape)
            place = f"{name}[{', '.join(map(str, at))}]"
            reason = f"{place}: found {found[at]!s}, expected {expected[at]!s}, permitted difference {limit[at]:g}"
        share, beyond = max(share, float(shares.max(initial=0.0))), beyond + int((shares > 1).sum())
    return CaseCheck(*known, "different" if beyond else "same", share, beyond, reason)


def _decoded(array: Array, dtype: DType, shape: Sequence[int]) -> tuple[Array, str]:
    """Somebody's result as numbers that compare with the golden ones; or what is wrong with it."""
    if list(array.shape) != list(shape):
        return array, f"has shape {list(array.shape)}, expected {list(shape)}"
    if array.dtype.kind == "f" and dtype.is_float:
        return array, ""
    wanted = np.dtype(BITS.get(dtype, STORAGE[dtype]))
    if array.dtype in (wanted, STORAGE[dtype]):
        return _stored(array, dtype), ""
    return array, f"is {array.dtype}, expected {wanted}{' (bits), float32 or float64' if dtype in BITS else ''}"


def _stored(array: Array, dtype: DType) -> Array:
    """Bits as the dtype that they are of."""
    return array.view(STORAGE[dtype]) if array.dtype != STORAGE[dtype] else array
