"""What holds of every command alike: an example that parses, JSON, names of options, exit codes, colours, and a quick start.

Commands are found by importing every file of `driver/` that makes some, so a new one is held to the same.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import pty
import re
import resource
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import dsc.driver
from dsc.driver.cli import RESUMED, cli

ROOT = Path(dsc.__file__).parent
for _module in pkgutil.iter_modules(dsc.driver.__path__):
    if "command" in _module.name:
        importlib.import_module(f"dsc.driver.{_module.name}")

COMMANDS = {name: command for name, command in cli.commands.items()}
every_command = pytest.mark.parametrize("name", COMMANDS)

WITHOUT_JSON = {"completion": "it prints a script"}


def examples(command: click.Command) -> list[str]:
    """The lines of its help that show how it is called."""
    text = (command.help or "").partition("\b\n")[2]
    return [line.strip() for line in text.splitlines() if line.strip()]


def calls(line: str) -> list[list[str]]:
    """The arguments of each call of dsc in a line of shell."""
    found: list[list[str]] = []
    words = iter(shlex.split(line))
    for word in words:
        if word != "dsc":
            continue
        found.append([])
        for argument in words:
            if argument in ("&&", "|", ">", ">>", ";"):
                break
            found[-1].append(argument)
    return found


def test_main_knows_every_command() -> None:
    """In a fresh process: a command that main does not import would exist in this test alone."""
    done = subprocess.run([sys.executable, "-m", "dsc", "--help"], capture_output=True, text=True)
    listed = re.findall(r"^  ([a-z][a-z-]*) +\S", done.stdout.partition("Commands:")[2], re.M)
    assert set(listed) == COMMANDS.keys()
    assert len(listed) > 15


@every_command
def test_help_says_what_it_does_with_an_example(name: str) -> None:
    command = COMMANDS[name]
    first = (command.help or "").splitlines()[0]
    assert re.fullmatch(r"[A-Z].*\.", first), f"{first!r} is no sentence"
    assert len(first) <= 64, "longer ones are cut short by dsc --help"
    lines = examples(command)
    assert any(args[:1] == [name] for line in lines for args in calls(line)), f"no example of dsc {name}"
    assert all(calls(line) for line in lines), lines


@every_command
def test_examples_parse(name: str) -> None:
    """Every option and argument of them exists and takes what it is given."""
    for line in examples(COMMANDS[name]):
        for args in calls(line):
            used = COMMANDS[args[0]]
            used.make_context(args[0], list(args[1:]), parent=click.Context(cli, info_name="dsc"))


def test_a_wrong_example_does_not_parse() -> None:
    for args in (["--no-such-option"], ["out", "--timeout", "soon"], []):
        with pytest.raises(click.UsageError):
            COMMANDS["run"].make_context("run", list(args))


def options() -> dict[str, list[tuple[str, click.Option]]]:
    found = defaultdict(list)
    for name, command in COMMANDS.items():
        for param in command.params:
            for opt in param.opts if isinstance(param, click.Option) else ():
                found[opt].append((name, param))
    return found


def test_options_are_named_alike() -> None:
    """Long names in small letters with hyphens, each with a help; -o is --out; what several commands share is the same in each."""
    for opt, users in options().items():
        assert re.fullmatch(r"--[a-z0-9]+(-[a-z0-9]+)*|-[a-z]", opt), opt
        assert all(param.help for _, param in users), f"{opt} of {[name for name, param in users if not param.help]} has no help"
    for name, param in options()["-o"]:
        assert "--out" in param.opts, f"-o of {name} is {param.opts}"
    for name, param in options()["--out"]:
        assert "-o" in param.opts, f"--out of {name} has no -o"
    for opt in ("--weights", "--inputs", "--json", "--recipe", "--set", "--seq", "--batch"):
        assert len({param.name for _, param in options()[opt]}) == 1, f"{opt} has several names in the code"
        assert len({(param.is_flag, param.multiple) for _, param in options()[opt]}) == 1, f"{opt} takes a value in some commands only"
    for text in (param.help or "" for users in options().values() for _, param in users):
        assert text[0].isupper() or text[0].isdigit(), text
        assert text.endswith((".", ")", "?")), text


@every_command
def test_defaults_are_said_in_one_way(name: str) -> None:
    """As `Default: X.`, the last sentence of the help, with what the code has; and a schedule is asked for in the same words everywhere."""
    for param in COMMANDS[name].params:
        if not isinstance(param, click.Option):
            continue
        text, default = (param.help or "").replace("the default pipeline", ""), param.to_info_dict()["default"]
        assert not param.show_default, f"{param.opts}: click would say it in its own way"
        assert re.fullmatch(r"((?!default).)*( Default: ((?!default).)+\.)?", text, re.IGNORECASE), text
        if not param.is_flag and default not in (None, "", [], ()):
            said = text.partition(" Default: ")[2].removesuffix(".").partition(",")[0]
            assert said == str(default) or float(said) == default, f"{param.opts} takes {default}, and its help says {said}"
        if param.name == "schedule":
            assert "schedule (see dsc schedule). Default: " in text
            assert str(param.metavar).startswith("NAME|auto")


@every_command
def test_json_is_offered(name: str) -> None:
    has = any("--json" in param.opts for param in COMMANDS[name].params)
    assert has != (name in WITHOUT_JSON)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what commands are called on: scale.dsc, its artifact, and a histogram of experts."""
    folder = tmp_path_factory.mktemp("made")
    scale = "func @main(%x: f32[2, 4]) {\n  %y: f32[2, 4] = silu(%x)  @ main#1 F\n  return %y\n}\n"
    (folder / "scale.dsc").write_text(scale)
    dsc.compile(folder / "scale.dsc", folder / "out")
    return folder


JSON_CALLS: dict[str, str] = {
    "compile": "scale.dsc -o again",
    "run": "out",
    "inspect": "out --params --memory",
    "opt": "scale.dsc -p simplify",
    "diff": "out --backends numpy,numpy-f64",
    "doctor": "",
    "golden": "silu -o golden",
    "export": "out --onnx model.onnx",
    "ops": "silu",
    "passes": "simplify",
    "models": "",
    "schedule": "1f1b --stages 2 --microbatches 4",
    "report": "out",
    "devices": "h800",
    "plan": "deepseek-v3-tiny --gpus 2 --mesh dp=2,ep=2 --schedule 1f1b --seq 16 --batch 4 --recipe none --no-tornado",
}
"""A quick call of each command, run with --json. Those that are not here need a checkpoint, data or a GPU, and have tests of their own."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("plan", "doctor"))) for n in JSON_CALLS])
def test_json_is_one_document(command: Any, made: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(made)
    done = command(name, *shlex.split(JSON_CALLS[name]), "--json")
    assert done.code in (0, 1), done.err
    assert isinstance(done.json, dict | list)
    assert "\x1b" not in done.out + done.err


@every_command
def test_a_wrong_call_is_one_line_and_code_2(refused: Any, name: str) -> None:
    (line,) = refused(name, "--no-such-option")
    assert line.endswith(f"(see dsc {name} --help)")
    if any(param.required for param in COMMANDS[name].params):
        (line,) = refused(name)
        assert line.startswith("Missing ")


def test_an_option_without_its_value_says_where_help_is(refused: Any) -> None:
    """Of every command, also where click forgets whose option it is."""
    for name, command in COMMANDS.items():
        for param in command.params:
            if isinstance(param, click.Option) and not param.is_flag and not param.count:
                (line,) = refused(name, param.opts[-1])
                assert line.endswith(f"(see dsc {name} --help)"), line


WRONG: dict[str, bytes | None] = {
    "folder": None,
    "folder.toml": None,
    "folder.npz": None,
    "folder.csv": None,
    "empty": b"",
    "noise": bytes(range(255, 0, -3)),
    "half.json": b'{"a": [1, ',
    "list.json": b"[]",
    "nan.json": b'{"format": NaN}',
    "half.toml": b'name = "x\n[',
    "half.csv": b"0F0,1F\n,,",
    "half.npz": b"PK\x03\x04abc",
    "half.safetensors": b'\x10\0\0\0\0\0\0\0{"a"',
    "half.dsc": b"func @main(%x: f32[2, 4]) {\n  %y",
    "missing": None,
}
"""What is not what any command reads: folders (None), files of another kind, and files that end in the middle."""

READ = """
compile ? -o new | compile scale.dsc --weights ? -o new | compile deepseek-v3-tiny --recipe ? -o new | run ? | run out --inputs ?
run out --weights ? | run out --routing-stats ? | inspect ? | opt ? -p simplify | diff ? out | diff out ? | diff out --inputs ?
diff out --weights ? | golden --check ? folder | export ? --onnx new.onnx | report ? | devices ? | plan ? --gpus 2
plan deepseek-v3-tiny --gpus 2 --cluster ? | place ? --gpus 2 --replicas 4 | schedule ? | convert ? new --to fp8
train ? --data noise -o new --steps 1
train deepseek-v3-tiny --data noise --tokenizer ? -o new --steps 1
""".strip().replace("\n", " | ")
"""Every place of a command line that names something to read."""


@pytest.mark.parametrize("line", READ.split(" | "))
def test_what_cannot_be_read_is_told_in_a_line(command: Any, made: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(made)
    for name, content in WRONG.items():
        if content is not None:
            Path(name).write_bytes(content)
        elif name != "missing":
            Path(name).mkdir(exist_ok=True)
    before = sorted(made.iterdir())
    for name in WRONG:
        done = command(*shlex.split(line.replace("?", name)))
        assert (done.code, done.out) == (2, ""), (name, done.err)
        first, *more = done.err.splitlines()
        assert first.startswith("dsc: error: "), name
        assert "internal error" not in first, first
        assert all(other.startswith((" ", "dsc: error: ")) for other in more), done.err
        assert sorted(made.iterdir()) == before, name


@pytest.mark.parametrize("number", ["0", "-1", "nan", "-inf"])
def test_seconds_to_wait_are_more_than_none(refused: Any, made: Path, number: str) -> None:
    for line in ("run out", "train deepseek-v3-tiny --data scale.dsc -o new --steps 1"):
        (message,) = refused(*line.replace("out", str(made / "out")).split(), "--timeout", number)
        assert message.startswith("--timeout is ")


def test_an_unknown_command_is_one_line(refused: Any) -> None:
    (line,) = refused("compil")
    assert "compil" in line


# ---- the terminal


def on_a_terminal(arguments: list[str], cwd: Path, **environment: str) -> str:
    """What a command prints where both streams are a terminal."""
    main, other = pty.openpty()
    given = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "CI")} | {"TERM": "xterm-256color"} | environment
    with subprocess.Popen([sys.executable, "-m", "dsc", *arguments], stdout=other, stderr=other, cwd=cwd, env=given) as process:
        os.close(other)
        found = b""
        while True:
            try:
                block = os.read(main, 65536)
            except OSError:  # the other end is closed
                break
            if not block:
                break
            found += block
    os.close(main)
    assert process.returncode == 0, found
    return found.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*\b(?:3[0-7]|4[0-7]|38|48|9[0-7])\b[0-9;]*m")
"""What sets a colour of letters or of their ground."""


def test_colours_are_for_terminals_that_want_them(made: Path) -> None:
    arguments = ["schedule", "1f1b", "--stages", "2", "--microbatches", "4"]
    assert COLOUR.search(on_a_terminal(arguments, made))
    assert not COLOUR.search(on_a_terminal(arguments, made, NO_COLOR="1"))
    piped = subprocess.run([sys.executable, "-m", "dsc", *arguments], cwd=made, capture_output=True, text=True)
    assert "\x1b" not in piped.stdout + piped.stderr


def test_progress_is_for_terminals(made: Path) -> None:
    assert COLOUR.search(on_a_terminal(["golden", "matmul", "--json"], made))
    assert not COLOUR.search(on_a_terminal(["golden", "matmul", "--json"], made, NO_COLOR="1"))
    piped = subprocess.run([sys.executable, "-m", "dsc", "golden", "matmul", "--json"], cwd=made, capture_output=True, text=True)
    assert piped.stderr == ""
    assert json.loads(piped.stdout)["cases"]["matmul"] > 5


# ---- interrupts


def test_what_goes_on_after_an_interrupt_is_said(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of commands that keep what is done; the hint names an option that there is."""
    assert RESUMED.keys() <= COMMANDS.keys()
    for name, text in RESUMED.items():
        for opt in re.findall(r"--[a-z-]+", text):
            assert any(opt in param.opts for param in COMMANDS[name].params)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    import dsc.driver.golden
    import dsc.driver.train
    import dsc.models.convert

    monkeypatch.setattr(dsc.models.convert, "Conversion", interrupt)
    done = command("convert", "a", "b", "--to", "fp8")
    assert (done.code, done.err.strip()) == (130, "dsc: interrupted; the same command goes on where it was")
    monkeypatch.setattr(dsc.driver.train, "train", interrupt)
    done = command("train", "deepseek-v3-tiny", "--data", "x", "-o", tmp_path / "run", "--steps", "2")
    assert (done.code, done.err.strip()) == (130, "dsc: interrupted; the same command with --resume goes on from the last checkpoint")
    monkeypatch.setattr(dsc.driver.golden, "write", interrupt)
    done = command("golden", "silu", "-o", tmp_path / "g")
    assert (done.code, done.err.strip()) == (130, "dsc: interrupted; nothing half-written was left behind")


# ---- what docs/cli.md says


def test_the_page_has_every_command_and_variable() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    missing = [name for name in COMMANDS if f"`dsc {name}`" not in page]
    assert not missing, f"docs/cli.md has no line for {missing}"
    read: set[str] = set()
    for folder in ("backends", "distributed", "driver", "hardware", "models", "passes", "numerics"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                key = None
                if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                    key = node.slice
                elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
                    key = node.args[0]
                elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
                    key = node.left
                if isinstance(key, ast.Constant):
                    read.add(key.value)
    assert {"XDG_CACHE_HOME", "NO_COLOR", "TRITON_INTERPRET", "RANK"} <= read
    assert not [name for name in sorted(read) if f"`{name}`" not in page]
    for code in ("0", "1", "2", "130", "141", "143"):
        assert re.search(rf"^\| `?{code}`? \|", page, re.M), code


# ---- the start


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    """User CPU of a fresh process, the best of five."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, "-m", "dsc", "--help"], check=True, capture_output=True)
        found.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(found) < 0.3, found


@every_command
def test_help_of_a_command_loads_nothing_heavy(name: str) -> None:
    code = f"""
import sys
from dsc.driver.cli import main
try:
    main([{name!r}, "--help"])
except SystemExit as ended:
    print(ended.code, *sorted({{"torch", "onnx", "scipy", "matplotlib", "triton", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0"


def test_arrays_are_not_shown_as_json_of_other_kinds(command: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinities and NaN are no JSON: a command that has them says so otherwise."""
    monkeypatch.chdir(made)
    (made / "log.dsc").write_text("func @main(%x: f32[2]) {\n  %y: f32[2] = log(%x)  @ main#1 F\n  return %y\n}\n")
    np.savez(made / "zero.npz", x=np.zeros(2, np.float32))
    assert command("compile", "log.dsc", "-o", "log").code == 0
    for arguments in (["run", "log", "--inputs", "zero.npz"], ["diff", "log", "--backends", "numpy,numpy-f64", "--inputs", "zero.npz"]):
        assert command(*arguments, "--json").json
