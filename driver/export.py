"""Exporting a compiled program as an ONNX model, with its weights, without them, or pointing into the checkpoint's own files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.mesh import ATTRIBUTE
from ..ir.ops.control import Param
from ..ir.types import DType, Tensor
from ..ir.walk import walk
from ..ir.walk import weights as weights_of
from .artifact import Artifact
from .run import array_types, open_weights, result_names, unpack

if TYPE_CHECKING:
    from ..backends.onnx.export import Place

WEIGHTS = ("none", "reference", "copy")
ALIGNMENT = 4096
"""Of tensors in a copied data file: what ONNX Runtime wants to map one into memory."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: Path
    bytes: int
    data: Path | None
    """The data file beside the model, if there is one."""
    runs: str
    nodes: int
    functions: int
    inputs: int
    initializers: int
    opaque: tuple[str, ...]
    """Ops that stayed ops of dsc."""


def export(
    program: Module | Artifact,
    file: str | Path,
    *,
    profile: str = "standard",
    weights: str = "none",
    checkpoint: Any = None,
    func: str | None = None,
    opset: int | None = None,
    opaque: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> Exported:
    """Write `program` as the ONNX model `file`, complete or not at all.

    `profile` is standard, ort or compact (`backends.onnx.export`). `weights`: `none` makes them inputs; `reference` lets the model point
    into the shards of `checkpoint`, which must be real files in the model's folder or below it; `copy` writes them, as the program wants
    them, into a file beside it, one at a time. `checkpoint` is a folder or `random:SEED`, by default the artifact's own weights. `func`
    exports another function than the first, `opaque` leaves ops without a mapping as they are. `on_step` is called with the name of each
    weight that is copied. Raises `DscError`.

    >>> export(dsc.load("tiny"), "tiny.onnx", weights="copy", checkpoint="random:0").runs
    'onnx.reference and ONNX Runtime'
    """
    for package in ("onnx", "onnx_ir"):
        require(find_spec(package) is not None, f"exporting needs the package {package}: pip install 'dsc[onnx]'")
    from ..backends.onnx.export import OPSET, PROFILES
    from ..backends.onnx.export import export as build

    path = Path(file)
    check_file(path)
    require(weights in WEIGHTS, f"unknown weights {weights!r}; expected one of {', '.join(WEIGHTS)}")
    module, own, config = unpack(program, checkpoint)
    if func:
        chosen = module[func.removeprefix("@")]
        module = module.replace(funcs=(chosen, *(f for f in module.funcs if f is not chosen)), attributes={})
    sharded = next((op.path for _, _, op in walk(module) if isinstance(op, Param) and op.shard), None)
    require(weights == "none" or sharded is None, f"{sharded} is a rank's part of a weight: a sharded program takes --weights none")
    unnamed = checkpoint is None and not (isinstance(program, Artifact) and program.manifest.weights != "none")
    require(weights == "none" or not unnamed, f"--weights {weights}: the program names no weights; say which with --checkpoint")
    outputs = [] if func else list(array_types(module))
    with drafts(path) as draft:
        data: Path | None = None
        place: Place = _inputs
        if weights == "reference":
            place = referenced(own, config, path)
        elif weights == "copy" and weights_of(module):
            data = path.with_name(f"{path.name}.data")
            place = Copier(draft(data), data.name, open_weights(own, module, config), on_step).place
        about = describe(program, module)
        model = build(module, profile, place=place, opset=opset or OPSET, opaque=opaque, outputs=outputs, metadata=about)
        text = serialized(model)
        if ATTRIBUTE in module.attributes:
            text = with_mesh(text, module)
        draft(path).write(text)
    left = sorted({node.op_type for node in _nodes(model) if node.domain.endswith(".opaque")})
    graph = model.graph
    counts = len(graph), len(model.functions), len(graph.inputs), len(graph.initializers)
    return Exported(path, len(text), data, PROFILES[profile].runs if not left else "none as it is: it has ops of dsc", *counts, tuple(left))


def check_file(path: Path) -> None:
    """Refuse a name that could not be written, before any work is done."""
    require(path.suffix == ".onnx", f"{path}: expected a name that ends in .onnx")
    require(not path.is_dir(), f"{path} is a folder, expected a file to write")
    require(path.parent.is_dir(), f"{path} cannot be written: there is no folder {path.parent}")
    require(os.access(path.parent, os.W_OK), f"{path} cannot be written: no permission to write in {path.parent}")


def describe(program: Module | Artifact, module: Module) -> dict[str, str]:
    """What the model says about where it comes from, and which result is the new state of which input."""
    names = result_names(module)
    updates = ", ".join(f"{module.main.params[i].name} -> {names[j]}" for i, j in module.main.updates.items())
    found = {"ai.dsc.updates": updates} if updates else {}
    if isinstance(program, Artifact):
        made = program.manifest
        passes = ",".join(p.text for p in made.passes)
        found |= {"ai.dsc.version": made.dsc_version, "ai.dsc.source": made.source, "ai.dsc.passes": passes}
        found |= {"ai.dsc.command": " ".join(made.command)}
    return found


def serialized(model: Any) -> bytes:
    """The model's bytes, which ONNX limits to 2 GiB."""
    import onnx_ir

    found: bytes = onnx_ir.serde.serialize_model(model).SerializeToString()
    return found


def with_mesh(text: bytes, module: Module) -> bytes:
    """The model with the mesh of a sharded program in its device annotations."""
    import onnx

    from ..backends.onnx.devices import annotate

    proto = onnx.ModelProto.FromString(text)
    annotate(proto, module)
    found: bytes = proto.SerializeToString()
    return found


def _nodes(model: Any) -> Iterator[Any]:
    yield from model.graph
    for function in model.functions.values():
        yield from function


@contextmanager
def drafts(path: Path) -> Iterator[Callable[[Path], IO[bytes]]]:
    """Open files beside their places; they take them, the first opened first, when the block ends well, and vanish when it does not."""
    made: dict[Path, tuple[Path, IO[bytes]]] = {}

    def draft(file: Path) -> IO[bytes]:
        beside = file.with_name(f".{file.name}.partial")
        made[file] = beside, beside.open("wb")
        return made[file][1]

    try:
        yield draft
        for file, (beside, stream) in made.items():
            stream.close()
            beside.replace(file)
    except BaseException as error:
        for beside, stream in made.values():
            with suppress(OSError):
                stream.close()
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DscError(f"{path} cannot be written: {error.strerror or error}; nothing was left behind") from None
        raise


def _inputs(name: str, tensor: Tensor) -> None:
    """No weights."""


def referenced(checkpoint: Any, config: Any, path: Path) -> Place:
    """Places in the shards of a checkpoint, by paths from the model's folder. `DscError` where ONNX Runtime would not follow one."""
    from ..backends.onnx.export import Stored
    from ..models.checkpoint import CheckpointFolder
    from ..models.weights import Wanted

    folder = isinstance(checkpoint, str | Path) and Path(checkpoint).is_dir()
    require(folder, f"--weights reference points into a checkpoint's files, but {checkpoint} is no folder")
    source = CheckpointFolder(checkpoint, config)
    known: dict[Path, PurePosixPath] = {}

    def place(name: str, tensor: Tensor) -> Sequence[Stored]:
        found = []
        for part, file, start, shape, dtype in source.places(Wanted.of(name, tensor)):
            if file not in known:
                known[file] = followed(file, path)
            found.append(Stored(part, known[file], start, math.prod(shape) * DType[dtype].bits // 8, shape, DType[dtype]))
        return found

    return place


def followed(shard: Path, model: Path) -> PurePosixPath:
    """The path to `shard` from the folder of `model`, if a runtime follows it: no link, and nowhere outside the folder."""
    instead = "use real files (hf download --local-dir makes them), or --weights copy"
    require(not shard.is_symlink(), f"{shard} is a symbolic link, which ONNX Runtime and onnx.checker refuse: {instead}")
    require(shard.stat().st_nlink == 1, f"{shard} has a second name (a hard link), which onnx.checker refuses: {instead}")
    folder, real = model.resolve().parent, shard.resolve()
    if not real.is_relative_to(folder):
        raise DscError(f"{shard} is not in the folder of {model} or below it, as ONNX demands: write the model to {real.parent}")
    return PurePosixPath(real.relative_to(folder))


@dataclass
class Copier:
    """Copies weights into a data file, each as the program wants it."""

    stream: IO[bytes]
    name: str
    fetch: Callable[[str, Tensor], np.ndarray]
    on_step: Callable[[str], None]

    def place(self, name: str, tensor: Tensor) -> Sequence[Any]:
        """Copy one weight."""
        from ..backends.onnx.export import Stored

        array = np.ascontiguousarray(self.fetch(name, tensor))
        self.stream.write(b"\0" * (-self.stream.tell() % ALIGNMENT))
        start = self.stream.tell()
        self.stream.write(array.reshape(-1).view(np.uint8).data)
        self.on_step(name)
        return [Stored(name, PurePosixPath(self.name), start, array.nbytes, array.shape)]
