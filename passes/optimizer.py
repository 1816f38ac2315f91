"""The optimiser as a program: AdamW with clipping, the balancing of gates, and the average of the weights.

State is what a function takes and gives back, and its header `updates` says which result replaces which parameter. Master weights
and gradients are float32, both moments bf16 (DeepSeek-V3 report, section 3.3.3); a moment is rounded only where it is kept, and
the step that makes it uses it unrounded. One function serves all weights of a shape, so that the program of a deep model is short.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from ..ir.core import Builder, Func, Module, Symbol, Value
from ..ir.errors import require
from ..ir.ops.control import Call, Literal
from ..ir.ops.elementwise import Add, Cast, Div, Gt, Lt, Minimum, Mul, Sqrt, Sub
from ..ir.ops.reduce import Mean, Sum
from ..ir.ops.shape import Concat, Reshape, Slice
from ..ir.types import DType, Tensor
from ..ir.verify import verify

F32 = DType.f32
SCALAR = Tensor(F32, ())


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


def update_module(
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    gates: Sequence[str] = (),
    counts: Tensor | None = None,
    adamw: AdamW | None = None,
    groups: Sequence[Collection[str]] = (),
) -> Module:
    """The program that ends a step: `@update`, and a function for each shape of weight.

    `weights` are those that gradients move, with the type in which the model reads them; `gradients` has a type for each. `gates` are
    the correction biases of the gates, one for each row of `counts`, i32[gates, experts]. The squares of gradients are added up group
    by group where the weights are in `groups`: those of a group lie on the ranks in the same way. The parameters of @update are

        learning_rate, mean_correction, variance_correction f32[]   see `AdamW.corrections`
        balance_speed f32[], counts i32[gates, experts]             where there are gates
        gradient, master f32, mean, variance                        for each weight, in order
        bias f32[experts]                                           for each gate, in order

    and its results norm f32[], that of all gradients before clipping; for each weight the weight, master, mean and variance; the biases.
    """
    adamw = adamw or AdamW()
    missing = [name for name in weights if name not in gradients]
    require(not missing, f"there is no gradient for {', '.join(missing)}")
    library = _Library(adamw)
    b = Builder("update", "update")
    rate, mean_correction, variance_correction = (
        b.param(name, SCALAR) for name in ("learning_rate", "mean_correction", "variance_correction")
    )
    speed, loads = (b.param("balance_speed", SCALAR), b.param("counts", counts)) if counts else (None, None)
    states: list[tuple[Value, Value, Value, Value]] = []
    for name, tensor in weights.items():
        kept = (Tensor(F32, tensor.shape), Tensor(adamw.moments, tensor.shape), Tensor(adamw.moments, tensor.shape))
        gradient = b.param(f"{name}.gradient", gradients[name])
        states.append((gradient, *(b.param(f"{name}.{what}", t) for what, t in zip(STATE, kept, strict=True))))  # type: ignore[arg-type]
    squares = {}
    for name, (gradient, *_) in zip(weights, states, strict=True):
        b.component = name
        squares[name] = _call(b, library.squares(gradient.tensor), [gradient]).result
    b.component = "update"
    norm, scale = _clip(b, [[squares[name] for name in group] for group in groups or (tuple(weights),)], adamw.clip)
    keep = b.emit(Sub(_number(b, 1.0), b.emit(Mul(rate, _number(b, adamw.decay))).result, names=("keep",))).result
    step = b.emit(Mul(rate, mean_correction, names=("step_size",))).result
    results, updates = [norm], {}
    for (name, tensor), (gradient, *state) in zip(weights.items(), states, strict=True):
        b.component = name
        decayed = [keep] if tensor.rank > 1 else []
        operands = [gradient, *state, scale, step, variance_correction, *decayed]
        call = _call(b, library.adamw(tensor, gradient.tensor), operands, ("weight", *STATE))
        results += call.results
        for old, new in zip(state, range(len(results) - 3, len(results)), strict=True):
            updates[b.params.index(old)] = new
    if speed and loads:
        require(len(gates) == loads.shape[0], f"{len(gates)} gates, but the counts are {loads.type}")
        for row, name in enumerate(gates):
            b.component = name
            bias = b.param(name, Tensor(F32, loads.shape[1:]))
            load = b.emit(Reshape(b.emit(Slice(loads, 0, row, row + 1)).result, loads.shape[1:])).result  # type: ignore[arg-type]
            results.append(_call(b, library.balance(bias.tensor), [bias, load, speed]).result)
            updates[len(b.params) - 1] = len(results) - 1
    return verify(Module((b.finish(results, updates), *library.funcs.values()), stage="differentiated"))


STATE = ("master", "mean", "variance")
"""What the optimiser keeps of a weight, in the order of its parameters and results."""


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


def _clip(b: Builder, groups: Sequence[Sequence[Value]], limit: float) -> tuple[Value, Value]:
    """The norm of all gradients, and what to multiply them by so that it is at most `limit`: as torch.nn.utils.clip_grad_norm_."""
    totals = []
    for squares in groups:
        rows = tuple(b.emit(Reshape(s, (1,))).result for s in squares)
        totals.append(b.emit(Sum(b.emit(Concat(rows, 0)).result, (0,))).result)
    total = reduce(lambda x, y: b.emit(Add(x, y)).result, totals)
    norm = b.emit(Sqrt(total, names=("norm",))).result
    if limit == float("inf"):
        return norm, _number(b, 1.0)
    ratio = b.emit(Div(_number(b, limit), b.emit(Add(norm, _number(b, 1e-6))).result)).result
    return norm, b.emit(Minimum(ratio, _number(b, 1.0), names=("clip",))).result


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
