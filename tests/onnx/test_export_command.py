"""`dsc export`: models that run straight from a checkpoint's own shards, copies of weights, what is refused, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import dsc
from dsc import DscError, backends
from dsc.driver import export as exporter
from dsc.driver.artifact import load
from dsc.driver.cli import main
from dsc.driver.export import export
from dsc.driver.inputs import prepare
from dsc.driver.run import open_weights
from dsc.ir.core import Symbol
from dsc.ir.walk import weights
from dsc.models.checkpoint import save_checkpoint
from dsc.models.convert import Conversion


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FP8 checkpoint in several shards, as the released one is."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = dsc.compile("deepseek-v3-tiny", out=folder / "plain", seq=16)
    fetch = open_weights("random:3", made.module, None)
    arrays = {name: fetch(name, tensor) for name, tensor in weights(made.module).items()}
    assert made.manifest.config
    save_checkpoint(folder / "bf16", arrays, made.manifest.config, shard_bytes=6e5)
    Conversion(folder / "bf16", folder / "fp8", "fp8").run()
    return folder / "fp8"


@pytest.fixture(scope="module")
def program(checkpoint: Path) -> Any:
    return dsc.compile(checkpoint, out=checkpoint.parent / "program", recipe="deepseek-v3", weights=str(checkpoint), seq=16)


def in_ort(model: Path, tokens: np.ndarray) -> np.ndarray:
    (logits,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"tokens": tokens})
    return np.asarray(logits, np.float64)


@pytest.mark.parametrize("how", ["reference", "copy"])
def test_an_fp8_checkpoint_runs_in_ort(how: str, checkpoint: Path, program: Any) -> None:
    model = checkpoint / f"{how}.onnx"
    made = export(program, model, profile="ort", weights=how)
    inputs = prepare(program.module, None)
    fetch = open_weights(str(checkpoint), program.module, program.manifest.config)
    expected = np.asarray(backends.get("numpy").run(program.module, fetch, inputs)[0], np.float64)
    assert np.linalg.norm(in_ort(model, inputs[0]) - expected) <= 1e-2 * np.linalg.norm(expected)
    onnx.checker.check_model(model, full_check=True)
    files = {
        next(e.value for e in t.external_data if e.key == "location")
        for t in onnx.load(model, load_external_data=False).graph.initializer
    }  # fmt: skip
    shards = {path.name for path in checkpoint.glob("*.safetensors")}
    assert files == (shards if how == "reference" else {"copy.onnx.data"})
    assert made.bytes == model.stat().st_size
    assert made.inputs == 1


def test_each_expert_points_at_its_own_bytes(checkpoint: Path, program: Any) -> None:
    export(program, checkpoint / "own.onnx", profile="compact", weights="reference")
    model = onnx.load(checkpoint / "own.onnx")
    stored = {t.name: t for t in model.graph.initializer}
    source = open_weights(str(checkpoint), program.module, program.manifest.config)
    for name, tensor in weights(program.module).items():
        array = source(name, tensor)
        if ".experts." not in name:
            assert stored[name].raw_data == array.tobytes(), name
            continue
        stem, projection = name.split(".experts.")
        base, suffix = (projection.removesuffix("_scale_inv"), "_scale_inv") if projection.endswith("_scale_inv") else (projection, "")
        for e, matrix in enumerate(array):
            on_disk = f"{stem}.experts.{e}.{base}.weight{suffix}"
            assert stored[on_disk].raw_data == matrix.tobytes(), on_disk


def test_the_command_says_what_it_wrote(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["export", str(program.path), *map(str, arguments)])
        return int(end.value.code or 0), capsys.readouterr().out

    code, out = command("--onnx", tmp_path / "a.onnx", "--profile", "compact")
    assert code == 0
    assert out.splitlines()[0].startswith("compact: 7 nodes, ")
    code, out = command("--onnx", tmp_path / "b.onnx", "--func", "decoder_layer", "--json")
    found = json.loads(out)
    assert (code, found["bytes"], found["opaque"]) == (0, (tmp_path / "b.onnx").stat().st_size, [])
    assert [v.name for v in onnx.load(tmp_path / "b.onnx").graph.input][:3] == ["hidden", "cos", "sin"]


def test_what_is_refused(checkpoint: Path, program: Any, tmp_path: Path) -> None:
    inside, outside = checkpoint / "m.onnx", tmp_path / "m.onnx"
    plain = load(checkpoint.parent / "plain")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("opset 21: expected 23 to 26", {"opset": 21}),
        ("unknown profile 'mobile'; expected one of standard, ort, compact", {"profile": "mobile"}),
        ("unknown weights 'all'; expected one of none, reference, copy", {"weights": "all"}),
        ("no function @nowhere", {"func": "nowhere"}),
        ("points into a checkpoint's files, but random:0 is no folder", {"weights": "reference", "checkpoint": "random:0"}),
        (r"is not in the folder of .* write the model to", {"weights": "reference", "file": outside}),
        ("expected a name that ends in .onnx", {"file": tmp_path / "m.txt"}),
        ("there is no folder", {"file": tmp_path / "no" / "m.onnx"}),
        ("the program names no weights; say which with --checkpoint", {"program": plain, "weights": "copy"}),
        (r"expected bf16\[72, 144\] as the program reads it, found f8e4m3\[72, 144\]",
         {"program": plain, "weights": "reference", "checkpoint": str(checkpoint)}),
    ]  # fmt: skip
    for message, options in cases:
        given = {"program": program, "file": inside} | options
        with pytest.raises(DscError, match=message):
            export(given.pop("program"), given.pop("file"), **given)
    assert not inside.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("link", "message"), [(os.symlink, "is a symbolic link, which ONNX Runtime"), (os.link, "a hard link")])
def test_linked_shards_are_refused_with_what_to_do(link: Any, message: str, checkpoint: Path, program: Any, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for path in (*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.json")):
        link(path, folder / path.name)
    with pytest.raises(DscError, match=message) as error:
        export(program, folder / "m.onnx", weights="reference", checkpoint=str(folder))
    assert "--weights copy" in str(error.value)
    assert not (folder / "m.onnx").exists()
    assert export(program, folder / "m.onnx", weights="copy", checkpoint=str(folder)).data
    shutil.rmtree(folder)  # else the other tests' checkpoint keeps its second names


def test_an_interrupted_copy_leaves_nothing(program: Any, tmp_path: Path) -> None:
    seen = []

    def stop(name: str) -> None:
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(program, tmp_path / "m.onnx", weights="copy", on_step=stop)
    assert not list(tmp_path.iterdir())
    export(program, tmp_path / "m.onnx", weights="copy")
    before = (tmp_path / "m.onnx").read_bytes()
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        export(program, tmp_path / "m.onnx", weights="copy", on_step=stop)
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}


def test_a_full_disk_is_one_line(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "serialized", full)
    with pytest.raises(DscError, match=r"m\.onnx cannot be written: No space left on device; nothing was left behind"):
        export(program, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_two_values_of_one_name_stay_two() -> None:
    text = """module {}
func @main(%x: f32[2]) {
  %y: f32[2] = call(@twice, [%x])  @ main#1 F
  %z: f32[2] = call(@twice, [%y])  @ main#2 F
  return %x, %z, %z
}
func @twice(%x: f32[2]) {
  %y: f32[2] = add(%x, %x)  @ twice#1 F
  return %y
}
"""
    import onnx_ir

    from dsc.backends.onnx.export import PROFILES
    from dsc.backends.onnx.export import export as build

    module = dsc.parse(text)
    assert module.main.ops[0].attributes["callee"] == Symbol("twice")
    for profile in PROFILES:
        model = onnx_ir.serde.serialize_model(build(module, profile))
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        x, z, again = session.run(None, {"x": np.array([1, 3], np.float32)})
        assert (x.tolist(), z.tolist(), again.tolist()) == ([1, 3], [4, 12], [4, 12])
