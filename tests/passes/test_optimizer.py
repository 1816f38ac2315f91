"""The optimiser's programs against torch: AdamW, clipping and the moving average; and the balancing rule against a loop.

Bounds are derived: u is the unit roundoff of float32, 2^-24. torch runs in float64, so all error is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsc
from dsc import DscError, backends
from dsc.ir.core import Module
from dsc.ir.types import DType, Tensor
from dsc.ir.walk import weights as weights_of
from dsc.passes.optimizer import AdamW, average_module, update_module

U = 2.0**-24
SHAPES = {"proj.weight": (5, 7), "experts": (3, 4, 6), "norm.weight": (9,)}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def types(dtype: DType) -> dict[str, Tensor]:
    return {name: Tensor(dtype, shape) for name, shape in SHAPES.items()}


def no_weights(name: str, tensor: Tensor) -> np.ndarray:
    raise AssertionError(f"the optimiser reads no weight, but asks for {name}")


class Run:
    """The update program, step by step; the state is what it returned last."""

    def __init__(self, adamw: AdamW, dtype: DType, masters: dict[str, np.ndarray]) -> None:
        self.adamw, self.step = adamw, 0
        self.module = update_module(types(dtype), types(DType.f32), adamw=adamw)
        moment = BFLOAT16 if adamw.moments is DType.bf16 else np.dtype(np.float32)
        self.state = {name: [master, np.zeros(master.shape, moment), np.zeros(master.shape, moment)] for name, master in masters.items()}

    def __call__(self, rate: float, gradients: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """The norm of the gradients and the weights after one more step."""
        self.step += 1
        inputs = [np.array(x, np.float32) for x in (rate, *self.adamw.corrections(self.step))]
        for name, state in self.state.items():
            inputs += [gradients[name], *state]
        norm, *results = backends.get("numpy").run(self.module, no_weights, inputs)
        weights = {}
        for i, name in enumerate(self.state):
            weights[name], *self.state[name] = results[4 * i : 4 * i + 4]
        return float(norm), weights


def gradients(seed: int, scale: float = 1.0) -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    while True:
        yield {name: scale * random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def masters(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def torch_adamw(start: dict[str, np.ndarray], adamw: AdamW, rate: float) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    """torch's optimiser in float64, vectors without decay."""
    found = {name: torch.nn.Parameter(torch.from_numpy(x.astype(np.float64))) for name, x in start.items()}
    groups = [
        {"params": [p for p in found.values() if p.dim() > 1], "weight_decay": adamw.decay},
        {"params": [p for p in found.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return found, torch.optim.AdamW(groups, lr=rate, betas=(adamw.beta1, adamw.beta2), eps=adamw.epsilon)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_float32_moments_follow_torch_adamw_and_its_clipping(scale: float) -> None:
    """Twenty steps; with scale 1 the norm is about 11 and every gradient is clipped, with 1e-3 none is.

    A step rounds the decayed master and the difference: at most 4u |master| with the two roundings of 1 - rate * decay. The quotient has
    24 roundings at most, those of the norm (sums of at most 116 terms, halved by the root: 60) apart, and its numerator is a mean of
    gradients no larger than the largest so far, so it is off by at most (24 + 60) u times that over the root.
    """
    rate, adamw, start = 3e-3, AdamW(moments=DType.f32), masters(1)
    run = Run(adamw, DType.f32, start)
    expected, optimizer = torch_adamw(start, adamw, rate)
    error = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    largest = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for _, given_gradients in zip(range(20), gradients(2, scale), strict=False):
        norm, found = run(rate, given_gradients)
        for name, p in expected.items():
            p.grad = torch.from_numpy(given_gradients[name].astype(np.float64))
        total = float(torch.nn.utils.clip_grad_norm_(expected.values(), adamw.clip))
        assert norm == pytest.approx(total, rel=60 * U)
        assert (total > 1) == (scale == 1.0)
        optimizer.step()
        for name, p in expected.items():
            assert p.grad is not None
            largest[name] = np.maximum(largest[name], np.abs(p.grad.numpy()))
            variance = optimizer.state[p]["exp_avg_sq"].numpy() / (1 - adamw.beta2**run.step)
            moved = largest[name] / (np.sqrt(variance) + adamw.epsilon) / (1 - adamw.beta1**run.step)
            error[name] += 4 * U * np.abs(p.detach().numpy()) + 84 * U * rate * moved
            wrong = np.abs(found[name] - p.detach().numpy()) / error[name]
            assert wrong.max() <= 1, f"{name}, step {run.step}: {wrong.max():.2f} of the bound"


def test_bfloat16_moments_are_rounded_once_and_used_unrounded() -> None:
    """Each step is checked against float64 arithmetic in torch from the bf16 state before it.

    A moment that is kept is the nearest bf16 number of what float64 gives, up to the roundings before (8u of the terms); the master
    moves by the moments before they are rounded: using the rounded ones would be off by up to 2^-9 of the step.
    """
    rate, adamw = 1e-2, AdamW()
    run = Run(adamw, DType.bf16, masters(3))
    for _, given_gradients in zip(range(12), gradients(4, 0.01), strict=False):
        before = {name: [torch.from_numpy(x.astype(np.float64)) for x in state] for name, state in run.state.items()}
        _, weights = run(rate, given_gradients)
        for name, (master, mean, variance) in before.items():
            g = torch.from_numpy(given_gradients[name].astype(np.float64))
            g = g * min(1.0, adamw.clip / (sum(float((x.astype(np.float64) ** 2).sum()) for x in given_gradients.values()) ** 0.5 + 1e-6))
            m = torch.lerp(mean, g, 1 - adamw.beta1)
            v = adamw.beta2 * variance + (1 - adamw.beta2) * g * g
            c1, c2 = 1 - adamw.beta1**run.step, 1 - adamw.beta2**run.step
            moved = rate * (m / c1) / ((v / c2).sqrt() + adamw.epsilon)
            decay = 1 - rate * adamw.decay if master.dim() > 1 else 1.0
            found = [torch.from_numpy(x.astype(np.float64)) for x in run.state[name]]
            slack = 84 * U * rate * (mean.abs() + g.abs()) / c1 / (v / c2).sqrt() + 4 * U * master.abs()
            assert ((found[0] - (decay * master - moved)).abs() <= slack).all()
            for kept, exact, terms in ((found[1], m, mean.abs() + g.abs()), (found[2], v, v)):
                off = 80 * U * terms
                low, high = ((exact - off).to(torch.float64).bfloat16().double(), (exact + off).bfloat16().double())
                assert ((low <= kept) & (kept <= high)).all()
            assert weights[name].dtype == BFLOAT16
            np.testing.assert_array_equal(weights[name], run.state[name][0].astype(BFLOAT16))


def test_clipping_can_be_left_out() -> None:
    start, given_gradients = masters(5), next(gradients(6, 100.0))
    adamw = AdamW(clip=float("inf"), moments=DType.f32)
    run = Run(adamw, DType.f32, start)
    run(1e-3, given_gradients)
    for name, (_, mean, _) in run.state.items():
        np.testing.assert_allclose(mean, given_gradients[name] * (1 - adamw.beta1), rtol=4 * U)


@settings(max_examples=50, deadline=None)
@given(loads=st.lists(st.lists(st.integers(0, 40), min_size=6, max_size=6), min_size=1, max_size=3), speed=st.sampled_from([0.0, 0.001]))
def test_gates_are_balanced_by_the_sign_of_their_load(loads: list[list[int]], speed: float) -> None:
    gates, counts = [f"layers.{i}.bias" for i in range(len(loads))], np.array(loads, np.int32)
    module = update_module(types(DType.f32), types(DType.f32), gates, Tensor(DType.i32, counts.shape))
    biases = [np.linspace(-0.01, 0.01, 6, dtype=np.float32) + i for i in range(len(loads))]
    state = [x for name in SHAPES for x in (masters(1)[name], masters(2)[name], *[np.zeros(SHAPES[name], BFLOAT16)] * 2)]
    scalars = [np.array(x, np.float32) for x in (1e-3, 1.0, 1.0, speed)]
    results = backends.get("numpy").run(module, no_weights, [*scalars, counts, *state, *biases])
    for row, bias, found in zip(loads, biases, results[-len(gates) :], strict=True):
        for expert, load in enumerate(row):
            if load * len(row) < sum(row):
                expected = bias[expert] + np.float32(speed)
            elif load * len(row) > sum(row):
                expected = bias[expert] - np.float32(speed)
            else:
                expected = bias[expert]
            assert found[expert] == expected


def test_the_average_is_that_of_torch() -> None:
    """torch's averaged model in float64; each of ten steps rounds the difference, its product with the share, the share and the sum."""
    decay, module = 0.9, average_module(types(DType.bf16))
    model = torch.nn.ParameterList(torch.from_numpy(x.astype(np.float64)) for x in masters(0).values())
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
    averaged.update_parameters(model)
    found, largest = masters(0), 0.0
    for seed in range(1, 11):
        now = masters(seed)
        with torch.no_grad():
            for name, p in zip(SHAPES, model, strict=True):
                p.copy_(torch.from_numpy(now[name].astype(np.float64)))
        averaged.update_parameters(model)
        inputs = [np.array(decay, np.float32), *(x for name in SHAPES for x in (found[name], now[name]))]
        found = dict(zip(SHAPES, backends.get("numpy").run(module, no_weights, inputs), strict=True))
        largest = max(largest, *(float(np.abs(x).max()) for x in now.values()))
    for name, p in zip(SHAPES, averaged.module, strict=True):
        np.testing.assert_allclose(found[name], p.detach().numpy(), rtol=0, atol=10 * 5 * U * 2 * largest)


@pytest.mark.parametrize("make", [lambda: update_module(types(DType.bf16), types(DType.f32)), lambda: average_module(types(DType.bf16))])
def test_the_programs_survive_their_text_and_say_what_they_update(make: Callable[[], Module]) -> None:
    module = make()
    assert dsc.parse(str(module)) == module
    assert not weights_of(module)
    state = [i for i, p in enumerate(module.main.params) if p.name.endswith((".master", ".mean", ".variance", ".average"))]
    updated = state if module.main.name == "update" else [i for i in state if module.main.params[i].name.endswith(".average")]
    assert sorted(module.main.updates) == updated


def test_one_function_serves_all_weights_of_a_shape() -> None:
    alike = {f"layers.{i}.weight": Tensor(DType.bf16, (8, 4)) for i in range(50)}
    module = update_module(alike, {name: Tensor(DType.f32, (8, 4)) for name in alike})
    assert [f.name for f in module.funcs] == ["update", "sum_of_squares_f32_8x4", "adamw_bf16_f32_8x4"]


def test_a_weight_without_gradient_is_refused() -> None:
    given_gradients = types(DType.f32)
    del given_gradients["experts"]
    with pytest.raises(DscError, match=r"^there is no gradient for experts$"):
        update_module(types(DType.bf16), given_gradients)
