"""Shell completion: the scripts are what the shells take, and what they ask is answered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsc.driver.complete import NAMES
from dsc.models.config import shipped
from dsc.passes.manager import PASSES

DSC = [sys.executable, "-m", "dsc"]


def asked(line: str) -> list[str]:
    """What completes the last word of a line, as bash is told."""
    words = line.split(" ")
    environment = os.environ | {"_DSC_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(DSC, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return [found.partition(",")[2] for found in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dsc com", ["compile", "completion"]),
        ("dsc compile deepseek-v3", [name for name in shipped() if name.startswith("deepseek-v3")]),
        ("dsc compile deepseek-v3 --recipe deep", ["deepseek-v3", "deepseek-v3.1"]),
        ("dsc compile x --passes simplify,quant", ["simplify,quantize-fp8"]),
        ("dsc run out --backend num", ["numpy", "numpy-f64"]),
        ("dsc diff out --backends numpy,numpy-", ["numpy,numpy-f64"]),
        ("dsc passes auto", ["autodiff"]),
        ("dsc ops scaled_matmul_a", ["scaled_matmul_add"]),
        ("dsc golden scaled_matmul_a", ["scaled_matmul_add"]),
        ("dsc schedule dual", ["dualpipe", "dualpipev"]),
        ("dsc completion z", ["zsh"]),
        ("dsc train --res", ["--resume"]),
    ],
)
def test_names_complete(line: str, expected: list[str]) -> None:
    assert asked(line) == expected


def test_a_source_that_is_no_name_is_a_file() -> None:
    environment = os.environ | {"_DSC_COMPLETE": "bash_complete", "COMP_WORDS": "dsc compile ./my", "COMP_CWORD": "2"}
    assert subprocess.run(DSC, env=environment, capture_output=True, text=True).stdout == "file,./my\n"


def test_every_list_of_names_has_some() -> None:
    for key, values in NAMES.items():
        assert list(values()), key
    assert list(NAMES["--passes"]()) == sorted(PASSES)
    assert sorted(NAMES["source"]()) == sorted(shipped())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_that_the_shell_takes(command: Any, tmp_path: Path, shell: str) -> None:
    done = command("completion", shell)
    assert done.code == 0
    assert f"_DSC_COMPLETE={shell}_complete" in done.out
    if not (found := shutil.which(shell)):
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / "script"
    file.write_text(done.out)
    assert subprocess.run([found, "-n", str(file)], capture_output=True, text=True).stderr == ""


def test_bash_completes(command: Any, tmp_path: Path) -> None:
    """The script in a shell, with `dsc` on its path."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    (tmp_path / "dsc").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dsc "$@"\n')
    (tmp_path / "dsc").chmod(0o755)
    script = command("completion", "bash").out
    text = f'{script}\nCOMP_WORDS=(dsc passes simp); COMP_CWORD=2; _dsc_completion dsc; echo "${{COMPREPLY[@]}}"\n'
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", text], capture_output=True, text=True, env=environment)
    assert done.stdout == "simplify\n", done.stderr


def test_another_shell_is_refused(refused: Any) -> None:
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in refused("completion", "csh")[0]
