"""The numbers of `dsc inspect` against the configs and against sums by hand."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

import dsc
from dsc.driver.inspect import describe_parameters, describe_program, parts
from dsc.ir.core import Module
from dsc.models.build import build
from dsc.models.config import load_config, shipped


@pytest.mark.parametrize("name", shipped())
def test_parameters_are_those_of_the_torch_module(traced: Callable[[str, str], Module], name: str) -> None:
    """Experts are stored stacked, buffers with numbers of a checkpoint are counted: the sum is over the state dict."""
    value, text = describe_parameters(traced(name, "forward"))
    tensors = build(load_config(name)).state_dict()
    assert value["total"] == sum(t.numel() for t in tensors.values())
    assert value["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for key in ("total", "active", "bytes"):
        assert value[key] == sum(part[key] for part in value["parts"])
    assert all(0 < part["active"] <= part["total"] for part in value["parts"])
    assert f"{value['total']:,}" in text


def test_parts_of_the_tiny_model(traced: Callable[[str, str], Module]) -> None:
    """By hand from its config: 3 layers, the first dense; 144 wide; 16 experts of 56, 4 a token, and a shared one."""
    h, layers, moe = 144, 3, 2
    attention = 72 * h + 4 * 48 * 72 + (48 + 16) * h + 4 * (32 + 40) * 48 + h * 4 * 40
    norms = layers * (2 * h + 72 + 48) + h
    expert = 3 * h * 56
    expected = {
        "embedding": (320 * h, 320 * h),
        "output head": (320 * h, 320 * h),
        "attention": (layers * attention, layers * attention),
        "norms": (norms, norms),
        "dense FFN": (3 * h * 272, 3 * h * 272),
        "routed experts": (moe * 16 * expert, moe * 4 * expert),
        "shared experts": (moe * expert, moe * expert),
        "router": (moe * (16 * h + 16), moe * (16 * h + 16)),
    }
    assert {p.name: (p.total, p.active) for p in parts(traced("deepseek-v3-tiny", "forward"))} == expected


def test_published_figures_of_deepseek_v3(traced: Callable[[str, str], Module]) -> None:
    """671 B, 37 B a token (DeepSeek-V3 report, abstract); the embedding is a look-up and is left out of the latter."""
    value, text = describe_parameters(traced("deepseek-v3", "forward"))
    assert round(value["total"] / 1e9) == 671
    assert round(value["active_without_embedding"] / 1e9) == 37
    assert text.endswith("671.03 B parameters, 37.55 B active per token (36.63 B without the input embedding)")


def test_flops_by_hand(traced: Callable[[str, str], Module]) -> None:
    """Products of the dense layer over 16 tokens, two a multiply-add."""
    value, _ = describe_program(traced("deepseek-v3-tiny", "forward"))
    by_name = {f["name"]: f for f in value["functions"]}
    assert by_name["head"]["flops"] == 2 * 16 * 144 * 320
    weights = 72 * 144 + 192 * 72 + 64 * 144 + 288 * 48 + 144 * 160 + 3 * 144 * 272
    products = 2 * 16 * weights
    attention = 2 * 4 * 16 * 16 * (48 + 40)
    assert products + attention // 2 <= by_name["decoder_layer"]["flops"] <= (products + attention) * 1.05
    runs = {"embedding": 1, "rotary": 1, "decoder_layer": 1, "decoder_layer_1": 2, "final_norm": 1, "head": 1}
    assert by_name["main"]["flops"] == sum(by_name[name]["flops"] * n for name, n in runs.items())
    assert {name: by_name[name]["calls"] for name in runs} == runs


def test_the_cache_of_deepseek_v3_is_576_values_a_token_and_layer(traced: Callable[[str, str], Module]) -> None:
    main = traced("deepseek-v3", "decode").main
    caches = [p for p in main.params if p.name.startswith("latent_")]
    assert len(caches) == 61
    assert all(prod(map(int, p.tensor.shape)) == 16 * 576 for p in caches)


def test_memory_of_the_head(command: Any, tiny: Path) -> None:
    """Its input is its caller's and its weight is counted with the weights: 16 x 320 logits in BF16 are left."""
    plan = command("inspect", tiny, "--memory", "--json").json["memory"]
    assert plan["functions"]["head"] == {"peak_bytes": 16 * 320 * 2, "at": "head#2", "ops": 2}
    assert plan["output_bytes"] == 16 * 320 * 2
    assert plan["input_bytes"] == 16 * 8
    assert (
        plan["weight_bytes"] == sum(plan["weights"].values()) == command("inspect", tiny, "--params", "--json").json["parameters"]["bytes"]
    )
    assert plan["weights"] == {"bf16": 2 * (1_249_016 - 32), "f32": 4 * 32}
    text = command("inspect", tiny, "--memory").out
    assert text.startswith("weights  2.50 MB (2.50 MB in bf16, 128 B in f32)\ninputs   128 B\nresults  10.24 kB\nin all   ")


def test_a_source_is_inspected_as_its_artifact_is(command: Any, tiny_modes: dict[str, Path]) -> None:
    for mode in tiny_modes:
        found = command("inspect", tiny_modes[mode], "--after", "traced", "--json").json["program"]
        value, _ = describe_program(dsc.trace("deepseek-v3-tiny", mode=mode, **{"context" if mode == "decode" else "seq": 16}))
        assert found == value
