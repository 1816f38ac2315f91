"""Who may import whom, checked on the syntax trees of the sources; and what a bare `import dsc` or `dsc --help` must not load.

The table `LAWS` is the law. A part of the package is a folder (`ir`, `backends/triton`) or a single file with a rule of its own
(`distributed/torch_world.py`). Libraries are named as they are imported; the standard library is open to all.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_PACKAGES = {"tests", "benchmarks", "examples", "docs", "build", "dist", "demo", "out"}
MOST_LINES_OF_A_FILE = 450


@dataclass(frozen=True)
class Law:
    """What one part may import: parts of dsc and libraries anywhere; `late` ones (parts or libraries) inside functions only."""

    parts: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()


def law(parts: str = "", libraries: str = "", late: str = "") -> Law:
    return Law(frozenset(parts.split()), frozenset(libraries.split()), frozenset(late.split()))


BACKENDS = "backends/numpy_ref backends/triton backends/onnx"
BELOW_DRIVER = f"ir numerics hardware passes schedule distributed backends {BACKENDS} models testing"

LAWS = {
    "ir": law(libraries="lark"),
    "numerics": law("ir", "numpy ml_dtypes"),
    "hardware": law("ir", late="scipy"),
    "passes": law("ir hardware schedule", late="scipy networkx"),
    "schedule": law("ir hardware", late="matplotlib"),
    "distributed": law("ir schedule", "numpy ml_dtypes"),
    "distributed/torch_world.py": law("ir distributed", "numpy ml_dtypes torch"),
    # The folder itself holds what the backends share: the protocol and the list of them, which loads one when it is asked for.
    "backends": law("ir numerics hardware distributed", "numpy ml_dtypes", late=BACKENDS),
    "backends/numpy_ref": law("ir numerics hardware distributed backends", "numpy ml_dtypes"),
    "backends/triton": law("ir numerics hardware distributed backends", "numpy ml_dtypes torch triton"),
    "backends/onnx": law("ir numerics hardware distributed backends", "numpy ml_dtypes safetensors onnx onnx_ir"),
    "models": law("ir numerics", "torch numpy ml_dtypes safetensors pydantic"),
    # The models of the conformance suite are traced when they are asked for.
    "testing": law(f"ir backends {BACKENDS}", "numpy ml_dtypes pytest hypothesis", late="models passes"),
    "driver": law(
        BELOW_DRIVER,
        "numpy ml_dtypes safetensors click rich pydantic",
        late="distributed/torch_world.py torch triton onnx onnx_ir scipy networkx matplotlib tokenizers",
    ),
    # The files of the root: the public API, which loads the rest on first use, and the entry point of the command.
    "": law("ir", late=f"driver {BELOW_DRIVER}"),
}


def part_of(path: str) -> str:
    """The longest part that holds a file or module: 'distributed/torch_world.py' is one, 'ir/ops/quant.py' is in 'ir'."""
    pieces = path.split("/")
    for end in range(len(pieces), 0, -1):
        name = "/".join(pieces[:end])
        for candidate in (name, f"{name}.py"):
            if candidate in LAWS:
                return candidate
    return "" if len(pieces) == 1 else pieces[0]


@dataclass(frozen=True)
class Import:
    """One imported name: `target` is a path below the root for dsc's own modules, the name of the top module otherwise."""

    line: int
    target: str
    own: bool
    late: bool


def imports(source: str, path: str) -> Iterator[Import]:
    """All imports in a source file that lies at `path` below the root, relative ones resolved.

    Late are those that do not run on import of the file: inside a function or under `if TYPE_CHECKING`.
    """

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, *rest = alias.name.split(".")
                own = top == "dsc"
                yield Import(node.lineno, "/".join(rest) if own else top, own, late)
        elif isinstance(node, ast.ImportFrom):
            names = (node.module or "").split(".") if node.module else []
            if node.level:
                folder = path.split("/")[:-1]
                base = folder[: len(folder) - node.level + 1] + names
            elif names[0] == "dsc":
                base = names[1:]
            else:
                yield Import(node.lineno, names[0], False, late)
                return
            for alias in node.names:
                yield Import(node.lineno, "/".join([*base, alias.name]), True, late)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, late)
        else:
            inner = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inner)

    yield from visit(ast.parse(source), False)


def violations(source: str, path: str) -> list[str]:
    """One line for each import of the file that its law does not allow."""
    part = part_of(path)
    if part not in LAWS:
        return [f"{path}: no law for the folder '{part}': add it to LAWS"]
    allowed = LAWS[part]
    found = []
    for item in imports(source, path):
        if item.own:
            target, kind, open_to_all = part_of(item.target), "dsc part", {part}
        else:
            target, kind, open_to_all = item.target, "library", sys.stdlib_module_names
        if target in open_to_all or target in (allowed.parts if item.own else allowed.libraries):
            continue
        if target in allowed.late:
            if item.late:
                continue
            found.append(f"{path}:{item.line}: '{part}' may import '{target}' inside functions only")
        else:
            found.append(f"{path}:{item.line}: '{part}' may not import the {kind} '{target or 'dsc (root)'}'")
    return found


def python_files(root: Path, skip: set[str] = NOT_PACKAGES) -> list[Path]:
    """The sources below `root`, without hidden folders and those in `skip`."""
    found = sorted(root.glob("*.py"))
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name not in skip and not folder.name.startswith((".", "__")) and not folder.name.endswith(".egg-info"):
            found += python_files(folder, skip)
    return found


def test_every_import_keeps_the_law() -> None:
    files = python_files(ROOT)
    assert len(files) > 20, "the walk over the sources finds too little to mean anything"
    found = [line for file in files for line in violations(file.read_text(), file.relative_to(ROOT).as_posix())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ir/core.py", "import numpy as np"),
        ("ir/core.py", "from numpy.typing import NDArray"),
        ("ir/ops/quant.py", "from ...numerics import formats"),
        ("ir/ops/quant.py", "from ... import DscError"),
        ("numerics/formats.py", "def f():\n    import torch"),
        ("numerics/formats.py", "from ..passes.manager import apply"),
        ("passes/simplify.py", "from ..numerics import formats"),
        ("passes/recompute.py", "import scipy.optimize"),
        ("passes/manager.py", "from dsc.driver.cli import main"),
        ("passes/manager.py", "import dsc.models.config"),
        ("models/trace.py", "import transformers"),
        ("models/trace.py", "from ..driver import compile"),
        ("backends/numpy_ref/run.py", "from ..triton import run"),
        ("backends/numpy_ref/run.py", "from .. import triton"),
        ("backends/numpy_ref/run.py", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
        ("backends/triton/run.py", "def f():\n    from ..numpy_ref.run import run"),
        ("backends/__init__.py", "from .numpy_ref import run"),
        ("distributed/world.py", "import torch"),
        ("distributed/world.py", "from .torch_world import World"),
        ("testing/agree.py", "from ..models import config"),
        ("testing/conformance.py", "from ..passes.manager import apply"),
        ("testing/agree.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..driver import diff"),
        ("driver/cli.py", "import torch"),
        ("driver/cli.py", "class A:\n    import torch"),
        ("driver/cli.py", "def f():\n    import transformers"),
        ("__init__.py", "from .driver.run import run"),
        ("unheard_of/core.py", "import os"),
    ],
)
def test_the_checker_catches(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ir/parser.py", "import lark\nfrom .core import Func\nfrom . import types\nimport re"),
        ("ir/ops/quant.py", "from ..core import Op\nfrom .. import types\nfrom . import shape"),
        ("passes/recompute.py", "from ..ir import core\nfrom ..hardware.cost import seconds\ndef f():\n    import scipy.optimize"),
        ("backends/numpy_ref/run.py", "import numpy as np\nfrom ...ir.core import Func\nfrom .. import Backend\nfrom . import moe"),
        ("backends/__init__.py", "def load():\n    from .numpy_ref.run import run\n    return run"),
        ("distributed/torch_world.py", "import torch.distributed as dist\nfrom .world import World"),
        ("testing/agree.py", "from ..backends import numpy_ref"),
        ("driver/cli.py", "from typing import TYPE_CHECKING\nfrom . import run\nif TYPE_CHECKING:\n    import torch"),
        ("driver/run.py", "def f():\n    import torch\n    from ..models import trace"),
        ("__main__.py", "def main():\n    from .driver.cli import main\n    main()"),
    ],
)
def test_the_checker_allows(path: str, source: str) -> None:
    assert violations(source, path) == []


def test_no_file_is_too_long() -> None:
    lines = {
        file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines())
        for file in python_files(ROOT, NOT_PACKAGES - {"tests", "benchmarks"})
    }
    package = {path: count for path, count in lines.items() if not path.startswith(("tests/", "benchmarks/"))}
    print(f"{sum(package.values())} lines in {len(package)} source files; the whole source is to stay around 15,000")
    too_long = [f"{path}: {count} lines, at most {MOST_LINES_OF_A_FILE}" for path, count in lines.items() if count > MOST_LINES_OF_A_FILE]
    assert not too_long, "\n".join(too_long)


LOADED = "import sys; print(*sorted({'torch', 'transformers', 'onnx', 'onnx_ir', 'triton'} & sys.modules.keys()))"


def loaded_by(code: str) -> list[str]:
    """The heavy libraries that a fresh interpreter has loaded after running `code`."""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{LOADED}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_the_probe_sees_a_heavy_library() -> None:
    assert "torch" in loaded_by("import torch")


def test_import_dsc_is_light() -> None:
    assert loaded_by("import dsc") == []


@pytest.mark.parametrize("command", ["--help", "compile --help", "ops", "passes", "models"])
def test_commands_without_torch_are_light(command: str) -> None:
    run_and_go_on = f"""
import sys
from dsc.__main__ import main
sys.argv = ["dsc", *{command.split()!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert loaded_by(run_and_go_on) == []
