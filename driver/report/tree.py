"""The model as a tree: parameters of every module, what a rank holds of it and computes, equal layers as one entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ...ir.core import Func, Module, Phase
from ...ir.mesh import ATTRIBUTE
from ...ir.ops.control import Call
from ...ir.sharding import whole_weights
from ...ir.walk import join, parameters, walk, weights
from ..inspect import held_heading
from ..ui import count, size
from .html import Html, el, share

FORWARD, BACKWARD = 0, 1


@dataclass
class Node:
    """A module or a weight, with what is below it. `own` numbers are its own, the others are sums."""

    name: str
    kind: str = ""
    """Of a weight its type."""
    parameters: int = 0
    """Of the whole model, like `active`; `held` and `bytes` are a rank's."""
    active: int = 0
    held: int = 0
    bytes: int = 0
    own_flops: list[int] = field(default_factory=lambda: [0, 0])
    children: dict[str, Node] = field(default_factory=dict)

    def at(self, path: str) -> Node:
        """The node at a dotted path below this one, made where there is none."""
        node = self
        for word in path.split(".") if path else ():
            node = node.children.setdefault(word, Node(word))
        return node

    def sum(self) -> None:
        """Add up from the leaves."""
        for child in self.children.values():
            child.sum()
            self.parameters += child.parameters
            self.active += child.active
            self.held += child.held
            self.bytes += child.bytes
            self.own_flops = [a + b for a, b in zip(self.own_flops, child.own_flops, strict=True)]

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """Equal for modules that have equal parts; their names do not count."""
        parts = tuple((name, child.signature) for name, child in self.children.items())
        return self.kind, self.parameters, self.active, self.held, self.bytes, *self.own_flops, parts


def tree(module: Module) -> Node:
    """Weights at their names, and operations at the module that each op's id names."""
    root = Node(str(module.attributes.get("model", f"@{module.main.name}")))
    whole, own = parameters(module, whole_weights(module)), parameters(module)
    for name, tensor in weights(module).items():
        leaf = root.at(name)
        leaf.kind, leaf.bytes = str(tensor), tensor.bytes
        if name in whole:
            leaf.parameters, leaf.active, leaf.held = whole[name].total, whole[name].active, own[name].total
    known: dict[str, list[tuple[str, int, int]]] = {}
    functions = {_plain(func.name) for func in module.funcs}
    for prefix, func in _runs(module):
        if func.name not in known:
            known[func.name] = list(_flops(func, functions))
        for component, phase, flops in known[func.name]:
            root.at(join(prefix, component)).own_flops[phase] += flops
    root.sum()
    return root


def _runs(module: Module) -> Iterator[tuple[str, Func]]:
    """Every execution of every function, with the prefix of its weights' names."""
    yield "", module.main
    for prefix, _, op in walk(module):
        if isinstance(op, Call):
            yield join(prefix, op.weights), module[op.callee]


def _flops(func: Func, functions: set[str]) -> Iterator[tuple[str, int, int]]:
    """Component, direction and operations of the ops of a function; an op of no module below it belongs to the function itself."""
    found: dict[tuple[str, int], int] = {}
    for op in func.ops:
        if not isinstance(op, Call) and (flops := op.flops()):
            component = op.id.rpartition("#")[0]
            component = "" if component.split(".")[0] in functions else component
            key = component, FORWARD if op.phase is Phase.F else BACKWARD
            found[key] = found.get(key, 0) + flops
    for (component, phase), flops in found.items():
        yield component, phase, flops


def _plain(name: str) -> str:
    """`moe_layer` for `moe_layer_bwd`: ids keep the name of the function that was differentiated."""
    return name.removesuffix("_fwd").removesuffix("_bwd")


@dataclass(frozen=True)
class Columns:
    """Which numbers are shown, and the tree that shares are of."""

    root: Node
    sharded: bool
    backward: bool


def render(module: Module) -> Html:
    """The tree as elements that fold."""
    root = tree(module)
    shown = Columns(root, ATTRIBUTE in module.attributes, root.own_flops[BACKWARD] > 0)
    names = [
        "parameters",
        "",
        "active",
        *([held_heading(module)] if shown.sharded else []),
        "bytes",
    ]
    names += ["FLOPs forward", *(["FLOPs backward"] if shown.backward else [])]
    head = el("div", el("span", "module"), [el("span", name, class_="n") for name in names], class_="row head")
    return el("div", head, _item(root, shown), class_="tree", style=f"--columns:{len(names) - 2}")


def _item(node: Node, shown: Columns, times: int = 1, depth: int = 0, label: str = "") -> Html:
    name = el("span", label or node.name, el("small", f" {node.kind}") if node.kind else None, class_="name", style=f"--depth:{depth}")
    numbers = [
        _number(count(times * node.parameters), node.parameters, f"{times * node.parameters:,} parameters"),
        el("span", share(times * node.parameters / shown.root.parameters) if node.parameters else None),
        _number(count(times * node.active), node.active, f"{times * node.active:,} active parameters"),
        _number(count(times * node.held), node.held, f"{times * node.held:,} parameters") if shown.sharded else None,
        _number(size(times * node.bytes), node.bytes, f"{times * node.bytes:,} bytes"),
        *(_number(count(times * each), each, f"{times * each:,} operations") for each in node.own_flops[: 2 if shown.backward else 1]),
    ]
    if not node.children:
        return el("div", name, numbers, class_="row leaf")
    below = [_item(child, shown, times * more, depth + 1, title) for child, more, title in _groups(node)]
    return el("details", el("summary", name, numbers, class_="row"), below, open=depth < 2)


def _number(text: str, value: int, exact: str) -> Html:
    return el("span", text, class_="n", title=exact) if value else el("span", "–", class_="n none")


def _groups(node: Node) -> Iterator[tuple[Node, int, str]]:
    """The children, equal numbered ones that follow each other together: the first of them, how many, and what they are called."""
    waiting: list[Node] = []
    for child in (*node.children.values(), None):
        if waiting and (child is None or not child.name.isdigit() or child.signature != waiting[0].signature):
            many = len(waiting) > 1
            yield waiting[0], len(waiting), f"{waiting[0].name} – {waiting[-1].name}  ({len(waiting)} alike)" if many else waiting[0].name
            waiting = []
        if child is not None:
            if child.name.isdigit():
                waiting.append(child)
            else:
                yield child, 1, child.name
