"""Compiling: a source becomes IR, passes run over it, and the artifact folder records each step."""

from __future__ import annotations

import difflib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..distributed.pipeline import pipeline as pipeline_of
from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.gradients import bundles
from ..ir.mesh import ATTRIBUTE, parse_mesh
from ..ir.stages import is_staged
from ..ir.types import DType
from ..models.json_file import present
from ..schedule.actions import Kind, Schedule
from . import artifact
from .artifact import Artifact, Manifest, PassRecord
from .memory import memory
from .pipelining import FILE as SCHEDULE
from .pipelining import schedule_for, schedule_of, takes_split

if TYPE_CHECKING:
    from ..models.build import Mode

DEFAULT_PASSES = "simplify"
MODES = ("forward", "train", "prefill", "decode")


@dataclass(frozen=True)
class Source:
    """What was given to compile, and what kind of thing it is: `dsc`, `factory`, `config` or `checkpoint`."""

    text: str
    kind: str
    file: Path | None

    @property
    def sha256(self) -> str | None:
        """Of the file that describes the program."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest() if self.file and self.file.is_file() else None


def resolve(source: str | Path) -> Source:
    """Tell a shipped name, a config.json, a checkpoint folder, `file.py:factory` and a .dsc file apart."""
    text, path = str(source), Path(source)
    if path.suffix == ".dsc":
        return Source(text, "dsc", present(path, "IR as text"))
    file, separator, _ = text.rpartition(":")
    if separator and file.endswith(".py"):
        return Source(text, "factory", Path(file))
    if path.is_dir():
        return Source(text, "checkpoint", path / "config.json")
    return Source(text, "config", path if path.is_file() else None)


def read(
    source: str | Path,
    *,
    mode: str = "forward",
    batch: int | None = None,
    seq: int | None = None,
    context: int | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Source, Module, dict[str, Any] | None]:
    """The source, the program it says at stage `traced` (or that of a .dsc file), and the model's config if it has one.

    A .dsc file in an artifact is read with the artifact's constants.
    """
    require(mode in MODES, f"unknown mode {mode}; expected one of {', '.join(MODES)}")
    for name, given in (("batch", batch), ("seq", seq), ("context", context)):
        require(given is None or given > 0, f"--{name} is {given}, expected 1 or more")
        require(given is None or given < 2**31, f"--{name} is {given}, expected less than 2^31")
    found = resolve(source)
    sizes = [f"--{name}" for name, given in (("batch", batch), ("seq", seq), ("context", context)) if given]
    if found.kind in ("dsc", "factory"):
        require(not sizes, f"{', '.join(sizes)}: {found.text} has its own sizes; these options are for a model's configuration")
    if found.kind == "dsc":
        from ..ir.parser import parse

        file = Path(found.text)
        try:
            module = parse(file.read_text(encoding="utf-8"), found.text)
        except UnicodeDecodeError as error:
            raise DscError(f"{file}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
        return found, module.replace(constants=artifact.constants_of(file.resolve().parent.parent)), None
    if found.kind == "factory":
        from ..models.trace import load_factory, trace

        require(not overrides, "--set changes a model's config, but a factory has none")
        return found, trace(*load_factory(found.text)), None
    from ..models.config import load_config

    config = load_config(source, overrides).to_dict()  # first, since it needs no torch to say what is wrong
    from ..models.trace import trace

    return found, trace(source, mode=cast("Mode", mode), batch=batch, seq=seq, context=context, overrides=overrides), config


def compile(
    source: str | Path,
    out: str | Path,
    *,
    mode: str = "forward",
    batch: int | None = None,
    seq: int | None = None,
    context: int | None = None,
    passes: str | None = None,
    recipe: str | None = None,
    mesh: str | None = None,
    dispatch: str = "auto",
    schedule: str | None = None,
    microbatches: int | None = None,
    chunks: int | None = None,
    recompute: str = "none",
    budget_gb: float | None = None,
    replicas: int | None = None,
    placement: str | Path | None = None,
    shared: str = "apart",
    until: str | None = None,
    weights: str = "none",
    overrides: Sequence[str] = (),
    command: Sequence[str] = (),
    fuse: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
    add: Callable[[Module, Path], None] | None = None,
) -> Artifact:
    """Compile `source` into the artifact folder `out`, and open it.

    `source` is a shipped name, a config.json, a checkpoint folder, `file.py:factory` or a .dsc file. `passes` is a pipeline as
    text; without it the default one runs, with quantisation by `recipe` if one is named, and sharded over `mesh` ("dp=4,ep=4",
    see `ir/mesh.py`) if one is given: then `batch` counts the sequences of all ranks, by default one for each along dp, and `dispatch` says
    how tokens go to experts of other nodes: `direct`, `two-hop`, `forwarded`, or `auto`, which is `forwarded` where ep spans nodes, in
    decoding `direct`. With pp in the mesh the program is cut into the stages of a `schedule`, a name (1f1b in training unless said) or a
    file, with `chunks` of them on a rank where the schedule leaves that open; `batch` is that of one of its `microbatches`, of which there
    are two for each stage unless said.

    In training `recompute="deepseek"` keeps fewer residuals, by the report's list, and `budget_gb` as few as fit (`recompute_pass`).

    With `replicas`, how many slots there are for experts, or a `placement` that `dsc place` wrote, ranks hold redundant experts
    (`place-experts`); with `shared="routed"` the shared expert is one of those that have slots.

    `until` is a stage to stop at, `weights` one of `none`, a checkpoint folder, `random:SEED`: what `dsc run` will take if it is given no
    other. With `fuse` the default pipeline ends with that pass, as it does where kernels are compiled. `on_step` is called with the name
    of each step that is done; `add` is given the program and the folder before it takes its place, and may write more there.

    >>> artifact = dsc.compile("deepseek-v3-tiny", out="tiny", seq=16)
    >>> artifact.manifest.stage, [step.name for step in artifact.manifest.passes]
    ('traced', ['traced', 'simplify'])
    """
    from ..passes.manager import check_until, parse_pipeline, run_pipeline
    from .report import page

    target = Path(out)
    artifact.check_target(target)
    check_until(until)
    require(passes is None or recipe is None, "--recipe belongs to the default pipeline; in --passes write quantize-fp8{recipe=...}")
    require(passes is None or mesh is None, '--mesh belongs to the default pipeline; in --passes write shard-experts{mesh="..."}')
    require(dispatch == "auto" or bool(mesh), "--dispatch says how tokens go to other ranks: it needs --mesh")
    order = order_of(mesh, mode, schedule, microbatches, chunks) if passes is None else None
    again = recompute_pass(recompute, budget_gb, mode, order)
    require(passes is None or not again, "--recompute and --budget-gb belong to the default pipeline; in --passes write recompute{...}")
    placing = placing_pass(mesh, replicas, placement, shared)
    require(passes is None or not placing, "redundant experts belong to the default pipeline; in --passes write place-experts{...}")
    if passes is None:
        chosen = default_pipeline(recipe, None, fuse=fuse, mesh=mesh, dispatch=dispatch, schedule=order, placing=placing, again=again)
    else:
        chosen = passes
    pipeline = parse_pipeline(chosen)  # what is wrong is said before any work
    if mesh and batch is None and resolve(source).kind in ("config", "checkpoint"):
        batch = parse_mesh(mesh).dp
    start = time.perf_counter()
    found, module, config = read(source, mode=mode, batch=batch, seq=seq, context=context, overrides=overrides)
    seconds = time.perf_counter() - start
    on_step("traced")
    if passes is None:
        pipeline = parse_pipeline(default_pipeline(recipe, config, mode, fuse, mesh, dispatch, order, placing, again))
    with artifact.beside(target) as folder:
        (folder / "ir").mkdir()
        writer = _Snapshots(folder)
        writer.write("traced", found.text, seconds, module)
        constants = module.constants

        def snapshot(record: Any, after: Module) -> None:
            writer.write(record.name, record.options, record.seconds, after, tuple(map(str, record.declined)))
            on_step(record.name)

        module = run_pipeline(module, pipeline, until=until, on_snapshot=snapshot).module
        weights = _check_weights(weights, module, config)
        if constants:
            from ..models.safetensors_file import write_safetensors

            write_safetensors(folder / artifact.CONSTANTS, constants)
        if update := _update_of(module, config):
            (folder / artifact.UPDATE).write_text(str(update), encoding="utf-8")
        (folder / "plan").mkdir()
        if is_staged(module) and ATTRIBUTE in module.attributes:
            planned = pipeline_of(module, order or schedule_for(module, schedule, microbatches))
            (folder / SCHEDULE).write_text(str(planned.schedule), encoding="utf-8")
        _write_json(folder / artifact.MEMORY, memory(module))
        if add:
            add(module, folder)
        manifest = Manifest(
            dsc_version=version("dsc"),
            command=tuple(command),
            source=found.text,
            source_kind=found.kind,
            source_sha256=found.sha256,
            mode=mode,
            stage=module.stage,
            weights=weights,
            config=config,
            passes=tuple(writer.records),
            versions=artifact.versions(),
        )
        _write_json(folder / artifact.MANIFEST, manifest.model_dump(mode="json"))
        report = page(Artifact(folder, manifest, module))
        (folder / artifact.REPORT).write_text(report, encoding="utf-8", errors="replace")
    return Artifact(target, artifact.load(target).manifest, module)


def tiles_of(notes: Iterable[str]) -> list[str]:
    """Those notes of passes that say where quantised values have other tiles than on one rank: it changes numbers, and nobody asked."""
    from ..passes.shard_experts import TILES

    marked = (line.partition(f" {TILES}: ") for line in notes)
    return [f"{TILES} {text}" for where, found, text in marked if found and " " not in where]


def default_pipeline(
    recipe: str | None,
    config: dict[str, Any] | None,
    mode: str = "forward",
    fuse: bool = False,
    mesh: str | None = None,
    dispatch: str = "auto",
    schedule: Schedule | None = None,
    placing: str = "",
    again: str = "",
) -> str:
    """The passes that run where none are given.

    After `placing` of experts and, in training, differentiation, before which a recipe may want routing weights inside SwiGLU, come
    quantisation by `recipe`, sharding over `mesh`, what backward is to run `again`, and `fuse`.

    For a `schedule` the program is cut into its stages first, and its backward pass in two where the schedule wants that.

    A checkpoint that is in FP8 already, in the blocks that the recipe has, is read as it is; in training it is not, for there the
    weights change.
    """
    from ..passes.recipe import recipe as by_name

    chosen = by_name(recipe) if recipe else None
    split = "{split=true}" if schedule and takes_split(schedule) else ""
    first = DEFAULT_PASSES + (f",{placing}" if placing else "")
    if mode == "train":
        first += ",weighted-swiglu" if chosen and chosen.weighted_swiglu else ""
        first = f"{first},autodiff{split},{DEFAULT_PASSES}"
    hops = f",dispatch={dispatch}" if dispatch != "auto" else ""
    stages = f",split-stages{{stages={schedule.stages}}}" if schedule else ""
    last = stages + (f',shard-experts{{mesh="{mesh}"{hops}}}' if mesh else "") + (f",{again}" if again else "") + (",fuse" if fuse else "")
    if chosen is None:
        return first + last
    weight = chosen.weight
    blocks = ((config or {}).get("quantization_config") or {}).get("weight_block_size")
    stored = mode != "train" and weight is not None and weight.format is DType.f8e4m3 and blocks == list(weight.tile)
    return f"{first},quantize-fp8{{recipe={recipe}{',stored=true' if stored else ''}}},{DEFAULT_PASSES}{last}"


def order_of(mesh: str | None, mode: str, schedule: str | None, microbatches: int | None, chunks: int | None) -> Schedule | None:
    """What ranks along pp follow; None where there is one stage."""
    asked = schedule is not None or microbatches is not None or chunks is not None
    require(not asked or mesh is not None, "--schedule, --microbatches and --chunks are for a pipeline: they need --mesh pp=2 or more")
    over = parse_mesh(mesh) if mesh else None
    found = schedule_of(over, mode, schedule, microbatches, chunks) if over and (asked or over.pp > 1) else None
    backward = found is None or any(action.kind is not Kind.F for _, _, action in found.actions())
    require(mode != "train" or backward, f"schedule {schedule} has no backward pass, but training has: 1f1b is one that does")
    return found


def recompute_pass(policy: str, budget_gb: float | None, mode: str, order: Schedule | None) -> str:
    """The pass that keeps fewer residuals: by the list of a `policy`, or as few as fit into a budget; "" where none is asked for."""
    if policy == "none" and budget_gb is None:
        return ""
    require(mode == "train", "--recompute and --budget-gb are for the backward pass: they need --mode train")
    require(policy == "none" or budget_gb is None, "--recompute deepseek is a list, --budget-gb chooses by itself: expected one of them")
    require(budget_gb is None or 0 < budget_gb < inf, f"--budget-gb is {budget_gb}, expected more than 0")
    several = "--budget-gb bounds one micro-batch, but a rank of a pipeline holds several: --recompute deepseek would fit"
    require(budget_gb is None or order is None, several)
    return "recompute" if budget_gb is None else f"recompute{{budget-gb={budget_gb}}}"


def placing_pass(mesh: str | None, replicas: int | None, placement: str | Path | None, shared: str) -> str:
    """The pass that gives experts slots, for the ranks along ep; "" where none is asked for."""
    if replicas is None and placement is None:
        require(shared == "apart", "--shared-expert routed makes it one of the experts that have slots: it needs --replicas or --placement")
        return ""
    require(bool(mesh), "--replicas and --placement put experts on the ranks of a mesh: they need --mesh")
    require(replicas is None or placement is None, "--replicas places experts evenly, --placement as a file says: expected one of them")
    over = parse_mesh(mesh or "")
    nodes = over.size("ep.node")
    even = f"replicas={replicas},ranks={over.ep}" + (f",nodes={nodes}" if nodes > 1 else "")
    where = even if placement is None else f'placement="{placement}"'
    return f"place-experts{{{where}{',shared=routed' if shared == 'routed' else ''}}}"


def _update_of(module: Module, config: dict[str, Any] | None) -> Module | None:
    """The optimiser's program for a differentiated model; of a sharded one that of a rank, over its parts, and by stages if it has some."""
    from .train_program import assemble

    return assemble(module, config).update if config and bundles(module) else None


def _check_weights(weights: str, module: Module, config: dict[str, Any] | None) -> str:
    if weights == "none":
        return weights
    from ..models.checkpoint import open_weights as weights_source
    from .ranks import RankWeights
    from .run import open_weights

    if ATTRIBUTE in module.attributes:
        RankWeights(weights_source(weights, config=config), module, keep="none")
    else:
        open_weights(weights, module, config, check=True)
    return weights if weights.startswith("random:") else str(Path(weights).resolve())


class _Snapshots:
    """Writes the program after each step, with a diff to the step before where it changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[PassRecord] = []
        self._module: Module | None = None
        self._text = ""

    def write(self, name: str, pipeline: str, seconds: float, module: Module, notes: tuple[str, ...] = ()) -> None:
        text = self._text if module is self._module else str(module)
        changed = text != self._text
        file = f"ir/{len(self.records):02d}-{name}.dsc"
        (self.folder / file).write_text(text, encoding="utf-8")
        diff = None
        if changed and self._text:
            diff = file.removesuffix(".dsc") + ".diff"
            before = self.records[-1].file
            lines = difflib.unified_diff(self._text.splitlines(True), text.splitlines(True), before, file)
            (self.folder / diff).write_text("".join(lines), encoding="utf-8")
        ops = sum(len(f.ops) for f in module.funcs)
        record = PassRecord(name=name, text=pipeline, seconds=seconds, ops=ops, changed=changed, file=file, diff=diff, notes=notes)
        self.records.append(record)
        self._text, self._module = text, module


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
