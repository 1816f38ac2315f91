"""The artifact: complete or absent, relocatable, and what it holds is what ran."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import dsc
from dsc.driver.measure import same_bits

BUFFERS = {
    "i16": torch.arange(-3000, 3000, dtype=torch.int16),
    "i8": torch.arange(-3000, 3000).to(torch.int8),
    "bf16": torch.linspace(-3, 3, 6000, dtype=torch.bfloat16),
    "f32": torch.linspace(-3, 3, 6000),
    "f64": torch.linspace(-3, 3, 6000, dtype=torch.float64),
    "f16": torch.linspace(-3, 3, 6000, dtype=torch.float16),
    "i64": torch.arange(-3000, 3000) * 2**40,
    "bool": torch.arange(6000) % 3 == 0,
}


class WithBuffers(nn.Module):
    """Adds buffers too large for a literal, of every dtype, that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        for name, buffer in BUFFERS.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.where(x > 0, getattr(self, name), getattr(self, name).flip(0)) for name in BUFFERS)


@pytest.fixture(scope="module")
def with_constants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a constants.safetensors."""
    folder = tmp_path_factory.mktemp("constants")
    (folder / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport torch\n"
        f"from {Path(__file__).stem} import WithBuffers\n\ndef make():\n    return WithBuffers(), (torch.zeros(6000),)\n"
    )
    return dsc.compile(f"{folder / 'mine.py'}:make", out=folder / "out").path


def test_what_is_in_it(tiny: Path) -> None:
    files = sorted(str(p.relative_to(tiny)) for p in tiny.rglob("*") if p.is_file())
    assert files == ["ir/00-traced.dsc", "ir/01-simplify.dsc", "manifest.json", "plan/memory.json", "report.html"]
    manifest = dsc.load(tiny).manifest
    assert manifest.model_dump(mode="json") == json.loads((tiny / "manifest.json").read_text())
    assert (manifest.source, manifest.source_kind, manifest.mode, manifest.stage) == ("deepseek-v3-tiny", "config", "forward", "traced")
    assert manifest.dsc_version == dsc.__version__
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.config is not None
    assert manifest.config["hidden_size"] == 144
    assert [(p.name, p.ops, p.diff) for p in manifest.passes] == [("traced", 131, None), ("simplify", 131, None)]


def test_every_snapshot_parses_back_and_a_diff_stands_where_something_changed(tmp_path: Path) -> None:
    out = dsc.compile("deepseek-v3-tiny", out=tmp_path / "out", seq=16, passes="simplify,quantize-fp8,simplify").path
    artifact = dsc.load(out)
    module = dsc.trace("deepseek-v3-tiny", seq=16)
    for record, pipeline in zip(artifact.manifest.passes, (None, "simplify", "quantize-fp8", "simplify"), strict=True):
        before, module = module, dsc.apply(module, pipeline) if pipeline else module
        text = (out / record.file).read_text()
        assert dsc.parse(text) == module
        assert text == str(module)
        assert record.ops == sum(len(f.ops) for f in module.funcs)
        assert (record.diff is not None) == (module != before)
    assert [p.diff for p in artifact.manifest.passes] == [None, None, "ir/02-quantize-fp8.diff", None]
    assert artifact.module == module
    assert artifact.after("quantize-fp8") == dsc.apply(dsc.trace("deepseek-v3-tiny", seq=16), "quantize-fp8")


def test_a_diff_is_a_patch(tmp_path: Path) -> None:
    """`patch` turns the text before into the text after."""
    patch = shutil.which("patch")
    if patch is None:
        pytest.skip("needs the program patch")
    out = dsc.compile("deepseek-v3-tiny", out=tmp_path / "out", seq=16, passes="quantize-fp8").path
    before, after = (out / "ir" / name for name in ("00-traced.dsc", "01-quantize-fp8.dsc"))
    copy = tmp_path / "copy.dsc"
    shutil.copy(before, copy)
    assert os.spawnv(os.P_WAIT, patch, [patch, "-s", str(copy), str(out / "ir" / "01-quantize-fp8.diff")]) == 0
    assert copy.read_text() == after.read_text()


def test_it_can_be_moved(command: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of it says where it was."""
    (tmp_path / "far").mkdir()
    moved = Path(shutil.copytree(tiny, tmp_path / "far" / "away"))
    monkeypatch.chdir(tmp_path / "far")
    (expected,), (found,) = dsc.run(dsc.load(tiny)), dsc.run(dsc.load("away"))
    np.testing.assert_array_equal(found, expected)
    assert command("diff", "away", tiny).code == 0
    texts = [p.read_text() for p in moved.rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert not any(str(tiny.parent) in text for text in texts)


def test_constants_come_back(with_constants: Path) -> None:
    artifact = dsc.load(with_constants)
    assert artifact.constants.keys() == BUFFERS.keys()
    for name, buffer in BUFFERS.items():
        expected = buffer.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if name == "bf16" else buffer.numpy()
        assert artifact.constants[name].dtype == expected.dtype
        np.testing.assert_array_equal(artifact.constants[name], expected)
    x = torch.linspace(-1, 1, 6000)
    for found, buffer in zip(dsc.run(artifact, inputs=(x,)), WithBuffers()(x), strict=True):
        np.testing.assert_array_equal(found.astype(np.float64), buffer.double().numpy())


def test_a_text_of_an_artifact_is_read_with_its_constants(with_constants: Path, tmp_path: Path) -> None:
    again = dsc.compile(with_constants / "ir" / "00-traced.dsc", out=tmp_path / "out")
    report = dsc.diff(dsc.load(with_constants), again)
    assert report.same
    assert len(report.outputs) == len(BUFFERS)


def test_an_artifact_is_replaced_as_a_whole(scale: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dsc.compile(scale, out=out, passes="simplify,quantize-fp8,simplify")
    (out / "kernels").mkdir()
    (out / "kernels" / "stale.py").write_text("")
    dsc.compile(scale, out=out, passes="")
    assert sorted(p.name for p in out.rglob("*")) == ["00-traced.dsc", "ir", "manifest.json", "memory.json", "plan", "report.html"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_out_may_be_an_empty_folder_or_a_link_to_one(scale: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    dsc.compile(scale, out=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert dsc.load(tmp_path / "real").module == dsc.load(tmp_path / "link").module


def test_a_new_folder_has_the_usual_permissions(scale: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    out = dsc.compile(scale, out=tmp_path / "a" / "b" / "out").path
    assert out.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_two_compilations_give_the_same_program(scale: Path, tmp_path: Path) -> None:
    a, b = (dsc.compile("deepseek-v3-tiny", out=tmp_path / name, seq=16).path for name in "ab")
    for file in ("ir/00-traced.dsc", "ir/01-simplify.dsc", "plan/memory.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes()


def test_weights_are_recorded_and_used(command: Any, scale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was given to compile is what run takes, whatever the working directory; a given one goes before it."""
    from dsc.models.checkpoint import save_checkpoint

    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_checkpoint(tmp_path / "weights", {"w": w}, {})
    monkeypatch.chdir(tmp_path)
    assert command("compile", scale, "-o", "own", "--weights", "weights").code == 0
    assert command("compile", scale, "-o", "seven", "--weights", "random:7").code == 0
    assert dsc.load("own").manifest.weights == str(tmp_path / "weights")
    x = np.ones((2, 4), np.float32)
    y = x @ w.T
    np.testing.assert_allclose(dsc.run(dsc.load("own"), inputs=(x,))[0], y / (1 + np.exp(-y)), rtol=1e-6)
    monkeypatch.chdir("/")
    done = command("run", tmp_path / "own")
    assert done.err == f"dsc: took weights {tmp_path / 'weights'} and seeded inputs\n"
    assert command("run", tmp_path / "seven").err == "dsc: took weights random:7 and seeded inputs\n"
    seven = dsc.run(dsc.load(tmp_path / "seven"))
    np.testing.assert_array_equal(seven, dsc.run(dsc.load(tmp_path / "own"), weights="random:7"))
    assert not np.array_equal(seven, dsc.run(dsc.load(tmp_path / "own")))


def test_a_program_without_weights_is_compared_on_those_of_the_other(scale: Path, tmp_path: Path) -> None:
    seven = dsc.compile(scale, out=tmp_path / "seven", weights="random:7")
    none = dsc.compile(scale, out=tmp_path / "none")
    zero = dsc.compile(scale, out=tmp_path / "zero", weights="random:0")
    assert dsc.diff(seven, none).same
    assert dsc.diff(none, seven).same
    assert not dsc.diff(seven, zero).same
    assert dsc.diff(seven, zero, weights="random:1").same


def test_simplifying_keeps_the_random_weights(tmp_path: Path) -> None:
    """Random weights are keyed by name, so an artifact with and one without passes are the same program to the last bit."""
    for mode in ("forward", "train", "decode"):
        size = {"context" if mode == "decode" else "seq": 16}
        plain, simple = (
            dsc.compile("deepseek-v3-tiny", out=tmp_path / mode / passes, mode=mode, passes=passes, weights="random:5", **size)
            for passes in ("", "simplify")
        )
        assert all(same_bits(a, b) for a, b in zip(dsc.run(plain), dsc.run(simple), strict=True))


def test_random_weights_do_not_depend_on_what_else_there_is(scale: Path, tmp_path: Path) -> None:
    """Another layer, another order, another backend: a tensor of a name is what it was."""
    short, long = (dsc.trace("deepseek-v3-tiny", seq=16, overrides=(f"num_hidden_layers={n}",)) for n in (2, 3))
    seen: dict[int, dict[str, np.ndarray]] = {}
    for i, module in enumerate((short, long)):
        params: dict[str, np.ndarray] = {}

        def note(site: Any, op: Any, operands: Any, results: Any, params: dict[str, np.ndarray] = params) -> None:
            if op.name == "param":
                params[f"{site.weights}.{op.path}"] = results[0]

        dsc.run(module, weights="random:3", observe=note)
        seen[i] = params
    shared = seen[0].keys() & seen[1].keys()
    assert len(shared) > 25
    for name in shared:
        np.testing.assert_array_equal(seen[0][name], seen[1][name])


def test_memory_plan_against_sums_by_hand(command: Any, tiny: Path, scale: Path, tmp_path: Path) -> None:
    """x f32[2, 4] is 32 bytes, w f32[3, 4] 48, y and z f32[2, 3] 24 each; the most at once, beside x and w, is y and z at the last op."""
    out = dsc.compile(scale, out=tmp_path / "out").path
    plan = json.loads((out / "plan" / "memory.json").read_text())
    assert plan == {
        "weights": {"f32": 48},
        "weight_bytes": 48,
        "input_bytes": 32,
        "output_bytes": 24,
        "total_bytes": 48 + 32 + 24 + 24,
        "functions": {"main": {"peak_bytes": 24 + 24, "at": "main#3", "ops": 3}},
    }
    assert command("inspect", out, "--memory", "--json").json == {"memory": plan}
    assert json.loads((tiny / "plan" / "memory.json").read_text()) == command("inspect", tiny, "--memory", "--json").json["memory"]


def test_what_is_added_comes_and_goes_with_the_artifact(scale: Path, tmp_path: Path) -> None:
    """As kernels do: an interrupt while they are compiled leaves the artifact that was there before, whole."""
    out = tmp_path / "out"

    def add(module: Any, folder: Path) -> None:
        assert not out.exists() or folder != out
        (folder / "kernels").mkdir()

    dsc.compile(scale, out=out, add=add)
    assert (out / "kernels").is_dir()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}

    def interrupted(module: Any, folder: Path) -> None:
        add(module, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dsc.compile(scale, out=out, add=interrupted)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
