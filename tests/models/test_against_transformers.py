"""The models against transformers with the same random weights, in float32: logits, decoding, losses and gradients.

The bound everywhere is 1e-5 of the largest magnitude of the reference.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from dsc.models.build import build, example_inputs
from dsc.models.config import ModelConfig, load_config
from dsc.models.rotary import Rotary

RELATIVE = 1e-5
BATCH, SEQ = 2, 48

TINY = load_config("deepseek-v3-tiny", ["dtype=float32", "num_nextn_predict_layers=0"]).to_dict()
V2 = TINY | {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "n_shared_experts": 2,
    "rope_scaling": TINY["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
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
YARN_WITHOUT_MSCALE = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}
MOE_16B = LLAMA | {
    "model_type": "deepseek",
    "num_key_value_heads": 6,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 56,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": TINY,
    "v3 without q_lora": TINY | {"q_lora_rank": None},
    "v3 without groups": TINY | {"n_group": 1, "topk_group": 1},
    "v3 without yarn": TINY | {"rope_scaling": None},
    "v3 with yarn on cos and sin": TINY | {"rope_scaling": YARN_WITHOUT_MSCALE},
    "v3 with half-split rope": TINY | {"rope_interleave": False},
    "v3 like moonlight": TINY
    | {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e4,
        "rope_scaling": None,
    },
    "v2": V2,
    "v2 like lite": V2 | {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0},
    "llama": LLAMA,
    "llama with head_dim and yarn": LLAMA | {"head_dim": 32, "rope_scaling": YARN_WITHOUT_MSCALE},
    "moe-16b": MOE_16B,
}
CLASSES = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2", "llama": "Llama", "deepseek": "Llama"}


def hugging_face(fields: dict[str, Any]) -> nn.Module:
    """The transformers model of a configuration, with random weights large enough for every part to matter."""
    fields = copy.deepcopy(fields)  # transformers writes into the mappings it is given
    name = CLASSES[fields["model_type"]]
    plain = {
        key: value
        for key, value in fields.items()
        if key not in ("model_type", "dtype", "head_dim") or (key == "head_dim" and name == "Llama")
    }
    if fields["model_type"] == "deepseek":  # has no class of its own: Llama's attention, V2's experts
        plain = {key: plain[key] for key in LLAMA if key in plain}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**plain)).eval()
    if fields["model_type"] == "deepseek":
        experts = transformers.DeepseekV2Config(**{key: value for key, value in fields.items() if key not in ("model_type", "dtype")})
        for layer in model.model.layers[fields["first_k_dense_replace"] :]:
            layer.mlp = DeepseekV2Moe(experts)
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if "norm" in name:
            value.uniform_(0.5, 1.5)
        elif "correction_bias" in name:
            value.normal_(0, 0.2)
        elif "inv_freq" not in name:
            value.normal_(0, 0.1)


def named_as_stored(model: nn.Module) -> dict[str, Tensor]:
    """transformers' weights under the names dsc uses: the fused gate and up projections of the experts apart."""
    weights = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = value.chunk(2, dim=1)
            weights |= {name.replace("gate_up_proj", "gate_proj"): gate, name.replace("gate_up_proj", "up_proj"): up}
        else:
            weights[name] = value
    return weights


def pair(name: str, mode: Any = "forward") -> tuple[ModelConfig, nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = load_config(CONFIGS[name])
    reference = hugging_face(CONFIGS[name])
    model = build(config, mode, device="cpu")
    model.load_state_dict(named_as_stored(reference))  # strict: equal sets of names
    return config, model, reference


def tokens_for(config: ModelConfig) -> Tensor:
    return torch.randint(0, config.vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= RELATIVE * expected.abs().max().item(), f"{difference / expected.abs().max().item():.2e}"


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits(name: str) -> None:
    config, model, reference = pair(name)
    tokens = tokens_for(config)
    assert_close(model(tokens), reference(tokens).logits)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_angles_are_bit_equal(name: str) -> None:
    config = load_config(CONFIGS[name])
    reference = hugging_face(CONFIGS[name]).model.rotary_emb
    tokens = torch.zeros(1, 1000, dtype=torch.int64)
    cos, sin = Rotary(config)(tokens)
    expected = reference(torch.zeros(1), torch.arange(1000).unsqueeze(0))
    if isinstance(expected, tuple):
        expected_cos, expected_sin = (part[0, :, : part.shape[-1] // 2] for part in expected)
        assert torch.equal(cos, expected_cos)
        assert torch.equal(sin, expected_sin)
    else:  # V2's complex numbers come from torch.polar, whose cos and sin are another implementation
        assert torch.equal(Rotary(config).inv_freq, reference.inv_freq)
        torch.testing.assert_close(torch.complex(cos, sin), expected[0], rtol=0, atol=2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_token_by_token_equals_the_forward_pass(name: str) -> None:
    """The second sequence starts five steps later, so that positions differ inside a batch."""
    config, model, reference = pair(name, "decode")
    tokens = tokens_for(config)
    forward = build(config, "forward", device="cpu")
    forward.load_state_dict(model.state_dict())
    whole, expected, late = forward(tokens), reference(tokens).logits, 5
    caches = [torch.full(value.shape, 1e3) for value in list(example_inputs(config, "decode", BATCH, 1, SEQ).values())[2:]]
    for step in range(SEQ):
        positions = torch.tensor([step, max(step - late, 0)])
        logits, *caches = model(tokens[torch.arange(BATCH), positions], positions, *caches)
        assert_close(logits, whole[torch.arange(BATCH), positions])
        assert_close(logits, expected[torch.arange(BATCH), positions])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_prefill_gives_the_logits_of_last_tokens_and_the_caches_of_decoding(name: str) -> None:
    """Prompts of two lengths in one batch, the shorter padded; a token that follows each is decoded on their caches."""
    config, model, reference = pair(name, "prefill")
    decoding = build(config, "decode", device="cpu")
    decoding.load_state_dict(model.state_dict())
    tokens, last = tokens_for(config), torch.tensor([SEQ - 2, 20])
    expected, rows = reference(tokens).logits, torch.arange(BATCH)
    logits, *caches = model(tokens, last)
    assert [c.shape for c in caches] == [v.shape for v in list(example_inputs(config, "decode", BATCH, 1, SEQ).values())[2:]]
    assert_close(logits, expected[rows, last])
    assert_close(decoding(tokens[rows, last + 1], last + 1, *caches)[0], expected[rows, last + 1])


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients(name: str) -> None:
    config, model, reference = pair(name, "train")
    tokens = tokens_for(config)
    labels = torch.roll(tokens, -1, 1)
    labels[:, -1] = -100
    labels[0, 3:7] = -100
    expected = F.cross_entropy(reference(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    outputs = model(tokens, labels)
    loss = outputs if isinstance(outputs, Tensor) else outputs[1]
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    fused = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        stored, half = name, slice(None)
        for index, projection in enumerate(("gate_proj", "up_proj")):
            if name.endswith(f"experts.{projection}"):
                stored, half = (
                    name.replace(projection, "gate_up_proj"),
                    slice(index * config.moe_intermediate_size, (index + 1) * config.moe_intermediate_size),
                )
        if name.endswith("e_score_correction_bias"):
            assert parameter.grad is None
            continue
        gradient = fused[stored]
        assert gradient is not None
        assert parameter.grad is not None, name
        assert_close(parameter.grad, gradient[:, half] if stored != name else gradient)


def training_pair(depths: int) -> tuple[ModelConfig, nn.Module, nn.Module]:
    """A V3 model in training form whose main stack has the weights of a transformers model."""
    torch.manual_seed(0)
    fields = TINY | {"num_nextn_predict_layers": depths}
    config = load_config(fields)
    reference = hugging_face(fields)
    model = build(config, "train", device="cpu")
    randomize(model)
    missing, unexpected = model.load_state_dict(named_as_stored(reference), strict=False)
    assert not unexpected
    assert all(int(name.split(".")[2]) >= config.num_hidden_layers for name in missing)
    return config, model, reference


def decoder_layer_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of one depth in transformers' layout, without those that only a prediction module has."""
    weights = {
        name: value for name, value in module.state_dict().items() if name.split(".")[0] not in ("enorm", "hnorm", "eh_proj", "shared_head")
    }
    gate, up = weights.pop("mlp.experts.gate_proj"), weights.pop("mlp.experts.up_proj")
    return weights | {"mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1)}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("depths", [1, 2])
@torch.no_grad()
def test_multi_token_prediction_against_plain_torch(depths: int) -> None:
    """Section 2.2 of the DeepSeek-V3 report in a few lines around transformers' own decoder layer."""
    config, model, reference = training_pair(depths)
    tokens = tokens_for(config)
    labels = torch.cat([tokens[:, 1:], torch.full((BATCH, 1), -100)], dim=1)
    labels[1, 10:20] = -100
    loss, lm_loss, mtp_loss, balance_loss, counts = model(tokens, labels)

    hidden = reference.model(tokens).last_hidden_state
    expected_lm = F.cross_entropy(reference.lm_head(hidden).flatten(0, 1), labels.flatten())
    losses = []
    for depth in range(1, depths + 1):
        length = SEQ - depth  # positions i = 1..T-k, where token i + k exists
        ours = model.model.layers[config.num_hidden_layers + depth - 1]
        layer = DeepseekV3DecoderLayer(reference.config, config.num_hidden_layers)
        layer.load_state_dict(decoder_layer_weights(ours))
        embedding = reference.model.embed_tokens(tokens[:, depth:])
        joined = torch.cat([rms_norm(embedding, ours.enorm.weight), rms_norm(hidden[:, :length], ours.hnorm.weight)], dim=-1)
        positions = torch.arange(length).unsqueeze(0)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        angles = reference.model.rotary_emb(joined, positions)
        hidden = layer(joined @ ours.eh_proj.weight.T, attention_mask=mask, position_embeddings=angles)
        hidden = rms_norm(hidden, ours.shared_head.norm.weight)
        losses.append(F.cross_entropy(reference.lm_head(hidden).flatten(0, 1), labels[:, depth:].flatten()))
    assert_close(lm_loss, expected_lm)
    assert_close(mtp_loss, torch.stack(losses).mean())
    assert_close(loss, expected_lm + config.mtp_loss_weight * torch.stack(losses).mean() + config.aux_loss_alpha * balance_loss)
    assert counts.shape == (config.num_hidden_layers - config.first_k_dense_replace + depths, config.n_routed_experts)
    assert (counts.sum(1) == BATCH * SEQ * config.num_experts_per_tok).all()


@torch.no_grad()
def test_multi_token_prediction_against_the_draft_model_of_transformers() -> None:
    """transformers runs these modules to draft tokens; its hidden states at every depth give the same losses."""
    drafts = pytest.importorskip("transformers.modeling_layers")
    config, model, reference = training_pair(2)
    draft = drafts.MtpModel(reference, 2).eval()
    tokens = tokens_for(config)
    labels = torch.cat([tokens[:, 1:], torch.full((BATCH, 1), -100)], dim=1)
    hidden = reference.model(tokens).last_hidden_state
    losses = []
    for depth in (1, 2):
        ours, theirs = model.model.layers[config.num_hidden_layers + depth - 1], draft.layers[depth - 1]
        own = {f"mtp_block.{name}": value for name, value in decoder_layer_weights(ours).items()}
        own |= {f"{name}.weight": getattr(ours, name).weight for name in ("enorm", "hnorm", "eh_proj")}
        theirs.load_state_dict(own | {"post_norm.weight": ours.shared_head.norm.weight})
        positions = torch.arange(depth, SEQ).unsqueeze(0)  # the position of the token that joins in
        hidden = draft.forward_layer(depth - 1, hidden[:, : SEQ - depth], positions, None, input_ids=tokens[:, depth:])
        losses.append(F.cross_entropy(reference.lm_head(hidden).flatten(0, 1), labels[:, depth:].flatten()))
    assert_close(model(tokens, labels)[2], torch.stack(losses).mean())


@torch.no_grad()
def test_balance_loss_and_counts_follow_the_routers_of_transformers() -> None:
    config, model, reference = training_pair(0)
    tokens = tokens_for(config)
    routed: list[tuple[Tensor, ...]] = []
    for layer in reference.model.layers[config.first_k_dense_replace :]:
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, output: routed.append(output))
    reference(tokens)
    expected = torch.zeros(())
    for logits, *_ in routed:
        scores = logits.sigmoid().view(BATCH, SEQ, -1)
        share = (scores / scores.sum(-1, keepdim=True)).mean(1)
        top = F.one_hot(scores.topk(config.num_experts_per_tok).indices, config.n_routed_experts).sum((1, 2))
        expected += (share * top * config.n_routed_experts / (config.num_experts_per_tok * SEQ)).sum(1).mean()
    loss, lm_loss, balance_loss, counts = model(tokens, tokens)
    assert_close(balance_loss, expected)
    assert_close(loss, lm_loss + config.aux_loss_alpha * expected)
    assert torch.equal(counts.long(), torch.stack([chosen.flatten().bincount(minlength=config.n_routed_experts) for *_, chosen in routed]))
