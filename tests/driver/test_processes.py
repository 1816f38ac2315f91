"""`dsc` as a process: signals, pipes, and what it imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

DSC = [sys.executable, "-m", "dsc"]
INTERRUPTED = {130, -signal.SIGINT}
"""To a shell both are 130: Python sends itself the signal where the interrupt passed through code that it ran for an import."""


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DSC, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


def test_the_module_and_the_script_are_the_same_command(scale: Path) -> None:
    script = Path(sys.executable).with_name("dsc")
    for arguments in (["--version"], ["opt", str(scale), "-p", "simplify"], ["opt", "no.dsc"]):
        ours = run(*arguments)
        other = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
        assert (ours.returncode, ours.stdout, ours.stderr) == (other.returncode, other.stdout, other.stderr)
    assert run("opt", "no.dsc").stderr == "dsc: error: no.dsc: no such file\n"


def test_compile_run_and_diff(tmp_path: Path) -> None:
    """The README's way, in a folder of one's own."""
    made = run("compile", "deepseek-v3-tiny", "-o", "out", "--seq", 16, cwd=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    assert run("run", "out", cwd=tmp_path).returncode == 0
    same = run("diff", "out", "out", "--json", cwd=tmp_path)
    assert (same.returncode, json.loads(same.stdout)["same"]) == (0, True)
    assert run("compile", "deepseek-v3-tiny", "-o", "fp8", "--seq", 16, "--recipe", "deepseek-v3", cwd=tmp_path).returncode == 0
    assert run("diff", "out", "fp8", cwd=tmp_path).returncode == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp8", "out"]


STARTED = """
import signal, sys
from dsc.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite started in the background of a script ignores it
sys.argv = ["dsc", *{arguments!r}]
print("started", flush=True)
main()
"""
SLOW_WRITES = """
import signal, sys, time
from pathlib import Path
import dsc.driver.artifact
from dsc.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite started in the background of a script ignores it
whole = Path.write_text

def write_text(self, *args, **kwargs):
    done = whole(self, *args, **kwargs)
    print("wrote", flush=True)
    time.sleep({seconds})
    return done

Path.write_text = write_text
sys.argv = ["dsc", *{arguments!r}]
main()
"""


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("sent", "codes"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, {143})])
def test_interrupted_while_writing(scale: Path, tmp_path: Path, sent: signal.Signals, codes: set[int], old: bool) -> None:
    """Nothing of the new artifact is left, and an older one is as it was."""
    folder = tmp_path / "folder"
    if old:
        assert run("compile", scale, "-o", folder / "out").returncode == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    text = SLOW_WRITES.format(seconds=60, arguments=["compile", str(scale), "-o", str(folder / "out")])
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "wrote\n"
    drafts = [p.name for p in folder.iterdir() if p.name.startswith(".out.")]
    assert len(drafts) == 1, "the draft does not lie beside its place"
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode in codes
    assert "Traceback" not in err
    assert err.strip() == "dsc: interrupted; nothing half-written was left behind"
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert folder.exists() == old


@pytest.mark.slow
def test_interrupted_while_tracing(tmp_path: Path) -> None:
    """Whenever the signal comes: early, in the middle, late."""
    text = STARTED.format(arguments=["compile", "deepseek-v3", "-o", str(tmp_path / "out"), "--mode", "train"])
    for seconds in (0.2, 1.0, 2.5, 4.0):
        process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode == 0 and seconds > 1:
            break  # it was quicker than the signal
        assert process.returncode in INTERRUPTED
        assert err.strip() == "dsc: interrupted; nothing half-written was left behind"
        assert list(tmp_path.iterdir()) == []


LOST = """
import os, signal, sys
import dsc.driver.compile
from dsc.__main__ import main

class Collected:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

resolve = dsc.driver.compile.resolve

def slowly(source):
    Collected()  # what its end raises is dropped
    return resolve(source)

signal.signal(signal.SIGINT, signal.default_int_handler)
dsc.driver.compile.resolve = slowly
sys.argv = ["dsc", *{arguments!r}]
main()
"""


def test_an_interrupt_whose_exception_is_lost(scale: Path, tmp_path: Path) -> None:
    """Python drops what a callback of the garbage collector raises. The command is interrupted all the same."""
    text = LOST.format(arguments=["compile", str(scale), "-o", str(tmp_path / "out")])
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert "Exception ignored in" in ended.stderr
    assert ended.returncode == 130
    assert ended.stderr.endswith("dsc: interrupted; nothing half-written was left behind\n")
    assert not (tmp_path / "out").exists()


def test_a_reader_that_goes_away(tiny: Path) -> None:
    """`dsc ops | head -0` says nothing more, and ends as a process does that SIGPIPE ended."""
    for arguments in (["ops"], ["inspect", tiny, "--after", "traced"], ["opt", tiny / "ir" / "00-traced.dsc"], ["--help"], []):
        read, write = os.pipe()
        os.close(read)
        ended = subprocess.run([*DSC, *map(str, arguments)], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
        os.close(write)
        assert (ended.returncode, ended.stderr) == (141, ""), arguments


def test_a_closed_output(scale: Path) -> None:
    """Into /dev/full: one line, not a traceback."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*DSC, "ops"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "dsc: error: No space left on device\n"


IMPORTS = """
import sys
from dsc.driver.cli import main
sys.argv = ["dsc", *{arguments!r}]
try:
    main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
heavy = [name for name in {heavy!r} if name in sys.modules]
print("heavy:", *heavy)
"""
TORCH = ["torch", "transformers", "triton", "onnx", "scipy", "matplotlib"]


def imported(arguments: list[str], heavy: list[str]) -> str:
    text = IMPORTS.format(arguments=arguments, heavy=heavy)
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()[-1].removeprefix("heavy:").strip()


def test_what_needs_no_torch_does_not_import_it(tiny: Path, scale: Path, tmp_path: Path) -> None:
    file = str(scale)
    for arguments in (
        ["--help"],
        ["compile", "--help"],
        ["ops"],
        ["passes"],
        ["models"],
        ["opt", file],
        ["opt", file, "-p", "simplify,quantize-fp8"],
        ["compile", file, "-o", str(tmp_path / "out")],
        ["inspect", str(tiny)],
        ["inspect", str(tiny), "--params", "--memory"],
        ["run", str(tiny)],
        ["diff", str(tiny), "--backends", "numpy,numpy-f64"],
    ):
        assert imported(arguments, TORCH) == "", arguments


def test_help_imports_next_to_nothing() -> None:
    assert imported(["--help"], [*TORCH, "numpy", "lark", "pydantic", "rich", "ml_dtypes"]) == ""


def test_importing_dsc_imports_nothing_heavy() -> None:
    text = f"import sys, dsc; assert not [m for m in {[*TORCH, 'numpy', 'lark']!r} if m in sys.modules]; dir(dsc); dsc.DscError"
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
