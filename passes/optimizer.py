"""The optimiser as a program: AdamW with clipping, the balancing of gates, and the average of the weights.

State is what a function takes and gives back, and its header `updates` says which result replaces which parameter. Master weights
and gradients are float32, both moments bf16 (DeepSeek-V3 report, section 3.3.3); a moment is rounded only where it is kept, and
the step that makes it uses it unrounded. One function serves all weights of a shape, so that the program of a deep model is short.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TypeAlias

from ..ir.core import Builder, Func, Module, Symbol, Value
from ..ir.errors import require
from ..ir.ops.control import Call, Literal
from ..ir.ops.elementwise import Add, Cast, Div, Gt, Lt, Minimum, Mul, Sqrt, Sub
from ..ir.ops.reduce import Mean, Sum
from ..ir.ops.shape import Concat, Reshape, Slice
from ..ir.stages import ATTRIBUTE as STAGES
from ..ir.stages import CUT, NORM, READ, SQUARES, UPDATE
from ..ir.types import DType, Tensor
from ..ir.verify import verify

F32 = DType.f32
SCALAR = Tensor(F32, ())

Values: TypeAlias = dict[str, Value]


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2) with the numbers of the DeepSeek-V3 report, section 4.2.

    `clip` bounds the norm of all gradients together; infinity leaves them as they are. `decay` is not for vectors (norms, biases).
    `epsilon` is not published: it is the usual one. `moments` is the dtype in which both moments are kept.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0
    moments: DType = DType.bf16

    def corrections(self, step: int) -> tuple[float, float]:
        """What makes up for moments that began at zero, at `step`, counted from 1: 1 / (1 - beta^step) for each moment."""
        return 1 / (1 - self.beta1**step), 1 / (1 - self.beta2**step)


@dataclass(frozen=True)
class Stage:
    """What a stage of a pipeline has of an update: trained weights and gates that are at home there, and weights that it reads besides."""

    weights: tuple[str, ...]
    gates: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


def update_module(
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    gates: Sequence[str] = (),
    counts: Tensor | None = None,
    adamw: AdamW | None = None,
    groups: Sequence[Collection[str]] = (),
    stages: Sequence[Stage] = (),
) -> Module:
    """The program that ends a step: `@update`, and a function for each shape of weight.

    `weights` are those that gradients move, with the type in which the model reads them; `gradients` has a type for each. `gates` are
    the correction biases of the gates, one for each row of `counts`, i32[gates, experts]. The squares of gradients are added up group
    by group where the weights are in `groups`: those of a group lie on the ranks in the same way. The parameters of @update are

        learning_rate, mean_correction, variance_correction f32[]   see `AdamW.corrections`
        balance_speed f32[], counts i32[gates, experts]             where there are gates
        gradient, master f32, mean, variance                        for each weight, in order
        bias f32[experts]                                           for each gate, in order

    and its results norm f32[], that of all gradients before clipping; for each weight the weight, master, mean and variance; the biases;
    and where the model is cut into `stages`, for each stage the weights that it reads of others. Then @update is a call for each role of a
    stage (`ir/stages.py`): squares, those of its gradients; norm, of all, on the first stage, where the order of sums is that of one stage
    that has everything; update; and read, which takes new weights from where they are at home.
    """
    b = Builder("update", "update")
    made = _Update(b, adamw or AdamW(), weights, groups or (tuple(weights),))
    missing = [name for name in weights if name not in gradients]
    require(not missing, f"there is no gradient for {', '.join(missing)}")
    for name in SCALARS:
        made.have[name] = b.param(name, SCALAR)
    if counts:
        require(len(gates) == counts.shape[0], f"{len(gates)} gates, but the counts are {counts}")
        made.have |= {"balance_speed": b.param("balance_speed", SCALAR), "counts": b.param("counts", counts)}
        made.rows = {name: row for row, name in enumerate(gates)}
    for name, tensor in weights.items():
        types = (gradients[name], Tensor(F32, tensor.shape), *(Tensor(made.adamw.moments, tensor.shape),) * 2)
        keys = (f"{name}.{what}" for what in ("gradient", *STATE))
        made.have |= {key: b.param(key, type) for key, type in zip(keys, types, strict=True)}
    made.have |= {name: b.param(name, Tensor(F32, counts.shape[1:])) for name in gates if counts}
    before = dict(made.have)
    made.stages(stages)
    given, results = {value: i for i, value in enumerate(b.params)}, [made.have["norm"]]
    updates = {}
    for name in weights:
        results.append(made.have[f"{name}.weight"])
        for key in (f"{name}.{what}" for what in STATE):
            updates[given[before[key]]] = len(results)
            results.append(made.have[key])
    for name in gates if counts else ():
        updates[given[before[name]]] = len(results)
        results.append(made.have[name])
    results += [made.have[f"{name}.stage{at}"] for at, stage in enumerate(stages) for name in stage.reads]
    cut = {STAGES: made.records, CUT: ()} if stages else {}
    funcs = (b.finish(results, updates), *made.funcs, *made.library.funcs.values())
    return verify(Module(funcs, stage="differentiated", attributes=cut))


SCALARS = ("learning_rate", "mean_correction", "variance_correction")
STATE = ("master", "mean", "variance")
"""What the optimiser keeps of a weight, in the order of its parameters and results."""


class _Update:
    """@update as it is made: its values by name, and what each stage does. Without stages main does it all itself."""

    def __init__(self, b: Builder, adamw: AdamW, weights: Mapping[str, Tensor], groups: Sequence[Collection[str]]) -> None:
        self.b, self.adamw, self.weights, self.groups = b, adamw, weights, groups
        self.library = _Library(adamw)
        self.have: dict[str, Value] = {}
        self.rows: dict[str, int] = {}
        """Of each gate its row of the counts."""
        self.funcs: list[Func] = []
        self.records: tuple[dict[str, str], ...] = ()

    def stages(self, stages: Sequence[Stage]) -> None:
        """Everything, of all stages."""
        self.records = tuple({} for _ in stages)
        one = Stage(tuple(self.weights), tuple(self.rows))
        every: list[tuple[int | None, Stage]] = [*enumerate(stages)] or [(None, one)]
        for at, stage in every:
            self.run(at, SQUARES, [f"{name}.gradient" for name in stage.weights], partial(self.squares, stage, at))
        self.run(0 if stages else None, NORM, [key for key in self.have if key.startswith("squares.")], self.norm)
        for at, stage in ((at, stage) for at, stage in every if stage.weights or stage.gates):
            takes = [*SCALARS, "clip", *(f"{name}.{what}" for name in stage.weights for what in ("gradient", *STATE))]
            self.run(at, UPDATE, [*takes, *(("balance_speed", "counts", *stage.gates) if stage.gates else ())], partial(self.update, stage))
        for at, stage in every:
            self.run(at, READ, [f"{name}.weight" for name in stage.reads], partial(self.read, stage, at))

    def run(self, at: int | None, role: str, takes: Sequence[str], body: Callable[[Builder, Values], Values]) -> None:
        """Do what `body` does, which takes values by name and gives some: here, or in a function of stage `at`, which is called."""
        given = {key: self.have[key] for key in takes}
        if not given:
            return
        if at is None:
            self.have |= body(self.b, given)
            return
        inner = Builder(f"stage{at}_{role}", f"stage{at}_{role}")
        made = body(inner, {key: inner.param(value.name, value.type) for key, value in given.items()})
        self.funcs.append(inner.finish(list(made.values())))
        self.b.component = f"stage{at}.{role}"
        call = _call(self.b, self.funcs[-1], list(given.values()))
        self.records[at][role] = call.id
        self.have |= dict(zip(made, call.results, strict=True))

    def squares(self, stage: Stage, at: int | None, b: Builder, given: Values) -> Values:
        """The squares of the stage's gradients, added up weight by weight: a vector for each group."""
        found: Values = {}
        component = b.component
        for i, group in enumerate(self.groups):
            rows = []
            for name in (name for name in stage.weights if name in group):
                b.component = name
                gradient = given[f"{name}.gradient"]
                square = _call(b, self.library.squares(gradient.tensor), [gradient]).result
                rows.append(b.emit(Reshape(square, (1,))).result)
            b.component = component
            if rows:
                found[f"squares.{i}.{at}"] = b.emit(Concat(tuple(rows), 0, names=("squares",))).result
        return found

    def norm(self, b: Builder, given: Values) -> Values:
        """The norm of all gradients, and what to multiply them by so that it is at most `clip`: as torch.nn.utils.clip_grad_norm_."""
        totals = []
        for i in range(len(self.groups)):
            rows = tuple(value for key, value in given.items() if key.startswith(f"squares.{i}."))
            totals.append(b.emit(Sum(b.emit(Concat(rows, 0)).result if len(rows) > 1 else rows[0], (0,))).result)
        total = reduce(lambda x, y: b.emit(Add(x, y)).result, totals)
        norm, limit = b.emit(Sqrt(total, names=("norm",))).result, self.adamw.clip
        if limit == float("inf"):
            return {"norm": norm, "clip": _number(b, 1.0)}
        ratio = b.emit(Div(_number(b, limit), b.emit(Add(norm, _number(b, 1e-6))).result)).result
        return {"norm": norm, "clip": b.emit(Minimum(ratio, _number(b, 1.0), names=("clip",))).result}

    def update(self, stage: Stage, b: Builder, given: Values) -> Values:
        """New weights and state, and biases of gates."""
        found: Values = {}
        rate = given["learning_rate"]
        keep = b.emit(Sub(_number(b, 1.0), b.emit(Mul(rate, _number(b, self.adamw.decay))).result, names=("keep",))).result
        step = b.emit(Mul(rate, given["mean_correction"], names=("step_size",))).result
        for name in stage.weights:
            tensor, gradient = self.weights[name], given[f"{name}.gradient"]
            b.component = name
            decayed = [keep] if tensor.rank > 1 else []
            operands = [gradient, *(given[f"{name}.{what}"] for what in STATE), given["clip"], step, given["variance_correction"], *decayed]
            call = _call(b, self.library.adamw(tensor, gradient.tensor), operands, ("weight", *STATE))
            found |= {f"{name}.{what}": value for what, value in zip(("weight", *STATE), call.results, strict=True)}
        for name in stage.gates:
            loads, bias, row = given["counts"], given[name], self.rows[name]
            b.component = name
            load = b.emit(Reshape(b.emit(Slice(loads, 0, row, row + 1)).result, loads.shape[1:])).result  # type: ignore[arg-type]
            found[name] = _call(b, self.library.balance(bias.tensor), [bias, load, given["balance_speed"]]).result
        return found

    def read(self, stage: Stage, at: int | None, b: Builder, given: Values) -> Values:
        """Weights that other stages have updated, as they are."""
        return {f"{name}.stage{at}": given[f"{name}.weight"] for name in stage.reads}


def average_module(weights: Mapping[str, Tensor]) -> Module:
    """The exponential moving average of the master weights (DeepSeek-V3 report, section 3.2.3): `@average`.

    Its parameters are decay f32[], then for each weight average f32 and master f32; its results the new averages,
    average + (1 - decay) (master - average).
    """
    library = _Library(AdamW())
    b = Builder("average", "average")
    decay = b.param("decay", SCALAR)
    share = b.emit(Sub(_number(b, 1.0), decay, names=("share",))).result
    results, updates = [], {}
    for name, tensor in weights.items():
        wide = Tensor(F32, tensor.shape)
        average, master = b.param(f"{name}.average", wide), b.param(f"{name}.master", wide)
        b.component = name
        results.append(_call(b, library.average(wide), [average, master, share]).result)
        updates[len(b.params) - 2] = len(results) - 1
    return verify(Module((b.finish(results, updates), *library.funcs.values()), stage="differentiated"))


class _Library:
    """The functions that @update and @average call, each made when it is first wanted."""

    def __init__(self, adamw: AdamW) -> None:
        self.options = adamw
        self.funcs: dict[str, Func] = {}

    def squares(self, gradient: Tensor) -> Func:
        """gradient -> the sum of its squares, f32[]."""

        def body(b: Builder) -> list[Value]:
            g = _float(b, b.param("gradient", gradient))
            return [b.emit(Sum(b.emit(Mul(g, g)).result, tuple(range(gradient.rank)), names=("squares",))).result]

        return self._func("sum_of_squares", gradient, body)

    def adamw(self, weight: Tensor, gradient: Tensor) -> Func:
        """gradient, master, mean, variance, clip, step_size, variance_correction[, keep] -> weight, master, mean, variance.

        g = clip * gradient; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; master = keep * master - step_size * m /
        (sqrt(variance_correction * v) + epsilon), step_size being the learning rate times the correction of m.
        """
        o = self.options

        def body(b: Builder) -> list[Value]:
            def mul(x: Value, y: Value | float) -> Value:
                return b.emit(Mul(x, y if isinstance(y, Value) else _number(b, y))).result

            given, master = b.param("gradient", gradient), b.param("master", Tensor(F32, weight.shape))
            m, v = (b.param(name, Tensor(o.moments, weight.shape)) for name in ("mean", "variance"))
            clip, step, correction = (b.param(name, SCALAR) for name in ("clip", "step_size", "variance_correction"))
            g = mul(_float(b, given), clip)
            m = b.emit(Add(mul(_float(b, m), o.beta1), mul(g, 1 - o.beta1))).result
            v = b.emit(Add(mul(_float(b, v), o.beta2), mul(mul(g, g), 1 - o.beta2))).result
            root = b.emit(Sqrt(mul(v, correction))).result
            moved = b.emit(Div(m, b.emit(Add(root, _number(b, o.epsilon))).result)).result
            kept = mul(master, b.param("keep", SCALAR)) if weight.rank > 1 else master
            master = b.emit(Sub(kept, mul(moved, step), names=("new_master",))).result
            return [_cast(b, x, dtype) for x, dtype in ((master, weight.dtype), (master, F32), (m, o.moments), (v, o.moments))]

        return self._func(f"adamw_{weight.dtype}", gradient, body)

    def balance(self, bias: Tensor) -> Func:
        """bias, load i32, speed -> bias: up by `speed` where fewer tokens came than the mean, down where more (section 2.1.2)."""

        def body(b: Builder) -> list[Value]:
            old, counts, speed = b.param("bias", bias), b.param("load", Tensor(DType.i32, bias.shape)), b.param("speed", SCALAR)
            load = _cast(b, counts, F32)
            mean = b.emit(Mean(load, (0,))).result
            below, above = (_cast(b, b.emit(relation(load, mean)).result, F32) for relation in (Lt, Gt))
            sign = b.emit(Sub(below, above)).result
            return [b.emit(Add(old, b.emit(Mul(sign, speed)).result, names=("new_bias",))).result]

        return self._func("balance", bias, body)

    def average(self, weight: Tensor) -> Func:
        """average, master, share -> average + share * (master - average)."""

        def body(b: Builder) -> list[Value]:
            average, master, share = b.param("average", weight), b.param("master", weight), b.param("share", SCALAR)
            difference = b.emit(Sub(master, average)).result
            return [b.emit(Add(average, b.emit(Mul(difference, share)).result, names=("new_average",))).result]

        return self._func("moving_average", weight, body)

    def _func(self, what: str, tensor: Tensor, body: Callable[[Builder], list[Value]]) -> Func:
        name = "_".join([what, tensor.dtype.name, "x".join(map(str, tensor.shape))])
        if name not in self.funcs:
            b = Builder(name, what)
            self.funcs[name] = b.finish(body(b))
        return self.funcs[name]


def _call(b: Builder, func: Func, operands: Sequence[Value], names: tuple[str, ...] = ()) -> Call:
    names = names or tuple(r.name for r in func.results)
    return b.emit(Call(Symbol(func.name), tuple(operands), tuple(r.type for r in func.results), names=names))


def _number(b: Builder, value: float) -> Value:
    return b.emit(Literal((float(value),), (), F32)).result


def _cast(b: Builder, x: Value, dtype: DType) -> Value:
    return x if x.dtype is dtype else b.emit(Cast(x, dtype, names=(x.name,))).result


def _float(b: Builder, x: Value) -> Value:
    return _cast(b, x, F32)
