"""What the driver's tests share: the command run in this process, and programs compiled or traced once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import dsc
from dsc.driver.cli import main
from dsc.ir.core import Module


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one JSON document that it must be: NaN and Infinity are no JSON."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


Command = Callable[..., Finished]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("run", path)`: the `dsc` command in this process."""

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        assert isinstance(ended.value.code, int)
        return Finished(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(command: Command) -> Callable[..., list[str]]:
    """`refused("run", path)`: the command must fail as a user's error does; gives its lines without what each begins with."""

    def run(*arguments: object) -> list[str]:
        ended = command(*arguments)
        assert ended.code == 2, ended
        assert ended.out == "", ended
        lines = ended.err.splitlines()
        assert lines, "no line says what is wrong"
        assert lines[0].startswith("dsc: error: "), ended.err
        assert all(line.startswith(("dsc: error: ", "  ")) for line in lines), ended.err
        assert "Traceback" not in ended.err
        assert "internal error" not in ended.err
        return [line.removeprefix("dsc: error: ") for line in lines]

    return run


@pytest.fixture(scope="session", autouse=True)
def read_once() -> Iterator[None]:
    """A shipped model is traced once with the same options, whichever command asks: that takes seconds, and no one changes a module."""
    from dsc.driver import compile as subject

    real = subject.read

    @cache
    def shipped(source: str, options: tuple[tuple[str, Any], ...]) -> Any:
        return real(source, **dict(options))

    def read(source: str | Path, **options: Any) -> Any:
        found = subject.resolve(source)
        if found.kind != "config" or found.file:
            return real(source, **options)
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
            if value not in (None, (), [], "forward")
        }
        _, module, config = shipped(found.text, tuple(sorted(given.items())))
        return found, module, deepcopy(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "read", read)
        yield


def sizes(mode: str) -> dict[str, int]:
    """16 tokens, under the name that they have in a mode."""
    return {"context" if mode == "decode" else "seq": 16}


@pytest.fixture(scope="session")
def traced() -> Callable[[str, str], Module]:
    """`traced(name, mode)`: a shipped model at 16 tokens, traced once."""

    @cache
    def trace(name: str, mode: str = "forward") -> Module:
        return dsc.trace(name, mode=mode, **sizes(mode))

    return trace


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of deepseek-v3-tiny, to be read and never written to."""
    return dsc.compile("deepseek-v3-tiny", out=tmp_path_factory.mktemp("shared") / "tiny", seq=16).path


@pytest.fixture(scope="session")
def tiny_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in float32."""
    out = tmp_path_factory.mktemp("shared") / "tiny32"
    return dsc.compile("deepseek-v3-tiny", out=out, seq=16, overrides=("dtype=float32",)).path


@pytest.fixture(scope="session")
def tiny_modes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of deepseek-v3-tiny in training and decoding form."""
    folder = tmp_path_factory.mktemp("shared")
    return {mode: dsc.compile("deepseek-v3-tiny", out=folder / mode, mode=mode, **sizes(mode)).path for mode in ("train", "decode")}


SCALE = """module { stage=traced }

func @main(%x: f32[2, 4]) {
  %w: f32[3, 4] = param("w")  @ main#1 F
  %y: f32[2, 3] = matmul(%x, %w, transpose_b=true)  @ main#2 F
  %z: f32[2, 3] = silu(%y)  @ main#3 F
  return %z
}
"""


@pytest.fixture
def scale(tmp_path: Path) -> Path:
    """A .dsc file of three ops, which needs no torch."""
    file = tmp_path / "scale.dsc"
    file.write_text(SCALE)
    return file
