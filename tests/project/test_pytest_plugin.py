"""A bare `pytest` works in a checkout of any name, from any folder of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROBE = "import dsc\n\n\ndef test_probe():\n    assert issubclass(dsc.DscError, Exception)\n"


def checkout(folder: Path) -> Path:
    """A folder that has what matters of this one: its pyproject.toml, an `__init__.py` in the root, and a test."""
    (folder / "tests" / "area").mkdir(parents=True)
    for name in ("pyproject.toml", "__init__.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests" / "area" / "test_probe.py").write_text(PROBE)
    return folder


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "inside"), [("with-hyphen", ""), ("with-hyphen", "tests/area"), ("with space", ""), ("dsc", "tests/area"), ("main", "")]
)
def test_runs_under_any_name_from_any_folder(tmp_path: Path, name: str, inside: str) -> None:
    done = run(checkout(tmp_path / name) / inside)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^1 passed", done.stdout, re.MULTILINE), done.stdout


def test_without_the_plugin_a_hyphen_breaks_it(tmp_path: Path) -> None:
    done = run(checkout(tmp_path / "with-hyphen"), "--override-ini=addopts=--import-mode=importlib")
    assert done.returncode != 0
    assert "relative import" in done.stdout
