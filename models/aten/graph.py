"""The walk over an exported graph: every node through its rule, in order, with torch's in-place writes turned into values.

A tensor that some op of the graph writes to may have several names (views). Each name remembers the one it views; a write
makes a new value for the written name, puts it back into the viewed ones up to the tensor itself, and every other view is
derived anew when it is next read. Graphs without in-place ops pay nothing for this.
"""

from __future__ import annotations

import linecache
import operator
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload
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
from .shape import RESHAPES, joined, permuted, reshaped, select_scatter, slice_scatter, swapped

_NOISE = ("aten._assert_", "aten.sym_constrain_range")
_SAME = ("aten.alias.", "aten.detach.", "aten.to.", "aten.contiguous.", "aten.type_as.", "aten.view_as.", "aten.expand.")
_TORCH = str(Path(torch.__file__).parent)
_MODELS = str(Path(__file__).parents[1])


def outputs_of(graph_module: GraphModule, leaves: Mapping[str, Leaf], b: Emitter) -> list[Value]:
    """Emit the graph into `b` and return its outputs, flattened. `leaves` says what each placeholder stands for."""
    return _Walk(graph_module, leaves, b).run()


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
        if node.op == "call_function" and any(isinstance(size, torch.SymInt) for t in _tensors(node) for size in t.shape):
            raise DscError(f"{node.target} at {source_line(node)}: the shape of its result depends on the data, expected a static one")


def unknown_ops(graph_module: GraphModule) -> list[Node]:
    """The nodes that no rule translates."""
    return [node for node in graph_module.graph.nodes if node.op == "call_function" and not _known(node)]


def _known(node: Node) -> bool:
    name = str(node.target)
    return node.target is operator.getitem or name.startswith(_NOISE) or _rule_name(node) in TABLE or name in complex_tensors.TABLE


def _rule_name(node: Node) -> str:
    """The rule's key: an in-place op has that of its functional form."""
    name = str(node.target)
    if not _in_place(node):
        return name
    namespace, packet, overload = name.split(".")
    return f"{namespace}.{packet.removesuffix('_')}.{overload}"


def _in_place(node: Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and target._schema.is_mutable and target._schema.name.endswith("_")


def _writes(node: Node) -> bool:
    """Whether the op changes the numbers of its first operand, rather than only how it is viewed (`detach_`, `t_`)."""
    return _in_place(node) and torch.Tag.inplace_view not in getattr(node.target, "tags", ())


def _target(node: Node) -> Node:
    """What an in-place op writes to."""
    target = node.args[0]
    if not isinstance(target, Node):
        raise TypeError(f"{node.target} writes to {target}")
    return target


def _tensors(node: Node) -> list[torch.Tensor]:
    """The fake tensors that a node yields."""
    return [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, torch.Tensor)]


def _storage(node: Any) -> int | None:
    """The identity of the memory that a node's (first fake) tensor lies in: views share it."""
    found = _tensors(node) if isinstance(node, Node) else []
    return found[0].untyped_storage()._cdata if found else None


class _Walk:
    def __init__(self, graph_module: GraphModule, leaves: Mapping[str, Leaf], b: Emitter) -> None:
        self.nodes: Sequence[Node] = list(graph_module.graph.nodes)
        self.leaves = leaves
        self.b = b
        self.values: dict[Node, Any] = {}
        self.written = {_storage(node.args[0]) for node in self.nodes if node.op == "call_function" and _writes(node)} - {None}
        self.viewed: dict[Node, Node] = {}
        self.versions = dict.fromkeys(self.written, 0)
        self.seen: dict[Node, int] = {}

    def run(self) -> list[Value]:
        for node in self.nodes:
            if node.op == "output":
                flat = tree_leaves(node.args[0])
                return [self.read(arg) for arg in flat if isinstance(arg, Node)]
            if node.op == "placeholder":
                if _storage(node) in self.written:
                    raise DscError(f"{node.name} is changed in place, {self._write_to(node)}; expected its new value to be returned")
            elif not str(node.target).startswith(_NOISE):
                self._visit(node)
        raise TypeError("a graph without an output")

    def _write_to(self, root: Node) -> str:
        (first, *_) = (
            node for node in self.nodes if node.op == "call_function" and _writes(node) and _storage(node.args[0]) == _storage(root)
        )
        return f"by {first.target} at {source_line(first)}"

    def read(self, node: Node) -> Any:
        """The node's current value."""
        if node.op == "placeholder" and node not in self.values:
            leaf = self.leaves[node.name]
            self._at(leaf.component)
            self.values[node] = leaf.make(self.b)
        elif node in self.viewed and self.seen[node] != self.versions[_storage(node)]:
            self._apply(node)
        return self.values[node]

    def _visit(self, node: Node) -> None:
        memory = _storage(node)
        if memory in self.written:
            self.seen[node] = -1
            inputs = [arg for arg in node.all_input_nodes if _storage(arg) == memory]
            if _writes(node) or inputs:
                self.viewed[node] = _target(node) if _writes(node) else inputs[0]
        if _writes(node):
            self._write(_target(node), self._translate(node))
        if node in self.viewed:
            self.read(node)
        else:
            self._apply(node)

    def _apply(self, node: Node) -> None:
        """Compute a node from its operands; a name that an in-place op gives is just another one for what it wrote."""
        self.values[node] = self.read(self.viewed[node]) if _writes(node) else self._translate(node)
        if node in self.viewed:
            self.seen[node] = self.versions[_storage(node)]

    def _write(self, node: Node, value: Any) -> None:
        chain = [node]
        while chain[-1] in self.viewed:
            chain.append(self.viewed[chain[-1]])
        old = [self.read(name) for name in chain]
        memory = _storage(node)
        self.versions[memory] += 1
        self.values[node], self.seen[node] = value, self.versions[memory]
        for inner, outer, before in zip(chain, chain[1:], old[1:], strict=False):
            value = self._put_back(inner, before, value)
            self.values[outer], self.seen[outer] = value, self.versions[memory]

    def _put_back(self, view: Node, whole: Any, value: Any) -> Any:
        """`whole` with `value` where the view looks at it."""
        name = _rule_name(view)
        args: list[Any] = list(view.args[1:])
        self.b.out = None
        if view.target is operator.getitem:
            return tuple(value if i == args[0] else part for i, part in enumerate(whole))
        if _writes(view) or (name.startswith(_SAME) and value.type == whole.type):
            return value
        if name == "aten.slice.Tensor":
            return slice_scatter(self.b, whole, value, *args)
        if name == "aten.select.int":
            return select_scatter(self.b, whole, value, *args)
        if name.removeprefix("aten.").removesuffix(".default") in RESHAPES:
            return reshaped(self.b, value, whole.shape)
        if name in ("aten.transpose.int", "aten.t.default"):
            return swapped(self.b, value, *(args or (-2, -1)))
        if name == "aten.permute.default":
            return permuted(self.b, value, sorted(range(len(args[0])), key=lambda i: args[0][i] % len(args[0])))
        if isinstance(value, tuple) and name.startswith(("aten.split", "aten.chunk")):
            axis: Any = args[1] if len(args) > 1 else view.kwargs.get("dim", 0)
            return joined(self.b, value, axis)
        raise DscError(f"writing in place through {view.target} is not supported, at {source_line(view)}")

    def _at(self, path: str) -> None:
        """Let the ops that follow bear ids of the module at `path`."""
        clean = re.sub(r"@\d+", "", re.sub(r"[^A-Za-z0-9_.@]", "_", path))
        self.b.component = (clean if not clean[:1].isdigit() else f"{self.b.name}.{clean}") or self.b.name

    def _translate(self, node: Node) -> Any:
        def value(arg: Node) -> Any:
            return self.read(arg)

        args: Any = map_arg(node.args, value)
        kwargs: Any = map_arg(node.kwargs, value)
        if node.target is operator.getitem:
            return args[0][args[1]]
        stack = node.meta.get("nn_module_stack") or {}
        self._at(list(stack.values())[-1][0] if stack else "")
        self.b.out = node.meta["val"]
        first = len(self.b.ops)
        try:
            made = complex_tensors.apply(self.b, str(node.target), _rule_name(node), args, kwargs)
            if _writes(node):
                made = self.b.stretch(self.b.cast(made, self.b.dtype), self.b.shape)
            self._check(node, made)
        except DscError as error:
            raise DscError(f"{node.target} at {source_line(node)}: {error}") from None
        self._name(node, made, first)
        return made

    def _check(self, node: Node, made: Any) -> None:
        """A rule must give what torch gives: its result's type is compared with torch's."""
        found, expected = (x if isinstance(x, (list, tuple)) else (x,) for x in (made, node.meta["val"]))
        for value, tensor in zip(found, expected, strict=False):
            if isinstance(value, Complex) or (isinstance(value, Value) and isinstance(value.type, Bundle)):
                continue
            if value.type != type_of(tensor):
                raise TypeError(f"the rule of {node.target} gives {value.type}, torch {type_of(tensor)}")

    def _name(self, node: Node, made: Any, first: int) -> None:
        """Call a product with a weight after the module that holds the weight; a sum with one is no such thing."""
        fresh = isinstance(made, Value) and made.owner in self.b.ops[first:]
        if fresh and len(node.all_input_nodes) > 1 and not isinstance(made.owner, Add):
            owners = (self.leaves[arg.name].owner for arg in node.all_input_nodes if arg.name in self.leaves)
            made.name = next((owner for owner in owners if owner), made.name)


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
