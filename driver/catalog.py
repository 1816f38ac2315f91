"""What there is: ops with everything that implements them, passes with their options, shipped models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING
from importlib.util import find_spec
from typing import Any

from ..ir.core import OPS, Op
from ..ir.errors import require
from ..ir.explain import card, cards, markdown, place
from .ui import table


def facets() -> dict[str, Mapping[str, Any]]:
    """Who implements ops, and with what: consumer -> op name -> function."""
    from ..backends.numpy_ref import run  # noqa: F401 - fills the table
    from ..backends.numpy_ref.registry import REFERENCES
    from ..passes.vjp import VJPS

    tables: dict[str, Mapping[type[Op], Any]] = {"reference": REFERENCES, "derivative": VJPS}
    return {consumer: {cls.name: function for cls, function in table.items()} for consumer, table in tables.items()}


def triton_facets() -> dict[str, Mapping[str, Any]]:
    """What launches an op's kernel, one that is generated included, and the torch functions that run the other ops on a GPU; nothing where
    triton is not installed."""
    if find_spec("triton") is None:
        return {}
    from ..backends.triton.codegen import launch_of
    from ..backends.triton.expressions import ALONG_ROWS, EXPRESSIONS
    from ..backends.triton.kernels import KERNELS
    from ..backends.triton.torch_ops import TORCH

    generated = {cls.name: launch_of for cls in EXPRESSIONS | ALONG_ROWS}
    kernels = generated | {cls.name: launcher for cls, launcher in KERNELS.items()}
    return {"kernel": kernels, "torch": {cls.name: function for cls, function in TORCH.items()}}


def describe_ops() -> tuple[list[dict[str, Any]], str]:
    """Every op in a line, as JSON and as text."""
    rows = cards()
    value = [{**vars(c), "traits": list(c.traits)} for c in rows]
    return value, table(("op", "family", "meaning"), [(c.name, c.family, c.text.split("\n")[0]) for c in rows], left=3)


def describe_op(name: str) -> tuple[dict[str, Any], str]:
    """One op's card, as JSON and as text."""
    found = card(name)
    consumers = facets() | triton_facets()
    places = {"declared": found.place} | {consumer: place(table[name]) for consumer, table in consumers.items() if name in table}
    if found.fused:
        places["expand"] = place(OPS[name].expand)
    missing = [consumer for consumer, table in consumers.items() if name not in table]
    lines = [found.form, "", found.text, ""]
    if found.traits:
        lines.append(f"traits     {', '.join(found.traits)}")
    lines += [f"{what:<10} {where}" for what, where in places.items()]
    lines += [f"{what:<10} {_no_derivative(name) if what == 'derivative' else 'missing'}" for what in missing]
    return {**vars(found), "traits": list(found.traits), "places": places, "missing": missing}, "\n".join(lines)


def _no_derivative(name: str) -> str:
    from ..passes.vjp import MISSING, NOT_DIFFERENTIABLE

    reasons = {cls.name: reason for cls, reason in (NOT_DIFFERENTIABLE | MISSING).items()}
    return f"none: {reasons[name]}"


def ops_page() -> str:
    """docs/ops.md."""
    return markdown(facets())


def describe_passes() -> tuple[list[dict[str, Any]], str]:
    """Every pass with its options, as JSON and as text."""
    from ..passes.manager import PASSES

    value = [_pass(name) for name in sorted(PASSES)]
    rows = []
    for v in value:
        rows.append((v["name"], v["text"].split("\n")[0]))
        rows += [("", f"options: {_options(v)}")] if v["options"] else []
    return [{**v, "text": v["text"].split("\n")[0]} for v in value], table(("pass", "what it does"), rows, left=2)


def describe_pass(name: str) -> tuple[dict[str, Any], str]:
    """One pass: its rule, a program before and after it, and its options, as JSON and as text."""
    from ..passes.manager import PASSES, taken, unknown

    require(name in PASSES, unknown("pass", name, PASSES))
    value = _pass(name)
    lines = [value["text"], "", f"takes      a module {taken(PASSES[name])}", f"gives      {value['ensures'] or 'the same stage'}"]
    lines += [f"options    {_options(value)}"] if value["options"] else []
    return value, "\n".join([*lines, f"declared   {place(PASSES[name])}"])


def _pass(name: str) -> dict[str, Any]:
    from ..passes.manager import PASSES, options

    cls = PASSES[name]
    defaults = {key: None if f.default is MISSING else f.default for key, f in options(cls).items()}
    text = inspect.cleandoc(cls.__doc__ or "")
    return {"name": name, "options": defaults, "requires": cls.requires, "ensures": cls.ensures, "text": text}


def _options(described: Mapping[str, Any]) -> str:
    from ..ir.printer import print_attribute

    given = described["options"].items()
    return ", ".join(f"{key}={'...' if default is None else print_attribute(default)}" for key, default in given)


def describe_models() -> tuple[list[dict[str, Any]], str]:
    """The shipped models, as JSON and as text."""
    from ..models.config import load_config, shipped

    value = []
    for name in shipped():
        config = load_config(name, ())
        extra = config.to_dict()
        experts = extra.get("n_routed_experts") or 0
        value.append(
            {
                "name": name,
                "model_type": extra["model_type"],
                "layers": extra["num_hidden_layers"],
                "hidden": extra["hidden_size"],
                "heads": extra["num_attention_heads"],
                "experts": experts,
                "experts_per_token": extra.get("num_experts_per_tok") if experts else None,
                "vocabulary": extra["vocab_size"],
            }
        )
    rows = [[str(v if v is not None else "-") for v in row.values()] for row in value]
    return value, table(("model", "type", "layers", "hidden", "heads", "experts", "per token", "vocabulary"), rows, left=2)
