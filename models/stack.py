"""A stack of blocks as functions and calls: each distinct block is exported once."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node, Tracer
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ..ir.core import Func, Symbol, Value
from ..ir.ops.control import Call
from ..ir.types import Tensor
from .aten.graph import pruned
from .aten.rules import TORCH, Emitter, ints, type_of
from .exported import export, import_program


class _StackTracer(Tracer):
    """Records the calls of blocks and looks into nothing else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return getattr(m, "is_block", False)


def trace_stack(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: Iterable[str]
) -> tuple[Func, tuple[Func, ...], dict[str, Any]]:
    """The function `main` that calls the blocks, the functions of the distinct blocks, and the module's constants.

    `inputs` and `outputs` name the parameters and results of `main`; a name in both is state, and `main` says that the result updates it.
    """
    graph = _StackTracer().trace(model)
    b = Emitter("main")
    given = [b.param(name, type_of(tensor)) for name, tensor in inputs.items()]
    blocks = _Blocks()
    values: dict[Node, Any] = {}
    rest = iter(given)
    results: list[Value] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = tuple(rest) if str(node.target).startswith("*") else next(rest)
        elif node.op == "call_module":
            block = model.get_submodule(str(node.target))
            values[node] = blocks.call(b, block, str(node.target), map_arg(node.args, values.__getitem__))
        elif node.target is operator.getitem:
            values[node] = map_arg(node.args[0], values.__getitem__)[node.args[1]]
        elif node.op == "output":
            results = tree_leaves(map_arg(node.args[0], values.__getitem__))
        else:
            raise TypeError(f"the stack of {type(model).__name__} does more than call blocks: {node.format_node()}")
    names = list(outputs)
    for name, value in zip(names, results, strict=True):
        value.name = f"new_{name}" if name in inputs else name
    updates = {i: names.index(name) for i, name in enumerate(inputs) if name in names}
    return pruned(b, results, updates), tuple(blocks.funcs), blocks.constants


class _Blocks:
    """The functions of the blocks seen so far."""

    def __init__(self) -> None:
        self.funcs: list[Func] = []
        self.constants: dict[str, Any] = {}
        self._known: dict[Any, tuple[Func, bool]] = {}
        self._names: dict[str, int] = {}

    def call(self, b: Emitter, block: nn.Module, path: str, args: tuple[Any, ...]) -> Value | tuple[Value, ...]:
        """Call the block's function with the weights at `path`."""
        given: list[Value] = tree_leaves(args)
        key = _fingerprint(block), tuple(v.type for v in given)
        if key not in self._known:
            self._known[key] = self._make(block, [v.tensor for v in given])
        func, several = self._known[key]
        b.component = path
        call = b.emit(Call(Symbol(func.name), tuple(given), tuple(r.type for r in func.results), path, names=_result_names(func, path)))
        return call.results if several else call.result

    def _make(self, block: nn.Module, types: list[Tensor]) -> tuple[Func, bool]:
        inputs = tuple(torch.empty(ints(t.shape), dtype=TORCH[t.dtype], device="meta") for t in types)
        program = export(block, inputs)
        b = Emitter(self._name(type(block).__name__))
        func = pruned(b, import_program(program, b))
        self.funcs.append(func)
        self.constants |= b.constants
        return func, not program.call_spec.out_spec.is_leaf()

    def _name(self, class_name: str) -> str:
        words = class_name.replace("MoE", "Moe")
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", words).lower()
        count = self._names[snake] = self._names.get(snake, -1) + 1
        return f"{snake}_{count}" if count else snake


def _result_names(func: Func, path: str) -> tuple[str, ...]:
    """`embed_tokens`, or for the layer at model.layers.3 `layers_3`, `layers_3_counts`: the first result is what the layer passes on."""
    *_, parent, last = "", *path.split(".")
    block = f"{parent}_{last}" if last.isdigit() else last
    if len(func.results) == 1:
        return (block,)
    names = tuple(r.name for r in func.results)
    return (block, *(f"{block}_{name}" for name in names[1:])) if last.isdigit() else names


def _fingerprint(module: nn.Module) -> Any:
    """What two blocks share exactly when they compute the same function of their inputs and of their weights."""
    state = tuple((key, _state(value)) for key, value in sorted(vars(module).items()) if not key.startswith("_"))
    parameters = tuple((name, p.dtype, p.shape) for name, p in module.named_parameters(recurse=False))
    buffers = tuple(_buffer(module, name, buffer) for name, buffer in module.named_buffers(recurse=False))
    children = tuple((name, _fingerprint(child)) for name, child in module.named_children())
    return type(module), state, parameters, buffers, children


def _state(value: Any) -> Any:
    """A plain value as itself; any other object only equals itself."""
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_state, value))
    return (type(value), value) if isinstance(value, (int, float, str, bool, type(None), torch.dtype)) else id(value)


def _buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> Any:
    persistent = name not in module._non_persistent_buffers_set
    numbers = None if persistent or buffer.is_meta else tuple(buffer.flatten().tolist())
    return name, buffer.dtype, buffer.shape, persistent, numbers
