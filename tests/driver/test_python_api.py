"""The Python face: every line of the overview, and the example in every docstring."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import dsc

FUNCTIONS = ["trace", "parse", "apply", "run", "diff", "compile", "load"]


class Model(nn.Module):
    """A user's own module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 24)
        self.norm = nn.RMSNorm(24)
        self.head = nn.Linear(24, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.silu(self.norm(self.embedding(tokens))))


def test_the_overview(tmp_path: Path) -> None:
    """The lines that the README and the documentation show, one after the other."""
    model = Model()
    tokens = torch.randint(50, (2, 7))
    module = dsc.trace(model, (tokens,))
    module = dsc.apply(module, "simplify")
    out = dsc.run(module, weights=model.state_dict(), inputs=(tokens,), backend="numpy")
    assert isinstance(out, tuple)
    with torch.no_grad():
        np.testing.assert_allclose(out[0], model(tokens).numpy(), rtol=2e-5, atol=2e-6)
    report = dsc.diff(module, dsc.apply(module, "simplify"), weights=model.state_dict(), inputs=(tokens,))
    assert report.same
    text = str(module)
    assert dsc.parse(text) == module
    artifact = dsc.compile("deepseek-v3-tiny", out=tmp_path / "out", seq=16)
    assert dsc.load(tmp_path / "out").module == artifact.module == dsc.apply(dsc.trace("deepseek-v3-tiny", batch=1, seq=16), "simplify")
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    dsc.testing.assert_backends_agree(module, weights, (tokens.numpy(),), backends=("numpy", "numpy-f64"))


def test_what_is_no_program_is_told() -> None:
    module = dsc.parse("func @main(%x: f32[2]) {\n  %y: f32[2] = neg(%x)  @ main#1 F\n  return %y\n}\n")
    for call, said in (
        (lambda: dsc.apply("simplify", "simplify"), "cannot apply passes to a str: expected a module"),  # type: ignore[arg-type]
        (lambda: dsc.trace(3), "cannot trace a int: expected a torch module, or the name or path of a configuration"),  # type: ignore[arg-type]
        (lambda: dsc.diff(module, 3), "cannot run a int: expected a module"),  # type: ignore[arg-type]
        (lambda: dsc.run(None), "cannot run a NoneType: expected a module"),  # type: ignore[arg-type]
    ):
        with pytest.raises(dsc.DscError, match=f"^{said}"):
            call()


def test_public_names() -> None:
    assert set(dir(dsc)) == set(dsc.__all__)
    assert {*FUNCTIONS, "testing", "DscError"} <= set(dsc.__all__)
    for name in dsc.__all__:
        assert getattr(dsc, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'compyle'"):
        dsc.compyle  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_an_example_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function = getattr(dsc, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, f"dsc.{name}", globs={"dsc": dsc})
    assert any(f"dsc.{name}(" in example.source for example in test.examples), "the example does not show the function"
    shown: list[str] = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(test, out=shown.append)
    assert failed == 0, "".join(shown)
    assert tried > 0
    summary = inspect.getdoc(function)
    assert summary is not None
    assert len(summary.split("\n")[0]) > 20


@pytest.mark.parametrize("weights", ["state dict", "arrays", "folder"])
def test_weights_come_in_every_form(weights: str, tmp_path: Path) -> None:
    from dsc.models.checkpoint import save_checkpoint

    model = Model().to(torch.bfloat16)
    tokens = torch.randint(50, (2, 7))
    module = dsc.trace(model, (tokens,))
    arrays = {name: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for name, t in model.state_dict().items()}
    given: Any = {"state dict": model.state_dict(), "arrays": arrays, "folder": tmp_path / "checkpoint"}[weights]
    if weights == "folder":
        save_checkpoint(given, arrays, {})
    (found,) = dsc.run(module, weights=given, inputs=(tokens,))
    assert found.dtype == ml_dtypes.bfloat16
    with torch.no_grad():
        expected = model(tokens).float().numpy()
    assert np.abs(found.astype(np.float32) - expected).max() <= 2**-7 * np.abs(expected).max()


def test_inputs_come_in_every_form(scale: Path, tmp_path: Path) -> None:
    module = dsc.parse(scale.read_text())
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    file = tmp_path / "x.npz"
    np.savez(file, x=x)
    forms: list[Any] = [(x,), [x], {"x": x}, (torch.tensor(x),), {"x": torch.tensor(x)}, (x.tolist(),), file, str(file)]
    results = [dsc.run(module, inputs=given)[0] for given in forms]
    for found in results[1:]:
        np.testing.assert_array_equal(found, results[0])
    half = torch.tensor(x).to(torch.bfloat16)
    np.testing.assert_array_equal(dsc.run(module, inputs=(half,))[0], dsc.run(module, inputs=(half.float().numpy(),))[0])
    with pytest.raises(dsc.DscError, match=r"@main takes 1 input \(x\), found 2"):
        dsc.run(module, inputs=(x, x))


def test_inputs_are_rounded_to_what_the_program_takes(tmp_path: Path) -> None:
    """To nearest even, and FP8 saturates; the bytes of narrow types in an .npz file are taken as they are."""
    text = "func @main(%a: bf16[2], %b: f8e4m3[2]) {\n  return %a, %b\n}\n"
    module = dsc.parse(text)
    a, b = dsc.run(module, inputs=(np.array([1 + 2**-8, 1 + 3 * 2**-8]), np.array([1000.0, 2**-10])))
    assert a.astype(float).tolist() == [1.0, 1 + 2**-6]
    assert b.astype(float).tolist() == [448.0, 0.0]
    np.savez(tmp_path / "x.npz", a=a, b=b)
    for found, given in zip(dsc.run(module, inputs=tmp_path / "x.npz"), (a, b), strict=True):
        assert found.dtype == given.dtype
        np.testing.assert_array_equal(found.view(np.uint8), given.view(np.uint8))


def test_seeded_inputs_are_in_range_and_repeat(tiny: Path, tiny_modes: dict[str, Path]) -> None:
    from dsc.driver.inputs import seeded

    for path in (tiny, *tiny_modes.values()):
        module = dsc.load(path).module
        first, again = seeded(module), seeded(module)
        for p, x, y in zip(module.main.params, first, again, strict=True):
            np.testing.assert_array_equal(x, y)
            if p.name in ("tokens", "labels"):
                assert 0 <= x.min() <= x.max() < 320
                assert len(np.unique(x)) > 1 or x.size == 1
            elif p.name == "positions":
                assert 0 <= x.min() <= x.max() < 16
        assert not all(np.array_equal(x, y) for x, y in zip(first, seeded(module, seed=1), strict=True))


def test_an_observer_sees_and_replaces(scale: Path) -> None:
    module = dsc.parse(scale.read_text())
    seen = []

    def observe(site: Any, op: Any, operands: Any, results: Any) -> Any:
        seen.append(op.name)
        return (np.zeros_like(results[0]),) if op.name == "matmul" else None

    (found,) = dsc.run(module, observe=observe)
    assert seen == ["param", "matmul", "silu"]
    assert not found.any()
