"""The entry-point group `dsc.backends`: what another package registers is found by name, and what is wrong with it is one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

import dsc
from dsc import DscError, backends
from dsc.driver.cli import main
from dsc.ir.parser import parse
from dsc.testing import assert_backends_agree

GOOD = """
from dsc.backends.numpy_ref.run import FLOAT32

class Mine:
    asked = []

    def run(self, module, weights, inputs, observe=None):
        Mine.asked.append(module.stage)
        return FLOAT32.run(module, weights, inputs, observe)

    def evaluate(self, op, operands):
        return FLOAT32.evaluate(op, operands)

    def prepares(self, module):
        return "simplify,fuse"

BACKEND = Mine()
"""

PROGRAM = """module { stage=traced }
func @main(%x: f32[4, 8]) {
  %y: f32[4, 8] = silu(%x)  @ main#1 F
  %z: f32[4, 8] = mul(%y, %y)  @ main#2 F
  return %z
}
"""

Register = Callable[..., None]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
    """`register(name, source)`: a package of one module with an entry point, on the path."""
    made: list[str] = []

    def add(name: str, source: str, target: str = "BACKEND", package: str = "") -> None:
        package = package or f"third_{len(made)}_{tmp_path.name}"
        made.append(package)
        info = tmp_path / f"{package}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[dsc.backends]\n{name} = {package}:{target}\n")
        (tmp_path / f"{package}.py").write_text(dedent(source))

    monkeypatch.syspath_prepend(str(tmp_path))
    backends.get.cache_clear()
    yield add
    backends.get.cache_clear()
    for package in made:
        sys.modules.pop(package, None)


def test_it_is_found_everywhere(register: Register, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register("mine", GOOD, package="third_good")
    assert "mine" in backends.names()
    module, x = parse(PROGRAM), np.ones((4, 8), np.float32)
    (found,) = dsc.run(module, inputs=(x,), backend="mine")
    np.testing.assert_array_equal(found, dsc.run(module, inputs=(x,))[0])
    assert sys.modules["third_good"].Mine.asked == ["lowered"], "the passes that it asks for ran first"
    assert assert_backends_agree(module, {}, (x,), backends=("numpy", "mine")).ops == 2
    assert dsc.diff(module, backends=("numpy", "mine"), inputs=(x,)).same
    (tmp_path / "p.dsc").write_text(PROGRAM)
    for arguments in (["compile", tmp_path / "p.dsc", "-o", tmp_path / "out"], ["run", tmp_path / "out", "--backend", "mine"]):
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        assert ended.value.code == 0
    assert "ran on mine in" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["diff", str(tmp_path / "out"), "--backends", "numpy,mine"])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_this_name", "does not load: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("BACKEND = (", "does not load: SyntaxError: '(' was never closed"),
        ("1 / 0", "does not load: ZeroDivisionError: division by zero"),
        ("OTHER = 1", "does not load: AttributeError: module "),
        ("BACKEND = 3", "has no `run` and no `evaluate`"),
        ("class BACKEND:\n    def run(self): ...\n    def evaluate(self): ...", "is a class: register an object"),
    ],
)
def test_a_broken_one_is_one_line(register: Register, capsys: pytest.CaptureFixture[str], source: str, message: str) -> None:
    register("mine", source, package=f"third_broken_{abs(hash(source))}")
    with pytest.raises(DscError) as error:
        backends.get("mine")
    assert str(error.value).startswith("backend 'mine' (third_broken_")
    assert "1.5) " + message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("raise ValueError('no such\\nthing')", "backend 'mine' fails: ValueError: no such"),
        ("raise SystemError", "backend 'mine' fails: SystemError"),
        ("return FLOAT32.run(module, weights, inputs, observe)[0]", "the program gives a ndarray, expected a tuple of 1"),
        ("return FLOAT32.run(module, weights, inputs, observe) * 2", "the program gives 2 results, expected a tuple of 1"),
        ("return tuple(x.astype('f8') for x in inputs)", r"the program gives f64[4, 8] for %z, expected f32[4, 8]"),
    ],
)
def test_what_fails_in_it_is_told_as_its_fault(register: Register, change: str, message: str) -> None:
    register(
        "mine", GOOD.replace("return FLOAT32.run(module, weights, inputs, observe)", change), package=f"third_failing_{abs(hash(change))}"
    )
    with pytest.raises(DscError) as error:
        dsc.run(parse(PROGRAM), backend="mine")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_name_that_is_taken(register: Register) -> None:
    register("mine", GOOD, package="third_a")
    register("mine", GOOD, package="third_b")
    register("numpy", GOOD, package="third_c")
    with pytest.raises(DscError, match=r"backend 'mine' is registered 2 times: third_[ab]:BACKEND of third_[ab] 1.5, third_"):
        backends.get("mine")
    assert type(backends.get("numpy")).__module__ == "dsc.backends.numpy_ref.run", "dsc's own come first"


def test_one_that_runs_on_one_rank_says_so(register: Register) -> None:
    """A backend derived from `Eager` names the collective that it does not run."""
    eager = """
    from dsc.backends.eager import Eager
    class Mine(Eager):
        def compute(self, op, operands):
            return operands
    BACKEND = Mine()
    """
    register("mine", eager, package="third_eager")
    text = 'func @main(%x: f32[4]) {\n  %y: f32[4] = all_reduce(%x, axis="dp", size=2)  @ main#1 F\n  return %y\n}\n'
    with pytest.raises(DscError, match=r"@main main#1: all_reduce: all_reduce over 2 ranks: this backend runs on one"):
        backends.get("mine").run(parse(text), lambda *_: None, (np.ones(4, np.float32),))
