"""`dsc doctor`: what is there is ok, what is not says what gets it, and only what nothing works without makes it fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsc import backends
from dsc.driver import doctor


def by_name(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{f['area']} {f['name']}": f for f in found}


@pytest.fixture(scope="module")
def here() -> list[doctor.Finding]:
    return doctor.examine()


def test_text_and_json_say_the_same(command: Any, here: list[doctor.Finding]) -> None:
    shown = command("doctor")
    found = command("doctor", "--json").json
    assert shown.code == 0
    assert found["healthy"] is True
    for f, line in zip(found["findings"], shown.out.splitlines(), strict=True):
        assert f["status"] in line
        assert f["name"] in line
        assert f["hint"] in line
        assert "cache" in line or f["area"] == "machine" or f["detail"] in line  # memory and caches change meanwhile
    assert "\x1b" not in shown.out


def test_what_it_says_is_so(here: list[doctor.Finding]) -> None:
    import torch

    found = {f"{f.area} {f.name}": f for f in here}
    assert found["core torch"].detail == torch.__version__
    assert found["core numpy"].detail == np.__version__
    assert found["core python"].detail.startswith(sys.version.split()[0])
    assert found["machine cpus"].detail.startswith(f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}")
    assert ("gpu gpu" in found) == (not torch.cuda.is_available())
    assert (found["ranks gloo"].status == "ok") == torch.distributed.is_gloo_available()
    assert (found["ranks nccl"].status == "ok") == torch.distributed.is_nccl_available()
    assert {f.name for f in here if f.area == "backends"} >= {"numpy", "numpy-f64", "triton"}
    assert {f.name for f in here if f.area == "extras"} == {*doctor.EXTRAS, "onnxruntime"}
    assert all(f.status == "ok" or f.hint or f.area in ("gpu", "ranks", "triton") for f in here), "what is not there says what to do"


def test_triton_really_runs(here: list[doctor.Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert next(f for f in here if f.name == "triton" and f.area == "triton").status == "ok"
    from dsc.backends.triton.run import Executor

    monkeypatch.setattr(Executor, "run", lambda *_: (np.zeros((4, 64)),))
    (broken,) = doctor._triton()
    assert (broken.status, broken.detail.partition(": ")[2]) == ("broken", "ArithmeticError: rms_norm of ones gives 0.0")


def test_what_is_missing_says_what_gets_it(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: "" if name in ("onnx", "scipy", "onnxruntime") else installed(name))
    done = command("doctor", "--json")
    found = by_name(done.json["findings"])
    assert done.code == 0
    assert found["extras onnx"]["hint"] == "pip install 'dsc[onnx]'"
    assert found["extras onnx"]["detail"] == "dsc export; without onnx"
    assert found["extras plan"]["detail"].endswith("without scipy")
    assert found["extras onnxruntime"]["status"] == "missing"
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert [(f.status, f.hint) for f in doctor._triton()] == [("missing", "pip install 'dsc[triton]'")]


@pytest.mark.parametrize(
    ("versions", "status"), [({"lark": ""}, "missing"), ({"lark": "1.1.9"}, "broken"), ({"torch": "2.14.0"}, "broken")]
)
def test_a_broken_core_is_an_error(command: Any, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], status: str) -> None:
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: versions.get(name, installed(name)))
    done = command("doctor", "--json")
    assert done.code == 2
    assert done.json["healthy"] is False
    (name,) = versions
    found = by_name(done.json["findings"])[f"core {name}"]
    assert (found["status"], found["hint"].startswith(f"pip install '{name}")) == (status, True)
    assert command("doctor").out.endswith("something is wrong that nothing works without; the lines above say what to do\n")


@pytest.mark.parametrize(
    ("found", "requirement", "fits"),
    [
        ("2.13.0+cpu", "torch>=2.11,<2.14", True),
        ("2.14.1", "torch>=2.11,<2.14", False),
        ("2.9.1", "torch>=2.11,<2.14", False),
        ("8.10", "click>=8.9", True),
        ("3.0.0rc1", "x", True),
    ],
)
def test_versions_are_compared_by_their_numbers(found: str, requirement: str, fits: bool) -> None:
    assert doctor._fits(found, requirement) == fits


def test_backends_of_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "third-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dsc.backends]\nmine = doctor_third:MINE\nnot_mine = doctor_third:NONE\nnumpy = doctor_third:MINE\n"
    )
    (tmp_path / "doctor_third.py").write_text("from dsc.backends.numpy_ref.run import FLOAT32 as MINE\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    backends.get.cache_clear()
    found = {(f.name, f.status): f.detail for f in doctor._backends()}
    assert found["mine", "ok"] == "doctor_third:MINE of third 1.0"
    assert "AttributeError: module 'doctor_third' has no attribute 'NONE'" in found["not_mine", "broken"]
    assert found["numpy", "broken"] == "doctor_third:MINE of third 1.0 takes a name of dsc: it is not used"
    backends.get.cache_clear()


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [(f.status, f.detail) for f in doctor._cache()] == [("ok", f"{tmp_path / 'dsc'}: empty")]
    (tmp_path / "dsc").mkdir()
    (tmp_path / "dsc" / "kernel").write_bytes(bytes(2000))
    assert [f.detail for f in doctor._cache()] == [f"{tmp_path / 'dsc'}: 1 files, 2.00 kB; it may be deleted"]


@pytest.mark.slow
def test_targets_compile(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from dsc.backends.triton.targets import TARGETS

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = [f for f in command("doctor", "--compile", "--json").json["findings"] if f["area"] == "targets"]
    assert [(f["name"], f["status"]) for f in found] == [(name, "ok") for name in TARGETS]


def test_it_is_quick() -> None:
    """In CPU time of the process and its children: most of it is the import of torch and of Triton."""
    code = """
import os, sys
from dsc.__main__ import main
sys.argv = ["dsc", "doctor", "--json"]
try:
    main()
finally:
    print(*os.times()[:4], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout)["findings"]
    times = list(map(float, done.stderr.splitlines()[-1].split()))
    assert sum(times) < 10, f"user, system, children's: {times} s; 3.5 s on a machine that runs nothing else"
