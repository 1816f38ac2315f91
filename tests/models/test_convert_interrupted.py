"""Conversions that are killed, fail or find a full disk: what they leave is recognisable, and running them again gives the same bytes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from dsc.ir.errors import DscError
from dsc.models import convert as convert_module
from dsc.models.convert import Conversion

SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
LAST = ["model.safetensors.index.json", "config.json"]
RUN = """
import sys
from dsc.models.convert import Conversion
Conversion(sys.argv[1], sys.argv[2], "fp8").run()
"""
KILLED_AT_A_LINE = (
    """
import os, signal, sys
lines = int(sys.argv[3])

def trace(frame, event, argument):
    global lines
    if os.path.basename(frame.f_code.co_filename) not in ("convert.py", "convert_plan.py"):
        return None
    lines -= event == "line"
    if lines == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace

import dsc.models.convert
sys.settrace(trace)
"""
    + RUN
)


class Case(NamedTuple):
    source: Path
    expected: dict[str, bytes]
    """What an uninterrupted run writes: path in the folder -> bytes."""


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Three shards, each with a Linear weight and something else, and two other files."""
    folder = tmp_path_factory.mktemp("case")
    source = folder / "source"
    (source / "inference").mkdir(parents=True)
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for layer, shard in enumerate(SHARDS):
        names = [f"model.layers.{layer}.self_attn.o_proj.weight", f"model.layers.{layer}.input_layernorm.weight"]
        save_file({name: torch.randn(200, 150, generator=generator).bfloat16() for name in names}, source / shard)
        weight_map |= dict.fromkeys(names, shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "config.json").write_text('{"model_type": "deepseek_v3"}')
    (source / "tokenizer.json").write_text("{}")
    (source / "inference" / "model.py").write_text("pass")
    Conversion(source, folder / "target", "fp8").run()
    expected = tree(folder / "target")
    assert expected.keys() == {*SHARDS, *LAST, "tokenizer.json", "inference/model.py"}
    return Case(source, expected)


def check_unfinished(target: Path, expected: dict[str, bytes]) -> None:
    """Every file under its own name is complete; without config.json the folder is no checkpoint, and with it nothing is missing."""
    found = {name: data for name, data in tree(target).items() if not name.startswith(".convert")} if target.exists() else {}
    assert found.items() <= expected.items()
    if "config.json" in found:
        assert found == expected
    if "model.safetensors.index.json" in found:
        assert expected.keys() - found.keys() <= {"config.json"}


class Interrupted(BaseException):
    pass


def trace_lines(on_line: Callable[[], None]) -> Callable[[FrameType, str, Any], Any]:
    files = {convert_module.__file__, convert_module.plan.__code__.co_filename}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            on_line()
        return trace

    return trace


@pytest.fixture(scope="module")
def lines(case: Case, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many lines of the conversion's two modules an uninterrupted run executes."""
    count, target, outer = 0, tmp_path_factory.mktemp("count") / "target", sys.gettrace()

    def on_line() -> None:
        nonlocal count
        count += 1

    sys.settrace(trace_lines(on_line))
    try:
        Conversion(case.source, target, "fp8").run()
    finally:
        sys.settrace(outer)
    return count


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
def test_killed_at_any_point(case: Case, lines: int, tmp_path: Path, share: float) -> None:
    target = tmp_path / "target"
    command = [sys.executable, "-c", KILLED_AT_A_LINE, str(case.source), str(target), str(int(share * lines))]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    check_unfinished(target, case.expected)
    subprocess.run([sys.executable, "-c", RUN, str(case.source), str(target)], check=True)
    assert tree(target) == case.expected


def interrupted(case: Case, target: Path, line: int) -> bool:
    """Whether a run into which the `line`-th executed line throws an exception, as Ctrl-C does, ended with it."""
    outer, left = sys.gettrace(), line

    def on_line() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Interrupted

    sys.settrace(trace_lines(on_line))
    try:
        Conversion(case.source, target, "fp8").run()
    except Interrupted:
        return True
    finally:
        sys.settrace(outer)
    return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file whose `with` was interrupted before it began
def test_interrupted_twice_at_every_few_lines(case: Case, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module.os, "fsync", lambda file: None)  # thousands of files, and nobody pulls the plug
    for line in range(1, lines + 1, 6):
        target = tmp_path / f"target-{line}"
        assert interrupted(case, target, line)
        check_unfinished(target, case.expected)
        if "config.json" not in tree(target):
            interrupted(case, target, lines - line)  # a run that has less to do may be done before
            check_unfinished(target, case.expected)
        if "config.json" not in tree(target) or (target / ".convert.json").exists():
            Conversion(case.source, target, "fp8").run()
        assert tree(target) == case.expected, line
        shutil.rmtree(target)


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_failing_system_calls(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, when: str) -> None:
    real, calls = getattr(os, function), 0
    files = len(case.expected) + 1  # the state file is the first
    for fails in range(1, files + 1):
        target, calls = tmp_path / f"target-{fails}", 0

        def failing(*arguments: Any, fails: int = fails) -> None:
            nonlocal calls
            calls += 1
            if calls != fails or when == "after":
                real(*arguments)
            if calls == fails:
                raise OSError(5, "Input/output error")

        monkeypatch.setattr(convert_module.os, function, failing)
        with pytest.raises(DscError, match=rf"^{target}: Input/output error(; once that is mended, the same command goes on from here)?$"):
            Conversion(case.source, target, "fp8").run()
        assert not list(target.glob("*.partial"))
        assert not list(target.glob(".convert-*"))
        check_unfinished(target, case.expected)
        monkeypatch.undo()
        Conversion(case.source, target, "fp8").run()
        assert tree(target) == case.expected


@pytest.fixture
def unfinished(case: Case, tmp_path: Path) -> Path:
    """A target with the first shard, interrupted within the second."""

    def on_step(name: str) -> None:
        if name.startswith("model.layers.1."):
            raise Interrupted

    with pytest.raises(Interrupted):
        Conversion(case.source, tmp_path / "target", "fp8").run(on_step)
    assert sorted(os.listdir(tmp_path / "target")) == [".convert.json", SHARDS[0]]
    return tmp_path / "target"


class TestGoingOn:
    def test_complete_shards_are_kept(self, case: Case, unfinished: Path) -> None:
        before, steps = os.stat(unfinished / SHARDS[0]), list[str]()
        conversion = Conversion(case.source, unfinished, "fp8")
        done = conversion.run(steps.append)
        assert (done.shards, done.kept) == (2, 1)
        assert done.bytes_read == 2 * 2 * 200 * 150 * 2
        assert len(steps) == conversion.tensors == 6
        after = os.stat(unfinished / SHARDS[0])
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert tree(unfinished) == case.expected

    def test_a_shard_of_another_size_is_written_again(self, case: Case, unfinished: Path) -> None:
        os.truncate(unfinished / SHARDS[0], 1000)
        assert Conversion(case.source, unfinished, "fp8").run().kept == 0
        assert tree(unfinished) == case.expected

    def test_not_with_another_source(self, case: Case, unfinished: Path, tmp_path: Path) -> None:
        """The same names and sizes; a shard has been written since."""
        other = tmp_path / "other"
        shutil.copytree(case.source, other)
        assert Conversion(other, tmp_path / "elsewhere", "fp8").run().kept == 0
        os.utime(other / SHARDS[2], ns=(1, 1))
        before = tree(unfinished)
        found, expected = f"{unfinished}: holds an unfinished conversion of {case.source} to fp8", "one of this source as it is now"
        with pytest.raises(DscError) as error:
            Conversion(other, unfinished, "fp8")
        assert str(error.value) == f"{found}, expected {expected}, or a new or empty folder"
        assert tree(unfinished) == before

    def test_a_moved_source_is_the_same(self, case: Case, unfinished: Path, tmp_path: Path) -> None:
        shutil.copytree(case.source, tmp_path / "moved")
        assert Conversion(tmp_path / "moved", unfinished, "fp8").run().kept == 1
        assert tree(unfinished) == case.expected

    def test_not_to_another_form(self, case: Case, tmp_path: Path) -> None:
        fp8, target = tmp_path / "fp8", tmp_path / "target"
        Conversion(case.source, fp8, "fp8").run()

        def stop(name: str) -> None:
            raise Interrupted

        with pytest.raises(Interrupted):
            Conversion(fp8, target, "bf16").run(stop)
        with pytest.raises(DscError, match=rf"^{target}: holds an unfinished conversion of {fp8} to bf16, expected one of this source"):
            Conversion(case.source, target, "fp8")


class TestTargets:
    def test_a_folder_that_is_not_ours(self, case: Case, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(DscError, match=r"exists, expected a new or empty folder or an unfinished conversion of this source$"):
            Conversion(case.source, tmp_path, "fp8")
        with pytest.raises(DscError, match=r"notes\.txt: is a file, expected a new or empty folder$"):
            Conversion(case.source, tmp_path / "notes.txt", "fp8")
        assert tree(tmp_path) == {"notes.txt": b"mine"}

    def test_a_finished_one_is_left_alone(self, case: Case, tmp_path: Path) -> None:
        Conversion(case.source, tmp_path / "target", "fp8").run()
        with pytest.raises(DscError, match=r"target: exists, expected a new or empty folder"):
            Conversion(case.source, tmp_path / "target", "fp8")
        assert tree(tmp_path / "target") == case.expected

    def test_an_empty_folder(self, case: Case, tmp_path: Path) -> None:
        Conversion(case.source, tmp_path, "fp8").run()
        assert tree(tmp_path) == case.expected


class TestFullDisks:
    @pytest.fixture
    def limit(self) -> Iterator[Callable[[int], None]]:
        """Sets the largest size of a file, beyond which writing fails as it does on a full disk."""
        limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    def test_met_on_the_way(self, case: Case, tmp_path: Path, limit: Callable[[int], None]) -> None:
        target, limits = tmp_path / "target", resource.getrlimit(resource.RLIMIT_FSIZE)
        limit(50_000)
        with pytest.raises(DscError, match=rf"^{target}: File too large; once that is mended, the same command goes on from here$"):
            Conversion(case.source, target, "fp8").run()
        limit(limits[0])
        assert os.listdir(target) == [".convert.json"]
        Conversion(case.source, target, "fp8").run()
        assert tree(target) == case.expected

    def test_foreseen(self, case: Case, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = sum(len(case.expected[shard]) for shard in SHARDS[1:])
        usage = shutil.disk_usage(unfinished)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(DscError, match=rf"^{unfinished}: 0\.00 GB are still to be written, found 0\.00 GB free$"):
            Conversion(case.source, unfinished, "fp8").run()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        Conversion(case.source, unfinished, "fp8").run()
        assert tree(unfinished) == case.expected

    def test_a_folder_that_cannot_be_made(self, case: Case, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(DscError, match=r"file/target: Not a directory$"):
            Conversion(case.source, tmp_path / "file" / "target", "fp8").run()
