"""What a program is made of: parameters by part, ops by function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.core import Module
from ..ir.ops.control import Call, Param
from ..ir.stages import is_staged
from ..ir.walk import flops, parameters, walk
from .memory import weights_by_stage
from .run import result_names
from .ui import count, plural, size, table

PARTS: tuple[tuple[str, str], ...] = (
    ("embed_tokens", "embedding"),
    ("lm_head", "output head"),
    ("shared_experts", "shared experts"),
    ("mlp.experts", "routed experts"),
    ("mlp.gate.", "router"),
    ("eh_proj", "MTP projection"),
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("mlp.", "dense FFN"),
)
"""Which part of a model a weight belongs to: the first key that its name contains, in the Hugging Face naming."""


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the whole model, and of them what a rank holds, in elements and in bytes."""

    name: str
    total: int
    active: int
    held: int
    bytes: int


def parts(module: Module) -> list[Part]:
    """Parameters by part, the largest first. A weight that no rule knows goes to the first word of its name."""
    from ..ir.sharding import whole_weights
    from ..ir.walk import weights

    types, own = weights(module), parameters(module)
    found: dict[str, list[int]] = {}
    for name, counted in parameters(module, whole_weights(module)).items():
        part = next((part for key, part in PARTS if key in name), name.split(".")[0])
        sums = found.setdefault(part, [0, 0, 0, 0])
        for i, number in enumerate((counted.total, counted.active, own[name].total, types[name].bytes)):
            sums[i] += number
    return sorted((Part(name, *sums) for name, sums in found.items()), key=lambda p: -p.total)


def held_by_stage(module: Module) -> tuple[int, ...]:
    """Of a program that is cut into stages: parameters that a rank holds of each. What several stages read counts for each of them."""
    counted = parameters(module)
    return tuple(sum(counted[name].total for name in known if name in counted) for known in weights_by_stage(module))


def held_in_words(held: int, by_stage: Sequence[int]) -> str:
    """What a rank holds; of stages the least and the most."""
    if not by_stage:
        return f"{count(held)} on each rank"
    least, most = count(min(by_stage)), count(max(by_stage))
    return f"{least if least == most else f'{least} to {most}'} of each stage on a rank"


def held_heading(module: Module) -> str:
    """What stands over parameters that ranks hold, in a table of the whole model."""
    return "on a rank, all stages" if is_staged(module) else "on each rank"


def describe_parameters(module: Module) -> tuple[dict[str, Any], str]:
    """The parameter table, as JSON and as text."""
    rows = parts(module)
    total, active, held, bytes = (sum(getattr(p, key) for p in rows) for key in ("total", "active", "held", "bytes"))
    inner = active - sum(p.active for p in rows if p.name == "embedding")
    value = {
        "parts": [vars(p) for p in rows],
        "total": total,
        "active": active,
        "active_without_embedding": inner,
        "held": held,
        "bytes": bytes,
    }
    stages = held_by_stage(module) if is_staged(module) else ()
    if stages:
        value["held_by_stage"] = list(stages)
    every = [*rows, Part("total", total, active, held, bytes)]
    apart = f" ({count(inner)} without the input embedding)" if inner != active else ""
    summary = f"{count(total)} parameters, {count(active)} active per token{apart}"
    if held == total:
        cells = [(p.name, f"{p.total:,}", f"{p.active:,}", size(p.bytes)) for p in every]
        return value, f"{table(('part', 'parameters', 'active per token', 'bytes'), cells)}\n\n{summary}"
    ranked = [(p.name, f"{p.total:,}", f"{p.active:,}", f"{p.held:,}", size(p.bytes)) for p in every]
    heads = ("part", "parameters", "active per token", held_heading(module), "bytes there")
    return value, f"{table(heads, ranked)}\n\n{summary}; {held_in_words(held, stages)}"


def describe_program(module: Module) -> tuple[dict[str, Any], str]:
    """Stage, functions and what the program computes, as JSON and as text."""
    calls = Counter([module.main.name, *(str(op.callee) for _, _, op in walk(module) if isinstance(op, Call))])
    functions: list[dict[str, Any]] = [
        {
            "name": func.name,
            "calls": calls[func.name],
            "ops": len(func.ops),
            "weights": sum(isinstance(op, Param) for op in func.ops),
            "flops": flops(module, func),
            "parameters": [f"{p.name}: {p.type}" for p in func.params],
            "results": [str(r.type) for r in func.results],
        }
        for func in module.funcs
    ]
    attributes = {k: str(v) if isinstance(v, str) else v for k, v in module.attributes.items()}  # a bare word prints as text
    value = {"stage": module.stage, "attributes": attributes, "functions": functions}
    rows = [(f"@{f['name']}", f"{f['calls']:,}", f"{f['ops']:,}", f"{f['weights']:,}", count(f["flops"])) for f in functions]
    head = ", ".join(f"{k} {v}" for k, v in attributes.items() if isinstance(v, str | int | float))  # records are for programs
    main = module.main
    lines = [
        f"stage {module.stage}{f' ({head})' if head else ''}, {plural(sum(len(f.ops) for f in module.funcs), 'op')}",
        "",
        table(("function", "runs", "ops", "weights", "FLOPs"), rows),
        "",
        *(f"takes   %{p.name}: {p.type}" for p in main.params[:8]),
        *([f"        and {len(main.params) - 8} more"] if len(main.params) > 8 else []),
        *(f"returns %{name}: {r.type}" for name, r in list(zip(result_names(module), main.results, strict=True))[:8]),
        *([f"        and {len(main.results) - 8} more"] if len(main.results) > 8 else []),
    ]
    return value, "\n".join(lines)
