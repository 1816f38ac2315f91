"""torch.export of a module, and the exported program as ops of the IR."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from ..ir.core import Value
from ..ir.errors import DscError
from . import aten as _rules  # noqa: F401 - fills the table of rules
from .aten.graph import Leaf, has_rule, outputs_of, parameter, raising_line, refuse_shapes_of_data, source_line, unknown_ops
from .aten.rules import Emitter, type_of


def export(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """The module as a graph of aten ops over static shapes, all of which have a rule.

    Where an op has none, torch takes it apart if it knows how, and turns in-place writes into values. Raises DscError that lists the ops
    that remain, each with its source line.
    """
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(module, inputs, strict=False)
            refuse_shapes_of_data(program.graph_module)
            if unknown_ops(program.graph_module):
                program = _decomposed(program)
    except DscError:
        raise
    except Exception as error:  # whatever the module's own code, or torch on its behalf, raises
        (reason, *_) = str(error).strip().splitlines() or [""]
        line = raising_line(error)
        place = f", at {line}" if line else ""
        raise DscError(f"torch.export cannot trace {type(module).__name__}: {type(error).__name__}: {reason}{place}") from error
    if unknown := unknown_ops(program.graph_module):
        lines = dict.fromkeys(f"{node.target} has no counterpart in the IR, at {source_line(node)}" for node in unknown)
        raise DscError("\n".join(lines))
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch prints and logs the graph of what it cannot export; keep that from standard error, where one line is to say what is wrong.

    What else is written there, the module's own words among it, is shown once all went well.
    """
    said = io.StringIO()
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(said):
            yield
    finally:
        logging.disable(level)
    sys.stderr.write(said.getvalue())


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place ops, and with what has no rule taken apart where torch knows how."""
    known = {op: apart for op, apart in torch.export.default_decompositions().items() if not has_rule(str(op))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own classes
        made = program.run_decompositions(known)
    nodes = {node.name: node for node in made.graph.nodes}
    for spec in made.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            node = nodes[spec.arg.name]
            said = f"{spec.target} is changed in place, by {node.target} at {source_line(node)}"
            raise DscError(f"{said}; expected its new value to be returned")
    return made


def import_program(program: ExportedProgram, b: Emitter) -> list[Value]:
    """Emit the program into `b` and return its outputs, flattened. Its tensor inputs become parameters, in order."""
    nodes = {node.name: node for node in program.graph_module.graph.nodes if node.op == "placeholder"}
    leaves: dict[str, Leaf] = {}
    for spec in program.graph_signature.input_specs:
        value = nodes[spec.arg.name].meta.get("val")
        if isinstance(value, torch.Tensor):
            leaves[spec.arg.name] = _leaf(program, spec, value, b)
    return outputs_of(program.graph_module, leaves, b)


def _leaf(program: ExportedProgram, spec: InputSpec, value: torch.Tensor, b: Emitter) -> Leaf:
    name = str(spec.target)
    if spec.kind is InputKind.USER_INPUT:
        param = b.param(spec.arg.name, type_of(value))
        return Leaf(lambda _: param)
    if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
        return parameter(name, value)
    return Leaf(lambda b: b.data(program.constants[name], name), name.rpartition(".")[0])
