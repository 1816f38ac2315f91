"""Models of dsc's own: each distinct block once, calls for the rest, the same weights as the modules have, at every depth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsc import backends
from dsc.ir.core import Module
from dsc.ir.errors import DscError
from dsc.ir.ops.control import Call
from dsc.ir.parser import parse
from dsc.ir.verify import verify
from dsc.ir.walk import weights as weights_read
from dsc.models.aten.rules import type_of
from dsc.models.build import build, example_inputs, output_names
from dsc.models.config import load_config, shipped
from dsc.models.stack import trace_stack
from dsc.models.state_dict import to_numpy as array_of
from dsc.models.trace import trace

MODES: tuple[Any, ...] = ("forward", "train", "prefill", "decode")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", shipped())
def test_shipped_models(name: str, mode: Any) -> None:
    """The text is the program, and it reads exactly the weights that the module has."""
    program = trace(name, mode=mode)
    assert parse(str(verify(program))) == program
    config = load_config(name)
    expected = {key: type_of(value) for key, value in build(config, mode).state_dict().items()}
    assert weights_read(program) == expected
    assert [r.name.removeprefix("new_") for r in program.main.results] == list(output_names(config, mode))
    assert all(isinstance(op, Call) for op in program.main.ops)


@pytest.mark.parametrize("mode", MODES)
def test_depth_adds_calls_and_nothing_else(mode: Any) -> None:
    few, many = (trace("deepseek-v3-tiny", mode=mode, overrides=[f"num_hidden_layers={layers}"]) for layers in (3, 30))
    for ours, theirs in zip(few.funcs[1:], many.funcs[1:], strict=True):
        assert ours == theirs or ours.name == "total_loss"  # which adds up one loss of each layer
    assert len(many.main.ops) == len(few.main.ops) + 27


def test_functions_and_header() -> None:
    program = trace("deepseek-v3-tiny", batch=2)
    assert [func.name for func in program.funcs] == [
        "main",
        "embedding",
        "rotary",
        "decoder_layer",
        "decoder_layer_1",
        "final_norm",
        "head",
    ]
    assert str(program).splitlines()[0] == 'module { stage=traced, model="deepseek-v3-tiny", mode=forward, batch=2, seq=64 }'
    assert [str(p.type) for p in program.main.params] == ["i64[2, 64]"]
    routed = [op for op in program["decoder_layer_1"].ops if op.name in ("route", "dispatch", "combine", "swiglu", "grouped_matmul")]
    assert [op.name for op in routed] == [
        "route",
        "dispatch",
        "grouped_matmul",
        "grouped_matmul",
        "swiglu",
        "grouped_matmul",
        "combine",
        "swiglu",
    ]
    assert {op.id.rpartition("#")[0] for op in routed} == {"mlp.gate", "mlp.experts", "mlp.shared_experts"}


def test_sizes_follow_the_options() -> None:
    assert str(trace("deepseek-v3-tiny", seq=7).main.params[0].type) == "i64[1, 7]"
    decode = trace("deepseek-v3-tiny", mode="decode", batch=3, context=9, overrides=["num_hidden_layers=2"])
    assert [f"{p.name} {p.type}" for p in decode.main.params] == [
        "tokens i64[3]",
        "positions i64[3]",
        "latent_0 bf16[3, 9, 64]",
        "latent_1 bf16[3, 9, 64]",
    ]
    assert decode.attributes == {"model": "deepseek-v3-tiny", "mode": "decode", "batch": 3, "context": 9}


@pytest.mark.parametrize("name", ["deepseek-v3-tiny", "deepseek-llm-67b"])
def test_caches_are_updated(name: str) -> None:
    program = trace(name, mode="decode", context=16, overrides=["num_hidden_layers=2"])
    params, results, updates = program.main.params, program.main.results, program.main.updates
    assert {params[p].name for p in updates} == {p.name for p in params} - {"tokens", "positions"}
    assert all(results[r].name == f"new_{params[p].name}" for p, r in updates.items())


@pytest.mark.parametrize("mode", MODES)
def test_the_same_call_prints_the_same_text(mode: Any) -> None:
    assert str(trace("deepseek-v3-tiny", mode=mode)) == str(trace("deepseek-v3-tiny", mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["deepseek-v3-tiny", "llama"])
def test_traced_stack_gives_what_the_module_gives(family: str, mode: Any) -> None:
    """In float32, to 1e-5 of the largest magnitude; tokens, labels, positions and caches drawn at random."""
    fields = load_config("deepseek-v3-tiny", ["dtype=float32"]).to_dict()
    if family == "llama":
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        fields = {key: fields[key] for key in kept} | {"model_type": "llama", "num_key_value_heads": 2, "dtype": "float32"}
    config = load_config(fields)
    program = trace(config, mode=mode, batch=2, **({"context": 12} if mode == "decode" else {"seq": 16}))
    torch.manual_seed(0)
    module = build(config, mode, device="cpu")
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
        elif "bias" in name:
            parameter.data.normal_(0, 0.2)
    drawn = {"tokens": config.vocab_size, "labels": config.vocab_size, "positions": 12}
    inputs = tuple(
        torch.randint(0, drawn[name], tensor.shape) if name in drawn else torch.randn(tensor.shape)
        for name, tensor in example_inputs(config, mode, 2, 16, 12).items()
    )
    weights = {name: array_of(value) for name, value in module.state_dict().items()}
    found = backends.get("numpy").run(program, lambda name, _: weights[name], [array_of(x) for x in inputs])
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, map(array_of, expected), strict=True):
        assert isinstance(ours, np.ndarray)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert abs(ours - theirs).max() <= 1e-5 * abs(theirs).max()


class Block(nn.Module):
    is_block = True

    def __init__(self, width: int = 4, factor: float = 1.0, table: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 4, device="meta"))
        self.factor = factor
        if table is not None:
            self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        made = x @ self.weight.t() * self.factor
        return made + self.table.to(x.device) if hasattr(self, "table") else made


class MoEBlock(Block):
    pass


def stacked(*blocks: nn.Module, sizes: tuple[int, ...] = (3,)) -> Module:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(blocks)

        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            results = []
            for index in range(len(sizes)):
                hidden = inputs[index]
                for layer in self.layers:
                    hidden = layer(hidden)
                results.append(hidden)
            return tuple(results)

    inputs = {f"x{i}": torch.empty(size, 4, device="meta") for i, size in enumerate(sizes)}
    main, funcs, constants = trace_stack(Stacked(), inputs, [f"y{i}" for i in range(len(sizes))])
    return verify(Module((main, *funcs), constants=constants))


def test_equal_blocks_share_a_function() -> None:
    ones = torch.ones(4)
    assert len(stacked(Block(), Block(), Block()).funcs) == 2
    assert len(stacked(Block(table=ones), Block(table=ones.clone())).funcs) == 2
    assert [op.weights for op in stacked(Block(), Block()).main.ops if isinstance(op, Call)] == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    "other",
    [Block(factor=2.0), Block(factor=1), Block(table=torch.ones(4)), MoEBlock(), nn.Sequential()],
    ids=["scalar", "type of a scalar", "buffer", "class", "parameters"],
)
def test_blocks_that_differ_do_not(other: nn.Module) -> None:
    if isinstance(other, nn.Sequential):
        other = Block()
        other.weight = nn.Parameter(torch.empty(4, 4, dtype=torch.float64, device="meta"))
        with pytest.raises(DscError):  # float32 times float64: a function of its own, which torch refuses
            stacked(Block(), other)
        return
    assert len(stacked(Block(), other).funcs) == 3


def test_buffers_with_other_numbers_and_inputs_of_other_shapes() -> None:
    assert len(stacked(Block(table=torch.ones(4)), Block(table=torch.zeros(4))).funcs) == 3
    assert len(stacked(Block(), sizes=(3, 5, 3)).funcs) == 3


def test_names_of_functions() -> None:
    assert [func.name for func in stacked(Block(), MoEBlock(), Block(factor=2.0)).funcs] == ["main", "block", "moe_block", "block_1"]


def test_large_buffers_of_two_blocks_stay_apart() -> None:
    program = stacked(Block(table=torch.ones(2000, 4)), Block(table=torch.zeros(2000, 4)), sizes=(2000,))
    assert sorted(program.constants) == ["block.table", "block_1.table"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0, expected a whole number above 0"),
        ({"seq": -4}, "seq is -4, expected"),
        ({"mode": "backward"}, 'mode "backward" is unknown'),
        ({"inputs": (torch.zeros(1),)}, "a configuration's inputs follow from"),
        ({"overrides": ["n_group=3"]}, "n_routed_experts = 16 is not divisible by n_group = 3"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DscError, match=message):
        trace("deepseek-v3-tiny", **options)


def test_unknown_model() -> None:
    with pytest.raises(DscError, match="deepseek-v33"):
        trace("deepseek-v33")
