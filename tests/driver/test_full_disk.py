"""Where the artifact goes: what is there already is kept, and on a full disk nothing half-written stays."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc

Refused = Callable[..., list[str]]


class TestOut:
    """Where the artifact should go."""

    def test_what_dsc_did_not_make_is_never_replaced(self, refused: Refused, tmp_path: Path) -> None:
        file, folder = tmp_path / "file", tmp_path / "folder"
        file.write_text("precious")
        folder.mkdir()
        (folder / "thesis.tex").write_text("precious")
        (folder / "manifest.json").write_text('{"name": "of something else"}')
        for out, kind in ((file, "a file"), (folder, "a folder that is not an artifact")):
            (line,) = refused("compile", "deepseek-v3-tiny", "-o", out)
            assert line == f"{out} exists and is {kind}; expected a new folder, an empty one or an artifact to replace"
        assert file.read_text() == (folder / "thesis.tex").read_text() == "precious"

    def test_a_folder_below_a_file(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (line,) = refused("compile", "deepseek-v3-tiny", "-o", tmp_path / "file" / "out")
        assert line == f"{tmp_path / 'file' / 'out'} cannot be written: {tmp_path / 'file'} is a file"

    def test_a_folder_without_permission(self, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, whom no folder refuses
        (line,) = refused("compile", "deepseek-v3-tiny", "-o", tmp_path / "out")
        assert line == f"{tmp_path / 'out'} cannot be written: no permission to write in {tmp_path}"


@pytest.mark.parametrize("old", ["nothing", "empty folder", "artifact"])
@pytest.mark.parametrize("writes", range(7))
def test_a_full_disk_leaves_what_was_there(
    refused: Refused, scale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, writes: int
) -> None:
    """The disk is full at each of the seven files of an artifact in turn, which is written in part."""
    out = tmp_path / "deep" / "er" / "out"
    if old == "empty folder":
        out.mkdir(parents=True)
    elif old == "artifact":
        dsc.compile(scale, out=out)
    before = snapshot(tmp_path)
    whole, written = Path.write_text, 0

    def write_text(self: Path, data: str, *args: Any, **kwargs: Any) -> int:
        nonlocal written
        if written == writes:
            whole(self, data[: len(data) // 2], *args, **kwargs)
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        written += 1
        return whole(self, data, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    (line,) = refused("compile", scale, "-o", out, "--passes", "simplify,quantize-fp8")
    assert line == f"{out} cannot be written: No space left on device; nothing was left behind"
    assert snapshot(tmp_path) == before


def test_a_disk_that_is_really_full(refused: Refused, scale: Path, tmp_path: Path) -> None:
    """A file system of four pages, on which the six files of an artifact do not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        (line,) = refused("compile", scale, "-o", disk / "out", "--passes", "simplify,quantize-fp8")
        assert line == f"{disk / 'out'} cannot be written: No space left on device; nothing was left behind"
        assert snapshot(disk) == {}
        big = tmp_path / "big.dsc"
        big.write_text("func @main(%x: f32[64, 64]) {\n  return %x\n}\n")
        dsc.compile(big, out=tmp_path / "big")
        (line,) = refused("run", tmp_path / "big", "--out", disk / "x.npz")
        assert line == f"{disk / 'x.npz'} cannot be written: No space left on device"
        assert snapshot(disk) == {}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_while_renaming(refused: Refused, scale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old artifact is moved away and the new one cannot be moved in: the old one comes back."""
    out = dsc.compile(scale, out=tmp_path / "out").path
    before = snapshot(tmp_path)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == out and not self.name.endswith(".old"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    refused("compile", scale, "-o", out, "--passes", "")
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_full_disk_under_the_results(refused: Refused, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stream: Any, **arrays: Any) -> None:
        stream.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "results.npz"
    file.write_text("older")
    monkeypatch.setattr(np, "savez", fail)
    assert refused("run", tiny, "--out", file) == [f"{file} cannot be written: No space left on device"]
    assert snapshot(tmp_path) == {"results.npz": b"older"}
