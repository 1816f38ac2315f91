"""The memory of a program before it runs: weights, what training keeps beside them, and what lives at each point of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..ir.core import Module, Phase
from ..ir.expected import expected_bytes
from ..ir.gradients import bundles, by_name
from ..ir.liveness import live_bytes
from ..ir.mesh import ATTRIBUTE
from ..ir.ops.control import Param
from ..ir.quantization import SCALE_SUFFIX
from ..ir.sharding import axes, weight_splits
from ..ir.stages import BACKWARD, FORWARD, INPUT, WEIGHT, is_staged, stages_of
from ..ir.timeline import ACTIVATIONS, KINDS, Kind, Timeline, timeline
from ..ir.types import Bundle, Tensor
from ..ir.walk import expert_weights, join, walk
from ..ir.walk import weights as weights_of
from .ui import count, size, table

MASTER, MOMENTS, GRADIENT = 4, 2 + 2, 4
"""Bytes of training for each parameter: the FP32 weight, both AdamW moments in BF16, the FP32 gradient (DeepSeek-V3 report, 3.3.3)."""

BUCKETS = {"tp": "TP-sharded", "replicated": "replicated", "experts": "experts (ETP x EP)"}
"""How the ranks of a stage share a weight: cut along tp, whole on each, or cut along ep (the three buckets of Megatron-LM's accounting)."""


def memory(module: Module) -> dict[str, Any]:
    """Bytes by kind, and the peak of live values in each function: what plan/memory.json holds.

    The peak is of what a function makes itself, its results and the functions that it calls included, its parameters not:
    `total_bytes` is weights, inputs and the peak of @main. Of a program for a mesh or with gradients there are `buckets` as well, of the
    latter `training`: see there. Of a program that is cut into stages `stages` says the same stage by stage; what is said of weights
    is then of the fullest.
    """
    stages = by_stage(module) if is_staged(module) else []
    fullest = max(range(len(stages)), key=lambda i: int(stages[i]["together_bytes"])) if stages else 0
    known = weights_by_stage(module)[fullest] if stages else weights_of(module)
    by_dtype: dict[str, int] = {}
    for tensor in known.values():
        by_dtype[tensor.dtype.name] = by_dtype.get(tensor.dtype.name, 0) + tensor.bytes
    functions: dict[str, dict[str, Any]] = {}
    for func in module.funcs:
        live = live_bytes(module, func)
        at = func.ops[live.at].id if func.ops else ""
        functions[func.name] = {"peak_bytes": live.peak, "at": at, "ops": len(func.ops)}
    main = module.main
    found = {
        "weights": by_dtype,
        "weight_bytes": sum(by_dtype.values()),
        "input_bytes": sum(p.type.bytes for p in main.params),
        "output_bytes": sum(r.type.bytes for r in main.results),
        "total_bytes": sum(by_dtype.values()) + sum(p.type.bytes for p in main.params) + functions[main.name]["peak_bytes"],
        "functions": functions,
    }
    if stages:
        return found | {"fullest_stage": fullest, "buckets": stages[fullest]["buckets"], "stages": stages}
    if ATTRIBUTE in module.attributes or bundles(module):
        found["buckets"] = buckets(module, known)
    return found | {"training": training(module)} if bundles(module) else found


def by_stage(module: Module) -> list[dict[str, Any]]:
    """What a rank holds of each stage of a pipeline: its buckets, and the residuals of one micro-batch, from its forward to its backward.

    A weight that several stages read is accumulated on each, and has its optimiser's state where main's gradient of it is made.
    """
    stages, size, found = stages_of(module), expected_bytes(module), []
    first = len(module.main.results) - len(bundles(module))
    named = zip(bundles(module), module.main.results[first:], strict=True)
    homes = {name: stages.home(value)[0] for names, value in named for name in names}
    for i, (known, calls) in enumerate(zip(weights_by_stage(module), stages.calls, strict=True)):
        held = buckets(module, known, {name for name, home in homes.items() if home == i})
        kept = calls[FORWARD].results if FORWARD in calls else ()
        later = {v for role in (BACKWARD, INPUT, WEIGHT) if role in calls for v in calls[role].operands}
        together = sum(b[key] for b in held.values() for key in b if key.endswith("bytes"))
        residuals = sum(size(v.type) for v in kept if v in later)
        found.append({"stage": i, "buckets": held, "together_bytes": together, "residual_bytes": residuals})
    return found


def weights_by_stage(module: Module) -> list[dict[str, Tensor]]:
    """The weights that the functions of each stage read."""
    found = []
    for calls in stages_of(module).calls:
        ops = (item for call in calls.values() for item in walk(module, module[call.callee]))
        found.append({join(prefix, op.path): op.result.tensor for prefix, _, op in ops if isinstance(op, Param)})
    return found


def buckets(module: Module, known: Mapping[str, Tensor], stated: Collection[str] | None = None) -> dict[str, dict[str, int]]:
    """What a rank holds of the weights `known`, and in training beside them, in the buckets of `BUCKETS`.

    Gradients are accumulated whole; the optimiser's state is that of the weights in `stated`, or of all. `state_parameters` are those of
    which the rank keeps it: with ZeRO-1 the parts of gradients that its step returns.
    """
    splits, experts = weight_splits(module), expert_weights(module)
    parts = by_name(module, [r.type.fields if isinstance(r.type, Bundle) else r.type for r in module.main.results])
    keys = ("parameters", "weight_bytes", "gradient_bytes", "state_parameters", "state_bytes")
    found = {name: dict.fromkeys(keys, 0) for name in BUCKETS}
    for name, tensor in known.items():
        at = found["experts" if name.removesuffix(SCALE_SUFFIX) in experts else "tp" if "tp" in axes(splits[name]) else "replicated"]
        kept = parts[name].size if name in parts and (stated is None or name in stated) else 0
        at["parameters"] += 0 if name.endswith(SCALE_SUFFIX) else tensor.size
        at["weight_bytes"] += tensor.bytes
        at["gradient_bytes"] += GRADIENT * tensor.size if name in parts else 0
        at["state_parameters"] += kept
        at["state_bytes"] += (MASTER + MOMENTS) * kept
    return found


def training(module: Module) -> dict[str, Any]:
    """Of a differentiated program: the state of its optimiser, and the peak of each kind of buffer in a step (`ir/timeline.py`).

    `step_peak_bytes` is the most of inputs, residuals, workspace and gradients at once, `activation_peak_bytes` of residuals and workspace:
    what `recompute{budget-gb}` bounds. `total_bytes` adds the weights as the program reads them, and the optimiser's state;
    gradients count whole from the first step on, as they are accumulated in place. `functions` says what there is at the fullest
    point of each function.
    """
    held = [*buckets(module, weights_of(module)).values()]
    gradients, kept, weights = (sum(bucket[key] for bucket in held) for key in ("gradient_bytes", "state_parameters", "weight_bytes"))
    line = timeline(module)
    series = {kind: line.series(kind) for kind in KINDS}
    states = {"master": MASTER * kept, "moments": MOMENTS * kept}
    most, at = line.peak(*ACTIVATIONS)
    return {
        "trained_parameters": gradients // GRADIENT,
        "state_bytes": states,
        "gradient_bytes": gradients,
        "peaks": {kind: max(values, default=0) for kind, values in series.items()},
        "step_peak_bytes": line.peak()[0],
        "activation_peak_bytes": most,
        "activation_peak_at": place(line, at),
        "total_bytes": weights + sum(states.values()) + gradients + line.peak("inputs", *ACTIVATIONS)[0],
        "functions": by_function(line, series),
    }


def place(line: Timeline, at: int) -> str:
    """A point in words."""
    point = line.points[at]
    return f"@{point.func.name}{f' ({point.prefix})' if point.prefix else ''} {point.op.id}"


def by_function(line: Timeline, series: Mapping[Kind, list[int]]) -> dict[str, dict[str, Any]]:
    """For each function that runs: where residuals and workspace are fullest, and what of each kind there is then."""
    fullest: dict[str, int] = {}
    for i, point in enumerate(line.points):
        best = fullest.setdefault(point.func.name, i)
        if line.activations[i] > line.activations[best]:
            fullest[point.func.name] = i
    return {name: {"at": place(line, i)} | {kind: series[kind][i] for kind in KINDS} for name, i in fullest.items()}


def describe_memory(module: Module) -> tuple[dict[str, Any], str]:
    """Weights, the state of training and live values by function, as JSON and as text."""
    value = memory(module)
    held = ", ".join(f"{size(number)} in {dtype}" for dtype, number in value["weights"].items()) or "none"
    whose = f" of stage {value['fullest_stage']}" if "stages" in value else ""
    fullest = f"{whose}, the fullest of {len(value['stages'])}" if whose else ""
    lines = [f"weights  {size(value['weight_bytes'])} ({held}){fullest}", f"inputs   {size(value['input_bytes'])}"]
    lines += [*_bucket_lines(value["buckets"], whose), ""] if ATTRIBUTE in module.attributes else []
    lines += [*_stage_lines(value["stages"]), ""] if "stages" in value else []
    if "training" in value:
        return value, "\n".join([*lines, *_training_lines(value["training"])])
    rows = [(f"@{name}", f"{f['ops']:,}", size(f["peak_bytes"]), f["at"]) for name, f in value["functions"].items()]
    lines += [
        f"results  {size(value['output_bytes'])}",
        f"in all   {size(value['total_bytes'])} (weights{whose}, inputs, and the peak of @{module.main.name})",
        "",
        table(("function", "ops", "peak of live values", "reached at"), rows),
    ]
    return value, "\n".join(lines)


def _bucket_lines(found: Mapping[str, Mapping[str, int]], whose: str) -> list[str]:
    """What a rank of a mesh holds, bucket by bucket; of a program without gradients the weights alone."""
    rows = {BUCKETS[key]: bucket for key, bucket in found.items() if bucket["weight_bytes"]}
    rows["in all"] = {key: sum(bucket[key] for bucket in found.values()) for key in next(iter(found.values()))}
    heads: tuple[str, ...] = (f"on each rank{whose}", "parameters", "weights")
    cells = [[name, count(b["parameters"]), size(b["weight_bytes"])] for name, b in rows.items()]
    if rows["in all"]["gradient_bytes"]:
        heads = (*heads, "gradients", "optimiser", "of its share", "together")
        for cell, b in zip(cells, rows.values(), strict=True):
            share = b["gradient_bytes"] / GRADIENT / max(1, b["state_parameters"])
            of = f"1/{share:.4g}" if share > 1 else "all"
            cell += [size(b["gradient_bytes"]), size(b["state_bytes"]), of, size(sum(b[k] for k in b if k.endswith("bytes")))]
    return ["", table(heads, cells)]


def _stage_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a rank holds of each stage, all buckets together."""
    keys = ("weight_bytes", "gradient_bytes", "state_bytes")
    rows = []
    for one in found:
        sums = {key: sum(bucket[key] for bucket in one["buckets"].values()) for key in ("parameters", *keys)}
        held = (size(sums[key]) for key in keys)
        rows.append((str(one["stage"]), count(sums["parameters"]), *held, size(one["together_bytes"]), size(one["residual_bytes"])))
    return [table(("stage", "parameters", "weights", "gradients", "optimiser", "together", "residuals of a micro-batch"), rows)]


def _training_lines(found: Mapping[str, Any]) -> list[str]:
    states = found["state_bytes"]
    rows = [
        (f"@{name}", *(size(f[kind]) for kind in ("residuals", "workspace", "gradients")), f["at"].partition(" ")[2])
        for name, f in found["functions"].items()
    ]
    peaks = found["peaks"]
    return [
        f"state    {size(sum(states.values()))} ({size(states['master'])} FP32 weights, {size(states['moments'])} BF16 moments)",
        f"gradients {size(found['gradient_bytes'])} in FP32",
        f"step     {size(found['activation_peak_bytes'])} of residuals and workspace at once, at {found['activation_peak_at']}",
        f"         (residuals alone {size(peaks['residuals'])}, workspace alone {size(peaks['workspace'])})",
        f"in all   {size(found['total_bytes'])}",
        "",
        "Residuals and workspace where they are fullest in each function:",
        table(("function", "residuals", "workspace", "gradients", "at"), rows, left=1),
    ]


def plot_memory(module: Module, file: Path) -> None:
    """Draw live bytes over the points of a run, by kind, one upon another, forward and backward told apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    line = timeline(module)
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    points = range(len(line.points))
    heights = [[b / 1e9 for b in line.series(kind)] for kind in KINDS]
    axes.stackplot(points, *heights, labels=KINDS, colors=("#bbbbbb", "#4477aa", "#ee6677", "#ccbb44"), step="post")
    turn = next((i for i, p in enumerate(line.points) if p.op.phase is not Phase.F), None)
    if turn is not None:
        axes.axvline(turn, color="black", linewidth=0.8, linestyle=":", label="backward begins")
    axes.set(xlabel="op, in order of execution", ylabel="live bytes [10$^9$]", xlim=(0, max(1, len(line.points) - 1)), ylim=(0, None))
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
