"""Reverse-mode differentiation: from a loss to the gradients of all weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..ir.core import Func, Module, Op, Phase, Symbol, Value
from ..ir.errors import DscError, require
from ..ir.gradients import ATTRIBUTE
from ..ir.ops.control import Call, Literal, Pack, Param, Unpack
from ..ir.ops.shape import Concat, Pad
from ..ir.types import Bundle, Tensor
from ..ir.walk import join
from .manager import Pass, register
from .outline import Packed, needed, outlined
from .rewrite import Replacements, unused
from .simplify import drop_unused, merge_functions, simplify_func
from .vjp import MISSING, NOT_DIFFERENTIABLE, VJPS, Backward


@register
@dataclass(frozen=True)
class Autodiff(Pass):
    """Append the backward pass: main returns the gradient of its first result by every weight on which it depends.

    The first result is the loss, a float scalar; the others are metrics and are not differentiated. A function on the way is called as
    `@f_fwd`, which returns f's results and then a bundle of residuals, and `@f_bwd` takes these residuals and the gradients of f's
    results, and gives the gradients of its inputs and then a bundle of those of its weights. Equal layers stay one function with calls.

    Residuals are what the rules in passes/vjp read and backward cannot have for nothing: it reads weights again, and repeats views and
    casts to a dtype that is no narrower. What routing decided is always a residual. Gradients of activations have the dtype of the
    activation, gradients of weights are float32. An op is of phase I where the gradient of an activation needs it, else W; with
    `split` the two phases are functions, `@f_bwd_input`, which ends with a bundle of what the other needs, and `@f_bwd_weight`.
    `ir/gradients.py` tells which results of main are the gradients of which weights.

    Before `autodiff`:

        func @main(%x: bf16[4, 8]) {
          %scale: bf16[8] = param("scale")                           @ main#1 F
          %h: bf16[4, 8] = mul(%x, %scale)                           @ main#2 F
          %y: bf16[4, 8] = call(@layer, [%h], weights="layers.0")    @ main#3 F
          %wide: f32[4, 8] = cast(%y, dtype=f32)                     @ main#4 F
          %loss: f32[] = mean(%wide, axes=[0, 1])                    @ main#5 F
          return %loss
        }

        func @layer(%h: bf16[4, 8]) {
          %w: bf16[8, 8] = param("proj.weight")                      @ proj#1 F
          %p: bf16[4, 8] = matmul(%h, %w, transpose_b=true)          @ proj#2 F
          %y: bf16[4, 8] = add(%h, %p)                               @ layer#1 F
          return %y
        }

    after:

        module { stage=differentiated,
          gradients={main={weights=["scale"], calls=[""]}, layer={weights=["proj.weight"], calls=["layers.0"]}} }

        func @main(%x: bf16[4, 8]) {
          %scale: bf16[8] = param("scale")                                                                @ main#1 F
          %h: bf16[4, 8] = mul(%x, %scale)                                                                @ main#2 F
          %y: bf16[4, 8], %y_residuals: bundle{bf16[4, 8]} = call(@layer_fwd, [%h], weights="layers.0")   @ main#3 F
          %wide: f32[4, 8] = cast(%y, dtype=f32)                                                          @ main#4 F
          %loss: f32[] = mean(%wide, axes=[0, 1])                                                         @ main#5 F
          %d_y: bf16[4, 8] = literal([0.03125], [4, 8], bf16)                                             @ main#4.1 I
          %d_h: bf16[4, 8], %y_gradients: bundle{f32[8, 8]} = call(@layer_bwd, [%y_residuals, %d_y], weights="layers.0")  @ main#3.1 I
          %cast: f32[4, 8] = cast(%d_h, dtype=f32)                                                        @ main#2.1 W
          %cast_1: f32[4, 8] = cast(%x, dtype=f32)                                                        @ main#2.2 W
          %mul: f32[4, 8] = mul(%cast, %cast_1)                                                           @ main#2.5 W
          %d_scale: f32[8] = sum(%mul, axes=[0])                                                          @ main#2.6 W
          %main_gradients: bundle{f32[8]} = pack([%d_scale])                                              @ main.gradients#2 W
          return %loss, %main_gradients, %y_gradients
        }

        func @layer_fwd(%h: bf16[4, 8]) {
          %w: bf16[8, 8] = param("proj.weight")                                                           @ proj#1 F
          %p: bf16[4, 8] = matmul(%h, %w, transpose_b=true)                                               @ proj#2 F
          %y: bf16[4, 8] = add(%h, %p)                                                                    @ layer#1 F
          %residuals: bundle{bf16[4, 8]} = pack([%h])                                                     @ layer_fwd#1 F
          return %y, %residuals
        }

        func @layer_bwd(%residuals: bundle{bf16[4, 8]}, %d_y: bf16[4, 8]) {
          %h: bf16[4, 8] = unpack(%residuals)                                                             @ layer_bwd#1 I
          %w: bf16[8, 8] = param("proj.weight")                                                           @ proj#1 I
          %matmul: bf16[4, 8] = matmul(%d_y, %w)                                                          @ proj#2.1 I
          %transpose: bf16[8, 4] = transpose(%d_y, perm=[1, 0])                                           @ proj#2.2 W
          %d_w: f32[8, 8] = matmul(%transpose, %h, out=f32)                                               @ proj#2.3 W
          %d_h: bf16[4, 8] = add(%d_y, %matmul)                                                           @ layer.gradients#1 I
          %gradients: bundle{f32[8, 8]} = pack([%d_w])                                                    @ layer_bwd#2 W
          return %d_h, %gradients
        }
    """

    name: ClassVar[str] = "autodiff"
    requires: ClassVar[str] = "traced"
    ensures: ClassVar[str | None] = "differentiated"

    split: bool = False

    def __call__(self, module: Module) -> Module:
        main = module.main
        require(len(main.results) > 0, f"the first result of @{main.name} is to be the loss, but it returns nothing")
        loss = main.results[0]
        scalar = isinstance(loss.type, Tensor) and loss.type.dtype.is_float and loss.type.rank == 0
        require(scalar, f"the first result of @{main.name} is to be the loss, a float scalar; found %{loss.name}: {loss.type}")
        return _Differentiation(module, self.split).module()


@dataclass(frozen=True)
class _Derivative:
    """What a function became, for gradients of certain results."""

    forward: Func
    """The function itself where backward needs nothing of it; else its last result is the bundle of residuals."""
    residuals: bool
    given: tuple[Tensor, ...]
    """The types of the gradients that backward takes, after the residuals if there are any."""
    backward: tuple[Func, ...]
    """One function, or one for each phase: the second then takes the bundle with which the first ends."""
    inputs: tuple[int, ...]
    """The parameters that get a gradient: the first results of the first."""
    weights: tuple[str, ...]
    """The relative names of the weights in the bundle of gradients, the last result of the last; without any there is no bundle."""


@dataclass
class _Walk:
    """One function walked backwards. `b` has emitted what computes the gradients."""

    b: Backward
    inputs: dict[int, Value] = field(default_factory=dict)
    """Gradients of parameters."""
    weights: dict[str, Value] = field(default_factory=dict)
    """Gradients of weights, by name relative to the function."""
    activations: list[Value] = field(default_factory=list)
    """Gradients of everything else."""
    read: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    """Who reads weights, from the last to the first: a prefix, a function, and the relative names of the weights that have a gradient."""
    calls: dict[Op, Call] = field(default_factory=dict)
    """The call of the forward function for each call of a function that keeps residuals."""

    def add(self, name: str, gradient: Value) -> None:
        """Gradients of one weight add up."""
        self.weights[name] = self.b.add(self.weights[name], gradient) if name in self.weights else gradient

    def total(self, value: Value, parts: Sequence[Value]) -> Value | None:
        """The gradient of `value`, from those that its readers contribute."""
        if not parts:
            return None
        total = _joined(self.b, parts)
        if total is None:
            total = parts[0]
            for part in parts[1:]:
                total = self.b.add(total, part)
        if not total.name.startswith("d_"):
            total.name = f"d_{value.name}"
        if not self.b.is_weight(value):
            self.activations.append(total)
        return total


class _Differentiation:
    """Of one module. A function is differentiated when the walk backwards meets a call of it, once for each set of results and inputs."""

    def __init__(self, module: Module, split: bool) -> None:
        self.before = module
        self.split = split
        self.known: dict[tuple[str, tuple[int, ...], frozenset[int]], _Derivative] = {}
        self.made: dict[str, list[Func]] = {}
        self.names = {func.name for func in module.funcs}
        self.reached: dict[tuple[str, frozenset[int]], frozenset[Value]] = {}

    def module(self) -> Module:
        """The module with the backward pass in it."""
        main = self.before.main
        loss = main.results[0]
        walk = _Walk(Backward(main, self.varied(main, frozenset())))
        self.walk(main, walk, {loss: walk.b.emit(Literal((1.0,), (), loss.dtype, names=("d_loss",))).result})
        require(len(walk.weights) > 0, f"the loss, %{loss.name} of @{main.name}, depends on no weight")
        groups = _groups(walk)
        bundles = []
        for call, names in ((call, group["weights"]) for group in groups.values() for call in group["calls"]):
            fields = tuple(walk.weights[join(call, name)] for name in names)
            bundles.append(walk.b.emit(Pack(fields, names=(f"{call or main.name}_gradients",))).result)
        ops, values = _forward(main, walk.calls)
        backward, bundles, phases = _tidied(walk, bundles)
        for op in backward:
            ops.append(op.with_operands(values.__getitem__).copy(phase=phases[op]))
            values.update(zip(op.results, ops[-1].results, strict=True))
        returned = tuple(values[v] for v in (*main.results, *bundles))
        funcs = [Func(main.name, main.params, tuple(ops), returned, main.updates)]
        for func in self.before.funcs[1:]:
            funcs += [func, *self.made.get(func.name, [])]
        attributes = {**self.before.attributes, ATTRIBUTE: groups}
        return merge_functions(self.before.replace(funcs=tuple(funcs), stage="differentiated", attributes=attributes))

    def varied(self, func: Func, inputs: frozenset[int]) -> frozenset[Value]:
        """The values of `func` that depend on a weight, given the parameters that do."""
        key = func.name, inputs
        if key in self.reached:
            return self.reached[key]
        found = {func.params[i] for i in inputs}
        for op in func.ops:
            if isinstance(op, Call):
                callee = self.before[op.callee]
                inside = self.varied(callee, frozenset(i for i, v in enumerate(op.args) if v in found))
                found.update(r for r, own in zip(op.results, callee.results, strict=True) if own in inside)
            elif isinstance(op, Param) or (type(op) not in NOT_DIFFERENTIABLE and not found.isdisjoint(op.operands)):
                found.update(r for r in op.results if isinstance(r.type, Bundle) or r.dtype.is_float)
        return self.reached.setdefault(key, frozenset(found))

    def walk(self, func: Func, walk: _Walk, seeds: Mapping[Value, Value]) -> None:
        """Walk `func` backwards from the gradients of some of its results."""
        b = walk.b
        parts: dict[Value, list[Value]] = {value: [seed] for value, seed in seeds.items()}
        own: list[str] = []
        for op in reversed(func.ops):
            b.origin = op.id
            dys = [walk.total(value, parts.pop(value, [])) for value in op.results]
            if all(dy is None for dy in dys):
                continue
            if isinstance(op, Param) and dys[0]:
                own.insert(0, op.path)
                walk.add(op.path, dys[0])
            elif isinstance(op, Call):
                for value, d in self.call(op, walk, dys):
                    parts.setdefault(value, []).append(d)
            elif type(op) in VJPS:
                for value, part in zip(op.operands, VJPS[type(op)](op, b, *dys), strict=True):
                    if part:
                        parts.setdefault(value, []).append(part)
            elif type(op) in MISSING:
                raise DscError(f"{op.name} {op.id} of @{func.name} has no derivative: {MISSING[type(op)]}")
        b.origin = ""
        walk.read.append(("", func.name, tuple(dict.fromkeys(own))))
        for i, param in enumerate(func.params):
            if total := walk.total(param, parts.get(param, [])):
                walk.inputs[i] = total

    def call(self, op: Call, walk: _Walk, dys: Sequence[Value | None]) -> list[tuple[Value, Value]]:
        """Emit what goes back through one call. Gives its arguments with their gradients."""
        b, first = walk.b, op.results[0].name
        wanted = [(i, dy) for i, dy in enumerate(dys) if dy]
        d = self.derivative(op.callee, tuple(i for i, _ in wanted), frozenset(i for i, v in enumerate(op.args) if b.wants(v)))
        args = [b.cast(dy, type.dtype) for (_, dy), type in zip(wanted, d.given, strict=True)]
        if d.residuals:
            types = tuple(r.type for r in d.forward.results)
            names = (*(r.name for r in op.results), f"{first}_residuals")
            walk.calls[op] = Call(Symbol(d.forward.name), op.args, types, op.weights, id=op.id, phase=op.phase, names=names)
            args.insert(0, walk.calls[op].results[-1])
        found: list[Value] = []
        for func in d.backward:
            names = tuple(f"d_{op.args[i].name}" for i in d.inputs) if not found else ()
            names += tuple(f"{first}_{r.name}" for r in func.results[len(names) :])
            types = tuple(r.type for r in func.results)
            found += b.emit(Call(Symbol(func.name), tuple(args), types, op.weights, names=names)).results
            args = found[-1:]
        if d.weights:
            for name, gradient in zip(d.weights, b.emit(Unpack(found[-1], names=_flat(d.weights))).results, strict=True):
                walk.add(join(op.weights, name), gradient)
            walk.read.append((op.weights, op.callee, d.weights))
        pairs = ((op.args[i], b.fit(gradient, op.args[i])) for i, gradient in zip(d.inputs, found, strict=False))
        return [(arg, gradient) for arg, gradient in pairs if gradient]

    def derivative(self, name: str, wanted: tuple[int, ...], inputs: frozenset[int]) -> _Derivative:
        """Of the function `name`, for gradients of the results `wanted`, where the parameters `inputs` depend on weights."""
        key = name, wanted, inputs
        if key not in self.known:
            self.known[key] = self.differentiate(self.before[name], wanted, inputs)
        return self.known[key]

    def differentiate(self, func: Func, wanted: tuple[int, ...], inputs: frozenset[int]) -> _Derivative:
        """Make the functions of a derivative."""
        walk = _Walk(Backward(func, self.varied(func, inputs)))
        reached = [func.results[i] for i in wanted]
        given = tuple(Value(Tensor(walk.b.dtype(r), r.shape), f"d_{r.name}") for r in reached)
        self.walk(func, walk, dict(zip(reached, given, strict=True)))
        ops, values = _forward(func, walk.calls)
        weights = dict(reversed(walk.weights.items()))
        backward, gradients, phases = _tidied(walk, [*walk.inputs.values(), *weights.values()])
        count = len(walk.inputs)
        of_weights = Packed("gradients", tuple(gradients[count:]), Phase.W)
        kept = _in_order(needed(backward, gradients, given), func, walk.calls.values(), ())
        made: tuple[Func, ...]
        parts = {phase: [op for op in backward if phases[op] is phase] for phase in (Phase.I, Phase.W)}
        residuals = Packed("residuals", kept, Phase.I if parts[Phase.I] else Phase.W)
        if self.split and walk.weights and parts[Phase.I]:
            carried = needed(parts[Phase.W], of_weights.values, ())
            stash = _in_order(carried, func, walk.calls.values(), (*given, *(r for op in backward for r in op.results)))
            results: list[Value | Packed] = [*gradients[:count], Packed("stash", stash, Phase.I)]
            first = outlined(unused(f"{func.name}_bwd_input", self.names), residuals, given, parts[Phase.I], results, phases)
            inside = Packed("stash", stash, Phase.W)
            made = (first, outlined(unused(f"{func.name}_bwd_weight", self.names), inside, (), parts[Phase.W], (of_weights,), phases))
        else:
            suffix = "_bwd" if not self.split else "_bwd_input" if parts[Phase.I] else "_bwd_weight"
            made = (outlined(unused(func.name + suffix, self.names), residuals, given, backward, (*gradients[:count], of_weights), phases),)
        forward = func
        if kept:
            pack = Pack(tuple(values[v] for v in kept), id=f"{func.name}_fwd#1", names=("residuals",))
            returned = (*(values[v] for v in func.results), pack.result)
            forward = Func(unused(f"{func.name}_fwd", self.names), func.params, (*ops, pack), returned, func.updates)
            self.made.setdefault(func.name, []).append(forward)
        self.made.setdefault(func.name, []).extend(made)
        types = tuple(g.tensor for g in given)
        return _Derivative(forward, bool(kept), types, made, tuple(walk.inputs), tuple(weights))


def _forward(func: Func, calls: Mapping[Op, Call]) -> tuple[list[Op], Replacements]:
    """The ops of `func` with `calls` in place of calls, and what became of the values of both."""
    ops: list[Op] = []
    values = Replacements()
    for old in func.ops:
        ops.append(values.moved(calls.get(old, old)))
        values.update((was, now) for was, now in zip(old.results, ops[-1].results, strict=False) if was is not now)
    return ops, values


def _tidied(walk: _Walk, wanted: Sequence[Value]) -> tuple[list[Op], list[Value], dict[Op, Phase]]:
    """The ops that compute `wanted`, simplified, the values that `wanted` became, and the phase of each op."""
    alive = drop_unused(Func(walk.b.name, (), tuple(walk.b.ops), tuple(wanted)))
    made = set(alive.ops)
    activations = tuple(v for v in walk.activations if v.owner in made)
    func = simplify_func(Func(alive.name, (), alive.ops, (*wanted, *activations)))
    results, leading = func.results[: len(wanted)], set(func.results[len(wanted) :])
    func = drop_unused(Func(func.name, (), func.ops, results))
    phases: dict[Op, Phase] = {}
    for op in reversed(func.ops):
        phases[op] = Phase.W if leading.isdisjoint(op.results) else Phase.I
        if phases[op] is Phase.I:
            leading.update(op.operands)
    return list(func.ops), list(results), phases


def _in_order(values: set[Value], func: Func, calls: Iterable[Call], later: Sequence[Value]) -> tuple[Value, ...]:
    """`values` in the order in which they come to be: parameters, what `func` computes, residuals of its calls, `later` ones."""
    every = (*func.params, *(r for op in func.ops for r in op.results), *(r for call in calls for r in call.results), *later)
    return tuple(v for v in dict.fromkeys(every) if v in values)


def _joined(b: Backward, parts: Sequence[Value]) -> Value | None:
    """Gradients of slices that lie side by side and cover the whole are joined; padding and adding them would move more."""
    pads = [part.owner for part in parts]
    placed: list[tuple[int, Pad]] = []
    for pad in pads:
        if not isinstance(pad, Pad):
            return None
        axes = [i for i, (lo, hi) in enumerate(zip(pad.low, pad.high, strict=True)) if lo or hi]
        if len(axes) != 1:
            return None
        placed.append((axes[0], pad))
    axis = placed[0][0]
    placed.sort(key=lambda item: item[1].low[axis])
    end = 0
    for other, pad in placed:
        extent = pad.x.shape[axis]
        if other != axis or pad.low[axis] != end or not isinstance(extent, int):
            return None
        end += extent
    return b.emit(Concat(tuple(pad.x for _, pad in placed), axis)).result if end == parts[0].shape[axis] else None


def _groups(walk: _Walk) -> dict[str, dict[str, tuple[str, ...]]]:
    """The module attribute of ir/gradients.py: each weight with the first, in forward order, of those that read it."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    seen: set[str] = set()
    for prefix, func, names in reversed(walk.read):
        own = tuple(name for name in names if join(prefix, name) not in seen)
        seen.update(join(prefix, name) for name in own)
        if own:
            groups.setdefault((func, own), []).append(prefix)
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for (func, own), calls in groups.items():
        count, name = 0, func
        while name in found:  # the same function, but some of its weights stand with another
            count, name = count + 1, f"{func}_{count + 1}"
        found[name] = {"weights": own, "calls": tuple(calls)}
    return found


def _flat(names: Sequence[str]) -> tuple[str, ...]:
    """Names of values after those of weights."""
    return tuple(f"d_{name.replace('.', '_')}" for name in names)
