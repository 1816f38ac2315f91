"""`export`: a module as an ONNX model, in one of three profiles.

    standard    calls are entered; each op of dsc is a call of a function `ai.dsc::name`, whose body is standard ops
    ort         standard ops only; inputs and results in BF16 or FP8 are float32 instead, for ONNX Runtime's Python takes no others
    compact     a function of the program is a function of the model, `ai.dsc.model::name`, with the layer's weights as arguments

What the three compute is the same, node for node. ONNX Runtime and the reference evaluator run the first two as they are; of the third
ONNX Runtime wants `onnx.inliner.inline_local_functions` first where FP8 goes from function to function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import onnx_ir as ir

from ...ir.core import Func, Module, Op
from ...ir.core import Value as DscValue
from ...ir.errors import DscError, require
from ...ir.ops.control import Call, Constant, Pack, Param, Unpack
from ...ir.printer import print_attribute
from ...ir.types import DType, Tensor
from ...ir.walk import join
from . import ops_elementwise, ops_linalg, ops_loss, ops_moe, ops_norm, ops_quant, ops_reduce, ops_shape  # noqa: F401 - they fill MAPPINGS
from .emit import TYPES, Emitter, Stack, Tree, Value, flat, fresh
from .registry import Unmapped, reason_against

OPS, FUNCTIONS, OPAQUE = "ai.dsc", "ai.dsc.model", "ai.dsc.opaque"
OPSETS = range(23, 27)
"""From the first that has Attention, RMSNormalization and RotaryEmbedding to the last that ONNX Runtime loads."""
OPSET = 24
IR_VERSION = 11
NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E8M0)


@dataclass(frozen=True)
class Profile:
    """What stays a function."""

    calls: bool
    ops: bool
    wide: bool
    """Whether inputs and results in BF16 or FP8 are float32 instead."""
    runs: str
    """Which runtimes take the model as it is."""


PROFILES = {
    "standard": Profile(False, True, False, "onnx.reference and ONNX Runtime"),
    "ort": Profile(False, False, True, "onnx.reference and ONNX Runtime"),
    "compact": Profile(True, True, False, "onnx.reference; ONNX Runtime where no FP8 goes from function to function, else after inlining"),
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie: in a file beside the model, or below it."""

    name: str
    file: PurePosixPath
    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: DType | None = None
    """Of a float that is stored in another dtype than the program reads: the model casts it."""


Place = Callable[[str, Tensor], Sequence[Stored] | None]
"""A weight's name and type -> where it is: whole, or one matrix after the other; None for an input of the model."""


def as_inputs(name: str, tensor: Tensor) -> None:
    """No weights: the model takes them as inputs."""


def export(
    module: Module,
    profile: str = "standard",
    *,
    place: Place = as_inputs,
    opset: int = OPSET,
    opaque: bool = False,
    outputs: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> ir.Model:
    """The module's first function as an ONNX model, named by its parameters and by `outputs`, a name for each tensor that it returns.

    With `opaque`, an op that has no mapping stays one of domain `ai.dsc.opaque`; without it `DscError` names every such op.
    """
    require(profile in PROFILES, f"unknown profile {profile!r}; expected one of {', '.join(PROFILES)}")
    needs = f"Attention, RMSNormalization and RotaryEmbedding need {OPSETS[0]}, ONNX Runtime loads {OPSETS[-1]} at most"
    require(opset in OPSETS, f"opset {opset}: expected {OPSETS[0]} to {OPSETS[-1]} ({needs})")
    made = _Export(module, PROFILES[profile], place, opset, opaque)
    return made.model(list(outputs), {"ai.dsc.profile": profile, "ai.dsc.stage": module.stage, **(metadata or {})})


Need = tuple[str, bool]
"""A weight, or a constant, that a function reads: its name there, and whether it is a constant."""


class _Export:
    """One export."""

    def __init__(self, module: Module, profile: Profile, place: Place, opset: int, opaque: bool) -> None:
        self.module = module
        self.profile = profile
        self.place = cache(place)
        self.opset = opset
        self.opaque = opaque
        self.functions: dict[Any, ir.Function] = {}
        self.names: Counter[str] = Counter()
        self.needs = cache(self._needs)
        self.casts = Emitter(opset)
        """Of weights that are stored in another float than the program reads; they stand before all else."""
        self.inputs: list[Value] = []
        self.initializers: list[Value] = []
        self.weights: dict[Need, Tree] = {}
        self.gaps: dict[tuple[str, str], list[str]] = {}

    def model(self, outputs: list[str], metadata: dict[str, str]) -> ir.Model:
        main, g = self.module.main, Emitter(self.opset)
        names = _unique(p.name for p in main.params)
        given = {p: fresh(p.type, name) for p, name in zip(main.params, names, strict=True)}
        self.inputs = flat(tuple(given.values()))
        if self.profile.wide:
            given = {p: self.from_float32(g, x) for p, x in given.items()}
        values = self.body(g, main, given, "", self.weight)
        if self.gaps:
            raise DscError("\n".join([f"no mapping to ONNX; --opaque leaves such an op as one of domain {OPAQUE}", *self.refusals()]))
        g.metadata = {}
        returned = [self.to_float32(g, values[v]) if self.profile.wide else values[v] for v in main.results]
        results = self.returned(g, returned, set(self.inputs))
        for value, name in zip(results, _flat_names(main, outputs, (*self.inputs, *self.initializers)), strict=True):
            value.name = name
        graph = ir.Graph(
            self.inputs,
            results,
            nodes=[*self.casts.nodes, *g.nodes],
            initializers=self.initializers,
            opset_imports=self.imports(),
            name=main.name,
        )
        metadata |= {f"ai.dsc.{key}": str(value) for key, value in self.module.attributes.items()}
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="dsc", functions=list(self.functions.values()), metadata_props=metadata)

    def from_float32(self, g: Emitter, tree: Tree) -> Tree:
        """Inputs in their own types, of which the narrow ones come as float32."""
        if isinstance(tree, tuple):
            return tuple(self.from_float32(g, x) for x in tree)
        if tree.dtype not in NARROW:
            return tree
        to, tree.type = tree.dtype, ir.TensorType(ir.DataType.FLOAT)
        return _like(g.Cast(tree, to=to.value, **({} if to is ir.DataType.BFLOAT16 else {"saturate": 0})), tree, to)

    def to_float32(self, g: Emitter, tree: Tree) -> Tree:
        """Results, the narrow ones as float32."""
        if isinstance(tree, tuple):
            return tuple(self.to_float32(g, x) for x in tree)
        value = g.dense(tree)
        return _like(g.Cast(value, to=1), value, ir.DataType.FLOAT) if value.dtype in NARROW else value

    def refusals(self) -> Iterator[str]:
        """A line for each op that has no mapping, and each reason."""
        for (name, why), (first, *rest) in self.gaps.items():
            yield f"  {name} ({first}{f' and {len(rest)} more' if rest else ''}): {why}"

    def imports(self) -> dict[str, int]:
        return {"": self.opset, OPS: 1, FUNCTIONS: 1, **({OPAQUE: 1} if self.opaque else {})}

    def returned(self, g: Emitter, trees: Sequence[Tree], inputs: set[Value]) -> list[Value]:
        """The results as values that nodes of `g` made, each once."""
        taken, found = set(inputs), []
        for tree in trees:
            for value in flat(g.dense(tree) if isinstance(tree, Stack) else tree):
                own = value if value.producer() is not None and value not in taken else _like(g.Identity(value), value)
                taken.add(own)
                found.append(own)
        return found

    # ---- weights

    def _needs(self, func: Func) -> dict[Need, Tensor]:
        """What `func` and the functions that it calls read, by the names that `func` knows them under."""
        found: dict[Need, Tensor] = {}
        for op in func.ops:
            if isinstance(op, Param | Constant):
                found.setdefault((op.path, isinstance(op, Constant)), op.result.tensor)
            elif isinstance(op, Call):
                for (path, constant), tensor in self.needs(self.module[op.callee]).items():
                    found.setdefault((path if constant else join(op.weights, path), constant), tensor)
        return found

    def weight(self, need: Need, tensor: Tensor) -> Tree:
        """A weight or constant of the model, an initialiser or an input."""
        if need in self.weights:
            return self.weights[need]
        name, constant = need
        if constant:
            require(name in self.module.constants, f"the module has no constant {name!r}")
            value: Tree = fresh(tensor, name)
            value.const_value = ir.tensor(self.module.constants[name], name=name)
            self.initializers.append(value)
        elif (stored := self.place(name, tensor)) is None:
            value = fresh(tensor, name)
            self.inputs.append(value)
        else:
            whole = len(stored) == 1 and stored[0].shape == tensor.shape
            held = stored[0].dtype or tensor.dtype
            value = fresh(Tensor(held, tensor.shape), name, stacked=0 if whole else len(stored))
            for part, at in zip(flat(value), stored, strict=True):
                part.name = part.name if whole else at.name
                part.const_value = ir.ExternalTensor(
                    str(at.file), at.offset, at.length, TYPES[held], shape=ir.Shape(at.shape), name=part.name or at.name
                )
                self.initializers.append(part)
            if held is not tensor.dtype:
                value = _like(self.casts.cast(value, tensor.dtype), fresh(tensor))
                value.name = f"{name} as {tensor.dtype}"
        self.weights[need] = value
        return value

    # ---- functions

    def body(
        self, g: Emitter, func: Func, values: dict[DscValue, Tree], prefix: str, weight: Callable[[Need, Tensor], Tree]
    ) -> dict[DscValue, Tree]:
        """Write the ops of `func`; `prefix` is put before the names of weights and the ids of ops."""
        for op in func.ops:
            operands = [values[v] for v in op.operands]
            if isinstance(op, Param | Constant):
                constant = isinstance(op, Constant)
                results: Sequence[Tree] = [weight((op.path if constant else join(prefix, op.path), constant), op.result.tensor)]
            elif isinstance(op, Pack):
                results = [tuple(operands)]
            elif isinstance(op, Unpack):
                results = operands[0]
            elif isinstance(op, Call):
                results = self.call(g, op, operands, prefix, weight)
            else:
                site = join(prefix, op.id)
                g.metadata = {"ai.dsc.op": op.id, "ai.dsc.module": site.rpartition("#")[0], "ai.dsc.phase": op.phase.name}
                results = self.op(g, op, operands, f"@{func.name} {site}")
                self.name(op, results, site)
            values.update(zip(op.results, results, strict=True))
        return values

    def name(self, op: Op, results: Sequence[Tree], site: str) -> None:
        """Name what an op gives after where it stands, and say its type, which shape inference does not find through calls."""
        for i, (value, tree) in enumerate(zip(op.results, results, strict=True)):
            made = flat(tree)
            for j, (x, like) in enumerate(zip(made, flat(fresh(value.type)), strict=True)):
                if x.name is None:
                    name = ".".join([site, *([str(i)] if len(results) > 1 else []), *([str(j)] if len(made) > 1 else [])])
                    self.names[name] += 1
                    x.name = name if self.names[name] == 1 else f"{name}~{self.names[name]}"
                    x.type, x.shape = like.type, like.shape

    def call(self, g: Emitter, op: Call, operands: list[Tree], prefix: str, weight: Callable[[Need, Tensor], Tree]) -> Sequence[Tree]:
        callee, inner = self.module[op.callee], join(prefix, op.weights)
        if not self.profile.calls:
            values = self.body(g, callee, dict(zip(callee.params, operands, strict=True)), inner, weight)
            return [values[v] for v in callee.results]
        needs = self.needs(callee)
        given = [weight((path if constant else join(inner, path), constant), tensor) for (path, constant), tensor in needs.items()]
        stacks = tuple(len(x.parts) if isinstance(x, Stack) else 0 for x in given)
        key = callee.name, stacks
        if key not in self.functions:
            names = _unique([*(p.name for p in callee.params), *(path for path, _ in needs)])
            params = {p: fresh(p.type, names.pop(0)) for p in callee.params}
            named = {need: fresh(t, names.pop(0), stacked=n) for (need, t), n in zip(needs.items(), stacks, strict=True)}
            inside, outside = Emitter(self.opset), self.names
            self.names = Counter()
            values = self.body(inside, callee, dict(params), "", lambda need, tensor: named[need])
            self.names = outside
            inputs = flat((*params.values(), *named.values()))
            self.functions[key] = self.function(FUNCTIONS, callee.name, inside, inputs, [values[v] for v in callee.results])
        return self.called(g, self.functions[key], op, [*operands, *given], f"{inner or callee.name}")

    def function(self, domain: str, name: str, g: Emitter, inputs: list[Value], results: Sequence[Tree]) -> ir.Function:
        used = {f.name for f in self.functions.values() if f.domain == domain}
        number = 2
        unique = name
        while unique in used:
            unique, number = f"{name}_{number}", number + 1
        outputs = self.returned(g, results, set(inputs))
        graph = ir.Graph(inputs, outputs, nodes=g.nodes, opset_imports=self.imports(), name=unique)
        return ir.Function(domain, unique, graph=graph, attributes=())

    def called(self, g: Emitter, function: ir.Function, op: Op, operands: Sequence[Tree], name: str) -> Sequence[Tree]:
        """A node that calls `function`, and its outputs as the results of `op`."""
        results = [fresh(v.type) for v in op.results]
        outputs = flat(tuple(results))
        node = ir.Node(function.domain, function.name, flat(tuple(operands)), outputs=outputs, metadata_props=dict(g.metadata))
        g.nodes.append(node)
        if isinstance(op, Call):
            self.name(op, results, name)
        return results

    # ---- ops

    def op(self, g: Emitter, op: Op, operands: list[Tree], site: str) -> Sequence[Tree]:
        try:
            if why := reason_against(op):
                raise Unmapped(why)
            return self.as_function(g, op, operands) if self.profile.ops else g.lower(op, operands)
        except DscError as gap:
            if not self.opaque:
                self.gaps.setdefault((op.name, str(gap)), []).append(site)
            return self.left_opaque(g, op, operands)

    def as_function(self, g: Emitter, op: Op, operands: list[Tree]) -> Sequence[Tree]:
        stacks = tuple(len(x.parts) if isinstance(x, Stack) else 0 for x in operands)
        key = op.name, repr(op.attributes), tuple(str(v.type) for v in op.operands), stacks, _shared(op)
        if key not in self.functions:
            inside = Emitter(self.opset)
            inputs = [fresh(v.type, f"x{i}", stacked=n) for i, (v, n) in enumerate(zip(op.operands, stacks, strict=True))]
            results = inside.lower(op, inputs)
            self.functions[key] = self.function(OPS, op.name, inside, flat(tuple(inputs)), results)
        return self.called(g, self.functions[key], op, operands, "")

    def left_opaque(self, g: Emitter, op: Op, operands: list[Tree]) -> Sequence[Tree]:
        """A node of domain `ai.dsc.opaque` with the op's attributes, those that ONNX has no type for as they are printed."""
        given = {k: v for k, v in op.attributes.items() if v is not None}
        attributes = {k: v if isinstance(v, int | float | str) else print_attribute(v) for k, v in given.items()}
        results = [fresh(v.type) for v in op.results]
        made = [ir.Attr(k, _attribute_type(v), int(v) if isinstance(v, bool) else v) for k, v in attributes.items()]
        inputs = flat(tuple(g.dense(x) if isinstance(x, Stack) else x for x in operands))
        g.nodes.append(ir.Node(OPAQUE, op.name, inputs, made, outputs=flat(tuple(results)), metadata_props=dict(g.metadata)))
        return results


def _attribute_type(value: object) -> ir.AttributeType:
    return {float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}.get(type(value), ir.AttributeType.INT)


def _shared(op: Op) -> tuple[int, ...]:
    """Which operands are the same value: absent optional ones and those given twice make another function."""
    first: dict[DscValue, int] = {}
    declared = tuple(getattr(op, a.name) is None for a in op.arguments)
    return *(first.setdefault(v, i) for i, v in enumerate(op.operands)), *declared


def _like(x: Value, other: Value, dtype: ir.DataType | None = None) -> Value:
    """`x` declared as `other` is, or of another element type."""
    x.type, x.shape = ir.TensorType(dtype) if dtype else other.type, other.shape
    return x


def _flat_names(main: Func, given: Sequence[str], taken: Sequence[Value]) -> list[str]:
    """A name for each value that the model returns, none of which an input or a weight has."""
    names = list(given) or [
        f"{v.name}.{i}" if len(values) > 1 else v.name for v in main.results for values in [flat(fresh(v.type))] for i in range(len(values))
    ]
    return _unique([*(v.name or "" for v in taken), *names])[len(taken) :]


def _unique(names: Iterable[str]) -> list[str]:
    """The names, one that stands again with a number behind it."""
    found: dict[str, None] = {}
    for name in names:
        own, number = name, 2
        while own in found:
            own, number = f"{name}~{number}", number + 1
        found[own] = None
    return list(found)
