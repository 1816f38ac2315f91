"""What every stage prints parses back to the same module, and prints again byte for byte: every shipped model, every mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import dsc
from dsc.ir.core import Module
from dsc.ir.verify import verify
from dsc.models.config import shipped
from dsc.passes.manager import parse_pipeline, run_pipeline

MODES = ("forward", "train", "decode")
PIPELINE = "simplify,quantize-fp8,simplify"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", shipped())
def test_round_trip(traced: Callable[[str, str], Module], name: str, mode: str) -> None:
    stages = [traced(name, mode)]
    run_pipeline(stages[0], parse_pipeline(PIPELINE), on_snapshot=lambda record, module: stages.append(module))
    assert [module.stage for module in stages] == ["traced", "traced", "quantized", "quantized"]
    for module in stages:
        text = str(module)
        again = dsc.parse(text)
        assert again == module
        assert str(again) == text
        verify(again)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", shipped())
def test_passes_take_the_parsed_text_as_they_take_the_trace(traced: Callable[[str, str], Module], name: str, mode: str) -> None:
    module = traced(name, mode)
    assert dsc.apply(dsc.parse(str(module)), PIPELINE) == dsc.apply(module, PIPELINE)


def test_decode_says_which_results_are_the_new_caches(traced: Callable[[str, str], Module]) -> None:
    for name in shipped():
        main = traced(name, "decode").main
        assert set(main.updates) == set(range(2, len(main.params))), "a cache is not updated"
        for param, result in main.updates.items():
            assert main.results[result].type == main.params[param].type
            assert main.results[result].name == f"new_{main.params[param].name}"
        assert dsc.parse(str(traced(name, "decode"))).main.updates == main.updates


def test_equal_layers_are_one_function(traced: Callable[[str, str], Module]) -> None:
    """61 layers are 61 calls of two functions."""
    module = traced("deepseek-v3", "forward")
    calls = [op.callee for op in module.main.ops if op.name == "call" and op.weights.startswith("model.layers.")]
    assert len(calls) == 61
    assert set(calls) == {"decoder_layer", "decoder_layer_1"}
    assert len(module.funcs) == 7
