"""Every command as a user calls it, in text and in JSON."""

from __future__ import annotations

import io
import json
import re
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.driver.run import array_types
from dsc.ir.core import OPS
from dsc.ir.gradients import bundles, by_name
from dsc.ir.walk import weights as weights_of
from dsc.passes.manager import PASSES, options, parse_pipeline

COMMANDS = ["compile", "run", "inspect", "export", "opt", "diff", "report", "ops", "passes", "models"]


def test_compile_says_why(command: Any, tmp_path: Path) -> None:
    shown = command("compile", "deepseek-v3-tiny", "-o", str(tmp_path / "out"), "--recipe", "deepseek-v3", "--why")
    assert shown.code == 0
    assert re.search(r"@head .* the recipe keeps lm_head", shown.out)
    assert re.search(r"self_attn.o_proj.weight .* f8e4m3 1x128 deepseek-v3", shown.out)


def test_help_names_every_command_and_each_has_its_own(command: Any) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        shown = command(*arguments)
        assert shown.code == 0
        assert [name for name in COMMANDS if not re.search(rf"^  {name} +\S", shown.out, re.M)] == []
    for name in COMMANDS:
        shown = command(name, "--help")
        assert shown.code == 0
        assert shown.out.startswith(f"Usage: dsc {name} ")
    assert "..." not in command("--help").out.partition("Commands:")[2], "a help text is cut short"


def test_version(command: Any) -> None:
    assert command("--version").out == f"dsc, version {dsc.__version__}\n"


def test_compile_says_what_it_made(command: Any, tmp_path: Path) -> None:
    done = command("compile", "deepseek-v3-tiny", "-o", tmp_path / "out", "--seq", 16)
    assert done.code == 0
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == "deepseek-v3-tiny: 7 functions, 131 ops, 1.25 M parameters (668.41 K active per token)"
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'out'))}: compiled in \d+\.\d s", lines[-1])
    assert [line.split()[0] for line in lines[1:-1]] == ["step", "--------", "traced", "simplify"]


def test_compile_json(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command("compile", "deepseek-v3-tiny", "-o", out, "--seq", 16, "--batch", 2, "--json")
    found = done.json
    manifest = json.loads((out / "manifest.json").read_text())
    assert {key: found[key] for key in manifest} == manifest
    assert found.keys() - manifest.keys() == {"out", "seconds", "parameters", "active", "parameters_of_a_rank"}
    assert (found["parameters"], found["active"]) == (1_249_016, 668_408)
    assert found["command"] == ["dsc", "compile", "deepseek-v3-tiny", "-o", str(out), "--seq", "16", "--batch", "2", "--json"]
    assert dsc.load(out).module.main.params[0].shape == (2, 16)


def test_compile_takes_every_kind_of_source(command: Any, tmp_path: Path, scale: Path) -> None:
    config = Path(dsc.__file__).parent / "models" / "configs" / "deepseek-v3-tiny.json"
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(config.read_text())
    factory = tmp_path / "mine.py"
    factory.write_text("import torch\n\ndef make():\n    return torch.nn.Linear(4, 2), (torch.zeros(3, 4),)\n")
    kinds = {config: "config", checkpoint: "checkpoint", f"{factory}:make": "factory", scale: "dsc"}
    for i, (source, kind) in enumerate(kinds.items()):
        sizes = ["--seq", 16] if kind in ("config", "checkpoint") else []
        assert command("compile", source, "-o", tmp_path / f"{i}", *sizes).code == 0, source
        manifest = dsc.load(tmp_path / f"{i}").manifest
        assert (manifest.source, manifest.source_kind) == (str(source), kind)
        assert manifest.source_sha256 is not None
    assert dsc.load(tmp_path / "0").module.main == dsc.load(tmp_path / "1").module.main


def test_compile_in_every_mode(tiny_modes: dict[str, Path]) -> None:
    train, decode = (dsc.load(tiny_modes[mode]).module for mode in ("train", "decode"))
    assert [p.name for p in train.main.params] == ["tokens", "labels"]
    assert [r.name for r in train.main.results][:5] == ["loss", "lm_loss", "mtp_loss", "balance_loss", "counts"]
    named = [name for names in bundles(train) for name in names]
    assert sorted(named) == sorted(set(weights_of(train)) - {name for name in weights_of(train) if name.endswith("_correction_bias")})
    assert list(array_types(train))[5:] == [f"{name}.grad" for name in named]
    update = dsc.parse((tiny_modes["train"] / "ir" / "update.dsc").read_text())
    gradients = [p.name for p in update.main.params if p.name.endswith("_gradient")]
    assert gradients == [f"{name}_gradient".replace(".", "_") for name in weights_of(train) if name in named]
    caches = [f"latent_{i}" for i in range(3)]
    assert [p.name for p in decode.main.params] == ["tokens", "positions", *caches]
    assert [r.name for r in decode.main.results] == ["logits", *(f"new_{name}" for name in caches)]
    assert decode.main.updates == {2: 1, 3: 2, 4: 3}


def test_until_stops_before_the_pass_that_leaves_the_stage(command: Any, tmp_path: Path) -> None:
    given = ["compile", "deepseek-v3-tiny", "-o", tmp_path / "out", "--seq", 16, "--passes", "simplify,quantize-fp8,simplify"]
    for until, names in (("traced", ["traced", "simplify"]), ("quantized", ["traced", "simplify", "quantize-fp8", "simplify"])):
        assert command(*given, "--until", until).code == 0
        manifest = dsc.load(tmp_path / "out").manifest
        assert (manifest.stage, [p.name for p in manifest.passes]) == (until, names)


def test_run_names_its_results_and_says_what_it_took(command: Any, tiny: Path) -> None:
    done = command("run", tiny)
    assert done.code == 0
    assert done.err == "dsc: took weights random:0 and seeded inputs\n"
    head, rule, logits, last = done.out.splitlines()
    assert head.split() == ["result", "type", "min", "max", "mean", "std"]
    assert logits.startswith("logits  bf16[1, 16, 320]  ")
    assert re.fullmatch(r"ran on numpy in \d+\.\d\d s", last)
    assert len(rule) == len(head) == len(logits)


def test_run_json_and_file(command: Any, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.npz"
    found = command("run", tiny, "--out", file, "--json").json
    assert found.keys() == {"backend", "ranks", "seconds", "results", "file"}
    assert found["file"] == str(file)
    (expected,) = dsc.run(dsc.load(tiny))
    with np.load(file) as arrays:
        assert arrays.files == ["logits"]
        assert arrays["logits"].dtype == np.float32
        np.testing.assert_array_equal(arrays["logits"], expected.astype(np.float32))
    stats = found["results"]["logits"]
    assert (stats["shape"], stats["dtype"], stats["not_finite"]) == ([1, 16, 320], "bf16", 0)
    assert stats["mean"] == expected.astype(np.float64).mean()
    assert stats["max"] == expected.astype(np.float64).max()


def test_run_of_a_training_step(command: Any, tiny_modes: dict[str, Path], tmp_path: Path) -> None:
    """Gradients are many: the table sums them up, the file has each under the name of its weight."""
    program, file = dsc.load(tiny_modes["train"]), tmp_path / "step.npz"
    done = command("run", tiny_modes["train"], "--out", file)
    expected = by_name(program.module, dsc.run(program))
    with np.load(file) as arrays:
        assert arrays.files[:5] == ["loss", "lm_loss", "mtp_loss", "balance_loss", "counts"]
        assert arrays.files[5:] == [f"{name}.grad" for name in expected]
        assert all(np.array_equal(arrays[f"{name}.grad"], array) for name, array in expected.items())
    norm = np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in expected.values()))
    assert f"and {len(expected)} gradients of norm {norm:.5g} in all" in done.out
    assert norm > 1


def test_run_takes_weights_and_inputs(command: Any, tiny: Path, tmp_path: Path) -> None:
    results = {}
    for name, tokens in (("a", np.zeros((1, 16), np.int64)), ("b", np.zeros((1, 16), np.int32)), ("c", np.ones((1, 16), np.int64))):
        np.savez(tmp_path / f"{name}.npz", tokens=tokens)
        done = command("run", tiny, "--inputs", tmp_path / f"{name}.npz", "--weights", "random:7", "--out", tmp_path / f"{name}-out.npz")
        assert (done.code, done.err) == (0, "")
        with np.load(tmp_path / f"{name}-out.npz") as arrays:
            results[name] = arrays["logits"]
    np.testing.assert_array_equal(results["a"], results["b"])
    assert not np.array_equal(results["a"], results["c"])
    (other,) = dsc.run(dsc.load(tiny), weights="random:0", inputs=(np.zeros((1, 16), int),))
    assert not np.array_equal(results["a"], other.astype(np.float32))


def test_what_is_not_finite_is_said(command: Any, tmp_path: Path) -> None:
    file = tmp_path / "log.dsc"
    file.write_text("func @main(%x: f32[3]) {\n  %y: f32[3] = log(%x)  @ main#1 F\n  return %y\n}\n")
    np.savez(tmp_path / "x.npz", x=np.array([-1, 0, 1], np.float32))
    command("compile", file, "-o", tmp_path / "out")
    done = command("run", tmp_path / "out", "--inputs", tmp_path / "x.npz")
    assert "dsc: y has 2 values that are infinite or not a number\n" in done.err
    stats = command("run", tmp_path / "out", "--inputs", tmp_path / "x.npz", "--json").json["results"]["y"]
    assert (stats["not_finite"], stats["min"], stats["max"]) == (2, 0.0, 0.0)


def test_inspect_artifact_and_source_agree(command: Any, tiny: Path) -> None:
    ours = command("inspect", tiny)
    assert ours.code == 0
    assert "@decoder_layer_1     2   65       17" in ours.out
    assert ours.out.splitlines()[-2:] == ["takes   %tokens: i64[1, 16]", "returns %logits: bf16[1, 16, 320]"]
    found = command("inspect", tiny, "--json").json["program"]
    assert found["attributes"] == {"model": "deepseek-v3-tiny", "mode": "forward", "batch": 1, "seq": 16}
    assert [f["name"] for f in found["functions"]] == [f.name for f in dsc.load(tiny).module.funcs]
    source = command("inspect", "deepseek-v3-tiny", "--params", "--json").json
    assert source == command("inspect", tiny, "--params", "--json").json


def test_inspect_prints_ir(command: Any, tiny: Path) -> None:
    artifact = dsc.load(tiny)
    assert command("inspect", tiny, "--after", "traced").out == artifact.text_of(artifact.manifest.passes[0])
    for name in ("head", "@head"):
        assert command("inspect", tiny, "--func", name).out == str(artifact.module["head"])
    assert command("inspect", tiny, "--func", "head", "--json").json == {"func": "head", "text": str(artifact.module["head"])}
    both = command("inspect", tiny, "--params", "--memory", "--json").json
    assert both.keys() == {"parameters", "memory"}


def test_opt_without_passes_gives_the_file_byte_for_byte(command: Any, tmp_path: Path) -> None:
    odd = b"// a comment\r\nfunc  @main( %x : f32[2] )\t{\n\n  %y: f32[2] = neg(%x)   // why\r\n  return %y }"
    file = tmp_path / "odd.dsc"
    file.write_bytes(odd)
    for passes in ([], ["-p", ""], ["-p", "  "]):
        shown = command("opt", file, *passes)
        assert shown.code == 0
        assert shown.out.encode() == odd


def test_opt_prints_what_the_passes_made(command: Any, tmp_path: Path) -> None:
    file = tmp_path / "twice.dsc"
    body = ("%a: f32[2] = neg(%x)  @ main#1 F", "%b: f32[2] = neg(%x)  @ main#2 F", "%c: f32[2] = add(%a, %b)  @ main#3 F", "return %c")
    text = "\n  ".join(("func @main(%x: f32[2]) {", *body)) + "\n}\n"
    file.write_text(text)
    shown = command("opt", file, "-p", "simplify", "--time", "--print-after", "all")
    assert dsc.parse(shown.out) == dsc.apply(dsc.parse(text), "simplify")
    assert "%b" not in shown.out
    assert re.search(r"^simplify: \d\.\d{3} s, 3 -> 2 ops$", shown.err, re.M)
    assert shown.err.startswith(f"// after simplify\n{shown.out}")
    found = command("opt", file, "-p", "simplify", "--json").json
    assert found["text"] == shown.out
    assert found["stage"] == "traced"
    assert [(p["name"], p["ops_before"], p["ops_after"], p["changed"]) for p in found["passes"]] == [("simplify", 3, 2, True)]


def test_opt_says_what_a_pass_declined(command: Any, tiny: Path) -> None:
    shown = command("opt", tiny / "ir" / "00-traced.dsc", "-p", "quantize-fp8", "--why")
    assert "quantize-fp8: @head head#2: the recipe keeps lm_head\n" in shown.err


def test_bisect(command: Any, scale: Path) -> None:
    innocent = command("opt", scale, "-p", "simplify", "--bisect")
    assert (innocent.code, innocent.out) == (0, "no pass changes the results\n")
    guilty = command("opt", scale, "-p", "simplify,quantize-fp8,simplify", "--bisect")
    assert (guilty.code, guilty.out) == (1, "quantize-fp8 is the first to change the results\n")
    assert command("opt", scale, "-p", "simplify,quantize-fp8", "--bisect", "--json").json == {"first": "quantize-fp8"}


def test_opt_reads_standard_input(command: Any, scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for passes in ((), ("-p", "simplify")):
        monkeypatch.setattr("sys.stdin", io.StringIO(scale.read_text()))
        piped = command("opt", "-", *passes)
        assert piped == command("opt", scale, *passes)
        assert piped.out.startswith("module { stage=traced }")
    monkeypatch.setattr("sys.stdin", io.StringIO("func @main("))
    assert command("opt", "-").err.startswith("dsc: error: standard input:1:12: ")


def test_lists(command: Any) -> None:
    ops = command("ops", "--json").json
    assert {o["name"] for o in ops} == set(OPS)
    text = command("ops").out.splitlines()
    assert [line.split()[0] for line in text[2:]] == [o["name"] for o in ops]
    passes = command("passes", "--json").json
    assert [p["name"] for p in passes] == sorted(PASSES)
    shown = command("passes").out
    assert all(f"\n{p['name']} " in shown and p["text"] in shown for p in passes)
    models = command("models", "--json").json
    assert [m["name"] for m in models] == [line.split()[0] for line in command("models").out.splitlines()[2:]]
    v3 = next(m for m in models if m["name"] == "deepseek-v3")
    assert v3 == {
        "name": "deepseek-v3",
        "model_type": "deepseek_v3",
        "layers": 61,
        "hidden": 7168,
        "heads": 128,
        "experts": 256,
        "experts_per_token": 8,
        "vocabulary": 129280,
    }


def test_options_are_shown_as_a_pipeline_takes_them(command: Any) -> None:
    """What `dsc passes` shows can be pasted into a pipeline, if nothing has to be filled in."""
    for each in command("passes", "--json").json:
        if any(field.default is MISSING and field.default_factory is MISSING for field in options(PASSES[each["name"]]).values()):
            continue
        shown = re.search(rf"^{each['name']} .*\n +options: (.*)$", command("passes").out, re.M)
        given = [option for option in shown[1].split(", ") if not option.endswith("=...")] if shown else []
        if each["name"] == "place-experts":  # one of two sets of options has to be filled in
            given += ["replicas=8", "ranks=4"]
            assert parse_pipeline(f"place-experts{{{','.join(given)}}}") == parse_pipeline("place-experts{replicas=8,ranks=4}")
            continue
        assert parse_pipeline(f"{each['name']}{{{','.join(given)}}}") == parse_pipeline(each["name"])


def test_one_pass_is_shown_with_its_example(command: Any) -> None:
    for name, cls in PASSES.items():
        shown = command("passes", name)
        assert all(line.strip() in shown.out for line in (cls.__doc__ or "").splitlines())
        assert re.search(rf"^gives +{cls.ensures or 'the same stage'}$", shown.out, re.M)
        assert command("passes", name, "--json").json["options"].keys() == options(cls).keys()
    unknown = command("passes", "simplfy")
    assert (unknown.code, unknown.out) == (2, "")
    assert unknown.err == "dsc: error: unknown pass simplfy; did you mean simplify?\n"


@pytest.mark.parametrize("name", ["matmul", "dispatch", "rms_norm", "param"])
def test_a_card_points_at_the_source(command: Any, name: str) -> None:
    card = command("ops", name, "--json").json
    root = Path(dsc.__file__).parent
    for facet, place in card["places"].items():
        file, _, line = place.rpartition(":")
        around = "".join((root / file).read_text().splitlines(keepends=True)[int(line) - 3 : int(line) + 40])
        assert OPS[name].__name__ in around, (facet, place)
    assert card["form"].startswith(f"{name}(")
    assert card["text"] in command("ops", name).out
