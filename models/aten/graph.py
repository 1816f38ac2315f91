"""The walk over an exported graph: every node through its rule, in order."""

from __future__ import annotations

import linecache
import operator
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ...ir.core import Builder, Func, Op, Value
from ...ir.errors import DscError
from ...ir.ops.control import Param
from ...ir.ops.elementwise import Add
from ...ir.types import Bundle
from . import complex_tensors
from .rules import TABLE, Complex, Emitter, hint_of, type_of

_NOISE = ("aten._assert_", "aten.sym_constrain_range")
_TORCH = str(Path(torch.__file__).parent)
_MODELS = str(Path(__file__).parents[1])


class Leaf:
    """What a placeholder of the graph stands for; the value is made when it is first read."""

    def __init__(self, make: Callable[[Emitter], Value], component: str = "", owner: str = "") -> None:
        self.make = make
        self.component = component
        self.owner = owner
        """For a weight, the last name of the module that holds it: what a product with it is called."""


def parameter(path: str, tensor: torch.Tensor) -> Leaf:
    """A weight by its name in the module's state dict."""
    parts = [part for part in path.split(".") if not part.isdigit()]
    if parts and parts[-1] in ("weight", "bias"):
        parts.pop()
    owner = parts[-1] if parts else ""
    return Leaf(lambda b: b.make(Param(path, (type_of(tensor),), names=(hint_of(path),))), path.rpartition(".")[0], owner)


def source_line(node: Node) -> str:
    """`file:line: code` of the user's line that the node comes from; frames inside torch do not count."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    return _line(*own[-1]) if own else "an unknown line"


def raising_line(error: Exception) -> str | None:
    """`file:line: code` of the last line of the user's that the error passed through; None where it passed through none."""
    frames = [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(error.__traceback__)]
    own = [frame for frame in frames if not frame[0].startswith((_TORCH, _MODELS, "<"))]
    return _line(*own[-1]) if own else None


def _line(file: str, line: str) -> str:
    code = linecache.getline(file, int(line)).strip()
    return f"{file}:{line}" + (f": {code}" if code else "")


def refuse_shapes_of_data(graph_module: GraphModule) -> None:
    """Raise DscError where the shape of a tensor is known only at run time, as that of `x[x > 0]` is."""
    for node in graph_module.graph.nodes:
        tensors = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, torch.Tensor)]
        if node.op == "call_function" and any(isinstance(size, torch.SymInt) for t in tensors for size in t.shape):
            raise DscError(f"{node.target} at {source_line(node)}: the shape of its result depends on the data, expected a static one")


def unknown_ops(graph_module: GraphModule) -> list[Node]:
    """The nodes that no rule translates. In-place ops have none: torch makes a graph of values out of what they write."""
    calls = (node for node in graph_module.graph.nodes if node.op == "call_function")
    return [node for node in calls if not (node.target is operator.getitem or has_rule(str(node.target)))]


def has_rule(name: str) -> bool:
    """Whether an op, by torch's full name, is translated, or means nothing."""
    return name in TABLE or name in complex_tensors.TABLE or name.startswith(_NOISE)


def outputs_of(graph_module: GraphModule, leaves: Mapping[str, Leaf], b: Emitter) -> list[Value]:
    """Emit the graph into `b` and return its outputs, flattened. `leaves` says what each placeholder stands for."""
    values: dict[Node, Any] = {}

    def read(node: Node) -> Any:
        if node not in values:  # a placeholder that is first read
            leaf = leaves[node.name]
            _at(b, leaf.component)
            values[node] = leaf.make(b)
        return values[node]

    for node in graph_module.graph.nodes:
        if node.op == "output":
            return [read(arg) for arg in tree_leaves(node.args[0]) if isinstance(arg, Node)]
        if node.op == "call_function" and not str(node.target).startswith(_NOISE):
            args, kwargs = map_arg(node.args, read), map_arg(node.kwargs, read)
            values[node] = args[0][args[1]] if node.target is operator.getitem else _translate(node, args, kwargs, leaves, b)
    raise TypeError("a graph without an output")


def _at(b: Emitter, path: str) -> None:
    """Let the ops that follow bear ids of the module at `path`."""
    clean = re.sub(r"@\d+", "", re.sub(r"[^A-Za-z0-9_.@]", "_", path))
    b.component = (clean if not clean[:1].isdigit() else f"{b.name}.{clean}") or b.name


def _translate(node: Node, args: Any, kwargs: Any, leaves: Mapping[str, Leaf], b: Emitter) -> Any:
    stack = node.meta.get("nn_module_stack") or {}
    _at(b, list(stack.values())[-1][0] if stack else "")
    b.out = node.meta["val"]
    first = len(b.ops)
    try:
        made = complex_tensors.apply(b, str(node.target), args, kwargs)
        _check(node, made)
    except DscError as error:
        raise DscError(f"{node.target} at {source_line(node)}: {error}") from None
    fresh = isinstance(made, Value) and made.owner in b.ops[first:]
    if fresh and len(node.all_input_nodes) > 1 and not isinstance(made.owner, Add):
        # a product with a weight is called after the module that holds the weight; a sum with one is no such thing
        owners = (leaves[arg.name].owner for arg in node.all_input_nodes if arg.name in leaves)
        made.name = next((owner for owner in owners if owner), made.name)
    return made


def _check(node: Node, made: Any) -> None:
    """A rule must give what torch gives: its result's type is compared with torch's."""
    found, expected = (x if isinstance(x, (list, tuple)) else (x,) for x in (made, node.meta["val"]))
    for value, tensor in zip(found, expected, strict=False):
        if isinstance(value, Complex) or (isinstance(value, Value) and isinstance(value.type, Bundle)):
            continue
        if value.type != type_of(tensor):
            raise TypeError(f"the rule of {node.target} gives {value.type}, torch {type_of(tensor)}")


def pruned(b: Builder, results: Iterable[Value], updates: Mapping[int, int] | None = None) -> Func:
    """The function without the ops that nothing reads, ids counted anew."""
    func = b.finish(tuple(results), updates)
    needed = set(func.results)
    kept: list[Op] = []
    for op in reversed(func.ops):
        if not needed.isdisjoint(op.results):
            needed.update(op.operands)
            kept.append(op)
    numbers: dict[str, int] = {}
    for op in reversed(kept):
        component = op.id.rpartition("#")[0]
        numbers[component] = numbers.get(component, 0) + 1
        object.__setattr__(op, "id", f"{component}#{numbers[component]}")  # it has entered no function that anyone saw
    return Func(func.name, func.params, tuple(reversed(kept)), func.results, func.updates)
