"""Gradients of whole models, by autodiff and the reference interpreter: against torch.autograd and against transformers, in float32.

The bound everywhere is 1e-5 of the largest magnitude of each weight's gradient.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import dsc
from dsc import backends
from dsc.backends.arrays import STORAGE
from dsc.ir.core import Module
from dsc.ir.gradients import by_name
from dsc.ir.types import DType
from dsc.models.build import build
from dsc.models.config import ModelConfig, load_config

RELATIVE = 1e-5
BATCH, SEQ = 2, 48

TINY = load_config("deepseek-v3-tiny", ["dtype=float32"]).to_dict()
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 144,
    "intermediate_size": 272,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": TINY,
    "v3 with a strong balance loss": TINY | {"aux_loss_alpha": 0.5},
    "v3 with two depths of prediction": TINY | {"num_nextn_predict_layers": 2},
    "v3 without q_lora": TINY | {"q_lora_rank": None},
    "v2": TINY
    | {
        "model_type": "deepseek_v2",
        "num_nextn_predict_layers": 0,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "aux_loss_alpha": 0.01,
    },
    "llama": LLAMA,
}


def data(vocabulary: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, vocabulary, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([tokens[:, 1:], torch.full((BATCH, 1), -100)], dim=1)
    labels[0, 3:7] = -100
    return tokens, labels


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights large enough for every part to matter."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            value.uniform_(0.5, 1.5)
        elif "inv_freq" not in name:
            value.normal_(0, 0.2 if "correction_bias" in name else 0.1)


def model_of(config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    model = build(config, "train", device="cpu")
    randomize(model)
    return model


def run(module: Module, state: dict[str, Tensor], inputs: tuple[Tensor, ...], backend: str = "numpy") -> tuple[Any, dict[str, np.ndarray]]:
    """The first result and the gradients by name, as float32."""

    def weight(name: str, type: Any) -> np.ndarray:
        return state[name].float().numpy().astype(STORAGE[type.dtype])

    results = backends.get(backend).run(module, weight, tuple(x.numpy() for x in inputs))
    return results[0], by_name(module, results)


def close(found: np.ndarray, expected: Tensor, name: str) -> None:
    reference = expected.detach().numpy()
    assert found.shape == reference.shape
    assert found.dtype == np.float32
    worst = np.abs(found - reference).max() / np.abs(reference).max()
    assert worst <= RELATIVE, f"{name}: {worst:.2e}"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pipeline", ["autodiff", "simplify,autodiff{split=true},simplify"])
def test_against_autograd(name: str, pipeline: str) -> None:
    config = load_config(CONFIGS[name])
    model = model_of(config)
    tokens, labels = data(config.vocab_size)
    outputs = model(tokens, labels)
    loss = outputs if isinstance(outputs, Tensor) else outputs[0]
    loss.backward()
    module = dsc.apply(dsc.trace(config, mode="train", batch=BATCH, seq=SEQ), pipeline)
    found_loss, found = run(module, model.state_dict(), (tokens, labels))
    np.testing.assert_allclose(found_loss, loss.detach().numpy(), rtol=1e-6)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for weight, gradient in expected.items():
        close(found[weight], gradient, weight)


@pytest.mark.parametrize("family", ["DeepseekV3", "Llama"])
def test_against_transformers(family: str) -> None:
    """The part that transformers has: the loss of the main model, without prediction modules and balance loss."""
    torch.manual_seed(0)
    fields = (TINY if family == "DeepseekV3" else LLAMA) | {"num_nextn_predict_layers": 0, "aux_loss_alpha": 0.0}
    config = load_config({k: v for k, v in fields.items() if family == "DeepseekV3" or k in LLAMA})
    others = ("model_type", "dtype", "head_dim", "num_nextn_predict_layers", "aux_loss_alpha")
    plain = copy.deepcopy({k: v for k, v in fields.items() if k not in others})  # transformers writes into the mappings it is given
    reference = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**plain)).eval()
    randomize(reference)
    tokens, labels = data(config.vocab_size)
    F.cross_entropy(reference(tokens).logits.flatten(0, 1), labels.flatten()).backward()
    state, expected = {}, {}
    grads = {n: p.grad for n, p in reference.named_parameters()}
    for name, value in reference.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for half, projection in enumerate(("gate_proj", "up_proj")):
                own = name.replace("gate_up_proj", projection)
                state[own] = value.chunk(2, dim=1)[half]
                expected[own] = grads[name].chunk(2, dim=1)[half]  # type: ignore[union-attr]
        else:
            state[name] = value
            if grads.get(name) is not None:
                expected[name] = grads[name]
    module = dsc.apply(dsc.trace(config, mode="train", batch=BATCH, seq=SEQ), "simplify,autodiff")
    _, found = run(module, state, (tokens, labels))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close(found[name], gradient, name)


def test_bfloat16_gradients_are_no_worse_than_those_of_torch() -> None:
    """Both against float32 gradients of the same rounded weights: by the norm of the error of all gradients together."""
    config = load_config(LLAMA | {"dtype": "bfloat16"})
    narrow = model_of(config)
    wide = build(load_config(LLAMA), "train", device="cpu")
    wide.load_state_dict({n: v.float() for n, v in narrow.state_dict().items()})
    tokens, labels = data(config.vocab_size)
    narrow(tokens, labels).backward()
    wide(tokens, labels).backward()
    module = dsc.apply(dsc.trace(config, mode="train", batch=BATCH, seq=SEQ), "simplify,autodiff")
    _, found = run(module, narrow.state_dict(), (tokens, labels))
    errors = np.zeros(2)
    for (name, p), q in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        errors += [np.square(x - q.grad.numpy()).sum() for x in (found[name], p.grad.float().numpy())]
    ours, theirs = np.sqrt(errors)
    assert ours <= theirs
    assert theirs <= 0.2 * np.sqrt(sum(float(q.grad.square().sum()) for q in wide.parameters() if q.grad is not None))


class Imported(nn.Module):
    """A model of somebody else: what it is made of is traced to primitives, all in one function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.norm = nn.LayerNorm(24)
        self.mix = nn.Linear(24, 3 * 24)
        self.out = nn.Linear(24, 37)
        self.gain = nn.Parameter(torch.ones(24))

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        q, k, v = self.mix(self.norm(x)).chunk(3, dim=-1)
        p = (q @ k.transpose(-1, -2) / 5 + torch.full((9, 9), -1e9).triu(1)).softmax(-1)
        x = x + F.gelu(p @ v) * self.gain.clamp(min=0.0)
        logits = self.out(x / x.pow(2).mean(-1, keepdim=True).sqrt())
        picked = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1))
        return -picked.mean(), logits.argmax(-1)


def test_an_imported_module_is_differentiated_as_it_is() -> None:
    torch.manual_seed(0)
    model = Imported()
    tokens, labels = (torch.randint(0, 37, (2, 9)) for _ in range(2))
    model(tokens, labels)[0].backward()
    traced = dsc.trace(model, (tokens, labels))
    assert len(traced.funcs) == 1
    module = dsc.apply(traced, "simplify,autodiff,simplify")
    assert len(module.funcs) == 1
    _, found = run(module, model.state_dict(), (tokens, labels))
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close(found[name], gradient, name)


def test_steps_against_the_gradient_lower_the_loss() -> None:
    config = load_config(TINY)
    state = {n: v.clone() for n, v in model_of(config).state_dict().items()}
    tokens, labels = data(config.vocab_size)
    module = dsc.apply(dsc.trace(config, mode="train", batch=BATCH, seq=SEQ), "simplify,autodiff")
    losses = []
    for _ in range(8):
        loss, found = run(module, state, (tokens, labels))
        losses.append(float(loss))
        for name, gradient in found.items():
            state[name] -= 0.02 * torch.from_numpy(gradient)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    assert DType.f32 in {f.dtype for r in module.main.results[5:] for f in r.bundle.tensors()}
