"""Configurations: what load_config accepts, normalises and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsc.ir.errors import DscError
from dsc.models.config import load_config, shipped

NAMES = {
    "deepseek-v3",
    "deepseek-v3-tiny",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-coder-v2",
    "deepseek-coder-v2-lite",
    "deepseek-moe-16b",
    "deepseek-llm-67b",
    "deepseek-prover-v1.5-7b",
    "moonlight-16b-a3b",
    "kimi-k2",
}


def raw(name: str = "deepseek-v3-tiny", **changes: object) -> dict[str, object]:
    """The fields of a shipped config.json with some changed; a change to ... removes the field."""
    from dsc.models import config

    fields = json.loads((Path(config.__file__).parent / "configs" / f"{name}.json").read_text()) | changes
    return {key: value for key, value in fields.items() if value is not ...}


def test_shipped_names() -> None:
    assert set(shipped()) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_normalised_fields_read_back_to_the_same_configuration(name: str) -> None:
    config = load_config(name)
    assert load_config(config.to_dict()) == config
    assert load_config(json.loads(json.dumps(config.to_dict()))) == config


def test_a_file_a_folder_and_a_mapping_are_the_same_source(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw()))
    expected = load_config("deepseek-v3-tiny")
    assert load_config(tmp_path) == load_config(str(tmp_path / "config.json")) == load_config(raw()) == expected


def test_what_transformers_saves_is_read_as_the_same_configuration(tmp_path: Path) -> None:
    import transformers

    for name, kind in (
        ("deepseek-v3-tiny", "DeepseekV3Config"),
        ("deepseek-v2-lite", "DeepseekV2Config"),
        ("deepseek-llm-67b", "LlamaConfig"),
    ):
        fields = raw(name)
        getattr(transformers, kind)(**{key: value for key, value in fields.items() if key != "model_type"}).save_pretrained(tmp_path)
        saved, original = load_config(tmp_path).to_dict(), load_config(name).to_dict()
        known = [key for key in type(load_config(name)).model_fields if key != "rope_interleave" or kind != "LlamaConfig"]
        assert {key: saved[key] for key in known} == {key: original[key] for key in known}, name


def test_overrides_as_text_and_as_mapping() -> None:
    config = load_config("deepseek-v3", ["num_hidden_layers=4", "dtype=float32", "q_lora_rank=null", "norm_topk_prob=false"])
    assert (config.num_hidden_layers, config.dtype, config.q_lora_rank, config.norm_topk_prob) == (4, "float32", None, False)
    assert load_config("deepseek-v3", {"num_hidden_layers": "4"}) == load_config("deepseek-v3", ["num_hidden_layers=4"])
    assert load_config("deepseek-v3", ["torch_dtype=float16"]).dtype == "float16"
    assert load_config("deepseek-v3", ['rope_scaling={"type": "default"}']).rope_scaling is None


def test_old_and_new_spellings_agree() -> None:
    scaling = raw()["rope_scaling"]
    assert isinstance(scaling, dict)
    new = {"rope_type" if key == "type" else key: value for key, value in scaling.items()} | {"rope_theta": 10000.0}
    fields = raw(rope_scaling=..., rope_theta=..., rope_parameters=new, torch_dtype=..., dtype="bfloat16")
    fields["num_mtp_layers"] = fields.pop("num_nextn_predict_layers")
    assert load_config(fields) == load_config("deepseek-v3-tiny")


def test_defaults_of_the_reports() -> None:
    config = load_config(raw(aux_loss_alpha=...))
    assert (config.aux_loss_alpha, config.mtp_loss_weight) == (1e-4, 0.3)
    assert load_config(raw("deepseek-llm-67b", num_key_value_heads=...)).num_key_value_heads == 64
    assert load_config(raw(scoring_func=..., topk_method=...)) == load_config(raw())


REFUSED = [
    ({"model_type": ...}, "model_type is missing, expected one of deepseek, deepseek_v2, deepseek_v3, kimi_k2, llama"),
    ({"model_type": "gpt2"}, 'model_type = "gpt2" is unknown, expected one of deepseek, deepseek_v2, deepseek_v3, kimi_k2, llama'),
    ({"model_type": 3}, "model_type = 3 is unknown"),
    ({"hidden_size": ..., "kv_lora_rank": ...}, 'missing hidden_size, kv_lora_rank, which model_type "deepseek_v3" needs'),
    ({"q_lora_rank": ...}, "missing q_lora_rank"),
    ({"hidden_size": None}, "missing hidden_size"),
    ({"n_group": 3}, "n_routed_experts = 16 is not divisible by n_group = 3"),
    ({"topk_group": 5}, "topk_group = 5 exceeds n_group = 4"),
    ({"num_experts_per_tok": 17}, "num_experts_per_tok = 17 exceeds n_routed_experts = 16"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 exceeds the 8 experts in topk_group = 2 groups"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok must be positive, found 0"),
    ({"first_k_dense_replace": 4}, "first_k_dense_replace = 4 exceeds num_hidden_layers = 3"),
    ({"num_key_value_heads": 2}, "num_key_value_heads = 2 differs from num_attention_heads = 4"),
    ({"qk_rope_head_dim": 15}, "the rotated head dimension must be even, found 15"),
    ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported, expected "silu"'),
    ({"attention_bias": True}, "attention_bias = true is not supported, expected false"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = true is not supported, expected false"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling type "linear" is not supported, expected "yarn" or "default"'),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.original_max_position_embeddings is missing"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object or null"),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5 is not supported, expected 1",
    ),
    ({"hidden_size": "144"}, 'hidden_size is "144", expected a whole number'),
    ({"hidden_size": 144.5}, "hidden_size is 144.5, expected a whole number"),
    ({"hidden_size": -1}, "hidden_size is -1, expected more than 0"),
    ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
    ({"scoring_func": "tanh"}, "scoring_func is \"tanh\", expected 'sigmoid' or 'softmax'"),
    ({"torch_dtype": "int8"}, 'dtype is "int8"'),
    ({"torch_dtype": "float32", "dtype": "bfloat16"}, "contradicts dtype"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_a_bad_field_is_one_line_that_names_the_file(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw(**changes)))
    with pytest.raises(DscError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek-llm-67b", {"num_key_value_heads": 7}, "num_attention_heads = 64 is not divisible by num_key_value_heads = 7"),
        (
            "deepseek-llm-67b",
            {"num_attention_heads": 60},
            "hidden_size = 8192 is not divisible by num_attention_heads = 60, and no head_dim",
        ),
        ("deepseek-llm-67b", {"num_nextn_predict_layers": 1}, 'num_nextn_predict_layers = 1 needs experts, but model_type is "llama"'),
        ("deepseek-v2", {"n_group": ...}, "missing n_group"),
    ],
)
def test_contradictions_of_other_families(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DscError, match=message.replace("(", r"\(")):
        load_config(raw(name, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "llama",\n oops}', ":2:2: not JSON: "),
        (b"\xff\xfe", "not JSON: byte 0 is not UTF-8 text"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"", ":1:1: not JSON: "),
    ],
)
def test_a_file_that_is_not_a_json_object(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(DscError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DscError, match=r"folder without config\.json"):
        load_config(tmp_path)
    with pytest.raises(DscError, match="found neither a file, nor a folder, nor a shipped model; did you mean deepseek-v3"):
        load_config("deepseek-v33")
    with pytest.raises(DscError, match="shipped: deepseek-coder-v2, "):
        load_config("zzz")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hiden_size=4", 'unknown configuration field "hiden_size"; did you mean hidden_size'),
        ("xyzzy=4", 'unknown configuration field "xyzzy"'),
        ("hidden_size", 'override "hidden_size": expected KEY=VALUE'),
        ("=4", 'override "=4": expected KEY=VALUE'),
        ("hidden_size=wide", 'hidden_size is "wide", expected a whole number'),
        ("n_group=7", "n_routed_experts = 16 is not divisible by n_group = 7"),
    ],
)
def test_a_bad_override(override: str, message: str) -> None:
    with pytest.raises(DscError) as caught:
        load_config("deepseek-v3-tiny", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
