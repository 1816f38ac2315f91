"""One decision of a recipe, varied: what each value costs at the results, in one table or one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..ir.core import Module
from ..ir.errors import DscError, require
from ..ir.ops.control import Call
from ..ir.verify import stage_index
from .artifact import Artifact
from .diff import Report, diff
from .inputs import Inputs
from .run import unpack
from .ui import table

TILES = (32, 64, 128, 256, 512)
PROMOTIONS = (32, 64, 128, 256, 512, 0)
DEVICE = "h800"
"""Whose accumulator is promoted when only the interval is varied: float32 sums know no promotion."""


@dataclass(frozen=True)
class Variant:
    """One value of the axis, compared with the program that is not quantised."""

    value: str
    pipeline: str
    relative_l2: float
    sqnr_db: float
    relative_l2_routed_alike: float
    """With the experts that the unquantised program chose."""
    changed: int
    """Tokens that some gate sent to other experts, added up over the gates."""
    worst_local: float
    """The largest local relative L2 difference of an op."""
    layers: tuple[tuple[str, float], ...]
    """SQNR in dB of what each layer gives, over the tokens that went to the same experts."""


@dataclass(frozen=True)
class Sweep:
    """What `dsc diff --sweep` prints."""

    axis: str
    recipe: str
    variants: tuple[Variant, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def pipelines(axis: str, recipe: str) -> list[tuple[str, str]]:
    """The values of an axis, each with the pass that sets it."""
    from ..ir.quantization import RULES
    from ..passes.recipe import recipes

    if axis == "recipe":
        return [(name, f"quantize-fp8{{recipe={name}}}") for name in recipes() if name != "bf16"]
    values: dict[str, Sequence[Any]] = {
        "tile": TILES,
        "format": ("f8e4m3", "f8e5m2"),
        "scale": tuple(RULES),
        "accumulate": ("float32", *_distinct_accumulations()),
        "promote": PROMOTIONS,
    }
    require(axis in values, f"unknown axis {axis}; expected one of {', '.join(('recipe', *values))}")
    fixed = f",accumulate={DEVICE}" if axis == "promote" else ""
    return [(str(value), f"quantize-fp8{{recipe={recipe},{axis}={value}{fixed}}}") for value in values[axis]]


def _distinct_accumulations() -> list[str]:
    """One instruction of each kind: several devices share theirs."""
    from ..hardware.device import device, devices

    kinds: dict[Any, str] = {}
    for name in devices():
        for instruction, model in device(name).accumulations.items():
            kinds.setdefault(model, f"{name}/{instruction}")
    return list(kinds.values())


def sweep(
    program: Module | Artifact,
    axis: str,
    *,
    recipe: str = "deepseek-v3",
    weights: Any = None,
    inputs: Inputs = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Sweep:
    """Quantise an unquantised program in every way that `axis` has, and compare the results with its own.

    >>> dsc.driver.sweep.sweep(dsc.trace("deepseek-v3-tiny"), "format")
    """
    from ..passes.manager import apply

    module = _unquantised(program)
    _, spec, _ = unpack(program, weights)
    chosen = pipelines(axis, recipe)
    variants = []
    for value, pipeline in chosen:
        report = diff(module, apply(module, pipeline), weights=spec, inputs=inputs)
        variants.append(_variant(value, pipeline, module, report))
        on_step(value)
    return Sweep(axis, recipe, tuple(variants))


def _unquantised(program: Module | Artifact) -> Module:
    if isinstance(program, Module):
        require(stage_index(program.stage) < stage_index("quantized"), f"the program is at stage {program.stage}: it is quantised already")
        return program
    for record in reversed(program.manifest.passes):
        module = program.after(record.name)
        if stage_index(module.stage) < stage_index("quantized"):
            return module
    raise DscError(f"{program.path}: no program from before quantisation is in the artifact")


def _variant(value: str, pipeline: str, module: Module, report: Report) -> Variant:
    free = max(report.outputs, key=lambda e: e.accumulated.relative_l2)
    forced = max(report.outputs_forced or report.outputs, key=lambda e: e.accumulated.relative_l2)
    by_site = {entry.site: entry for entry in report.ops}
    layers = []
    for op in module.main.ops:
        if isinstance(op, Call) and (owner := module[op.callee].results[0].owner):
            found = by_site.get(f"@{op.callee} ({op.weights}) {owner.id}")
            if found and op.weights[-1:].isdigit():
                layers.append((op.weights, (found.same_experts or found.accumulated).sqnr_db))
    return Variant(
        value,
        pipeline,
        free.accumulated.relative_l2,
        free.accumulated.sqnr_db,
        forced.accumulated.relative_l2,
        sum(gate.changed for gate in report.routing),
        max((e.local.relative_l2 for e in report.ops if e.local), default=0.0),
        tuple(layers),
    )


def show(found: Sweep) -> str:
    """The sweep as a table."""
    head = (found.axis, "rel L2", "SQNR dB", "rel L2, routed alike", "experts changed", "worst local rel L2")
    rows = [
        (v.value, f"{v.relative_l2:.3e}", f"{v.sqnr_db:.2f}", f"{v.relative_l2_routed_alike:.3e}", str(v.changed), f"{v.worst_local:.3e}")
        for v in found.variants
    ]
    base = f"recipe {found.recipe}, results against the unquantised program"
    return f"{base if found.axis != 'recipe' else 'results against the unquantised program'}\n\n{table(head, rows)}"


def plot(found: Sweep, file: Path) -> None:
    """Draw SQNR by layer, a line for each variant. The file's suffix says the format."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise DscError("a plot needs matplotlib: pip install 'dsc[plan]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = [v for v in found.variants if v.layers]
    require(bool(drawn), "the program has no layers to plot: it is one function")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    markers = "osD^vP*Xdh<>"
    curves: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for variant in drawn:
        curves.setdefault(variant.layers, []).append(variant.value)  # what changes only the backward draws the same line
    for i, (layers, labels) in enumerate(curves.items()):
        values = [value for _, value in layers]
        axes.plot(range(len(values)), values, marker=markers[i % len(markers)], markersize=5, linewidth=1.5, label="\n".join(labels))
    axes.set_xticks(range(len(drawn[0].layers)), [name.rpartition(".")[2] for name, _ in drawn[0].layers])
    axes.set_xlabel("layer")
    axes.set_ylabel("SQNR of the layer's output [dB]")
    axes.set_title(f"Signal to quantisation noise by layer, {found.axis} varied")
    axes.grid(alpha=0.3)
    axes.legend(title=found.axis, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise DscError(f"{file}: cannot be written: {error}") from None
    finally:
        plt.close(figure)
