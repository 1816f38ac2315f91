"""What a user gets wrong: one line for each thing that is wrong, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.driver import run as running
from dsc.driver.cli import main
from dsc.models.checkpoint import save_checkpoint
from dsc.models.random_weights import RandomWeights
from dsc.models.weights import Wanted

Refused = Callable[..., list[str]]

CONFIG = json.loads((Path(dsc.__file__).parent / "models" / "configs" / "deepseek-v3-tiny.json").read_text())


def config(folder: Path, **changes: Any) -> Path:
    """A config.json of the tiny model with other fields; None leaves a field out."""
    file = folder / "config.json"
    file.write_text(json.dumps({key: value for key, value in (CONFIG | changes).items() if value is not None}))
    return file


TO = ("compile", "deepseek-v3-tiny", "-o", "out")
ARGUMENTS = {
    ("frobnicate",): "No such command 'frobnicate' (see dsc --help)",
    ("compile",): "Missing argument 'SRC' (see dsc compile --help)",
    TO[:2]: "Missing option '-o' / '--out' (see dsc compile --help)",
    ("ops", "--frobnicate"): "No such option '--frobnicate' (see dsc ops --help)",
    ("ops", "matmull"): "unknown op matmull; did you mean matmul",
    (*TO, "--batch", "two"): "Invalid value for '--batch': 'two' is not a valid integer (see dsc compile --help)",
    (*TO, "--batch", "0"): "--batch is 0, expected 1 or more",
    (*TO, "--batch", "-3"): "--batch is -3, expected 1 or more",
    (*TO, "--seq", "0"): "--seq is 0, expected 1 or more",
    (*TO, "--seq", "9" * 20): f"--seq is {'9' * 20}, expected less than 2^31",
    (*TO, "--mesh", "pp=2", "--microbatches", "0"): "--microbatches is 0, expected 1 or more",
    ("diff", "out", "--plot", "x.txt"): "--plot x.txt: expected a name that ends in .png",
    (*TO, "--context", "8"): "context is 8, but mode forward has none: seq says how many tokens a sequence has there",
    (*TO, "--mode", "decode", "--seq", "8"): "seq is 8, but mode decode has none: context says how many tokens a sequence has there",
    ("compile", "any.py:make", "-o", "out", "--seq", "8"): "--seq: any.py:make has its own sizes; these options are for a model's",
    (*TO, "--mode", "infer"): "unknown mode infer; expected one of forward, train, prefill, decode",
    (*TO, "--passes", "simplfy"): "pipeline, column 1: unknown pass simplfy; did you mean simplify?",
    (*TO, "--passes", "simplify{n=1}"): "pipeline, column 10: unknown option n of simplify",
    (*TO, "--until", "quantised"): "unknown stage quantised; did you mean quantized?",
    (*TO, "--set", "layers=2"): 'unknown configuration field "layers"',
    (*TO, "--set", "n_group"): 'override "n_group": expected KEY=VALUE',
    (*TO, "--set", "n_group=3"): "deepseek-v3-tiny: n_routed_experts = 16 is not divisible by n_group = 3",
    ("compile", "v3-tiny", "-o", "out"): "v3-tiny: found neither a file, nor a folder, nor a shipped model; did you mean deepseek-v3-tiny",
    ("compile", "no.dsc", "-o", "out"): "no.dsc: no such file",
    ("compile", "no.py:make", "-o", "out"): "no.py: no such file",
    ("inspect", "nothing.json"): "nothing.json: found neither a file, nor a folder, nor a shipped model",
    ("inspect", "deepseek-v3", "--after", "simplify"): "--after simplify needs an artifact; deepseek-v3 is not one",
    ("opt", "no.dsc"): "no.dsc: no such file",
    ("opt", "config.json"): "config.json: expected a .dsc file, or - for standard input",
    ("run", "nowhere"): "nowhere: expected an artifact made by dsc compile, found no such folder",
    ("diff", "nowhere"): "nowhere: expected an artifact made by dsc compile, found no such folder",
}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_arguments(refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = refused(*arguments)
    assert line.startswith(ARGUMENTS[arguments])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ":1:2: not JSON: Expecting property name"),
        ("", ":1:1: not JSON: Expecting value"),
        ("[1]", ": expected a JSON object, found list"),
        ("\udcff", ": not JSON: byte 0 is not UTF-8 text"),
        ('{"model_type": "gpt2"}', ': model_type = "gpt2" is unknown, expected one of deepseek, '),
        ("{}", ": model_type is missing, expected one of deepseek, "),
        ('{"model_type": "llama", "vocab_size": 8}', ": missing hidden_size, intermediate_size, "),
    ],
)
def test_configs_that_are_none(refused: Refused, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    (line,) = refused("compile", file, "-o", tmp_path / "out")
    assert line.startswith(f"{file}{message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "missing vocab_size"),
        ({"n_group": 3}, "n_routed_experts = 16 is not divisible by n_group = 3"),
        ({"topk_group": 5}, "topk_group = 5 exceeds n_group = 4"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok = 17 exceeds n_routed_experts = 16"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2 differs from num_attention_heads = 4"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported'),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = true is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling type "dynamic" is not supported'),
        ({"hidden_size": "wide"}, 'hidden_size is "wide", expected a whole number'),
        ({"hidden_size": -1}, "hidden_size is -1, expected more than 0"),
        ({"torch_dtype": "int8", "dtype": None}, 'dtype is "int8", expected '),
    ],
)
def test_configs_with_contradictions(refused: Refused, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = config(tmp_path, **changes)
    (line,) = refused("compile", file, "-o", tmp_path / "out")
    assert line.startswith(f"{file}: ")
    assert message in line


def test_every_fault_of_an_ir_text_is_shown_where_it_stands(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "wrong.dsc"
    file.write_text("func @main(%x: f32[2]) {\n  %y: f32[3] = neg(%x)  @ main#1 F\n  %z: f32[2] = ngg(%x)  @ main#2 F\n  return %y\n}\n")
    for arguments in (["compile", file, "-o", tmp_path / "out"], ["opt", file], ["inspect", file]):
        lines = refused(*arguments)
        assert [line for line in lines if not line.startswith(" ")] == [
            f"{file}:2:3: %y is declared f32[3], but neg gives f32[2]",
            next(line for line in lines if line.startswith(f"{file}:3:16: unknown op ngg")),
        ]
        assert "      ^" in lines
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bytes_", "message"), [(b"\xff\xfe\x00", ": not UTF-8 text: byte 0 is 0xff"), (b"", ":1:1: "), (b"\0\0", ":1:1: ")]
)
def test_a_dsc_file_that_is_no_text(refused: Refused, tmp_path: Path, bytes_: bytes, message: str) -> None:
    file = tmp_path / "binary.dsc"
    file.write_bytes(bytes_)
    assert refused("opt", file)[0].startswith(f"{file}{message}")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make():\n    raise ValueError('no luck')\n", ":2: ValueError: no luck"),
        ("def make(:\n", ":1: SyntaxError: "),
        ("import no_such_module\n", ":1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("make = 3\n", " has no function make"),
        ("def make():\n    return 3\n", ":make returned int, expected (module, (input, ...))"),
    ],
)
def test_factories(refused: Refused, tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(body)
    (line,) = refused("compile", f"{file}:make", "-o", tmp_path / "out")
    assert line.startswith(f"{file}{message}")


def test_every_op_that_cannot_be_traced_is_named_with_its_line(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        y = torch.linalg.svd(x)[0]\n"
        "        return y + torch.linalg.eigh(x)[1]\n\ndef make():\n    return Model(), (torch.zeros(4, 4),)\n"
    )
    lines = refused("compile", f"{file}:make", "-o", tmp_path / "out")
    assert [re.findall(r"^(aten\.\w+)\S* has no counterpart in the IR, at \S+mine\.py:(\d)", line) for line in lines] == [
        [("aten._linalg_svd", "5")],
        [("aten._linalg_eigh", "6")],
    ]


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the tiny model."""
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    artifact = dsc.load(tiny)
    source = RandomWeights(3)
    types = running.weights_of(artifact.module)
    arrays = {name: source.get(Wanted(name, t.dtype.name, tuple(map(int, t.shape)))) for name, t in types.items()}
    save_checkpoint(folder, arrays, CONFIG)
    return folder


class TestWeights:
    """Checkpoints that do not fit."""

    def test_those_that_fit_do(self, command: Any, tiny: Path, checkpoint: Path) -> None:
        done = command("run", tiny, "--weights", checkpoint, "--json")
        assert done.code == 0
        assert done.json["results"] == command("run", tiny, "--weights", "random:3", "--json").json["results"]

    @pytest.mark.parametrize("spec", ["random", "random:", "random:x", "random:-1", "nowhere", "none"])
    def test_specs(self, refused: Refused, tiny: Path, spec: str) -> None:
        assert refused("run", tiny, "--weights", spec)[0].startswith(f"weights: found '{spec}', expected random:SEED, a checkpoint folder")

    def test_every_tensor_of_another_model_is_listed(self, refused: Refused, checkpoint: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        wider = dsc.compile("deepseek-v3-tiny", out=out, seq=16, overrides=("q_lora_rank=80", "num_hidden_layers=4"))
        lines = refused("run", out, "--weights", checkpoint)
        assert re.fullmatch(r"checkpoint \S+: these weights do not fit the program: 9 misshapen, \d+ missing", lines[0])
        text = "\n".join(lines)
        for layer in range(3):
            assert f"model.layers.{layer}.self_attn.q_a_proj.weight" in text
            assert f"model.layers.{layer}.self_attn.q_b_proj.weight" in text
        missing = [name for name in running.weights_of(wider.module) if name.startswith("model.layers.3.") and ".experts." not in name]
        assert [name for name in missing if name not in text] == []
        name = "model.layers.0.self_attn.q_a_proj.weight"
        assert f"  misshapen: {name}: expected bf16[80, 144], found bf16[72, 144] in model.safetensors" in lines
        assert refused("compile", "deepseek-v3-tiny", "-o", tmp_path / "b", "--set", "q_lora_rank=80", "--weights", checkpoint)
        assert not (tmp_path / "b").exists()

    def test_a_truncated_file(self, refused: Refused, tiny: Path, checkpoint: Path, tmp_path: Path) -> None:
        cut = tmp_path / "cut"
        shutil.copytree(checkpoint, cut)
        file = cut / "model.safetensors"
        for size in (file.stat().st_size - 1, 100, 4, 0):
            file.write_bytes(file.read_bytes()[:size])
            assert refused("run", tiny, "--weights", cut)[0].startswith(f"{file}: ")


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    """An .npz file of these arrays."""

    def write(**arrays: Any) -> Path:
        np.savez(tmp_path / "inputs.npz", **arrays)
        return tmp_path / "inputs.npz"

    return write


class TestInputs:
    """Files for --inputs that do not fit; tokens i64[1, 16] do."""

    TOKENS = np.zeros((1, 16), np.int64)

    @pytest.mark.parametrize(
        ("arrays", "messages"),
        [
            ({}, ["input tokens is missing"]),
            ({"tokens": TOKENS, "mask": TOKENS}, ["input mask is not one of the program's: tokens"]),
            ({"token": TOKENS}, ["input tokens is missing", "input token is not one of the program's: tokens"]),
            ({"tokens": TOKENS[:, :5]}, ["input tokens: expected i64[1, 16], found shape [1, 5]"]),
            ({"tokens": TOKENS[0]}, ["input tokens: expected i64[1, 16], found shape [16]"]),
            ({"tokens": TOKENS.astype(float)}, ["input tokens: expected i64[1, 16], found float64[1, 16]"]),
            ({"tokens": TOKENS.astype(str)}, ["input tokens: expected i64[1, 16], found <U21[1, 16]"]),
            ({"tokens": np.full((1, 16), 2**63, np.uint64)}, ["input tokens: values do not fit i64"]),
            ({"tokens": TOKENS + 320}, ["@embedding (model.embed_tokens) embedding#2: take: index 320 is outside 0 .. 319"]),
            ({"tokens": TOKENS - 1}, ["@embedding (model.embed_tokens) embedding#2: take: index -1 is outside 0 .. 319"]),
        ],
    )
    def test_arrays(self, refused: Refused, tiny: Path, npz: Any, arrays: dict[str, Any], messages: list[str]) -> None:
        assert refused("run", tiny, "--inputs", npz(**arrays)) == messages

    def test_every_array_that_does_not_fit_is_named(self, refused: Refused, tiny_modes: dict[str, Path], npz: Any) -> None:
        lines = refused("run", tiny_modes["train"], "--inputs", npz(tokens=self.TOKENS[:, :3], labels=self.TOKENS.astype(float)))
        assert lines == [
            "input tokens: expected i64[1, 16], found shape [1, 3]",
            "input labels: expected i64[1, 16], found float64[1, 16]",
        ]

    def test_files(self, refused: Refused, tiny: Path, npz: Any, tmp_path: Path) -> None:
        whole = npz(tokens=self.TOKENS).read_bytes()
        file = tmp_path / "given.npz"
        expected = "expected an .npz file with an array for each input, found"
        damaged = bytearray(whole)
        damaged[140] ^= 255
        np.save(tmp_path / "bare.npy", self.TOKENS)
        for content, message in (
            (b"", f"{expected} something else"),
            (b"tokens = 1", f"{expected} something else"),
            ((tmp_path / "bare.npy").read_bytes(), f"{expected} one bare array"),
            (whole[:-30], "damaged: "),
            (whole[:60], "damaged: "),
            (bytes(damaged), "damaged: "),
        ):
            file.write_bytes(content)
            (line,) = refused("run", tiny, "--inputs", file)
            assert line.startswith(f"{file}: {message}")
        (line,) = refused("run", tiny, "--inputs", tmp_path / "no.npz")
        assert line == f"{tmp_path / 'no.npz'}: no such file"

    def test_objects_are_not_unpickled(self, refused: Refused, tiny: Path, npz: Any) -> None:
        file = npz(tokens=np.array([{}], object))
        (line,) = refused("run", tiny, "--inputs", file)
        assert line.startswith(f"{file}: expected plain arrays: ")


class TestRunning:
    """Other faults of run, diff and inspect."""

    def test_backends(self, refused: Refused, tiny: Path) -> None:
        for arguments in (["run", tiny, "--backend", "abacus"], ["diff", tiny, "--backends", "numpy,abacus"]):
            (line,) = refused(*arguments)
            assert re.fullmatch(r"unknown backend 'abacus'; known are numpy, numpy-f64\b.*", line)

    def test_where_results_go(self, refused: Refused, tiny: Path, tmp_path: Path) -> None:
        assert refused("run", tiny, "--out", tmp_path) == [f"{tmp_path} is a folder, expected a file to write"]
        file = tmp_path / "no" / "results.npz"
        assert refused("run", tiny, "--out", file) == [f"{file} cannot be written: there is no folder {file.parent}"]

    def test_diff(self, refused: Refused, tiny: Path, tiny_modes: dict[str, Path]) -> None:
        a, b = "(tokens: i64[1, 16])", "(tokens: i64[1, 16], labels: i64[1, 16])"
        train = tiny_modes["train"]
        assert refused("diff", tiny, train) == [f"{tiny} takes {a}, but {train} takes {b}: expected the same inputs"]
        assert refused("diff", tiny, "--backends", "") == ["expected one or two backends, found 0"]
        assert refused("diff", tiny, "--backends", "numpy,numpy,numpy") == ["expected one or two backends, found 3"]
        (line,) = refused("diff", tiny, tiny_modes["train"], "--backends", "numpy,numpy-f64")
        assert line.startswith("two artifacts and two backends at once")
        for tolerance in ("-1", "nan"):
            assert refused("diff", tiny, "--tolerance", tolerance)[0].startswith(f"the tolerance is {float(tolerance)}, expected")
        assert refused("diff", tiny, "--tolerance", "1", "--backends", "numpy,numpy-f64")[0].startswith("a tolerance is for two programs")

    def test_inspect(self, refused: Refused, tiny: Path) -> None:
        assert refused("inspect", tiny, "--after", "quantise") == [f"{tiny}: no pass quantise; it ran traced, simplify"]
        assert refused("inspect", tiny, "--func", "moe")[0].startswith("no function @moe; the module has @main, @embedding, ")

    def test_opt(self, refused: Refused, scale: Path) -> None:
        assert refused("opt", scale, "-p", "simplify", "--print-after", "fuse") == [
            "--print-after fuse is not in the pipeline; expected one of all, simplify"
        ]
        assert refused("opt", scale, "-p", "quantize-fp8,quantize-fp8")[0].startswith("quantize-fp8 takes a module at the stages from")


class TestManifest:
    """Artifacts that have come to harm."""

    @pytest.fixture
    def harmed(self, tiny: Path, tmp_path: Path) -> Path:
        """A copy to be harmed."""
        return Path(shutil.copytree(tiny, tmp_path / "harmed"))

    @pytest.mark.parametrize(
        ("manifest", "message"),
        [
            ("{", ":1:2: not JSON: Expecting property name"),
            ("[]", ": not a manifest of dsc"),
            ("{}", ": not a manifest of dsc"),
            ('{"dsc_version": "9.0", "schema_version": 2}', ": schema version 2, but this dsc reads 1; compile it again"),
            ('{"dsc_version": "0.1", "schema_version": 1}', ": command is missing"),
        ],
    )
    def test_damaged(self, refused: Refused, harmed: Path, manifest: str, message: str) -> None:
        (harmed / "manifest.json").write_text(manifest)
        for arguments in (["run", harmed], ["inspect", harmed], ["diff", harmed]):
            assert refused(*arguments)[0].startswith(f"{harmed / 'manifest.json'}{message}")

    @pytest.mark.parametrize(
        ("key", "value", "message"), [("passes", [], "passes is a list, expected at least 1 item"), ("more", 1, "more is not supported")]
    )
    def test_edited(self, refused: Refused, harmed: Path, key: str, value: Any, message: str) -> None:
        file = harmed / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        assert refused("run", harmed)[0].startswith(f"{file}: {message}")

    def test_missing_and_damaged_files(self, refused: Refused, harmed: Path) -> None:
        file = harmed / "ir" / "01-simplify.dsc"
        file.write_text(file.read_text().replace("rms_norm(", "rms_nrm(", 1))
        assert "unknown op rms_nrm; did you mean rms_norm" in refused("run", harmed)[0]
        file.unlink()
        assert refused("run", harmed) == [f"{file} is missing from the artifact; compile it again"]

    def test_damaged_constants(self, refused: Refused, harmed: Path) -> None:
        (harmed / "constants.safetensors").write_bytes(b"\1")
        assert refused("run", harmed)[0].startswith(f"{harmed / 'constants.safetensors'}: not a safetensors file")


def test_debug_shows_the_traceback_wherever_it_stands(command: Any, tiny: Path) -> None:
    for arguments in (
        ["--debug", "run", tiny, "--backend", "abacus"],
        ["run", "--debug", tiny, "--backend", "abacus"],
        ["run", tiny, "--backend", "abacus", "--debug"],
    ):
        ended = command(*arguments)
        assert ended.code == 2
        assert ended.err.startswith("Traceback (most recent call last):\n")
        assert ended.err.splitlines()[-1].startswith("dsc: error: unknown backend 'abacus'")


def test_a_bug_of_ours_says_how_to_see_it(command: Any, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    def broken(*args: Any) -> None:
        raise KeyError("nonsense")

    monkeypatch.setattr(running, "summarise", broken)
    ended = command("run", tiny)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"dsc: error: internal error: KeyError: 'nonsense' (dsc --debug run {tiny} shows where)\n"


def test_errors_of_the_functions_are_those_of_the_command(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A `dsc.DscError` says what the command prints."""
    calls: dict[str, tuple[list[str], Callable[[], object]]] = {
        "compile": (["deepseek-v3-tny", "-o", str(tmp_path / "o")], lambda: dsc.compile("deepseek-v3-tny", out=tmp_path / "o")),
        "run": ([str(tiny), "--backend", "abacus"], lambda: dsc.run(dsc.load(tiny), backend="abacus")),
        "diff": ([str(tiny), "--backends", ""], lambda: dsc.diff(dsc.load(tiny), backends=())),
        "inspect": ([str(tmp_path)], lambda: dsc.load(tmp_path)),
    }
    for name, (arguments, call) in calls.items():
        with pytest.raises(SystemExit):
            main([name, *arguments])
        with pytest.raises(dsc.DscError) as error:
            call()
        assert capsys.readouterr().err == f"dsc: error: {error.value}\n"
