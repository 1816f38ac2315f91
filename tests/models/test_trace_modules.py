"""Any nn.Module through the importer: in-place writes, shared and tied weights, buffers, structure of the result, what it is told."""

from __future__ import annotations

import logging
import sys
import textwrap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dsc import backends
from dsc.ir.core import Module
from dsc.ir.errors import DscError
from dsc.ir.ops.control import Constant, Literal, Param
from dsc.ir.parser import parse
from dsc.ir.verify import verify
from dsc.models.state_dict import to_numpy as array_of
from dsc.models.trace import load_factory, trace


def run(program: Module, module: nn.Module, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    weights = {name: array_of(value) for name, value in module.state_dict().items()}
    return list(backends.get("numpy").run(program, lambda name, _: weights[name], [array_of(x) for x in inputs]))  # type: ignore[arg-type]


def assert_same(module: nn.Module, *inputs: Tensor, bound: float = 1e-5) -> Module:
    """The traced module gives what torch gives, to `bound` of the largest magnitude, and its text is the same module."""
    program = trace(module.eval(), inputs)
    assert parse(str(verify(program))) == program
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    found = run(program, module, inputs)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, map(array_of, expected), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        assert abs(a - b).max(initial=0) <= bound * abs(b).max(initial=0)
    return program


class FromFunction(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class Encoder(nn.Module):
    """What users write: torch's own layers, einsum, a buffer, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Dropout(), nn.Linear(24, 16), nn.LayerNorm(16))
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(6, 6).tril().bool())
        self.register_buffer("positions", torch.randn(6, 16), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.layer(self.embed(tokens) + self.positions, is_causal=False)
        scores = torch.einsum("bsd,btd->bst", hidden, hidden).masked_fill(~self.mask, -1e9).softmax(-1)
        hidden = self.mlp(scores @ hidden)
        return self.head(hidden), {"hidden": hidden, "best": hidden.argmax(-1)}


def test_encoder() -> None:
    torch.manual_seed(0)
    program = assert_same(Encoder(), torch.randint(0, 11, (2, 6)))
    params = {op.path for op in program.main.ops if isinstance(op, Param)}
    assert params < set(Encoder().state_dict())
    assert {"mask", "layer.self_attn.in_proj_weight", "mlp.0.weight"} <= params
    assert "positions" not in params  # no checkpoint has it
    components = {op.id.rpartition("#")[0] for op in program.main.ops}
    assert {"layer.self_attn", "mlp.4", "embed"} <= components
    assert [p.name for p in program.main.params] == ["tokens"]


def writes(x: Tensor) -> list[Tensor]:
    y = torch.zeros(4, 6)
    left, flat, same, copied, first, second = y[:, :2], y.view(24), y.to(torch.float32), y.clone(), *y.split(3, 1)
    turned, row = y.t(), y[1]
    left.copy_(x[:, :2])
    flat[3:5] = 1
    y += 1
    y.relu_()
    first.mul_(2)
    row.add_(x[0])
    turned[0, 2] = 5.0
    y[:, ::2] = x[:, ::2] * 2
    z = x * 2
    z[1, 2] = 7.0
    z[z > 3] = 0
    z[torch.tensor([0, 2])] = x[:2]
    z.masked_fill_(x < 0, 3.0)
    sums = torch.zeros(5, 6).index_add_(0, torch.tensor([1, 1, 3, 0]), x)
    sums[:, 1] += 3
    sums[-1].fill_(9)
    sums.unsqueeze(0).permute(2, 0, 1)[3].zero_()
    return [flat.sum(), same, second, z, copied, turned, sums, y]


def test_in_place_writes_reach_every_view() -> None:
    torch.manual_seed(0)
    assert_same(FromFunction(writes), torch.randn(4, 6))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6), st.integers(0, 2**16))
def test_drawn_writes_through_drawn_views(steps: list[tuple[int, int, int]], seed: int) -> None:
    """Each step writes into one of six views of one tensor, in one of four ways, and reads another view. Bit for bit."""

    def views(y: Tensor) -> list[Tensor]:
        return [y, y[1:3], y.view(2, 10)[1], y.t(), y[:, ::2], y.unsqueeze(1).chunk(2)[1]]

    def function(x: Tensor) -> list[Tensor]:
        y = x * 1.5
        named, seen = views(y), []
        for target, read, how in steps:
            view = named[target]
            if how == 0:
                view.add_(1.0)
            elif how == 1:
                view.copy_(view * 2 - 1)
            elif how == 2:
                view[0] = 0.25
            else:
                view.mul_(named[read].flatten()[0] * 0.125)
            seen.append(named[read].clone())
        return [*seen, *views(y)]

    assert_same(FromFunction(function), torch.from_numpy(np.random.default_rng(seed).standard_normal((4, 5), np.float32)), bound=0)


def test_writing_to_an_input_is_refused() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    with pytest.raises(DscError, match=r"x is changed in place, by aten\.add\.Tensor at .*test_trace_modules\.py:\d+: return x\.add_"):
        trace(Adds(), (torch.zeros(2),))


def test_joined_pieces_are_one_concat() -> None:
    """`new_empty` filled piece by piece, as DeepSeek's keys are in transformers, leaves no trace of the empty tensor."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        whole = a.new_empty(2, 5)
        whole[:, :2].copy_(a)
        whole[:, 2:].copy_(b)
        return whole

    program = assert_same(FromFunction(function), torch.randn(2, 2), torch.randn(2, 3))
    assert [op.name for op in program.main.ops] == ["concat"]


def test_scalars_keep_their_precision_and_do_not_widen() -> None:
    program = trace(FromFunction(lambda x: x * 0.1), (torch.ones(3, dtype=torch.bfloat16),))
    literal, product = program.main.ops
    assert isinstance(literal, Literal)
    assert (str(literal.result.type), literal.values) == ("f32[]", (0.1,))
    assert str(product.results[0].type) == "bf16[3]"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_small_buffers_are_exact_in_text(dtype: torch.dtype) -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            numbers = torch.from_numpy(np.random.default_rng(0).standard_normal(256)).to(dtype)
            self.register_buffer(
                "numbers", torch.cat([numbers, numbers * 1e-6, numbers.new_tensor([0.0, -0.0, torch.inf])]), persistent=False
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.numbers + x

    module = Buffered()
    program = parse(str(trace(module, (torch.zeros((), dtype=dtype),))))
    literal = next(op for op in program.main.ops if isinstance(op, Literal))
    (found,) = backends.get("numpy").evaluate(literal, ())
    assert isinstance(found, np.ndarray)
    assert found.tobytes() == array_of(module.numbers).tobytes()


def test_large_buffers_are_constants() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(65, 64), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table

    module = Buffered()
    program = assert_same(module, torch.randn(2, 65))
    (constant,) = (op for op in program.main.ops if isinstance(op, Constant))
    assert constant.path == "table"
    assert np.array_equal(program.constants["table"], module.table.numpy())


def test_bfloat16_arrays_keep_their_bits() -> None:
    numbers = torch.randn(100).to(torch.bfloat16)
    assert array_of(numbers).dtype == ml_dtypes.bfloat16
    assert array_of(numbers).view(np.int16).tobytes() == numbers.view(torch.int16).numpy().tobytes()


def test_the_same_call_prints_the_same_text() -> None:
    torch.manual_seed(0)
    module = Encoder().eval()
    inputs = (torch.randint(0, 11, (2, 6)),)
    assert str(trace(module, inputs)) == str(trace(module, inputs))


def test_all_unknown_ops_are_listed_with_their_lines() -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.linalg.qr(x).Q
            z = torch.fft.fft(y)
            return y + z.abs() + torch.linalg.eigh(x).eigenvalues

    with pytest.raises(DscError) as caught:
        trace(Strange(), (torch.eye(3),))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for line, (op, code) in zip(
        lines, [("linalg_qr", "torch.linalg.qr(x).Q"), ("fft", "torch.fft.fft(y)"), ("linalg_eigh", "torch.linalg.eigh(x)")], strict=True
    ):
        assert op in line
        assert "has no counterpart in the IR, at " in line
        assert "test_trace_modules.py:" in line
        assert code in line


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[x > 0] * 2, "the shape of its result depends on the data, expected a static one"),
        (lambda x: F.cross_entropy(x, torch.tensor([0, 1]), label_smoothing=0.1), "this cross_entropy is not supported, expected labels"),
        (lambda x: F.pad(x[None], (1, 1), mode="reflect"), "has no counterpart in the IR|is not supported"),
        (lambda x: torch.norm(x, 1, dim=1), "a norm of order 1 is not supported, expected 2"),
        (lambda x: x.to(torch.complex64) + 1, "complex numbers are not supported|no counterpart"),
        (lambda x: F.dropout(x, 0.5, training=True), "call model.eval"),
        (lambda x: x.undefined, "torch.export cannot trace FromFunction: AttributeError"),
    ],
)
def test_what_is_refused_says_so(function: Any, message: str) -> None:
    with pytest.raises(DscError, match=message) as caught:
        trace(FromFunction(function), (torch.ones(2, 3),))
    assert "\n" not in str(caught.value)


def test_a_branch_on_data_is_one_line_that_names_it(capfd: pytest.CaptureFixture[str]) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    level = logging.root.manager.disable
    with pytest.raises(DscError, match=r"torch\.export cannot trace Branch: .*test_trace_modules\.py:\d+: return x if x\.sum") as caught:
        trace(Branch(), (torch.ones(2, 3),))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == "", "torch's own account of the graph is shown as well"
    assert logging.root.manager.disable == level


def test_what_a_module_says_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    class Talks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print("shape", tuple(x.shape), file=sys.stderr)
            return -x

    trace(Talks(), (torch.ones(2, 3),))
    assert "shape (2, 3)\n" in capfd.readouterr().err


def test_a_module_needs_inputs() -> None:
    with pytest.raises(DscError, match=r"tracing Linear needs example inputs"):
        trace(nn.Linear(2, 2))
    with pytest.raises(DscError, match=r"inputs are a Tensor, expected a tuple: trace\(module, \(x,\)\)"):
        trace(nn.Linear(2, 2), torch.ones(3, 2))  # type: ignore[arg-type]


FACTORY = """
    import torch
    from torch import nn

    def make():
        return nn.Linear(3, 2), (torch.zeros(1, 3),)

    def broken():
        return undefined_name

    def wrong():
        return 3

    value = 5

    def long():
        raise ValueError("one line\\n  and another")
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(textwrap.dedent(FACTORY))
    return path


def test_factory(factory: Path) -> None:
    program = trace(f"{factory}:make")
    assert [str(r.type) for r in program.main.results] == ["f32[1, 2]"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"model\.py:9: NameError: name 'undefined_name' is not defined"),
        ("wrong", r"model\.py:wrong returned int, expected \(module, \(input, \.\.\.\)\)"),
        ("value", r"model\.py has no function value"),
        ("absent", r"model\.py has no function absent"),
        ("1", r"expected file\.py:function"),
        ("long", r"model\.py:\d+: ValueError: one line and another$"),
    ],
)
def test_factory_errors(factory: Path, name: str, message: str) -> None:
    with pytest.raises(DscError, match=message) as caught:
        load_factory(f"{factory}:{name}")
    assert "\n" not in str(caught.value)


def test_factory_file_errors(tmp_path: Path) -> None:
    with pytest.raises(DscError, match=r"absent\.py: no such file"):
        load_factory(f"{tmp_path}/absent.py:make")
    (tmp_path / "syntax.py").write_text("def make(:\n")
    with pytest.raises(DscError, match=r"syntax\.py:1: SyntaxError"):
        load_factory(f"{tmp_path}/syntax.py:make")
